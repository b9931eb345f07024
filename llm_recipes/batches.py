"""What each optimizer step trains on, and the loop over its micro-batches.

Step `s` is a function of (windows, seed, s) alone: the same on any number of processes, after any
resume, and with any micro-batch. So a batch may grow during the run, and a bad one can be left out.
"""

import contextlib
import json
import math
import os
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

import numpy as np
import torch
from accelerate.utils import send_to_device
from datasets import Dataset
from transformers import DefaultFlowCallback, Trainer, TrainerCallback, TrainingArguments

from llm_recipes import _compat
from llm_recipes.config import Ramp, micro_batch
from llm_recipes.errors import UserError
from llm_recipes.launch import global_batch, layout
from llm_recipes.objectives import collate, targets_of
from llm_recipes.sequence import split_sequences

LEFT_OUT = "left_out_batches.json"


class Examples(torch.utils.data.Dataset):
    """Windows as examples of an objective, by position.

    Position `p` of training is window `p % n` of a fresh permutation for epoch `p // n`; without
    `shuffle` positions are the windows themselves. An example's noise depends on (seed, p) alone.
    """

    def __init__(self, windows: Dataset, objective: Callable, seed: int, shuffle: bool):
        self.windows, self.objective, self.seed, self.shuffle = windows, objective, seed, shuffle
        self.orders = {}  # the permutation of the epoch last asked for

    def window(self, position: int) -> int:
        """Index of the window at `position`."""
        epoch, index = divmod(position, len(self.windows))
        if not self.shuffle:
            return index
        if epoch not in self.orders:
            self.orders = {epoch: np.random.default_rng([self.seed, epoch]).permutation(len(self.windows))}
        return int(self.orders[epoch][index])

    def __len__(self) -> int:
        return len(self.windows)

    def __getitem__(self, position: int) -> dict[str, np.ndarray]:
        return self.__getitems__([position])[0]

    def __getitems__(self, positions: list[int]) -> list[dict[str, np.ndarray]]:
        rows = self.windows[[self.window(p) for p in positions]]["input_ids"]
        return [
            self.objective(ids, np.random.default_rng([self.seed, p])) for ids, p in zip(rows, positions, strict=True)
        ]


class StreamedExamples(torch.utils.data.IterableDataset):
    """A stream of windows as examples of an objective; the noise depends on (seed, place in the stream)."""

    def __init__(self, windows: Iterable, objective: Callable, seed: int):
        self.windows, self.objective, self.seed = windows, objective, seed

    def __iter__(self) -> Iterator[dict[str, np.ndarray]]:
        for place, row in enumerate(self.windows):
            yield self.objective(row["input_ids"], np.random.default_rng([self.seed, place]))


class Batches(torch.utils.data.Sampler):
    """The positions of every step of a run, for this rank: a batch sampler, one list a step.

    Batch `b` holds the positions from `start(b)` to `start(b + 1)`; step `s` takes the `s`-th batch
    that is not in `left_out`. Attributes: `steps`, `batch_size` (the full one), `limit` (sequences of
    a micro-batch at most), `size` (windows of `length` tokens; None for a stream, whose batches the
    Trainer cuts itself). Raises UserError for a ramp that does not fit.
    """

    def __init__(self, size: int | None, length: int, args: TrainingArguments, ramp: Ramp | None):
        if ramp and size is None:
            raise UserError("batch_size_ramp: a stream is cut into equal batches: set streaming: false")
        ways = layout()
        self.size, self.main, self.limit = size, args.process_index == 0, args.per_device_train_batch_size
        self.rank, self.ways = ways.data_rank(args.process_index), ways.data
        self.batch_size = global_batch(args)
        self.stages = self._stages(ramp, length) if ramp else []
        self.steps = args.max_steps if args.max_steps > 0 else self._steps_of(math.ceil(args.num_train_epochs * size))
        if (ramped := sum(steps for _, steps in self.stages)) >= self.steps:
            raise UserError(
                f"batch_size_ramp: the full batch comes after {ramped} steps, and the run has {self.steps}: shorten the ramp"
            )
        self.file, self.left_out = Path(args.output_dir) / LEFT_OUT, []
        if self.file.is_file() and any(self.file.parent.glob("checkpoint-*")):  # without one, the run starts afresh
            self.left_out = json.loads(self.file.read_text())

    def _stages(self, ramp: Ramp, length: int) -> list[tuple[int, int]]:
        """(sequences a step, steps) of each stage before the full batch."""
        if (ramp.steps is None) == (ramp.tokens is None):
            raise UserError("batch_size_ramp: set steps or tokens, the length of a stage")
        if not 0 < ramp.start < self.batch_size or ramp.factor < 2 or (ramp.steps or 0) + (ramp.tokens or 0) < 1:
            raise UserError(
                f"batch_size_ramp: start must lie between 0 and the full batch of {self.batch_size}, factor be at least 2, "
                "and steps or tokens at least 1"
            )
        stages, size = [], ramp.start
        while size < self.batch_size:
            stages.append((size, ramp.steps or math.ceil(ramp.tokens / (size * length))))
            size *= ramp.factor
        if odd := [size for size, _ in stages if size % self.ways]:
            raise UserError(f"batch_size_ramp: a batch of {odd[0]} does not divide over {self.ways} processes")
        return stages

    def _steps_of(self, sequences: int) -> int:
        """Steps that `sequences` fill, rounded up."""
        steps = 0
        for size, length in self.stages:
            if sequences <= size * length:
                return steps + math.ceil(sequences / size)
            steps, sequences = steps + length, sequences - size * length
        return steps + math.ceil(sequences / self.batch_size)

    def start(self, batch: int) -> int:
        """First position of batch `batch`; also the sequences of all batches before it."""
        position = 0
        for size, length in self.stages:
            position += min(batch, length) * size
            batch = max(batch - length, 0)
        return position + batch * self.batch_size

    def batch(self, step: int) -> int:
        """Number of the batch that step `step` (from 0) trains on."""
        for left_out in sorted(self.left_out):
            step += step >= left_out
        return step

    def positions(self, step: int) -> list[list[int]]:
        """This rank's positions of step `step` (from 0), one list a micro-batch."""
        first, end = (self.start(self.batch(step) + i) for i in (0, 1))
        share = (end - first) // self.ways
        mine = range(first + self.rank * share, first + (self.rank + 1) * share)
        size = micro_batch(share, self.limit)
        return [list(mine[i : i + size]) for i in range(0, share, size)]

    def sequences(self, steps: int) -> int:
        """Sequences in the first `steps` steps."""
        end = self.batch(steps)
        return self.start(end) - sum(self.start(b + 1) - self.start(b) for b in self.left_out if b < end)

    def leave_out(self, step: int) -> int:
        """Takes the batch of `step` (from 0) out of the run for good, on rank 0 in a file too; returns its number."""
        batch = self.batch(step)
        self.left_out.append(batch)
        if self.main:
            partial = self.file.with_suffix(".partial")
            partial.write_text(json.dumps(self.left_out))
            os.replace(partial, self.file)
        return batch

    def __len__(self) -> int:
        return self.steps

    def __iter__(self) -> Iterator[list[list[int]]]:
        return (self.positions(step) for step in range(self.steps))


class _MicroBatches(torch.utils.data.Dataset):
    """What a DataLoader sees: one item is one micro-batch."""

    def __init__(self, examples: Examples):
        self.examples = examples

    def __getitem__(self, positions: list[int]) -> dict[str, torch.Tensor]:
        return collate(self.examples.__getitems__(positions))


def _as_they_are(micro_batches: list) -> list:
    return micro_batches


class _Epochs(TrainerCallback):
    """Says the epoch in passes over the windows, and acts on `eval_strategy: epoch` and its like."""

    def __init__(self, batches: Batches):
        self.batches, self.flow = batches, DefaultFlowCallback()

    def on_step_end(self, args, state, control, **kwargs):
        before, now = (self.batches.start(self.batches.batch(state.global_step + i)) for i in (-1, 0))
        state.epoch = now / self.batches.size
        if before // self.batches.size < now // self.batches.size and state.global_step < self.batches.steps:
            self.flow.on_epoch_end(args, state, control)


def train_on(trainer: Trainer, examples: Examples, batches: Batches, objective: str, flops_per_example: float) -> None:
    """Makes `trainer` take its steps from `batches`. Call it once, before `train`.

    For the Trainer a step is one batch: it is accumulated here, so the number of micro-batches may
    change from step to step. Nothing in it waits for the device: micro-batches are pinned and copied
    without blocking, targets are counted on the host.
    """
    args, accelerator, training_step = trainer.args, trainer.accelerator, trainer.training_step
    args.gradient_accumulation_steps, args.max_steps = 1, batches.steps
    trainer.callback_handler.callbacks.insert(1, _Epochs(batches))

    def dataloader():
        return torch.utils.data.DataLoader(
            _MicroBatches(examples), batch_sampler=batches, collate_fn=_as_they_are,
            num_workers=args.dataloader_num_workers, prefetch_factor=args.dataloader_prefetch_factor,
            pin_memory=args.dataloader_pin_memory and args.device.type != "cpu",
        )  # fmt: skip

    def next_step(iterator, _, device):
        micro_batches = next(iterator)
        labels = (targets_of(batch["labels"].numpy(), objective) for batch in micro_batches)
        items = sum(int(np.count_nonzero(part != -100)) for part in labels)
        if args.world_size > 1:
            items = torch.tensor(items, dtype=torch.int64, pin_memory=device.type == "cuda")
            items = items.to(device, non_blocking=True)
            torch.distributed.all_reduce(items)
            items //= layout().sharing  # the others counted the same sequences
        return [micro_batches], items

    def accumulate(model, micro_batches, num_items_in_batch=None):
        trainer.current_gradient_accumulation_steps = len(micro_batches)
        total = 0.0
        for number, inputs in enumerate(micro_batches, 1):
            last = number == len(micro_batches)
            _compat.set_sync_gradients(accelerator, last)
            # DeepSpeed reduces when it sees fit, and refuses no_sync from ZeRO-2 on
            with contextlib.nullcontext() if last or trainer.is_deepspeed_enabled else accelerator.no_sync(model):
                inputs = send_to_device(inputs, args.device, non_blocking=True)
                total += training_step(model, inputs, num_items_in_batch)
        return total

    def flops(micro_batches):
        return flops_per_example * sum(len(batch["labels"]) for batch in micro_batches) / layout().sharing

    trainer.get_train_dataloader, trainer.get_batch_samples = dataloader, next_step
    trainer.training_step, trainer.floating_point_ops = accumulate, flops
    if (ways := layout()).sharing > 1:
        trainer.get_tp_size = lambda: ways.sharing // ways.cp  # ranks that count the same targets; those of cp it knows
        trainer.get_eval_dataloader = lambda dataset=None: _shared_batches(trainer, dataset or trainer.eval_dataset)
    split_sequences(trainer)


def _shared_batches(trainer: Trainer, dataset) -> torch.utils.data.DataLoader:
    """Held-out batches of this rank: those that see the same sequences in training see the same ones here."""
    size, ways = trainer.args.per_device_eval_batch_size, layout()
    starts = range(ways.data_rank(trainer.args.process_index) * size, len(dataset), size * ways.data)
    batches = [list(range(start, start + size)) for start in starts]
    return torch.utils.data.DataLoader(dataset, batch_sampler=batches, collate_fn=trainer.data_collator)
