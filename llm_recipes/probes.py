"""Whether an architecture obeys masks and positions, tried on a small copy of it rather than believed."""

from collections.abc import Callable

import numpy as np
import torch
from torch.nn.functional import pad
from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, AttentionInterface, PreTrainedConfig

from llm_recipes import _compat
from llm_recipes.errors import UserError
from llm_recipes.objectives import collate, prefix
from llm_recipes.pipeline.stages import Stage

# What is asked about: two rows of ids `(2, 16)` and the part of each before its border.
IDS, BORDERS = torch.arange(32).view(2, 16) * 7 % 61 + 1, torch.tensor([[6], [9]])
BEFORE = torch.arange(16) < BORDERS
# What the copy that `_probe` runs has less of; windows so short that a few tokens leave them.
SMALL = {"vocab_size": 64, "intermediate_size": 16, "moe_intermediate_size": 16, "ffn_dim": 16, "n_inner": 16,
         "sliding_window": 4, "attention_chunk_size": 4}  # fmt: skip


def check_isolation(config: PreTrainedConfig, attn_implementation: str | None) -> None:
    """Raises UserError unless restarting `position_ids` keep documents apart, tried on a small copy of the model.

    transformers isolates by positions only where there is neither attention mask nor cache, and not in
    every architecture. For the try flex_attention is compiled, which takes most of a minute.
    """
    positions = torch.arange(16) - torch.where(BEFORE, 0, BORDERS)

    def isolates(logits, model):
        both = logits(input_ids=IDS, position_ids=positions)[~BEFORE]
        changed = logits(input_ids=torch.where(BEFORE, IDS + 1, IDS), position_ids=positions)[~BEFORE]
        alone = torch.cat([logits(input_ids=row[None, border:])[0] for row, border in zip(IDS, BORDERS, strict=True)])
        return _same(both, changed) and _same(both, alone)

    choices = "use sdpa or eager and an architecture that goes by positions, such as llama, or set it to false"
    _probe(
        config, attn_implementation, isolates, "isolate_documents: {} {}: " + choices, "lets documents see each other"
    )


def check_prefix(config: PreTrainedConfig, attn_implementation: str | None, length: int) -> None:
    """Raises UserError unless the model obeys the mask of `prefix`. Eager attention would add its ones to the scores."""
    if (window := getattr(config, "sliding_window", None) or length) < length:
        raise UserError(f"objective prefix: its mask would override sliding_window {window}: raise it to {length}")
    mask = collate([prefix(np.arange(16), None, split=int(border)) for border in BORDERS])["attention_mask"]

    def obeys(logits, model):
        both = logits(input_ids=IDS, attention_mask=mask)
        suffix = logits(input_ids=torch.where(BEFORE, IDS, IDS + 1), attention_mask=mask)
        inside = logits(input_ids=torch.where(torch.arange(16) == BORDERS - 1, IDS + 1, IDS), attention_mask=mask)
        return _same(both[BEFORE], suffix[BEFORE]) and not _same(both[:, 0], inside[:, 0])

    choices = "use sdpa and an architecture such as llama, or objective causal"
    _probe(config, attn_implementation, obeys, "objective prefix: {} {}: " + choices, "does not obey the mask")


def check_stages(config: PreTrainedConfig, attn_implementation: str | None) -> None:
    """Raises UserError unless two stages in a row give the logits of the whole model, which not every architecture does."""

    def agrees(logits, model):
        first, last = (Stage(model, range(i, i + 1 + i * 99), first=not i, last=bool(i)) for i in (0, 1))
        return _same(last(first(IDS)), logits(input_ids=IDS))

    choices = "use an architecture such as llama, or accelerate_configs/zero3.yaml"
    _probe(config, attn_implementation, agrees, "pipeline: {} {}: " + choices, "is not the sum of its stages")


def check_parts(config: PreTrainedConfig, attn_implementation: str | None) -> None:
    """Raises UserError unless the model can be run on a part of a sequence while SDPA alone sees the rest.

    That is: were each token to attend to itself, none would know of another; and the model goes by `position_ids` and by
    labels that are shifted already.
    """

    def alone(module, query, key, value, attention_mask, **options):
        return value.repeat_interleave(query.shape[1] // value.shape[1], 1).transpose(1, 2), None

    def apart(logits, model):
        if attn_implementation not in (None, "sdpa") or not _compat.takes_any_attention(config):
            return False
        model.set_attn_implementation("alone")
        other = logits(input_ids=torch.where(BEFORE, IDS + 1, IDS))
        knows = not _same(logits(input_ids=IDS)[~BEFORE], other[~BEFORE])
        model.set_attn_implementation("sdpa")
        model.config.use_cache = False
        places, shifted = torch.arange(16).expand(2, 16), pad(IDS[:, 1:], (0, 1), value=-100)
        moved = not _same(logits(input_ids=IDS), logits(input_ids=IDS, position_ids=places * 2))
        part = model(input_ids=IDS, position_ids=places, labels=shifted, shift_labels=shifted)
        return not knows and moved and _same(part.loss, model(input_ids=IDS, labels=IDS).loss)

    AttentionInterface.register("alone", alone)
    fault = "needs more of a sequence than its attention is given"
    sentence = "split sequences: {} {}: use sdpa and an architecture such as llama, or accelerate_configs/zero3.yaml"
    _probe(config, attn_implementation or "sdpa", apart, sentence, fault)


def _same(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Equal but for rounding, which is below 1e-6 of the largest logit; the smallest leak seen is 2e-3 of it."""
    return bool((a - b).abs().max() < 1e-5 * b.abs().max())


def _probe(config: PreTrainedConfig, attn_implementation: str | None, holds: Callable, sentence: str, fault: str):
    """Raises UserError unless `holds(logits, model)` of a random copy of the causal LM of `config`, on the CPU.

    The copy has few ids and the first layers, as many as have all of `layer_types`; attention keeps its size.
    `sentence` has a place for the model and one for the `fault`, or for what the model raised.
    """
    kinds, layers = config.to_dict().get("layer_types") or [], 2
    while set(kinds[:layers]) != set(kinds):
        layers += 1
    try:
        small = type(config).from_dict(config.to_dict(), attn_implementation=attn_implementation)
        small.pad_token_id, small.num_hidden_layers = None, min(layers, config.num_hidden_layers)
        for key, value in (SMALL | ({"layer_types": kinds[:layers]} if kinds else {})).items():
            if getattr(small, key, None):
                setattr(small, key, value)
        with torch.random.fork_rng(devices=[]), torch.no_grad():
            torch.manual_seed(0)
            model = MODEL_FOR_CAUSAL_LM_MAPPING[type(config)](small).float().eval()
            if holds(lambda **inputs: model(**inputs, use_cache=False).logits, model):
                return
    except Exception as error:  # whatever an architecture raises that does not take these inputs
        fault = f"cannot be tried ({str(error).splitlines()[0][:120]})"
    name = f"{config.model_type} with attn_implementation {attn_implementation or 'left to its default'}"
    raise UserError(sentence.format(name, fault))
