"""Every YAML trains: model shape and data are swapped for tiny local ones, all else is as shipped.

A run is stopped by SIGTERM in its second step, so that the steps and the schedule stay as shipped too.
"""

import json
import signal
from pathlib import Path

import pytest
import yaml

from llm_recipes.config import load_yaml
from tests.running import ROOT, STAGES, TINY_MODEL, run, write_config, write_texts

YAMLS = sorted((ROOT / "recipes/pretrain").glob("*.yaml"))
SMALL = {
    "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 1,
    "n_embd": 16, "n_layer": 2, "n_head": 2, "d_model": 16, "d_kv": 8, "d_ff": 32, "num_layers": 2,
    "num_decoder_layers": 2, "num_heads": 2, "vocab_size": 384,
}  # fmt: skip


@pytest.fixture(scope="module")
def stage(tmp_path_factory):
    """Texts, and a tiny model with its tokenizer to continue from."""
    folder = tmp_path_factory.mktemp("stage")
    write_texts(folder / "texts.jsonl", rows=4000)
    config = write_config(folder, max_steps=2, eval_fraction=0, output_dir=str(folder / "model"))
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        assert run("--config", config).code == 0
    return folder


def shrunk(path, stage):
    """Command-line overrides: tiny model of the same architecture, windows of 64 tokens of local text, its tokenizer."""
    shipped = load_yaml(path)[0]
    sources = [{**source, "path": str(stage / "texts.jsonl")} for source in shipped["datasets"]]
    sources = [{key: source[key] for key in ("path", "weight") if key in source} for source in sources]
    swap = {"datasets": sources, "eval_fraction": 0.3, "sequence_length": 64}
    if "model_config" in shipped:
        model = {key: SMALL.get(key, value) for key, value in shipped["model_config"].items()}
        if "layer_types" in model:
            model["layer_types"] = model["layer_types"][:2]
        swap |= {"model_config": model, "tokenizer_name_or_path": str(stage / "model"), "tokenizer_vocab_size": None}
    else:
        swap["model_name_or_path"] = str(stage / "model")
    return words(swap)


@pytest.mark.parametrize("path", YAMLS, ids=lambda p: p.stem)
def test_yaml_trains_two_steps(path, stage, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    done = run("--config", path, "--output_dir", "out", *shrunk(path, stage), fault="stop_uncompiled:2")
    assert done.code == 75, done.out + done.err
    state = json.loads(Path("out/checkpoint-2/trainer_state.json").read_text())
    assert state["global_step"] == 2 and "SIGTERM: saved out/checkpoint-2" in done.err
    config = yaml.safe_load(Path("out/run.yaml").read_text())["config"]
    shipped = load_yaml(path)[0]
    assert config["global_batch_size"] == shipped["global_batch_size"] and config["max_steps"] == shipped["max_steps"]


POST_TRAINING = sorted(p for stage in STAGES[1:] for p in (ROOT / "recipes" / stage).glob("*.yaml"))


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """A tiny model with room for every max_length of the tests, and its tokenizer."""
    folder = tmp_path_factory.mktemp("base")
    model = TINY_MODEL | {"max_position_embeddings": 4096}
    config = write_config(folder, max_steps=2, eval_fraction=0, output_dir=str(folder / "model"), model_config=model)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        assert run("--config", config).code == 0
    return str(folder / "model")


@pytest.mark.parametrize("path", POST_TRAINING, ids=lambda p: f"{p.parent.name}-{p.stem}")
def test_post_training_yaml_trains_two_steps(path, base, tmp_path, monkeypatch):
    """The kernel and 4 bits need a GPU: off, after the refusal was seen. PPO trains one rollout, the answers alone rewarded."""
    monkeypatch.chdir(tmp_path)
    shipped, script = load_yaml(path)[0], path.parent / "run.py"
    kind = {"sft": "sft", "ppo": "prompts"}.get(path.parent.name, "preference")
    warmup = shipped["warmup_steps"] if shipped["warmup_steps"] >= 1 else 0
    batch = shipped["global_batch_size"]
    swap = {
        "model_name_or_path": base, "datasets": [{"path": f"builtin:arithmetic/{kind}", "rows": batch * (2 + warmup) + 1}],
        "eval_datasets": [{"path": f"builtin:arithmetic/{kind}", "split": "test", "rows": batch}],
        "eval_strategy": "no", "output_dir": "out",
    }  # fmt: skip
    steps = 2
    if kind == "prompts":
        swap |= {"max_prompt_length": 1024, "max_completion_length": 4, "rewards": [{"path": "builtin:exact_match"}]}
        swap["critic_model_name_or_path"], steps = None, shipped["num_ppo_epochs"] * shipped["num_mini_batches"]
    else:
        # byte by byte a problem is longer than 256; packs of 8192 tokens take a minute without the kernel
        swap["max_length"] = min(max(shipped["max_length"], 1024), 4096)
    if shipped.get("load_in_4bit"):
        refused = run("--config", path, *words(swap), script=script)
        assert (
            refused.code == 2
            and refused.err.startswith("load_in_4bit needs an NVIDIA GPU")
            and not Path("out").exists()
        )
        swap |= {"load_in_4bit": False, "optim": "adamw_torch"}
    if "attn_implementation" in shipped:
        swap["attn_implementation"] = None
    if shipped.get("packing"):
        swap["datasets"][0]["rows"] = 2000
        swap["eval_datasets"][0]["rows"] = 50 * batch
    if "answers" in shipped:
        swap["answers"] = shipped["answers"] | {"rows": 2}
    done = run("--config", path, *words(swap), script=script, fault=f"send_signal:2:{signal.SIGTERM.value}")
    assert done.code == 75, done.out + done.err
    assert json.loads(Path(f"out/checkpoint-{steps}/trainer_state.json").read_text())["global_step"] == steps
    assert Path(f"out/checkpoint-{steps}/adapter_model.safetensors").exists() == shipped.get("use_peft", False)


def words(keys: dict) -> list[str]:
    return [word for key, value in keys.items() for word in (f"--{key}", json.dumps(value))]


@pytest.mark.parametrize("objective", ["masked", "prefix", "span_corruption"])
def test_objective_learns(objective, tmp_path, monkeypatch):
    """On builtin:python the held-out loss falls at every look, and below that of the best predictor without context."""
    monkeypatch.chdir(tmp_path)
    path = ROOT / f"recipes/pretrain/{objective}.yaml"
    data = "--sequence_length 64 --tokenizer_vocab_size 512 --eval_fraction 0.004"
    fast = (
        "--global_batch_size 8 --max_steps 100 --warmup_steps 10 --optimizer muon --learning_rate 1e-2 --eval_steps 25"
    )
    done = run("--config", path, "--output_dir", "out", "--save_strategy", "no", *data.split(), *fast.split())
    assert done.code == 0, done.err
    losses = [
        float(line.split("eval_loss ")[1])
        for line in done.out.splitlines()
        if line.startswith("step") and "eval_loss" in line
    ]
    metrics = json.loads(Path("out/metrics.json").read_text())
    assert len(losses) == 4 and losses == sorted(losses, reverse=True)
    assert metrics["eval_loss"] < metrics["unigram_entropy"] - 0.1
