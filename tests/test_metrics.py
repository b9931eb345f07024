import math

import numpy as np
import pytest
import torch
from datasets import Dataset
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSeq2SeqLM

from llm_recipes.batches import Examples
from llm_recipes.config import Source
from llm_recipes.datasets import load_source
from llm_recipes.metrics import (
    PEAK_TFLOPS,
    bits_per_byte,
    flops_per_example,
    flops_per_token,
    measured_flops,
    peak_flops,
    token_bytes,
    unigram_entropy,
)
from llm_recipes.progress import Throughput
from llm_recipes.tokenization import train_tokenizer


@pytest.mark.parametrize(
    "kwargs",
    [
        {"model_type": "llama", "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 3, "num_attention_heads": 4},
        {"model_type": "llama", "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2, "tie_word_embeddings": True},
        {"model_type": "gpt2", "n_embd": 64, "n_layer": 2, "n_head": 4},
    ],
)  # fmt: skip
def test_flops_agree_with_torchs_counter(kwargs):
    """The referee counts every matrix product of a real forward and backward pass, attention included."""
    kwargs = dict(kwargs)
    config = AutoConfig.for_model(kwargs.pop("model_type"), vocab_size=100, attn_implementation="eager", **kwargs)
    model = AutoModelForCausalLM.from_config(config)
    ids = torch.zeros(2, 32, dtype=torch.long)
    with FlopCounterMode(display=False) as counter:
        model(input_ids=ids, labels=ids).loss.backward()
    assert counter.get_total_flops() / ids.numel() == pytest.approx(flops_per_token(config, 32), rel=0.02)


@pytest.mark.parametrize(
    "keys",
    [
        {"model_type": "t5", "d_model": 64, "d_kv": 16, "d_ff": 128, "num_layers": 2, "num_decoder_layers": 3, "num_heads": 4},
        {"model_type": "bart", "d_model": 64, "encoder_layers": 2, "decoder_layers": 2, "encoder_ffn_dim": 128,
         "decoder_ffn_dim": 128, "encoder_attention_heads": 4, "decoder_attention_heads": 4},
    ],
    ids=lambda keys: keys["model_type"],
)  # fmt: skip
def test_flops_of_an_encoder_decoder_agree_with_torchs_counter(keys):
    config = AutoConfig.for_model(**keys, vocab_size=100, attn_implementation="eager", decoder_start_token_id=0)
    config.architectures = [AutoModelForSeq2SeqLM.from_config(config).__class__.__name__]
    model = AutoModelForSeq2SeqLM.from_config(config)
    read, write = torch.zeros(2, 48, dtype=torch.long), torch.zeros(2, 16, dtype=torch.long)
    with FlopCounterMode(display=False) as counter:
        model(input_ids=read, labels=write).loss.backward()
    assert counter.get_total_flops() / 2 == pytest.approx(flops_per_example(config, 48, 16), rel=0.02)


def test_flops_of_a_published_model():
    """GPT-2 124M at 1,024 tokens: 6 x 123,532,032 + 12 x 12 x 12 x 64 x 1024 (nanoGPT's estimate_mfu, without biases)."""
    config = AutoConfig.for_model("gpt2")
    assert flops_per_token(config, 1024) == 6 * (12 * 12 * 768**2 + 50257 * 768) + 12 * 12 * 12 * 64 * 1024


@pytest.mark.parametrize(
    ("name", "tflops"),
    [("NVIDIA H100 80GB HBM3", 989), ("NVIDIA H100 PCIe", 756), ("NVIDIA A100-SXM4-40GB", 312), ("NVIDIA L4", 121),
     ("NVIDIA L40S", 362), ("NVIDIA H200", 989), ("NVIDIA B200", 2250), ("NVIDIA GB200", 2500), ("NVIDIA GeForce RTX 4090", 165.2),
     ("NVIDIA RTX A4000", None), ("Tesla T4", None)],
)  # fmt: skip
def test_peak_by_device_name(monkeypatch, name, tflops):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: name)
    assert peak_flops() == (None if tflops is None else tflops * 1e12)
    assert len(PEAK_TFLOPS) >= 15


def test_no_gpu_has_no_peak_but_a_measured_rate():
    assert peak_flops() is None
    assert 1e9 < measured_flops(torch.device("cpu"), size=256, seconds=0.05) < 1e14


def test_token_bytes_add_up_to_the_text():
    tokenizer = train_tokenizer(load_source(Source("builtin:python")).select(range(20)), 700)
    sizes = token_bytes(tokenizer)
    for text in ("def f():\n    return 'naïve 日本 \U0001f600'", "x" * 99):
        ids = tokenizer(text, add_special_tokens=False)["input_ids"]
        assert sizes[ids].sum() == len(text.encode())
    assert sizes[tokenizer.all_special_ids].sum() == 0


def test_bits_per_byte_by_hand():
    """Two windows 'aab', 'bb<eos>' as bytes: targets a b b <eos> have 3 bytes; 4 targets at ln 2 nats are 4 bits."""
    tokenizer = train_tokenizer([{"text": "ab" * 50 + "".join(map(chr, range(32, 127)))}], 272)
    a, b = tokenizer.convert_tokens_to_ids(["a", "b"])
    windows = Dataset.from_dict({"input_ids": [[a, a, b], [b, b, tokenizer.eos_token_id]]}).with_format("numpy")
    assert bits_per_byte(math.log(2), windows, tokenizer) == pytest.approx(4 / 3)


def test_unigram_entropy_by_hand():
    windows = Dataset.from_dict({"input_ids": [[1, 1], [2, 3]]}).with_format("numpy")
    examples = Examples(windows, lambda ids, rng: {"labels": np.append(ids, -100)}, seed=0, shuffle=False)
    assert unigram_entropy(examples) == pytest.approx(-(0.5 * np.log(0.5) + 0.5 * np.log(0.25)))


def test_throughput_leaves_out_warm_up_saving_and_evaluation(monkeypatch):
    """Ten steps of two seconds at 100 tokens each, a save of 50 s and an evaluation of 70 s: 50 tokens/s."""
    from transformers import TrainerControl, TrainerState, TrainingArguments

    clock = [1000.0]
    monkeypatch.setattr("time.perf_counter", lambda: clock[0])
    args, state, control = TrainingArguments("unused", use_cpu=True), TrainerState(max_steps=10), TrainerControl()
    throughput = Throughput(lambda step: 100 * step)
    throughput.on_train_begin(args, state, control)
    for step in range(1, 11):
        clock[0] += 9 if step <= Throughput.WARMUP else 2
        state.global_step = step
        throughput.on_step_end(args, state, control)
        if step == 5:
            clock[0] += 50
            throughput.on_save(args, state, control)
        if step == 7:
            clock[0] += 70
            throughput.on_evaluate(args, state, control)
    assert throughput.tokens_per_second() == pytest.approx(50) and throughput.session_tokens == 1000
    logs = {"loss": 1.0}
    throughput.on_log(args, state, control, logs=logs)
    assert logs["tokens_per_second"] == pytest.approx(50)


def test_flops_of_experts_count_those_a_token_passes():
    """Mixtral with 2 of 8 experts: as a dense model with two feed-forwards, and the router."""
    sizes = {
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 1,
        "num_attention_heads": 4,
        "num_key_value_heads": 4,
        "vocab_size": 100,
    }
    sparse = flops_per_token(AutoConfig.for_model("mixtral", num_local_experts=8, num_experts_per_tok=2, **sizes), 16)
    dense = flops_per_token(AutoConfig.for_model("llama", **sizes), 16)
    one_feed_forward, router = 3 * 64 * 128, 64 * 8
    assert sparse - dense in (6 * one_feed_forward, 6 * (one_feed_forward + router))
