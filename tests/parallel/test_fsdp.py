"""FSDP2 and HSDP through Accelerate, on CPU processes that Accelerate takes for GPUs: see `fsdp_on_cpu` in tests/running.py."""

import json
import os
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import yaml
from accelerate.utils import FullyShardedDataParallelPlugin
from safetensors.torch import load_file

from llm_recipes.checkpoints import commit, find_checkpoint
from llm_recipes.errors import UserError
from llm_recipes.fsdp import keep_precision
from tests.parallel.matrix import Case, differences, folder, train
from tests.running import ROOT, curve, launch

FULL = pytest.mark.skipif(not os.environ.get("LLM_RECIPES_FULL"), reason="the full matrix: LLM_RECIPES_FULL=1")
ALL = {
    "fsdp_state_dict_type": "SHARDED_STATE_DICT", "fsdp_offload_params": True, "fsdp_activation_checkpointing": True,
}  # fmt: skip


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder with every FSDP setup at once in sharded.yaml, and the same for HSDP."""
    path = tmp_path_factory.mktemp("fsdp")
    for name in ("fsdp2", "hsdp"):
        shipped = yaml.safe_load((ROOT / f"accelerate_configs/{name}.yaml").read_text())
        (path / f"{name}_sharded.yaml").write_text(
            yaml.safe_dump(shipped | {"fsdp_config": shipped["fsdp_config"] | ALL})
        )
    return path


@pytest.fixture
def trained(place, monkeypatch):
    """`trained(name, processes, config)` trains, once, as `matrix.train` does, and gives the differences from one process."""
    monkeypatch.chdir(place)

    def differences_of(name, processes, config, **keys):
        config = str(place / config) if (place / f"{config}.yaml").exists() else config
        case = Case(processes, config, shim="fsdp_on_cpu", **keys)
        if not Path(folder(name), "metrics.json").exists():
            train({name: case})
        return differences(name, case)

    return differences_of


def check_equal(found: dict[str, float]) -> None:
    """Loss of every step within 2e-6 of one process in fp32, final weights within 2e-5."""
    assert found["loss"] < 2e-6 and found["eval_loss"] < 2e-6 and found["grad_norm"] < 1e-5, found
    assert found["weights"] < 2e-5, found


def test_sharded_checkpoints_offloaded_and_recomputed(trained):
    """A checkpoint is written in shards, and the weights at the end are whole all the same."""
    check_equal(trained("sharded", 2, "fsdp2_sharded"))
    listed = json.loads(Path("sharded/checkpoint-4/complete.json").read_text())["files"]
    shards = [name for name in listed if name.startswith("pytorch_model_fsdp_0/")]
    assert len(shards) == 3 and "model.safetensors" not in listed  # a file each, and .metadata
    whole = load_file("sharded/model.safetensors")
    assert sum(t.numel() for t in whole.values()) == json.loads(Path("sharded/metrics.json").read_text())["parameters"]


def test_shards_are_not_pushed(place, tiny):
    """They hold no model.safetensors."""
    path = tiny(hub_strategy="every_save")
    done = launch(str(place / "fsdp2_sharded"), "--config", path, fault="fsdp_on_cpu")
    assert done.code != 0 and "hub_strategy: every_save needs whole checkpoints: set fsdp_state_dict_type" in done.err
    assert not Path("out").exists()


def test_sharded_checkpoint_resumes_as_hsdp_on_four(trained):
    """2 shards become 2 copies of 2 shards, from the middle of the run on."""
    trained("sharded", 2, "fsdp2_sharded")
    check_equal(trained("sharded to HSDP", 4, "hsdp_sharded", resumes="sharded"))


def test_bf16_keeps_the_digits_of_the_loss(trained):
    """bf16 numbers between 4 and 8 are multiples of 1/32. With Accelerate's policy every logged loss is the mean of two of
    them, and up to 0.014 off."""
    trained("bf16", 2, "fsdp2", keys={"bf16": True, "per_device_train_batch_size": 4})
    exact, here = ([loss for loss, _ in curve(name)] for name in ("dense", "bf16"))
    assert not any((loss * 64).is_integer() for loss in here), here
    assert max(abs(a - b) for a, b in zip(exact, here, strict=True)) < 3e-3


def test_gradients_are_added_up_in_fp32():
    for precision in ("bf16", "fp16"):
        plugin = FullyShardedDataParallelPlugin(fsdp_version=2, mixed_precision_policy=precision)
        keep_precision(SimpleNamespace(state=SimpleNamespace(fsdp_plugin=plugin)))
        policy = plugin.mixed_precision_policy
        expected = {"bf16": torch.bfloat16, "fp16": torch.float16}[precision], torch.float32, None
        assert (policy.param_dtype, policy.reduce_dtype, policy.output_dtype) == expected


def test_nothing_is_done_in_fp32_or_without_fsdp():
    plugin = FullyShardedDataParallelPlugin(fsdp_version=2)
    keep_precision(SimpleNamespace(state=SimpleNamespace(fsdp_plugin=plugin)))
    assert plugin.mixed_precision_policy is None
    keep_precision(SimpleNamespace(state=SimpleNamespace()))


def test_sharded_and_whole_checkpoints_do_not_mix(tmp_path, monkeypatch):
    """Accelerate would end in a traceback of torch's checkpoint reader."""
    args = SimpleNamespace(output_dir=str(tmp_path), process_index=0, world_size=1)
    (tmp_path / "checkpoint-4").mkdir()
    commit(tmp_path / "checkpoint-4", format="FSDP2 with SHARDED_STATE_DICT")
    for key, value in {
        "ACCELERATE_USE_FSDP": "true",
        "FSDP_VERSION": "2",
        "FSDP_STATE_DICT_TYPE": "FULL_STATE_DICT",
    }.items():
        monkeypatch.setenv(key, value)
    said = "checkpoint-4 was written under FSDP2 with SHARDED_STATE_DICT and cannot be continued under FSDP2 with FULL_STATE_DICT"
    with pytest.raises(UserError, match=said):
        find_checkpoint(args, "auto")
    monkeypatch.setenv("FSDP_STATE_DICT_TYPE", "SHARDED_STATE_DICT")
    assert find_checkpoint(args, "auto") == str(tmp_path / "checkpoint-4")


@FULL
@pytest.mark.parametrize(
    ("name", "processes", "config", "keys"),
    [
        ("FSDP2", 2, "fsdp2", {}),
        ("FSDP2, tied", 2, "fsdp2", {"reference": "tied"}),
        ("FSDP2, packed", 2, "fsdp2", {"reference": "packed"}),
        ("FSDP2, offloaded", 2, "fsdp2_offload", {}),
        ("HSDP", 4, "hsdp", {}),
        ("FSDP2, 2 to 4", 4, "fsdp2", {"resumes": "FSDP2"}),
        ("FSDP2, 2 to 1", 1, "fsdp2", {"resumes": "FSDP2"}),
        ("HSDP to FSDP2", 2, "fsdp2", {"resumes": "HSDP"}),
        ("sharded, 2 to 1", 1, "fsdp2_sharded", {"resumes": "sharded"}),
    ],
)
def test_equals_one_process(name, processes, config, keys, trained):
    if "resumes" in keys:
        trained(
            keys["resumes"],
            *{"FSDP2": (2, "fsdp2"), "HSDP": (4, "hsdp"), "sharded": (2, "fsdp2_sharded")}[keys["resumes"]],
        )
    check_equal(trained(name, processes, config, **keys))
