import copy
import json
import math

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSequenceClassification

from llm_recipes.errors import RecipeExit
from llm_recipes.metrics import wilson
from llm_recipes.reward import check_saved, load_saved, plot, report, score, statistics
from llm_recipes.tokenization import train_tokenizer

PAD = 3
SIZES = {
    "llama": {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2},
    "gpt2": {"n_embd": 32, "n_layer": 2, "n_head": 2, "n_positions": 64},
}


def tiny_config(kind: str, **keys):
    # large weights, so that a wrong position or a wrong token shows
    return AutoConfig.for_model(kind, vocab_size=50, initializer_range=0.3, pad_token_id=PAD, **SIZES[kind], **keys)


@pytest.fixture(params=SIZES)
def model(request):
    torch.manual_seed(0)
    return AutoModelForSequenceClassification.from_config(tiny_config(request.param, num_labels=1))


def texts(n: int = 10) -> list[list[int]]:
    """`n` sequences of 1 to 19 tokens, none of them PAD."""
    rng = np.random.default_rng(0)
    return [rng.integers(PAD + 1, 50, rng.integers(1, 20)).tolist() for _ in range(n)]


def alone(model, tokens: list[int], at: int) -> float:
    """The referee: the head applied to one text's hidden state at position `at`, nothing padded or masked."""
    with torch.no_grad():
        hidden = copy.deepcopy(model).eval().base_model(input_ids=torch.tensor([tokens])).last_hidden_state
        return model.score(hidden)[0, at, 0].item()


def test_scores_do_not_depend_on_padding_or_batches(model):
    expected = [alone(model, tokens, -1) for tokens in texts()]
    assert np.std(expected) > 0.1
    long = [[7] * 40]  # in the first batch, so its rows get much padding
    for side in ("left", "right"):
        for size in (1, 3, 8):
            found = score(model, texts(), PAD, size, side)
            assert found.dtype == np.float64 and found == pytest.approx(expected, abs=1e-5)
        assert score(model, texts() + long, PAD, 11, side)[:-1] == pytest.approx(expected, abs=1e-5)


@pytest.mark.parametrize("side", ["left", "right"])
def test_the_pad_token_inside_a_text(model, side):
    """As with pad == eos: inside it is read as any token; at the end the score is that of the last other token."""
    inside = [[*tokens, PAD, PAD, *tokens] for tokens in texts()]
    expected = [alone(model, tokens, -1) for tokens in inside]
    ended = [[*tokens, *[PAD] * (1 + i % 3)] for i, tokens in enumerate(inside)]
    first = [[PAD, *tokens] for tokens in inside]  # pad == bos
    for size in (1, 3, 8):
        assert score(model, inside, PAD, size, side) == pytest.approx(expected, abs=1e-5)
        assert score(model, ended, PAD, size, side) == pytest.approx(expected, abs=1e-5)
        assert score(model, first, PAD, size, side) == pytest.approx([alone(model, t, -1) for t in first], abs=1e-5)


def test_score_refuses_what_transformers_would_misread(model):
    with pytest.raises(ValueError, match="pad_token_id is 3, not 4"):
        score(model, [[5, 6]], 4, 2)
    for tokens in ([], [PAD, PAD]):
        with pytest.raises(ValueError, match="empty or only padding"):
            score(model, [[5, 6], tokens], PAD, 2)
    model.config.pad_token_id = None
    with pytest.raises(ValueError, match="is None"):
        score(model, [[5, 6]], PAD, 2)


def test_score_leaves_the_model_as_it_was_and_ignores_autocast(model, monkeypatch):
    """The Trainer's model computes in bf16 under autocast: its outputs are multiples of 2^-8 or coarser near 1."""
    expected = score(model, texts(), PAD, 4)
    monkeypatch.setattr(model.config, "use_cache", False)
    AcceleratorState._reset_state(reset_partial_state=True)  # of tests before this one, which had another precision
    Accelerator(mixed_precision="bf16", cpu=True).prepare_model(model)
    forward, original = model.forward, model._original_forward
    model.train()
    assert (score(model, texts(), PAD, 4) == expected).all()
    assert model.training and model.score.training
    assert model.forward == forward and model._original_forward == original
    model.eval()
    ids = torch.tensor([texts()[0]])
    with torch.no_grad():
        rounded = model(input_ids=ids).logits
    assert (rounded == rounded.bfloat16().float()).all() and rounded.item() != expected[0]
    score(model, [[5]], PAD, 1)
    assert not model.training
    AcceleratorState._reset_state(reset_partial_state=True)


def test_report_by_hand():
    """Margins L, -L, 0, 2L with L = ln 3: P(chosen) = 3/4, 1/4, 1/2, 9/10."""
    L = math.log(3)
    found = report([L, 0, 1, 2 * L], [0, L, 1, 0], [2, 2, 3, 4], [4, 4, 3, 2])
    bins = found.pop("reliability")
    low, high = wilson(2, 4)
    # Scores L 0 1 2L 0 L 1 0, lengths less their mean of 3: -1 -1 0 1 1 1 0 -1. Sum of products 2L, of
    # squared lengths 6, of squared scores 6L^2 + 2 less 8 ((4L + 2) / 8)^2.
    correlation = 2 * L / math.sqrt(6 * (6 * L**2 + 2 - (2 * L + 1) ** 2 / 2))
    assert found == pytest.approx(
        {
            "n": 4,
            "accuracy": 0.5,
            "accuracy_low": low,
            "accuracy_high": high,
            "ties": 1,
            "log_loss": math.log(4 / 3 * 4 * 2 * 10 / 9) / 4,
            "margin_mean": L / 2,
            "margin_std": math.sqrt(1.25) * L,  # (1 + 1 + 0 + 4) L^2 / 4 - L^2 / 4
            "margin_p05": -0.85 * L,  # of -L 0 L 2L at 0.05 * 3 steps
            "margin_p25": -0.25 * L,
            "margin_p50": 0.5 * L,
            "margin_p75": 1.25 * L,
            "margin_p95": 1.85 * L,
            "brier": (1 / 16 + 9 / 16 + 1 / 4 + 1 / 100) / 4,
            "ece": (2 * (0.75 - 0.5) + (0.5 - 0) + (1 - 0.9)) / 4,
            "score_length_correlation": correlation,
            "accuracy_chosen_shorter": 0.5,
            "n_chosen_shorter": 2,
            "accuracy_chosen_longer": 1.0,
            "n_chosen_longer": 1,
        }
    )
    assert [row["n"] for row in bins] == [1, 2, 1]
    assert [row["confidence"] for row in bins] == pytest.approx([0.5, 0.75, 0.9])
    assert [row["accuracy"] for row in bins] == [0, 0.5, 1]
    json.dumps(found | {"reliability": bins}, allow_nan=False)


def test_wilson():
    """Textbook: 8 of 10 give 0.4902 to 0.9433; none of n end at z^2 / (n + z^2)."""
    assert wilson(8, 10) == pytest.approx((0.4902, 0.9433), abs=5e-5)
    assert wilson(0, 10) == pytest.approx((0, 1.96**2 / (10 + 1.96**2)), abs=1e-4)
    low, high = wilson(7, 20)  # its bounds are the shares p that lie 1.96 of their own standard errors from 7/20
    for p in (low, high):
        assert abs(0.35 - p) == pytest.approx(1.959964 * math.sqrt(p * (1 - p) / 20))


def test_calibration_by_brute_force():
    margins = np.random.default_rng(1).normal(0.5, 2, 300)
    found = report(margins, np.zeros(300), np.ones(300), np.ones(300))
    ece = brier = loss = 0
    for i in range(15):
        low, high = 0.5 + i / 30, 0.5 + (i + 1) / 30
        rows = [m for m in margins if low < 1 / (1 + math.exp(-abs(m))) <= high]
        ece += abs(sum((m > 0) - 1 / (1 + math.exp(-abs(m))) for m in rows)) / 300
    for m in margins:
        p = 1 / (1 + math.exp(-m))
        brier, loss = brier + (p - 1) ** 2 / 300, loss - math.log(p) / 300
    assert (found["ece"], found["brier"], found["log_loss"]) == pytest.approx((ece, brier, loss))
    assert sum(row["n"] for row in found["reliability"]) == 300


def test_a_calibrated_model_has_no_calibration_error():
    """Winners drawn with P = sigmoid(margin). A bin of m pairs errs by at most 1 / (2 sqrt(m)) in the mean;
    over 15 bins of n pairs that sums to at most sqrt(15 / n) / 2 (Cauchy-Schwarz): 0.0043."""
    n, rng = 200_000, np.random.default_rng(2)
    margins = rng.normal(0, 2, n)
    margins *= np.where(rng.random(n) < 1 / (1 + np.exp(-margins)), 1, -1)
    sides = [np.zeros(n), np.ones(n), np.ones(n)]
    found = report(margins, *sides)
    assert found["ece"] < math.sqrt(15 / n) / 2
    # then E[(P - 1)^2] is E[P (1 - P)], and the mean confidence is the accuracy
    confidence = 1 / (1 + np.exp(-np.abs(margins)))
    assert found["brier"] == pytest.approx(np.mean(confidence * (1 - confidence)), abs=0.003)
    assert found["accuracy"] == pytest.approx(confidence.mean(), abs=0.004)
    assert found["accuracy_low"] < confidence.mean() < found["accuracy_high"]
    assert report(3 * margins, *sides)["ece"] > 0.1  # too sure of itself


def test_report_of_constants_and_extremes():
    ties = report([2.0] * 3, [2.0] * 3, [5, 5, 5], [5, 5, 5])
    assert ties["ties"] == 3 and ties["accuracy"] == 0 and ties["accuracy_low"] == pytest.approx(0)
    assert ties["log_loss"] == pytest.approx(math.log(2)) and ties["ece"] == 0.5 and ties["brier"] == 0.25
    for key in ("score_length_correlation", "accuracy_chosen_shorter", "accuracy_chosen_longer"):
        assert ties[key] is None
    assert ties["n_chosen_shorter"] == ties["n_chosen_longer"] == 0
    extreme = report([2e3, -2e3], [0, 0], [1, 2], [3, 4])
    assert (extreme["log_loss"], extreme["brier"], extreme["ece"]) == pytest.approx((1000, 0.5, 0.5))
    json.dumps([ties, extreme], allow_nan=False)


def test_nothing_to_judge_is_said():
    with pytest.raises(RecipeExit, match="no held-out pairs"):
        report([], [], [], [])
    with pytest.raises(RecipeExit, match="1 of 2 pairs are not finite"):
        report([1, math.nan], [0, 0], [1, 1], [1, 1])
    with pytest.raises(ValueError, match="differ in number"):
        report([1, 2], [0, 0], [1], [1, 1])
    for scores in ([], [1, math.inf]):
        with pytest.raises(RecipeExit, match="cannot be normalised"):
            statistics(scores)


def test_statistics_divide_by_n():
    assert statistics([1, 3]) == {"score_mean": 2, "score_std": 1}


def test_plot(tmp_path):
    margins = np.random.default_rng(0).normal(1, 1, 100)
    plot(report(margins, np.zeros(100), np.ones(100), np.ones(100)), margins, tmp_path / "a.png")
    plot(report([1.0], [1.0], [1], [1]), [0.0], tmp_path / "b.png")
    assert (tmp_path / "a.png").stat().st_size > 10_000 < (tmp_path / "b.png").stat().st_size


def check(folder, model):
    expected = score(model, texts(), PAD, 4)
    return check_saved(folder, load_saved(folder, model), texts(), expected, PAD, 4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_check_saved_finds_another_head(model, tmp_path, dtype):
    model.save_pretrained(tmp_path)
    model = AutoModelForSequenceClassification.from_pretrained(tmp_path, dtype=dtype).train()
    model.save_pretrained(tmp_path)
    assert check(tmp_path, model) < (1e-5 if dtype == torch.float32 else 2e-2)
    assert model.dtype == dtype and model.training
    weights = load_file(tmp_path / "model.safetensors")
    head = weights.pop("score.weight")
    save_file(weights | {"score.weight": head.roll(1)}, tmp_path / "model.safetensors", {"format": "pt"})
    with pytest.raises(RecipeExit, match="is not the one that was trained"):
        check(tmp_path, model)
    save_file(weights, tmp_path / "model.safetensors", {"format": "pt"})  # transformers draws a new one
    with pytest.raises(RecipeExit, match="was the score head saved"):
        check(tmp_path, model)


def test_check_saved_of_an_adapter(tmp_path):
    """The base model is a causal LM without head or pad token, as on the Hub."""
    torch.manual_seed(0)
    config = tiny_config("llama")
    config.pad_token_id, config.vocab_size = None, 290
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path / "base")
    tokenizer = train_tokenizer([{"text": f"one two three {i}"} for i in range(50)], 290)
    tokenizer.pad_token = tokenizer.convert_ids_to_tokens(PAD)
    tokenizer.save_pretrained(tmp_path / "base")
    base = AutoModelForSequenceClassification.from_pretrained(tmp_path / "base", num_labels=1)
    base.config.pad_token_id = PAD  # as RewardTrainer does
    lora = LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False, task_type="SEQ_CLS")
    model, folder = get_peft_model(base, lora), tmp_path / "adapter"
    model.save_pretrained(folder)
    assert check(folder, model) < 1e-5
    weights = load_file(folder / "adapter_model.safetensors")
    weights["base_model.model.score.weight"] += 0.1
    save_file(weights, folder / "adapter_model.safetensors", {"format": "pt"})
    with pytest.raises(RecipeExit, match="was the score head saved"):
        check(folder, model)
    del weights["base_model.model.score.weight"]
    save_file(weights, folder / "adapter_model.safetensors", {"format": "pt"})
    with pytest.raises(RecipeExit, match=r"does not load: KeyError: .*score"):
        check(folder, model)
