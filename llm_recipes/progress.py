"""Progress bar, one line a log, and the throughput figures of a run."""

import sys
import time
from collections.abc import Callable

import torch
from tqdm.auto import tqdm
from transformers import PrinterCallback, ProgressCallback, Trainer, TrainerCallback


class Throughput(ProgressCallback):
    """Shows loss, tokens/s and ETA; measures training time without evaluation, saving and start-up.

    `tokens_until(step)` is the number of tokens in the steps before `step`, all processes together.
    """

    WARMUP = 3  # steps left out of the steady state: allocators and caches settle

    def __init__(self, tokens_until: Callable[[int], int]):
        super().__init__()
        self.tokens_until = tokens_until
        self.tokens, self.seconds, self.marked, self.left_out = 0, 0.0, (0, 0.0), self.WARMUP
        self.first, self.step = None, 0

    def _mark(self, *args, **kwargs):
        self.last = time.perf_counter()

    on_save = _mark

    def on_train_begin(self, args, state, control, **kwargs):
        if state.is_world_process_zero:
            bars = sys.stderr.isatty() and not args.disable_tqdm  # in a log file the lines are enough
            self.training_bar = tqdm(
                total=state.max_steps, initial=state.global_step, dynamic_ncols=True, disable=not bars
            )
        self.current_step = self.step = state.global_step
        self.first = state.global_step if self.first is None else self.first
        self._mark()

    def on_prediction_step(self, args, state, control, **kwargs):
        if sys.stderr.isatty():
            super().on_prediction_step(args, state, control, **kwargs)

    def on_evaluate(self, args, state, control, **kwargs):
        super().on_evaluate(args, state, control, **kwargs)
        self._mark()

    def on_step_end(self, args, state, control, **kwargs):
        super().on_step_end(args, state, control, **kwargs)
        if args.device.type != "cpu" and (control.should_log or control.should_evaluate or control.should_save):
            torch.accelerator.synchronize()  # or steps still in the queue would count as evaluation or saving
        now = time.perf_counter()
        tokens = self.tokens_until(state.global_step) - self.tokens_until(state.global_step - 1)
        self.step = state.global_step
        if self.left_out:
            self.left_out -= 1
        else:
            self.tokens, self.seconds = self.tokens + tokens, self.seconds + now - self.last
        self.last = now

    @property
    def session_tokens(self) -> int:
        """Tokens of this start of the run, warm-up included; what a rollback threw away is not counted."""
        return self.tokens_until(self.step) - self.tokens_until(min(self.first, self.step))

    def tokens_per_second(self, since=(0, 0.0)) -> float | None:
        tokens, seconds = self.tokens - since[0], self.seconds - since[1]
        return tokens / seconds if seconds else None

    def on_log(self, args, state, control, logs=None, **kwargs):
        if "loss" in logs:
            rate, self.marked = self.tokens_per_second(self.marked), (self.tokens, self.seconds)
            if rate:
                logs["tokens_per_second"] = rate
        if not state.is_world_process_zero or self.training_bar is None or "train_runtime" in logs:
            return
        line = f"step {state.global_step:>6,}/{state.max_steps:,}"
        for key, form in (
            ("loss", ".4f"), ("grad_norm", ".2f"), ("learning_rate", ".2e"), ("eval_loss", ".4f"),
            ("objective/score", ".3f"), ("objective/kl", ".2f"),
        ):  # fmt: skip
            line += f"  {key} {logs[key]:{form}}" if key in logs else ""
        if rate := logs.get("tokens_per_second"):
            left = (self.tokens_until(state.max_steps) - self.tokens_until(state.global_step)) / rate
            line += f"  {rate:,.0f} tokens/s  ETA {int(left // 60)}:{int(left % 60):02d}"
        self.training_bar.write(line)
        self.training_bar.set_postfix(
            {key: f"{logs[key]:,.4g}" for key in ("loss", "tokens_per_second") if key in logs}
        )


def show_progress(trainer: Trainer, throughput: Throughput, *others: TrainerCallback) -> None:
    """Puts `throughput` in the place of the Trainer's own progress callbacks, and `others`, before the reporters."""
    trainer.remove_callback(ProgressCallback)
    trainer.remove_callback(PrinterCallback)
    # after the callback that decides when to log, evaluate and save
    trainer.callback_handler.callbacks[1:1] = [throughput, *others]
