"""Long sequences: every rank of a group holds a part of each, and only attention looks beyond it.

Ring attention (`cp_size`, torch's own, under Accelerate's FSDP2) passes keys and values from rank to rank. Ulysses (`sp_size`;
Jacobs et al. 2023, arXiv 2309.14509) exchanges parts of the sequence for heads, and the result back.
"""

import contextlib
from functools import partial

import torch
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import DTensor, Shard
from torch.nn.functional import pad
from transformers import AttentionInterface, Trainer
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from llm_recipes import _compat
from llm_recipes.launch import layout


def split_sequences(trainer: Trainer) -> None:
    """Makes `trainer` split its sequences as the layout says, in training and evaluation; nothing where it says nothing.

    The model then gets labels that are shifted already: the target of a part's last token is in another part.
    """
    ways = layout()
    if ways.cp * ways.sp == 1:
        return
    if ways.sp > 1:
        mesh = init_device_mesh(trainer.args.device.type, (ways.data, ways.sp), mesh_dim_names=("data", "sp"))["sp"]

    def split(model, inputs):
        shifted = pad(inputs["labels"][:, 1:], (0, 1), value=-100)
        positions = torch.arange(shifted.shape[1], device=shifted.device).repeat(len(shifted), 1)
        parts = {"input_ids": inputs["input_ids"], "shift_labels": shifted, "position_ids": positions}
        if ways.cp > 1:  # torch cuts them in place, a piece from the front and one from the back for each rank
            cut = trainer.accelerator.maybe_context_parallel
            attention = partial(cut, buffers=list(parts.values()), buffer_seq_dims=[1] * len(parts))
        else:
            parts = {key: whole.chunk(ways.sp, 1)[mesh.get_local_rank()].contiguous() for key, whole in parts.items()}
            attention = partial(_ulysses, mesh)
        return attention, parts | {"labels": parts["shift_labels"]}

    _compat.split_inputs(trainer, split)


@contextlib.contextmanager
def _ulysses(mesh: DeviceMesh):
    """SDPA sees whole sequences and this rank's share of the heads."""

    def exchange(states: torch.Tensor, here: int, there: int) -> torch.Tensor:
        """`states`, split over the ranks in dimension `here`, split in dimension `there` instead."""
        return DTensor.from_local(states, mesh, [Shard(here)]).redistribute(placements=[Shard(there)]).to_local()

    def attention(module, query, key, value, attention_mask, **options):
        query, key, value = (exchange(states, 2, 1) for states in (query, key, value))  # (B, H, T, D)
        output, weights = sdpa_attention_forward(module, query, key, value, attention_mask, **options)
        return exchange(output, 2, 1), weights  # (B, T, H, D)

    AttentionInterface.register("sdpa_causal", attention)
    try:
        yield
    finally:
        AttentionInterface.register("sdpa_causal", sdpa_attention_forward)
