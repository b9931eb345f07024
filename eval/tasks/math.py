"""MATH (Hendrycks et al. 2021): competition problems with answers in \\boxed{}."""

import json
from pathlib import Path

from llm_recipes.config import Source
from llm_recipes.evaluation.scores import boxed_scores, math_scores
from llm_recipes.evaluation.tasks import Task

SHOTS = Path(__file__).parent / "shots/minerva_math.jsonl"  # the four of Lewkowycz et al. 2022, appendix D
SUBJECTS = (
    "algebra", "counting_and_probability", "geometry", "intermediate_algebra", "number_theory", "prealgebra",
    "precalculus",
)  # fmt: skip

common = {
    "kind": "generate",
    "data": tuple(Source("EleutherAI/hendrycks_math", name=subject, split="test") for subject in SUBJECTS),
    "columns": {"problem": str, "solution": str},
}

TASKS = {
    "minerva_math": Task(
        **common,
        version="lm-eval 3.1, 1,024 tokens",
        protocol="worked examples; 'The final answer is' compared as formulas, and math-verify on the whole answer",
        prompt=lambda row: f"Problem:\n{row['problem']}\n\nSolution:",
        num_fewshot=4,
        shots=tuple(map(json.loads, SHOTS.read_text().splitlines())),
        draw="first",
        answer=lambda row: row["solution"],
        stop=("Problem:",),
        score=math_scores,
        hub=("EleutherAI/hendrycks_math", "minerva_math", "exact_match"),
        max_new_tokens=1024,  # lm-eval's 256 cut the solutions of stronger models
    ),
    "math_chat": Task(
        **common,
        version="1",
        protocol="the problem as a user's message, answer asked for in \\boxed{}; math-verify on the whole answer",
        prompt=lambda row: f"{row['problem']}\nThink step by step, and put the final answer in \\boxed{{}}.",
        max_new_tokens=1024,
        chat=True,
        score=boxed_scores,
    ),
}
