"""The built-in word problems (llm_recipes/arithmetic.py), in GSM8K's format."""

from llm_recipes.arithmetic import generate
from llm_recipes.config import Source
from llm_recipes.evaluation.scores import number_scores
from llm_recipes.evaluation.tasks import Task

common = {
    "kind": "generate",
    "version": "1",
    "data": (Source("builtin:arithmetic/test", rows=1000),),
    "columns": {"question": str, "answer": str},
    "max_new_tokens": 96,
    "score": number_scores,
}

solved = [[turn["content"] for turn in problem] for problem in generate("sft", rows=1000)["messages"]]

TASKS = {
    "arithmetic": Task(
        **common,
        protocol="GSM8K's: solved problems before the question; the number after ####, and the last number",
        prompt=lambda row: f"Question: {row['question']}\nAnswer:",
        num_fewshot=1,  # the small models of these recipes read 256 tokens
        shots=tuple({"question": question, "answer": answer} for question, answer in solved),
        answer=lambda row: row["answer"],
        stop=("Question:",),
    ),
    "arithmetic_chat": Task(
        **common,
        protocol="the question as a user's message; the number after ####, and the last number",
        prompt=lambda row: row["question"],
        chat=True,
    ),
}
