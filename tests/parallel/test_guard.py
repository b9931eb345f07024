"""What Accelerate, the Trainer and DeepSpeed turn into something else without a word stops the run with a sentence.

The ten of docs/parallelism.md: 1 to 4, 7 and 8 are here; 5 and 6 in test_fsdp.py, 9 in test_layouts.py, 10 in test_deepspeed.py.
"""

from pathlib import Path

import pytest
import yaml

from llm_recipes import guard
from llm_recipes.errors import UserError
from llm_recipes.launch import Layout
from tests.running import ROOT, launch

CASES = {
    "1 a YAML that starts one process": (
        "ddp", {"distributed_type": "MULTI_CPU"}, [], "", "MULTI_CPU starts one process",
    ),
    "2 trainings side by side": (
        "ddp", {}, ["--use_cpu", "false"], "", "asked for DDP on 2 processes, but single process on",
    ),
    "3 FSDP becomes DDP": ("fsdp2", {}, [], "", "FSDP needs GPUs"),
    "3 FSDP becomes DDP, seen late": ("fsdp2", {}, [], "no_launch_check", "asked for FSDP2 on 2 processes, but DDP on 2"),
    "4 tensor parallel is skipped": (
        "fsdp2", {"parallelism_config": {"parallelism_config_tp_size": 2}}, [], "",
        "tp_size, pp_size and ep_size need MULTI_GPU, not FSDP: we split the model",
    ),
    "7 a misspelt key": (
        "zero3", {"deepspeed_config": {"zero_stage": 3, "ofload_param_device": "cpu"}}, [], "",
        "`ofload_param_device`, did you mean `offload_param_device`?",
    ),
    "8 a precision from the YAML": (
        "ddp", {"mixed_precision": "bf16"}, ["--bf16", "false"], "",
        "the accelerate config says mixed_precision: bf16, the recipe says bf16: false",
    ),
    "a layout for another number of processes": (
        "pipeline", {"parallelism_config": {"parallelism_config_pp_size": 3}}, [], "", "pp 3 makes 3 processes",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", CASES)
def test_it_stops_with_a_sentence(name, tiny):
    """One or two lines on rank 0, nothing written."""
    config, changes, argv, fault, sentence = CASES[name]
    shipped = yaml.safe_load((ROOT / f"accelerate_configs/{config}.yaml").read_text())
    Path("changed.yaml").write_text(yaml.safe_dump(shipped | changes))
    path = tiny(use_cpu=None) if "--use_cpu" in argv else tiny()
    done = launch(str(Path("changed").absolute()), "--config", path, *argv, fault=fault)
    said = [line for line in done.err.splitlines() if sentence in line]
    assert done.code != 0 and said, done.err[-3000:]
    assert not Path("out").exists() or fault or "--use_cpu" in argv  # those two are seen when the model is there


@pytest.mark.parametrize(
    ("ways", "seen", "sentence"),
    [
        (Layout(dp_shard=2, tp=2), "aabb", None),
        (Layout(dp_shard=2, tp=2), "abab", "some processes must see the same rows"),
        (Layout(dp_shard=2, tp=2), "aaaa", "in the first step only 1 did"),
        (Layout(pp=2, dp_replicate=2), "abab", None),
        (Layout(pp=2, dp_replicate=2), "aabb", "some processes must see the same rows"),
        (Layout(dp_replicate=4), "abcd", None),
        (Layout(dp_replicate=4), "abca", "in the first step only 3 did"),
    ],
)
def test_rows_follow_the_layout(ways, seen, sentence, monkeypatch):
    monkeypatch.setattr(guard, "layout", lambda: ways)
    if sentence is None:
        return guard.check_rows(list(seen))
    with pytest.raises(UserError, match=sentence):
        guard.check_rows(list(seen))


@pytest.mark.parametrize(
    ("fault", "config", "sentence"),
    [
        ("unsharded", "zero2", "should leave each process 1/2 of the weights, and this one holds 100%"),
        ("same_rows", "ddp", "in the first step only 1 did"),
    ],
)
def test_it_is_seen_when_training_begins(fault, config, sentence, tiny):
    done = launch(config, "--config", tiny(save_strategy="no"), fault=fault)
    assert done.code != 0 and sentence in done.err, done.err[-3000:]
