"""What was launched: processes, devices, layout and strategy, and whether they can be what was asked for."""

import contextlib
import dataclasses
import glob
import importlib.util
import os
import shutil
import sysconfig
import time
from pathlib import Path

import torch

from llm_recipes import accelerate_yaml


def has_accelerator() -> bool:
    """True when torch sees a GPU or the like and the accelerate config does not ask for the CPU."""
    return torch.accelerator.is_available() and not _flag("ACCELERATE_USE_CPU")


def _devices() -> int:
    return torch.accelerator.device_count() if has_accelerator() else 0


def _flag(name: str) -> bool:
    return os.environ.get(name, "false").lower() in ("true", "1", "yes")


@dataclasses.dataclass(frozen=True)
class Layout:
    """How many ways the processes split the work; ranks count tp fastest, then sp, cp, dp_shard, dp_replicate, and pp last.

    `pp` stages of layers, `dp_replicate` copies and `dp_shard` shards of each among whom the batch is split, `cp` and `sp`
    parts of a sequence, `tp` parts of a matrix; `ep` groups of experts, which share out the ranks of dp_shard and tp.
    """

    pp: int = 1
    dp_replicate: int = 1
    dp_shard: int = 1
    cp: int = 1
    sp: int = 1
    tp: int = 1
    ep: int = 1
    own: bool = False  # llm_recipes.pipeline splits the model, rather than Accelerate

    @property
    def size(self) -> int:
        return self.pp * self.dp_replicate * self.dp_shard * self.cp * self.sp * self.tp

    @property
    def data(self) -> int:
        """Ways the batch is split."""
        return self.dp_replicate * self.dp_shard

    @property
    def sharing(self) -> int:
        """Ranks that see the same sequences."""
        return self.size // self.data

    def data_rank(self, rank: int) -> int:
        return rank // (self.cp * self.sp * self.tp) % self.data

    @property
    def same_tokens(self) -> int:
        """Ranks that compute the loss of the same tokens; over the others gradients are averaged."""
        return self.pp * self.tp

    @property
    def shards(self) -> int:
        """Ways that weights or states are split."""
        return self.size // self.dp_replicate


SIZES = [field.name for field in dataclasses.fields(Layout) if field.name != "own"]


def layout() -> Layout:
    """The layout asked for: parallelism_config of the launcher's YAML, or what the strategy makes of all processes."""
    world_size, given = int(os.environ.get("WORLD_SIZE", 1)), {}
    if os.environ.get("ACCELERATE_USE_PARALLELISM_CONFIG", "false") != "false":
        for kind in ("pp", "ep"):  # ours: Accelerate does not hand them on
            if f"PARALLELISM_CONFIG_{kind.upper()}_SIZE" not in os.environ:
                sizes = accelerate_yaml.read(accelerate_yaml.launch_file())
                os.environ[f"PARALLELISM_CONFIG_{kind.upper()}_SIZE"] = str(sizes[f"{kind}_size"])
        given = {name: int(os.environ.get(f"PARALLELISM_CONFIG_{name.upper()}_SIZE", 1)) for name in SIZES}
        given["own"] = not (_flag("ACCELERATE_USE_FSDP") or _flag("ACCELERATE_USE_DEEPSPEED"))
    found = Layout(**given)
    if not given:
        kind = "dp_shard" if _flag("ACCELERATE_USE_DEEPSPEED") or _flag("ACCELERATE_USE_FSDP") else "dp_replicate"
        found = dataclasses.replace(found, **{kind: max(world_size // found.size, 1)})
    return found


def offloads_optimizer() -> bool:
    """True where DeepSpeed keeps the optimizer, its own Adam, in host memory."""
    return os.environ.get("ACCELERATE_DEEPSPEED_OFFLOAD_OPTIMIZER_DEVICE", "none") != "none"


def global_batch(args) -> int:
    """Sequences of an optimizer step, over all processes, of TrainingArguments `args`."""
    return args.per_device_train_batch_size * args.gradient_accumulation_steps * layout().data


def asked_strategy() -> str:
    """Strategy the launcher asked for, in words: DeepSpeed ZeRO-3, FSDP2, DDP, single process; PP 2 x TP 2 and the like."""
    ways = layout()
    if _flag("ACCELERATE_USE_DEEPSPEED"):
        name = f"DeepSpeed ZeRO-{os.environ.get('ACCELERATE_DEEPSPEED_ZERO_STAGE', '?')}"
    elif _flag("ACCELERATE_USE_FSDP"):
        name = f"FSDP{os.environ.get('FSDP_VERSION', '1')}"
        name = f"{name} {ways.dp_shard}, {ways.dp_replicate} replicas" if ways.dp_replicate > 1 else name
    elif not ways.own:
        return "DDP" if int(os.environ.get("WORLD_SIZE", 1)) > 1 else "single process"
    else:
        name = f"FSDP2 {ways.dp_shard}" if ways.dp_shard > 1 else ""
        name += f"{' x ' if name else ''}DDP {ways.dp_replicate}" if ways.dp_replicate > 1 else ""
    others = {kind.upper(): getattr(ways, kind) for kind in ("pp", "cp", "sp", "tp", "ep")}
    return " x ".join(filter(None, [name, *(f"{kind} {size}" for kind, size in others.items() if size > 1)]))


def checkpoint_format() -> str:
    """What a checkpoint of this launch can be continued under: the same strategy, or any of several that write alike.

    Where the optimizer lives is part of it: DeepSpeed's Adam for the CPU keeps another state than torch's.
    """
    strategy = asked_strategy()
    if layout().own:
        return "the layouts of llm_recipes.pipeline"
    if _flag("ACCELERATE_USE_FSDP"):  # neither kind can be read as the other
        return f"FSDP2 with {os.environ.get('FSDP_STATE_DICT_TYPE', 'SHARDED_STATE_DICT')}"
    name = strategy.split(" x ")[0] if strategy.startswith("DeepSpeed") else "DDP or a single process"
    return f"{name} with the optimizer in host memory" if offloads_optimizer() else name


def state_bytes(strategy: str, shards: int) -> float:
    """Bytes a parameter a device in fp32 with AdamW: 4 weight, 4 gradient, 8 moments, less what is sharded (Rajbhandari
    et al. 2020, ZeRO, figure 1); DeepSpeed trains a copy of the weights, in fp32 too, which is sharded at every stage."""
    if "ZeRO-1" in strategy:
        return 8 + 12 / shards
    if "ZeRO-2" in strategy:
        return 4 + 16 / shards
    return (20 if "ZeRO-3" in strategy else 16) / shards


def check_launch() -> list[str]:
    """Problems of the launch itself, found before any process group exists."""
    if problems := accelerate_yaml.lint(accelerate_yaml.launch_file(), accelerate_yaml.launch_options()):
        return problems
    local = int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    devices = _devices()
    if devices and local > devices:
        problems.append(f"{local} processes on this machine but {devices} visible GPUs: add --num_processes {devices}")
    if devices > 1 and int(os.environ.get("WORLD_SIZE", 1)) == 1 and not _flag("ACCELERATE_USE_DEEPSPEED"):
        problems.append(
            f"one process and {devices} visible GPUs: launch with accelerate_configs/ddp.yaml --num_processes {devices}, "
            "or set CUDA_VISIBLE_DEVICES=0 for one"
        )
    ways, world_size = layout(), int(os.environ.get("WORLD_SIZE", 1))
    if os.environ.get("ACCELERATE_USE_PARALLELISM_CONFIG", "false") != "false":  # not every launcher has a YAML
        kinds = {"ACCELERATE_USE_DEEPSPEED": "DEEPSPEED", "ACCELERATE_USE_FSDP": "FSDP"}
        kind = next((kind for name, kind in kinds.items() if _flag(name)), "MULTI_GPU")
        sizes = {f"{name}_size": getattr(ways, name) for name in SIZES}
        problems += [sentence for _, sentence in accelerate_yaml.size_problems(kind, world_size, sizes)]
    if ways.own or ways.sp > 1:  # Accelerate must not split it as well
        os.environ["ACCELERATE_USE_PARALLELISM_CONFIG"] = "own"
    if _flag("ACCELERATE_USE_FSDP") and not devices:
        problems.append(
            "FSDP needs GPUs: without them Accelerate runs plain DDP and says nothing. "
            "Use accelerate_configs/zero3.yaml, which shards on CPU too"
        )
    if _flag("ACCELERATE_USE_DEEPSPEED") and (offloads_optimizer() or not devices):
        problems += _compiler_problems()
    return problems


def idle_devices() -> str | None:
    """A sentence when this machine has more GPUs than processes."""
    local, devices = int(os.environ.get("LOCAL_WORLD_SIZE", 1)), _devices()
    if devices <= local:
        return None
    return f"{devices} GPUs are visible, {local} are used: --num_processes {devices} uses all"


def _compiler_problems() -> list[str]:
    """DeepSpeed compiles small C++ ops at their first use, on the CPU and for offloaded optimizers; says what is missing for that, or in the way."""
    if importlib.util.find_spec("deepspeed") is None:
        return ["DeepSpeed is not installed: pip install -r requirements.txt"]
    from torch.utils.cpp_extension import get_default_build_root

    root = Path(os.environ.get("TORCH_EXTENSIONS_DIR") or get_default_build_root())
    ops = [] if _devices() else ["deepspeed_shm_comm"]
    if offloads_optimizer():
        ops.append("cpu_adam")
    locks = [_left_over(lock.resolve()) for op in ops for lock in root.rglob(f"{op}/lock")]
    if any(locks):
        return list(filter(None, locks))
    if all(any(root.rglob(f"{op}.so")) for op in ops):
        return []
    missing = []
    if not shutil.which(os.environ.get("CXX", "c++")):
        missing.append("a C++ compiler (Debian: apt-get install g++)")
    if not shutil.which("ninja"):
        missing.append("ninja (pip install ninja)")
    if not (Path(sysconfig.get_paths()["include"]) / "Python.h").is_file():
        missing.append("the Python headers (Debian: apt-get install python3-dev)")
    if missing:
        return [f"DeepSpeed compiles a small op and needs {' and '.join(missing)}; or use accelerate_configs/cpu.yaml"]
    return []


def _left_over(lock: Path) -> str | None:
    """A sentence when the build that made this lock file is dead: whoever needs the op would wait for ever.

    torch's FileBaton has the file open until it removes it. Nobody here has: then the builder was killed, or is on
    another machine that shares the folder. Builds take minutes, so an old lock is removed.
    """
    try:
        made = lock.stat().st_mtime
        if _is_open(lock):
            return None
        time.sleep(1)  # the builder closes the file a moment before it removes it
        if lock.stat().st_mtime != made:
            return None
    except FileNotFoundError:
        return None
    if time.time() - made > 1800:
        lock.unlink(missing_ok=True)
        print(f"{lock}: removed, it was left by a build that was killed", flush=True)
        return None
    return f"{lock} is left by a build that was killed, unless another machine is building: wait for that, or rm {lock}"


def _is_open(path: Path) -> bool:
    """True when a process of this machine has the file open, as far as this user may see (Linux)."""
    for link in glob.iglob("/proc/[0-9]*/fd/*"):
        with contextlib.suppress(OSError):  # it is gone by now
            if os.readlink(link) == str(path):
                return True
    return False
