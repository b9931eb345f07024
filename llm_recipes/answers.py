"""Questions with one right answer: what a model answers, and how often it is right."""

import torch
from datasets import Dataset
from transformers import LogitsProcessor, LogitsProcessorList

from llm_recipes.arithmetic import final_answer, is_correct
from llm_recipes.config import Source
from llm_recipes.conversations import Encoder
from llm_recipes.datasets import load_rows, rename
from llm_recipes.errors import UserError
from llm_recipes.metrics import wilson
from llm_recipes.models import stop_ids


def load_questions(source: Source) -> Dataset:
    """Rows with `question` and a gold `answer` in GSM8K's format. Raises UserError for a row without."""
    rows = rename(load_rows(source), source, "answers")
    if not {"question", "answer"} <= set(rows.column_names):
        raise UserError(
            f"answers: {source.path} has the columns {', '.join(rows.column_names)}; needed: question, answer"
        )
    pairs = zip(rows["question"], rows["answer"], strict=True)
    if bad := [
        i
        for i, pair in enumerate(pairs)
        if not all(isinstance(text, str) for text in pair) or not final_answer(pair[1])
    ]:
        raise UserError(
            f"answers: {source.path}: row {bad[0]} has no question or no final answer after #### ({len(bad)} such rows)"
        )
    return rows


def draw(logits: torch.Tensor, uniforms: torch.Tensor, temperature: float, top_p: float = 1.0) -> torch.Tensor:
    """Tokens `(B, 1)`: for each row of `logits` `(B, V)` that at which the cumulated probability passes its random number
    in [0, 1). `top_p` leaves the most likely tokens up to and with the one that reaches that share (Holtzman et al. 2020).
    """
    probs = (logits.float() / temperature).softmax(-1)
    if top_p < 1:
        likely, order = probs.sort(dim=-1, descending=True, stable=True)
        kept = likely.cumsum(-1) - likely < top_p
        probs = probs * kept.scatter(1, order, kept)
    cumulated = probs.cumsum(-1)
    whole = cumulated[:, -1:]
    below = torch.nextafter(whole, torch.zeros_like(whole))  # rounded up, it would pass no token
    return torch.searchsorted(cumulated, (uniforms[:, None] * whole).minimum(below), right=True)


class _Draw(LogitsProcessor):
    """Leaves one token, the one that `draw` gives with the random numbers of this position."""

    def __init__(self, uniforms: torch.Tensor, width: int, temperature: float, top_p: float):
        self.uniforms, self.width, self.temperature, self.top_p = uniforms, width, temperature, top_p

    def __call__(self, input_ids, scores):
        token = draw(scores, self.uniforms[:, input_ids.shape[1] - self.width], self.temperature, self.top_p)
        return torch.full_like(scores, -torch.inf).scatter(1, token, 0.0)


@torch.no_grad()
def generate(
    model, prompts: list[list[int]], pad_id: int, max_new_tokens: int, uniforms: torch.Tensor | None = None,
    temperature: float = 1.0, stop: list[int] | None = None, batch_size: int = 64, top_p: float = 1.0, **options,
) -> list[list[int]]:  # fmt: skip
    """Completions of token-id prompts up to the first of `stop` (the model's own without), which stays in: greedy, or drawn
    at `temperature` with the random numbers `uniforms` `(n, max_new_tokens)`.

    Drawn so, a completion follows from its own numbers, whatever stands beside it in the batch. Batches are sorted by
    length and padded left. The penalties of a model's own generation_config do not count; `options` are generate's.
    """
    completions, order = [None] * len(prompts), sorted(range(len(prompts)), key=lambda i: len(prompts[i]))
    training, stop = model.training, stop_ids(model) if stop is None else stop
    model.eval()
    for start in range(0, len(order), batch_size):
        rows = order[start : start + batch_size]
        width = max(len(prompts[row]) for row in rows)
        ids = torch.tensor([[pad_id] * (width - len(prompts[row])) + prompts[row] for row in rows])
        mask = torch.tensor([[0] * (width - len(prompts[row])) + [1] * len(prompts[row]) for row in rows])
        drawn = [] if uniforms is None else [_Draw(uniforms[rows].to(model.device), width, temperature, top_p)]
        out = model.generate(
            ids.to(model.device), attention_mask=mask.to(model.device), max_new_tokens=max_new_tokens, do_sample=False,
            use_cache=True, pad_token_id=pad_id, eos_token_id=stop or None, repetition_penalty=1.0,
            no_repeat_ngram_size=0, logits_processor=LogitsProcessorList(drawn), **options,
        )[:, width:].tolist()  # fmt: skip
        for row, tokens in zip(rows, out, strict=True):
            end = next((i + 1 for i, token in enumerate(tokens) if token in stop), len(tokens))
            completions[row] = tokens[:end]
    model.train(training)
    return completions


def exact_match(model, encoder: Encoder, questions: Dataset, max_new_tokens: int) -> tuple[dict, list[str]]:
    """({exact_match, its 95 % interval, n, share that stopped by itself}, three samples) of greedy answers."""
    prompts = [[{"role": "user", "content": question}] for question in questions["question"]]
    ids = [ids for ids, _ in encoder.encode([encoder.pieces(prompt, prompt=True) for prompt in prompts])]
    completions = generate(model, ids, encoder.tokenizer.pad_token_id, max_new_tokens)
    texts = encoder.tokenizer.batch_decode(completions, skip_special_tokens=True)
    right = sum(is_correct(text, final_answer(gold)) for text, gold in zip(texts, questions["answer"], strict=True))
    low, high = wilson(right, len(texts))
    stopped = sum(tokens[-1] in stop_ids(model) for tokens in completions)
    figures = {
        "exact_match": right / len(texts), "exact_match_low": low, "exact_match_high": high, "questions": len(texts),
        "stopped": stopped / len(texts), "answer_tokens": sum(map(len, completions)) / len(texts),
    }  # fmt: skip
    samples = [
        f"{q}\n---- answer\n{text}\n---- gold\n{gold}"
        for q, text, gold in zip(questions["question"][:3], texts, questions["answer"], strict=False)
    ]
    return figures, samples
