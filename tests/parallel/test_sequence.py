"""Sequences split over processes: ring attention, with torch's kernel for the CPU let in (`ring_on_cpu`), and Ulysses, as it is."""

import os
from pathlib import Path
from types import SimpleNamespace

import pytest
import yaml
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from llm_recipes.config import ObjectiveConfig, OptimizationConfig, WindowConfig
from llm_recipes.errors import UserError
from llm_recipes.launch import Layout
from llm_recipes.pipeline.checks import layout_problems
from llm_recipes.probes import check_parts
from llm_recipes.sampling import sample
from tests.parallel.matrix import MIXTRAL, MODEL, Case, differences, folder, train
from tests.running import ROOT, SFT, launch, post_training_stage

FULL = pytest.mark.skipif(not os.environ.get("LLM_RECIPES_FULL"), reason="the full matrix: LLM_RECIPES_FULL=1")
PROMPTS = {"sample_prompts": ["the cat"]}
RECOMPUTED = {"activation_checkpointing": True}
RING = {"cp_size": 2}
CASES = {  # of a layout and a reference of matrix.py; every batch of a ramp is split, and the z-loss sums over all parts
    "ring": (2, "fsdp2_cp", RING, "ramp", PROMPTS, None),
    "Ulysses": (2, "zero3_sp", {"sp_size": 2}, "ramp", PROMPTS, None),
    "FSDP2 x ring": (4, "fsdp2_cp", RING | {"dp_shard_size": 2}, "tied", RECOMPUTED, None),
}  # fmt: skip
MORE = {
    "ring of 4": (4, "fsdp2_cp", {"cp_size": 4}, "dense", {}, None),
    "ring, all to all": (2, "fsdp2_cp", RING | {"cp_comm_strategy": "alltoall"}, "dense", {}, None),
    "ring, resumed": (2, "fsdp2_cp", RING, "ramp", {}, "ring"),
    "FSDP2 x ring, resumed from ring": (4, "fsdp2_cp", RING | {"dp_shard_size": 2}, "ramp", {}, "ring"),
    "ZeRO-3 x Ulysses": (4, "zero3_sp", {"sp_size": 2, "dp_shard_size": 2}, "tied", RECOMPUTED, None),
    "Ulysses, resumed": (2, "zero3_sp", {"sp_size": 2}, "ramp", {}, "Ulysses"),
    "HSDP x ring": (8, "fsdp2_cp", RING | {"dp_replicate_size": 2, "dp_shard_size": 2}, "dense", {}, None),
}  # fmt: skip


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    return tmp_path_factory.mktemp("sequences")


@pytest.fixture
def trained(place, monkeypatch):
    """`trained(name)` trains that case, once; returns the differences from one process."""
    monkeypatch.chdir(place)

    def differences_of(name):
        processes, shipped, sizes, reference, keys, resumes = (CASES | MORE)[name]
        config, shim = str(place / folder(name)), "ring_on_cpu" if "cp_size" in sizes else ""
        case = Case(processes, config, reference, keys, shim, resumes)
        if not Path(folder(name), "metrics.json").exists():
            if resumes:
                differences_of(resumes)
            values = yaml.safe_load((ROOT / f"accelerate_configs/{shipped}.yaml").read_text())
            values["parallelism_config"] |= {f"parallelism_config_{key}": size for key, size in sizes.items()}
            Path(f"{config}.yaml").write_text(yaml.safe_dump(values))
            train({name: case})
        return differences(name, case)

    return differences_of


@pytest.mark.parametrize("name", [*CASES, *(pytest.param(name, marks=FULL) for name in MORE)])
def test_parts_learn_what_one_process_learns(name, trained):
    """Loss of every step and of the held-out windows within 2e-6 in fp32, final weights within 2e-5. A rank that saw whole
    windows, in training or evaluation, would count their targets twice."""
    found = trained(name)
    assert found["loss"] < 2e-6 and found["eval_loss"] < 2e-6 and found["grad_norm"] < 1e-5, found
    assert found["weights"] < 2e-5, found


@pytest.mark.parametrize("name", ["ring", "Ulysses"])
def test_samples_are_those_of_the_saved_model(name, trained):
    """Attention is the plain one again when the batch is done."""
    trained(name)
    model, tokenizer = (kind.from_pretrained(name) for kind in (AutoModelForCausalLM, AutoTokenizer))
    alone = SimpleNamespace(model=model, args=SimpleNamespace(seed=42, device="cpu"))
    (text,) = sample(alone, tokenizer, PROMPTS["sample_prompts"], "causal")
    assert text in Path(name, "README.md").read_text()


@pytest.mark.parametrize(("config", "name"), [("zero3_sp", "DeepSpeed ZeRO-3 x SP 2"), ("tp", "TP 2")])
def test_post_training_takes_neither_parts_of_sequences_nor_of_matrices(config, name, tmp_path, monkeypatch):
    monkeypatch.chdir(post_training_stage(tmp_path))
    done = launch(config, "--config", "tiny.yaml", script=SFT)
    assert done.code != 0 and not Path("out").exists()
    assert f"{name} is for recipes/pretrain: use accelerate_configs/zero3.yaml or fsdp2.yaml" in done.err


@pytest.fixture
def launched(monkeypatch):
    """`launched("FSDP", cp=2)`: as if Accelerate had been asked to split by this layout."""

    def pretend(kind, **sizes):
        monkeypatch.setenv(f"ACCELERATE_USE_{kind}", "true")
        monkeypatch.setenv("ACCELERATE_USE_PARALLELISM_CONFIG", "true")
        for key in ("pp", "dp_replicate", "dp_shard", "cp", "sp", "tp", "ep"):
            monkeypatch.setenv(f"PARALLELISM_CONFIG_{key.upper()}_SIZE", str(sizes.get(key, 1)))
        monkeypatch.setenv("WORLD_SIZE", str(Layout(**sizes).size))
        monkeypatch.setenv("FSDP_VERSION", "2")

    return pretend


@pytest.mark.parametrize(
    ("sizes", "model", "given", "sentence"),
    [
        ({"cp": 2}, {}, {}, None),
        ({"sp": 2}, {}, {}, None),
        ({"cp": 4}, {"num_key_value_heads": 1}, {}, None),
        ({"cp": 3}, {}, {}, "sequence_length 32 is no multiple of 6, which FSDP2 x CP 3 needs"),
        ({"sp": 4}, {}, {}, "num_key_value_heads 2 does not divide over SP 4"),
        ({"sp": 8}, {}, {}, "num_attention_heads 4 does not divide over SP 8"),
        ({"cp": 2}, {"model_type": "mistral"}, {}, "sliding_window is not taken under FSDP2 x CP 2"),
        ({"cp": 2}, {}, {"objective": ObjectiveConfig("prefix")}, "splits causal windows"),
        ({"sp": 2}, {}, {"objective": ObjectiveConfig(isolate_documents=True)}, "without isolate_documents"),
        ({"cp": 2}, {}, {"windows": WindowConfig(32, streaming=True)}, "set streaming: false"),
        ({"sp": 2}, MIXTRAL, {}, "the balance loss of experts needs whole sequences"),
        ({"cp": 2}, {}, {"torch_compile": True}, "torch_compile is not taken under FSDP2 x CP 2"),
        ({"sp": 2}, {}, {"use_liger_kernel": True}, "use_liger_kernel is not taken under"),
    ],
)
def test_what_cannot_be_split(sizes, model, given, sentence, launched):
    launched("FSDP" if "cp" in sizes else "DEEPSPEED", **sizes)
    config = AutoConfig.for_model(**{"vocab_size": 300, **MODEL, **model})
    args = SimpleNamespace(**{"torch_compile": False, "use_liger_kernel": False} | given)
    objective, windows = given.get("objective", ObjectiveConfig()), given.get("windows", WindowConfig(32))
    found = layout_problems(config, objective, windows, OptimizationConfig(), args)
    assert found == [] if sentence is None else any(sentence in line for line in found), found


@pytest.mark.parametrize("kind", ["llama", "gpt2", "opt", "mistral", "qwen3", "gemma3_text", "mixtral"])
def test_models_that_can_be_split(kind):
    check_parts(AutoConfig.for_model(kind, hidden_size=32, num_attention_heads=4, num_key_value_heads=2), None)


@pytest.mark.parametrize(
    ("kind", "attention"),
    [("recurrent_gemma", None), ("minimax", None), ("bloom", None), ("mamba", None), ("llama", "eager")],
)
def test_models_that_cannot(kind, attention):
    """Recurrences, ALiBi, convolutions; and an attention that knows only of its part. Two of them take any attention."""
    config = AutoConfig.for_model(kind, hidden_size=32, num_attention_heads=4, num_key_value_heads=2)
    with pytest.raises(
        UserError, match=f"split sequences: {kind} with attn_implementation .*use sdpa and an architecture"
    ):
        check_parts(config, attention)
