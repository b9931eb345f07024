"""The strategy in force is the one asked for, or the run stops: before training, and again at the first step.

Accelerate, the Trainer and DeepSpeed turn one strategy into another without a word (docs/parallelism.md lists how).
"""

import os

import torch
import xxhash
from accelerate.utils import gather_object
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel
from transformers import Trainer, TrainerCallback

from llm_recipes import _compat
from llm_recipes.errors import UserError
from llm_recipes.launch import asked_strategy, layout


def check_strategy(trainer: Trainer) -> None:
    """Raises UserError unless `trainer` runs what the launcher asked for; what shows only later is checked when it shows.

    At the start of training: the wrapper or sharding of the weights, and how many of them this process holds. At the first
    step: ranks that split the batch see other rows, the others the same.
    """
    accelerator, world_size = trainer.accelerator, int(os.environ.get("WORLD_SIZE", 1))
    kind, asked = accelerator.distributed_type.value, asked_strategy()
    if kind == "DEEPSPEED":
        active = f"DeepSpeed ZeRO-{accelerator.state.deepspeed_plugin.zero_stage}"
    elif kind == "FSDP":
        active = f"FSDP{accelerator.state.fsdp_plugin.fsdp_version}"
    elif layout().own and kind != "NO":
        active = asked if hasattr(trainer.model, "split") else "a model that nobody split"
    else:
        active = "DDP" if accelerator.num_processes > 1 else "single process"
    if not asked.startswith(active) or accelerator.num_processes != world_size:
        raise UserError(
            f"asked for {asked} on {world_size} processes, but {active} on {accelerator.num_processes} is in force: "
            "check the file given to --config_file"
        )
    trainer.add_callback(_Guard(trainer))


class _Guard(TrainerCallback):
    """Looks at the model when training begins, and at the rows of the first step."""

    def __init__(self, trainer: Trainer):
        self.trainer, self.seen = trainer, xxhash.xxh3_128()

    def on_train_begin(self, args, state, control, **kwargs):
        check_model(self.trainer)
        if args.world_size > 1 and self.seen is not None:
            self.seen.reset()
            if self.trainer.training_step != self.look:  # it is, when a rollback came before the first step was over
                self.training_step, self.trainer.training_step = self.trainer.training_step, self.look

    def look(self, model, inputs, *rest, **kwargs):
        """In the place of `training_step` until the first step is over."""
        self._note(inputs)
        return self.training_step(model, inputs, *rest, **kwargs)

    def _note(self, inputs) -> None:
        if isinstance(inputs, torch.Tensor):
            self.seen.update(inputs.cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
        elif isinstance(inputs, dict | list):
            for part in inputs.values() if isinstance(inputs, dict) else inputs:
                self._note(part)

    def on_step_end(self, args, state, control, **kwargs):
        if args.world_size == 1 or self.seen is None:
            return
        if self.seen.digest() != xxhash.xxh3_128().digest():  # PPO deals its rollout itself, and is given none
            check_rows(gather_object([self.seen.hexdigest()]))
        self.trainer.training_step, self.seen = self.training_step, None


def check_model(trainer: Trainer) -> None:
    """Raises UserError unless the weights, or the states of ZeRO-1 and 2, are split as the strategy says."""
    ways, strategy, model = layout(), asked_strategy(), trainer.model
    wrapped = _compat.uncompiled(trainer.model_wrapped)
    if strategy == "DDP" and not isinstance(wrapped, DistributedDataParallel):
        raise UserError(
            f"asked for DDP, but the model is a plain {type(wrapped).__name__}: every process would train alone"
        )
    weights = [p for p in model.parameters() if p.requires_grad]
    whole = sum(getattr(p, "ds_numel", p.numel()) for p in weights)
    local = sum(_held(p) for p in weights)
    if "ZeRO" in strategy:
        engine = trainer.accelerator.deepspeed_engine_wrapped.engine
        if (stage := engine.zero_optimization_stage()) != int(strategy.split("ZeRO-")[1][0]):
            raise UserError(f"asked for {strategy}, but DeepSpeed runs stage {stage}")
        if stage < 3:
            local = sum(part.numel() for part in engine.optimizer.single_partition_of_fp32_groups)
    if ways.pp > 1 and whole >= sum(p.numel() for p in model.split.shape.parameters()):
        raise UserError(f"asked for {strategy}, but this process has the layers of all stages")
    shards = ways.shards // ways.pp  # within a stage, whose share of the model depends on the embedding
    if local / whole > (1 + 1 / shards) / 2:
        raise UserError(
            f"{strategy} should leave each process 1/{shards} of the weights, and this one holds {local / whole:.0%} of them"
        )


def _held(p: torch.Tensor) -> int:
    """Numbers of parameter `p` on this process."""
    if hasattr(p, "ds_tensor"):
        return p.ds_tensor.numel()
    return (p.to_local() if isinstance(p, DTensor) else p).numel()


def check_rows(seen: list[str]) -> None:
    """Raises UserError unless the digests `seen`, one a rank, are the same where ranks share rows, and differ elsewhere."""
    ways = layout()
    groups = [{seen[rank] for rank in range(len(seen)) if ways.data_rank(rank) == part} for part in range(ways.data)]
    if max(map(len, groups)) > 1:
        raise UserError(f"under {asked_strategy()} some processes must see the same rows, and they saw other ones")
    if (distinct := len(set.union(*groups))) < ways.data:
        raise UserError(
            f"{ways.data} processes should train on other rows each, and in the first step only {distinct} did: they would repeat "
            "each other's work. If the data hold the same rows again and again, remove the copies"
        )
