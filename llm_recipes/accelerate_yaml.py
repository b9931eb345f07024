"""The YAML of `accelerate launch`: which one was read, what is wrong in it, and what in it is ours.

Below the top level Accelerate ignores a key that it does not know, and a section that its distributed_type does not read,
without a word. Two keys of parallelism_config are ours: parallelism_config_pp_size, stages of a pipeline, and
parallelism_config_ep_size, groups of experts.
"""

import argparse
import contextlib
import math
import os
import typing
from collections.abc import Iterator
from pathlib import Path

import psutil
import yaml
from accelerate.commands.config.config_args import ClusterConfig, default_config_file
from accelerate.commands.launch import launch_command_parser
from accelerate.utils import DistributedType, ParallelismConfig, str_to_bool
from accelerate.utils.constants import DEEPSPEED_MULTINODE_LAUNCHERS, FSDP2_STATE_DICT_TYPE, FSDP_AUTO_WRAP_POLICY

from llm_recipes import _compat
from llm_recipes.errors import UserError
from llm_recipes.strict_yaml import cast, load_yaml, unknown_key

# Section: how its keys start, and the distributed_type that reads it, if only one does.
SECTIONS = {
    "deepspeed_config": (("deepspeed_", "gradient_", "offload_", "zero"), "DEEPSPEED"),
    "dynamo_config": ("dynamo_", None),
    "fp8_config": ("fp8_", None),
    "fsdp_config": ("fsdp_", "FSDP"),
    "megatron_lm_config": ("megatron_lm_", "MEGATRON_LM"),
    "mpirun_config": ("mpirun_", None),
    "parallelism_config": ("parallelism_config_", None),
}
SHORT = ("dynamo_config", "fp8_config", "fsdp_config")  # Accelerate adds the prefix where it is missing

SIZES = [f"parallelism_config_{kind}_size" for kind in ("dp_replicate", "dp_shard", "cp", "sp", "tp", "pp", "ep")]

# Type and choices of what the flags of `accelerate launch` do not have, or do not say.
HINTS = {
    "deepspeed_multinode_launcher": (str, DEEPSPEED_MULTINODE_LAUNCHERS),
    "distributed_type": (DistributedType, None),
    "downcast_bf16": (bool | str, None),  # `accelerate config` writes 'no'
    "dynamo_backend": (str, None),  # `accelerate config` writes capitals, the flag takes small letters
    "fp8_backend": (str, ["AO", "TE", "MSAMP"]),  # the flag's small letters are refused later
    "fp8_override_linear_precision": (list[bool], None),
    "fp8_use_mxfp8_block_scaling": (bool, None),
    "fsdp_auto_wrap_policy": (str, FSDP_AUTO_WRAP_POLICY),
    "fsdp_ignored_modules": (str, None),
    "fsdp_state_dict_type": (str, FSDP2_STATE_DICT_TYPE),
    "fsdp_version": (int, None),
    "offload_optimizer_device": (str, ["none", "cpu"]),
    "offload_param_device": (str, ["none", "cpu"]),
    "parallelism_config_cp_comm_strategy": (str, ["allgather", "alltoall"]),
    "parallelism_config_ep_size": (int, None),
    "parallelism_config_pp_size": (int, None),
    "parallelism_config_sp_seq_length": (int | None, None),
    "zero_stage": (int, [0, 1, 2, 3]),
}

REFUSED = {
    "fsdp_backward_prefetch": "FSDP2 has none",
    "fsdp_forward_prefetch": "FSDP2 has none",
    "fsdp_sharding_strategy": "FSDP2 has fsdp_reshard_after_forward: true or false",
    "fsdp_sync_module_states": "FSDP2 needs none",
    "fsdp_use_orig_params": "FSDP2 always does",
    "gradient_accumulation_steps": "it follows from the recipe's global_batch_size",
    "gradient_clipping": "it is the recipe's max_grad_norm",
    "offload_optimizer_nvme_path": "accelerate launch does not hand it on: use a deepspeed_config_file",
    "offload_param_nvme_path": "accelerate launch does not hand it on: use a deepspeed_config_file",
}


def _launcher() -> tuple[psutil.Process, argparse.Namespace] | None:
    """The nearest parent process that is `accelerate launch`, and its arguments."""
    with contextlib.suppress(psutil.Error, SystemExit):  # gone, not ours to look at, or not Accelerate's arguments
        for process in psutil.Process().parents():
            words = process.cmdline()
            for at, word in enumerate(words):
                name = Path(word).name
                if name in ("accelerate-launch", "accelerate.commands.launch"):
                    return process, launch_command_parser().parse_args(words[at + 1 :])
                if name == "accelerate" and words[at + 1 : at + 2] == ["launch"]:
                    return process, launch_command_parser().parse_args(words[at + 2 :])
    return None


def launch_file() -> Path | None:
    """The YAML that `accelerate launch` read to start this process; None if that was not what started it, or it read none."""
    found = _launcher()
    if found is None:
        return None
    process, args = found
    if args.config_file is not None:
        with contextlib.suppress(psutil.Error):
            return Path(process.cwd(), args.config_file)
        return None
    return Path(default_config_file) if os.path.isfile(default_config_file) and not args.cpu else None


def launch_options() -> dict[str, typing.Any]:
    """Options on the command line of that `accelerate launch`; they go before the YAML."""
    found = _launcher()
    return {key: getattr(found[1], key) for key in found[1].nondefault} if found else {}


def read(path: Path | None, options: dict | None = None) -> dict[str, int]:
    """Sizes of parallelism_config, 1 where there is none, and num_processes, by default those there are."""
    values = load_yaml(path)[0] if path else {}
    values = (values.get("parallelism_config") or {}) | values | (options or {})
    sizes = {key.removeprefix("parallelism_config_"): values.get(key, 1) for key in SIZES}
    return sizes | {"num_processes": values.get("num_processes", int(os.environ.get("WORLD_SIZE", 1)))}


def _hints() -> dict[str, tuple]:
    """Type and choices of every key that Accelerate reads from a YAML, at the top or in a section."""
    hints = {key: (hint, None) for key, hint in typing.get_type_hints(ClusterConfig).items()}
    for flag in _compat.actions(launch_command_parser()):
        true_or_false = flag.type in (bool, str_to_bool) or flag.nargs == 0 or flag.default in ("true", "false")
        if true_or_false or "(true|false)" in (flag.help or ""):
            kind = bool
        else:
            kind = flag.type if flag.type in (int, float) else str
        hints[flag.dest] = (kind | None if flag.default is None else kind, flag.choices)
    return hints | HINTS


def lint(path: Path | None, options: dict | None = None) -> list[str]:
    """Problems of the YAML, each as `file:line: sentence`; `options` of the command line go before the file's.

    Keys one by one, and only when each is right, whether they go together.
    """
    if path is None:
        return []
    try:
        values, lines = load_yaml(path)
    except UserError as error:
        return [str(error)]
    text = Path(path).read_text(encoding="utf-8")
    nodes, as_read = {key.value: node for key, node in yaml.compose(text).value}, yaml.safe_load(text)
    hints, problems, given = _hints(), [], {}

    def check(key, value, read_as):
        try:
            given[key] = cast(value, *hints[key])
        except ValueError as error:
            return f"{key}: {error}"
        if key in REFUSED:
            return f"{key}: remove it: {REFUSED[key]}"
        if key in SIZES and value < 1:
            return f"{key}: must be at least 1, got {value}"
        if (type(value), value) != (type(read_as), read_as):
            return f"{key}: put it in quotes: Accelerate reads YAML 1.1, where this is {read_as!r}"
        return None

    for key, value in values.items():
        if key not in ClusterConfig.__dataclass_fields__:
            problems.append((lines[key], unknown_key(key, ClusterConfig.__dataclass_fields__)))
        elif key not in SECTIONS or not isinstance(value, dict):
            problems.append((lines[key], check(key, value, as_read[key])))
        else:
            prefix = SECTIONS[key][0]
            known = [name for name in hints if name.startswith(prefix) and name not in SECTIONS]
            for node, _ in nodes[key].value:
                name, line = node.value, node.start_mark.line + 1
                full = f"{prefix}{name}" if key in SHORT and not name.startswith(prefix) else name
                lines.setdefault(full, line)
                said = check(full, value[name], as_read[key][name]) if full in known else unknown_key(name, known)
                problems.append((line, said and f"{key}: {said}"))
    problems = [problem for problem in problems if problem[1]]
    if not problems:
        problems = [(lines.get(key, 1), sentence) for key, sentence in _across(values, given | (options or {}))]
    return [f"{path}:{line}: {sentence}" for line, sentence in sorted(problems)]


def _across(values: dict, given: dict) -> Iterator[tuple[str, str]]:
    """Keys that do not go together: the one to look at and a sentence. `given` holds those of all sections."""
    kind, processes, machines = (given.get(key) for key in ("distributed_type", "num_processes", "num_machines"))
    if kind == "MULTI_CPU":
        yield "distributed_type", "MULTI_CPU starts one process: MULTI_GPU starts all of them, on CPUs too"
    if kind == "MEGATRON_LM":
        yield "distributed_type", "MEGATRON_LM is not driven by these recipes: see docs/parallelism.md"
    if kind == "NO" and (processes or 1) > 1:
        yield "num_processes", f"distributed_type 'NO' starts one process, not {processes}: write MULTI_GPU"
    if given.get("use_cpu") and kind not in ("NO", "MULTI_CPU"):
        yield "use_cpu", f"{kind} does not read use_cpu: remove it; without GPUs it runs on the CPU anyway"
    if processes and processes % (machines or 1):
        yield "num_processes", f"num_processes {processes} does not divide over num_machines {machines}"
    for section, (_, reader) in SECTIONS.items():
        if values.get(section) and reader not in (None, kind):
            yield section, f"{section} is only read with distributed_type: {reader}"
    if values.get("fp8_config") and given.get("mixed_precision") != "fp8":
        yield "fp8_config", "fp8_config is only read with mixed_precision: fp8"
    if kind == "FSDP" and given.get("fsdp_version") != 2:
        yield "fsdp_version", "fsdp_config needs fsdp_version: 2; FSDP1, the default, is not supported"
    if given.get("offload_param_device", "none") != "none" and given.get("zero_stage") != 3:
        yield "offload_param_device", "offload_param_device is only read with zero_stage: 3"
    if file := given.get("deepspeed_config_file"):
        beside = [*values.get("deepspeed_config", []), *(key for key in values if key == "mixed_precision")]
        for key in beside:
            if not key.startswith(("deepspeed_", "zero3_init_flag")):
                yield key, f"{key} cannot stand beside deepspeed_config_file: set it in {file}"
        if not os.path.isfile(file):
            yield "deepspeed_config_file", f"deepspeed_config_file: {file} does not exist, seen from {Path.cwd()}"
    if values.get("parallelism_config"):
        yield from size_problems(kind, processes, {key.split("_config_")[1]: given.get(key, 1) for key in SIZES})


def size_problems(kind: str, processes: int | None, sizes: dict[str, int]) -> Iterator[tuple[str, str]]:
    """The same for parallelism_config: its seven `sizes` under distributed_type `kind` on `processes`, if known."""
    sizes = dict(sizes)
    ep, tp, shard = sizes.pop("ep_size"), sizes["tp_size"], sizes["dp_shard_size"]
    total = math.prod(sizes.values())
    if processes and total != processes:
        product = " x ".join(f"{key.removesuffix('_size')} {size}" for key, size in sizes.items() if size > 1)
        yield "parallelism_config", f"{product or 'no size'} makes {total} processes, but num_processes is {processes}"
    if max(sizes.pop("pp_size"), tp, ep) > 1:
        if kind in ("DEEPSPEED", "FSDP"):
            yield "distributed_type", f"tp_size, pp_size and ep_size need MULTI_GPU, not {kind}: we split the model"
        if sizes["cp_size"] * sizes["sp_size"] > 1:
            yield "parallelism_config", "cp_size and sp_size do not go with tp_size, pp_size or ep_size"
        if ep > 1 and (ep % tp or shard * tp % ep):
            say = f"must divide dp_shard_size x tp_size, {shard} x {tp}, and be a multiple of tp_size"
            yield "parallelism_config_ep_size", f"parallelism_config_ep_size {ep} {say}"
        return
    for key, reader in (("cp_size", "FSDP"), ("sp_size", "DEEPSPEED")):
        if sizes[key] > 1 and kind != reader:
            yield f"parallelism_config_{key}", f"{key} {sizes[key]} needs {reader}, not {kind}"
    if kind == "DEEPSPEED" and sizes["dp_replicate_size"] > 1:
        yield "parallelism_config_dp_replicate_size", "DeepSpeed keeps no replicas: write dp_shard_size"
    if kind == "FSDP" and shard == sizes["cp_size"] == 1:
        yield "parallelism_config", "FSDP has nothing to shard over: dp_shard_size and cp_size are both 1"
    try:
        ParallelismConfig(**sizes)
    except ValueError as error:
        yield "parallelism_config", f"parallelism_config: {' '.join(str(error).split())}"
