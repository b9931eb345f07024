"""Tiny random models for the tests of evaluation."""

import functools
import json
import random
import runpy
import sys
from pathlib import Path

import torch
from tokenizers.processors import TemplateProcessing
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from llm_recipes.conversations import load_chat_tokenizer
from llm_recipes.evaluation.model import Model
from llm_recipes.models import from_scratch
from llm_recipes.tokenization import train_tokenizer
from tests.running import ROOT, Result, random_words

EVALUATE = ROOT / "eval/run.py"
DATA = ROOT / "tests/data/eval"
ARCHITECTURE = {
    "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2,
    "num_key_value_heads": 2,
}  # fmt: skip


def tokenizer(bos: bool = False):
    """Byte-level, with some merges; with `bos` every text begins with it."""
    rng = random.Random(0)
    made = train_tokenizer([{"text": random_words(rng, 60)} for _ in range(100)], 300)
    if bos:
        made.bos_token = "<|reserved_0|>"
        made.backend_tokenizer.post_processor = TemplateProcessing(
            single="<|reserved_0|> $A", special_tokens=[("<|reserved_0|>", made.bos_token_id)]
        )
    return made


@functools.cache
def tiny(max_batch_tokens: int, kind: str = "llama", context: int = 128, seed: int = 0, bos: bool = False, **keys):
    """A `Model` with random weights, ten times as large as usual so that what is attended to shows."""
    return Model(network(kind, context, seed, **keys), tokenizer(bos), max_batch_tokens)


@functools.cache
def network(kind: str = "llama", context: int = 128, seed: int = 0, **keys) -> PreTrainedModel:
    own = {"max_position_embeddings": context, "initializer_range": 0.2, "vocab_size": 300, "pad_token_id": 1}
    ends = {"bos_token_id": None, "eos_token_id": 0}
    model = from_scratch(AutoConfig.for_model(kind, **ARCHITECTURE, **own, **ends, **keys), seed=seed).eval()
    if not model.config.tie_word_embeddings:  # else nearly all answers were bytes that are no text
        odd = [i for i, token in enumerate(tokenizer().convert_ids_to_tokens(range(16, 300))) if not token.isascii()]
        model.lm_head.weight.data[[i + 16 for i in odd]] = 0
    return model


def save(folder: Path, context: int = 256, seed: int = 0, chat: bool = False) -> str:
    """A model as SFT leaves it (`chat`), or pretraining."""
    network(context=context, seed=seed).save_pretrained(folder)
    tokenizer().save_pretrained(folder)
    if chat:
        load_chat_tokenizer(str(folder), "main").tokenizer.save_pretrained(folder)
    return str(folder)


def ids(seed: int, length: int) -> list[int]:
    return torch.randint(20, 300, (length,), generator=torch.Generator().manual_seed(seed)).tolist()


def results(folder) -> dict:
    return json.loads(Path(folder, "results.json").read_text())


def lines(path) -> list[dict]:
    return [json.loads(line) for line in Path(path).read_text().split("\n")[:-1]]


def load(folder: str) -> PreTrainedModel:
    return AutoModelForCausalLM.from_pretrained(folder)


def evaluate(monkeypatch, capfd, *argv) -> Result:
    """`python eval/run.py *argv` in this process, which has the slow imports done; not for what ends it."""
    monkeypatch.setattr(sys, "argv", [str(EVALUATE), *map(str, argv)])
    capfd.readouterr()
    code = 0
    try:
        runpy.run_path(str(EVALUATE), run_name="__main__")
    except SystemExit as stop:
        code = stop.code
    return Result(code, *capfd.readouterr())
