"""Time to a loss: shakespeare_char.yaml against nanoGPT's CPU setting, on the last tenth of tiny Shakespeare.

    python benchmarks/shakespeare.py [--seeds 3] [--nanogpt ~/nanoGPT] [--output shakespeare.json]

The opponent trains 2000 steps of 12 x 64 characters (nanoGPT's README, "I only have a macbook"), in a hand-written loop,
or in its own train.py too. For every seed the sides take turns, each in a fresh process with empty caches. `loop` is from
the end of the first optimizer step to the end of the last, `process` the whole of it: imports, tokens, training, saving.
The loss is nats a character over all 111,540 characters, each side's model scored by the same code in blocks of 64, so
every character has 0 to 63 before it. Prints every run, and the ratios within a seed. With --steps the opponent's
run is another length, with --ours ours (0: as in the YAML).
"""

import json
import statistics
import sys
import tempfile
from pathlib import Path

import numpy as np
import torch
from common import ROOT, TEXT, clocked, hand_loop, nanogpt, nats, options, recipe, start
from transformers import AutoModelForCausalLM, AutoTokenizer, logging

from llm_recipes.config import DataConfig, Source, load_yaml
from llm_recipes.datasets import load_documents

args = options(__doc__, steps=2000, seeds=3, ours=0)
text = TEXT.read_text()
YAML = ROOT / "recipes/pretrain/shakespeare_char.yaml"
FIRST = int(len(text) * 0.9)  # nanoGPT's prepare.py: the first 90 % of the characters train
letters, ids = np.unique(np.array([*text]), return_inverse=True)


def ours():
    datasets = json.dumps([{"path": str(TEXT)}])
    steps = ["--max_steps", args.ours, "--warmup_steps", 0] if args.ours else []
    recipe(
        "--config", YAML, "--datasets", datasets, "--seed", args.seed, *steps,
        "--eval_strategy", "no", "--save_strategy", "no", "--sample_prompts", "[]", "--output_dir", args.folder / "out",
    )  # fmt: skip


def loop():
    hand_loop(ids[:FIRST], len(letters), args.steps, args.seed).save_pretrained(args.folder / "out")


def nano():
    nanogpt(args.nanogpt, args.folder, ids[:FIRST], ids[FIRST:], len(letters), args.steps, args.seed)


def trained_on(seed: int) -> int:
    """Characters of the text that the recipe trains on, from its start."""
    config, _ = load_yaml(YAML)
    part = load_documents(DataConfig([Source(str(TEXT))], config["eval_fraction"]), seed)[0].train[0]["text"]
    assert text.startswith(part)
    return len(part)


def score(side: str, folder: Path) -> float:
    """Loss of the model that `side` left in `folder`."""
    if side == "nanogpt":
        sys.path.insert(0, str(folder / "nanoGPT"))
        from model import GPT, GPTConfig

        saved = torch.load(folder / "nanoGPT/out-shakespeare-char/ckpt.pt", weights_only=True)
        model = GPT(GPTConfig(**saved["model_args"])).eval()
        model.load_state_dict(saved["model"])
        return nats(lambda rows: model(rows, rows)[0], ids, FIRST)  # without targets it scores the last position alone
    model, codes = AutoModelForCausalLM.from_pretrained(folder / "out").eval(), ids
    if side == "ours":
        codes = np.array(AutoTokenizer.from_pretrained(folder / "out")(text)["input_ids"])
        assert len(codes) == len(text), "a token is not a character"
    return nats(lambda rows: model(rows, use_cache=False).logits, codes, FIRST)


def main():
    logging.disable_progress_bar()
    print(
        f"{args.threads} threads; our training text ends at character {trained_on(0):,}, the scored one starts at {FIRST:,}"
    )
    assert trained_on(0) <= FIRST
    print(f"{'seed':<6}{'side':<10}{'loop s':>12}{'CPU s':>12}{'process s':>12}{'loss':>12}", flush=True)
    seeds = []
    with tempfile.TemporaryDirectory() as folder:
        for seed in range(args.seeds):
            row = {}
            for side in SIDES:
                where = Path(folder) / f"{side}{seed}"
                run = start(side, seed, where, args)
                last = -1 if side == "ours" else args.steps - 1  # nanoGPT evaluates, saves and takes one step more
                loop, cpu = (run[clock][last] - run[clock][0] for clock in ("wall", "cpu"))
                row[side] = {"loop": loop, "cpu": cpu, "process": run["process"], "loss": score(side, where)}
                print(f"{seed:<6}{side:<10}" + "".join(f"{value:>12.4g}" for value in row[side].values()), flush=True)
            seeds.append(row)
    ratios = {}
    for other in [side for side in SIDES if side != "ours"]:
        for key in ("loop", "process", "cpu"):
            of = ratios[f"ours/{other} {key}"] = [row["ours"][key] / row[other][key] for row in seeds]
            print(f"ours / {other}, {key}: median {statistics.median(of):.3f}, {min(of):.3f} to {max(of):.3f}")
    if args.output:
        args.output.write_text(json.dumps({"threads": args.threads, "seeds": seeds, "ratios": ratios}, indent=1))


SIDES = {"ours": ours, "loop": loop} | ({"nanogpt": nano} if args.nanogpt else {})
if __name__ == "__main__":
    clocked(SIDES[args.side], args.folder) if args.side else main()
