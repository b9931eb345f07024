"""Answers that only people or a judge can compare (eval/preference/): no score. Rows have a `prompt`."""

from llm_recipes.config import Source
from llm_recipes.evaluation.tasks import Task

TASKS = {
    "open_ended": Task(
        kind="generate",
        version="1",
        protocol="the prompt as a user's message, greedy",
        data=(
            Source(
                "tatsu-lab/alpaca_farm", name="alpaca_farm_evaluation", split="eval", columns={"prompt": "instruction"}
            ),
        ),
        columns={"prompt": str},
        prompt=lambda row: row["prompt"],
        max_new_tokens=512,
        chat=True,
    )
}
