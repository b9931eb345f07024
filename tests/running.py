"""Runs recipes in child processes forked from a server that has the slow imports done, with faults on request."""

import functools
import gc
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
STAGES = ("pretrain", "sft", "rlhf/reward", "dpo", "rlhf/ppo")
PRETRAIN, SFT, REWARD, DPO, PPO = (ROOT / f"recipes/{stage}/run.py" for stage in STAGES)

_context = multiprocessing.get_context("forkserver")
_context.set_forkserver_preload([
    "deepspeed", "matplotlib.backends.backend_agg", "matplotlib.figure", "llm_recipes.pipeline.driving",
    "llm_recipes.ppo.trainer", "llm_recipes.post_training", "tests.running",
])  # fmt: skip

# Of accelerate_configs/, what `asked_strategy` calls it, and the micro-batch of two processes in a test of all of them.
STRATEGIES = [("ddp", "DDP", 4), ("zero2", "ZeRO-2", 4), ("zero3", "ZeRO-3", 2), ("fsdp2", "FSDP2", 2)]
SHIMS = {"fsdp2": "fsdp_on_cpu"}  # what of FAULTS they need on the CPU

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


def random_words(rng: random.Random, longest: int) -> str:
    words = [*"the cat dog sees eats likes red fish runs".split(), "a", "12", "345"]  # noqa: SIM905
    return " ".join(rng.choices(words, k=rng.randint(1, longest)))


def post_training_stage(folder: Path) -> Path:
    """Fills `folder` with what the recipes after pretraining start from, and returns it.

    `base` is a tiny random model as pretraining leaves it, `chat` the same weights with ChatML in the tokenizer. Weights
    are ten times as large as usual, so that what a token attends to shows in its loss. train.jsonl and held.jsonl have 16
    rows each for all three recipes, whose lengths differ. tiny.yaml trains three steps of 8 rows at a constant rate.
    """
    from transformers import AutoConfig

    from llm_recipes.conversations import load_chat_tokenizer
    from llm_recipes.models import from_scratch
    from llm_recipes.tokenization import train_tokenizer

    rng = random.Random(0)
    tokenizer = train_tokenizer([{"text": random_words(rng, 60)} for _ in range(100)], 300)
    keys = TINY_MODEL | {"max_position_embeddings": 512, "initializer_range": 0.2, "vocab_size": len(tokenizer)}
    ids = {"bos_token_id": None, "eos_token_id": tokenizer.eos_token_id, "pad_token_id": tokenizer.pad_token_id}
    kind = keys.pop("model_type")
    model = from_scratch(AutoConfig.for_model(kind, **keys, **ids), seed=0)
    for name in ("base", "chat"):
        model.save_pretrained(folder / name)
        tokenizer.save_pretrained(folder / name)
    load_chat_tokenizer(str(folder / "chat"), "main")[0].save_pretrained(folder / "chat")
    for name in ("train", "held"):
        columns = ("prompt", "completion", "chosen", "rejected")
        write_rows(f"{folder}/{name}.jsonl", [{key: random_words(rng, 12) for key in columns} for _ in range(16)])
    config = {
        "model_name_or_path": str(folder / "base"), "output_dir": "out", "max_length": 256, "global_batch_size": 8,
        "per_device_train_batch_size": 8, "max_steps": 3, "learning_rate": 1e-2, "lr_scheduler_type": "constant",
        "datasets": [{"path": str(folder / "train.jsonl")}], "eval_datasets": [{"path": str(folder / "held.jsonl")}],
        "logging_steps": 1, "save_steps": 3, "use_cpu": True, "report_to": "none",
    }  # fmt: skip
    (folder / "tiny.yaml").write_text(yaml.safe_dump(config))
    return folder


def write_rows(path: str | Path, rows: list[dict]) -> str:
    Path(path).write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def read_rows(path: str | Path) -> list[dict]:
    return [json.loads(line) for line in Path(path).read_text().splitlines()]


def add_adapter(model: str, folder: str) -> None:
    """A LoRA adapter on all linear layers of the model in the folder `model`, far from zero, with its tokenizer."""
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM, AutoTokenizer

    torch.manual_seed(1)
    config = LoraConfig(r=4, lora_alpha=8, target_modules="all-linear", init_lora_weights=False, task_type="CAUSAL_LM")
    get_peft_model(AutoModelForCausalLM.from_pretrained(model), config).save_pretrained(folder)
    AutoTokenizer.from_pretrained(model).save_pretrained(folder)


def metrics(folder: str) -> dict:
    return json.loads(Path(folder, "metrics.json").read_text())


def history(folder: str = "out") -> list[dict]:
    """What was logged at each logging step, from the newest checkpoint."""
    from llm_recipes.checkpoints import checkpoints

    state = json.loads((checkpoints(folder)[0] / "trainer_state.json").read_text())
    return [row for row in state["log_history"] if "loss" in row]


def curve(folder: str = "out") -> list[tuple[float, float]]:
    return [(row["loss"], row["grad_norm"]) for row in history(folder)]


def difference(first: str, second: str) -> float:
    """Greatest difference of a weight."""
    from safetensors.torch import load_file

    a, b = load_file(f"{first}/model.safetensors"), load_file(f"{second}/model.safetensors")
    tied = {"lm_head.weight"}  # DeepSpeed hands every name over, tied ones too
    assert a.keys() ^ b.keys() <= tied
    return max((a[name] - b[name]).abs().max().item() for name in a.keys() & b.keys())


def check_same_training(first: str, second: str, *held_out: str) -> None:
    """Loss and gradient norm of every step and the `held_out` metrics within 2e-5, final weights within 1e-4, in fp32:
    sums in another order."""
    one, two = curve(first), curve(second)
    assert max(abs(x - y) for a, b in zip(one, two, strict=True) for x, y in zip(a, b, strict=True)) < 2e-5, (one, two)
    assert difference(first, second) < 1e-4
    one, two = metrics(first), metrics(second)
    assert all(abs(one[key] - two[key]) < 2e-5 for key in held_out), (one, two)


def run(
    *argv, script: Path = PRETRAIN, fault: str | None = None, env: dict | None = None, timeout: int = 240
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
    gc.freeze()  # looking through all that is imported takes 0.3 s
    os.chdir(folder)
    os.environ.update(env)
    for name, stream in (("child.out", sys.stdout), ("child.err", sys.stderr)):
        with open(name, "w") as file:
            os.dup2(file.fileno(), stream.fileno())
    _script(script, argv, fault)


def _script(script, argv, fault=None):
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


def fsdp_on_cpu():
    """Lets Accelerate run real FSDP2 on CPU processes: it only ever turns what it takes for GPUs into FSDP.

    What is offloaded is not pinned: that needs a GPU.
    """
    from accelerate.state import DistributedType, PartialState
    from torch.distributed.fsdp import CPUOffloadPolicy
    from transformers import TrainingArguments

    from llm_recipes import config

    original, check_launch = TrainingArguments.__post_init__, config.check_launch

    def pretend(self):
        original(self)
        PartialState._shared_state["distributed_type"] = DistributedType.MULTI_GPU

    TrainingArguments.__post_init__ = pretend
    CPUOffloadPolicy.__init__.__defaults__ = (False,)
    config.check_launch = lambda: [p for p in check_launch() if not p.startswith("FSDP needs GPUs")]


def ring_on_cpu():
    """`fsdp_on_cpu`, and torch's ring attention takes SDPA's CPU kernel as well: it only knows those for GPUs.

    Its exchanges overlap, and the two threads of a gloo group then write one string, the name of the newest operation, at
    once: about one run of 64 died of a broken heap. Groups have one thread here.
    """
    import torch
    from torch.distributed import distributed_c10d as c10d
    from torch.distributed.tensor import DTensor
    from torch.distributed.tensor.experimental._context_parallel import _attention as ring

    fsdp_on_cpu()
    gloo = c10d.ProcessGroupGloo

    class OneThread(gloo):
        def __init__(self, store, rank, size, timeout):
            options = gloo._Options()
            options._devices, options._threads, options._timeout = [gloo.create_default_device()], 1, timeout
            super().__init__(store, rank, size, options)

    c10d.ProcessGroupGloo = OneThread
    forward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default
    backward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward.default

    def local(args, kwargs):
        query = next(a for a in args if isinstance(a, DTensor))
        wrap = functools.partial(DTensor.from_local, device_mesh=query.device_mesh, placements=query.placements)
        return [a.to_local() if isinstance(a, DTensor) else a for a in args], query.device_mesh.get_group(), wrap

    def run_forward(op, args, kwargs):
        (query, key, value, dropout, causal, *_), group, wrap = local(args, kwargs)
        found = ring._templated_ring_attention(
            group, 2, op, query=query, key=key, value=value, dropout_p=dropout, is_causal=causal, **kwargs
        )
        return tuple(map(wrap, found))

    def run_backward(op, args, kwargs):
        (grad, query, key, value, out, logsumexp, dropout, causal, *_), group, wrap = local(args, kwargs)
        found = ring._templated_ring_attention_backward(
            group, 2, op, grad, "grad_out", query, key, value, out, logsumexp, causal, dropout_p=dropout, **kwargs
        )
        return tuple(map(wrap, found))

    ring.custom_ops |= {forward: run_forward, backward: run_backward}


def fork_workers():
    """`accelerate launch` forks its workers, with the slow imports done: two of them take 12 s of CPU time to start anew.

    Whoever asks what command started them gets the true answer.
    """
    import psutil
    from torch.distributed.elastic.multiprocessing.subprocess_handler import subprocess_handler

    os.environ.pop("ACCELERATE_USE_CPU", None)
    launcher, command, cmdline, popen = os.getpid(), list(sys.argv), psutil.Process.cmdline, subprocess.Popen
    psutil.Process.cmdline = lambda self: command if self.pid == launcher else cmdline(self)

    def start(args, env, **options):
        script, *argv = [word for word in args[1:] if word != "-u"]
        worker = multiprocessing.get_context("fork").Process(target=work, args=(script, argv, env))
        worker.start()
        return worker._popen

    def work(script, argv, env):
        os.setsid()
        subprocess.Popen = popen
        for number in (signal.SIGTERM, signal.SIGHUP, signal.SIGQUIT):  # of the launcher
            signal.signal(number, signal.SIG_DFL)
        os.environ.clear()
        os.environ.update(env)
        sys.stdout.reconfigure(line_buffering=True)
        _script(script, argv)

    subprocess.Popen = subprocess_handler.Popen = start


def no_launch_check():
    """What is wrong with a launch is not found before the process group exists."""
    from llm_recipes import config

    config.check_launch = list


def unsharded():
    """ZeRO-2 whose partition is everything, as far as anyone can see."""
    from deepspeed.runtime.zero.stage_1_and_2 import DeepSpeedZeroOptimizer

    init = DeepSpeedZeroOptimizer.__init__

    def whole(self, *args, **kwargs):
        init(self, *args, **kwargs)
        self.single_partition_of_fp32_groups = [part.repeat(2) for part in self.single_partition_of_fp32_groups]

    DeepSpeedZeroOptimizer.__init__ = whole


def same_rows():
    """Every process takes the first one's share of the batch."""
    from llm_recipes.batches import Batches

    init = Batches.__init__

    def first(self, *args, **kwargs):
        init(self, *args, **kwargs)
        self.rank = 0

    Batches.__init__ = first


def count_parameters(step: int):
    """Says at `step` how many numbers are in all the parameters that this process holds."""
    import gc

    import torch

    def act():
        found = [o.numel() for o in gc.get_objects() if type(o) is torch.nn.Parameter and o.device.type != "meta"]
        print(f"parameters held: {sum(found)}")

    _at_step(step, act)


FAULTS = {
    f.__name__: f for f in (
        no_launch_check, unsharded, same_rows, count_parameters, send_signal, stop_uncompiled, kill_in_save, poison_step, poison_window, limit_file_size,
        fsdp_on_cpu, ring_on_cpu, fork_workers,
    )
}  # fmt: skip


def launch(
    config: str, *argv, script: Path = PRETRAIN, fault: str = "", rank: int | None = None, processes: int = 2,
    timeout: int = 240,
) -> Result:  # fmt: skip
    """`accelerate launch` of a recipe with accelerate_configs/<config>.yaml, for what needs several processes.

    `config` may also be the path of another YAML, without its ending. `fault` as in `run`, on one `rank` or on all.
    """
    started = ROOT / "tests/faulty.py" if fault else script
    accelerate, yaml = Path(sys.executable).parent / "accelerate", ROOT / "accelerate_configs" / f"{config}.yaml"
    command = ["launch", "--config_file", yaml, "--num_processes", processes, "--main_process_port", 0, started, *argv]
    env = {"FAULT": fault, "FAULT_SCRIPT": str(script), "FAULT_RANK": "" if rank is None else str(rank)}
    return run(*command, script=accelerate, fault="fork_workers", env=env, timeout=timeout)
