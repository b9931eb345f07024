"""MBPP (Austin et al. 2021): 500 small programs from a sentence and three tests."""

import ast
from functools import partial

from llm_recipes.config import Source
from llm_recipes.evaluation.scores import program_scores
from llm_recipes.evaluation.tasks import Task
from llm_recipes.sandbox import Program


def prompt(row: dict) -> str:
    tests = "\n".join(row["test_list"][:3])
    return (
        f"You are an expert Python programmer, and here is your task: {row['text']} "
        f"Your code should pass these tests:\n\n{tests}\n[BEGIN]\n"
    )


def program(row: dict, text: str) -> Program:
    """With `test_setup_code`, which other harnesses leave out: without it the reference of task 367 fails.

    The tests see what the reference defines; one of its functions is called `sum`.
    """
    tests = "\n".join([row["test_setup_code"], *row["test_list"]])
    defined = {
        node.name for node in ast.walk(ast.parse(row["code"])) if isinstance(node, ast.FunctionDef | ast.ClassDef)
    }
    used = {node.id for node in ast.walk(ast.parse(tests)) if isinstance(node, ast.Name)}
    return Program(text, tests, names=tuple(sorted(defined & used)))


TASKS = {
    "mbpp": Task(
        kind="generate",
        version="lm-eval 1, with test_setup_code",
        protocol="solved tasks before the task, 2, 3 and 4, greedy; pass@1",
        data=(Source("google-research-datasets/mbpp", name="full", split="test"),),
        columns={"task_id": int, "text": str, "code": str, "test_list": list, "test_setup_code": str},
        keep=lambda row: 11 <= row["task_id"] <= 510,
        prompt=prompt,
        num_fewshot=3,
        shots=(Source("google-research-datasets/mbpp", name="full", split="prompt"),),
        shot=lambda row: row["task_id"] in (2, 3, 4),
        draw="first",
        answer=lambda row: f"{row['code']}\n[DONE]",
        delimiter="",
        stop=("[DONE]",),
        runs_code=True,
        score=partial(program_scores, program=program, cpu_seconds=10),  # the reference of task 123 takes 3
        hub=("google-research-datasets/mbpp", "mbpp", "pass@1"),
    )
}
