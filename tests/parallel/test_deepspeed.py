"""DeepSpeed's stages and offload on CPU processes: what one process learns, resumed on any number of them."""

import inspect
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from deepspeed.runtime.zero.stage3 import DeepSpeedZeroOptimizer_Stage3

from llm_recipes import universal
from llm_recipes.checkpoints import checkpoints, commit, damage, find_checkpoint
from llm_recipes.errors import UserError
from tests.running import PRETRAIN, curve, difference, launch, run

FULL = pytest.mark.skipif(not os.environ.get("LLM_RECIPES_FULL"), reason="the full matrix: LLM_RECIPES_FULL=1")
KEYS = {
    "global_batch_size": 8, "per_device_train_batch_size": 2, "max_steps": 12, "save_steps": 12, "learning_rate": 1e-3,
    "lr_scheduler_type": "cosine", "weight_decay": 0.1,  # so that the two parameter groups differ
}  # fmt: skip


def check_equals_one_process(config: Path, folder: str) -> None:
    """Loss of every step within 2e-6 of a run on one process in fp32, final weights within 2e-5."""
    one = run("--config", config, "--output_dir", "one")
    assert one.code == 0, one.err
    worst = max(abs(a - b) for (a, _), (b, _) in zip(curve("one"), curve(folder), strict=True))
    assert worst <= 2e-6 and difference("one", folder) <= 2e-5, (worst, difference("one", folder))


def train_in_parts(strategy: str, config: Path, *sizes: int) -> list[str]:
    """Trains into `parts`, interrupted after each equal share of the steps; returns what each part printed."""
    said = []
    for part, processes in enumerate(sizes, start=1):
        stop = "" if part == len(sizes) else f"send_signal:{12 * part // len(sizes)}:{signal.SIGTERM.value}"
        argv = ["--config", config, "--output_dir", "parts"]
        done = launch(strategy, *argv, fault=stop, rank=0, processes=processes, timeout=600)
        assert (done.code == 0) == (not stop), done.err[-3000:]
        newest = checkpoints("parts")[0]
        assert newest.name == f"checkpoint-{12 * part // len(sizes)}" and damage(newest) is None
        leave_half_a_conversion(newest)
        said.append(done.out)
    return said


def leave_half_a_conversion(folder: Path) -> None:
    """What a kill during a conversion leaves, or worse: it names itself finished and cannot be read."""
    (folder / "universal/tmp").mkdir(parents=True)
    (folder / "universal/tmp/fp32.00").write_bytes(b"half")
    (folder / "latest_universal").write_text("universal")


@pytest.mark.parametrize(
    ("strategy", "sizes"),
    [
        ("zero2", (2, 4, 2)), ("zero3", (2, 4, 2)),
        *(pytest.param(*case, marks=FULL) for case in (
            ("zero1", (2, 1, 4)), ("zero2", (1, 2)), ("zero2", (2, 1)), ("zero3", (1, 2)), ("zero3", (2, 1)),
            ("zero2", (4, 3)), ("zero2_offload", (2, 4)), ("zero3_offload", (4, 2)),
        )),
    ],
)  # fmt: skip
def test_any_number_of_processes_continues(tiny, strategy, sizes):
    """The same curve as one process that was never stopped, and nothing is left of the conversion."""
    config = tiny(**KEYS | {"global_batch_size": 24 if 3 in sizes else 8})
    said = train_in_parts(strategy, config, *sizes)
    places = [f"parts/checkpoint-{12 * part // len(sizes)}" for part in range(1, len(sizes))]
    for place, out, before, after in zip(places, said[1:], sizes, sizes[1:], strict=False):
        assert f"{place} was written with --num_processes {before}: converting it for {after}\n" in out
        assert not Path(place, "universal").exists() and not Path(place, "latest_universal").exists()
    check_equals_one_process(config, "parts")


@pytest.mark.parametrize("strategy", ["zero1", "zero3_offload", pytest.param("zero2_offload", marks=FULL)])
def test_stage_and_offload_learn_what_one_process_learns(tiny, strategy):
    """DeepSpeed compiles its Adam for the CPU at the first use; that takes minutes."""
    config = tiny(**KEYS)
    done = launch(strategy, "--config", config, "--output_dir", "two", timeout=900)
    assert done.code == 0, done.err[-3000:]
    check_equals_one_process(config, "two")


@FULL
@pytest.mark.parametrize("strategy", ["zero1", "zero2", "zero2_offload", "zero3_offload"])
def test_the_same_number_continues_to_the_bit(tiny, strategy):
    """ZeRO-3 is in test_distributed.py."""
    config = tiny(**KEYS)
    done = launch(strategy, "--config", config, "--output_dir", "straight", timeout=600)
    assert done.code == 0, done.err[-3000:]
    assert "converting" not in "".join(train_in_parts(strategy, config, 2, 2))
    assert curve("parts") == curve("straight") and difference("parts", "straight") == 0


def test_another_stage_or_optimizer_is_refused(tmp_path, monkeypatch):
    """DeepSpeed's Adam for the CPU and torch's stop on each other's state in the first step."""
    (tmp_path / "checkpoint-3").mkdir()
    args = SimpleNamespace(output_dir=tmp_path, process_index=0, world_size=1)
    monkeypatch.setenv("ACCELERATE_USE_DEEPSPEED", "true")
    commit(tmp_path / "checkpoint-3", format="DeepSpeed ZeRO-2")
    for stage, device, now in (
        ("3", "none", "DeepSpeed ZeRO-3"),
        ("2", "cpu", "DeepSpeed ZeRO-2 with the optimizer in host memory"),
    ):
        monkeypatch.setenv("ACCELERATE_DEEPSPEED_ZERO_STAGE", stage)
        monkeypatch.setenv("ACCELERATE_DEEPSPEED_OFFLOAD_OPTIMIZER_DEVICE", device)
        with pytest.raises(UserError, match=f"under DeepSpeed ZeRO-2 and cannot be continued under {now}$"):
            find_checkpoint(args, "auto")


def test_failed_conversion_says_what_to_do(tmp_path):
    shards = tmp_path / "global_step3"
    shards.mkdir()
    torch.save({"optimizer_state_dict": {"zero_stage": 2}}, shards / "zero_pp_rank_0_mp_rank_00_optim_states.pt")
    with pytest.raises(UserError, match=r"could not be converted for 4 processes: .+; launch with --num_processes 2$"):
        universal.convert(tmp_path, shards, 2, 4)
    assert [path.name for path in tmp_path.iterdir()] == ["global_step3"]


def test_the_loader_that_is_mended_still_needs_it():
    """Loss differed by 5e-4 five steps after a resume without `mend`. When this fails, take `mend` away."""
    source = inspect.getsource(DeepSpeedZeroOptimizer_Stage3.load_hp_checkpoint_state_from_checkpoint_dir_stage3)
    assert "self.optimizer.state[fp32_param]['step'] = state_step" in source
    assert 'optim_sd[OPTIMIZER_STATE_DICT]["param_groups"][0].items()' in source


def test_mended_weights_have_steps_and_options_of_their_own(tmp_path):
    """From the state that the loader leaves: one `step` for two weights, the first group's weight decay for both."""
    weights, step = [torch.nn.Parameter(torch.ones(2)) for _ in range(2)], torch.tensor(3.0)
    optimizer = torch.optim.AdamW([{"params": [weight], "weight_decay": 0.1} for weight in weights])
    for weight in weights:
        optimizer.state[weight] = {"step": step, "exp_avg": torch.zeros(2), "exp_avg_sq": torch.zeros(2)}
        weight.grad = torch.ones(2)
    saved = [{"params": [], "weight_decay": decay, "lr": 0.5} for decay in (0.1, 0.0)]
    (tmp_path / "zero").mkdir()
    torch.save({"param_groups": saved}, tmp_path / "zero/optimizer_state.pt")
    universal.mend(optimizer, tmp_path)
    optimizer.step()
    assert [optimizer.state[weight]["step"].item() for weight in weights] == [4.0, 4.0]
    assert [(group["weight_decay"], group["lr"]) for group in optimizer.param_groups] == [(0.1, 0.5), (0.0, 0.5)]
    assert [group["params"] for group in optimizer.param_groups] == [[weight] for weight in weights]


def test_lock_of_a_killed_build(tmp_path, monkeypatch, tiny):
    """A live builder is waited for, a dead one's lock stops the run with a sentence, and is removed when it is old."""
    lock = tmp_path / "ops/py311_cpu/deepspeed_shm_comm/lock"
    lock.parent.mkdir(parents=True)
    config, env = tiny(), {"ACCELERATE_USE_DEEPSPEED": "true", "TORCH_EXTENSIONS_DIR": str(tmp_path / "ops")}
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", env["TORCH_EXTENSIONS_DIR"])
    code = (
        "import sys, time; from torch.utils.file_baton import FileBaton; baton = FileBaton(sys.argv[1]); "
        "print(baton.try_acquire(), flush=True); time.sleep(600)"
    )
    builder = subprocess.Popen([sys.executable, "-c", code, lock], stdout=subprocess.PIPE, text=True)
    try:
        assert builder.stdout.readline() == "True\n"
        from llm_recipes import launch as launching

        monkeypatch.setenv("ACCELERATE_USE_DEEPSPEED", "true")
        assert launching.check_launch() == [] and lock.exists()
    finally:
        builder.kill()
        builder.wait()
    started = time.monotonic()
    done = run("--config", config, script=PRETRAIN, env=env)
    assert done.code == 2 and f"{lock} is left by a build that was killed, unless" in done.err and lock.exists()
    assert "Traceback" not in done.err and not Path("out").exists() and time.monotonic() - started < 120
    os.utime(lock, (time.time() - 7200,) * 2)
    assert launching.check_launch() == [] and not lock.exists()
