"""exact_match for `evaluate.load`, a shell of llm_recipes.evaluation.extract.same_text."""

import datasets
import evaluate

from llm_recipes.evaluation.extract import same_text
from llm_recipes.evaluation.statistics import estimate


class ExactMatch(evaluate.Metric):
    def _info(self):
        return evaluate.MetricInfo(
            description="Share of predictions that are their reference, with its 95 % interval.",
            citation="",
            inputs_description="predictions, references: texts. ignore_case; regexes_to_ignore: deleted from both.",
            features=datasets.Features(
                {"predictions": datasets.Value("string"), "references": datasets.Value("string")}
            ),
        )

    def _compute(self, predictions, references, ignore_case=False, regexes_to_ignore=()):
        pairs = zip(predictions, references, strict=True)
        right = [float(same_text(*pair, ignore_case, regexes_to_ignore)) for pair in pairs]
        return {"exact_match": sum(right) / len(right), "ci95": estimate(right)[2:]}
