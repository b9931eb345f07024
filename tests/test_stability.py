"""A bad step: found, said, left out or undone, with nothing lost and nothing else changed."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from transformers import TrainerCallback

from llm_recipes.checkpoints import checkpoints
from llm_recipes.config import SpikeGuard
from llm_recipes.errors import Diverged
from llm_recipes.stability import spike_guard_problems
from tests.running import launch, run
from tests.test_batches import Args, trainer_of

STEPS, BAD = 14, 9  # the bad step, counted from 0: after the window of 6 is full and a checkpoint exists


def weights(trainer):
    return {name: p.detach().clone() for name, p in trainer.model.named_parameters()}


def equal(a, b):
    return all(torch.equal(p, b[name]) for name, p in a.items())


def poison(trainer, factor, step=BAD, micro=1, times=99):
    """Multiplies the loss of one micro-batch of `step`'s batch, whichever step trains on it, at most `times` times."""
    batches, calls, left = trainer.batches, {}, [times]
    forward = trainer.model.forward

    def poisoned(*args, **kwargs):
        out = forward(*args, **kwargs)
        now = trainer.state.global_step
        if trainer.model.training:
            calls[now] = calls.get(now, 0) + 1
            hit = batches.batch(now) == step and (calls[now] - 1) % len(batches.positions(now)) == micro
            if hit and left[0]:
                left[0] -= 1
                out["loss"] = out["loss"] * factor
        return out

    trainer.model.forward = poisoned


def guarded(tmp_path, action, **keys):
    guard = SpikeGuard(window=6, z=6.0, action=action, max_rollbacks=keys.pop("max_rollbacks", 3))
    keys = {
        "max_steps": STEPS,
        "learning_rate": 1e-2,
        "logging_steps": 4,
        "save_strategy": "steps",
        "save_steps": 4,
    } | keys
    return trainer_of(tmp_path, guard=guard if action != "none" else None, **keys)


class LeaveOut(TrainerCallback):
    """Drops the gradients of one step, as a reference."""

    def on_pre_optimizer_step(self, args, state, control, model=None, **kwargs):
        if state.global_step == BAD:
            model.zero_grad(set_to_none=True)


@pytest.mark.parametrize("factor", [1000.0, float("nan")])
@pytest.mark.parametrize("optimizer", ["adamw_torch_fused", "adafactor"])  # on the device, and where the host must ask
def test_skip_equals_a_run_without_that_update(tmp_path, capsys, factor, optimizer):
    reference = guarded(tmp_path / "a", "none", optim=optimizer)
    reference.add_callback(LeaveOut())
    reference.train()
    trainer = guarded(tmp_path / "b", "skip", optim=optimizer)
    poison(trainer, factor)
    trainer.train()
    assert equal(weights(reference), weights(trainer))
    said = [line for line in capsys.readouterr().out.splitlines() if "update skipped" in line]
    assert len(said) == 1 and said[0].startswith(f"step {BAD + 1}: ")
    assert ("not finite" in said[0]) == (factor != factor) and ("deviations above" in said[0]) == (factor == 1000.0)


@pytest.mark.parametrize("factor", [1000.0, float("nan")])
def test_rollback_equals_a_run_that_never_saw_the_batch(tmp_path, capsys, factor):
    reference = guarded(tmp_path / "a", "none")
    reference.batches.left_out.append(BAD)
    reference.train()
    trainer = guarded(tmp_path / "b", "rollback")
    poison(trainer, factor)
    trainer.train()
    assert equal(weights(reference), weights(trainer)) and trainer.state.global_step == STEPS
    assert [row["step"] for row in trainer.state.log_history if "loss" in row] == [4, 8, 12]
    out = capsys.readouterr().out
    assert f"back to checkpoint-8, batch {BAD} is left out (1 of 3)" in out
    assert json.loads((tmp_path / "b/left_out_batches.json").read_text()) == [BAD]


def test_without_the_guard_the_spike_goes_in(tmp_path):
    """The two tests above can fail: the same spike changes the weights when nothing watches."""
    clean, spiked = guarded(tmp_path / "a", "none"), guarded(tmp_path / "b", "none")
    poison(spiked, 1000.0)
    clean.train(), spiked.train()
    assert not equal(weights(clean), weights(spiked))


def test_warn_says_and_goes_on(tmp_path, capsys):
    plain, trainer = guarded(tmp_path / "a", "none"), guarded(tmp_path / "b", "warn")
    for each in (plain, trainer):
        poison(each, 1000.0)
        each.train()
    assert equal(weights(plain), weights(trainer))
    out = capsys.readouterr().out
    assert out.count("update made all the same") == 1 and f"step {BAD + 1}: loss" in out and "grad_norm" in out


def test_warn_still_stops_at_nan(tmp_path):
    trainer = guarded(tmp_path, "warn")
    poison(trainer, float("nan"))
    with pytest.raises(Diverged, match=f"step {BAD + 1}: the loss is not finite; stopped before the update"):
        trainer.train()


def test_the_update_is_left_out_though_the_host_learns_late(tmp_path):
    """Logging every 100 steps: the weights at the stop are those of before the bad step, six steps ago."""
    reference = guarded(tmp_path / "a", "none", max_steps=STEPS, logging_steps=100, save_strategy="no")
    before = {}

    class Keep(TrainerCallback):
        def on_step_begin(self, args, state, control, **kwargs):
            if state.global_step == BAD:
                before.update(weights(trainer))

    reference.train()
    trainer = guarded(tmp_path / "b", "none", logging_steps=100, save_strategy="no")
    poison(trainer, float("nan"))
    trainer.add_callback(Keep())
    with pytest.raises(Diverged, match=f"step {BAD + 1}: ") as stop:
        trainer.train()
    assert trainer.state.global_step == STEPS and equal(before, weights(trainer))
    order = [trainer.examples.window(p) for p in trainer.batches.positions(BAD)[1]]
    assert f"Training windows: {', '.join(map(str, order))}." in str(stop.value)


def test_max_rollbacks(tmp_path):
    trainer = guarded(tmp_path, "rollback", max_rollbacks=2)
    for step in (BAD, BAD + 1, BAD + 2):
        poison(trainer, float("nan"), step=step)
    with pytest.raises(Diverged, match="after 2 rollbacks: stopped before the update"):
        trainer.train()
    assert trainer.batches.left_out == [BAD, BAD + 1]
    newest = checkpoints(tmp_path)[0]
    assert newest.name == "checkpoint-8" and all(
        t.isfinite().all() for t in load_file(newest / "model.safetensors").values()
    )


def test_rollback_without_a_checkpoint(tmp_path):
    trainer = guarded(tmp_path, "rollback", save_steps=12)
    poison(trainer, float("nan"))
    with pytest.raises(Diverged, match="there is no checkpoint to go back to"):
        trainer.train()


def test_skipping_for_ever_is_an_error(tmp_path):
    trainer = guarded(tmp_path, "skip", max_steps=30, logging_steps=1)
    for step in range(BAD, 30):
        poison(trainer, float("nan"), step=step)
    with pytest.raises(Diverged, match="the last 6 updates were all skipped"):
        trainer.train()
    assert trainer.state.global_step == BAD + 6


def test_a_spike_does_not_raise_the_limit(tmp_path, capsys):
    """Two spikes in a row are both found: the first takes no part in the statistics."""
    trainer = guarded(tmp_path, "skip")
    for step in (BAD, BAD + 1):
        poison(trainer, 50.0, step=step)
    trainer.train()
    assert capsys.readouterr().out.count("update skipped") == 2


def test_limits_by_hand(tmp_path):
    """Mean and deviation are those of the last `window` losses and norms, as numpy has them."""
    trainer = guarded(tmp_path, "warn", logging_steps=1, save_strategy="no", max_grad_norm=1e9)
    seen = []
    describe = trainer.watch._describe
    trainer.watch._describe = lambda values, limits: seen.append((values, limits)) or describe(values, limits)
    poison(trainer, 1000.0)
    trainer.train()
    rows = [row for row in trainer.state.log_history if "loss" in row][BAD - 6 : BAD]
    (values, (mean, std)), history = seen[0], np.array([[row["loss"], row["grad_norm"]] for row in rows])
    assert np.allclose(mean, history.mean(0), rtol=1e-5) and np.allclose(std, history.std(0, ddof=1), rtol=1e-4)
    assert values[0] > mean[0] + 6 * std[0]


def test_a_new_level_is_no_spike_for_ever(tmp_path):
    """With warn the update is made, so it counts: after a window at the new level nothing is said any more."""
    watch = guarded(tmp_path, "warn").watch
    noise, said = np.random.default_rng(0).normal(1.0, 0.05, 60), []
    for step, value in enumerate(noise + (np.arange(60) >= 30)):
        values = torch.tensor([value, 1.0])
        said += [step] if watch._is_spike(values) else []
        watch._remember(values, torch.tensor(False))
    assert said[0] == 30 and said[-1] < 36


def test_resume_remembers_the_window(tmp_path, capsys):
    """Stopped after step 8 and resumed, the guard judges step 10 by the steps before the stop."""
    straight = guarded(tmp_path / "a", "skip")
    poison(straight, 1000.0)
    straight.train()
    first = guarded(tmp_path / "b", "skip")
    first.add_callback(type("Stop", (TrainerCallback,), {"on_step_end": lambda self, a, s, c, **k: setattr(c, "should_training_stop", s.global_step == 8)})())  # fmt: skip
    first.train()
    second = guarded(tmp_path / "b", "skip")
    poison(second, 1000.0)
    capsys.readouterr()
    second.train(resume_from_checkpoint=str(tmp_path / "b/checkpoint-8"))
    assert f"step {BAD + 1}: loss" in capsys.readouterr().out
    assert equal(weights(straight), weights(second)) and second.watch.skipped == [BAD + 1]


@pytest.mark.parametrize(
    ("guard", "keys", "strategy", "message"),
    [
        (SpikeGuard(action="skip"), {"fp16": True}, "DDP", "fp16's loss scaling skips steps itself"),
        (SpikeGuard(action="skip"), {}, "DeepSpeed ZeRO-2", "needs unsharded weights, not DeepSpeed ZeRO-2"),
        (SpikeGuard(action="rollback"), {}, "FSDP2", "needs unsharded weights, not FSDP2"),
        (SpikeGuard(action="rollback"), {"streaming": True}, "DDP", "a stream cannot leave a batch out"),
        (SpikeGuard(action="rollback"), {"save_strategy": "no"}, "DDP", "goes back to a checkpoint"),
        (SpikeGuard(window=1), {}, "DDP", "window must be at least 2"),
        (SpikeGuard(action="warn"), {}, "DeepSpeed ZeRO-3", None),
        (None, {}, "DDP", None),
    ],
)
def test_guards_that_cannot_act(guard, keys, strategy, message):
    args = Args()
    args.fp16, args.save_strategy = keys.get("fp16", False), keys.get("save_strategy", "steps")
    problems = spike_guard_problems(guard, args, strategy, keys.get("streaming", False))
    assert [message in p for p in problems] == ([True] if message else [])


def test_rollback_in_a_run(tiny):
    """The recipe: a batch whose loss is 1000 times too large is found, undone and left out; the run ends well."""
    guard = {"window": 4, "z": 6, "action": "rollback"}
    config = tiny(max_steps=40, save_steps=4, eval_fraction=0, spike_guard=guard)
    done = run("--config", config, fault="poison_window:17:2")
    assert done.code == 0, done.err
    left_out = json.loads(Path("out/left_out_batches.json").read_text())
    assert json.loads(Path("out/metrics.json").read_text())["batches_left_out"] == len(left_out)
    assert len(left_out) == done.out.count("is left out") >= 1
    assert json.loads(Path("out/metrics.json").read_text())["steps"] == 40


@pytest.mark.parametrize("action", ["skip", "rollback"])
def test_nan_on_one_rank(tiny, action):
    """Two DDP processes, the fault on rank 1 alone: both act at the same step, and the run ends."""
    guard = {"window": 4, "z": 6, "action": action}
    config = tiny(
        global_batch_size=4,
        per_device_train_batch_size=2,
        max_steps=10,
        save_steps=2,
        spike_guard=guard,
        eval_fraction=0,
    )
    done = launch("ddp", "--config", config, fault="poison_step:6", rank=1)
    assert done.code == 0, done.err
    assert "step 6: not finite; " + ("update skipped" if action == "skip" else "back to checkpoint-") in done.out
    assert json.loads(Path("out/metrics.json").read_text())["steps"] == 10
