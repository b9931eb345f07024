"""Stopping, damage and resuming, each through the real recipe in its own process."""

import hashlib
import json
import shutil
import signal
import subprocess
from pathlib import Path

import numpy as np
import pytest
import torch
from datasets import Dataset
from safetensors.torch import load_file

from llm_recipes.checkpoints import MANIFEST, checkpoints, commit, damage
from llm_recipes.stability import find_rows
from tests.running import TINY_MODEL, run

DROPOUT = TINY_MODEL | {"attention_dropout": 0.2}


def digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def state(folder: Path) -> list[str]:
    """Weights, optimizer, scheduler and RNG of a checkpoint, comparable to the bit."""
    optimizer = torch.load(folder / "optimizer.pt", weights_only=True)
    moments = [v.numpy().tobytes() for _, s in sorted(optimizer["state"].items()) for v in s.values()]
    parts = [digest(folder / "model.safetensors"), *(hashlib.sha256(m).hexdigest() for m in moments)]
    return [*parts, digest(folder / "scheduler.pt"), digest(folder / "rng_state.pth")]


def losses(folder: Path) -> list[float]:
    return [
        row["loss"] for row in json.loads((folder / "trainer_state.json").read_text())["log_history"] if "loss" in row
    ]


@pytest.fixture(scope="module")
def straight(tmp_path_factory):
    """40 steps in one go, with dropout and accumulation over 2 micro-batches, across an epoch border."""
    from tests.running import write_config

    folder = tmp_path_factory.mktemp("straight")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        path = write_config(folder, **KEYS)
        done = run("--config", path)
    assert done.code == 0, done.err
    assert json.loads((folder / "out/checkpoint-40/trainer_state.json").read_text())["epoch"] > 1
    return folder / "out"


KEYS = {
    "model_config": DROPOUT, "max_steps": 40, "save_steps": 10, "save_total_limit": 2, "per_device_train_batch_size": 2,
    "global_batch_size": 4, "lr_scheduler_type": "cosine", "warmup_steps": 5, "eval_strategy": "steps", "eval_steps": 7,
    "eval_fraction": 0.4,
}  # fmt: skip


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_stop_and_resume_equals_straight_to_the_bit(tiny, straight, tmp_path, number):
    config = tiny(**KEYS)
    stopped = run("--config", config, fault=f"send_signal:20:{number.value}")
    assert stopped.code == 75 and f"{number.name}: saved" in stopped.err and "the same command continues" in stopped.err
    assert "Traceback" not in stopped.err
    assert checkpoints("out")[0].name == "checkpoint-20" and not Path("out/metrics.json").exists()
    done = run("--config", config)
    assert done.code == 0, done.err
    assert state(Path("out/checkpoint-40")) == state(straight / "checkpoint-40")
    assert losses(Path("out/checkpoint-40")) == losses(straight / "checkpoint-40")
    assert digest(Path("out/model.safetensors")) == digest(straight / "model.safetensors")


def test_stop_between_saves_keeps_every_step(tiny, straight):
    config = tiny(**KEYS)
    assert run("--config", config, fault=f"send_signal:23:{signal.SIGTERM.value}").code == 75
    assert [p.name for p in checkpoints("out")] == ["checkpoint-23", "checkpoint-20"]
    assert run("--config", config).code == 0
    assert state(Path("out/checkpoint-40")) == state(straight / "checkpoint-40")


@pytest.mark.parametrize("write", [1, 2, 4, 6, 9])
def test_kill_during_a_save(tiny, straight, write):
    """SIGKILL at a file of the second checkpoint: resume takes the first one, and nothing else is different."""
    config = tiny(**KEYS)
    killed = run("--config", config, fault=f"kill_in_save:2:{write}")
    assert killed.code == -signal.SIGKILL
    assert (
        damage(Path("out/checkpoint-10")) is None and damage(Path("out/checkpoint-20")) == "its save was not finished"
    )
    done = run("--config", config)
    assert done.code == 0, done.err
    assert "checkpoint-20: its save was not finished; renamed to broken-checkpoint-20" in done.out
    assert state(Path("out/checkpoint-40")) == state(straight / "checkpoint-40")


DAMAGES = {
    "optimizer missing": lambda f: (f / "optimizer.pt").unlink(),
    "scheduler missing": lambda f: (f / "scheduler.pt").unlink(),
    "rng missing": lambda f: (f / "rng_state.pth").unlink(),
    "state missing": lambda f: (f / "trainer_state.json").unlink(),
    "weights missing": lambda f: (f / "model.safetensors").unlink(),
    "weights flipped": lambda f: flip(f / "model.safetensors"),
    "optimizer flipped": lambda f: flip(f / "optimizer.pt"),
    "weights tail zeroed": lambda f: zero_tail(f / "model.safetensors"),
    "optimizer truncated": lambda f: (f / "optimizer.pt").write_bytes((f / "optimizer.pt").read_bytes()[:100]),
    "manifest empty": lambda f: (f / MANIFEST).write_text(""),
    "manifest missing": lambda f: (f / MANIFEST).unlink(),
    "all files empty": lambda f: [p.write_text("") for p in f.iterdir() if p.is_file()],
}


def flip(path):
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def zero_tail(path):
    data = path.read_bytes()
    path.write_bytes(data[:-512] + bytes(512))


@pytest.mark.parametrize("how", DAMAGES)
def test_every_damage_is_noticed(straight, tmp_path, how):
    copy = shutil.copytree(straight / "checkpoint-40", tmp_path / "checkpoint-40")
    assert damage(copy) is None
    DAMAGES[how](copy)
    assert damage(copy) is not None


@pytest.mark.parametrize("how", ["optimizer missing", "weights flipped"])
def test_resume_falls_back_to_the_last_good_checkpoint(tiny, straight, how):
    config = tiny(**KEYS)
    assert run("--config", config, fault=f"send_signal:20:{signal.SIGTERM.value}").code == 75
    DAMAGES[how](Path("out/checkpoint-20"))
    done = run("--config", config)
    assert done.code == 0 and "renamed to broken-checkpoint-20" in done.out
    assert state(Path("out/checkpoint-40")) == state(straight / "checkpoint-40")


def test_resume_from_a_path_leaves_the_newer_timeline_behind(tiny, straight):
    config = tiny(**KEYS | {"save_total_limit": None})
    assert run("--config", config, fault=f"send_signal:25:{signal.SIGTERM.value}").code == 75
    done = run("--config", config, "--resume", "out/checkpoint-10")
    assert done.code == 0, done.err
    assert {"abandoned-checkpoint-20", "abandoned-checkpoint-25"} <= {p.name for p in Path("out").iterdir()}
    assert state(Path("out/checkpoint-40")) == state(straight / "checkpoint-40")
    shutil.rmtree("out")
    for resume, message in (
        ("out/checkpoint-10", "resume: out/checkpoint-10 does not exist"),
        ("elsewhere/checkpoint-10", "is not in output_dir"),
    ):
        done = run("--config", config, "--resume", resume)
        assert done.code == 2 and message in done.err


def test_resume_never_does_not_mix_two_runs(tiny):
    config = tiny(max_steps=8)
    assert run("--config", config, fault=f"send_signal:3:{signal.SIGTERM.value}").code == 75
    done = run("--config", config, "--resume", "never")
    assert done.code == 2 and "holds checkpoints of an earlier run" in done.err


def test_stop_at_the_last_step_finishes_without_another_step(tiny, straight):
    config = tiny(**KEYS)
    assert run("--config", config, fault=f"send_signal:40:{signal.SIGTERM.value}").code == 75
    done = run("--config", config)
    assert done.code == 0, done.err
    assert digest(Path("out/model.safetensors")) == digest(straight / "model.safetensors")
    assert json.loads(Path("out/metrics.json").read_text())["steps"] == 40


def test_finished_run_is_left_alone(tiny):
    config = tiny()
    assert run("--config", config).code == 0
    before = digest(Path("out/model.safetensors"))
    again = run("--config", config)
    assert again.code == 0 and "this run is finished" in again.err and digest(Path("out/model.safetensors")) == before


@pytest.mark.parametrize(
    ("argv", "changed"),
    [
        (["--learning_rate", "1e-3"], "learning_rate: 0.01 -> 0.001"),
        (["--seed", "1"], "seed: default -> 1"),
        (["--max_steps", "9"], "max_steps: 8 -> 9"),
        (["--global_batch_size", "8"], "global_batch_size: 4 -> 8"),
        (["--datasets", "[{path: other.jsonl}]"], "datasets: "),
    ],
)
def test_another_run_does_not_take_the_folder(tiny, argv, changed):
    from tests.running import write_texts

    config = tiny(max_steps=8)
    write_texts(Path("other.jsonl"), seed=9)
    assert run("--config", config, fault=f"send_signal:3:{signal.SIGTERM.value}").code == 75
    before = {p: digest(p) for p in Path("out").rglob("*") if p.is_file()}
    done = run("--config", config, *argv)
    assert done.code == 2 and f"holds another run ({changed}" in done.err, done.err
    assert {p: digest(p) for p in Path("out").rglob("*") if p.is_file()} == before


def test_data_changed_under_the_same_path_is_another_run(tiny):
    from tests.running import write_texts

    config = tiny(max_steps=8)
    assert run("--config", config, fault=f"send_signal:3:{signal.SIGTERM.value}").code == 75
    write_texts(Path("texts.jsonl"), seed=9)
    done = run("--config", config)
    assert done.code == 2 and "holds another run (data: " in done.err


def test_keys_that_change_nothing_learnt_may_change(tiny):
    config = tiny(**KEYS)
    assert run("--config", config, fault=f"send_signal:20:{signal.SIGTERM.value}").code == 75
    done = run("--config", config, "--logging_steps", "5", "--save_steps", "20", "--per_device_train_batch_size", "4")
    assert done.code == 0, done.err
    assert [p.name for p in checkpoints("out")] == ["checkpoint-40", "checkpoint-20"]
    assert "step     25/40" in done.out and "step     26/40" not in done.out


@pytest.mark.parametrize("inf", [0, 1])
def test_non_finite_loss_stops_before_the_update(tiny, inf):
    config = tiny(max_steps=40, save_steps=2, eval_fraction=0)
    done = run("--config", config, fault=f"poison_window:17:{inf}")
    assert done.code == 4, done.err
    message = done.err.strip().splitlines()[-1]
    assert "the loss is not finite; stopped before the update" in message
    windows = [int(i) for i in message.split("Training windows: ")[1].split(".")[0].split(", ")]
    assert 17 in windows and len(windows) <= 4
    step = int(message.split("step ")[1].split(":")[0])
    newest = checkpoints("out")[0] if checkpoints("out") else None
    if step > 2:
        assert int(newest.name[11:]) < step and all(
            t.isfinite().all() for t in load_file(newest / "model.safetensors").values()
        )
    assert not Path("out/model.safetensors").exists()


def test_weights_are_untouched_by_the_step_that_is_not_finite(tiny):
    """The gradient of the bad step never reaches the optimizer: the weights are those of the step before.

    With any Trainer, here without `train_on`.
    """
    from transformers import AutoConfig, AutoModelForCausalLM, Trainer, TrainingArguments, default_data_collator

    from llm_recipes.checkpoints import protect
    from llm_recipes.errors import Diverged

    keys = dict(TINY_MODEL)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(keys.pop("model_type"), vocab_size=50, **keys))
    ids = np.random.default_rng(0).integers(0, 50, (8, 16)).tolist()
    windows = Dataset.from_dict({"input_ids": ids, "labels": ids})
    args = TrainingArguments(
        "out", use_cpu=True, max_steps=4, per_device_train_batch_size=2, report_to="none", save_strategy="no"
    )
    trainer = Trainer(model, args, default_data_collator, windows)
    protect(trainer)
    before, weight = [], model.lm_head.weight

    def third_gradient_is_nan(grad):
        before.append({name: p.detach().clone() for name, p in model.named_parameters()})
        return grad * float("nan") if len(before) == 3 else grad

    weight.register_hook(third_gradient_is_nan)
    with pytest.raises(Diverged, match="step 3: the gradient norm is not finite") as stop:
        trainer.train()
    assert all(torch.equal(p, before[2][name]) for name, p in model.named_parameters())
    assert not torch.equal(before[1]["lm_head.weight"], before[2]["lm_head.weight"])
    assert len(str(stop.value).split("windows: ")[1].split(".")[0].split(", ")) == 2


def test_find_rows():
    windows = Dataset.from_dict({"input_ids": [[1, 2], [3, 4], [1, 2], [5, 6]]})
    assert find_rows([np.array([1, 2]), np.array([5, 6])], windows) == [0, 2, 3]


def test_disk_that_fills_up_loses_nothing(tiny, straight):
    config = tiny(**KEYS)
    done = run("--config", config, fault="limit_file_size:20")
    assert done.code == 2, done.err
    assert "checkpoint-10 could not be written" in done.err and "Traceback" not in done.err
    assert not Path("out/checkpoint-10").exists()
    done = run("--config", config)
    assert done.code == 0, done.err
    assert state(Path("out/checkpoint-40")) == state(straight / "checkpoint-40")


def test_full_disk_is_seen_before_the_save(tiny, tmp_path):
    small = tmp_path / "small"
    small.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=2m", "none", small], capture_output=True).returncode:
        pytest.skip("needs the right to mount a small tmpfs")
    try:
        config = tiny(output_dir=str(small / "out"), max_steps=40, save_steps=4, save_total_limit=None)
        done = run("--config", config, "--dry_run")
        assert done.code == 2 and "this run needs about" in done.err and "are free in" in done.err
    finally:
        subprocess.run(["umount", small], check=True)


def test_two_runs_do_not_share_a_folder(tiny):
    import fcntl

    config = tiny()
    Path("out").mkdir()
    with open("out/.lock", "w") as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        done = run("--config", config)
    assert done.code == 2 and "is in use by another run" in done.err
    assert [p.name for p in Path("out").iterdir()] == [".lock"]


def test_run_yaml_that_is_damaged_is_said(tiny):
    config = tiny(max_steps=8)
    assert run("--config", config, fault=f"send_signal:3:{signal.SIGTERM.value}").code == 75
    Path("out/run.yaml").write_text("")
    done = run("--config", config)
    assert done.code == 2 and "run.yaml is damaged" in done.err


def test_a_start_that_failed_does_not_keep_the_folder(tiny):
    assert run("--config", tiny(max_steps=8), fault="kill_in_save:1:1").code == -signal.SIGKILL
    shutil.rmtree("out/checkpoint-2")
    assert run("--config", tiny(max_steps=4)).code == 0


def test_manifest_covers_every_file(tmp_path):
    folder = tmp_path / "checkpoint-1"
    (folder / "sub").mkdir(parents=True)
    (folder / "a.bin").write_bytes(b"12345")
    (folder / "sub/b.bin").write_bytes(b"")
    commit(folder, step=1)
    manifest = json.loads((folder / MANIFEST).read_text())
    assert {k: v[0] for k, v in manifest["files"].items()} == {"a.bin": 5, "sub/b.bin": 0} and manifest["step"] == 1
    assert damage(folder) is None and not list(folder.glob("*.partial"))
