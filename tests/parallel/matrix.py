"""Every layout and strategy against one process: the cases, and a script that runs them all and prints docs/parallelism.md's table.

python -m tests.parallel.matrix /tmp/matrix            # half an hour on two cores
python -m tests.parallel.matrix /tmp/matrix 3d hsdp    # some of them
"""

import json
import os
import shutil
import sys
from pathlib import Path
from typing import NamedTuple

from tests.running import ROOT, TINY_MODEL, curve, difference, launch, metrics, run, write_config

MODEL = TINY_MODEL | {
    "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 4, "num_attention_heads": 4,
    "num_key_value_heads": 2, "tie_word_embeddings": False,
}  # fmt: skip
MIXTRAL = MODEL | {
    "model_type": "mixtral", "num_hidden_layers": 2, "num_local_experts": 4, "num_experts_per_tok": 2,
    "output_router_logits": True, "router_aux_loss_coef": 0.02,
}  # fmt: skip
KEYS = {
    "model_config": MODEL, "eval_fraction": 0.5, "global_batch_size": 8, "per_device_train_batch_size": 1, "max_steps": 8,
    "save_steps": 4, "learning_rate": 1e-3, "lr_scheduler_type": "cosine", "weight_decay": 0.1, "max_grad_norm": 0.5,
}  # fmt: skip

# What is trained; one process trains each of these once, and every case is held to it.
REFERENCES = {
    "dense": {},
    "tied": {"model_config": MODEL | {"tie_word_embeddings": True}},
    "packed": {"isolate_documents": True},  # positions restart at each document
    "prefix": {"objective": "prefix"},  # rows differ in their targets, and bring a mask
    "ramp": {"batch_size_ramp": {"start": 4, "steps": 2}, "z_loss": 1e-3},
    "experts": {"model_config": MIXTRAL},
}


class Case(NamedTuple):
    """One launch: `how` is a layout of ours, or a file of accelerate_configs/ with a shim of tests/running.py if it needs one."""

    processes: int
    how: dict | str
    reference: str = "dense"
    keys: dict = {}  # noqa: RUF012
    shim: str = ""
    resumes: str | None = None  # the case whose checkpoint at step 4 it starts from


SCHEDULES = ("GPipe", "1F1B", "Interleaved1F1B", "ZBVZeroBubble", "LoopedBFS", "InterleavedZeroBubble", "DualPipeV")
SHORT = {  # in the suite, in one launch for each number of processes
    "TP 2": Case(2, {"tp": 2}),
    "TP 2, tied": Case(2, {"tp": 2}, "tied"),
    "TP 2, experts": Case(2, {"tp": 2}, "experts"),
    "EP 2 x FSDP2 2": Case(2, {"dp_shard": 2, "ep": 2}, "experts"),
    "FSDP2 2 of ours": Case(2, {"dp_shard": 2}),
    "FSDP2 2 of ours, experts": Case(2, {"dp_shard": 2}, "experts"),
    "DDP 2 of ours": Case(2, {"dp_replicate": 2}, "prefix"),
    **{f"PP 2, {kind}": Case(2, {"pp": 2}, "dense", {"pipeline_schedule": kind}) for kind in SCHEDULES[:4]},
    "PP 2, tied": Case(2, {"pp": 2}, "tied"),
    "PP 2, tied, ZBVZeroBubble": Case(2, {"pp": 2}, "tied", {"pipeline_schedule": "ZBVZeroBubble"}),
    "PP 2, packed": Case(2, {"pp": 2}, "packed"),
    "PP 2, prefix": Case(2, {"pp": 2}, "prefix"),
    "PP 2, ramp and z-loss": Case(2, {"pp": 2}, "ramp"),
    "PP 2, recomputed": Case(2, {"pp": 2}, "dense", {"activation_checkpointing": True}),
    "PP 2, resumed": Case(2, {"pp": 2}, resumes="PP 2, 1F1B"),
    "TP 2, resumed from PP 2": Case(2, {"tp": 2}, resumes="PP 2, 1F1B"),
    "PP 2, resumed from TP 2": Case(2, {"pp": 2}, resumes="TP 2"),
    "TP 2, tied, resumed from PP 2": Case(2, {"tp": 2}, "tied", resumes="PP 2, tied"),
    "FSDP2 2, resumed from TP 2, experts": Case(2, {"dp_shard": 2}, "experts", resumes="TP 2, experts"),
    "FSDP2 2 x TP 2": Case(4, {"dp_shard": 2, "tp": 2}, "tied"),
    "PP 2 x TP 2": Case(4, {"pp": 2, "tp": 2}, "tied"),
    "PP 2 x FSDP2 2": Case(4, {"pp": 2, "dp_shard": 2}, "tied"),
    "FSDP2 2 x TP 2, resumed from PP 2 x TP 2": Case(4, {"dp_shard": 2, "tp": 2}, "tied", resumes="PP 2 x TP 2"),
    "3D: PP 2 x FSDP2 2 x TP 2": Case(8, {"pp": 2, "dp_shard": 2, "tp": 2}),
}  # fmt: skip
FULL = SHORT | {
    **{f"PP 2, {kind}": Case(2, {"pp": 2}, "dense", {"pipeline_schedule": kind}) for kind in SCHEDULES[4:]},
    "TP 2, packed": Case(2, {"tp": 2}, "packed"),
    "FSDP2 2 of ours, tied": Case(2, {"dp_shard": 2}, "tied"),
    "PP 2, tied, resumed from TP 2": Case(2, {"pp": 2}, "tied", resumes="TP 2, tied"),
    "EP 2 x FSDP2 2, resumed": Case(2, {"dp_shard": 2, "ep": 2}, "experts", resumes="EP 2 x FSDP2 2"),
    "DDP 2": Case(2, "ddp"),
    "DDP 2, resumed": Case(2, "ddp", resumes="DDP 2"),
    "DDP 4": Case(4, "ddp"),
    "DDP 4, resumed from 2": Case(4, "ddp", resumes="DDP 2"),
    **{f"ZeRO-{stage} on 2": Case(2, f"zero{stage}") for stage in (1, 2, 3)},
    **{f"ZeRO-{stage} on 2, resumed": Case(2, f"zero{stage}", resumes=f"ZeRO-{stage} on 2") for stage in (1, 2, 3)},
    **{f"ZeRO-{stage} on 4, resumed from 2": Case(4, f"zero{stage}", resumes=f"ZeRO-{stage} on 2") for stage in (2, 3)},
    "ZeRO-3 on 2, tied": Case(2, "zero3", "tied"),
    "ZeRO-3 on 8": Case(8, "zero3"),
    "ZeRO-2 on 2, states in host memory": Case(2, "zero2_offload"),
    "ZeRO-3 on 2, all in host memory": Case(2, "zero3_offload"),
    "FSDP2 2": Case(2, "fsdp2", shim="fsdp_on_cpu"),
    "FSDP2 2, resumed": Case(2, "fsdp2", shim="fsdp_on_cpu", resumes="FSDP2 2"),
    "FSDP2 4, resumed from 2": Case(4, "fsdp2", shim="fsdp_on_cpu", resumes="FSDP2 2"),
    "FSDP2 2, tied": Case(2, "fsdp2", "tied", shim="fsdp_on_cpu"),
    "FSDP2 2, all in host memory": Case(2, "fsdp2_offload", shim="fsdp_on_cpu"),
    "FSDP2 8": Case(8, "fsdp2", shim="fsdp_on_cpu"),
    "HSDP 2 x 2": Case(4, "hsdp", shim="fsdp_on_cpu"),
    "FSDP2 x CP 2 (ring attention)": Case(2, "fsdp2_cp", shim="ring_on_cpu"),
    "ZeRO-3 x SP 2 (Ulysses)": Case(2, "zero3_sp"),
    "DDP 2 x TP 2": Case(4, {"dp_replicate": 2, "tp": 2}),
    "PP 2 x DDP 2": Case(4, {"pp": 2, "dp_replicate": 2}),
    "PP 4": Case(4, {"pp": 4}),
    "EP 2 x FSDP2 4": Case(4, {"dp_shard": 4, "ep": 2}, "experts"),
    "EP 2 x FSDP2 2 x TP 2": Case(4, {"dp_shard": 2, "tp": 2, "ep": 2}, "experts"),
    "HSDP 2 x 2 x TP 2": Case(8, {"dp_replicate": 2, "dp_shard": 2, "tp": 2}),
    "3D with DDP: PP 2 x DDP 2 x TP 2": Case(8, {"pp": 2, "dp_replicate": 2, "tp": 2}),
    "3D, tied": Case(8, {"pp": 2, "dp_shard": 2, "tp": 2}, "tied"),
    "3D, ZBVZeroBubble": Case(8, {"pp": 2, "dp_shard": 2, "tp": 2}, "dense", {"pipeline_schedule": "ZBVZeroBubble"}),
    "3D, InterleavedZeroBubble, tied": Case(
        8, {"pp": 2, "dp_shard": 2, "tp": 2}, "tied", {"pipeline_schedule": "InterleavedZeroBubble"}
    ),
    "3D, resumed": Case(8, {"pp": 2, "dp_shard": 2, "tp": 2}, resumes="3D: PP 2 x FSDP2 2 x TP 2"),
    "HSDP x TP, resumed from 3D": Case(
        8, {"dp_replicate": 2, "dp_shard": 2, "tp": 2}, resumes="3D: PP 2 x FSDP2 2 x TP 2"
    ),
}  # fmt: skip


def folder(name: str) -> str:
    return "".join(c if c.isalnum() else "_" for c in name)


def words(keys: dict) -> list[str]:
    return [f"--{key}={value if isinstance(value, str) else json.dumps(value)}" for key, value in keys.items()]


def train(cases: dict[str, Case]) -> None:
    """Trains `cases` and what they are held to into folders of the working directory; those of ours share their launches."""
    config = write_config(Path("."), **KEYS)
    for name in dict.fromkeys(case.reference for case in cases.values()):
        if not Path(name, "metrics.json").exists():
            done = run("--config", config, "--output_dir", name, *words(REFERENCES[name]))
            assert done.code == 0, (name, done.err[-9000:])
    together = {}
    for name, case in cases.items():
        keys = words(REFERENCES[case.reference] | case.keys)
        argv = ["--config", str(config), "--output_dir", folder(name), *keys]
        start = case.resumes and folder(case.resumes)
        if isinstance(case.how, dict):
            together.setdefault(case.processes, []).append({"sizes": case.how, "argv": argv, "start": start})
        else:
            begin(folder(name), start)
            done = launch(case.how, *argv, fault=case.shim, processes=case.processes, timeout=600)
            assert done.code == 0, (name, done.err[-9000:])
    for processes, listed in together.items():
        Path(f"cases{processes}.json").write_text(json.dumps(listed))
        worker = ROOT / "tests/parallel/worker.py"
        done = launch("ddp", f"cases{processes}.json", script=worker, processes=processes, timeout=900)
        assert done.code == 0, done.err[-3000:]


def begin(output_dir: str, start: str | None) -> None:
    """Puts into `output_dir` what a run of the folder `start` had left after its checkpoint at step 4."""
    if start:
        Path(output_dir).mkdir()
        shutil.copy(f"{start}/run.yaml", output_dir)
        shutil.copytree(f"{start}/checkpoint-4", f"{output_dir}/checkpoint-4")


def differences(name: str, case: Case) -> dict[str, float]:
    """Greatest difference from one process: loss and gradient norm of any step, final weights, held-out loss."""
    one, here = curve(case.reference), curve(folder(name))
    assert len(one) == len(here) == KEYS["max_steps"]
    loss, norm = (max(abs(a[i] - b[i]) for a, b in zip(one, here, strict=True)) for i in (0, 1))
    held_out = abs(metrics(case.reference)["eval_loss"] - metrics(folder(name))["eval_loss"])
    return {"loss": loss, "grad_norm": norm, "weights": difference(case.reference, folder(name)), "eval_loss": held_out}


def main():
    place, *chosen = sys.argv[1:]
    cases = {name: FULL[name] for name in chosen or FULL}
    Path(place).mkdir(parents=True, exist_ok=True)
    os.chdir(place)
    train(cases)
    print("| strategy | processes | loss | gradient norm | weights | held-out loss |")
    print("| --- | ---: | ---: | ---: | ---: | ---: |")
    for name, case in cases.items():
        cells = " | ".join(f"{value:.1e}" for value in differences(name, case).values())
        print(f"| {name} | {case.processes} | {cells} |")


if __name__ == "__main__":
    main()
