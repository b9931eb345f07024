"""Text from a model that has just been trained, to see what it learnt."""

import torch
from transformers import Trainer

from llm_recipes.launch import layout

NEW_TOKENS, TEMPERATURE, TOP_K = 80, 0.7, 40


def prompt_ids(tokenizer, prompt: str, objective: str) -> list[int]:
    """Ids of a prompt as the beginning of a document: an EOS ended the one before it.

    Masks and sentinels in the prompt are what they look like; in training text they would stay text.
    """
    before = tokenizer.backend_tokenizer.encode_special_tokens
    tokenizer.backend_tokenizer.encode_special_tokens = objective not in ("masked", "span_corruption")
    ids = tokenizer(prompt, add_special_tokens=False)["input_ids"]
    tokenizer.backend_tokenizer.encode_special_tokens = before
    return [*ids, tokenizer.eos_token_id] if objective == "span_corruption" else [tokenizer.eos_token_id, *ids]


def prompt_problems(tokenizer, prompts: list[str], objective: str, context: int) -> list[str]:
    """Prompts that leave the model nothing to add."""
    problems = []
    needed = {"masked": tokenizer.mask_token, "span_corruption": "<extra_id_0>"}.get(objective)
    for prompt in prompts:
        if needed and needed not in prompt:
            problems.append(f"sample_prompts: {prompt[:20]!r}... has no {needed} for the model to fill")
        if (size := len(prompt_ids(tokenizer, prompt, objective))) >= context:
            problems.append(f"sample_prompts: {prompt[:20]!r}... has {size} tokens, the model's context is {context}")
    return problems


def sample(trainer: Trainer, tokenizer, prompts: list[str], objective: str) -> list[str]:
    """Each prompt and what the model adds, drawn at temperature 0.7 from the top 40; every rank takes part.

    A masked model fills its masks with the likeliest ids, an encoder-decoder answers with what its
    sentinels stand for.
    """
    texts, model = [], trainer.model
    if layout().own:  # no process holds it whole
        return []
    model.eval()
    torch.manual_seed(trainer.args.seed)
    for prompt in prompts:
        ids = torch.tensor([prompt_ids(tokenizer, prompt, objective)], device=trainer.args.device)
        if objective == "masked":
            with torch.no_grad():
                best = model(input_ids=ids).logits.argmax(-1)
            texts.append(tokenizer.decode(torch.where(ids == tokenizer.mask_token_id, best, ids)[0, 1:]))
            continue
        room = min(
            NEW_TOKENS, getattr(model.config, "max_position_embeddings", NEW_TOKENS + ids.shape[1]) - ids.shape[1]
        )
        if objective == "prefix":
            out = _continue_prefix(model, ids, room, tokenizer.eos_token_id)
        else:
            out = model.generate(
                ids, attention_mask=torch.ones_like(ids), max_new_tokens=room, do_sample=True, temperature=TEMPERATURE,
                top_k=TOP_K, use_cache=True, pad_token_id=tokenizer.pad_token_id, eos_token_id=tokenizer.eos_token_id,
            )  # fmt: skip
        answer = tokenizer.decode(out[0], skip_special_tokens=objective != "span_corruption")
        texts.append(
            f"{prompt}\n{answer.removeprefix(tokenizer.pad_token)}" if objective == "span_corruption" else answer
        )
    return texts


@torch.no_grad()
def _continue_prefix(model, ids: torch.Tensor, room: int, eos_id: int) -> torch.Tensor:
    """`generate` for a model whose prompt `(1, P)` sees itself whole, which no 2-D mask can say."""
    split = ids.shape[1]
    for _ in range(room):
        at = torch.arange(ids.shape[1], device=ids.device)
        looks = (at[None] <= at[:, None]) | (at < split)
        logits = model(input_ids=ids, attention_mask=looks[None, None], use_cache=False).logits[0, -1]
        top = (logits / TEMPERATURE).topk(min(TOP_K, len(logits)))
        chosen = top.indices[torch.multinomial(top.values.softmax(-1), 1)]
        ids = torch.cat([ids, chosen[None]], dim=1)
        if chosen.item() == eos_id:
            break
    return ids
