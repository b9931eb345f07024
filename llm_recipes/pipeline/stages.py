"""Cuts a causal language model of transformers into pipeline stages, with its own code and its own parameter names.

A stage is the model in which the modules of other stages hand on what they are given. So a stage computes masks, rotary
embeddings and the like itself, and the parameters of all stages together are those of the model.
"""

import functools
import itertools

import torch
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.distributed.pipeline_parallel import PipelineIdentityLayer

from llm_recipes import _compat

# Schedules of torch.distributed.pipelining, and the stages that each rank has under them.
SCHEDULES = {
    "GPipe": 1, "1F1B": 1,
    "LoopedBFS": 2, "Interleaved1F1B": 2, "InterleavedZeroBubble": 2,
    "ZBVZeroBubble": 2, "DualPipeV": 2,
}  # fmt: skip
V_SHAPED = ("ZBVZeroBubble", "DualPipeV")  # rank r has stages r and 2 pp - 1 - r; under the others r and pp + r


def stages_of_rank(schedule: str, rank: int, ranks: int) -> list[int]:
    """Stages of pipeline rank `rank` of `ranks`."""
    if schedule in V_SHAPED:
        return [rank, 2 * ranks - 1 - rank]
    return [rank + ranks * i for i in range(SCHEDULES[schedule])]


def balanced(costs: list[float], parts: int) -> list[range]:
    """Contiguous ranges of `costs`, none empty, whose greatest sum is the smallest that `parts` ranges can have, the others even."""
    before = [0, *itertools.accumulate(costs)]

    @functools.cache
    def best(first: int, parts: int) -> tuple[float, float, tuple[int, ...]]:
        """Greatest sum, sum of squares, and the ends."""
        if parts == 1:
            return (cost := before[-1] - before[first]), cost**2, (len(costs),)
        found = []
        for end in range(first + 1, len(costs) - parts + 2):
            greatest, squares, ends = best(end, parts - 1)
            cost = before[end] - before[first]
            found.append((max(greatest, cost), squares + cost**2, (end, *ends)))
        return min(found)

    ends = best(0, parts)[2]
    return [range(first, end) for first, end in itertools.pairwise((0, *ends))]


def part_names(config: PreTrainedConfig) -> tuple[str, str, str]:
    """Names of embedding, layers and final norm within the base model: what its pipeline plan lists, in order."""
    return tuple(config.base_model_pp_plan)


def split(model: PreTrainedModel, stages: int) -> list[range]:
    """Layers of each of `stages` stages, balanced by the weights that a token is multiplied with, the head's on the last."""
    layers = model.base_model.get_submodule(part_names(model.config)[1])
    costs = [sum(p.numel() for p in layer.parameters()) for layer in layers]
    costs[-1] += model.get_output_embeddings().weight.numel()
    return balanced(costs, stages)


class Stage(nn.Module):
    """Layers `own` of `model`, from the embedding if `first`, to the logits if `last`. Shares its modules with `model`."""

    def __init__(self, model: PreTrainedModel, own: range, first: bool, last: bool):
        super().__init__()
        view, base = _compat.view(model), _compat.view(model.base_model)
        embedding, layers, norm = part_names(model.config)
        view.add_module(model.base_model_prefix, base)
        kept = [layer if i in own else PipelineIdentityLayer() for i, layer in enumerate(getattr(base, layers))]
        base.add_module(layers, nn.ModuleList(kept))
        if not first:
            base.add_module(embedding, PipelineIdentityLayer())
        if not last:
            base.add_module(norm, PipelineIdentityLayer())
            head = next(name for name, module in view.named_children() if module is model.get_output_embeddings())
            view.add_module(head, PipelineIdentityLayer())
        self.first, self.last, self.view = first, last, view

    def forward(self, inputs: torch.Tensor, **kwargs) -> torch.Tensor:
        """Ids `(B, T)` in the first stage, hidden states `(B, T, H)` in the others, to hidden states, in the last to logits
        `(B, T, V)`."""
        kwargs |= {"input_ids" if self.first else "inputs_embeds": inputs, "use_cache": False}
        if self.last:
            return self.view(**kwargs).logits
        return self.view.base_model(**kwargs).last_hidden_state


def keep_only(model: PreTrainedModel, stages: list[Stage]) -> None:
    """Takes out of `model` what none of `stages` has."""
    kept = {id(module) for stage in stages for module in stage.modules()}
    for name, module in list(model.named_modules(remove_duplicate=False)):
        parent, _, child = name.rpartition(".")
        owner = model.get_submodule(parent)
        if next(module.parameters(recurse=False), None) is not None and id(module) not in kept:
            owner.add_module(child, PipelineIdentityLayer())
