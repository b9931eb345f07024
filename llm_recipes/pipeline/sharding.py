"""Splits a model over a mesh of processes, fills it from one that is whole, and puts it together again."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor
from transformers import PreTrainedModel, TrainingArguments
from transformers.distributed import DistributedConfig
from transformers.distributed.expert_parallel import apply_expert_parallelism
from transformers.distributed.fsdp import apply_fully_sharded_data_parallelism
from transformers.distributed.tensor_parallel import apply_tensor_parallelism
from transformers.distributed.utils import TransformersDeviceMesh

from llm_recipes import _compat
from llm_recipes.launch import Layout, layout
from llm_recipes.pipeline.stages import Stage, keep_only, split, stages_of_rank


@dataclass
class Split:
    """How a model was split: the whole of it on the meta device, the mesh, this rank's pipeline stages and their numbers.

    `tied` is the group of the two ranks that hold the embedding and the head of tied weights, if those are two.
    """

    shape: PreTrainedModel
    mesh: DeviceMesh
    schedule: str
    numbers: list[int]
    stages: list[Stage]
    tied: dist.ProcessGroup | None


def split_model(
    build: Callable[[], PreTrainedModel], load: Callable[[], PreTrainedModel], schedule: str, args: TrainingArguments
) -> PreTrainedModel:
    """This rank's part of the model that `load` returns, which rank 0 alone calls; `build` makes its like on the meta device.

    Its attribute `split` says how it was split.
    """
    ways = layout()
    mesh = device_mesh(ways, args.device.type)
    with torch.device("meta"):
        shape, model = build(), build()
    numbers, stages = shard(model, ways, mesh, schedule, args.bf16)
    model.to_empty(device=args.device)
    tie(model)
    source = load() if args.process_index == 0 else None
    fill(model, shape, source, args.device)
    if source is not None:
        shape.generation_config = source.generation_config
    model.split = Split(shape, mesh, schedule, numbers, stages, _tied_ends(mesh, schedule, shape))
    return model


def _tied_ends(mesh: DeviceMesh, schedule: str, shape: PreTrainedModel) -> dist.ProcessGroup | None:
    ends = [stages_of_rank(schedule, rank, mesh.size(0)) for rank in range(mesh.size(0))]
    last = max(n for numbers in ends for n in numbers)
    ends = [rank for rank, numbers in enumerate(ends) if 0 in numbers or last in numbers]
    if not shape.config.tie_word_embeddings or len(ends) == 1:
        return None
    groups = {tuple(pair): dist.new_group(pair) for pair in mesh.mesh[ends].flatten(1).T.tolist()}  # by all ranks
    return next((group for pair, group in groups.items() if dist.get_rank() in pair), None)


def device_mesh(ways: Layout, device: str) -> DeviceMesh:
    """Mesh (pp, dp_replicate, fsdp, tp) in the names of transformers."""
    shape = (ways.pp, ways.dp_replicate, ways.dp_shard, ways.tp)
    return init_device_mesh(device, shape, mesh_dim_names=("pp", "dp_replicate", "fsdp", "tp"))


def distributed_config(ways: Layout, bf16: bool = False) -> DistributedConfig:
    """The layout of one stage in the words of transformers."""
    return DistributedConfig(
        tp_size=ways.tp, fsdp_size=ways.dp_shard, dp_replicate_size=ways.dp_replicate, ep_size=ways.ep,
        fsdp_mixed_precision=bf16,
    )  # fmt: skip


def shard(
    model: PreTrainedModel, ways: Layout, mesh: DeviceMesh, schedule: str, bf16: bool = False
) -> tuple[list[int], list[Stage]]:
    """Splits `model`, which is on the meta device, in place: this rank's stages, tensor and expert parallel by the plans of
    transformers, then FSDP2. Returns the numbers of this rank's pipeline stages, and the stages; none without a pipeline.

    With `bf16` weights are gathered and multiplied in bf16, gradients reduced in fp32, and the loss keeps its precision.
    """
    config = distributed_config(ways, bf16)
    tp_plan, ep_plan, fsdp_plan = _compat.parallel_plans(model, config)
    numbers, stages = [], []
    if ways.pp * ways.tp > 1:
        head = model.get_output_embeddings()
        head.weight = nn.Parameter(torch.empty_like(head.weight))  # tied or not: for now it is one of its own
    if ways.pp > 1:
        numbers = stages_of_rank(schedule, mesh.get_local_rank("pp"), ways.pp)
        layers = split(model, ways.pp * len(numbers))
        stages = [Stage(model, layers[n], n == 0, n == len(layers) - 1) for n in numbers]
        keep_only(model, stages)
        held = {name for name, module in model.named_modules() if any(True for _ in module.parameters())}
        held |= {name for name, _ in model.named_parameters(remove_duplicate=False)}
        tp_plan, fsdp_plan = ({k: v for k, v in plan.items() if k in held} for plan in (tp_plan, fsdp_plan))
    if ways.tp > 1:
        apply_tensor_parallelism(model, mesh["tp"], tp_plan)
    tied = tie(model)
    if ways.ep > 1:  # the experts have a mesh of their own
        experts = ways.dp_shard * ways.tp // ways.ep
        shape = (ways.pp, ways.dp_replicate, experts, ways.ep)
        expert_mesh = init_device_mesh(mesh.device_type, shape, mesh_dim_names=("pp", "dp_replicate", "efsdp", "ep"))
        apply_expert_parallelism(model, expert_mesh["ep"], mesh["tp"], ep_plan, ep_implementation="all_to_all")
        model.config.distributed_config = config
        apply_fully_sharded_data_parallelism(model, TransformersDeviceMesh(mesh, expert_mesh), fsdp_plan, ep_plan)
        del model.config.distributed_config
    elif ways.data > 1:
        policy = MixedPrecisionPolicy(torch.bfloat16, torch.float32) if bf16 else MixedPrecisionPolicy()
        data = mesh["dp_replicate", "fsdp"] if ways.dp_replicate > 1 else mesh["fsdp"]
        # a stage would gather its weights again for every micro-batch
        options = {"mesh": data, "mp_policy": policy, "reshard_after_forward": not stages}
        units = [model.get_submodule(name) for name in fsdp_plan]
        if tied:
            units = [tied, *(unit for unit in units if unit not in tied)]  # one weight, one unit
        for unit in units:
            fully_shard(unit, **options)
        for root in stages or [model]:
            fully_shard(root, **options)
    return numbers, stages


def tie(model: PreTrainedModel) -> list[nn.Module]:
    """Makes tied weights one, where both are here: sharding and `to_empty` make a new parameter for each name. Returns them."""
    ends = [model.get_input_embeddings(), model.get_output_embeddings()]
    if not model.config.tie_word_embeddings or not all(hasattr(end, "weight") for end in ends):
        return []
    ends[1].weight = ends[0].weight
    return ends


def names(model: nn.Module) -> dict[str, torch.Tensor]:
    """Parameters and buffers by name, tied ones under each of their names."""
    return dict(model.named_parameters(remove_duplicate=False)) | dict(model.named_buffers(remove_duplicate=False))


def fill(model: nn.Module, shape: nn.Module, source: nn.Module | None, device: torch.device) -> None:
    """Gives `model`, a part of `shape`, the numbers of `source`, which rank 0 alone has, one tensor at a time.

    So no process but rank 0 ever holds the model whole, and every layout starts from the very same numbers. Drawn on each
    rank for itself, the shards of a matrix would all be the same.
    """
    own, whole = names(model), names(source) if source is not None else {}
    for name, meta in names(shape).items():
        numbers = whole[name].detach().to(device) if whole else torch.empty_like(meta, device=device)
        dist.broadcast(numbers, src=0)
        if isinstance(part := own.get(name), torch.Tensor):
            put(part, numbers)


@torch.no_grad()
def put(part: torch.Tensor, numbers: torch.Tensor) -> None:
    """Copies `numbers` into `part`, this rank's share of them."""
    if isinstance(part, DTensor):
        numbers = distribute_tensor(numbers, part.device_mesh, part.placements, src_data_rank=None).to_local()
        part = part.to_local()
    part.copy_(numbers)


@torch.no_grad()
def gather(model: nn.Module, shape: nn.Module, mesh: DeviceMesh) -> dict[str, torch.Tensor]:
    """All of `shape`'s state dict on the CPU of rank 0; {} on the others. Every rank takes part."""
    own, found, rank = names(model), {}, dist.get_rank()
    holds = [None] * dist.get_world_size()
    dist.all_gather_object(holds, set(own))
    for name, meta in shape.state_dict(keep_vars=True).items():
        owner = next(r for r, there in enumerate(holds) if name in there)
        numbers = None
        if name in own:
            numbers = own[name].full_tensor() if isinstance(own[name], DTensor) else own[name].detach()
        if owner != 0 and rank == owner:
            dist.send(numbers.contiguous(), dst=0)
        elif owner != 0 and rank == 0:
            dist.recv(numbers := torch.empty_like(meta, device=mesh.device_type), src=owner)
        if rank == 0:
            found[name] = numbers.cpu().clone()
    return found
