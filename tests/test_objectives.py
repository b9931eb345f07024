import math
from collections import Counter
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch.nn.functional import cross_entropy
from transformers import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForMaskedLM,
    AutoModelForSeq2SeqLM,
    AutoTokenizer,
    DataCollatorForLanguageModeling,
    PreTrainedTokenizerFast,
    Trainer,
    TrainingArguments,
)

from llm_recipes.config import ObjectiveConfig
from llm_recipes.errors import UserError
from llm_recipes.objectives import (
    architecture_for,
    causal,
    collate,
    exact_loss,
    example_lengths,
    make_objective,
    masked,
    objective_problems,
    prefix,
    prepare_tokenizer,
    span_corruption,
    span_counts,
)
from llm_recipes.probes import check_isolation, check_prefix
from llm_recipes.tokenization import train_tokenizer

EOS = 1
SIZES = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
LLAMA = {"model_type": "llama", **SIZES}
T5 = {"model_type": "t5", "d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 1, "num_heads": 4, "dropout_rate": 0.0,
      "decoder_start_token_id": 0}  # fmt: skip
BERT = {"model_type": "bert", **SIZES, "hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
MIXTRAL = {**LLAMA, "model_type": "mixtral", "num_key_value_heads": 2, "num_local_experts": 4}


@pytest.fixture
def tokenizer():
    return train_tokenizer([{"text": "ab" * 50 + "".join(map(chr, range(32, 127)))}], 272)


def rng(*seed):
    return np.random.default_rng(seed)


def config_of(keys):
    keys = {"vocab_size": 64, "bos_token_id": None, "eos_token_id": EOS, **keys}
    return AutoConfig.for_model(keys.pop("model_type"), **keys)


def model_of(keys, objective="causal", attn="sdpa"):
    """Weights ten times as large as usual, so that what is wrong shows."""
    torch.manual_seed(0)
    model = architecture_for(objective)[1].from_config(config_of(keys), attn_implementation=attn).eval()
    with torch.no_grad():
        [parameter.mul_(10) for parameter in model.parameters() if parameter.ndim > 1]
    return model


def ids(n, seed=0, low=5, high=60):
    return rng(seed).integers(low, high, n).astype(np.int32)


@torch.no_grad()
def logits(model, **inputs):
    return model(**inputs, **({} if "use_cache" in inputs else {"use_cache": False})).logits


# ---- causal --------------------------------------------------------------------------------------


def test_causal_by_hand():
    window = np.array([7, 8, EOS, 9, EOS, EOS, 5, 6], dtype=np.int32)
    assert set(causal(window, rng(0))) == {"input_ids", "labels"}
    batch = collate([causal(window, rng(0), eos_id=EOS)] * 2)
    assert batch["input_ids"].tolist() == batch["labels"].tolist() == [window.tolist()] * 2
    assert batch["position_ids"].tolist() == [[0, 1, 0, 1, 0, 0, 1, 2]] * 2
    assert all(value.dtype == torch.int64 for value in batch.values())
    assert causal(window[2:], rng(0), eos_id=EOS)["position_ids"].tolist() == [0, 1, 0, 0, 1, 2]


@pytest.mark.parametrize("attn", ["sdpa", "eager"])
def test_isolated_attention_is_exactly_that_of_the_documents(attn):
    """Entry (q, k): changing token k changes the logits at q. The lower triangle, within runs of positions."""
    model, window = model_of(LLAMA, attn=attn), np.array([7, 8, EOS, 9, EOS, 5, 6, 4], dtype=np.int32)
    batch = collate([causal(window, rng(0), eos_id=EOS), causal(window[::-1].copy(), rng(0), eos_id=EOS)])
    inputs = {key: batch[key] for key in ("input_ids", "position_ids")}
    before, looks = logits(model, **inputs), torch.zeros(8, 8, dtype=torch.bool)
    for k in range(8):
        changed = inputs["input_ids"].clone()
        changed[:, k] += 20
        looks[:, k] = (logits(model, **inputs | {"input_ids": changed}) != before)[0].any(-1)
    document = torch.tensor([0, 0, 1, 1, 2, 2, 2, 2])
    assert torch.equal(looks, (document[:, None] == document) & torch.ones(8, 8).tril().bool())
    start = 0
    for size in (2, 2, 4):  # and the logits are those of the document alone
        alone = logits(model, input_ids=batch["input_ids"][:1, start : start + size])
        torch.testing.assert_close(before[:1, start : start + size], alone, rtol=0, atol=1e-4)
        start += size


@pytest.mark.parametrize("trap", [{"attention_mask": torch.ones(1, 8, dtype=torch.long)}, {"use_cache": True}])
def test_a_mask_of_ones_or_a_cache_would_let_documents_see_each_other(trap):
    model, window = model_of(LLAMA), np.array([7, 8, 9, EOS, 5, 6, 4, 3], dtype=np.int32)
    batch = collate([causal(window, rng(0), eos_id=EOS)])
    inputs = {key: batch[key] for key in ("input_ids", "position_ids")}
    changed = inputs | {"input_ids": inputs["input_ids"].clone()}
    changed["input_ids"][0, 0] = 30
    assert torch.equal(logits(model, **inputs)[:, 3:], logits(model, **changed)[:, 3:])
    assert (logits(model, **inputs, **trap)[:, 3:] - logits(model, **changed, **trap)[:, 3:]).abs().max() > 0.01


def test_the_trainer_switches_the_cache_off(tmp_path):
    model = model_of(LLAMA)
    assert model.config.use_cache
    Trainer(model, TrainingArguments(str(tmp_path), use_cpu=True, report_to=[]))
    assert not model.config.use_cache


LAYERS = ["sliding_attention", "sliding_attention", "sliding_attention", "full_attention"]
ISOLATES = [
    LLAMA, {**LLAMA, "model_type": "gpt_neox"}, MIXTRAL, {**LLAMA, "model_type": "qwen3", "num_key_value_heads": 2, "head_dim": 8},
    {**LLAMA, "model_type": "mistral", "num_key_value_heads": 2, "sliding_window": 100},
    {**LLAMA, "model_type": "gemma3_text", "head_dim": 8, "num_hidden_layers": 4, "layer_types": LAYERS},
    {"model_type": "gpt2", "n_embd": 32, "n_layer": 2, "n_head": 4},
]  # fmt: skip
LINEAR = {"linear_num_key_heads": 2, "linear_num_value_heads": 4, "linear_key_head_dim": 8, "linear_value_head_dim": 8,
          "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16, "head_dim": 8, "num_key_value_heads": 2,
          "shared_expert_intermediate_size": 16}  # fmt: skip
LEAKS = [
    {"model_type": "bloom", "hidden_size": 32, "n_layer": 2, "n_head": 4},
    {"model_type": "opt", "hidden_size": 32, "ffn_dim": 48, "num_hidden_layers": 2, "num_attention_heads": 4, "word_embed_proj_dim": 32},
    {"model_type": "falcon", "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4},
    {"model_type": "mpt", "d_model": 32, "n_layers": 2, "n_heads": 4},
    {"model_type": "mamba", "hidden_size": 32, "num_hidden_layers": 2},
    {**LLAMA, "model_type": "qwen3_next", "num_hidden_layers": 3, **LINEAR,  # the leak is in the last layer alone
     "layer_types": ["full_attention", "full_attention", "linear_attention"]},
]  # fmt: skip


def name(keys):
    return keys["model_type"]


@pytest.mark.parametrize("keys", ISOLATES, ids=name)
@pytest.mark.parametrize("attn", ["sdpa", "eager", None])
def test_architectures_that_isolate(keys, attn):
    config, state = config_of(keys), torch.get_rng_state()
    before = config.to_dict()
    check_isolation(config, attn)
    assert torch.equal(torch.get_rng_state(), state) and config.to_dict() == before


@pytest.mark.parametrize("keys", LEAKS, ids=name)
def test_architectures_that_leak_are_refused(keys):
    with pytest.raises(
        UserError, match=f"^isolate_documents: {keys['model_type']} with attn_implementation left"
    ) as error:
        check_isolation(config_of(keys), None)
    assert str(error.value).endswith("set it to false")  # it ran, and leaked


@pytest.mark.parametrize(("keys", "attn"), [(LLAMA, "flash_attention_2"), (LLAMA, "nonsense"), (LEAKS[0], "sdpa")])
def test_attention_that_cannot_be_tried_is_refused(keys, attn):
    with pytest.raises(
        UserError, match=rf"{keys['model_type']} with attn_implementation {attn} cannot be tried \(.+\): use"
    ) as error:
        check_isolation(config_of(keys), attn)
    assert "\n" not in str(error.value)
    with pytest.raises(UserError, match=r"objective prefix: .* cannot be tried .* use sdpa"):
        check_prefix(config_of(keys), attn, 16)


# ---- prefix --------------------------------------------------------------------------------------


def test_prefix_by_hand():
    batch = collate([prefix(np.array([5, 6, 7, 8], dtype=np.int32), rng(0), split=2)] * 3)
    assert batch["labels"][0].tolist() == [-100, -100, 7, 8] and batch["input_ids"][0].tolist() == [5, 6, 7, 8]
    assert batch["attention_mask"].shape == (3, 1, 4, 4) and batch["attention_mask"].dtype == torch.bool
    assert batch["attention_mask"][0, 0].int().tolist() == [[1, 1, 0, 0], [1, 1, 0, 0], [1, 1, 1, 0], [1, 1, 1, 1]]


def test_prefix_splits_uniformly_and_held_out_windows_in_the_middle(tokenizer):
    """9 splits, 9,000 draws: chi-square with 8 degrees of freedom is below 26.1 in 999 of 1,000 cases."""
    config = ObjectiveConfig("prefix")
    train, held_out = (make_objective(config, tokenizer, 10, held_out=flag) for flag in (False, True))
    counts = Counter(int((train(ids(10), rng(0, i))["labels"] == -100).sum()) for i in range(9000))
    assert set(counts) == set(range(1, 10)) and sum((n - 1000) ** 2 / 1000 for n in counts.values()) < 26.1
    assert {int((held_out(ids(10), rng(0, i))["labels"] == -100).sum()) for i in range(20)} == {5}


@pytest.mark.parametrize("keys", [LLAMA, ISOLATES[-1], ISOLATES[4]], ids=name)
def test_prefix_attention_and_loss(keys):
    model, split = model_of(keys), 4
    batch = collate([prefix(ids(10), None, split=split)])
    inputs = {key: batch[key] for key in ("input_ids", "attention_mask")}
    before, looks = logits(model, **inputs), torch.zeros(10, 10, dtype=torch.bool)
    for k in range(10):
        changed = inputs["input_ids"].clone()
        changed[0, k] = 61
        looks[:, k] = (logits(model, **inputs | {"input_ids": changed}) != before)[0].any(-1)
    assert torch.equal(looks, batch["attention_mask"][0, 0])
    by_hand = [cross_entropy(before[0, i - 1], batch["input_ids"][0, i]) for i in range(split, 10)]
    torch.testing.assert_close(model(**batch).loss, torch.stack(by_hand).mean())


def test_prefix_needs_attention_that_obeys_its_mask():
    for keys in (LLAMA, ISOLATES[-1], MIXTRAL):
        check_prefix(config_of(keys), None, 16)
        check_prefix(config_of(keys), "sdpa", 16)
        with pytest.raises(UserError, match="does not obey the mask: use sdpa"):
            check_prefix(config_of(keys), "eager", 16)
    sliding = config_of(ISOLATES[4])
    check_prefix(sliding, None, 100)
    with pytest.raises(UserError, match="its mask would override sliding_window 100: raise it to 101"):
        check_prefix(sliding, None, 101)
    for keys in ({"model_type": "mamba2", "hidden_size": 32, "num_hidden_layers": 2, "num_heads": 8, "head_dim": 8, "n_groups": 1},
                 {"model_type": "gpt_neo", "hidden_size": 32, "num_layers": 2, "num_heads": 4, "attention_types": [[["global"], 2]]}):  # fmt: skip
        with pytest.raises(UserError, match="does not obey the mask"):  # it runs, and ignores the mask
            check_prefix(config_of(keys), None, 16)


# ---- masked --------------------------------------------------------------------------------------

PLAIN = np.arange(5, 60)


def mask(window, *seed, density=0.15):
    return masked(window, rng(*seed), mask_id=3, plain_ids=PLAIN, density=density)


def test_masked_by_hand():
    window = np.array([EOS, 9, EOS, 8, EOS, 7], dtype=np.int32)
    seen = set()
    for i in range(300):
        batch = mask(window, i, density=0.9)  # 5 targets asked for, 3 tokens are not special
        assert batch["labels"].tolist() == [-100, 9, -100, 8, -100, 7]
        assert batch["input_ids"][[0, 2, 4]].tolist() == [EOS] * 3 and set(batch["input_ids"][1::2]) <= {3, *PLAIN}
        seen.add(int(batch["input_ids"][1]))
    assert {3, 9} < seen and window.tolist() == [EOS, 9, EOS, 8, EOS, 7]
    only_special = mask(np.full(20, EOS, dtype=np.int32), 0)
    assert (only_special["labels"] == EOS).sum() == 3


@pytest.mark.parametrize(
    ("length", "density", "count"), [(64, 0.15, 10), (2, 0.15, 1), (100, 0.4, 40), (512, 0.15, 77)]
)
def test_masked_counts_are_exact(length, density, count):
    for i in range(50):
        window = ids(length, i)
        batch = mask(window, i, density=density)
        targets = batch["labels"] != -100
        assert targets.sum() == count and np.array_equal(batch["labels"][targets], window[targets])
        assert np.array_equal(batch["input_ids"][~targets], window[~targets])


def test_masked_frequencies():
    """200,000 targets; each share is within 4.5 standard deviations, which 1 run in 100,000 would miss."""
    window, n = ids(1000), 0
    kinds, swapped, places = Counter(), Counter(), np.zeros(1000)
    for i in range(1000):
        batch = mask(window, 1, i, density=0.2)
        at = np.flatnonzero(batch["labels"] != -100)
        got, true, n = batch["input_ids"][at], window[at], n + len(at)
        places[at] += 1
        kinds.update(np.where(got == 3, "mask", np.where(got == true, "kept", "random")).tolist())
        swapped.update(got[(got != 3) & (got != true)].tolist())
    assert n == 200_000
    same = 0.1 / len(PLAIN)  # the random id is the token itself
    for kind, share in (("mask", 0.8), ("random", 0.1 - same), ("kept", 0.1 + same)):
        assert abs(kinds[kind] - n * share) < 4.5 * math.sqrt(n * share * (1 - share))
    assert set(swapped) == set(PLAIN.tolist())
    assert np.abs(places - 200).max() < 5 * math.sqrt(1000 * 0.2 * 0.8)  # every place alike


def test_masked_means_the_same_as_in_transformers(tokenizer):
    """Referee: undoing the labels gives the window back, and what is no target is untouched and -100."""
    config = ObjectiveConfig("masked")
    prepare_tokenizer(tokenizer, config, 64)
    window = ids(64, low=20, high=len(tokenizer) - 1)
    ours = collate([make_objective(config, tokenizer, 64)(window, rng(0))])
    theirs = DataCollatorForLanguageModeling(tokenizer, mlm_probability=0.15, seed=0)([{"input_ids": window.tolist()}])
    for batch in (ours, theirs):
        restored = torch.where(batch["labels"] == -100, batch["input_ids"], batch["labels"])
        assert restored[0].tolist() == window.tolist()
        assert (batch["input_ids"] == tokenizer.mask_token_id).any() and batch["labels"].dtype == torch.int64
        assert not ((batch["input_ids"] == tokenizer.mask_token_id) & (batch["labels"] == -100)).any()


def test_masked_never_touches_special_tokens(tokenizer):
    config = ObjectiveConfig("masked", noise_density=0.5)
    prepare_tokenizer(tokenizer, config, 64)
    objective, special = make_objective(config, tokenizer, 64), tokenizer.all_special_ids
    for i in range(100):
        batch = objective(ids(64, i, low=0, high=len(tokenizer)), rng(i))
        assert not np.isin(batch["labels"], special).any()
        was_target = batch["labels"] != -100
        new = batch["input_ids"][was_target]
        assert not np.isin(new[new != tokenizer.mask_token_id], special).any()


# ---- span corruption -----------------------------------------------------------------------------

SENTINELS = list(range(1000, 1200))


def corrupt(window, seed, density=0.15, mean=3.0):
    options = {"sentinels": SENTINELS, "eos_id": EOS, "density": density, "mean_length": mean}
    return span_corruption(window, rng(seed), **options)


def restore(example):
    """The window, from inputs and labels; and its spans."""
    assert example["input_ids"][-1] == example["labels"][-1] == EOS
    spans, window = [], []
    for token in example["labels"][:-1].tolist():
        spans.append([]) if token >= 1000 else spans[-1].append(token)
    marks = [t for t in example["input_ids"].tolist() if t >= 1000]
    assert marks == [t for t in example["labels"].tolist() if t >= 1000] == SENTINELS[: len(spans)]
    for token in example["input_ids"][:-1].tolist():
        window += spans[token - 1000] if token >= 1000 else [token]
    return window, spans


def test_span_corruption_by_hand():
    """4 tokens, 2 of them noise in one span: 'a b <0>' from 'a b c d', the only way to segment."""
    example = corrupt(np.array([5, 6, 7, 8], dtype=np.int32), 0, density=0.5, mean=2.0)
    assert example["input_ids"].tolist() == [5, 6, 1000, EOS] and example["labels"].tolist() == [1000, 7, 8, EOS]
    example = corrupt(np.array([5, 6, 7, 8], dtype=np.int32), 0, density=0.5, mean=1.0)
    assert example["input_ids"].tolist() == [5, 1000, 7, 1001, EOS]
    assert example["labels"].tolist() == [1000, 6, 1001, 8, EOS]


@pytest.mark.parametrize(
    ("length", "density", "mean", "noise", "spans"),
    [(512, 0.15, 3.0, 77, 26), (114, 0.15, 3.0, 17, 6), (568, 0.15, 3.0, 85, 28),  # 568 in 512 inputs, 114 targets: T5
     (2, 0.15, 3.0, 1, 1), (2, 0.9, 1.0, 1, 1), (10, 0.9, 1.0, 9, 1), (64, 0.5, 3.0, 32, 11), (9, 0.01, 3.0, 1, 1)],
)  # fmt: skip
def test_span_corruption_is_undone_and_has_the_promised_size(length, density, mean, noise, spans):
    assert span_counts(length, density, mean) == (noise, spans)
    config = ObjectiveConfig("span_corruption", noise_density=density, mean_span_length=mean)
    sizes = example_lengths(config, length)
    assert sizes == (length - noise + spans + 1, noise + spans + 1)
    for seed in range(40):
        window = ids(length, seed)
        example = corrupt(window, seed, density, mean)
        restored, got = restore(example)
        assert restored == window.tolist() and (len(example["input_ids"]), len(example["labels"])) == sizes
        assert len(got) == spans and sum(map(len, got)) == noise and all(got)
        assert example["input_ids"][0] < 1000 and example["input_ids"][-2] >= 1000  # starts with text, ends with a span


def test_lengths_of_t5():
    """T5 draws 568 tokens for 512 inputs and 114 targets (`compute_input_and_target_lengths`)."""
    assert example_lengths(ObjectiveConfig("span_corruption"), 568) == (512, 114)
    assert example_lengths(ObjectiveConfig("masked"), 568) == (568, None)


def test_segmentations_are_uniform():
    """12 tokens with 5 noise tokens in 3 spans: C(4, 2) x C(6, 2) = 90 corruptions, 18,000 draws.

    Chi-square with 89 degrees of freedom is below 135.98 in 999 of 1,000 cases.
    """
    window = np.arange(5, 17, dtype=np.int32)
    counts = Counter(
        tuple(corrupt(window, seed, density=5 / 12, mean=5 / 3)["labels"].tolist()) for seed in range(18000)
    )
    assert len(counts) == 90 and sum((n - 200) ** 2 / 200 for n in counts.values()) < 135.98


def test_t5_makes_its_decoder_inputs_from_the_labels():
    model = model_of({**T5, "vocab_size": 1200}, "span_corruption")
    batch = collate([corrupt(ids(16), 0)])
    shifted = torch.cat([torch.zeros(1, 1, dtype=torch.long), batch["labels"][:, :-1]], dim=1)
    out = model(**batch)
    assert torch.equal(out.logits, model(input_ids=batch["input_ids"], decoder_input_ids=shifted).logits)
    torch.testing.assert_close(out.loss, cross_entropy(out.logits[0], batch["labels"][0]))


# ---- tokenizers, configuration, chance -----------------------------------------------------------


def bare_tokenizer(trained):
    """As a stranger's: nothing special but the end, and one sentinel."""
    stranger = PreTrainedTokenizerFast(tokenizer_object=trained.backend_tokenizer, eos_token=trained.eos_token)
    stranger.add_special_tokens({"extra_special_tokens": ["<extra_id_0>"]})
    return stranger


@pytest.mark.parametrize("stranger", [False, True])
def test_tokens_are_added_once_and_saved(tokenizer, tmp_path, stranger):
    tokenizer = bare_tokenizer(tokenizer) if stranger else tokenizer
    before, special = tokenizer.get_vocab(), tokenizer.all_special_ids
    prepare_tokenizer(tokenizer, ObjectiveConfig("causal"), 512)
    prepare_tokenizer(tokenizer, ObjectiveConfig("prefix"), 512)
    assert tokenizer.get_vocab() == before
    for _ in range(2):
        prepare_tokenizer(tokenizer, ObjectiveConfig("masked"), 512)
        prepare_tokenizer(tokenizer, ObjectiveConfig("span_corruption"), 512)
        assert len(tokenizer) == len(before) + 27 - stranger
    sentinels = [f"<extra_id_{i}>" for i in range(26)]
    tokenizer.save_pretrained(tmp_path)
    for now in (tokenizer, AutoTokenizer.from_pretrained(tmp_path)):
        assert now.mask_token == "<|mask|>" and {**before, **now.get_vocab()} == now.get_vocab()
        new = now.convert_tokens_to_ids(["<|mask|>", *sentinels])
        assert len({*new, *before.values()}) == len(now) and {*special, *new} == set(now.all_special_ids)
        assert now.decode([new[0], new[3]]) == "<|mask|><extra_id_2>"
        assert now.decode([new[0], new[3]], skip_special_tokens=True) == ""
        make_objective(ObjectiveConfig("span_corruption"), now, 512)(ids(512), rng(0))


def test_a_mask_token_that_is_there_stays(tokenizer):
    tokenizer.add_special_tokens({"mask_token": "[MASK]"})
    size = len(tokenizer)
    prepare_tokenizer(tokenizer, ObjectiveConfig("masked"), 64)
    assert tokenizer.mask_token == "[MASK]" and len(tokenizer) == size


@pytest.mark.parametrize("objective", ["causal", "prefix", "masked", "span_corruption"])
@pytest.mark.parametrize("held_out", [False, True])
def test_examples_depend_on_window_and_generator_alone(tokenizer, objective, held_out):
    config = ObjectiveConfig(objective, isolate_documents=objective == "causal")
    prepare_tokenizer(tokenizer, config, 64)
    make = make_objective(config, tokenizer, 64, held_out)
    windows = [ids(64, i, low=20, high=200) for i in range(4)]
    rows = [make(window, rng(7, i)) for i, window in enumerate(windows)]
    np.random.seed(1)
    torch.manual_seed(1)
    for i in (3, 1):
        again = make(windows[i], rng(7, i))
        assert again.keys() == rows[i].keys() and all(np.array_equal(again[key], rows[i][key]) for key in again)
    batch = collate(rows)
    target = example_lengths(config, 64)
    assert batch["input_ids"].shape == (4, target[0]) and batch["labels"].shape == (4, target[1] or 64)
    assert ("position_ids" in batch) == (objective == "causal")
    if held_out or objective != "prefix":
        assert len({int((row["labels"] != -100).sum()) for row in rows}) == 1


def test_problems_of_a_configuration():
    args = SimpleNamespace(use_liger_kernel=False, label_smoothing_factor=0.0)
    for config in (ObjectiveConfig(), ObjectiveConfig(isolate_documents=True), ObjectiveConfig("masked", 0.3)):
        assert objective_problems(config, args, {"noise_density"} if config.objective == "masked" else ()) == []
    args = SimpleNamespace(use_liger_kernel=True, label_smoothing_factor=0.1)
    config = ObjectiveConfig("masked", 1.0, 0.5, True, -1.0)
    assert objective_problems(config, args, {"noise_density", "mean_span_length", "z_loss"}) == [
        "noise_density 1.0 is not between 0 and 1",
        "mean_span_length 0.5 is below 1 token",
        "z_loss -1.0 is below 0",
        "z_loss needs logits, which use_liger_kernel does not make: set one of them",
        "label_smoothing_factor: losses here are cross-entropies in nats, in evaluation too: remove it",
        "mean_span_length means nothing for objective masked: remove it",
        "isolate_documents: only objective causal can, not masked",
    ]


def test_architectures_of_objectives():
    assert (
        architecture_for("causal") == architecture_for("prefix") == (MODEL_FOR_CAUSAL_LM_MAPPING, AutoModelForCausalLM)
    )
    bert, t5 = config_of(BERT), config_of(T5)
    assert bert.__class__ in architecture_for("masked")[0] and architecture_for("masked")[1] is AutoModelForMaskedLM
    assert t5.__class__ in architecture_for("span_corruption")[0] and t5.__class__ not in architecture_for("masked")[0]
    assert architecture_for("span_corruption")[1] is AutoModelForSeq2SeqLM


# ---- loss ----------------------------------------------------------------------------------------


def one_step(tmp_path, keys, config, micro_batch, rows, wrap=True, **options):
    """(loss logged, gradient, eval loss before the step) of one SGD step over 4 rows, its rate 1."""
    model = model_of(keys, config.objective)
    model.train()
    start = {key: value.detach().clone() for key, value in model.named_parameters()}
    args = TrainingArguments(
        str(tmp_path), per_device_train_batch_size=micro_batch, gradient_accumulation_steps=4 // micro_batch, max_steps=1,
        per_device_eval_batch_size=micro_batch, optim="sgd", learning_rate=1.0, lr_scheduler_type="constant", max_grad_norm=0,
        use_cpu=True, report_to=[], save_strategy="no", logging_steps=1, disable_tqdm=True, remove_unused_columns=False,
        **options,
    )  # fmt: skip
    trainer = Trainer(model, args, collate, train_dataset=rows, eval_dataset=rows)
    if wrap:
        exact_loss(trainer, config)
    held_out = trainer.evaluate()["eval_loss"]
    trainer.train()
    gradient = {key: start[key] - value.detach() for key, value in model.named_parameters()}
    (loss,) = (row["loss"] for row in trainer.state.log_history if "loss" in row)
    return loss, gradient, held_out


def rows_of(objective):
    """Four rows with 6, 9, 3 and 11 targets, or 8 each where the objective allows no other."""
    windows = [ids(16, i) for i in range(4)]
    if objective == "causal":
        return [causal(window, None, eos_id=EOS) for window in windows]
    if objective == "prefix":
        return [prefix(window, None, split=16 - n) for window, n in zip(windows, (6, 9, 3, 11), strict=True)]
    if objective == "masked":
        return [
            mask(window, i, density=n / 16) for i, (window, n) in enumerate(zip(windows, (6, 9, 3, 11), strict=True))
        ]
    return [
        span_corruption(window, rng(0), sentinels=[60, 61, 62], eos_id=EOS, density=0.3, mean_length=2.0)
        for window in windows
    ]


def by_hand(keys, objective, rows, z_loss):
    """(loss, gradient) of the mean over all targets, written out target by target."""
    model, terms, held_out = model_of(keys, objective), [], []
    for row in rows:
        batch = collate([row])
        out, labels = model(**batch).logits[0], batch["labels"][0]
        shift = objective in ("causal", "prefix")
        for i in range(shift, len(labels)):
            if labels[i] != -100:
                at, log_z = out[i - shift], out[i - shift].exp().sum().log()
                held_out.append(log_z - at[labels[i]])
                terms.append(log_z - at[labels[i]] + z_loss * log_z**2)
    loss = torch.stack(terms).mean()
    loss.backward()
    gradient = {key: value.grad for key, value in model.named_parameters() if value.grad is not None}
    return loss.item(), gradient, torch.stack(held_out).mean().item()


CASES = [("causal", LLAMA), ("prefix", LLAMA), ("masked", BERT), ("span_corruption", T5)]


@pytest.mark.parametrize(("objective", "keys"), CASES)
@pytest.mark.parametrize("z_loss", [0.0, 0.1])
def test_loss_is_the_mean_over_all_targets_of_the_step(tmp_path, objective, keys, z_loss):
    """One batch of 4 and 4 of 1, with targets in different numbers, take the step worked out by hand. Eval has no z-loss."""
    config, rows = ObjectiveConfig(objective, z_loss=z_loss), rows_of(objective)
    loss, gradient, held_out = by_hand(keys, objective, rows, z_loss)
    rounding = 1e-5 * max(value.abs().max().item() for value in gradient.values())
    for micro_batch in (4, 1):
        got, got_gradient, got_held_out = one_step(tmp_path, keys, config, micro_batch, rows)
        assert got == pytest.approx(loss, rel=1e-5)
        for key, value in gradient.items():
            torch.testing.assert_close(got_gradient[key], value, rtol=0, atol=rounding)
        if micro_batch == 4 or objective in (
            "causal",
            "span_corruption",
        ):  # equal counts, so the mean of means is exact
            assert got_held_out == pytest.approx(held_out, rel=1e-5)


@pytest.mark.parametrize(("objective", "keys"), CASES[2:])
def test_the_trainer_alone_multiplies_some_losses_by_the_accumulation(tmp_path, objective, keys):
    """Why `exact_loss` is there: once this fails, the library counts right."""
    whole, parts = (
        one_step(tmp_path, keys, ObjectiveConfig(objective), n, rows_of(objective), wrap=False)[0] for n in (4, 1)
    )
    assert parts == pytest.approx(4 * whole, rel=0.3)


def test_the_loss_of_experts_is_not_multiplied_either(tmp_path):
    keys = {**MIXTRAL, "output_router_logits": True, "router_aux_loss_coef": 1.0}
    alone, exact = (
        [one_step(tmp_path, keys, ObjectiveConfig(), n, rows_of("causal"), wrap)[0] for n in (4, 1)]
        for wrap in (False, True)
    )
    assert alone[1] - alone[0] > 4 and exact[1] == pytest.approx(
        exact[0], rel=0.05
    )  # balance is judged per micro-batch
    assert exact[0] == pytest.approx(alone[0], rel=1e-5)


def test_the_mean_over_processes_is_undone():
    """5 labels are 4 targets of the 16 of the step; gradients of 2 processes are averaged."""
    model = SimpleNamespace(training=True, config=SimpleNamespace())
    trainer = SimpleNamespace(
        accelerator=SimpleNamespace(num_processes=2), model=model,
        compute_loss=lambda model, inputs, return_outputs: (torch.tensor(3.0), {}),
    )  # fmt: skip
    exact_loss(trainer, ObjectiveConfig())
    assert trainer.compute_loss(model, {"labels": torch.arange(5)[None]}, num_items_in_batch=16) == 3 * 2 * 4 / 16


def test_evaluation_leaves_out_the_balance_of_experts(tmp_path):
    """With a balance loss of weight 1 the held-out loss is still the cross-entropy by hand."""
    keys = MIXTRAL | {"output_router_logits": True, "router_aux_loss_coef": 1.0}
    model, rows = model_of(keys, "causal"), rows_of("causal")
    args = TrainingArguments(str(tmp_path), use_cpu=True, report_to=[], per_device_eval_batch_size=len(rows))
    trainer = Trainer(model, args, collate, eval_dataset=rows)
    exact_loss(trainer, ObjectiveConfig())
    batch = collate(rows)
    logits = model.eval()(input_ids=batch["input_ids"]).logits
    expected = cross_entropy(logits[:, :-1].flatten(0, 1), batch["labels"][:, 1:].flatten()).item()
    assert trainer.evaluate()["eval_loss"] == pytest.approx(expected, rel=1e-5)
