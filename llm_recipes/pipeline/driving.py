"""Lets a Trainer train a model that `sharding` has split: its loop, callbacks, log, evaluation, saving and resuming hold."""

import contextlib
from pathlib import Path

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch.distributed.pipelining import PipelineStage
from torch.distributed.pipelining.schedules import get_schedule_class
from torch.distributed.tensor import DTensor
from torch.nn.functional import cross_entropy
from torch.nn.utils import clip_grads_with_norm_, get_total_norm
from transformers import Trainer

from llm_recipes import _compat
from llm_recipes.errors import UserError
from llm_recipes.launch import layout
from llm_recipes.pipeline.sharding import Split, gather, names
from llm_recipes.pipeline.stages import SCHEDULES, stages_of_rank

STATE = "distributed"  # folder of a checkpoint with weights and optimizer


class Pipeline:
    """Runs whole batches through the stages of `split`."""

    def __init__(self, split: Split, device: torch.device, bf16: bool, z_loss: float):
        self.split, self.device, self.z_loss, self.ready = split, device, z_loss, {}
        self.group, ranks = split.mesh.get_group("pp"), split.mesh.size(0)
        self.total = ranks * SCHEDULES[split.schedule]
        owner = {n: rank for rank in range(ranks) for n in stages_of_rank(split.schedule, rank, ranks)}
        self.owner = {n: dist.get_global_rank(self.group, rank) for n, rank in owner.items()}
        self.precision = torch.autocast(device.type, torch.bfloat16) if bf16 else contextlib.nullcontext()

    def loss(self, logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        """Sum over the targets in labels `(B, T)` of cross-entropy and z-loss of logits `(B, T, V)`, over `self.divisor`."""
        logits, targets = logits[:, :-1].flatten(0, 1).float(), labels[:, 1:].flatten()
        loss = cross_entropy(logits, targets, ignore_index=-100, reduction="sum")
        if self.z_loss and torch.is_grad_enabled():
            loss = loss + self.z_loss * (logits.logsumexp(-1).square() * (targets != -100)).sum()
        return loss / self.divisor

    def _schedule(self, micro_batches: int, shape: torch.Size):
        """Stages take the shapes of their inputs from the first batch: another shape needs other ones."""
        if (micro_batches, shape) not in self.ready:
            stages = [
                PipelineStage(stage, number, self.total, self.device, group=self.group)
                for number, stage in zip(self.split.numbers, self.split.stages, strict=True)
            ]
            kind = get_schedule_class(self.split.schedule)
            self.ready[micro_batches, shape] = kind(
                stages if len(stages) > 1 else stages[0], micro_batches, loss_fn=self.loss, scale_grads=False
            )
        return self.ready[micro_batches, shape]

    def train(self, micro_batches: list[dict[str, torch.Tensor]], divisor: float) -> torch.Tensor:
        """Gradients of the loss of `micro_batches`, summed over their targets and divided by `divisor`; returns the loss, on
        every rank."""
        batch = {key: torch.cat([part[key] for part in micro_batches]).to(self.device) for key in micro_batches[0]}
        inputs, labels, losses = batch.pop("input_ids"), batch.pop("labels"), []
        self.divisor = divisor
        for stage in self.split.stages:
            stage.train()
        with self.precision:
            self._schedule(len(micro_batches), inputs.shape).step(
                *([inputs] if 0 in self.split.numbers else []),
                target=labels,
                losses=losses,
                return_outputs=False,
                **batch,
            )
        return self._from_last(sum(losses) if losses else None)

    @torch.no_grad()
    def evaluate(self, batch: dict[str, torch.Tensor], divisor: float) -> torch.Tensor:
        """The loss of `batch`, on every rank; stage after stage, with no schedule."""
        batch, me, loss, self.divisor = dict(batch), dist.get_rank(), None, divisor
        ids, labels = batch.pop("input_ids"), batch.pop("labels")
        hidden = torch.empty(*ids.shape, self.split.shape.config.hidden_size, device=self.device)
        for number, stage in zip(self.split.numbers, self.split.stages, strict=True):
            stage.eval()
            if number and self.owner[number - 1] != me:
                dist.recv(hidden, src=self.owner[number - 1], group=self.group)
            with self.precision:
                out = stage(hidden if number else ids, **batch).float()
            if number + 1 == self.total:
                loss = self.loss(out, labels)
            elif self.owner[number + 1] != me:
                dist.send(out.contiguous(), dst=self.owner[number + 1], group=self.group)
            else:
                hidden = out
        return self._from_last(loss)

    def _from_last(self, loss: torch.Tensor | None) -> torch.Tensor:
        loss = torch.zeros((), device=self.device) if loss is None else loss.detach()
        dist.broadcast(loss, src=self.owner[self.total - 1], group=self.group)
        return loss


def drive(trainer: Trainer, z_loss: float = 0.0) -> None:
    """Makes `trainer` train its model as the layout says; nothing where Accelerate splits it. Call it after `train_on`."""
    ways = layout()
    if not ways.own:
        return
    split, args = trainer.model.split, trainer.args

    def save_model(output_dir=None, _internal_call=False):
        folder = Path(output_dir or args.output_dir)
        folder.mkdir(parents=True, exist_ok=True)
        if _internal_call:  # a checkpoint: the weights come with the optimizer
            return
        whole = gather(trainer.model, split.shape, split.mesh)
        if args.process_index == 0:
            for name in split.shape.all_tied_weights_keys:
                whole.pop(name, None)
            split.shape.save_pretrained(folder, state_dict=whole)
            trainer.processing_class.save_pretrained(folder)

    trainer.save_model = save_model
    _compat.take_over(
        trainer, lambda folder: _save(trainer, folder), lambda folder: _load(trainer, folder),
        lambda greatest: _norm(trainer.model, split, greatest),
    )  # fmt: skip
    if ways.pp == 1:
        return
    pipeline = Pipeline(split, args.device, args.bf16, z_loss)

    def compute_loss(model, batch, return_outputs=False, num_items_in_batch=None):
        if model.training:
            return pipeline.train(batch["micro_batches"], num_items_in_batch / ways.data)
        return pipeline.evaluate(batch, num_items_in_batch / ways.data)

    def training_step(model, micro_batches, num_items_in_batch=None):
        model.train()
        seen = torch.cat([part["input_ids"] for part in micro_batches])  # who watches the loss asks what it was on
        batch = {"input_ids": seen, "micro_batches": micro_batches}
        return trainer.compute_loss(model, batch, num_items_in_batch=num_items_in_batch)

    def prediction_step(model, inputs, prediction_loss_only, ignore_keys=None):
        inputs = {key: value.to(args.device) for key, value in inputs.items()}
        targets = (inputs["labels"][:, 1:] != -100).sum()
        dist.all_reduce(targets)
        return trainer.compute_loss(model, inputs, num_items_in_batch=targets / ways.sharing), None, None

    trainer.compute_loss, trainer.training_step, trainer.prediction_step = compute_loss, training_step, prediction_step


@torch.no_grad()
def _norm(model: torch.nn.Module, split: Split, greatest: float | None) -> torch.Tensor:
    """Norm of the gradients of all stages, clipped to `greatest` if given. Tied weights held twice get one gradient first."""
    if split.tied:
        ends = {model.get_input_embeddings(), model.get_output_embeddings()}
        weight = next(module.weight for module in ends if hasattr(module, "weight"))
        if isinstance(weight.grad, DTensor):  # the embedding's is whole on every rank of tp, the head's is not
            weight.grad = weight.grad.redistribute(placements=weight.placements)
        dist.all_reduce(weight.grad.to_local() if isinstance(weight.grad, DTensor) else weight.grad, group=split.tied)
    by_mesh = {}
    for p in (p for p in model.parameters() if p.grad is not None):
        by_mesh.setdefault(p.grad.device_mesh if isinstance(p.grad, DTensor) else None, []).append(p)
    head = split.tied and getattr(model.get_output_embeddings(), "weight", None)  # counted where the embedding is
    squares = torch.zeros((), device=next(model.parameters()).device)
    for group in by_mesh.values():
        norm = get_total_norm([p.grad for p in group if p is not head])
        squares += (norm.full_tensor() if isinstance(norm, DTensor) else norm).square()
    if split.stages:
        dist.all_reduce(squares, group=split.mesh.get_group("pp"))
    total = squares.sqrt()
    for group in by_mesh.values() if greatest else ():
        clip_grads_with_norm_(group, greatest, total)
    return total


def _flat(trainer: Trainer) -> dict[str, torch.Tensor]:
    """Weights and optimizer states by parameter name, tied ones under each: under another layout they may be two."""
    state, found = trainer.optimizer.optimizer.state, {}
    for name, tensor in names(trainer.model).items():
        found[f"model.{name}"] = tensor
        found |= {f"optimizer.{name}.{key}": value for key, value in state.get(tensor, {}).items()}
    return found


def _save(trainer: Trainer, folder: str) -> None:
    """Weights and optimizer states, each rank what it has, in a form that any other layout can read."""
    dcp.save(_compat.plain_shards(_flat(trainer)), checkpoint_id=str(Path(folder) / STATE))
    if trainer.args.process_index == 0:
        torch.save(trainer.lr_scheduler.state_dict(), Path(folder) / "scheduler.pt")


def _load(trainer: Trainer, folder: str | None) -> None:
    """What `_save` left, under this or another layout."""
    if folder is None:
        return
    place = str(Path(folder) / STATE)
    written = dcp.FileSystemReader(place).read_metadata().state_dict_metadata
    optimizer = trainer.optimizer.optimizer
    on_device = any(
        optimizer.defaults.get(key) for key in ("fused", "capturable")
    )  # the kernel reads the count of steps
    stateful = any(key.startswith("optimizer.") for key in written)
    for name, p in trainer.model.named_parameters(remove_duplicate=False):
        start = f"optimizer.{name}."
        found = {key.removeprefix(start): meta for key, meta in written.items() if key.startswith(start)}
        if stateful and p.requires_grad and not found:
            raise UserError(f"{folder} has no optimizer state for {name}: it is not of this model")
        for key, meta in found.items():
            same = torch.Size(meta.size) == p.shape
            alone = torch.zeros(meta.size, device=p.device if on_device else "cpu")
            optimizer.state[p][key] = torch.zeros_like(p) if same else alone
    own = _flat(trainer)
    read = _compat.plain_shards(own)
    dcp.load(read, checkpoint_id=place)
    with torch.no_grad():
        for key, tensor in _compat.plain_shards(read, own).items():
            own[key].copy_(tensor)
    state = torch.load(Path(folder) / "scheduler.pt", weights_only=True)
    groups = optimizer.param_groups  # another layout may have others, all with one learning rate
    for key in ("base_lrs", "_last_lr", "lr_lambdas"):
        state[key] = state[key][:1] * len(groups)
    trainer.lr_scheduler.load_state_dict(state)
    for group, rate in zip(groups, trainer.lr_scheduler.get_last_lr(), strict=True):
        group["lr"] = rate
