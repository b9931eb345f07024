"""Two machines, played by two launchers on this one over loopback, each with one process."""

import contextlib
import os
import random
import signal
import socket
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from llm_recipes import outputs
from llm_recipes.checkpoints import checkpoints, damage
from llm_recipes.errors import UserError
from tests.running import PRETRAIN, ROOT, TINY_MODEL, Result, curve, difference, launch, write_texts

FULL = pytest.mark.skipif(not os.environ.get("LLM_RECIPES_FULL"), reason="the full matrix: LLM_RECIPES_FULL=1")
ACCELERATE = Path(sys.executable).parent / "accelerate"
KEYS = {
    "global_batch_size": 8, "max_steps": 8, "save_steps": 4, "per_device_train_batch_size": 2, "lr_scheduler_type": "cosine",
    "model_config": TINY_MODEL | {"tie_word_embeddings": True},
}  # fmt: skip


def free_port() -> int:
    """Below the ports that the system hands out: it would give this one away before the launchers have started."""
    while True:
        with socket.socket() as probe, contextlib.suppress(OSError):
            probe.bind(("127.0.0.1", port := random.randrange(20000, 30000)))
            return port


def launch_nodes(config: str, *argv, fault: str = "", rank: int | None = None, folders=(".", "."), timeout=240):
    """Results of both launchers; `fault` as in tests.running.launch, `folders` the working directories of the nodes."""
    script = ROOT / "tests/faulty.py" if fault else PRETRAIN
    env = {key: value for key, value in os.environ.items() if key != "ACCELERATE_USE_CPU"}
    env |= {"FAULT": fault, "FAULT_SCRIPT": str(PRETRAIN), "FAULT_RANK": "" if rank is None else str(rank)}
    port, started = free_port(), []
    for node, folder in enumerate(folders):
        command = [
            ACCELERATE, "launch", "--config_file", ROOT / f"accelerate_configs/{config}.yaml", "--num_processes", 2,
            "--machine_rank", node, "--main_process_ip", "127.0.0.1", "--main_process_port", port, script, *argv,
        ]  # fmt: skip
        with open(f"node{node}.out", "w") as out, open(f"node{node}.err", "w") as err:
            started.append(subprocess.Popen(list(map(str, command)), stdout=out, stderr=err, env=env, cwd=folder))
    try:
        codes = [process.wait(timeout) for process in started]
    finally:
        for process in started:
            process.terminate()  # torchrun's agent ends its workers
            process.wait(60)
    return [
        Result(code, Path(f"node{node}.out").read_text(), Path(f"node{node}.err").read_text())
        for node, code in enumerate(codes)
    ]


def compare(first: str, second: str) -> None:
    """Losses and gradient norms of every step within 2e-6, final weights within 2e-5."""
    one, two = curve(first), curve(second)
    assert max(abs(a - b) for (a, _), (b, _) in zip(one, two, strict=True)) <= 2e-6, (one, two)
    assert [b for _, b in two] == pytest.approx([a for _, a in one], rel=2e-6)
    assert difference(first, second) < 2e-5


DOUBLES = {  # of the scheduler: its commands on one machine
    "scontrol": """[[ $1 = show ]] && printf '127.0.0.1\\n127.0.0.1\\n' || echo "$@" >>requeued""",
    "scancel": "[[ $* = '--signal=TERM 7' ]] && kill -TERM $(cat tasks)",
    "srun": """
        while [[ $1 = --* ]]; do shift; done
        for node in 0 1; do SLURM_NODEID=$node "$@" 2>node$node.err & started+=($!); done
        echo "${started[@]}" >tasks
        code=0
        for task in "${started[@]}"; do wait "$task" || code=$?; done
        exit $code""",
}


def submit(doubles: Path, *argv, warned: bool = False) -> Result:
    """The exit code of accelerate_configs/slurm.sh on two nodes of one process each."""
    env = {key: value for key, value in os.environ.items() if key != "ACCELERATE_USE_CPU"}
    env |= {
        "PATH": f"{doubles}:{ACCELERATE.parent}:{env['PATH']}", "SLURM_JOB_ID": "7", "SLURM_JOB_NODELIST": "node[0-1]",
        "SLURM_NNODES": "2", "SLURM_GPUS_ON_NODE": "1", "SLURM_CPUS_PER_TASK": "1",
    }  # fmt: skip
    # the shell's own number stays that of the script after exec
    start = f'{"BATCH=$$ " if warned else ""}exec bash "$@"'
    command = ["bash", "-c", start, "bash", ROOT / "accelerate_configs/slurm.sh", *argv]
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True, env=env, timeout=240)
    return Result(done.returncode, done.stdout, done.stderr + Path("node0.err").read_text())


def test_slurm_script_saves_requeues_and_continues(tiny, tmp_path):
    """Over two nodes, warned at step 5 and queued again, the run is that of one launch on one machine."""
    (tmp_path / "doubles").mkdir()
    for name, body in DOUBLES.items():
        (tmp_path / "doubles" / name).write_text(f"#!/bin/bash\n{body}\n")
        (tmp_path / "doubles" / name).chmod(0o755)
    path = tiny(**KEYS)
    one = launch("ddp", "--config", path, "--output_dir", "one")
    assert one.code == 0, one.err[-3000:]

    job = ["accelerate_configs/ddp.yaml", "tests/parallel/warned.py", "--config", path, "--output_dir", "two"]
    job[:2] = [ROOT / job[0], ROOT / job[1]]
    stopped = submit(tmp_path / "doubles", *job, warned=True)
    assert stopped.code != 0 and "SIGTERM: saved two/checkpoint-5; the same command continues" in stopped.err
    assert Path("requeued").read_text() == "requeue 7\n"
    again = submit(tmp_path / "doubles", *job)
    assert again.code == 0, again.err[-3000:]
    compare("one", "two")
    assert Path("requeued").read_text() == "requeue 7\n"  # a finished run is not

    failed = submit(tmp_path / "doubles", "missing.yaml", *job[1:])
    assert failed.code != 0 and Path("requeued").read_text() == "requeue 7\n"  # nor one that fails of itself


@FULL
@pytest.mark.parametrize("config", ["ddp", "zero3"])
def test_two_nodes_learn_what_one_learns_and_survive_a_kill(tiny, config):
    path = tiny(**KEYS)
    one = launch(config, "--config", path, "--output_dir", "one")
    assert one.code == 0, one.err[-3000:]
    first, second = launch_nodes(f"{config}_2node", "--config", path, "--output_dir", "two")
    assert (first.code, second.code) == (0, 0), first.err[-3000:] + second.err[-3000:]
    assert "2 processes, cpu, fp32" in first.out and "step " not in second.out  # the first node speaks
    compare("one", "two")

    killed = launch_nodes(
        f"{config}_2node",
        "--config",
        path,
        "--output_dir",
        "parts",
        fault=f"send_signal:5:{signal.SIGKILL.value}",
        rank=1,
    )
    assert all(node.code != 0 for node in killed)
    assert [p.name for p in checkpoints("parts")] == ["checkpoint-4"] and damage(checkpoints("parts")[0]) is None
    again = launch_nodes(f"{config}_2node", "--config", path, "--output_dir", "parts")
    assert [node.code for node in again] == [0, 0], again[0].err[-3000:]
    assert curve("parts") == curve("two") and difference("parts", "two") == 0


@FULL
def test_nodes_with_different_data_are_told(tiny):
    path = tiny(**KEYS, datasets=[{"path": "texts.jsonl"}])
    for node in (0, 1):
        Path(f"machine{node}").mkdir()
        write_texts(Path(f"machine{node}/texts.jsonl"), seed=node)
    done = launch_nodes("ddp_2node", "--config", path, folders=("machine0", "machine1"))
    for node in done:
        assert node.code != 0
        assert "the processes do not see the same data or tokenizer: share the files between the machines" in node.err
    assert not Path("out").exists()


def test_an_output_dir_that_is_not_shared_is_said_before_training(tmp_path, monkeypatch):
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setattr(outputs, "SHARED_WITHIN", 0.3)
    state = SimpleNamespace(wait_for_everyone=lambda: None)
    args = SimpleNamespace(output_dir=str(tmp_path / "out"), world_size=2, distributed_state=state)
    with pytest.raises(UserError, match="cannot be seen here: all machines must share it"):
        outputs.claim(args, False, {"config": {}, "identity": {}})
    assert not Path(args.output_dir).exists()
