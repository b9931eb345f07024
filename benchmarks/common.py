"""What the benchmarks share: the opponents, a clock that reads the same for all of them, and the exact loss."""

import argparse
import json
import math
import os
import pickle
import runpy
import shutil
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import torch
from torch.optim.optimizer import register_optimizer_step_post_hook
from transformers import GPT2Config, GPT2LMHeadModel

ROOT = Path(__file__).resolve().parents[1]
TEXT = Path(os.environ.get("LLM_RECIPES_DATA", ROOT.parent / "shared/data")) / "tinyshakespeare.txt"
LENGTH, BATCH = 64, 12  # nanoGPT's README, "I only have a macbook": its shape, batch and schedule
SHAPE = {"n_positions": LENGTH, "n_layer": 4, "n_head": 4, "n_embd": 128,
         "resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}  # fmt: skip
WARMUP, PEAK, LAST = 100, 1e-3, 1e-4


def options(description: str, **own) -> argparse.Namespace:
    """The command line of a benchmark. `--side`, `--seed` and `--folder` are for the processes that it starts."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=own.pop("steps"), help="optimizer steps of a run")
    parser.add_argument("--nanogpt", type=Path, help="a checkout of karpathy/nanoGPT, to run its own train.py too")
    parser.add_argument(
        "--threads", type=int, default=1, help="of every side; on a busy machine threads wait for each other"
    )
    parser.add_argument("--output", type=Path, help="JSON with every raw figure")
    for name, default in own.items():
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--side", help=argparse.SUPPRESS)
    parser.add_argument("--seed", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    return parser.parse_args()


def start(side: str, seed: int, folder: Path, args: argparse.Namespace) -> dict:
    """Runs one side in a fresh process; `stamps` are the seconds from its start to the end of every optimizer step."""
    folder.mkdir(parents=True)
    command = [sys.executable, *sys.argv, "--side", side, "--seed", str(seed), "--folder", str(folder)]
    caches = {"HF_DATASETS_CACHE": str(folder / "cache"), "HF_HOME": str(folder / "hf")}  # nobody finds work done
    threads = {"OMP_NUM_THREADS": str(args.threads), "TOKENIZERS_PARALLELISM": "false"}
    began = time.perf_counter()
    done = subprocess.run(command, env=os.environ | caches | threads, capture_output=True, text=True)
    seconds = time.perf_counter() - began
    if done.returncode:
        sys.exit(f"{side}: {done.stdout[-2000:]}{done.stderr[-3000:]}")
    stamps = json.loads((folder / "stamps.json").read_text())
    return {"process": seconds, "wall": [wall - began for wall, _ in stamps], "cpu": [cpu for _, cpu in stamps]}


def clocked(side, folder: Path) -> None:
    """Calls `side()` and writes down when each optimizer step ended, by the clock that all processes share."""
    stamps = []
    register_optimizer_step_post_hook(lambda *_: stamps.append((time.perf_counter(), time.process_time())))
    side()
    (folder / "stamps.json").write_text(json.dumps(stamps))


def recipe(*argv) -> None:
    """`python recipes/pretrain/run.py *argv` in this process."""
    sys.argv = [str(ROOT / "recipes/pretrain/run.py"), *map(str, argv)]
    runpy.run_path(sys.argv[0], run_name="__main__")


def hand_loop(ids: np.ndarray, vocab_size: int, steps: int, seed: int) -> GPT2LMHeadModel:
    """What nanoGPT's train.py does on a CPU, with the settings of its README, in as few lines as it takes.

    transformers' GPT-2 with nanoGPT's GELU and without a cache, and fused AdamW, run as fast as nanoGPT's own.
    """
    torch.manual_seed(seed)
    own = {"activation_function": "gelu", "use_cache": False, "bos_token_id": None, "eos_token_id": None}
    model = GPT2LMHeadModel(GPT2Config(vocab_size=vocab_size, **own, **SHAPE))
    groups = [
        {"params": [p for p in model.parameters() if p.ndim >= 2], "weight_decay": 0.1},
        {"params": [p for p in model.parameters() if p.ndim < 2], "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(groups, betas=(0.9, 0.99), fused=True)
    ids = torch.from_numpy(ids.astype(np.int64))
    for step in range(steps):
        done = (step - WARMUP) / max(steps - WARMUP, 1)
        rate = LAST + (PEAK - LAST) * (1 + math.cos(math.pi * done)) / 2
        for group in optimizer.param_groups:
            group["lr"] = rate if step >= WARMUP else PEAK * (step + 1) / (WARMUP + 1)
        rows = torch.stack([ids[i : i + LENGTH + 1] for i in torch.randint(len(ids) - LENGTH, (BATCH,))])
        logits = model(rows[:, :-1]).logits
        torch.nn.functional.cross_entropy(logits.flatten(0, 1), rows[:, 1:].flatten()).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
    return model


def nanogpt(checkout: Path, folder: Path, train: np.ndarray, held_out: np.ndarray, vocab_size: int, steps: int, seed):
    """nanoGPT's own train.py, in a copy of its checkout, by the command of its README."""
    copy = shutil.copytree(checkout, folder / "nanoGPT", ignore=shutil.ignore_patterns(".git"))
    data = copy / "data/shakespeare_char"
    for name, ids in (("train", train), ("val", held_out)):
        ids.astype(np.uint16).tofile(data / f"{name}.bin")
    (data / "meta.pkl").write_bytes(pickle.dumps({"vocab_size": vocab_size}))
    source = (copy / "train.py").read_text()  # the seed is the one setting that its command line does not reach
    assert source.count("torch.manual_seed(1337") == 1
    (copy / "train.py").write_text(source.replace("torch.manual_seed(1337", f"torch.manual_seed({seed}"))
    os.chdir(copy)
    sys.path.insert(0, str(copy))
    sys.argv = ["train.py", "config/train_shakespeare_char.py", "--device=cpu", "--compile=False", "--dtype=float32",
                "--eval_iters=20", "--log_interval=50", f"--block_size={LENGTH}", f"--batch_size={BATCH}", "--n_layer=4",
                "--n_head=4", "--n_embd=128", f"--max_iters={steps}", f"--lr_decay_iters={steps}", "--dropout=0.0",
                f"--eval_interval={steps}", "--always_save_checkpoint=True"]  # fmt: skip
    runpy.run_path("train.py", run_name="__main__")


@torch.no_grad()
def nats(logits, ids: np.ndarray, first: int) -> float:
    """Mean loss of the characters `ids[first:]`, each predicted from those before it in its block of LENGTH.

    `logits` maps ids `(B, T)` to `(B, T, V)`. A block starts with the last character before its targets.
    """
    ids = torch.from_numpy(ids.astype(np.int64))
    total = 0.0
    for block in ids[first - 1 :].unfold(0, LENGTH + 1, LENGTH).split(64):
        total += _sum(logits, block)
    rest = (len(ids) - first) % LENGTH
    total += _sum(logits, ids[None, -rest - 1 :]) if rest else 0.0
    return total / (len(ids) - first)


def _sum(logits, rows: torch.Tensor) -> float:
    scores = logits(rows[:, :-1]).flatten(0, 1).double()
    return torch.nn.functional.cross_entropy(scores, rows[:, 1:].flatten(), reduction="sum").item()
