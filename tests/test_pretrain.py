import dataclasses
import json
import math
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from datasets import Dataset
from safetensors.torch import load_file
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, Trainer, TrainingArguments

from llm_recipes.batches import Examples
from llm_recipes.models import from_scratch
from llm_recipes.objectives import causal, collate
from tests.running import PRETRAIN, ROOT, TINY_MODEL, run, write_texts


def test_outputs_are_complete(tiny):
    done = run("--config", tiny(eval_strategy="steps", eval_steps=2, sample_prompts=["the cat"]))
    assert done.code == 0, done.err
    out = Path("out")
    assert {p.name for p in out.iterdir() if p.is_file()} == {
        "model.safetensors", "config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json", "run.yaml",
        "metrics.json", "README.md", "loss.png", ".lock",
    }  # fmt: skip
    metrics = json.loads((out / "metrics.json").read_text())
    assert {
        "eval_loss",
        "bits_per_byte",
        "tokens_per_second",
        "fraction_of_matmul_rate",
        "unigram_entropy",
    } <= metrics.keys()
    assert metrics["steps"] == 4 and metrics["tokens"] == 4 * 4 * 32
    record = yaml.safe_load((out / "run.yaml").read_text())
    assert record["versions"]["torch"].startswith("2.13") and record["config"]["max_steps"] == 4
    assert record["launch"] == {"strategy": "single process", "world_size": 1}
    model, tokenizer = AutoModelForCausalLM.from_pretrained(out), AutoTokenizer.from_pretrained(out)
    assert model.num_parameters() == metrics["parameters"] and model.config.eos_token_id == tokenizer.eos_token_id
    card = (out / "README.md").read_text()
    assert (
        card.startswith("---\n")
        and "loss.png" in card
        and "````text\nthe cat" in card
        and "---- sample\nthe cat" in done.out
    )
    assert "step      4/4  loss" in done.out and "tokens/s" in done.out and "Traceback" not in done.err


def test_eval_loss_is_that_of_the_saved_model(tiny):
    assert run("--config", tiny(per_device_eval_batch_size=3)).code == 0
    from llm_recipes.config import DataConfig, Source, WindowConfig
    from llm_recipes.datasets import load_documents, make_windows

    class Args:
        seed, max_steps, world_size, per_device_eval_batch_size, dataloader_num_workers = 42, 4, 1, 3, 0

    model, tokenizer = AutoModelForCausalLM.from_pretrained("out"), AutoTokenizer.from_pretrained("out")
    documents = load_documents(DataConfig([Source("texts.jsonl")], 0.1), 42)
    _, evaluation, *_ = make_windows(documents, tokenizer, WindowConfig(32), 4, Args)
    ids = torch.from_numpy(np.array(evaluation["input_ids"])).long()
    with torch.no_grad():
        logits = model(input_ids=ids).logits[:, :-1]
    loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten())
    assert json.loads(Path("out/metrics.json").read_text())["eval_loss"] == pytest.approx(loss.item(), abs=1e-5)


def test_learns(tiny):
    """On words drawn at random, the held-out loss falls from ln(vocabulary) to near the entropy of the words."""
    done = run("--config", tiny(max_steps=150, save_strategy="no", logging_steps=50, global_batch_size=8))
    metrics = json.loads(Path("out/metrics.json").read_text())
    assert done.code == 0 and metrics["eval_loss"] < 0.8 * metrics["unigram_entropy"] < 0.8 * math.log(300)


def test_same_run_twice_is_the_same_to_the_bit(tiny):
    config = tiny()
    assert run("--config", config).code == run("--config", config, "--output_dir", "again").code == 0
    assert Path("out/model.safetensors").read_bytes() == Path("again/model.safetensors").read_bytes()


def test_accumulation_changes_nothing(tiny):
    """8 x 1, 4 x 2 and 1 x 8 micro-batches: the same optimisation."""
    config, curves = tiny(global_batch_size=8, max_steps=6), []
    for size in (8, 4, 1):
        done = run("--config", config, "--per_device_train_batch_size", size, "--output_dir", f"out{size}")
        assert done.code == 0, done.err
        history = json.loads(Path(f"out{size}/checkpoint-6/trainer_state.json").read_text())["log_history"]
        curves.append([(row["loss"], row["grad_norm"]) for row in history if "loss" in row])
    assert np.allclose(curves[0], curves[1], atol=1e-5) and np.allclose(curves[0], curves[2], atol=1e-5)


def test_recipe_equals_a_plain_loop(tiny):
    """The losses are those of twenty lines of torch with the same batches, AdamW, clipping and schedule."""
    config = tiny(max_steps=5, eval_fraction=0, lr_scheduler_type="constant", weight_decay=0.1)
    assert run("--config", config).code == 0
    history = json.loads(Path("out/checkpoint-4/trainer_state.json").read_text())["log_history"]
    from llm_recipes.config import DataConfig, Source, WindowConfig
    from llm_recipes.datasets import load_documents, make_windows

    class Args:
        seed, max_steps, world_size, per_device_eval_batch_size, dataloader_num_workers = 42, 5, 1, 8, 0

    tokenizer, config = AutoTokenizer.from_pretrained("out"), AutoConfig.from_pretrained("out")
    windows, *_ = make_windows(
        load_documents(DataConfig([Source("texts.jsonl")], 0), 42), tokenizer, WindowConfig(32), 4, Args
    )
    model = from_scratch(config, 42)
    examples = Examples(windows, causal, 42, shuffle=True)
    batches = (collate(examples.__getitems__(list(range(i, i + 4)))) for i in range(0, 20, 4))
    decay = [p for name, p in model.named_parameters() if "norm" not in name]
    rest = [p for name, p in model.named_parameters() if "norm" in name]
    optimizer = torch.optim.AdamW(
        [{"params": decay, "weight_decay": 0.1}, {"params": rest, "weight_decay": 0.0}], lr=1e-2
    )
    for row in (row for row in history if "loss" in row):
        ids = next(batches)["input_ids"]
        logits = model(input_ids=ids).logits[:, :-1]
        loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten())
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        assert row["loss"] == pytest.approx(loss.item(), abs=1e-5) and row["grad_norm"] == pytest.approx(
            norm.item(), abs=1e-4
        )


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_fresh_weights_are_the_architectures_own(kind):
    """Standard deviations as the library's own initialisation gives them, tied weights tied, and a loss of ln(V)."""
    sizes = (
        {"n_embd": 128, "n_layer": 2, "n_head": 2} if kind == "gpt2" else {"hidden_size": 128, "num_hidden_layers": 2}
    )
    config = AutoConfig.for_model(kind, vocab_size=500, tie_word_embeddings=True, **sizes)
    ours, theirs = from_scratch(config, 0), AutoModelForCausalLM.from_config(config)
    assert ours.lm_head.weight is ours.get_input_embeddings().weight
    for (name, p), (_, q) in zip(ours.named_parameters(), theirs.named_parameters(), strict=True):
        assert p.std().item() == pytest.approx(q.std().item(), rel=0.1), name
    again = from_scratch(config, 0).state_dict()
    assert all(torch.equal(p, again[name]) for name, p in ours.state_dict().items())
    assert not torch.equal(ours.lm_head.weight, from_scratch(config, 1).lm_head.weight)
    ids = torch.randint(0, 500, (4, 32))
    assert ours(input_ids=ids, labels=ids).loss.item() == pytest.approx(math.log(500), abs=0.2)


def test_dry_run_writes_nothing(tiny):
    config = tiny()
    done = run("--config", config, "--dry_run")
    assert done.code == 0 and not Path("out").exists()
    for word in ("data  ", "tokenizer", "model  ", "batch", "steps", "strategy", "memory", "output", "example"):
        assert f"\n{word}" in "\n" + done.out, word


@pytest.mark.parametrize("kind", ["gpt_neox", "mixtral", "gpt2"])
def test_other_architectures_resume_exactly(tiny, kind):
    """Their files carry other names than their modules; a resume must not leave any weight fresh."""
    sizes = {
        "hidden_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "intermediate_size": 64,
        "max_position_embeddings": 64,
    }
    if kind == "gpt2":
        sizes = {"n_embd": 32, "n_layer": 2, "n_head": 2, "n_positions": 64}
    if kind == "mixtral":
        sizes |= {"num_key_value_heads": 2, "num_local_experts": 4}
    config = tiny(model_config={"model_type": kind, **sizes}, max_steps=6, save_steps=3, tie_word_embeddings=None)
    assert run("--config", config, "--output_dir", "straight").code == 0
    assert run("--config", config, fault="send_signal:3:15").code == 75
    done = run("--config", config)
    assert done.code == 0, done.err
    assert Path("out/model.safetensors").read_bytes() == Path("straight/model.safetensors").read_bytes()
    assert AutoModelForCausalLM.from_pretrained("out", output_loading_info=True)[1]["missing_keys"] in (set(), [])


def test_best_model_is_what_is_saved_and_measured(tiny):
    best = {
        "load_best_model_at_end": True,
        "eval_strategy": "steps",
        "eval_steps": 2,
        "greater_is_better": True,
        "metric_for_best_model": "eval_loss",
    }
    config = tiny(max_steps=8, save_strategy="best", save_steps=None, **best)
    done = run("--config", config)
    assert done.code == 0, done.err
    assert Path("out/model.safetensors").read_bytes() == Path("out/checkpoint-2/model.safetensors").read_bytes()
    history = [
        row
        for row in yaml.safe_load(Path("out/checkpoint-2/trainer_state.json").read_text())["log_history"]
        if "eval_loss" in row
    ]
    assert json.loads(Path("out/metrics.json").read_text())["eval_loss"] == pytest.approx(
        history[0]["eval_loss"], abs=1e-5
    )
    stopped = run("--config", config, "--output_dir", "stopped", fault="send_signal:6:15")
    assert stopped.code == 75 and Path("stopped/checkpoint-6/complete.json").exists(), stopped.err


def test_streaming_trains_and_resumes_exactly(tiny):
    config = tiny()
    assert run("--config", config).code == 0
    keys = {
        "tokenizer_vocab_size": None,
        "tokenizer_name_or_path": "out",
        "streaming": True,
        "max_steps": 30,
        "save_steps": 10,
    }
    config = tiny(**keys, output_dir="straight", global_batch_size=16)  # 30 x 16 windows: two passes over the data
    straight = run("--config", config)
    assert straight.code == 0, straight.err
    config = tiny(**keys, output_dir="parts", global_batch_size=16)
    assert run("--config", config, fault="send_signal:20:15").code == 75
    assert run("--config", config).code == 0
    assert Path("parts/model.safetensors").read_bytes() == Path("straight/model.safetensors").read_bytes()


def test_continues_from_a_model(tiny):
    assert run("--config", tiny()).code == 0
    keys = {
        "model_config": None,
        "model_name_or_path": "out",
        "tokenizer_vocab_size": None,
        "tokenizer_name_or_path": "out",
    }
    done = run("--config", tiny(**keys, output_dir="more", learning_rate=0.0, weight_decay=0.0))
    assert done.code == 0, done.err
    first, second = (AutoModelForCausalLM.from_pretrained(f).state_dict() for f in ("out", "more"))
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_copied_recipe_runs_elsewhere(tiny, tmp_path):
    """`cp -r recipes/pretrain anywhere`: its own config.yaml is the default there."""
    copy = shutil.copytree(PRETRAIN.parent, tmp_path / "anywhere/my_pretrain")
    shutil.copy(tiny(output_dir="mine"), copy / "config.yaml")
    accelerate = Path(sys.executable).parent / "accelerate"
    command = [accelerate, "launch", "--config_file", ROOT / "accelerate_configs/cpu.yaml", copy / "run.py"]
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True, cwd=tmp_path, env=os.environ)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "mine/metrics.json").is_file()


BAD = {
    "missing file": ({"datasets": [{"path": "nowhere.jsonl"}]}, "nowhere.jsonl does not exist"),
    "empty dataset": ({"datasets": [{"path": "empty.jsonl"}]}, "empty.jsonl: no rows"),
    "only empty rows": ({"datasets": [{"path": "blank.jsonl"}]}, "the text supports 272"),
    "no such column": (
        {"datasets": [{"path": "texts.jsonl", "columns": {"text": "body"}}]},
        "has no column body; it has text",
    ),
    "wrong type": ({"learning_rate": True}, "learning_rate: expects a number, got true"),
    "unknown key": ({"learnin_rate": 1}, "did you mean `learning_rate`?"),
    "vocabulary too small": (
        {"model_config": TINY_MODEL | {"vocab_size": 100}},
        "the tokenizer has 300 ids, the model's vocab_size is 100",
    ),
    "sequence too long": (
        {"sequence_length": 128},
        "sequence_length 128 is longer than the model's max_position_embeddings 64",
    ),
    "output is a file": ({"output_dir": "texts.jsonl/out"}, "texts.jsonl is not a folder you can write to"),
    "unknown architecture": ({"model_config": {"model_type": "lama"}}, "model_config: "),
    "unknown architecture key": (
        {"model_config": TINY_MODEL | {"hiden_size": 3}},
        "llama: unknown key `hiden_size`, did you mean `hidden_size`?",
    ),
    "wrong architecture value": ({"model_config": TINY_MODEL | {"hidden_size": "x"}}, "expected int, got str"),
    "heads do not divide": (
        {"model_config": TINY_MODEL | {"num_attention_heads": 3}},
        "not a multiple of the number of attention heads",
    ),
    "key-value heads do not divide": (
        {"model_config": TINY_MODEL | {"model_type": "mistral"}},
        "2 is not a multiple of num_key_value_heads 8",
    ),
    "no model": ({"model_config": None}, "set model_config to train from scratch, or model_name_or_path"),
    "missing model": (
        {"model_config": None, "model_name_or_path": "outputs/nowhere", "tokenizer_vocab_size": None},
        "outputs/nowhere does not exist",
    ),
    "tokenizer of another": (
        {"model_config": None, "model_name_or_path": "x"},
        "does not fit the embeddings of model_name_or_path",
    ),
    "warm-up too long": ({"warmup_steps": 10}, "warmup_steps 10 is not below the 4 steps"),
    "reporter missing": ({"report_to": "wandb"}, "report_to: wandb is not installed"),
    "batch too large": ({"global_batch_size": 5000, "per_device_train_batch_size": 8}, "fewer than one batch of 5000"),
    "eval without data": ({"eval_strategy": "steps", "eval_fraction": 0}, "eval_strategy: steps needs data"),
    "prompt too long": ({"sample_prompts": ["the cat " * 50]}, "tokens, the model's context is 64"),
    "looks ahead": (
        {"model_config": {"model_type": "bert"}},
        "bert does not fit objective causal, which trains a causal",
    ),
    "not an encoder": ({"objective": "masked"}, "llama does not fit objective masked, which trains an encoder"),
    "not an encoder-decoder": ({"objective": "span_corruption"}, "llama does not fit objective span_corruption"),
    "objective": ({"objective": "mlm"}, "objective: expects one of causal, prefix, masked, span_corruption"),
    "isolation of a prefix": (
        {"objective": "prefix", "isolate_documents": True},
        "isolate_documents: only objective causal can, not prefix",
    ),
    "isolation that leaks": (
        {
            "isolate_documents": True,
            "model_config": {"model_type": "bloom", "hidden_size": 32, "n_layer": 1, "n_head": 2},
        },
        "isolate_documents: bloom with attn_implementation left to its default lets documents see each other",
    ),
    "noise": ({"noise_density": 1.5}, "noise_density 1.5 is not between 0 and 1"),
    "noise of nothing": ({"mean_span_length": 2.0}, "mean_span_length means nothing for objective causal"),
    "smoothing": ({"label_smoothing_factor": 0.1}, "label_smoothing_factor: losses here are cross-entropies in nats"),
    "liger": ({"use_liger_kernel": True}, "use_liger_kernel: liger-kernel is not installed"),
    "order": ({"data_seed": 7}, "data_seed is not taken here: the order follows from seed"),
    "sampling": ({"train_sampling_strategy": "sequential"}, "train_sampling_strategy is not taken here"),
    "share of warm-up": (
        {
            "lr_scheduler_type": "warmup_stable_decay",
            "lr_scheduler_kwargs": {"num_decay_steps": 3},
            "warmup_steps": 0.5,
        },
        "warmup_steps 2 and num_decay_steps 3 are more than the 4 steps of the run",
    ),
    "mean over ranks": (
        {"average_tokens_across_devices": False},
        "the loss of a step is the mean over all its targets",
    ),
    "ramp too long": (
        {"batch_size_ramp": {"start": 2, "steps": 4}},
        "the full batch comes after 4 steps, and the run has 4",
    ),
    "two optimizers": ({"optimizer": "lion", "optim": "sgd"}, "optimizer: lion and optim: sgd are two optimizers"),
    "optimizer option": ({"optimizer": "muon", "optim_args": "momentun=0.9"}, "muon has no option 'momentun'"),
    "ramp key": ({"batch_size_ramp": {"start": 2, "step": 3}}, "batch_size_ramp: unknown key `step`"),
    "ramp": ({"batch_size_ramp": {"start": 4, "steps": 3}}, "start must lie between 0 and the full batch of 4"),
    "guard": ({"spike_guard": {"action": "ignore"}}, "action: expects one of warn, skip, rollback; got 'ignore'"),
    "monitor": ({"monitor": ["weights"]}, "monitor: expects one of activations, gradients, updates; got 'weights'"),
    "fp16 on the CPU": ({"fp16": True}, "fp16 needs a GPU: use bf16: true, or neither for fp32"),
    "decay too long": (
        {"lr_scheduler_type": "warmup_stable_decay", "lr_scheduler_kwargs": {"num_decay_steps": 4}, "warmup_steps": 1},
        "warmup_steps 1 and num_decay_steps 4 are more than the 4 steps of the run",
    ),
    "schedule key": (
        {"lr_scheduler_type": "cosine_with_min_lr", "lr_scheduler_kwargs": {"min_lr_rat": 0.1}},
        "lr_scheduler_type cosine_with_min_lr",
    ),
    "optimizer not installed": ({"optim": "adamw_bnb_8bit"}, "optim adamw_bnb_8bit"),
    "steps and epochs": ({"num_train_epochs": 2}, "max_steps and num_train_epochs are both set"),
    "no steps": ({"max_steps": 0}, "max_steps: 0 trains nothing"),
    "batch behind the back": ({"accelerator_config": {"split_batches": True}}, "`accelerator_config` is not taken"),
    "hub strategy": ({"hub_strategy": "checkpoint"}, "hub_strategy: checkpoint is not supported"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_one_sentence_and_writes_nothing(tiny, case):
    keys, message = BAD[case]
    Path("empty.jsonl").write_text("")
    Path("blank.jsonl").write_text('{"text": ""}\n' * 50)
    before = {p for p in Path().rglob("*") if not p.name.startswith("child")}
    done = run("--config", tiny(**keys))
    assert done.code == 2, done.err
    said = [line for line in done.err.splitlines() if "WARNING" not in line]
    assert message in done.err and len(said) <= 2 and "Traceback" not in done.err, done.err
    assert {p for p in Path().rglob("*") if not p.name.startswith("child")} <= before | {
        Path("tiny.yaml"),
        Path("texts.jsonl"),
    }


def test_unwritable_output(tiny):
    if os.geteuid() == 0:
        done = run("--config", tiny(output_dir="/proc/out"))
    else:
        Path("closed").mkdir(mode=0o500)
        done = run("--config", tiny(output_dir="closed/out"))
    assert done.code == 2 and "Traceback" not in done.err, done.err


def test_a_model_that_no_recipe_wrote_is_left_alone(tiny):
    Path("out/checkpoint-5").mkdir(parents=True)
    done = run("--config", tiny())
    assert done.code == 2 and "holds a model that no recipe wrote" in done.err and Path("out/checkpoint-5").is_dir()


def test_several_problems_come_together(tiny):
    done = run("--config", tiny(sequence_length=128, warmup_steps=10, report_to="wandb"))
    assert (
        done.code == 2
        and len([line for line in done.err.splitlines() if line.startswith(("sequence", "warmup", "report"))]) == 3
    )


def test_no_compiler_for_deepspeed(monkeypatch, tmp_path):
    from llm_recipes.launch import check_launch

    monkeypatch.setenv("ACCELERATE_USE_DEEPSPEED", "true")
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path))
    monkeypatch.setenv("PATH", str(tmp_path))
    (problem,) = check_launch()
    assert (
        "a C++ compiler (Debian: apt-get install g++) and ninja" in problem
        and "use accelerate_configs/cpu.yaml" in problem
    )
    (tmp_path / "deepspeed_shm_comm").mkdir()
    (tmp_path / "deepspeed_shm_comm/deepspeed_shm_comm.so").touch()
    assert check_launch() == []


def test_devices_and_processes(monkeypatch):
    from llm_recipes import launch

    monkeypatch.setattr(launch, "has_accelerator", lambda: True)
    monkeypatch.setattr(torch.accelerator, "device_count", lambda: 4)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "8")
    monkeypatch.setenv("WORLD_SIZE", "8")
    assert launch.check_launch() == ["8 processes on this machine but 4 visible GPUs: add --num_processes 4"]
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "1")
    monkeypatch.setenv("WORLD_SIZE", "1")
    assert "one process and 4 visible GPUs" in launch.check_launch()[0]
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    assert launch.idle_devices() == "4 GPUs are visible, 2 are used: --num_processes 4 uses all"
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    assert launch.idle_devices() is None


def test_all_training_windows_are_used_and_held_out_ones_fill_batches(tiny):
    done = run("--config", tiny(global_batch_size=7, per_device_train_batch_size=7), "--dry_run")
    count = int(done.out.split(" windows of 32 tokens to train on")[0].split()[-1].replace(",", ""))
    assert count % 7 and "training windows left out" not in done.out
    assert int(done.out.split(" windows held out")[0].split()[-1]) % 7 == 0


def test_every_data_key_of_the_trainer_works_or_is_refused():
    """The Trainer's loader is ours: a new key of this kind in TrainingArguments must be looked at."""
    from llm_recipes.config import REFUSED
    from llm_recipes.preflight import UNUSED

    names = {f.name for f in dataclasses.fields(TrainingArguments)}
    found = {name for name in names if name.startswith(("data", "train_samp", "group_", "length_", "ignore_data"))}
    works = {"dataloader_num_workers", "dataloader_pin_memory", "dataloader_prefetch_factor"}
    assert found - {"length_column_name"} == (works | UNUSED.keys() | REFUSED.keys()) & found


def test_an_encoder_decoder_with_buffers_is_saved_whole(tiny):
    """BART saves a buffer beside its weights; its card says what it is for."""
    model = {"model_type": "bart", "d_model": 16, "encoder_layers": 1, "decoder_layers": 1, "encoder_attention_heads": 2,
             "decoder_attention_heads": 2, "encoder_ffn_dim": 16, "decoder_ffn_dim": 16, "max_position_embeddings": 64}  # fmt: skip
    done = run("--config", tiny(objective="span_corruption", model_config=model))
    assert done.code == 0 and "pipeline_tag: text2text-generation" in Path("out/README.md").read_text(), done.err


def test_bf16_is_autocast(tiny):
    """Weights stay fp32 and the matrix products are rounded: the first loss differs from fp32's, and only a little."""
    losses = []
    for bf16 in ("false", "true"):
        done = run("--config", tiny(max_steps=2, eval_fraction=0), "--bf16", bf16, "--output_dir", bf16)
        assert done.code == 0 and ("bf16" if bf16 == "true" else "fp32") in done.out, done.err
        history = json.loads(Path(f"{bf16}/checkpoint-2/trainer_state.json").read_text())["log_history"]
        losses.append(history[0]["loss"])
        assert {t.dtype for t in load_file(f"{bf16}/model.safetensors").values()} == {torch.float32}
    assert 0 < abs(losses[0] - losses[1]) < 0.02


def test_activation_checkpointing_keeps_less_and_changes_nothing(tmp_path):
    """Numbers kept for the backward pass fall to less than half; the weights after a step are the same to the bit."""
    kept, weights, rows = [], [], [causal(np.arange(32), None)] * 4
    for on in (False, True):
        model = from_scratch(AutoConfig.for_model(**TINY_MODEL, vocab_size=50), 0)
        args = TrainingArguments(
            str(tmp_path), use_cpu=True, report_to="none", activation_checkpointing=on, max_steps=1, save_strategy="no"
        )
        kept.append(0)

        def count(tensor):
            kept[-1] += tensor.numel()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(count, lambda t: t):
            Trainer(model, args, collate, rows).train()
        weights.append([p.detach() for p in model.parameters()])
    assert kept[1] < kept[0] / 2 and all(torch.equal(a, b) for a, b in zip(*weights, strict=True))


def test_optimizer_ramp_and_monitor_in_one_run(tiny):
    """What TrainingArguments do not offer, together; the figures of `monitor` reach the log of the run."""
    keys = {"optimizer": "muon", "monitor": ["gradients", "updates"], "z_loss": 1e-4, "isolate_documents": True}
    done = run("--config", tiny(**keys, max_steps=6, batch_size_ramp={"start": 2, "steps": 2}))
    assert done.code == 0, done.err
    log = json.loads(Path("out/checkpoint-6/trainer_state.json").read_text())["log_history"]
    assert {"grad_norm/layers.0", "update_ratio/embed_tokens"} <= log[0].keys()


def test_a_run_started_with_another_objective_is_another_run(tiny):
    assert run("--config", tiny()).code == 0
    done = run("--config", tiny(objective="prefix"))
    assert done.code == 2 and "holds another run (objective: default -> prefix)" in done.err


def test_report_to_tensorboard(tiny):
    pytest.importorskip("tensorboard")
    assert run("--config", tiny(report_to="tensorboard")).code == 0
    assert list(Path().rglob("events.out.tfevents*"))


def test_dataset_from_disk_is_the_same_data(tiny):
    rows = [json.loads(line) for line in (write_texts(Path("texts.jsonl"))).read_text().splitlines()]
    Dataset.from_list(rows).save_to_disk("saved")
    config = tiny()
    assert run("--config", config).code == 0
    assert run("--config", config, "--datasets", "[{path: saved}]", "--output_dir", "b").code == 0
    assert Path("out/model.safetensors").read_bytes() == Path("b/model.safetensors").read_bytes()
