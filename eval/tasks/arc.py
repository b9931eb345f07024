"""ARC (Clark et al. 2018): science questions, most with four choices."""

from llm_recipes.config import Source
from llm_recipes.evaluation.scores import rows_choice_scores
from llm_recipes.evaluation.tasks import Task


def gold(row: dict) -> int:
    return row["choices"]["label"].index(row["answerKey"])


def arc(name: str) -> Task:
    return Task(
        kind="choice",
        version="lm-eval 1",
        protocol="no options listed; likeliest answer, as it is and for each character",
        data=(Source("allenai/ai2_arc", name=name, split="test"),),
        columns={"question": str, "choices": dict, "answerKey": str},
        prompt=lambda row: f"Question: {row['question']}\nAnswer:",
        shots=(Source("allenai/ai2_arc", name=name, split="train"),),
        answer=lambda row: row["choices"]["text"][gold(row)],
        choices=lambda row: row["choices"]["text"],
        score=rows_choice_scores(lambda row: row["choices"]["text"], gold, ["acc", "acc_norm"]),
        hub=("allenai/ai2_arc", name, "acc_norm"),
    )


TASKS = {"arc_easy": arc("ARC-Easy"), "arc_challenge": arc("ARC-Challenge")}
