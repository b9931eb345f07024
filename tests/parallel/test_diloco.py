"""DiLoCo: real launches of two workers against a plain loop of the algorithm, and interrupted between two outer steps."""

import ast
import copy
import json
import os
import re
import signal
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoConfig, AutoTokenizer

from llm_recipes.checkpoints import checkpoints, damage
from llm_recipes.config import DataConfig, Diloco, Source, SpikeGuard, WindowConfig
from llm_recipes.datasets import load_documents, make_windows
from llm_recipes.diloco import diloco_problems
from llm_recipes.models import from_scratch
from tests.running import curve, difference, launch, metrics, run

FULL = pytest.mark.skipif(not os.environ.get("LLM_RECIPES_FULL"), reason="the full matrix: LLM_RECIPES_FULL=1")
OUTER = {"sync_every": 3, "outer_learning_rate": 0.7, "outer_momentum": 0.9}
KEYS = {
    "global_batch_size": 8, "max_steps": 8, "save_steps": 4, "save_total_limit": 3, "lr_scheduler_type": "constant", "weight_decay": 0.1,
    "eval_strategy": "steps", "eval_steps": 4,
}  # fmt: skip


def plain_loop():
    """What the run in `straight` should be, by algorithm 1 of the paper in plain torch.

    (mean loss and mean gradient norm of every step, shared weights after steps 3, 6 and 8, held-out loss of each)
    """
    args = SimpleNamespace(seed=42, world_size=2, per_device_eval_batch_size=8, max_steps=8, dataloader_num_workers=0)
    documents = load_documents(DataConfig([Source("texts.jsonl")], eval_fraction=0.1), seed=42)
    tokenizer = AutoTokenizer.from_pretrained("straight")
    train, held, *_ = make_windows(documents, tokenizer, WindowConfig(32), 8, args)
    rows = torch.tensor(np.array(train["input_ids"]))[np.random.default_rng([42, 0]).permutation(len(train))]
    held = torch.tensor(np.array(held["input_ids"]))

    shared = from_scratch(AutoConfig.from_pretrained("straight"), 42)
    workers = [copy.deepcopy(shared) for _ in range(2)]
    momentum = [torch.zeros_like(p) for p in shared.parameters()]
    inner = []
    for worker in workers:
        groups = [[p for p in worker.parameters() if (p.ndim > 1) is decayed] for decayed in (True, False)]
        groups = [{"params": group, "weight_decay": decay} for group, decay in zip(groups, (0.1, 0.0), strict=True)]
        inner.append(torch.optim.AdamW(groups, lr=1e-2))
    logged, snapshots = [], []
    for step in range(8):
        seen = []
        for rank, (worker, optimizer) in enumerate(zip(workers, inner, strict=True)):
            mine = rows[step * 8 + rank * 4 :][:4]
            loss = worker(input_ids=mine, labels=mine).loss
            loss.backward()
            seen.append((loss.item(), torch.nn.utils.clip_grad_norm_(worker.parameters(), 1.0).item()))
            optimizer.step()
            optimizer.zero_grad()
        logged.append(tuple(map(np.mean, zip(*seen, strict=True))))
        if step in (2, 5, 7):
            with torch.no_grad():
                for buffer, kept, *own in zip(momentum, *(m.parameters() for m in (shared, *workers)), strict=True):
                    change = kept - sum(own) / 2
                    buffer.mul_(0.9).add_(change)
                    kept.sub_(0.7 * (change + 0.9 * buffer))
                    for weight in own:
                        weight.copy_(kept)
                snapshots.append((copy.deepcopy(shared.state_dict()), shared(input_ids=held, labels=held).loss.item()))
    return logged, snapshots


def furthest(folder: str, weights: dict) -> float:
    saved = load_file(f"{folder}/model.safetensors")
    return max((saved[name] - weights[name]).abs().max().item() for name in saved)


def test_equals_the_algorithm_and_resumes_between_outer_steps(tiny):
    path = tiny(**KEYS, diloco=OUTER)
    straight = launch("ddp", "--config", path, "--output_dir", "straight")
    assert straight.code == 0, straight.err[-3000:]
    assert "every process alone for 3 steps" in straight.out
    logged, snapshots = plain_loop()
    (losses, norms), (own_losses, own_norms) = zip(*curve("straight"), strict=True), zip(*logged, strict=True)
    assert losses == pytest.approx(own_losses, abs=1e-6) and norms == pytest.approx(own_norms, rel=2e-6)
    # between outer steps checkpoints and evaluations have the shared weights, those of step 3; the last step is an outer one
    (third, third_loss), _, (last, last_loss) = snapshots
    assert furthest("straight/checkpoint-4", third) < 1e-6 and furthest("straight", last) < 1e-6
    history = json.loads(Path("straight/checkpoint-8/trainer_state.json").read_text())["log_history"]
    losses = [row["eval_loss"] for row in history if "eval_loss" in row]
    assert losses == pytest.approx([third_loss, last_loss], abs=2e-6)
    for step, apart in ((4, True), (8, False)):
        files = (f"straight/checkpoint-{step}/diloco_{rank}.pt" for rank in (0, 1))
        one, two = (torch.load(file, weights_only=True)["weights"] for file in files)
        assert all((a - b).abs().max().item() > 1e-3 if apart else a.equal(b) for a, b in zip(one, two, strict=True))

    fault = f"send_signal:5:{signal.SIGTERM.value}"
    stopped = launch("ddp", "--config", path, "--output_dir", "parts", fault=fault, rank=1)
    assert stopped.code != 0 and "the same command continues from there" in stopped.err
    assert [p.name for p in checkpoints("parts")] == ["checkpoint-5", "checkpoint-4"]
    manifest = json.loads(Path("parts/checkpoint-5/complete.json").read_text())
    assert {"diloco_0.pt", "diloco_1.pt"} <= manifest["files"].keys() and damage(Path("parts/checkpoint-5")) is None
    again = launch("ddp", "--config", path, "--output_dir", "parts")
    assert again.code == 0, again.err[-3000:]
    assert curve("parts") == curve("straight") and difference("parts", "straight") == 0
    for rank in (0, 1):
        name = f"checkpoint-8/diloco_{rank}.pt"
        a, b = (torch.load(f"{folder}/{name}", weights_only=True) for folder in ("parts", "straight"))
        torch.testing.assert_close(a, b, rtol=0, atol=0)


@FULL
@pytest.mark.parametrize("objective", ["causal", "prefix"])
def test_an_outer_step_after_every_step_of_sgd_is_plain_ddp(tiny, objective):
    """Outer learning rate 1 and no momentum: the mean of the workers. Prefixes give the workers unequal numbers of targets."""
    keys = {"optim": "sgd", "learning_rate": 0.1, "max_grad_norm": 0, "objective": objective, "eval_strategy": "no"}
    path = tiny(**KEYS | keys)
    assert launch("ddp", "--config", path, "--output_dir", "ddp").code == 0
    outer = "{sync_every: 1, outer_learning_rate: 1.0, outer_momentum: 0.0}"
    done = launch("ddp", "--config", path, "--output_dir", "diloco", "--diloco", outer)
    assert done.code == 0, done.err[-3000:]
    worst = max(abs(a - b) for (a, _), (b, _) in zip(curve("ddp"), curve("diloco"), strict=True))
    assert worst <= 2e-6 and difference("ddp", "diloco") < 2e-6


@FULL
@pytest.mark.parametrize("keys", [{}, {"spike_guard": {"window": 4}}])
def test_a_loss_that_is_not_finite_on_one_worker_stops_all(tiny, keys):
    done = launch("ddp", "--config", tiny(**KEYS | keys, diloco=OUTER), fault="poison_step:5", rank=1)
    assert done.code != 0 and "step 5: the loss is not finite; stopped before the update" in done.err
    assert [p.name for p in checkpoints("out")] == ["checkpoint-4"] and damage(checkpoints("out")[0]) is None


@FULL
def test_what_is_communicated(tiny):
    """12 steps of DDP reduce 4 bytes a parameter each; of DiLoCo with sync_every 4, a quarter of that, and a few scalars."""
    script, path, sent = Path(__file__).with_name("counted.py"), tiny(max_steps=12, global_batch_size=8), {}
    for name, keys in {"ddp": [], "diloco": ["--diloco", "{sync_every: 4}"]}.items():
        done = launch("ddp", "--config", path, "--output_dir", name, *keys, script=script)
        assert done.code == 0, done.err[-3000:]
        sent[name] = ast.literal_eval(re.search(r"^bytes: (.*)", done.out, re.M).group(1))
    each = 4 * metrics("ddp")["parameters"]
    assert sent["ddp"]["allreduce_ tensors"] == 12 * each and sent["diloco"]["allreduce_ tensors"] == 3 * each
    # every step: the targets (int64), the flag (int32), and of DiLoCo the gradient norm (fp32); once the matmul rate (fp64)
    assert sent["ddp"]["allreduce_ scalars"] == 12 * (8 + 4) + 8
    assert sent["diloco"]["allreduce_ scalars"] == 12 * (8 + 4 + 4) + 8


@FULL
def test_other_workers_cannot_continue(tiny):
    path = tiny(**KEYS, diloco=OUTER)
    launch("ddp", "--config", path, fault=f"send_signal:5:{signal.SIGTERM.value}", rank=1)
    done = launch("ddp", "--config", path, processes=4)
    assert done.code != 0
    assert "out/checkpoint-5 was written by 2 workers of diloco: launch with --num_processes 2" in done.err


def test_one_process_is_refused(tiny):
    done = run("--config", tiny(**KEYS, diloco=OUTER))
    assert done.code == 2 and not Path("out").exists()
    assert "diloco: every worker has a whole model: launch two or more processes" in done.err
    assert "accelerate_configs/ddp.yaml, not single process" in done.err


@pytest.mark.parametrize(
    ("keys", "guard", "strategy", "fp16", "streaming", "why"),
    [
        ({"sync_every": 0}, None, "DDP", False, False, "sync_every must be at least 1"),
        ({"outer_learning_rate": 0.0}, None, "DDP", False, False, "outer_learning_rate above 0"),
        ({"outer_momentum": 1.0}, None, "DDP", False, False, "below 1"),
        ({}, None, "DeepSpeed ZeRO-3", False, False, "not DeepSpeed ZeRO-3"),
        ({}, None, "FSDP2", False, False, "not FSDP2"),
        ({}, SpikeGuard(action="skip"), "DDP", False, False, "use action: warn"),
        ({}, SpikeGuard(action="rollback"), "DDP", False, False, "use action: warn"),
        ({}, None, "DDP", True, False, "use bf16 or fp32"),
        ({}, None, "DDP", False, True, "set streaming: false"),
    ],
)
def test_what_cannot_be(keys, guard, strategy, fp16, streaming, why):
    (problem,) = diloco_problems(Diloco(**keys), guard, SimpleNamespace(fp16=fp16), strategy, streaming)
    assert problem.startswith("diloco: ") and why in problem


def test_what_can_be():
    args = SimpleNamespace(fp16=False)
    assert diloco_problems(Diloco(), SpikeGuard(), args, "DDP", False) == []
    assert diloco_problems(None, None, args, "DeepSpeed ZeRO-3", True) == []
