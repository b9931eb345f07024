"""CommonsenseQA (Talmor et al. 2019): five choices; the validation rows, for the test's answers are not public."""

from llm_recipes.config import Source
from llm_recipes.evaluation.scores import rows_choice_scores
from llm_recipes.evaluation.tasks import Task

LETTERS = ["A", "B", "C", "D", "E"]


def listed(row: dict) -> str:
    options = "\n".join(f"{letter}. {text}" for letter, text in zip(LETTERS, row["choices"]["text"], strict=True))
    return f"Question: {row['question'].strip()}\n{options}\nAnswer:"


def gold(row: dict) -> int:
    return LETTERS.index(row["answerKey"])


common = {
    "kind": "choice",
    "data": (Source("tau/commonsense_qa", split="validation"),),
    "columns": {"question": str, "choices": dict, "answerKey": str},
    "shots": (Source("tau/commonsense_qa", split="train"),),
    "spare": 1,
}

TASKS = {
    "commonsense_qa": Task(
        **common,
        version="lm-eval 1",
        protocol="options listed; likeliest letter",
        prompt=listed,
        answer=lambda row: row["answerKey"],
        choices=lambda row: LETTERS,
        score=rows_choice_scores(lambda row: LETTERS, gold, ["acc"]),
        hub=("tau/commonsense_qa", "commonsense_qa", "acc"),
    ),
    "commonsense_qa_cloze": Task(
        **common,
        version="1",
        protocol="no options listed; likeliest answer, as it is and for each character",
        prompt=lambda row: f"Question: {row['question'].strip()}\nAnswer:",
        answer=lambda row: row["choices"]["text"][gold(row)],
        choices=lambda row: row["choices"]["text"],
        score=rows_choice_scores(lambda row: row["choices"]["text"], gold, ["acc", "acc_norm"]),
    ),
}
