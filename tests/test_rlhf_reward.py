"""The reward recipe: Bradley-Terry from a score head at zero, the same on any number of processes, and its report."""

import json
import math
import signal
from pathlib import Path

import numpy as np
import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from llm_recipes.adapters import whole_model
from tests.running import (
    REWARD,
    ROOT,
    SHIMS,
    STRATEGIES,
    add_adapter,
    check_same_training,
    history,
    launch,
    metrics,
    post_training_stage,
    read_rows,
    run,
    write_rows,
)

REPORT = ("eval_loss", "accuracy", "log_loss", "brier", "ece", "margin_mean", "margin_p05", "score_length_correlation")
NO_ANSWERS = ["--score_samples", "0"]


@pytest.fixture(scope="module", autouse=True)
def stage(tmp_path_factory):
    """The folder that all tests here work in, each with an output_dir of its own."""
    folder = post_training_stage(tmp_path_factory.mktemp("reward"))
    (folder / "recipes").symlink_to(ROOT / "recipes")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        yield folder


def reward(out, *argv, **options):
    given = ["--config", "tiny.yaml", "--output_dir", out, "--model_name_or_path", "chat"]
    return run(*given, *argv, script=REWARD, **options)


def trained(out, *argv):
    done = reward(out, *argv)
    assert done.code == 0, done.err
    return out


@pytest.fixture(scope="module")
def one(stage):
    """16 pairs in batches of 8, three steps, with the centring term, which is nothing while all scores are zero."""
    answers = ["--score_samples", "8", "--max_new_tokens", "16"]
    return trained("one", "--center_rewards_coefficient", "0.01", "--per_device_eval_batch_size", "3", *answers)


@torch.no_grad()
def by_hand(model, rows):
    """Scores `(n, 2)` of chosen and rejected, one conversation at a time."""
    tokenizer, scores = AutoTokenizer.from_pretrained("base"), []
    for row in rows:
        prompt = f"<|im_start|>user\n{row['prompt']}<|im_end|>\n<|im_start|>assistant\n"
        for side in ("chosen", "rejected"):
            ids = tokenizer(prompt)["input_ids"] + tokenizer(row[side] + "<|im_end|>")["input_ids"]
            scores.append(model(torch.tensor([ids])).logits.item())
    return np.array(scores).reshape(-1, 2)


# ---- the optimisation ----------------------------------------------------------------------------


def test_first_loss_is_ln_2(one):
    """In every micro-batch and with the centring term: a score head that starts at zero."""
    first = history(one)[0]
    assert first["loss"] == pytest.approx(math.log(2), abs=1e-7) and abs(first["mean_reward"]) < 1e-25
    assert first["grad_norm"] > 0.1 and history(one)[1]["loss"] != pytest.approx(math.log(2), abs=1e-3)


def test_margins_are_asked_for():
    """Scores of zero and a margin m make a loss of -log sigmoid(-m)."""
    margins = [0.0, 0.5, 1.0, 3.0, 0.25, 0.0, 2.0, 1.5]
    rows = [row | {"margin": m} for row, m in zip(read_rows("train.jsonl"), margins, strict=False)]
    data = ["--datasets", json.dumps([{"path": write_rows("margins.jsonl", rows)}])]
    trained("margins", *data, "--max_steps", "1", "--save_steps", "1", *NO_ANSWERS)
    assert history("margins")[0]["loss"] == pytest.approx(np.mean(np.log1p(np.exp(margins))), abs=1e-6)


def test_accumulation_changes_nothing(one):
    sizes = ["--per_device_train_batch_size", "1", "--per_device_eval_batch_size", "1"]
    trained("small", "--center_rewards_coefficient", "0.01", *sizes, *NO_ANSWERS)
    check_same_training(one, "small", *REPORT)


def test_resume_after_sigterm_is_exact_to_the_bit(one):
    argv = ["--center_rewards_coefficient", "0.01", *NO_ANSWERS]
    assert reward("parts", *argv, fault=f"send_signal:2:{signal.SIGTERM.value}").code == 75
    trained("parts", *argv)
    assert Path("parts/model.safetensors").read_bytes() == Path(one, "model.safetensors").read_bytes()


@pytest.mark.parametrize(("config", "shards", "size"), STRATEGIES)
def test_two_processes_learn_what_one_learns(one, config, shards, size):
    argv = ["--config", "tiny.yaml", "--output_dir", config, "--model_name_or_path", "chat", "--score_samples", "8"]
    argv += ["--center_rewards_coefficient", "0.01", "--max_new_tokens", "16"]
    done = launch(config, *argv, "--per_device_train_batch_size", size, script=REWARD, fault=SHIMS.get(config, ""))
    assert done.code == 0, done.err[-3000:]
    assert f"{shards}, 2 processes, cpu, fp32" in done.out
    assert f"8 rows = 2 processes x {size} x {4 // size} accumulation" in done.out
    check_same_training(one, config, *REPORT, "score_mean", "score_std")


# ---- what it leaves behind -----------------------------------------------------------------------


def test_the_report_is_that_of_the_saved_model(one):
    """Accuracy, loss and margins from plain transformers and the saved folder, one conversation at a time."""
    model = AutoModelForSequenceClassification.from_pretrained(one)
    scores = by_hand(model, read_rows("held.jsonl"))
    margins, found = scores[:, 0] - scores[:, 1], metrics(one)
    assert model.config.num_labels == 1 and np.abs(scores).max() > 1e-2
    expected = {
        "n": 16, "accuracy": np.mean(margins > 0), "log_loss": np.mean(np.logaddexp(0, -margins)),
        "margin_mean": margins.mean(), "margin_std": margins.std(),
        "brier": np.mean((1 / (1 + np.exp(-margins)) - 1) ** 2), "eval_accuracy": np.mean(margins > 0),
        "eval_loss": np.mean(np.logaddexp(0, -margins)) + 0.01 * np.mean(scores.sum(1) ** 2),
    }  # fmt: skip
    for key, value in expected.items():
        assert found[key] == pytest.approx(value, abs=1e-5), key
    assert found["accuracy_low"] < found["accuracy"] < found["accuracy_high"] and found["saved_difference"] < 1e-4
    assert 0 <= found["ece"] <= 1 and found["score_std"] > 0
    config = json.loads(Path(one, "config.json").read_text())
    assert [config[key] for key in ("score_mean", "score_std")] == [found["score_mean"], found["score_std"]]
    report = json.loads(Path(one, "reward_report.json").read_text())
    assert sum(row["n"] for row in report["reliability"]) == 16
    assert Path(one, "reliability.png").read_bytes().startswith(b"\x89PNG")
    assert "pipeline_tag: text-classification" in Path(one, "README.md").read_text()


@torch.no_grad()
@pytest.mark.parametrize("merge", [False, True])
def test_an_adapter_has_the_score_head_with_it(merge):
    out = f"adapter_{merge}"
    lora = [
        "--use_peft",
        "true",
        "--lora_r",
        "4",
        "--lora_target_modules",
        "[all-linear]",
        "--merge",
        str(merge).lower(),
    ]
    trained(out, *lora, "--score_samples", "4", "--max_new_tokens", "8")
    assert Path(out, "model.safetensors").is_file() == merge == (not Path(out, "adapter_model.safetensors").is_file())
    folder = f"{out}/adapter" if merge else out
    base = AutoModelForSequenceClassification.from_pretrained("chat", num_labels=1, dtype=torch.float32)
    base.config.pad_token_id = AutoTokenizer.from_pretrained("chat").pad_token_id
    margins = -np.diff(by_hand(PeftModel.from_pretrained(base, folder).eval(), read_rows("held.jsonl")))[:, 0]
    assert metrics(out)["log_loss"] == pytest.approx(np.mean(np.logaddexp(0, -margins)), abs=1e-5)
    assert history(out)[0]["loss"] == pytest.approx(math.log(2), abs=1e-7) and np.abs(margins).max() > 1e-2


def test_it_starts_from_base_and_adapter(stage):
    """From an SFT adapter that was not merged, at learning rate 0: what comes out is what went in."""
    add_adapter("chat", "lora")
    argv = ["--model_name_or_path", "lora", "--learning_rate", "0", "--max_steps", "1", "--save_steps", "1"]
    done = run("--config", "tiny.yaml", "--output_dir", "still", *argv, *NO_ANSWERS, script=REWARD)
    assert done.code == 0, done.err
    start, base = (load_file(f"{f}/model.safetensors") for f in (whole_model("lora"), "chat"))
    still = load_file("still/model.safetensors")
    assert still.keys() - start.keys() == {"score.weight"} and still["score.weight"].abs().max() < 1e-25
    backbone = [name for name in still if name in start]
    assert len(backbone) == len(start) - 1 and all(torch.equal(still[name], start[name]) for name in backbone)
    assert all(torch.equal(start[name], base[name]) != ("_proj" in name) for name in backbone)


# ---- bad input -----------------------------------------------------------------------------------

GOOD = {"prompt": "cat", "chosen": "red", "rejected": "a dog"}
BAD_ROWS = {
    "no column": ({"prompt": "cat", "chosen": "red"}, "has the columns prompt, chosen; needed: chosen and rejected. `columns: {ours: theirs}` renames them"),
    "no choice": (GOOD | {"rejected": "red"}, "no row is left to train on: 16 have the same chosen and rejected"),
    "no answer": (GOOD | {"chosen": ""}, "no row is left to train on: 16 have an empty answer"),
    "too long": (GOOD | {"rejected": "the dog sees a fish " * 50}, "no row is left to train on: 16 are longer than max_length 256"),
    "image": (GOOD | {"images": ["cat.png"]}, "has a column images: these recipes train on text alone"),
}  # fmt: skip
BAD_KEYS = {
    "context": (["--max_length", "513"], "max_length 513 is longer than the model's max_position_embeddings 512"),
    "merge": (["--merge", "true"], "merge: true needs an adapter: set use_peft: true"),
    "qlora": (["--use_peft", "true", "--load_in_4bit", "true"], "load_in_4bit needs an NVIDIA GPU: bitsandbytes' kernels are not made for training on the CPU"),
    "unknown": (["--score_sample", "1"], "command line: unknown key `score_sample`, did you mean `score_samples`?"),
    "refused": (["--pad_token", "x"], "command line: `pad_token` is not taken: the tokenizer's, or a spare one where that is the EOS"),
    "nothing to judge on": (["--eval_datasets", "[]", "--eval_fraction", "0"], "a reward model is judged on held-out pairs: set eval_fraction above 0, or eval_datasets"),
}  # fmt: skip


@pytest.mark.parametrize("how", [*BAD_ROWS, *BAD_KEYS])
def test_bad_input_is_one_sentence(how):
    if how in BAD_ROWS:
        row, said = BAD_ROWS[how]
        argv = ["--datasets", json.dumps([{"path": write_rows("bad.jsonl", [row] * 16)}])]
    else:
        argv, said = BAD_KEYS[how]
    done = reward("bad", *argv)
    assert done.code == 2 and not Path("bad").exists()
    (sentence,) = done.err.splitlines()
    assert sentence.endswith(said)


def test_the_stage_before_is_named(stage):
    """The YAML as shipped, in a folder where nothing was made yet."""
    done = run(script=REWARD)
    said = "model_name_or_path: outputs/sft does not exist: run recipes/sft/run.py first\n"
    assert (done.code, done.err) == (2, said) and not Path("outputs").exists()
