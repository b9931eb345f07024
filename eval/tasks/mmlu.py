"""MMLU (Hendrycks et al. 2021): 57 subjects, four choices."""

from llm_recipes.config import Source
from llm_recipes.evaluation.scores import rows_choice_scores
from llm_recipes.evaluation.tasks import Task

LETTERS = ["A", "B", "C", "D"]


def listed(row: dict) -> str:
    options = "\n".join(f"{letter}. {choice}" for letter, choice in zip(LETTERS, row["choices"], strict=True))
    return f"{row['question'].strip()}\n{options}\nAnswer:"


common = {
    "kind": "choice",
    "data": (Source("cais/mmlu", name="all", split="test"),),
    "columns": {"question": str, "choices": list, "answer": int, "subject": str},
    "group": lambda row: row["subject"],
    "shots": (Source("cais/mmlu", name="all", split="dev"),),
    "draw": "first",
}

TASKS = {
    "mmlu": Task(
        **common,
        version="lm-eval 1",
        protocol="the first of dev before the question; likeliest letter",
        num_fewshot=5,
        description=lambda row: (
            f"The following are multiple choice questions (with answers) about {row['subject'].replace('_', ' ')}.\n\n"
        ),
        prompt=listed,
        answer=lambda row: LETTERS[row["answer"]],
        choices=lambda row: LETTERS,
        score=rows_choice_scores(lambda row: LETTERS, lambda row: row["answer"], ["acc"]),
        hub=("cais/mmlu", "mmlu", "acc"),
    ),
    "mmlu_cloze": Task(
        **common,
        version="lm-eval 1 (continuation)",
        protocol="no options listed; likeliest answer, as it is and for each character: for models below 1B, which do "
        "not use letters",
        prompt=lambda row: f"Question: {row['question'].strip()}\nAnswer:",
        answer=lambda row: row["choices"][row["answer"]],
        choices=lambda row: row["choices"],
        score=rows_choice_scores(lambda row: row["choices"], lambda row: row["answer"], ["acc", "acc_norm"]),
    ),
}
