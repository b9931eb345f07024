"""What each stage adds on `builtin:arithmetic`: exact match of the base, SFT, DPO and PPO models, accuracy of the reward model.

    python benchmarks/post_training.py [--model outputs/pretrain] [--seeds 0 1 2] [--folder outputs/post_training]

One pretrained model, then SFT, reward model, DPO and PPO for each seed, every recipe with its config.yaml and nothing
changed but seed and folders. `hacked` is PPO on the reward model alone, with next to no weight on the KL: its score rises, exact match does not. Questions: the test view, greedy answers, GSM8K's extraction. The base model gets as many
solved training problems before its question as its context holds; `flexible` takes its last number instead.
Finished runs are not run again.
"""

import argparse
import json
import re
import statistics
import subprocess
import sys
import time
from pathlib import Path

from transformers import AutoModelForCausalLM, AutoTokenizer

from llm_recipes.answers import generate, load_questions
from llm_recipes.arithmetic import final_answer
from llm_recipes.arithmetic import generate as problems
from llm_recipes.config import Source, load_yaml

ROOT = Path(__file__).resolve().parents[1]
parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("--model", default="outputs/pretrain")
parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
parser.add_argument("--questions", type=int, default=1000)
parser.add_argument("--folder", type=Path, default=Path("outputs/post_training"))
args, further = parser.parse_known_args()


SHIPPED = load_yaml(ROOT / "recipes/rlhf/ppo/config.yaml")[0]["rewards"]  # the reward model, and exact match


def few_shot(name: str) -> dict:
    """Exact match of the base model on its own, with solved problems before the question."""
    tokenizer, model = AutoTokenizer.from_pretrained(name), AutoModelForCausalLM.from_pretrained(name)
    questions = load_questions(Source("builtin:arithmetic/test", rows=args.questions))
    answer_room = 96
    shots = [
        f"Question: {question['content']}\nAnswer: {answer['content']}\n\n"
        for question, answer in problems("sft", 20)["messages"]
    ]
    prompts, used = [], []
    for question in questions["question"]:
        ask, ids = f"Question: {question}\nAnswer:", None
        for n in range(len(shots)):
            longer = tokenizer("".join(shots[:n]) + ask, add_special_tokens=False)["input_ids"]
            if len(longer) + answer_room + 1 > model.config.max_position_embeddings:
                break
            ids = longer
        prompts.append([tokenizer.eos_token_id, *ids])
        used.append(n - 1)
    texts = tokenizer.batch_decode(generate(model, prompts, tokenizer.pad_token_id, answer_room))
    texts = [text.split("Question:")[0] for text in texts]
    golds = [final_answer(answer) for answer in questions["answer"]]
    last = [(re.findall(r"\d+", text) or [None])[-1] for text in texts]
    return {
        "shots": statistics.mean(used),
        "exact_match": statistics.mean(final_answer(t) == g for t, g in zip(texts, golds, strict=True)),
        "flexible": statistics.mean(found == gold for found, gold in zip(last, golds, strict=True)),
        "sample": texts[0],
    }


def recipe(stage: str, folder: Path, model: str, seed: int, *options) -> dict:
    """metrics.json of a recipe, which is run if it has not been."""
    command = [sys.executable, ROOT / f"recipes/{stage}/run.py", "--model_name_or_path", model, "--output_dir", folder]
    command += ["--seed", seed, *options, *further]
    began = time.perf_counter()
    if not (folder / "metrics.json").is_file():
        done = subprocess.run(list(map(str, command)), capture_output=True, text=True)
        if done.returncode:
            sys.exit(f"{stage}: {done.stdout[-2000:]}{done.stderr[-3000:]}")
    metrics = json.loads((folder / "metrics.json").read_text())
    return metrics | {"wall": time.perf_counter() - began}


def logs(folder: Path) -> list[dict]:
    """What the run in `folder` has logged."""
    newest = max(folder.glob("checkpoint-*"), key=lambda path: int(path.name[11:]))
    return json.loads((newest / "trainer_state.json").read_text())["log_history"]


base = few_shot(args.model)
print(
    f"base, {base['shots']:.1f} shots: exact match {base['exact_match']:.3f}, flexible {base['flexible']:.3f}",
    flush=True,
)
questions = json.dumps({"path": "builtin:arithmetic/test", "rows": args.questions})
rows = []
for seed in args.seeds:
    folder = args.folder / str(seed)
    sft = recipe("sft", folder / "sft", args.model, seed, "--answers", questions)
    reward = recipe("rlhf/reward", folder / "reward", str(folder / "sft"), seed)
    dpo = recipe("dpo", folder / "dpo", str(folder / "sft"), seed, "--answers", questions)
    scorer, match = (
        {**given, "path": path}
        for given, path in zip(SHIPPED, (str(folder / "reward"), "builtin:exact_match"), strict=True)
    )
    ppo, hacked = (
        recipe(
            "rlhf/ppo",
            folder / name,
            str(folder / "sft"),
            seed,
            "--answers",
            questions,
            "--rewards",
            json.dumps(rewards),
            *more,
        )
        for name, rewards, more in (
            ("ppo", [scorer, match], []),
            ("hacked", [scorer | {"weight": 1.0}, match | {"weight": 0.0}], ["--kl_coef", 1e-6]),
        )
    )
    row = {"sft": sft["exact_match"], "reward accuracy": reward["accuracy"], "dpo": dpo["exact_match"]}
    row |= {"ppo": ppo["exact_match"], "hacked": hacked["exact_match"]}
    row |= {f"{name} - sft": row[name] - row["sft"] for name in ("dpo", "ppo", "hacked")}
    row |= {
        "sft - base": row["sft"] - base["exact_match"],
        "ppo KL": ppo["objective/kl"],
        "hacked KL": hacked["objective/kl"],
    }
    for name in ("ppo", "hacked"):
        history = [log for log in logs(folder / name) if "rewards/reward/mean" in log]
        for what, key in (("reward model", "rewards/reward/mean"), ("exact match", "rewards/exact_match/mean")):
            row |= {f"{name}, {what}, first": history[0][key], f"{name}, {what}, last": history[-1][key]}
    stages = (("sft", sft), ("reward", reward), ("dpo", dpo), ("ppo", ppo))
    rows.append(row | {f"{name} s": run["wall"] for name, run in stages})
    print(f"seed {seed}: " + ", ".join(f"{key} {value:.3f}" for key, value in rows[-1].items()), flush=True)
for key in rows[0]:
    values = [row[key] for row in rows]
    print(f"{key:<16} mean {statistics.mean(values):.3f}, from {min(values):.3f} to {max(values):.3f}")
(args.folder / "figures.json").write_text(json.dumps({"base": base, "seeds": rows}, indent=2) + "\n")
