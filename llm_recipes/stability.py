"""Watches loss and gradient norm of every step, and keeps a bad update out of the weights.

Without a `spike_guard` only values that are not finite are acted on: the run stops. The decision is
made on the device and the update is left out there (torch's fused optimizers honour `found_inf`), so
the host waits for the device only where it logs or saves. Until then nothing after a bad step
changes the weights either, so what is found late is found in time.
"""

import json
import math
from pathlib import Path

import numpy as np
import torch
from accelerate.utils import gather_object
from datasets import Dataset
from transformers import Trainer

from llm_recipes import _compat
from llm_recipes.config import SpikeGuard
from llm_recipes.errors import Diverged
from llm_recipes.launch import layout

FILE = "spike_guard.json"
SPIKE, NOT_FINITE = 1, 2


class Rollback(Exception):
    """Asks for the newest checkpoint, and for the batch of `step` (from 0) to be left out."""

    def __init__(self, step: int, reason: str):
        super().__init__(reason)
        self.step = step


class Watch:
    """Judges each step before its update.

    `windows` is the pair (Examples, Batches) of a run whose steps are known beforehand; without it
    the ids of the micro-batches are kept until the step is judged. `history` `(2, window)` holds the
    losses and gradient norms of the last updates that were made, and `seen` their number, on the device.
    """

    def __init__(self, trainer: Trainer, guard: SpikeGuard | None, windows):
        self.trainer, self.guard, self.windows = trainer, guard, windows
        self.load(None)

    def clear(self) -> None:
        self.losses, self.flags, self.bad = {}, [], None

    @property
    def deferred(self) -> bool:
        """True when the host may learn of a bad step later, because the device leaves out its update."""
        sharded = self.trainer.is_deepspeed_enabled or self.trainer.is_fsdp_enabled or layout().own
        return bool(self.windows) and not sharded and _compat.honours_found_inf(self.trainer.optimizer.optimizer)

    @property
    def action(self) -> str:
        return self.guard.action if self.guard else "stop"

    def record(self, input_ids: torch.Tensor, loss: torch.Tensor) -> None:
        """Notes the loss of one micro-batch of the coming step."""
        kept = None if self.windows else input_ids
        self.losses.setdefault(self.trainer.state.global_step, []).append((kept, loss.detach()))

    def judge(self, norm) -> None:
        """Flags the coming update by its gradient `norm`, the same on every rank, and leaves it out if it has to be."""
        step, device = self.trainer.state.global_step, self.trainer.args.device
        norm = norm if self.deferred else float(norm)  # FSDP gives a DTensor, DeepSpeed a number
        norm = torch.as_tensor(norm, dtype=torch.float32, device=device)
        finite = torch.isfinite(norm) & (norm >= 0)  # ZeRO reports a norm that is not finite as -1
        values, flag = None, torch.where(finite, 0, NOT_FINITE)
        if self.guard:
            values = torch.stack([self._loss(step), norm])
            flag = torch.where(torch.isfinite(values).all(), flag, NOT_FINITE)
            flag = torch.where((flag == 0) & self._is_spike(values), SPIKE, flag)
        self.flags.append((step, flag, values, self._limits() if self.guard else None))
        leave_out = flag == NOT_FINITE if self.action in ("warn", "stop") else flag > 0
        if self.action != "skip":  # weights stay as they are until the host has looked
            self.bad = leave_out if self.bad is None else self.bad | leave_out
            leave_out = self.bad
        if self.guard:
            self._remember(values, leave_out)
        if self.deferred:
            self.trainer.optimizer.optimizer.found_inf = leave_out.to(torch.float32)
        else:
            self.check()
            if leave_out.item():
                self.trainer.optimizer.zero_grad()

    def _loss(self, step: int) -> torch.Tensor:
        """Mean loss of the step over all ranks, still on the device."""
        loss = torch.stack([loss for _, loss in self.losses[step]]).sum().float()
        if not self.trainer.model_accepts_loss_kwargs:  # then each is the mean of its own micro-batch
            loss = loss / len(self.losses[step])
        if self.trainer.args.world_size > 1:
            torch.distributed.all_reduce(loss)
            loss = loss / self.trainer.args.world_size
        return loss

    def _is_spike(self, values: torch.Tensor) -> torch.Tensor:
        mean, std = self._limits()
        return (values > mean + self.guard.z * std).any() & (self.seen >= self.guard.window)

    def _limits(self) -> tuple[torch.Tensor, torch.Tensor]:
        return self.history.mean(1), self.history.std(1)

    def _remember(self, values: torch.Tensor, left_out: torch.Tensor) -> None:
        """A step that is left out must not raise the limit for the next one."""
        longer = torch.cat([self.history[:, 1:], values[:, None]], dim=1)
        self.history = torch.where(left_out, self.history, longer)
        self.seen = self.seen + ~left_out

    def check(self) -> None:
        """Looks at the steps since the last look: the one moment when the host waits for the device.

        Says what was skipped or noticed; raises Diverged or Rollback at the first step that asks for it.
        """
        if not self.flags:
            return
        found = torch.stack([flag for _, flag, *_ in self.flags]).tolist()
        for (step, _, values, limits), flag in zip(self.flags, found, strict=True):
            self.in_a_row = self.in_a_row + 1 if flag else 0
            if not flag:
                continue
            if flag == NOT_FINITE and self.action in ("stop", "warn"):
                raise Diverged(self._not_finite(step))
            what = f"step {step + 1}: " + ("not finite" if flag == NOT_FINITE else self._describe(values, limits))
            if self.action == "rollback":
                raise Rollback(step, what)
            if self.action == "skip":
                self.skipped.append(step + 1)
                if self.in_a_row >= self.guard.window:
                    raise Diverged(f"{what}; the last {self.in_a_row} updates were all skipped: this run has diverged")
            self._say(f"{what}; update {'skipped' if self.action == 'skip' else 'made all the same'}")
        self.clear()

    def _say(self, line: str) -> None:
        if self.trainer.args.process_index == 0:
            print(line, flush=True)

    def _describe(self, values: torch.Tensor, limits: tuple[torch.Tensor, torch.Tensor]) -> str:
        mean, std = limits
        return " and ".join(
            f"{name} {value:.4g}, {(value - m) / s if s else math.inf:.1f} deviations above {m:.4g}"
            for name, value, m, s in zip(("loss", "grad_norm"), *(x.tolist() for x in (values, mean, std)), strict=True)
            if value > m + self.guard.z * s
        )

    def _not_finite(self, step: int) -> str:
        losses = self.losses[step]
        odd = [i for i, (_, loss) in enumerate(losses) if not math.isfinite(loss.item())]
        in_a_loss = any(gather_object([bool(odd)]))  # then only the batches with such a loss are of interest
        chosen = odd if in_a_loss else range(len(losses))
        where = gather_object([window for i in chosen for window in self._locate(step, i, losses[i][0])])
        return (
            f"step {step + 1}: {'the loss' if in_a_loss else 'the gradient norm'} is not finite; stopped before the update. "
            f"Training windows: {', '.join(map(str, where))}. Look at them, or train in another output_dir with a lower "
            "learning_rate; model_name_or_path: <the last checkpoint> keeps what is learnt"
        )

    def _locate(self, step: int, micro: int, input_ids: torch.Tensor | None) -> list:
        """The windows of a micro-batch: their indices, or in a stream their first ids."""
        if self.windows:
            examples, batches = self.windows
            parts = batches.positions(step)
            parts = parts if len(self.losses[step]) == 1 else [parts[micro]]  # a pipeline has one loss a step
            return [examples.window(p) for part in parts for p in part]
        rows = list(input_ids.cpu().numpy())
        rows_of = self.trainer.train_dataset
        if not isinstance(rows_of, Dataset) or "input_ids" not in rows_of.column_names:  # a stream, or completions
            return [f"[{' '.join(map(str, row[:8]))} ...]" for row in rows]
        return find_rows(rows, rows_of)

    def figures(self) -> dict[str, int]:
        """What was done in this run, for metrics.json; nothing when there is nothing to say."""
        left_out = self.windows[1].left_out if self.windows else []
        found = {"updates_skipped": len(self.skipped), "batches_left_out": len(left_out)}
        return {key: count for key, count in found.items() if count}

    def save(self, folder: Path) -> None:
        """Puts what the guard remembers into a checkpoint, so that a resume decides as the run would have."""
        if self.guard and self.trainer.args.process_index == 0:
            state = {"seen": self.seen.item(), "history": self.history.tolist()}
            (folder / FILE).write_text(json.dumps(state | {"skipped": self.skipped, "in_a_row": self.in_a_row}))

    def load(self, folder: str | None) -> None:
        """Takes up what `save` left in the checkpoint that the run resumes from."""
        self.clear()
        state = {"seen": 0, "history": None, "skipped": [], "in_a_row": 0}
        if self.guard and folder and (Path(folder) / FILE).is_file():
            state = json.loads((Path(folder) / FILE).read_text())
        self.skipped, self.in_a_row = state["skipped"], state["in_a_row"]
        if self.guard:
            device = self.trainer.args.device
            self.seen = torch.tensor(state["seen"], device=device)
            self.history = torch.tensor(state["history"] or [[0.0] * self.guard.window] * 2, device=device)


def find_rows(rows: list[np.ndarray], dataset: Dataset) -> list[int]:
    """Indices of `rows`, each `(T,)`, in a dataset of windows."""
    wanted, found, start = {row.astype(np.int64).tobytes() for row in rows}, [], 0
    for batch in dataset.with_format("numpy").iter(1000):
        found += [start + i for i, row in enumerate(batch["input_ids"]) if row.astype(np.int64).tobytes() in wanted]
        start += len(batch["input_ids"])
    return found


def spike_guard_problems(guard: SpikeGuard | None, args, strategy: str, streaming: bool) -> list[str]:
    """Why a spike guard cannot act under this launch."""
    if guard is None:
        return []
    problems = []
    if guard.window < 2 or guard.z <= 0 or guard.max_rollbacks < 1:
        problems.append("spike_guard: window must be at least 2, z above 0 and max_rollbacks at least 1")
    if guard.action == "warn":
        return problems
    if args.fp16:
        problems.append(
            f"spike_guard: action {guard.action} needs bf16 or fp32: fp16's loss scaling skips steps itself"
        )
    if strategy not in ("single process", "DDP"):
        problems.append(
            f"spike_guard: action {guard.action} needs unsharded weights, not {strategy}: use action: warn, or "
            "accelerate_configs/ddp.yaml"
        )
    if streaming and guard.action == "rollback":
        problems.append("spike_guard: a stream cannot leave a batch out: use action: skip or warn, or streaming: false")
    if guard.action == "rollback" and args.save_strategy == "no":
        problems.append("spike_guard: action rollback goes back to a checkpoint: set save_steps")
    return problems
