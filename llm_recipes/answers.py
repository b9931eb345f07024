"""Questions with one right answer: what a model answers, and how often it is right."""

import torch
from datasets import Dataset

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


@torch.no_grad()
def generate(
    model, prompts: list[list[int]], pad_id: int, max_new_tokens: int, sample: bool = False, batch_size: int = 64
) -> list[list[int]]:
    """Completions of token-id prompts up to the end of turn, which stays in: greedy, or a `sample` at temperature 1.

    Batches are sorted by length and padded left. The penalties of a model's own generation_config do not count.
    """
    completions, order = [None] * len(prompts), sorted(range(len(prompts)), key=lambda i: len(prompts[i]))
    training, how = model.training, {"temperature": 1.0, "top_k": 0, "top_p": 1.0} if sample else {}
    model.eval()
    for start in range(0, len(order), batch_size):
        rows = order[start : start + batch_size]
        width = max(len(prompts[row]) for row in rows)
        ids = torch.tensor([[pad_id] * (width - len(prompts[row])) + prompts[row] for row in rows])
        mask = torch.tensor([[0] * (width - len(prompts[row])) + [1] * len(prompts[row]) for row in rows])
        out = model.generate(
            ids.to(model.device), attention_mask=mask.to(model.device), max_new_tokens=max_new_tokens, do_sample=sample,
            use_cache=True, pad_token_id=pad_id, repetition_penalty=1.0, no_repeat_ngram_size=0, **how,
        )[:, width:].tolist()  # fmt: skip
        for row, tokens in zip(rows, out, strict=True):
            end = next((i + 1 for i, token in enumerate(tokens) if token in stop_ids(model)), len(tokens))
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
