"""pass@k for `evaluate.load`: programs are run by llm_recipes.sandbox."""

import datasets
import evaluate

from llm_recipes.evaluation.scores import pass_scores, regrouped
from llm_recipes.sandbox import Program, judge


class PassAtK(evaluate.Metric):
    def _info(self):
        return evaluate.MetricInfo(
            description="Chance that one of k programs passes the tests (Chen et al. 2021), and how many ran out of time.",
            citation="",
            inputs_description="predictions: programs of each problem; references: its tests; k: a list; strict: as judge.",
            features=datasets.Features(
                {"predictions": datasets.Sequence(datasets.Value("string")), "references": datasets.Value("string")}
            ),
        )

    def _compute(self, predictions, references, k=(1,), strict=True):
        programs = [
            Program(code, tests) for codes, tests in zip(predictions, references, strict=True) for code in codes
        ]
        verdicts = judge(programs, strict=strict)
        passed = regrouped([verdict.passed for verdict in verdicts], predictions)
        scores = [pass_scores(found, k) for found in passed]
        means = {name: sum(score[name] for score in scores) / len(scores) for name in scores[0]}
        return means | {"timeouts": sum(verdict.status == "timeout" for verdict in verdicts)}
