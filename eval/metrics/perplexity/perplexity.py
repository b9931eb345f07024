"""Perplexity for `evaluate.load`, a shell of llm_recipes.evaluation.scores.perplexity_scores."""

import datasets
import evaluate

from llm_recipes.evaluation.scores import perplexity_scores


class Perplexity(evaluate.Metric):
    def _info(self):
        return evaluate.MetricInfo(
            description="Perplexity a token, byte and word, and bits a byte, of all documents together.",
            citation="",
            inputs_description="predictions: log-likelihood of each document in nats; tokens, bytes, words: its sizes.",
            features=datasets.Features(
                {"predictions": datasets.Value("float64")}
                | {name: datasets.Value("int64") for name in ("tokens", "bytes", "words")}
            ),
        )

    def _compute(self, predictions, tokens, bytes, words):
        return perplexity_scores(-sum(predictions), sum(tokens), sum(bytes), sum(words))
