"""Real launches on two CPU processes: the same optimisation as one process, and the same care."""

import json
import signal
from pathlib import Path

import pytest
from safetensors.torch import load_file

from llm_recipes.checkpoints import checkpoints, damage
from tests.running import TINY_MODEL, curve, difference, launch, run

KEYS = {
    "eval_fraction": 0.7,  # so little to train on that the second epoch begins within the run
    "global_batch_size": 8, "max_steps": 8, "save_steps": 4, "per_device_train_batch_size": 2, "lr_scheduler_type": "cosine",
    "model_config": TINY_MODEL | {"tie_word_embeddings": True}, "batch_size_ramp": {"start": 4, "steps": 2},
}  # fmt: skip
BERT = TINY_MODEL | {"model_type": "bert", "hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
T5 = {"model_type": "t5", "d_model": 32, "d_kv": 16, "d_ff": 64, "num_layers": 2, "num_heads": 2, "dropout_rate": 0.0}


@pytest.mark.parametrize(
    ("config", "fault", "shards"),
    [("ddp", "", "DDP"), ("zero2", "", "ZeRO-2"), ("zero3", "", "ZeRO-3"), ("fsdp2", "fsdp_on_cpu", "FSDP2")],
)
def test_two_processes_learn_what_one_learns(tiny, config, fault, shards):
    """Loss and gradient norm of every step within 2e-5, final weights within 1e-4, in fp32; sums in another order."""
    two = compare_one_and_two(tiny(**KEYS, output_dir="one"), config, fault)
    assert (
        f"{shards}, 2 processes, cpu, fp32" in two.out and "8 sequences = 2 processes x 2 x 2 accumulation" in two.out
    )


@pytest.mark.parametrize(
    ("config", "objective", "model"),
    [("ddp", "masked", BERT), ("zero3", "span_corruption", T5), ("zero2", "prefix", TINY_MODEL)],
)
def test_two_processes_learn_every_objective(tiny, config, objective, model):
    """The library multiplies the losses of BERT and T5 by processes and accumulation; prefixes differ in their targets."""
    keys = {"objective": objective, "model_config": model, "eval_fraction": 0.2}
    compare_one_and_two(tiny(**KEYS | keys, output_dir="one"), config)


def compare_one_and_two(path, config, fault=""):
    """Trains with one process and with two, and holds the second to the first; returns the second's result."""
    one = run("--config", path, "--output_dir", "one")
    assert one.code == 0, one.err
    two = launch(config, "--config", path, "--output_dir", "two", fault=fault)
    assert two.code == 0, two.err[-3000:]
    worst = max(abs(x - y) for a, b in zip(curve("one"), curve("two"), strict=True) for x, y in zip(a, b, strict=True))
    assert worst < 2e-5 and difference("one", "two") < 1e-4
    first, second = (json.loads(Path(f, "metrics.json").read_text()) for f in ("one", "two"))
    assert first["eval_loss"] == pytest.approx(second["eval_loss"], abs=2e-5) and first["tokens"] == second["tokens"]
    assert all(damage(p) is None for p in checkpoints("two"))
    return two


@pytest.mark.parametrize("config", ["ddp", "zero3"])
def test_signal_to_one_rank_stops_all_and_resumes_exactly(tiny, config):
    path = tiny(**KEYS, output_dir="straight")
    assert launch(config, "--config", path).code == 0
    stopped = launch(
        config, "--config", path, "--output_dir", "parts", fault=f"send_signal:5:{signal.SIGTERM.value}", rank=1
    )
    assert stopped.code != 0 and "the same command continues from there" in stopped.err
    assert [p.name for p in checkpoints("parts")] == ["checkpoint-5", "checkpoint-4"] and damage(
        checkpoints("parts")[0]
    ) is None
    again = launch(config, "--config", path, "--output_dir", "parts")
    assert again.code == 0, again.err[-3000:]
    assert curve("parts") == curve("straight") and difference("parts", "straight") == 0


@pytest.mark.parametrize("config", ["ddp", "zero2", "zero3"])
def test_non_finite_loss_stops_before_the_update(tiny, config):
    """DeepSpeed would go on: ZeRO-2 with nan weights, ZeRO-3 by dropping the step in silence."""
    done = launch(config, "--config", tiny(**KEYS | {"max_steps": 40, "save_steps": 1}), fault="poison_window:17")
    assert done.code != 0 and "the loss is not finite; stopped before the update" in done.err
    said = done.err.split("stopped before the update. Training windows: ")[1].split(".")[0]
    assert "17" in said.split(", ") and len(said.split(", ")) <= 2  # the micro-batch that had it, on whichever rank
    step = int(done.err.split(": the loss is not finite")[0].split("step ")[-1])
    newest = checkpoints("out")
    assert [int(p.name[11:]) for p in newest] == list(range(step - 1, 0, -1))
    assert newest or step == 1
    if newest:
        assert all(t.isfinite().all() for t in load_file(newest[0] / "model.safetensors").values())


def test_fsdp_on_cpu_is_refused(tiny):
    done = launch("fsdp2", "--config", tiny(**KEYS))
    assert done.code != 0 and "FSDP needs GPUs: without them Accelerate runs plain DDP and says nothing" in done.err
    assert not Path("out").exists()
