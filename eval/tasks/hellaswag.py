"""HellaSwag (Zellers et al. 2019): which of four sentences goes on."""

import re

from llm_recipes.config import Source
from llm_recipes.evaluation.scores import rows_choice_scores
from llm_recipes.evaluation.tasks import Task


def clean(text: str) -> str:
    """Without the marks that WikiHow's pages left."""
    text = text.strip().replace(" [title]", ". ")
    return re.sub(r"\[.*?\]", "", text).replace("  ", " ")


def begun(row: dict) -> str:
    return clean(f"{row['activity_label']}: {row['ctx_a']} {row['ctx_b'].capitalize()}")


def endings(row: dict) -> list[str]:
    return [clean(ending) for ending in row["endings"]]


TASKS = {
    "hellaswag": Task(
        kind="choice",
        version="lm-eval 1",
        protocol="likeliest ending, as it is and for each character",
        data=(Source("Rowan/hellaswag", split="validation"),),
        columns={"activity_label": str, "ctx_a": str, "ctx_b": str, "endings": list, "label": str},
        prompt=begun,
        shots=(Source("Rowan/hellaswag", split="train"),),
        spare=1,
        answer=lambda row: endings(row)[int(row["label"])],
        choices=endings,
        score=rows_choice_scores(endings, lambda row: int(row["label"]), ["acc", "acc_norm"]),
        hub=("Rowan/hellaswag", "hellaswag", "acc_norm"),
    )
}
