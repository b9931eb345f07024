"""What a model learns from a window: functions that turn one window into one example, and the loss over them.

An objective takes the ids `(T,)` of a window and the random generator of its position, and returns
the arrays of one example; all chance comes from that generator. `collate` stacks examples. Windows
have no padding. Label -100 is no target.
"""

from collections.abc import Callable, Collection
from functools import partial

import numpy as np
import torch
from transformers import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    MODEL_FOR_MASKED_LM_MAPPING,
    MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING,
    AutoModelForCausalLM,
    AutoModelForMaskedLM,
    AutoModelForSeq2SeqLM,
    Trainer,
    TrainingArguments,
)

from llm_recipes.config import ObjectiveConfig
from llm_recipes.launch import layout

MASK = "<|mask|>"
SHIFTED = ("causal", "prefix")  # position i predicts label i + 1; the others predict label i


def architecture_for(objective: str):
    """(mapping from configuration to model class, Auto class) of the models that `objective` trains."""
    return {
        "masked": (MODEL_FOR_MASKED_LM_MAPPING, AutoModelForMaskedLM),
        "span_corruption": (MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING, AutoModelForSeq2SeqLM),
    }.get(objective, (MODEL_FOR_CAUSAL_LM_MAPPING, AutoModelForCausalLM))


def objective_problems(config: ObjectiveConfig, args: TrainingArguments, given: Collection[str]) -> list[str]:
    """What is wrong with the values of `config`, each a sentence; `given` are the keys that are not at their default."""
    problems = []
    if not 0 < config.noise_density < 1:
        problems.append(f"noise_density {config.noise_density} is not between 0 and 1")
    if config.mean_span_length < 1:
        problems.append(f"mean_span_length {config.mean_span_length} is below 1 token")
    if config.z_loss < 0:
        problems.append(f"z_loss {config.z_loss} is below 0")
    if config.z_loss and args.use_liger_kernel:
        problems.append("z_loss needs logits, which use_liger_kernel does not make: set one of them")
    if args.label_smoothing_factor:
        problems.append("label_smoothing_factor: losses here are cross-entropies in nats, in evaluation too: remove it")
    noisy = {"noise_density": ("masked", "span_corruption"), "mean_span_length": ("span_corruption",)}
    for key, objectives in noisy.items():
        if key in given and config.objective not in objectives:
            problems.append(f"{key} means nothing for objective {config.objective}: remove it")
    if config.isolate_documents and config.objective != "causal":
        problems.append(f"isolate_documents: only objective causal can, not {config.objective}")
    return problems


# ---- examples ------------------------------------------------------------------------------------


def prepare_tokenizer(tokenizer, config: ObjectiveConfig, length: int) -> None:
    """Adds the special tokens that the objective needs on windows of `length` tokens and `tokenizer` lacks."""
    if config.objective == "masked" and tokenizer.mask_token is None:
        tokenizer.add_special_tokens({"mask_token": MASK})
    if config.objective == "span_corruption":
        known = tokenizer.get_vocab()
        if missing := [token for token in _sentinels(config, length) if token not in known]:
            tokenizer.add_special_tokens({"extra_special_tokens": missing}, replace_extra_special_tokens=False)


def _sentinels(config: ObjectiveConfig, length: int) -> list[str]:
    return [f"<extra_id_{i}>" for i in range(span_counts(length, config.noise_density, config.mean_span_length)[1])]


def make_objective(
    config: ObjectiveConfig, tokenizer, length: int, held_out: bool = False
) -> Callable[[np.ndarray, np.random.Generator], dict[str, np.ndarray]]:
    """The objective of `config` as a function of a window of `length` ids and its generator.

    Held-out prefixes all have half a window: the Trainer's mean over batches is exact only if each example has the same
    number of targets. (Masked windows of almost nothing but special tokens have fewer, and weigh too much by that.)
    """
    if config.objective == "prefix":
        return partial(prefix, split=length // 2 if held_out else None)
    if config.objective == "masked":
        plain = sorted(set(tokenizer.get_vocab().values()) - set(tokenizer.all_special_ids))
        return partial(masked, mask_id=tokenizer.mask_token_id, plain_ids=np.array(plain), density=config.noise_density)
    if config.objective == "span_corruption":
        sentinels = tokenizer.convert_tokens_to_ids(_sentinels(config, length))
        options = {"density": config.noise_density, "mean_length": config.mean_span_length}
        return partial(span_corruption, sentinels=sentinels, eos_id=tokenizer.eos_token_id, **options)
    return partial(causal, eos_id=tokenizer.eos_token_id if config.isolate_documents else None)


def causal(ids: np.ndarray, rng: np.random.Generator, *, eos_id: int | None = None) -> dict[str, np.ndarray]:
    """Next token: the model shifts the labels, so a window has T - 1 targets.

    There is no attention mask: without one SDPA keeps its causal fast path. With `eos_id`,
    `position_ids` restart at each EOS, and models that `check_isolation` lets pass attend inside
    each run of positions alone. The EOS that ends a document is the target of its last token and
    the first input of the next document, so no target is lost and none is predicted across documents.
    """
    example = {"input_ids": ids, "labels": ids}
    if eos_id is not None:
        at = np.arange(len(ids))
        example["position_ids"] = at - np.maximum.accumulate(np.where(ids == eos_id, at, 0))
    return example


def prefix(ids: np.ndarray, rng: np.random.Generator, *, split: int | None = None) -> dict[str, np.ndarray]:
    """Prefix LM (Raffel et al. 2020, section 3.2.1): the first `split` tokens see each other, the rest is predicted.

    `split` is uniform in [1, T - 1] unless given; there are T - split targets, the first predicted by
    the last token of the prefix, which does not see it. `attention_mask` is `(1, T, T)`, True where a row may look.
    """
    split = rng.integers(1, len(ids)) if split is None else split
    at = np.arange(len(ids))
    looks = (at[None] <= at[:, None]) | (at < split)
    return {"input_ids": ids, "labels": np.where(at < split, -100, ids), "attention_mask": looks[None]}


def masked(
    ids: np.ndarray, rng: np.random.Generator, *, mask_id: int, plain_ids: np.ndarray, density: float
) -> dict[str, np.ndarray]:
    """BERT (Devlin et al. 2019, section 3.1): round(density T) targets, at least 1; each 80 % mask, 10 % random, 10 % kept.

    Targets, and what replaces them, are of `plain_ids`, the ids that are not special. A window with
    fewer plain tokens has fewer targets; in one with none any token can be the target, as a mean over none is not a number.
    """
    candidates = np.flatnonzero(np.isin(ids, plain_ids))
    candidates = candidates if len(candidates) else np.arange(len(ids))
    count = min(max(1, round(density * len(ids))), len(candidates))
    chosen, kind = rng.choice(candidates, count, replace=False), rng.random(count)
    inputs, labels = ids.copy(), np.full_like(ids, -100)
    labels[chosen] = ids[chosen]
    inputs[chosen[kind < 0.8]] = mask_id
    swapped = chosen[(kind >= 0.8) & (kind < 0.9)]
    inputs[swapped] = rng.choice(plain_ids, len(swapped))
    return {"input_ids": inputs, "labels": labels}


def span_counts(length: int, density: float, mean_length: float) -> tuple[int, int]:
    """(noise tokens, spans) of a window of `length` tokens, as in `random_spans_noise_mask` of T5 and seqio."""
    noise = min(max(round(length * density), 1), length - 1)
    return noise, min(max(round(noise / mean_length), 1), length - noise)


def span_corruption(
    ids: np.ndarray, rng: np.random.Generator, *, sentinels: list[int], eos_id: int, density: float, mean_length: float
) -> dict[str, np.ndarray]:
    """T5 (Raffel et al. 2020, section 3.1.4): each span becomes a sentinel; the decoder writes sentinels and spans.

    Every window of T tokens has T - noise + spans + 1 inputs and noise + spans + 1 targets, EOS included
    (`span_counts`). The model makes `decoder_input_ids` from the labels, with its decoder_start_token_id.
    """
    noise, spans = span_counts(len(ids), density, mean_length)
    # kept, lost, kept, lost, ...: a window starts with text and ends with a span
    sizes = np.stack([_segments(len(ids) - noise, spans, rng), _segments(noise, spans, rng)], axis=1).reshape(-1)
    parts = np.split(ids, np.cumsum(sizes)[:-1])
    marks = [[sentinel] for sentinel in sentinels[:spans]]
    inputs = [part for pair in zip(parts[::2], marks, strict=True) for part in pair]
    labels = [part for pair in zip(marks, parts[1::2], strict=True) for part in pair]
    return {"input_ids": np.concatenate([*inputs, [eos_id]]), "labels": np.concatenate([*labels, [eos_id]])}


def _segments(total: int, parts: int, rng: np.random.Generator) -> np.ndarray:
    """`total` as a sum of `parts` positive numbers, every such sum equally likely."""
    cuts = np.sort(rng.choice(total - 1, parts - 1, replace=False)) + 1
    return np.diff([0, *cuts, total])


def example_lengths(config: ObjectiveConfig, length: int) -> tuple[int, int | None]:
    """(input tokens, target tokens of the decoder or None) of the example of a window of `length` tokens."""
    if config.objective != "span_corruption":
        return length, None
    noise, spans = span_counts(length, config.noise_density, config.mean_span_length)
    return length - noise + spans + 1, noise + spans + 1


def targets_of(labels, objective: str):
    """The part of labels `(B, T)` that a model of `objective` predicts; -100 in it is no target."""
    return labels[:, 1:] if objective in SHIFTED else labels


def collate(rows: list[dict[str, np.ndarray]]) -> dict[str, torch.Tensor]:
    """Stacks examples: integers as int64, masks as bool."""
    batch = {key: torch.from_numpy(np.stack([row[key] for row in rows])) for key in rows[0]}
    return {key: value if value.dtype == torch.bool else value.long() for key, value in batch.items()}


# ---- loss ----------------------------------------------------------------------------------------


def exact_loss(trainer: Trainer, config: ObjectiveConfig) -> None:
    """Makes the loss of a step the mean over all its targets, with every model, and adds the z-loss in training.

    The Trainer takes any model whose `forward` has `**kwargs` to divide its loss by the targets of
    the step. BERT, T5 and others return the mean of the micro-batch, and an auxiliary loss of experts
    is always one: those were multiplied by accumulation and processes. Here every model returns the
    mean of its micro-batch, weighted with that micro-batch's share of the targets. Evaluation is
    cross-entropy alone, without the experts' balance.

    z-loss: z_loss * mean(log(Z)^2) over the targets, Z the softmax normaliser (Chowdhery et al. 2022, PaLM, section 5).
    """
    model_loss, experts = trainer.compute_loss, getattr(trainer.model.config, "router_aux_loss_coef", 0.0)
    trainer.model_accepts_loss_kwargs = True  # so that the Trainer counts the targets, and does not divide again

    def compute_loss(model, inputs, return_outputs=False, num_items_in_batch=None):
        loss, outputs = model_loss(model, inputs, return_outputs=True)
        shifted = inputs.get("shift_labels")  # of a part of a sequence
        targets = (targets_of(inputs["labels"], config.objective) if shifted is None else shifted) != -100
        if config.z_loss and model.training:
            log_z = outputs["logits"][:, : targets.shape[1]].float().logsumexp(-1)
            loss = loss + config.z_loss * (log_z.square() * targets).sum() / targets.sum()
        if not model.training and (balance := getattr(outputs, "aux_loss", None)) is not None:
            loss = loss - experts * balance
        # gradients are averaged over these ranks, and `num_items_in_batch` counts the targets of all of them
        ranks = trainer.accelerator.num_processes // layout().same_tokens
        loss = loss * (targets.sum() * ranks / num_items_in_batch)
        return (loss, outputs) if return_outputs else loss

    trainer.compute_loss = compute_loss
