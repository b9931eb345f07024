"""Checkpoints that can be trusted, and a training loop that stops rather than goes wrong.

A checkpoint counts only when `complete.json` stands in it: written last, with the size and hash of
every file. Resume takes the newest checkpoint that still matches and sets the others aside.
`protect` gives any Hugging Face Trainer this, agreed stopping on SIGTERM and SIGINT, and a stop
before the update when the gradient is not finite. Why, with measurements: docs/checkpoints.md.
"""

import functools
import gc
import json
import os
import shutil
import signal
from pathlib import Path

import torch
import xxhash
from accelerate.utils import broadcast_object_list
from safetensors import SafetensorError
from transformers import Trainer, TrainerCallback, TrainingArguments

from llm_recipes import _compat
from llm_recipes.config import SpikeGuard
from llm_recipes.errors import Diverged, Interrupted, UserError
from llm_recipes.fsdp import keep_precision
from llm_recipes.launch import checkpoint_format
from llm_recipes.stability import Rollback, Watch
from llm_recipes.universal import accept_any_world_size

MANIFEST = "complete.json"
CHECKPOINT_BYTES = (
    16  # a parameter: fp32 weights and AdamW's two moments, and the weights again where ZeRO writes them twice
)


def _digest(path: Path) -> str:
    digest = xxhash.xxh3_128()
    with path.open("rb") as file:
        while block := file.read(1 << 24):
            digest.update(block)
        os.fsync(file.fileno())  # on the disk before the manifest vouches for it
    return digest.hexdigest()


def commit(folder: Path, **facts) -> None:
    """Vouches for `folder` as it is now: hashes every file, then puts the manifest in place in one move."""
    files = sorted(path for path in folder.rglob("*") if path.is_file() and path.name != MANIFEST)
    manifest = {**facts, "files": {str(f.relative_to(folder)): [f.stat().st_size, _digest(f)] for f in files}}
    partial = folder / f"{MANIFEST}.partial"
    with partial.open("w") as file:
        json.dump(manifest, file, indent=1)
        file.flush()
        os.fsync(file.fileno())
    os.replace(partial, folder / MANIFEST)


def damage(folder: Path) -> str | None:
    """What is wrong with a checkpoint, None when it is as it was committed."""
    try:
        manifest = json.loads((folder / MANIFEST).read_text())
        files = manifest["files"].items()
    except FileNotFoundError:
        return "its save was not finished"
    except (ValueError, KeyError, OSError) as error:
        return f"{MANIFEST} is unreadable ({error})"
    for name, (size, digest) in files:
        path = folder / name
        if not path.is_file():
            return f"{name} is missing"
        if path.stat().st_size != size or _digest(path) != digest:
            return f"{name} has changed since it was written"
    return None


def checkpoints(output_dir: str | Path) -> list[Path]:
    """Checkpoint folders, newest first."""
    found = [p for p in Path(output_dir).glob("checkpoint-*") if p.is_dir() and p.name[11:].isdigit()]
    return sorted(found, key=lambda p: int(p.name[11:]), reverse=True)


def find_checkpoint(args: TrainingArguments, resume: str) -> str | None:
    """The checkpoint to continue from, the same on every rank; None to start fresh.

    `auto` takes the newest undamaged one and renames damaged ones to `broken-checkpoint-N`; a path
    must be undamaged, and newer checkpoints are renamed to `abandoned-checkpoint-N` so that the old
    timeline cannot come back. Raises UserError when the launch cannot continue the checkpoint.
    """
    found = [None]
    if args.process_index == 0:
        found = [str(path) if (path := _choose(Path(args.output_dir), resume)) else None]
    if args.world_size > 1:
        broadcast_object_list(found)
    if found[0] is not None:
        written, now = json.loads((Path(found[0]) / MANIFEST).read_text())["format"], checkpoint_format()
        if written != now:
            raise UserError(f"{found[0]} was written under {written} and cannot be continued under {now}")
        if "DeepSpeed" in now:
            accept_any_world_size()
    return found[0]


def _choose(output_dir: Path, resume: str) -> Path | None:
    if resume == "never":
        if checkpoints(output_dir):
            raise UserError(f"{output_dir} holds checkpoints of an earlier run: move it away, or use resume: auto")
        return None
    if resume != "auto":
        chosen = Path(resume)
        if chosen.absolute().parent != output_dir.absolute():
            raise UserError(
                f"resume: {resume} is not in output_dir {output_dir}; to start from its weights use model_name_or_path"
            )
        if not (chosen.name.startswith("checkpoint-") and chosen.name[11:].isdigit()):
            raise UserError(f"resume: {resume} is not a checkpoint-N folder: rename it if you mean to continue from it")
        if reason := damage(chosen):
            raise UserError(f"resume: {resume}: {reason}" if chosen.is_dir() else f"resume: {resume} does not exist")
        for path in checkpoints(chosen.parent):
            if int(path.name[11:]) > int(chosen.name[11:]):
                _set_aside(path, "abandoned", "it is newer than the checkpoint asked for")
        return chosen
    for path in checkpoints(output_dir):
        if not (reason := damage(path)):
            return path
        _set_aside(path, "broken", reason)
    return None


def _set_aside(path: Path, prefix: str, reason: str) -> None:
    target = path.with_name(f"{prefix}-{path.name}")
    shutil.rmtree(target, ignore_errors=True)
    path.rename(target)
    print(f"{path}: {reason}; renamed to {target.name}", flush=True)


class _AlreadyTrained(Exception):
    """The checkpoint is at the last step; the Trainer would take one step too many."""


class _Guard(TrainerCallback):
    """State that the wrapped methods share, and the events they need."""

    def __init__(self, trainer: Trainer):
        self.trainer, self.signal, self.stopping, self.group, self.handlers = trainer, None, False, None, {}
        self.keep, trainer.args.save_total_limit = trainer.args.save_total_limit, None  # the library rotates too early

    def on_train_begin(self, args, state, control, **kwargs):
        state.compute_steps(args, state.max_steps)  # a resume brings back the old logging, saving and evaluation steps
        if state.global_step >= state.max_steps:
            raise _AlreadyTrained
        if args.world_size > 1 and self.group is None:
            self.group = torch.distributed.new_group(backend="gloo")  # agrees on the host, the device goes on
        _compat.hook_deepspeed_norm(self.trainer, self.watch.judge)
        for number in (signal.SIGTERM, signal.SIGINT):
            self.handlers.setdefault(number, signal.signal(number, self._on_signal))

    def _on_signal(self, number, frame):
        self.signal = number
        signal.signal(number, self.handlers[number])  # a second one acts at once

    def on_step_end(self, args, state, control, **kwargs):
        asked = self.signal is not None
        if args.world_size > 1:  # one rank may have the signal alone; they must leave at the same step
            flag = torch.tensor([asked], dtype=torch.int32)
            torch.distributed.all_reduce(flag, torch.distributed.ReduceOp.MAX, group=self.group)
            asked = bool(flag.item())
        if asked:
            self.stopping = control.should_save = control.should_training_stop = True

    def on_log(self, args, state, control, **kwargs):
        if self.trainer.is_in_train:
            self.watch.check()

    def on_train_end(self, args, state, control, **kwargs):
        for number, handler in self.handlers.items():
            signal.signal(number, handler)


def protect(trainer: Trainer, after_save=None, spike_guard: SpikeGuard | None = None, windows=None) -> Watch:
    """Makes `trainer` save, stop and resume as this module promises. Call it once, before `train`.

    `after_save(folder)` runs on rank 0 after each committed checkpoint. `windows` is the pair
    (Examples, Batches) that the trainer trains on, if it does: then no step waits for the device.
    """
    keep_precision(trainer.accelerator)
    guard = _Guard(trainer)
    trainer.callback_handler.callbacks.insert(0, guard)
    train, compute_loss = trainer.train, trainer.compute_loss
    save, get_norm = _compat.methods(trainer)
    guard.watch = watch = Watch(trainer, spike_guard, windows)

    def guarded_train(resume_from_checkpoint=None, **kwargs):
        while True:
            watch.load(resume_from_checkpoint)
            try:
                result = train(resume_from_checkpoint=resume_from_checkpoint, **kwargs)
                break
            except _AlreadyTrained:
                trainer.is_in_train = False
                if trainer.args.load_best_model_at_end and trainer.state.best_model_checkpoint:
                    _compat.load_best_model(trainer)
                return None
            except Rollback as spike:
                resume_from_checkpoint = _roll_back(trainer, spike, windows[1], spike_guard.max_rollbacks)
            gc.collect()  # the old optimizer's memory, and the old DDP wrapper's hooks on the weights
        if guard.stopping:  # save_strategy: best took the request to save back
            committed_save(trainer.model, None)
        return result

    def recorded_loss(model, inputs, *args, **kwargs):
        result = compute_loss(model, inputs, *args, **kwargs)
        if model.training and trainer.accelerator.scaler is None:
            watch.record(inputs["input_ids"], result[0] if isinstance(result, tuple) else result)
        return result

    def checked_norm(*args, **kwargs):
        norm = get_norm(*args, **kwargs)
        # fp16: dynamic loss scaling leaves such steps out itself; DeepSpeed asks through its hook
        if trainer.accelerator.scaler is None and not trainer.is_deepspeed_enabled:
            watch.judge(norm)
        return norm

    def committed_save(model, trial):
        watch.check()
        args, step = trainer.args, trainer.state.global_step
        folder = Path(args.output_dir) / f"checkpoint-{step}"
        previous = next(iter(checkpoints(args.output_dir)), None)
        if previous:
            size = sum(f.stat().st_size for f in previous.rglob("*") if f.is_file())
        else:
            whole = getattr(trainer.model, "split", None)  # then this process has a part
            trained = (p for p in (whole.shape if whole else trainer.model).parameters() if p.requires_grad)
            size = CHECKPOINT_BYTES * sum(
                getattr(p, "ds_numel", p.numel()) for p in trained
            )  # whole, though ZeRO-3 sharded it
        if (free := shutil.disk_usage(args.output_dir).free) < size:
            raise UserError(f"{folder}: needs {size / 1e6:,.0f} MB, {free / 1e6:,.0f} MB are free; {_kept(previous)}")
        # Under the names it trains with: the resume loads by name and would leave renamed weights as they are.
        trainer.model.save_pretrained = functools.partial(trainer.model.save_pretrained, save_original_format=False)
        try:
            save(model, trial)
            watch.save(folder)
        except (OSError, RuntimeError, SafetensorError) as error:
            shutil.rmtree(folder, ignore_errors=True)
            raise UserError(f"{folder} could not be written: {error}; {_kept(previous)}") from error
        finally:
            del trainer.model.save_pretrained
        args.distributed_state.wait_for_everyone()
        if args.process_index == 0:
            commit(folder, step=step, format=checkpoint_format(), world_size=args.world_size)
            best = Path(trainer.state.best_model_checkpoint or "").name
            others = [path for path in checkpoints(args.output_dir) if path.name != best]
            for old in others[guard.keep :] if guard.keep else []:
                (old / MANIFEST).unlink(missing_ok=True)  # first: half a checkpoint must not count after a kill
                shutil.rmtree(old)
            if after_save:
                after_save(folder)
        if guard.stopping:
            args.distributed_state.wait_for_everyone()
            name = signal.Signals(guard.signal).name if guard.signal else "a signal on another rank"
            raise Interrupted(f"{name}: saved {folder}; the same command continues from there")

    trainer.train, trainer.compute_loss = guarded_train, recorded_loss
    _compat.set_methods(trainer, committed_save, checked_norm)
    return watch


def _roll_back(trainer: Trainer, spike: Rollback, batches, limit: int) -> str:
    """The newest checkpoint, with the batch of the spike left out from now on. Raises Diverged when that was the last try."""
    found = next(iter(checkpoints(trainer.args.output_dir)), None)
    if len(batches.left_out) >= limit or found is None:
        why = f"after {limit} rollbacks" if found else "and there is no checkpoint to go back to"
        raise Diverged(f"{spike}, {why}: stopped before the update")
    number = batches.leave_out(spike.step)
    if trainer.args.process_index == 0:
        print(
            f"{spike}; back to {found.name}, batch {number} is left out ({len(batches.left_out)} of {limit})",
            flush=True,
        )
    # built anew by train: they hold what came after the checkpoint
    trainer.optimizer = trainer.lr_scheduler = None
    trainer.model_wrapped = trainer.model
    return str(found)


def _kept(previous: Path | None) -> str:
    return (
        f"{previous.name} is intact, the same command continues from there"
        if previous
        else "there was no checkpoint yet"
    )
