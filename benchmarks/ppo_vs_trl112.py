"""Our PPO against the last PPOTrainer of TRL (1.12.0, trl.experimental.ppo): seconds a rollout and peak memory.

    python benchmarks/ppo_vs_trl112.py [--rows base lora] [--rounds 5] [--rollouts 10] [--threads 1]
    python benchmarks/ppo_vs_trl112.py --quality [--seeds 5]

TRL 1.12.0 is installed into a folder of its own, which only its processes see; torch, transformers, accelerate and
peft are the same for all sides. Every measurement is a fresh process. All sides start from the same tiny Llama, reward
model and critic (a copy of the reward model; `ours_shared` has a value head on the policy instead) and take the same
prompts. A rollout is 32 completions of fixed length and 4 PPO epochs of one optimizer step (4 micro-batches of 8), in
fp32, with AdamW at a constant rate. TRL ignores max_grad_norm; ours clips. A ratio is TRL's figure divided by ours.

`--quality` trains the toy task, whose reward is the share of tokens below 32, for 25 rollouts and then measures the
reward and the KL divergence from the initial policy on 1024 fresh completions, by the same code for every side.
"""

import argparse
import json
import os
import platform
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from importlib.metadata import version
from itertools import pairwise
from pathlib import Path

# torch is imported only in the measuring processes: Linux counts the peak of a parent to that of its children.

EPOCHS, BATCH, ACCUMULATION = 4, 8, 4
FULL, ADAPTER = ("trl112", "ours", "ours_shared"), ("trl112", "ours")
ROWS = {
    "vocabulary": {"vocab": 8192, "hidden": 128, "layers": 4, "prompts": (48, 48), "length": 64, "sides": FULL},
    "base": {"vocab": 512, "hidden": 128, "layers": 4, "prompts": (48, 48), "length": 64, "sides": FULL},
    "wide": {"vocab": 512, "hidden": 256, "layers": 4, "prompts": (32, 32), "length": 128, "sides": FULL},
    "prompts": {"vocab": 512, "hidden": 128, "layers": 4, "prompts": (8, 128), "length": 32, "sides": FULL},
    "lora": {"vocab": 8192, "hidden": 128, "layers": 4, "prompts": (48, 48), "length": 64, "sides": ADAPTER, "rank": 8},
}
TOY = {"vocab": 128, "hidden": 64, "layers": 2, "prompts": (8, 8), "length": 16, "sides": FULL,
       "batch": 16, "learning_rate": 1e-3, "kl_coef": 0.02, "good": 32}  # fmt: skip


def save_models(row: dict, seed: int, rollouts: int, folder: Path) -> None:
    """Policy, reward model, tokenizer and prompts that every side loads.

    No completion may stop early, and TRL takes a drawn <pad> for padding, so the policy itself must never draw <eos>
    or <pad>: one coordinate of the residual stream holds the same positive number at every position, and the heads of
    the two tokens look only at that one, with a large negative weight.
    """
    import torch
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, LlamaForSequenceClassification, PreTrainedTokenizerFast

    torch.manual_seed(seed)
    vocab, hidden = row["vocab"], row["hidden"]
    config = LlamaConfig(
        vocab_size=vocab, hidden_size=hidden, intermediate_size=4 * hidden, num_hidden_layers=row["layers"],
        num_attention_heads=4, num_key_value_heads=4, max_position_embeddings=256, num_labels=1,
        bos_token_id=None, pad_token_id=vocab - 2, eos_token_id=vocab - 1,
    )  # fmt: skip
    policy, reward = LlamaForCausalLM(config), LlamaForSequenceClassification(config)
    with torch.no_grad():
        policy.model.embed_tokens.weight[:, 0] = 0.1
        for layer in policy.model.layers:
            layer.self_attn.o_proj.weight[0] = 0
            layer.mlp.down_proj.weight[0] = 0
        policy.lm_head.weight[-2:] = 0
        policy.lm_head.weight[-2:, 0] = -100
    words = {**{f"w{i}": i for i in range(vocab - 2)}, "<pad>": vocab - 2, "<eos>": vocab - 1}
    backend = Tokenizer(models.WordLevel(words))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    special = {"pad_token": "<pad>", "eos_token": "<eos>", "padding_side": "left"}
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, **special)
    for name, model in (("policy", policy), ("reward", reward)):
        model.save_pretrained(folder / name)
        tokenizer.save_pretrained(folder / name)
    # One rollout more than is trained: on the last batch of its data TRL 1.12 steps after every micro-batch, because
    # accelerate ends an accumulation where a data loader ends.
    lengths = torch.linspace(*row["prompts"], row.get("batch", BATCH) * ACCUMULATION).round().long()
    prompts = [torch.randint(vocab - 2, (length,)).tolist() for length in lengths.repeat(rollouts + 1)]
    (folder / "prompts.json").write_text(json.dumps(prompts))


def build(side: str, row: dict, seed: int, rollouts: int, folder: Path, prompts: list):
    """The trainer of a side and its policy."""
    from datasets import Dataset
    from peft import LoraConfig
    from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder / "policy")
    policy = AutoModelForCausalLM.from_pretrained(folder / "policy")
    shared, toy = side == "ours_shared", "good" in row
    critic = None if shared else AutoModelForSequenceClassification.from_pretrained(folder / "reward")
    reward = None if toy else AutoModelForSequenceClassification.from_pretrained(folder / "reward")
    lora = {"task_type": "CAUSAL_LM", "target_modules": "all-linear", "lora_alpha": 16}
    peft_config = LoraConfig(r=row["rank"], **lora) if "rank" in row else None
    batch = row.get("batch", BATCH)
    settings = {
        "output_dir": str(folder / "output"), "per_device_train_batch_size": batch,
        "gradient_accumulation_steps": ACCUMULATION, "num_mini_batches": 1, "num_ppo_epochs": EPOCHS, "seed": seed,
        "temperature": 1.0, "kl_coef": row.get("kl_coef", 0.05), "learning_rate": row.get("learning_rate", 3e-6),
        "lr_scheduler_type": "constant", "adam_epsilon": 1e-5, "bf16": False, "gradient_checkpointing": False,
        "use_cpu": True, "save_strategy": "no", "report_to": "none", "disable_tqdm": True,
        "per_device_eval_batch_size": batch * ACCUMULATION,
    }  # fmt: skip
    if side == "trl112":
        from trl.experimental.ppo import PPOConfig, PPOTrainer

        rollout = batch * ACCUMULATION
        episodes = {"total_episodes": rollouts * rollout, "local_rollout_forward_batch_size": rollout}
        args = PPOConfig(response_length=row["length"], num_sample_generations=0, **episodes, **settings)
        trainer = PPOTrainer(
            args=args, processing_class=tokenizer, model=policy, ref_model=None, value_model=critic,
            reward_model=share_model(row) if toy else reward, peft_config=peft_config,
            train_dataset=Dataset.from_dict({"input_ids": prompts}),
        )  # fmt: skip
        return trainer, trainer.policy_model

    from llm_recipes.ppo import PPOConfig, PPOTrainer

    def share(completion_ids, **_):
        return [sum(i < row["good"] for i in ids) / len(ids) for ids in completion_ids]

    steps = {"max_steps": rollouts * EPOCHS, "logging_steps": EPOCHS}  # TRL, too, logs every rollout
    trainer = PPOTrainer(
        model=policy, reward_funcs=[share if toy else reward], processing_class=tokenizer,
        args=PPOConfig(max_completion_length=row["length"], critic="shared" if shared else "separate", **steps, **settings),
        train_dataset=Dataset.from_dict({"prompt_ids": prompts}), critic_model=critic,
        peft_config=peft_config,
    )  # fmt: skip
    return trainer, trainer.model


def share_model(row: dict):
    """The toy reward in the only form that TRL 1.12 takes: a model, of which it reads the score at the last token."""
    import torch
    from transformers.modeling_outputs import BaseModelOutput

    class Share(torch.nn.Module):
        base_model_prefix = "backbone"

        def __init__(self):
            super().__init__()
            self.score = torch.nn.Identity()

        def backbone(self, input_ids, **_):
            share = (input_ids[:, -row["length"] :] < row["good"]).float().mean(1)
            return BaseModelOutput(hidden_states=(share[:, None, None].expand(*input_ids.shape, 1),))

    return Share()


def measure(side: str, row: dict, seed: int, rollouts: int, folder: Path) -> dict:
    """Trains one side in this process. Rollout 0 is the warm-up, and one ends with its last step of the policy."""
    from torch.optim.optimizer import register_optimizer_step_post_hook
    from transformers import GenerationMixin

    prompts, stamps, tokens = json.loads((folder / "prompts.json").read_text()), [], []
    trainer, policy = build(side, row, seed, rollouts, folder, prompts)
    trained = {id(p) for p in policy.parameters() if p.requires_grad}

    def stepped(optimizer, *_):  # a critic may have an optimizer of its own
        if any(id(p) in trained for group in optimizer.param_groups for p in group["params"]):
            stamps.append((time.perf_counter(), time.process_time()))

    def counted(self, inputs=None, generate=GenerationMixin.generate, **options):
        output = generate(self, inputs, **options)
        ids, prompt = getattr(output, "sequences", output), options.get("input_ids", inputs)
        tokens.append(ids.shape[0] * (ids.shape[1] - prompt.shape[1]))
        return output

    hook, GenerationMixin.generate = register_optimizer_step_post_hook(stepped), counted
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    trainer.train()
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    hook.remove()
    assert len(stamps) == rollouts * EPOCHS, f"{len(stamps)} optimizer steps"
    assert sum(tokens) * (rollouts + 1) == rollouts * len(prompts) * row["length"], f"{sum(tokens)} tokens"
    ends = stamps[EPOCHS - 1 :: EPOCHS]
    spans = [(b[0] - a[0], b[1] - a[1]) for a, b in pairwise(ends)]
    result = {"wall": [wall for wall, _ in spans], "cpu": [cpu for _, cpu in spans], "peak_mib": peak}
    result |= {"before_mib": before, "optimizer_steps": len(stamps), "tokens": sum(tokens), "trl": version("trl")}
    return result | (judge(policy, row, folder, prompts) if "good" in row else {})


def judge(policy, row: dict, folder: Path, prompts: list) -> dict:
    """Reward and KL divergence (sum over a completion) of a trained policy, on 1024 completions."""
    import torch
    from transformers import AutoModelForCausalLM

    torch.manual_seed(0)
    reference = AutoModelForCausalLM.from_pretrained(folder / "policy")
    prompts = torch.tensor(prompts[:1024])
    policy.eval()
    sampling = {"max_new_tokens": row["length"], "do_sample": True, "temperature": 1.0, "top_k": 0, "top_p": 1.0}
    with torch.no_grad():
        ids = policy.generate(prompts, attention_mask=torch.ones_like(prompts), **sampling)
        start = prompts.shape[1]
        scores = (model(ids).logits[:, start - 1 : -1].log_softmax(-1) for model in (policy, reference))
        own, initial = (s.gather(-1, ids[:, start:, None]).squeeze(-1) for s in scores)
    reward = (ids[:, start:] < row["good"]).float().mean()
    return {"reward": reward.item(), "kl": (own - initial).sum(1).mean().item()}


def environment(folder: Path) -> None:
    if not (folder / "trl-1.12.0.dist-info").is_dir():
        command = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target", folder, "trl==1.12.0"]
        subprocess.run(command, check=True)


def start(side: str, name: str, seed: int, folder: Path, rollouts: int, args) -> dict:
    """Runs one side, or `save_models`, in a fresh process."""
    job = {"side": side, "row": name, "seed": seed, "folder": str(folder), "rollouts": rollouts}
    own = {"OMP_NUM_THREADS": str(args.threads), "TOKENIZERS_PARALLELISM": "false", "TRL_EXPERIMENTAL_SILENCE": "1"}
    own |= {"HF_HUB_OFFLINE": "1", "HF_HOME": str(folder / "hf"), "HF_DATASETS_CACHE": str(folder / "cache")}
    if side == "trl112":
        own["PYTHONPATH"] = os.pathsep.join(filter(None, [str(args.environment), os.environ.get("PYTHONPATH")]))
    load = os.getloadavg()[0]
    command = [sys.executable, __file__, "--job", json.dumps(job)]
    done = subprocess.run(command, env=os.environ | own, capture_output=True, text=True)
    if done.returncode:
        sys.exit(f"{side}, {name}: {done.stdout[-2000:]}{done.stderr[-3000:]}")
    return {"side": side, "seed": seed, "loadavg": load} | json.loads((folder / "result.json").read_text())


def spread(values: list, digits: int = 2) -> str:
    return f"{statistics.median(values):.{digits}f} ({min(values):.{digits}f}-{max(values):.{digits}f})"


def table(name: str, runs: list) -> str:
    """One line a side; the ratios are of the medians within one round."""
    lines = []
    for side in ROWS[name]["sides"]:
        mine = [run for run in runs if run["side"] == side]
        theirs = [run for run in runs if run["side"] == "trl112"]
        line = f"{name:<11} {side:<12}"
        for key in ("wall", "cpu"):
            line += f"{spread([second for run in mine for second in run[key]]):>20} s {key}"
        line += f"{spread([run['peak_mib'] for run in mine], 0):>18} MiB"
        if side != "trl112":
            pairs = list(zip(theirs, mine, strict=True))
            for key in ("wall", "cpu"):
                ratios = [statistics.median(a[key]) / statistics.median(b[key]) for a, b in pairs]
                line += f"{spread(ratios):>19}x {key}"
            line += f"{spread([a['peak_mib'] / b['peak_mib'] for a, b in pairs]):>19}x memory"
        lines.append(line)
    return "\n".join(lines)


def main(args) -> None:
    environment(args.environment)
    args.output.parent.mkdir(parents=True, exist_ok=True)
    results = json.loads(args.output.read_text()) if args.output.is_file() else {}  # other rows stay
    packages = {name: version(name) for name in ("torch", "transformers", "accelerate", "peft", "trl")}
    machine = {"packages": packages, "threads": args.threads, "cpus": os.cpu_count(), "system": platform.platform()}
    rounds, rollouts = (args.seeds, 25) if args.quality else (args.rounds, args.rollouts + 1)
    for name in ["toy"] if args.quality else args.rows:
        row = TOY if args.quality else ROWS[name]
        results[name] = {"shape": row, "runs": (runs := [])} | machine
        for seed in range(1, rounds + 1):
            with tempfile.TemporaryDirectory() as folder:
                start("models", name, seed, Path(folder), rollouts, args)
                for side in row["sides"][:: 1 if seed % 2 else -1]:  # no side is always the last
                    runs.append(run := start(side, name, seed, Path(folder), rollouts, args))
                    args.output.write_text(json.dumps(results) + "\n")
                    quality = f", reward {run['reward']:.3f}, KL {run['kl']:.2f}" if args.quality else ""
                    print(f"{name} {seed}: {side} {spread(run['wall'])} s{quality}", file=sys.stderr, flush=True)
        if not args.quality:
            print(table(name, runs), flush=True)
    for side in TOY["sides"] if args.quality else ():
        mine = [run for run in runs if run["side"] == side]
        print(f"toy {side:<12} reward {spread([r['reward'] for r in mine], 3)}, KL {spread([r['kl'] for r in mine])}")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", nargs="+", choices=ROWS, default=list(ROWS))
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--rollouts", type=int, default=10, help="measured in each process, after one to warm up")
    parser.add_argument("--quality", action="store_true", help="reward and KL on the toy task instead of speed")
    parser.add_argument("--seeds", type=int, default=5, help="of --quality")
    parser.add_argument("--threads", type=int, default=1, help="of every side; on a busy machine threads wait")
    parser.add_argument("--environment", type=Path, default=Path.home() / ".cache/llm_recipes/trl-1.12.0")
    parser.add_argument("--output", type=Path, default=Path(__file__).parent / "results/ppo_vs_trl112.json")
    parser.add_argument("--job", type=json.loads, help=argparse.SUPPRESS)  # what a fresh process is to do
    args = parser.parse_args()
    if not args.job:
        main(args)
    else:
        job, folder = args.job, Path(args.job["folder"])
        row, result = (ROWS | {"toy": TOY})[job["row"]], {}
        if job["side"] == "models":
            save_models(row, job["seed"], job["rollouts"], folder)
        else:
            result = measure(job["side"], row, job["seed"], job["rollouts"], folder)
        (folder / "result.json").write_text(json.dumps(result))
