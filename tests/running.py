"""Runs recipes in child processes forked from a server that has the slow imports done, with faults on request."""

import functools
import json
import multiprocessing
import os
import random
import resource
import runpy
import signal
import subprocess
import sys
import traceback
from pathlib import Path
from typing import NamedTuple

import yaml

ROOT = Path(__file__).resolve().parents[1]
PRETRAIN = ROOT / "recipes/pretrain/run.py"

_context = multiprocessing.get_context("forkserver")
_context.set_forkserver_preload(
    ["trl", "deepspeed", "llm_recipes.outputs", "llm_recipes.tokenization", "tests.running"]
)

TINY_MODEL = {
    "model_type": "llama", "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2,
    "num_attention_heads": 2, "max_position_embeddings": 64,
}  # fmt: skip


class Result(NamedTuple):
    code: int
    out: str
    err: str


def write_texts(path: Path, rows: int = 120, seed: int = 0) -> Path:
    """A jsonl of `rows` small documents that a model can learn something from."""
    rng = random.Random(seed)
    words = [*"the cat dog sees eats likes red fish runs".split(), "a", "12", "345"]  # noqa: SIM905
    with path.open("w") as file:
        for _ in range(rows):
            file.write(json.dumps({"text": " ".join(rng.choices(words, k=rng.randint(5, 60)))}) + "\n")
    return path


def write_config(folder: Path, name: str = "tiny.yaml", **keys) -> Path:
    if not (folder / "texts.jsonl").exists():
        write_texts(folder / "texts.jsonl")
    config = {
        "output_dir": str(folder / "out"), "datasets": [{"path": str(folder / "texts.jsonl")}], "eval_fraction": 0.1,
        "sequence_length": 32, "tokenizer_vocab_size": 300, "model_config": TINY_MODEL, "global_batch_size": 4,
        "per_device_train_batch_size": 4, "max_steps": 4, "learning_rate": 1e-2, "logging_steps": 1, "save_steps": 2,
        "use_cpu": True,
    }  # fmt: skip
    config = {key: value for key, value in (config | keys).items() if value is not None}
    (folder / name).write_text(yaml.safe_dump(config))
    return folder / name


def run(
    *argv, script: Path = PRETRAIN, fault: str | None = None, env: dict | None = None, timeout: int = 120
) -> Result:
    """`python script *argv` in a forked child, from the current directory; `fault` is a key of FAULTS with its arguments."""
    child = _context.Process(target=_child, args=(str(script), [str(a) for a in argv], fault, env or {}, os.getcwd()))
    child.start()
    child.join(timeout)
    if child.is_alive():
        child.kill()
        raise TimeoutError(f"{script} {argv}: still running after {timeout} s")
    logs = Path(os.getcwd())
    return Result(child.exitcode, (logs / "child.out").read_text(), (logs / "child.err").read_text())


def _child(script, argv, fault, env, folder):
    os.chdir(folder)
    os.environ.update(env)
    for name, stream in (("child.out", sys.stdout), ("child.err", sys.stderr)):
        with open(name, "w") as file:
            os.dup2(file.fileno(), stream.fileno())
    sys.argv = [script, *argv]
    code = 0
    try:
        apply(fault)
        sys.path[0] = str(Path(script).parent)
        runpy.run_path(script, run_name="__main__")
    except SystemExit as stop:
        code = stop.code if isinstance(stop.code, int) else int(stop.code is not None)
    except BaseException:
        traceback.print_exc()
        code = 1
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def apply(fault: str | None) -> None:
    if fault:
        name, *arguments = fault.split(":")
        FAULTS[name](*map(int, arguments))


# ---- faults, applied in the child before the recipe starts ------------------------------------------


def _at_step(step: int, act):
    """Calls `act()` at the beginning of optimizer step `step`, counted from 1."""
    from llm_recipes.progress import Throughput

    def on_step_begin(self, args, state, control, **kwargs):
        if state.global_step == step - 1:
            act()

    Throughput.on_step_begin = on_step_begin


def send_signal(step: int, number: int):
    _at_step(step, lambda: os.kill(os.getpid(), number))


def stop_uncompiled(step: int):
    """SIGTERM at `step`, and torch.compile does nothing: compiling takes a minute a model on the CPU."""
    import torch

    torch._dynamo.config.disable = True
    send_signal(step, signal.SIGTERM)


def kill_in_save(save: int, write: int):
    """SIGKILL at the `write`-th file of the `save`-th checkpoint: before, in the middle and after the weights, ..."""
    import torch
    from transformers import Trainer

    from llm_recipes import checkpoints

    counts = {"save": 0, "write": 0}

    def counted(function, start=False):
        def call(*args, **kwargs):
            counts["save"] += start
            counts["write"] = 0 if start else counts["write"] + 1
            if not start and counts["save"] == save and counts["write"] == write:
                if args and isinstance(args[-1], str | os.PathLike):
                    Path(args[-1]).parent.mkdir(parents=True, exist_ok=True)
                    Path(args[-1]).write_bytes(b"half")
                os.kill(os.getpid(), signal.SIGKILL)
            return function(*args, **kwargs)

        return call

    Trainer._save_checkpoint = counted(Trainer._save_checkpoint, start=True)
    torch.save = counted(torch.save)
    checkpoints._digest = counted(checkpoints._digest)


def poison_window(window: int, kind: int = 0):
    """The model's loss is nan, inf or 1000 times too large (kind 0, 1, 2) on any batch that holds this training window."""
    import torch
    from transformers import LlamaForCausalLM, Trainer

    forward, seen = LlamaForCausalLM.forward, {}
    init = Trainer.__init__

    def find(self, *args, **kwargs):
        init(self, *args, **kwargs)
        seen["ids"] = torch.as_tensor(self.train_dataset.windows[window]["input_ids"]).long()

    def poisoned(self, input_ids=None, **kwargs):
        out = forward(self, input_ids=input_ids, **kwargs)
        if self.training and (input_ids == seen["ids"]).all(1).any():
            out["loss"] = out["loss"] * [float("nan"), float("inf"), 1000.0][kind]
        return out

    Trainer.__init__, LlamaForCausalLM.forward = find, poisoned


def poison_step(step: int):
    """The loss of the `step`-th optimizer step is nan, the first time."""
    from transformers import LlamaForCausalLM

    forward, armed = LlamaForCausalLM.forward, [False]

    @functools.wraps(forward)  # the Trainer reads its signature
    def poisoned(self, *args, **kwargs):
        out = forward(self, *args, **kwargs)
        if self.training and armed.pop():
            out["loss"] = out["loss"] * float("nan")
        armed.append(False)
        return out

    LlamaForCausalLM.forward = poisoned
    once = iter([True])
    _at_step(step, lambda: armed.append(next(once, False)))


def limit_file_size(kilobytes: int):
    """Writing beyond this size fails as on a full disk, from the first training step on."""

    def act():
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (kilobytes * 1024, resource.RLIM_INFINITY))

    _at_step(3, act)


def fsdp_on_cpu(_: int = 0):
    """Lets Accelerate run real FSDP2 on CPU processes: it only ever turns what it takes for GPUs into FSDP."""
    from accelerate.state import DistributedType, PartialState
    from transformers import TrainingArguments

    from llm_recipes import config

    original, config.check_launch = TrainingArguments.__post_init__, list

    def pretend(self):
        original(self)
        PartialState._shared_state["distributed_type"] = DistributedType.MULTI_GPU

    TrainingArguments.__post_init__ = pretend


FAULTS = {
    f.__name__: f
    for f in (send_signal, stop_uncompiled, kill_in_save, poison_step, poison_window, limit_file_size, fsdp_on_cpu)
}


def launch(
    config: str, *argv, fault: str = "", rank: int | None = None, processes: int = 2, timeout: int = 240
) -> Result:
    """`accelerate launch` of the pretraining recipe with accelerate_configs/<config>.yaml, for what needs several processes.

    `fault` as in `run`, on one `rank` or on all.
    """
    script = PRETRAIN if not fault else ROOT / "tests/faulty.py"
    command = [
        Path(sys.executable).parent / "accelerate", "launch", "--config_file", ROOT / f"accelerate_configs/{config}.yaml",
        "--num_processes", processes, "--main_process_port", 0, script, *argv,
    ]  # fmt: skip
    env = {key: value for key, value in os.environ.items() if key != "ACCELERATE_USE_CPU"}
    env |= {"FAULT": fault, "FAULT_RANK": "" if rank is None else str(rank)}
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True, timeout=timeout, env=env)
    return Result(done.returncode, done.stdout, done.stderr)
