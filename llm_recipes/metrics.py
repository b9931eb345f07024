"""Counting and timing: FLOPs, peak rates, bits per byte. Formulas name their source."""

import math
import re
import time

import numpy as np
import torch
import transformers
from torch import nn
from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, PreTrainedConfig
from transformers.pytorch_utils import Conv1D

from llm_recipes._compat import no_deepspeed

# Dense bf16 peak of one device in TFLOP/s without sparsity, from the vendors' data sheets.
PEAK_TFLOPS = {
    "GB200": 2500, "B200": 2250, "H100 NVL": 835, "H100 PCIe": 756, "H200 NVL": 836, "H200": 989, "H100": 989, "GH200": 989,
    "A100": 312, "L40S": 362, "L4": 121, "A40": 149.7, "A6000": 154.8, "A30": 165, "RTX 4090": 165.2, "RTX 3090": 71,
    "MI355": 2500, "MI300X": 1307,
}  # fmt: skip

Z = 1.959964  # 97.5 % quantile of the normal distribution


def wilson(right: int, n: int) -> tuple[float, float]:
    """95 % interval of a share `right / n` (Wilson 1927); unlike p +- 2 se it stays within [0, 1] and has width at 0 and 1."""
    p = right / n
    centre, half = p + Z**2 / (2 * n), Z * np.sqrt(p * (1 - p) / n + Z**2 / (4 * n**2))
    low, high = (centre - half) / (1 + Z**2 / n), (centre + half) / (1 + Z**2 / n)
    return (float(low) if right else 0.0), (float(high) if right < n else 1.0)  # rounding misses the ends


def meta_model(config: PreTrainedConfig) -> nn.Module:
    """The model of `config` without memory, whatever the launched strategy does to real models.

    Of its class in `architectures`, or else the causal LM.
    """
    name = (config.architectures or [None])[0]
    kind = getattr(transformers, name) if name else MODEL_FOR_CAUSAL_LM_MAPPING[type(config)]
    with no_deepspeed(), torch.device("meta"):
        return kind(config)


def parameter_count(config: PreTrainedConfig) -> int:
    """Parameters of the model of `config`, tied ones once."""
    return sum(p.numel() for p in meta_model(config).parameters())


def flops_per_example(config: PreTrainedConfig, length: int, targets: int | None = None) -> float:
    """Forward and backward FLOPs of `length` tokens: 6 N T + 12 L H Dh T^2 (Chowdhery et al. 2022, PaLM, appendix B).

    N counts the weights of all matrix products, the output head included even when it is tied, and
    of a mixture of experts those that a token passes;
    embeddings looked up, norms and biases are not counted. Causal attention is not halved and
    recomputation is not counted. An encoder-decoder reads `length` tokens and writes `targets`: its
    encoder and the keys and values of its cross-attention see the former, all else the latter.
    """
    model = meta_model(config)
    read = write = 0
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear | Conv1D):
            if "encoder" in name.split(".") or re.search(r"(EncDecAttention\.[kv]|encoder_attn\.[kv]_proj)$", name):
                read += module.weight.numel()
            else:
                write += module.weight.numel()
    experts = sum(p[0].numel() for name, p in model.named_parameters() if "experts" in name and p.ndim == 3)
    write += experts * (getattr(config, "num_experts_per_tok", None) or 0)
    heads = getattr(config, "num_attention_heads", 0)  # a state-space model has none
    head_dim = heads and (
        getattr(config, "head_dim", None) or getattr(config, "d_kv", None) or config.hidden_size // heads
    )
    if config.is_encoder_decoder:
        decoders = getattr(config, "num_decoder_layers", None) or config.num_hidden_layers
        pairs = config.num_hidden_layers * length**2 + decoders * (targets**2 + targets * length)
        return 6 * (read * length + write * targets) + 12 * heads * head_dim * pairs
    return 6 * (read + write) * length + 12 * config.num_hidden_layers * heads * head_dim * length**2


def flops_per_token(config: PreTrainedConfig, length: int) -> float:
    """`flops_per_example` of a decoder or an encoder, divided by its tokens."""
    return flops_per_example(config, length) / length


def peak_flops() -> float | None:
    """Data-sheet bf16 FLOP/s of this GPU, None when it is not in the table or there is none."""
    if not torch.cuda.is_available():
        return None
    name = torch.cuda.get_device_name()
    return next((tflops * 1e12 for key, tflops in PEAK_TFLOPS.items() if re.search(rf"\b{key}\b", name)), None)


def measured_flops(device: torch.device, size: int = 1024, seconds: float = 0.2) -> float:
    """FLOP/s that square fp32 matrix products reach on `device` with this process's threads."""
    a, b = torch.randn(2, size, size, device=device)
    a @ b
    rounds, start = 0, time.perf_counter()
    while (elapsed := time.perf_counter() - start) < seconds:
        (a @ b)[0, 0].item()
        rounds += 1
    return rounds * 2 * size**3 / elapsed


def token_bytes(tokenizer) -> torch.Tensor:
    """UTF-8 bytes each id stands for, `(V,)`; 0 for special tokens."""
    special, byte_level = set(tokenizer.all_special_ids), "ByteLevel" in str(tokenizer.backend_tokenizer.decoder)
    sizes = torch.zeros(len(tokenizer), dtype=torch.long)
    for token, i in tokenizer.get_vocab().items():
        if i in special:
            continue
        if byte_level:  # one character stands for one byte
            sizes[i] = len(token)
        elif len(token) == 6 and token.startswith("<0x"):  # byte fallback
            sizes[i] = 1
        else:
            sizes[i] = len(token.replace("\u2581", " ").encode())
    return sizes


def bits_per_byte(nats_per_token: float, windows, tokenizer) -> float:
    """Loss over windows `(n, T)`, whose first token is no target, as bits a byte of their text.

    The nats of document ends are in, though an end has no bytes: the model has to predict it too.
    """
    sizes, targets, size = token_bytes(tokenizer).numpy(), 0, 0
    for batch in windows.iter(1000):
        ids = np.asarray(batch["input_ids"])[:, 1:]
        targets, size = targets + ids.size, size + int(sizes[ids].sum())
    return nats_per_token * targets / math.log(2) / size


def unigram_entropy(examples) -> float:
    """Nats a target of the best predictor that ignores all context: what a model must beat."""
    counts = np.zeros(0, dtype=np.int64)
    for start in range(0, len(examples), 1000):
        rows = examples.__getitems__(list(range(start, min(start + 1000, len(examples)))))
        found = np.bincount(np.concatenate([row["labels"][row["labels"] >= 0] for row in rows]))
        counts = np.pad(counts, (0, max(0, len(found) - len(counts))))
        counts[: len(found)] += found
    share = counts[counts > 0] / counts.sum()
    return float(-(share * np.log(share)).sum())


def measure(trainer, objective: str, eval_examples, tokenizer, throughput, flops: float, started: float) -> dict:
    """Figures of a finished run, for metrics.json; every rank takes part. `flops` is that of one token read.

    `tokens_per_second` is the steady state, `end_to_end_tokens_per_second` divides by all the time
    since `started`. `mfu` compares with the GPU's data sheet, "n/a" for one that is not in the
    table; without a GPU `fraction_of_matmul_rate` compares with what square matrix products reach
    here and now. Bits a byte are those of a causal model, whose targets cover all of the text.
    """
    args, config, steps = trainer.args, trainer.model.config, trainer.state.global_step
    results = {
        "parameters": parameter_count(config),
        "steps": steps,
        "tokens": throughput.tokens_until(steps),
    }
    if eval_examples is not None:
        logged = [row["eval_loss"] for row in trainer.state.log_history if "eval_loss" in row and row["step"] == steps]
        same = logged and not args.load_best_model_at_end  # then the weights are those of another step
        loss = logged[-1] if same else trainer.evaluate()["eval_loss"]
        results |= {"eval_loss": loss, "perplexity": math.exp(min(loss, 700))}
        if objective == "causal":
            results["bits_per_byte"] = bits_per_byte(loss, eval_examples.windows, tokenizer)
        results["unigram_entropy"] = unigram_entropy(eval_examples)
    return results | speed(trainer, throughput, flops, started)


def speed(trainer, throughput, flops: float | None, started: float) -> dict:
    """Tokens and FLOPs a second, as in `measure`; without `flops` tokens alone. Every rank takes part."""
    args, results = trainer.args, {}
    if (rate := throughput.tokens_per_second()) is not None:
        seconds = time.perf_counter() - started
        results |= {
            "tokens_per_second": rate,
            "end_to_end_tokens_per_second": throughput.session_tokens / seconds,
            "seconds": seconds,
        }
        if flops is None:
            return results
        results["model_flops_per_second"] = rate * flops
        if args.device.type == "cpu":  # all ranks at once, as in training
            matmul = torch.tensor([measured_flops(args.device)], dtype=torch.float64)
            results["fraction_of_matmul_rate"] = rate * flops / trainer.accelerator.reduce(matmul, "sum").item()
        else:
            peak = peak_flops()
            results["mfu"] = rate * flops / (peak * args.world_size) if peak else "n/a"
    return results
