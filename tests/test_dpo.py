"""The DPO recipe: every loss begins where theory says, the reference is computed once, and no launch changes the result."""

import json
import math
import os
import signal
from pathlib import Path

import numpy as np
import pytest
import torch
from datasets import Dataset
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from llm_recipes.adapters import whole_model
from tests.running import (
    DPO,
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

LN2 = math.log(2)
HELD_OUT = ("eval_loss", *(f"eval_rewards/{key}" for key in ("chosen", "rejected", "margins", "accuracies")))
ONCE = ["--precompute_ref_log_probs", "true"]
STEP = ["--max_steps", "1", "--save_steps", "1", "--eval_datasets", "[]", "--eval_fraction", "0"]
ANSWERS = ["--answers", "{path: builtin:arithmetic/test, rows: 4, difficulty: 1}", "--max_new_tokens", "8"]
LORA = ["--use_peft", "true", "--lora_r", "4", "--lora_target_modules", "[all-linear]"]
COMPUTING = "Computing reference log probs for"


@pytest.fixture(scope="module", autouse=True)
def stage(tmp_path_factory):
    """The folder that all tests here work in, each with an output_dir of its own."""
    folder = post_training_stage(tmp_path_factory.mktemp("dpo"))
    (folder / "recipes").symlink_to(ROOT / "recipes")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        yield folder


def dpo(out, *argv, model="chat", **options):
    given = ["--config", "tiny.yaml", "--output_dir", out, "--model_name_or_path", model]
    return run(*given, *argv, script=DPO, **options)


def trained(out, *argv, **options):
    done = dpo(out, *argv, **options)
    assert done.code == 0, done.err
    return done


@pytest.fixture(scope="module")
def one(stage):
    """16 pairs in batches of 8, three steps, and what it printed; the first run with this model."""
    return trained("one", *ONCE, *ANSWERS, "--per_device_eval_batch_size", "3")


def cached():
    """{file: (time written, [(log-prob of chosen, of rejected) of each pair])} of the reference."""
    found = {}
    for path in Path(os.environ["HF_DATASETS_CACHE"], "llm_recipes").glob("cache-*.arrow"):
        rows = Dataset.from_file(str(path))
        if rows.column_names == ["ref_chosen_logps", "ref_rejected_logps"]:
            pairs = list(zip(rows["ref_chosen_logps"], rows["ref_rejected_logps"], strict=True))
            found[path] = (path.stat().st_mtime_ns, pairs)
    return found


@torch.no_grad()
def by_hand(folder, rows):
    """Log-probs `(n, 2)` of the chosen and rejected answers, one conversation at a time."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    tokenizer, found = AutoTokenizer.from_pretrained("base"), []
    for row in rows:
        prompt = tokenizer(f"<|im_start|>user\n{row['prompt']}<|im_end|>\n<|im_start|>assistant\n")["input_ids"]
        for side in ("chosen", "rejected"):
            answer = tokenizer(row[side] + "<|im_end|>")["input_ids"]
            logps = model(torch.tensor([prompt + answer])).logits[0].log_softmax(-1)[len(prompt) - 1 : -1]
            found.append(logps.gather(1, torch.tensor(answer)[:, None]).sum().item())
    return np.array(found).reshape(-1, 2)


# ---- the first step ------------------------------------------------------------------------------


def first(folder):
    """Loss, margin and accuracy of the first step. With a cached reference, which other batches gave, a margin is zero
    up to rounding, and so the accuracy is anything."""
    row = history(folder)[0]
    return [row["loss"], row["rewards/margins"], row["rewards/accuracies"]]


def test_first_loss_is_ln_2(one):
    assert first("one")[:2] == [pytest.approx(LN2, abs=1e-6), pytest.approx(0, abs=1e-5)]
    assert abs(history("one")[1]["rewards/margins"]) > 1e-2


@pytest.mark.parametrize(
    ("loss", "options", "expected"),
    [
        ("ipo", [], (0 - 1 / (2 * 0.1)) ** 2),
        ("hinge", ["--ld_alpha", "0.5", *ONCE], 1),  # other log-probs than those in the cache, which must not be taken
        ("apo_zero", [], 1),
        ("robust", ["--label_smoothing", "0.1"], (0.9 * LN2 - 0.1 * LN2) / (1 - 2 * 0.1)),
    ],
)
def test_every_loss_begins_where_theory_says(one, loss, options, expected):
    """With the policy its own reference all log-ratios are 0; here mostly with the reference as a second model."""
    done = trained(loss, "--loss_type", f"[{loss}]", "--beta", "0.1", *options, *STEP, fault="count_parameters:1")
    assert first(loss)[:2] == [pytest.approx(expected, abs=1e-5), pytest.approx(0, abs=1e-5)]
    assert first(loss)[2] == 0 or ONCE[0] in options
    model = sum(weight.numel() for weight in load_file("chat/model.safetensors").values())
    assert f"parameters held: {model * (1 if ONCE[0] in options else 2)}\n" in done.out


def test_an_adapter_needs_no_second_model():
    """The reference is the model with the adapter switched off."""
    done = trained("lora", *LORA, *STEP, fault="count_parameters:1")
    assert first("lora") == [pytest.approx(LN2, abs=1e-6), 0, 0]
    model = sum(weight.numel() for weight in load_file("chat/model.safetensors").values())
    adapter = sum(weight.numel() for weight in load_file("lora/adapter_model.safetensors").values())
    assert f"parameters held: {model + adapter}\n" in done.out and not Path("lora/model.safetensors").exists()
    assert max(w.abs().max() for name, w in load_file("lora/adapter_model.safetensors").items() if "_B" in name) > 1e-3


# ---- the optimisation ----------------------------------------------------------------------------


def test_reference_is_that_of_plain_transformers_and_computed_once(one):
    """Log-probs within 1e-4; a second run reads them and says nothing of computing."""
    assert one.err.count(COMPUTING + " train") and one.err.count(COMPUTING + " eval")
    before = cached()
    expected = [sorted(map(tuple, by_hand("chat", read_rows(f"{name}.jsonl")))) for name in ("train", "held")]
    for pairs in expected:
        # the cache holds references of other tests, too
        candidates = [sorted(found) for _, found in before.values() if len(found) == len(pairs)]
        assert any(np.allclose(found, pairs, atol=1e-4) for found in candidates)
    done = trained("small", *ONCE, "--per_device_train_batch_size", "1", "--per_device_eval_batch_size", "1")
    assert COMPUTING not in done.err and cached() == before
    check_same_training("one", "small", *HELD_OUT)


def test_resume_after_sigterm_is_exact_to_the_bit(one):
    assert dpo("parts", *ONCE, *ANSWERS, fault=f"send_signal:2:{signal.SIGTERM.value}").code == 75
    trained("parts", *ONCE, *ANSWERS)
    assert Path("parts/model.safetensors").read_bytes() == Path("one/model.safetensors").read_bytes()


@pytest.mark.parametrize(("config", "shards", "size"), STRATEGIES)
def test_two_processes_learn_what_one_learns(one, config, shards, size):
    """And take the reference that the one has cached: its key is made of the weights, also where they are sharded."""
    argv = ["--config", "tiny.yaml", "--output_dir", config, "--model_name_or_path", "chat", *ONCE, *ANSWERS]
    done = launch(config, *argv, "--per_device_train_batch_size", size, script=DPO, fault=SHIMS.get(config, ""))
    assert done.code == 0, done.err[-3000:]
    assert f"{shards}, 2 processes, cpu, fp32" in done.out and COMPUTING not in done.err
    assert f"8 rows = 2 processes x {size} x {4 // size} accumulation" in done.out
    check_same_training("one", config, *HELD_OUT, "exact_match", "stopped", "answer_tokens")


def test_another_models_reference_is_not_taken(one):
    """Same data, same shape, other weights."""
    add_adapter("chat", "other")
    known = cached()
    trained("second", *ONCE, *STEP, model=whole_model("other"))
    assert first("second")[:2] == [pytest.approx(LN2, abs=1e-6), pytest.approx(0, abs=1e-5)]
    assert len(cached()) == len(known) + 1


def test_held_out_figures_are_those_of_the_saved_model(one):
    """Loss and rewards of DPO's paper, equation 7, from plain transformers, the saved folder and the start."""
    rows = read_rows("held.jsonl")
    rewards = 0.1 * (by_hand("one", rows) - by_hand("chat", rows))
    margins, found = rewards[:, 0] - rewards[:, 1], metrics("one")
    expected = [np.logaddexp(0, -margins).mean(), *rewards.mean(0), margins.mean(), (margins > 0).mean()]
    assert [found[key] for key in HELD_OUT] == pytest.approx(expected, abs=1e-5)
    assert np.abs(margins).max() > 0.1


def test_it_learns_to_prefer():
    """20 steps on the same 16 pairs: the loss falls to a third and the margin grows without end."""
    trained("long", *ONCE, *STEP[4:], "--max_steps", "20", "--save_steps", "20", "--learning_rate", "2e-3")
    rows = history("long")
    losses, margins = ([row[key] for row in rows] for key in ("loss", "rewards/margins"))
    assert losses[0] == pytest.approx(LN2, abs=1e-6) and np.mean(losses[-2:]) < LN2 / 3
    halves = [np.mean(margins[start : start + 5]) for start in range(0, 20, 5)]
    assert halves == sorted(halves) and halves[-1] > 1 and rows[-1]["rewards/accuracies"] == 1


def test_it_starts_from_base_and_adapter(stage):
    """From an SFT adapter that was not merged, at learning rate 0: what comes out is what went in."""
    add_adapter("chat", "sft")
    trained("still", *ONCE, *STEP, "--learning_rate", "0", model="sft")
    assert first("still")[0] == pytest.approx(LN2, abs=1e-6)
    start, base, still = (load_file(f"{f}/model.safetensors") for f in (whole_model("sft"), "chat", "still"))
    assert still.keys() == start.keys() and all(torch.equal(still[name], start[name]) for name in start)
    assert all(torch.equal(start[name], base[name]) != ("_proj" in name) for name in start)
    ids = torch.arange(300)[None]
    with torch.no_grad():
        peft = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained("chat"), "sft")(ids).logits
        assert (AutoModelForCausalLM.from_pretrained("still")(ids).logits - peft).abs().max() < 1e-4


# ---- bad input -----------------------------------------------------------------------------------

GOOD = {"prompt": "cat", "chosen": "red", "rejected": "a dog"}
BAD_ROWS = {
    "no column": ({"prompt": "cat", "rejected": "red"}, "has the columns prompt, rejected; needed: chosen and rejected. `columns: {ours: theirs}` renames them"),
    "no choice": (GOOD | {"rejected": "red"}, "no row is left to train on: 16 have the same chosen and rejected"),
    "no answer": (GOOD | {"rejected": " "}, "no row is left to train on: 16 have an empty answer"),
    "too long": (GOOD | {"chosen": "the dog sees a fish " * 50}, "no row is left to train on: 16 are longer than max_length 256"),
    "image": (GOOD | {"image": "cat.png"}, "has a column image: these recipes train on text alone"),
}  # fmt: skip
BAD_KEYS = {
    "context": (["--max_length", "513"], "max_length 513 is longer than the model's max_position_embeddings 512"),
    "merge": (["--merge", "true"], "merge: true needs an adapter: set use_peft: true"),
    "qlora": (["--use_peft", "true", "--load_in_4bit", "true"], "load_in_4bit needs an NVIDIA GPU: bitsandbytes' kernels are not made for training on the CPU"),
    "unknown": (["--bet", "1"], "command line: unknown key `bet`, did you mean `beta`?"),
    "refused": (["--truncation_mode", "keep_end"], "command line: `truncation_mode` is not taken: rows longer than max_length are left out and counted, not cut"),
}  # fmt: skip


@pytest.mark.parametrize("how", [*BAD_ROWS, *BAD_KEYS])
def test_bad_input_is_one_sentence(how):
    if how in BAD_ROWS:
        row, said = BAD_ROWS[how]
        argv = ["--datasets", json.dumps([{"path": write_rows("bad.jsonl", [row] * 16)}])]
    else:
        argv, said = BAD_KEYS[how]
    done = dpo("bad", *argv)
    assert done.code == 2 and not Path("bad").exists()
    (sentence,) = done.err.splitlines()
    assert sentence.endswith(said)


def test_the_stage_before_is_named(stage):
    """The YAML as shipped, in a folder where nothing was made yet."""
    done = run(script=DPO)
    said = "model_name_or_path: outputs/sft does not exist: run recipes/sft/run.py first\n"
    assert (done.code, done.err) == (2, said) and not Path("outputs").exists()
