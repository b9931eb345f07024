"""DiLoCo (Douillard et al. 2023, arXiv 2311.08105, algorithm 1): workers train alone and meet every `sync_every` steps.

Each process of a DDP launch is a worker with weights and an inner optimizer of its own. At an outer step the shared
weights take a step of SGD with Nesterov momentum along the mean of (shared - own weights), and every worker goes on from
them. So 4 bytes a parameter are reduced every `sync_every` steps instead of every step. What is left at every step are
three scalars: the targets in the batch, the gradient norm, and whether a signal asks to stop.

Evaluations, checkpoints and the final model have the shared weights. The logged loss and gradient norm are means over the
workers, and so is what `stability.Watch` judges: no worker stops alone. `max_grad_norm` clips each worker by itself.
"""

import contextlib
import json
from pathlib import Path

import torch
from transformers import Trainer, TrainerCallback, TrainingArguments

from llm_recipes import _compat
from llm_recipes.checkpoints import MANIFEST
from llm_recipes.config import Diloco, SpikeGuard
from llm_recipes.errors import UserError


class _Workers(TrainerCallback):
    """The shared weights and their optimizer, the same on every worker."""

    def __init__(self, trainer: Trainer, config: Diloco):
        self.trainer, self.config = trainer, config
        self.weights = [weight for weight in trainer.model.parameters() if weight.requires_grad]

    @property
    def apart(self) -> bool:
        """True where the last step was no outer step, and the workers' weights differ."""
        state = self.trainer.state
        return state.global_step % self.config.sync_every != 0 and state.global_step < state.max_steps

    def file(self) -> Path:
        args, step = self.trainer.args, self.trainer.state.global_step
        return Path(args.output_dir) / f"checkpoint-{step}" / f"diloco_{args.process_index}.pt"

    def on_train_begin(self, args, state, control, **kwargs):
        self.shared = [weight.detach().clone() for weight in self.weights]
        momentum = self.config.outer_momentum
        self.optimizer = torch.optim.SGD(self.shared, self.config.outer_learning_rate, momentum, nesterov=momentum > 0)
        if state.global_step:
            self._load()

    def save(self) -> None:
        """Puts what only this worker has into the checkpoint."""
        optimizers = {"inner": self.trainer.optimizer.state_dict(), "outer": self.optimizer.state_dict()}
        torch.save({"weights": [weight.data for weight in self.weights], **optimizers}, self.file())

    def _load(self) -> None:
        folder, workers = self.file().parent, self.trainer.args.world_size
        if (written := json.loads((folder / MANIFEST).read_text())["world_size"]) != workers:
            raise UserError(
                f"{folder} was written by {written} workers of diloco: launch with --num_processes {written}"
            )
        own = torch.load(self.file(), map_location="cpu", weights_only=True)
        self.trainer.optimizer.load_state_dict(own["inner"])
        self.optimizer.load_state_dict(own["outer"])
        for weight, value in zip(self.weights, own["weights"], strict=True):
            weight.data.copy_(value)

    def on_step_end(self, args, state, control, **kwargs):
        if self.apart:
            return
        for shared, weight in zip(self.shared, self.weights, strict=True):
            # the mean of the differences, not the difference to the mean: small numbers keep their digits
            shared.grad = self.trainer.accelerator.reduce(shared - weight.data, "mean")
        self.optimizer.step()
        self.optimizer.zero_grad()
        for weight, shared in zip(self.weights, self.shared, strict=True):
            weight.data.copy_(shared)

    @contextlib.contextmanager
    def shared_weights(self):
        """In it the model has the shared weights."""
        self._exchange()
        try:
            yield
        finally:
            self._exchange()

    def _exchange(self) -> None:
        if self.apart:
            for weight, shared in zip(self.weights, self.shared, strict=True):
                weight.data, shared.data = shared.data, weight.data


def train_apart(trainer: Trainer, config: Diloco | None) -> None:
    """Makes each process of `trainer` a worker of DiLoCo; nothing without `config`.

    Call it after `train_on` and before `protect`, which has to see the mean norm and every worker's file.
    """
    if config is None:
        return
    workers, accelerator = _Workers(trainer, config), trainer.accelerator
    training_step, evaluate, (save, get_norm) = trainer.training_step, trainer.evaluate, _compat.methods(trainer)
    trainer.add_callback(workers)

    def step_alone(model, *args, **kwargs):
        with accelerator.no_sync(model):  # DDP has made the weights equal at the start, and does no more
            return training_step(model, *args, **kwargs)

    def evaluate_shared(*args, **kwargs):
        with workers.shared_weights():
            return evaluate(*args, **kwargs)

    def save_all(model, trial):
        with workers.shared_weights():
            save(model, trial)
        workers.save()

    def mean_norm(*args, **kwargs):
        return accelerator.reduce(get_norm(*args, **kwargs), "mean")

    trainer.training_step, trainer.evaluate = step_alone, evaluate_shared
    _compat.set_methods(trainer, save_all, mean_norm)


def diloco_problems(
    diloco: Diloco | None, guard: SpikeGuard | None, args: TrainingArguments, strategy: str, streaming: bool
) -> list[str]:
    """Why DiLoCo cannot run under this launch, `strategy` in the words of `asked_strategy`."""
    if diloco is None:
        return []
    checks = {
        "sync_every must be at least 1, outer_learning_rate above 0 and outer_momentum at least 0 and below 1": (
            diloco.sync_every < 1 or diloco.outer_learning_rate <= 0 or not 0 <= diloco.outer_momentum < 1
        ),
        f"every worker has a whole model: launch two or more processes with accelerate_configs/ddp.yaml, not {strategy}": (
            strategy != "DDP"
        ),
        "spike_guard would judge all workers by their mean: use action: warn": guard and guard.action != "warn",
        "fp16's loss scaling skips steps of single workers: use bf16 or fp32": args.fp16,
        "one process reads a stream and sends every batch to the others: set streaming: false": streaming,
    }
    return [f"diloco: {problem}" for problem, found in checks.items() if found]
