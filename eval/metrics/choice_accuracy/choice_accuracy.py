"""Multiple-choice accuracy for `evaluate.load`, a shell of llm_recipes.evaluation.scores.choice_scores."""

import datasets
import evaluate

from llm_recipes.evaluation.scores import choice_scores


class ChoiceAccuracy(evaluate.Metric):
    def _info(self):
        return evaluate.MetricInfo(
            description="Share of questions whose likeliest choice is right: as it is, per character, per UTF-8 byte.",
            citation="",
            inputs_description="predictions: log-likelihoods of the choices; choices: their texts; references: the right one.",
            features=datasets.Features(
                {
                    "predictions": datasets.Sequence(datasets.Value("float64")),
                    "choices": datasets.Sequence(datasets.Value("string")),
                    "references": datasets.Value("int64"),
                }
            ),
        )

    def _compute(self, predictions, choices, references):
        scores = [choice_scores(*row) for row in zip(predictions, choices, references, strict=True)]
        return {name: sum(score[name] for score in scores) / len(scores) for name in scores[0]}
