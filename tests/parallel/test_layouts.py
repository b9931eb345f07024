"""Layouts of llm_recipes.pipeline on 2, 4 and 8 CPU processes, with no shim: each learns what one process learns."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from tests.parallel.matrix import SHORT, differences, folder, train


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(tmp_path_factory.mktemp("layouts"))
        train(SHORT)
        yield Path.cwd()


@pytest.mark.parametrize("name", SHORT)
def test_layout_learns_what_one_process_learns(name, trained, monkeypatch):
    """Loss of every step within 2e-6 in fp32, final weights within 2e-5; the resumed ones from a checkpoint in the middle."""
    monkeypatch.chdir(trained)
    found = differences(name, SHORT[name])
    assert found["loss"] < 2e-6 and found["eval_loss"] < 2e-6 and found["grad_norm"] < 1e-5, found
    assert found["weights"] < 2e-5, found


@pytest.mark.parametrize("name", ["3D: PP 2 x FSDP2 2 x TP 2", "PP 2, tied", "TP 2, experts"])
def test_what_is_left_is_a_plain_checkpoint(name, trained):
    """from_pretrained loads it alone, and its logits are finite; complete.json vouches for the sharded state."""
    model, info = AutoModelForCausalLM.from_pretrained(trained / folder(name), output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"] and not info["mismatched_keys"]
    assert model(input_ids=torch.arange(8)[None]).logits.isfinite().all()
    assert all(t.isfinite().all() for t in load_file(trained / folder(name) / "model.safetensors").values())
    listed = json.loads((trained / folder(name) / "checkpoint-8/complete.json").read_text())
    assert listed["format"] == "the layouts of llm_recipes.pipeline"
    assert any(file.startswith("distributed/") for file in listed["files"])
