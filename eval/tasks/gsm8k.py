"""GSM8K (Cobbe et al. 2021): grade-school word problems whose answers end in `#### number`."""

import json
from functools import partial
from pathlib import Path

from llm_recipes.config import Source
from llm_recipes.evaluation.extract import gsm8k_cot_strict
from llm_recipes.evaluation.scores import number_scores
from llm_recipes.evaluation.tasks import Task

SHOTS = Path(__file__).parent / "shots/gsm8k_cot.jsonl"  # the eight of Wei et al. 2022, table 20
STOP = ("</s>", "<|im_end|>")

common = {
    "kind": "generate",
    "data": (Source("openai/gsm8k", name="main", split="test"),),
    "columns": {"question": str, "answer": str},
}
chain_of_thought = common | {
    "version": "lm-eval 3",
    "stop": ("Q:", *STOP),
    "score": partial(number_scores, strict=gsm8k_cot_strict),
}

TASKS = {
    "gsm8k": Task(
        **common,
        version="lm-eval 3",
        protocol="solved problems of the training set before the question; the number after ####, and the last number",
        prompt=lambda row: f"Question: {row['question']}\nAnswer:",
        num_fewshot=5,
        shots=(Source("openai/gsm8k", name="main", split="train"),),
        answer=lambda row: row["answer"],
        stop=("Question:", *STOP),
        score=number_scores,
        hub=("openai/gsm8k", "gsm8k", "exact_match_strict"),
    ),
    "gsm8k_cot": Task(
        **chain_of_thought,
        protocol="the worked examples of Wei et al. 2022; the number after 'The answer is', and the last number",
        prompt=lambda row: f"Q: {row['question']}\nA:",
        num_fewshot=8,
        shots=tuple(map(json.loads, SHOTS.read_text().splitlines())),
        draw="first",
        answer=lambda row: row["answer"],
    ),
    "gsm8k_cot_zeroshot": Task(
        **chain_of_thought,
        protocol="no examples, 'Let's think step by step.'; the number after 'The answer is', and the last number",
        prompt=lambda row: f"Q: {row['question']}\nA: Let's think step by step.",
    ),
    "gsm8k_chat": Task(
        **common,
        version="1",
        protocol="the question as a user's message, asked to end with ####; the number there, and the last number",
        prompt=lambda row: f"{row['question']}\nThink step by step, and end with #### and the number.",
        max_new_tokens=512,
        chat=True,
        score=number_scores,
    ),
}
