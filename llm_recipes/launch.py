"""What was launched: processes, devices and strategy, and whether they can be what was asked for."""

import importlib.util
import os
import shutil
import sysconfig
from pathlib import Path

import torch

from llm_recipes.errors import UserError


def has_accelerator() -> bool:
    """True when torch sees a GPU or the like and the accelerate config does not ask for the CPU."""
    return torch.accelerator.is_available() and not _flag("ACCELERATE_USE_CPU")


def _devices() -> int:
    return torch.accelerator.device_count() if has_accelerator() else 0


def _flag(name: str) -> bool:
    return os.environ.get(name, "false").lower() in ("true", "1", "yes")


def asked_strategy() -> str:
    """Strategy the launcher asked for, in words: DeepSpeed ZeRO-3, FSDP2, DDP or single process."""
    if _flag("ACCELERATE_USE_DEEPSPEED"):
        return f"DeepSpeed ZeRO-{os.environ.get('ACCELERATE_DEEPSPEED_ZERO_STAGE', '?')}"
    if _flag("ACCELERATE_USE_FSDP"):
        return f"FSDP{os.environ.get('FSDP_VERSION', '1')}"
    return "DDP" if int(os.environ.get("WORLD_SIZE", 1)) > 1 else "single process"


def state_bytes(strategy: str, world_size: int) -> float:
    """Bytes a parameter a device in fp32 with AdamW: 4 weight, 4 gradient, 8 moments, less what is sharded (Rajbhandari
    et al. 2020, ZeRO, figure 1)."""
    if strategy.endswith("ZeRO-1"):
        return 8 + 8 / world_size
    if strategy.endswith("ZeRO-2"):
        return 4 + 12 / world_size
    return 16 / world_size if strategy.endswith("ZeRO-3") or strategy.startswith("FSDP") else 16


def check_launch() -> list[str]:
    """Problems of the launch itself, found before any process group exists."""
    problems = []
    local = int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    devices = _devices()
    if devices and local > devices:
        problems.append(f"{local} processes on this machine but {devices} visible GPUs: add --num_processes {devices}")
    if devices > 1 and int(os.environ.get("WORLD_SIZE", 1)) == 1 and not _flag("ACCELERATE_USE_DEEPSPEED"):
        problems.append(
            f"one process and {devices} visible GPUs: launch with accelerate_configs/ddp.yaml --num_processes {devices}, "
            "or set CUDA_VISIBLE_DEVICES=0 for one"
        )
    if _flag("ACCELERATE_USE_FSDP") and not devices:
        problems.append(
            "FSDP needs GPUs: without them Accelerate runs plain DDP and says nothing. "
            "Use accelerate_configs/zero3.yaml, which shards on CPU too"
        )
    if _flag("ACCELERATE_USE_DEEPSPEED") and not devices:
        problems += _compiler_problems()
    return problems


def idle_devices() -> str | None:
    """A sentence when this machine has more GPUs than processes."""
    local, devices = int(os.environ.get("LOCAL_WORLD_SIZE", 1)), _devices()
    if devices <= local:
        return None
    return f"{devices} GPUs are visible, {local} are used: --num_processes {devices} uses all"


def _compiler_problems() -> list[str]:
    """DeepSpeed compiles one small C++ op at its first use on CPU; says what is missing for that."""
    if importlib.util.find_spec("deepspeed") is None:
        return ["DeepSpeed is not installed: pip install -r requirements.txt"]
    from torch.utils.cpp_extension import get_default_build_root

    root = Path(os.environ.get("TORCH_EXTENSIONS_DIR") or get_default_build_root())
    if root.is_dir() and any(root.rglob("deepspeed_shm_comm.so")):
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


def check_strategy(accelerator) -> None:
    """Raises UserError unless the strategy in force is the one the launcher asked for."""
    asked, world_size = asked_strategy(), int(os.environ.get("WORLD_SIZE", 1))
    kind = accelerator.distributed_type.value
    if kind == "DEEPSPEED":
        plugin = accelerator.state.deepspeed_plugin
        active = f"DeepSpeed ZeRO-{plugin.zero_stage}"
    elif kind == "FSDP":
        active = f"FSDP{accelerator.state.fsdp_plugin.fsdp_version}"
    else:
        active = "DDP" if accelerator.num_processes > 1 else "single process"
    if active != asked or accelerator.num_processes != world_size:
        raise UserError(
            f"asked for {asked} on {world_size} processes, but {active} on {accelerator.num_processes} is in force: "
            "check the file given to --config_file"
        )
