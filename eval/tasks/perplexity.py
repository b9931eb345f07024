"""Perplexity by the two usual protocols, which differ on the same text, and bits a byte, which compare tokenizers.

By default of the files of the Python installation that recipes/pretrain holds out, with its eval_fraction and seed.
"""

import re

from llm_recipes.config import Source
from llm_recipes.evaluation.tasks import Task

common = {"version": "1", "data": (Source("builtin:python"),), "columns": {"text": str}, "held_out": (0.02, 42)}


def detokenized(row: dict) -> str:
    """A page of WikiText as prose again, with the harness's rules."""
    text = row["page"].replace("s '", "s'")
    text = re.sub(r"/' [0-9]/", r"/'[0-9]/", text)
    for tokens, prose in (
        (" @-@ ", "-"), (" @,@ ", ","), (" @.@ ", "."), (" : ", ": "), (" ; ", "; "), (" . ", ". "), (" ! ", "! "),
        (" ? ", "? "), (" , ", ", "),
    ):  # fmt: skip
        text = text.replace(tokens, prose)
    for left, right, inside in ((r"\(", r"\)", r"[^\)]"), (r"\[", r"\]", r"[^\]]"), ("{", "}", "[^}]")):
        text = re.sub(rf"{left}\s*({inside}*?)\s*{right}", rf"{left[-1]}\1{right[-1]}", text)
    text = re.sub(r"\"\s*([^\"]*?)\s*\"", r'"\1"', text)
    text = re.sub(r"'\s*([^']*?)\s*'", r"'\1'", text)
    for tokens, prose in (
        ("= = = =", "===="), ("= = =", "==="), ("= =", "=="), (" ° ", "°"), (" \n", "\n"), ("\n ", "\n"),
        (" N ", " 1 "), (" 's", "'s"),
    ):  # fmt: skip
        text = text.replace(tokens, prose)
    return text


TASKS = {
    "perplexity_rolling": Task(
        **common,
        kind="rolling",
        protocol="lm-eval's rolling windows: a BOS first, each token scored once",
        prompt=lambda row: row["text"],
    ),
    "perplexity_strided": Task(
        **common,
        kind="strided",
        protocol="Hugging Face's strided windows: one stream, half of each window context, the first token not scored",
        prompt=lambda row: row["text"],
    ),
    "wikitext": Task(
        kind="rolling",
        version="lm-eval 2",
        protocol="lm-eval's rolling windows over detokenised pages, words and bytes of the page as it was",
        data=(Source("EleutherAI/wikitext_document_level", name="wikitext-2-raw-v1", split="test"),),
        columns={"page": str},
        prompt=detokenized,
        counted=lambda row: row["page"],
        hub=("EleutherAI/wikitext_document_level", "wikitext", "word_perplexity"),
    ),
}
GROUPS = {"perplexity": ["perplexity_rolling", "perplexity_strided"]}
