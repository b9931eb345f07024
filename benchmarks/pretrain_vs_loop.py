"""Seconds per optimizer step: this recipe, a stock Trainer, a hand-written PyTorch loop, and nanoGPT's train.py.

    python benchmarks/pretrain_vs_loop.py [--rounds 5] [--steps 300] [--nanogpt ~/nanoGPT] [--output steps.json]

GPT-2 of nanoGPT's CPU setting in fp32: 4 layers, 4 heads, width 128, 12 sequences of 64 characters a step, AdamW. All
sides have the vocabulary of this recipe's byte-level tokenizer, 272 ids. This recipe also runs with `bf16: true`, which is
another precision (autocast) and so no comparison like for like. Each run is a fresh process, and the sides take
turns. A figure is the mean over step 50 to the last, data loading included, evaluation and saving not; `start-up` is
what passes before the end of the first step. Prints all of them, and medians of the ratios within a round.
"""

import json
import statistics
import tempfile
from pathlib import Path

import numpy as np
from common import BATCH, LENGTH, SHAPE, TEXT, clocked, hand_loop, nanogpt, options, recipe, start

VOCABULARY = 272
args = options(__doc__, steps=300, rounds=5, first=50)


def ours(*more):
    model = {"model_type": "gpt2", "activation_function": "gelu", **SHAPE}
    recipe(
        "--datasets", json.dumps([{"path": str(TEXT)}]), "--eval_fraction", 0, "--tokenizer_vocab_size", VOCABULARY,
        "--sequence_length", LENGTH, "--model_config", json.dumps(model), "--global_batch_size", BATCH,
        "--per_device_train_batch_size", BATCH, "--max_steps", args.steps, "--learning_rate", 1e-3, "--adam_beta2", 0.99,
        "--warmup_steps", min(100, args.steps - 1), "--eval_strategy", "no", "--save_strategy", "no",
        "--sample_prompts", "[]", "--seed", args.seed, "--output_dir", args.folder / "out",
        *more,
    )  # fmt: skip


def ours_bf16():
    ours("--bf16", "true")


def stock():
    from datasets import Dataset
    from transformers import GPT2Config, GPT2LMHeadModel, Trainer, TrainingArguments, default_data_collator

    ids = np.frombuffer(TEXT.read_bytes(), np.uint8)
    rows = ids[: len(ids) // LENGTH * LENGTH].reshape(-1, LENGTH).tolist()  # what run_clm.py's group_texts makes
    mask = [[1] * LENGTH] * len(rows)
    dataset = Dataset.from_dict({"input_ids": rows, "attention_mask": mask, "labels": rows})
    Trainer(
        GPT2LMHeadModel(GPT2Config(vocab_size=VOCABULARY, **SHAPE)),
        TrainingArguments(
            str(args.folder / "out"), per_device_train_batch_size=BATCH, max_steps=args.steps, learning_rate=1e-3,
            seed=args.seed,
        ),
        data_collator=default_data_collator,
        train_dataset=dataset,
    ).train()  # fmt: skip


def loop():
    hand_loop(np.frombuffer(TEXT.read_bytes(), np.uint8), VOCABULARY, args.steps, args.seed)


def nano():
    ids = np.frombuffer(TEXT.read_bytes(), np.uint8)
    nanogpt(args.nanogpt, args.folder, ids, ids, VOCABULARY, args.steps, args.seed)


SIDES = {"ours": ours, "ours_bf16": ours_bf16, "stock": stock, "loop": loop} | (
    {"nanogpt": nano} if args.nanogpt else {}
)


def main():
    names = {
        "ours": "this recipe",
        "ours_bf16": "this recipe, bf16",
        "stock": "stock Trainer",
        "loop": "hand loop",
        "nanogpt": "nanoGPT train.py",
    }
    print(f"ms a step (start-up in s); {args.threads} threads, mean of steps {args.first} to {args.steps}")
    print(f"{'round':<6}" + "".join(f"{names[side]:>20}" for side in SIDES), flush=True)
    rounds = []
    with tempfile.TemporaryDirectory() as folder:
        for number in range(args.rounds):
            row = {}
            for side in SIDES:
                run = start(side, number, Path(folder) / f"{side}{number}", args)
                row[side] = {"start_up": run["wall"][0]}
                for clock in ("wall", "cpu"):
                    seconds = run[clock][args.steps - 1] - run[clock][args.first - 1]
                    row[side][clock] = 1000 * seconds / (args.steps - args.first)
            rounds.append(row)
            print(
                f"{number + 1:<6}"
                + "".join(f"{r['wall']:>10.2f}{r['cpu']:>8.2f} ({r['start_up']:>5.1f})" for r in row.values()),
                flush=True,
            )
    ratios = {}
    pairs = [("ours", "loop"), ("stock", "ours"), ("ours_bf16", "loop"), ("stock", "ours_bf16")]
    for above, below in [*pairs, ("ours", "nanogpt"), ("loop", "nanogpt")]:
        if below in SIDES:
            for clock in ("wall", "cpu"):
                of = sorted(row[above][clock] / row[below][clock] for row in rounds)
                ratios[f"{above}/{below} {clock}"] = of
                print(
                    f"{names[above]} / {names[below]} {clock}: median {statistics.median(of):.3f}, {of[0]:.3f} to {of[-1]:.3f}"
                )
    if args.output:
        args.output.write_text(json.dumps({"threads": args.threads, "rounds": rounds, "ratios": ratios}, indent=1))


if __name__ == "__main__":
    clocked(SIDES[args.side], args.folder) if args.side else main()
