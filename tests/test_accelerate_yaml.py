"""The linter of accelerate's YAMLs against accelerate itself, and the YAML of a real launch."""

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import psutil
import pytest
from accelerate.commands.launch import launch_command_parser
from accelerate.utils import DeepSpeedPlugin, prepare_deepspeed_cmd_env, prepare_multi_gpu_env
from accelerate.utils.launch import setup_fp8_env

from llm_recipes import accelerate_yaml
from llm_recipes.accelerate_yaml import REFUSED, SECTIONS, launch_file, launch_options, lint, read
from tests.running import ROOT

SHIPPED = sorted((ROOT / "accelerate_configs").glob("*.yaml"))
DDP = "distributed_type: MULTI_GPU\nnum_processes: 4\n"
FSDP = "distributed_type: FSDP\nnum_processes: 4\nfsdp_config:\n  fsdp_version: 2\n"
ZERO = "distributed_type: DEEPSPEED\nnum_processes: 4\ndeepspeed_config:\n  zero_stage: 3\n"


@pytest.fixture
def write(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)

    def write(text):
        Path("a.yaml").write_text(text)
        return Path("a.yaml")

    return write


@pytest.mark.parametrize("path", SHIPPED, ids=lambda p: p.stem)
def test_shipped_yamls_and_the_launch_lines_in_their_headers(path):
    assert lint(path) == []
    lines = re.findall(r"^#   accelerate launch (.*?)(?: +#.*)?$", path.read_text(), re.MULTILINE)
    assert path.read_text().startswith("# ") and lines
    for line in lines:
        args = launch_command_parser().parse_args(shlex.split(line))
        options = {key: getattr(args, key) for key in args.nondefault}
        assert args.config_file == str(path.relative_to(ROOT)) and (ROOT / args.training_script).is_file()
        assert lint(path, options) == [], line


@pytest.mark.parametrize(
    ("text", "problems"),
    [
        (DDP, []),
        (FSDP + "mixed_precision: bf16\n", []),
        (FSDP + "  fsdp_state_dict_type: SHARDED_STATE_DICT\n  fsdp_ignored_modules: lm_head\n", []),
        (FSDP + "  reshard_after_forward: false\n", []),  # Accelerate adds fsdp_
        (DDP + "num_proceses: 4\n", ["3: unknown key `num_proceses`, did you mean `num_processes`?"]),
        (DDP + "num_processes: 2\n", [" num_processes is set twice (lines 2 and 3)"]),
        (DDP + "machine_rank: first\n", ["3: machine_rank: expects a whole number, got 'first'"]),
        (DDP + "gpu_ids: 0\n", ["3: gpu_ids: expects text, got 0"]),
        (DDP + "same_network: 'true'\n", ["3: same_network: expects true or false, got 'true'"]),
        (DDP + "mixed_precision: fp4\n", ["3: mixed_precision: expects one of no, fp16, bf16, fp8; got 'fp4'"]),
        (DDP + "mixed_precision: no\n", ["3: mixed_precision: put it in quotes: Accelerate reads YAML 1.1, where this is False"]),
        (DDP + "fsdp_config: 3\n", ["3: fsdp_config: expects keys and values, got 3"]),
        (FSDP + "  fsdp_config: 3\n", ["5: fsdp_config: unknown key `fsdp_config`, did you mean `fsdp_version`?"]),
        (FSDP + "  fsdp_reshard_after_foward: false\n", ["5: fsdp_config: unknown key `fsdp_reshard_after_foward`, did you mean `fsdp_reshard_after_forward`?"]),
        (DDP + "fp8_config:\n  amax_history_length: 16\n", ["4: fp8_config: unknown key `amax_history_length`, did you mean `fp8_amax_history_len`?"]),  # `accelerate config` writes it
        (DDP + "dynamo_config: {dynamo_mod: default}\n", ["3: dynamo_config: unknown key `dynamo_mod`, did you mean `dynamo_mode`?"]),
        (DDP + "megatron_lm_config: {tp_degree: 2}\n", ["3: megatron_lm_config: unknown key `tp_degree`, did you mean `megatron_lm_tp_degree`?"]),
        (FSDP + "  fsdp_offload_params: 'false'\n", ["5: fsdp_config: fsdp_offload_params: expects true or false, got 'false'"]),
        (FSDP + "  fsdp_state_dict_type: LOCAL_STATE_DICT\n", ["5: fsdp_config: fsdp_state_dict_type: expects one of SHARDED_STATE_DICT, FULL_STATE_DICT; got 'LOCAL_STATE_DICT'"]),
        (DDP + "fp8_config: {backend: ao}\n", ["3: fp8_config: fp8_backend: expects one of AO, TE, MSAMP; got 'ao'"]),
        (FSDP.replace("2", "two"), ["4: fsdp_config: fsdp_version: expects a whole number, got 'two'"]),
        (FSDP.replace("2", "1"), ["4: fsdp_config needs fsdp_version: 2; FSDP1, the default, is not supported"]),
        ("distributed_type: FSDP\n", ["1: fsdp_config needs fsdp_version: 2; FSDP1, the default, is not supported"]),
        (FSDP + "  fsdp_use_orig_params: true\n  sharding_strategy: FULL_SHARD\n", [
            "5: fsdp_config: fsdp_use_orig_params: remove it: FSDP2 always does",
            "6: fsdp_config: fsdp_sharding_strategy: remove it: FSDP2 has fsdp_reshard_after_forward: true or false",
        ]),
        (DDP + "fsdp_config: {fsdp_version: 2}\n", ["3: fsdp_config is only read with distributed_type: FSDP"]),
        (DDP + "fp8_config: {fp8_backend: AO}\n", ["3: fp8_config is only read with mixed_precision: fp8"]),
        (DDP.replace("GPU", "CPU"), ["1: MULTI_CPU starts one process: MULTI_GPU starts all of them, on CPUs too"]),
        (DDP.replace("MULTI_GPU", "'NO'"), ["2: distributed_type 'NO' starts one process, not 4: write MULTI_GPU"]),
        (DDP + "use_cpu: true\n", ["3: MULTI_GPU does not read use_cpu: remove it; without GPUs it runs on the CPU anyway"]),
        (DDP + "num_machines: 3\n", ["2: num_processes 4 does not divide over num_machines 3"]),
        (ZERO + "  gradient_accumulation_steps: 4\n", ["5: deepspeed_config: gradient_accumulation_steps: remove it: it follows from the recipe's global_batch_size"]),
        (ZERO + "  offload_optimizer_device: nvme\n", ["5: deepspeed_config: offload_optimizer_device: expects one of none, cpu; got 'nvme'"]),
        (ZERO.replace("stage: 3", "stage: 2") + "  offload_param_device: cpu\n", ["5: offload_param_device is only read with zero_stage: 3"]),
        (ZERO + "  deepspeed_config_file: a.yaml\nmixed_precision: bf16\n", [
            "4: zero_stage cannot stand beside deepspeed_config_file: set it in a.yaml",
            "6: mixed_precision cannot stand beside deepspeed_config_file: set it in a.yaml",
        ]),
        (ZERO.replace("zero_stage: 3", "deepspeed_config_file: ds.json\n  zero3_init_flag: true"), ["4: deepspeed_config_file: ds.json does not exist, seen from {cwd}"]),
        ("distributed_type: MULTI_GPU\nnum_procs: 4\nfsdp_config:\n  fsdp_version: '2'\n", [  # all of one kind at once
            "2: unknown key `num_procs`, did you mean `num_processes`?",
            "4: fsdp_config: fsdp_version: expects a whole number, got '2'",
        ]),
    ],
)  # fmt: skip
def test_one_problem_at_a_time(write, text, problems):
    path = write(text)
    assert lint(path) == [f"a.yaml:{problem}".replace("{cwd}", str(Path.cwd())) for problem in problems]


def sized(text, **sizes):
    return text + "parallelism_config:\n" + "".join(f"  parallelism_config_{k}_size: {v}\n" for k, v in sizes.items())


@pytest.mark.parametrize(
    ("text", "problems"),
    [
        (sized(DDP, pp=2, tp=2), []),
        (sized(DDP, dp_replicate=2, tp=2), []),  # Accelerate refuses it; it is not Accelerate that splits the model
        (sized(DDP, dp_shard=2, tp=2, ep=4), []),
        (sized(DDP, dp_shard=4, ep=3), ["5: parallelism_config_ep_size 3 must divide dp_shard_size x tp_size, 4 x 1, "]),
        (sized(DDP, dp_shard=1, tp=4, ep=2), ["6: parallelism_config_ep_size 2 must divide dp_shard_size x tp_size, "]),
        (sized(DDP, pp=2), ["3: pp 2 makes 2 processes, but num_processes is 4"]),
        (sized(DDP, dp_shard=2, tp=2, pp=2), ["3: dp_shard 2 x tp 2 x pp 2 makes 8 processes, but num_processes is 4"]),
        (sized(DDP, pp=0), ["4: parallelism_config: parallelism_config_pp_size: must be at least 1, got 0"]),
        (sized(DDP, pp="two"), ["4: parallelism_config: parallelism_config_pp_size: expects a whole number, got 'two'"]),
        (sized(DDP, cpp=2), ["4: parallelism_config: unknown key `parallelism_config_cpp_size`, did you mean "]),
        (DDP + "parallelism_config:\n  tp_size: 2\n", ["4: parallelism_config: unknown key `tp_size`"]),
        (sized(FSDP, dp_shard=4), []),
        (sized(FSDP, dp_shard=2, tp=2), ["1: tp_size, pp_size and ep_size need MULTI_GPU, not FSDP"]),
        (sized(DDP, dp_shard=4), []),
        (sized(DDP, tp=2, cp=2), ["3: cp_size and sp_size do not go with tp_size, pp_size or ep_size"]),
        (sized(DDP, pp=2, sp=2), ["3: cp_size and sp_size do not go with tp_size, pp_size or ep_size"]),
        (sized(ZERO, dp_replicate=2, dp_shard=2), ["6: DeepSpeed keeps no replicas: write dp_shard_size"]),
        ("distributed_type: MEGATRON_LM\n", ["1: MEGATRON_LM is not driven by these recipes: see docs/parallelism.md"]),
        (sized(ZERO, cp=4), ["6: cp_size 4 needs FSDP, not DEEPSPEED"]),
        (sized(ZERO, dp_shard=2, sp=2), []),
        (sized(FSDP, dp_replicate=4), ["5: FSDP has nothing to shard over: dp_shard_size and cp_size are both 1"]),
        (sized(FSDP, dp_replicate=2, cp=2), ["5: parallelism_config: Tensor/Context parallelism (tp/cp_size > 1) cannot"]),
    ],
)  # fmt: skip
def test_sizes(write, text, problems):
    found = lint(write(text))
    assert len(found) == len(problems), found
    assert all(line.startswith(f"a.yaml:{problem}") for line, problem in zip(found, problems, strict=True)), found


def test_the_command_line_goes_before_the_file(write):
    path = write(sized(FSDP, dp_replicate=2, dp_shard=2))
    assert lint(path, {"num_processes": 8}) == [
        "a.yaml:5: dp_replicate 2 x dp_shard 2 makes 4 processes, but num_processes is 8"
    ]
    options = {"num_processes": 8, "parallelism_config_dp_shard_size": 4}
    assert lint(path, options) == []
    ones = dict.fromkeys(("cp_size", "sp_size", "tp_size", "pp_size", "ep_size"), 1)
    assert read(path) == ones | {"dp_replicate_size": 2, "dp_shard_size": 2, "num_processes": 4}
    assert read(path, options) == ones | {"dp_replicate_size": 2, "dp_shard_size": 4, "num_processes": 8}


def test_no_file(monkeypatch):
    assert lint(None) == []
    assert read(None) == dict.fromkeys(read(SHIPPED[0]), 1)
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert read(None)["num_processes"] == 2


def launch_args(**given):
    args = launch_command_parser().parse_args(["run.py"])
    defaults = {
        "mixed_precision": "no", "dynamo_backend": "no", "num_processes": 2, "num_machines": 1, "main_process_port": 0,
        "num_cpu_threads_per_process": 1, "deepspeed_fields_from_accelerate_config": "", "gpu_ids": "all",
    }  # fmt: skip
    for key, value in (defaults | given).items():
        setattr(args, key, value)
    return args


def environment(key, value):
    """What the workers would see if the YAML said `key: value`."""
    given = {"parallelism_config_cp_size": 2, "parallelism_config_sp_size": 2, key: value}
    if key.startswith("fp8_"):
        return setup_fp8_env(launch_args(**given), {})
    if key.startswith(SECTIONS["deepspeed_config"][0]):
        return prepare_deepspeed_cmd_env(launch_args(use_deepspeed=True, **given))[1]
    strategy = "megatron_lm" if key.startswith("megatron_lm_") else "fsdp"
    return prepare_multi_gpu_env(launch_args(**{f"use_{strategy}": True}, use_parallelism_config=True, **given))


def test_known_keys_are_those_that_accelerate_reads():
    """Every key that the linter lets pass in a section changes what accelerate hands to the workers."""
    unread = set()
    for prefix, _ in SECTIONS.values():
        for key in (key for key in accelerate_yaml._hints() if key.startswith(prefix) and key not in SECTIONS):
            one, two = (3, 4) if key.endswith("_size") else ("inductor", "eager") if "backend" in key else ("1a", "2b")
            if key == "fp8_override_linear_precision":
                one, two = [True, True, True], [False, False, False]
            if environment(key, one) == environment(key, two):
                unread.add(key)
    launcher_only = {
        key for key in unread if re.match("deepspeed_(hostfile|exclusion|inclusion|multinode)|mpirun", key)
    }
    assert launcher_only == {
        "deepspeed_hostfile", "deepspeed_exclusion_filter", "deepspeed_inclusion_filter",
        "deepspeed_multinode_launcher", "mpirun_hostfile",
    }  # fmt: skip
    ours = {"parallelism_config_pp_size", "parallelism_config_ep_size"}
    assert unread - launcher_only == ours | {"offload_optimizer_nvme_path", "offload_param_nvme_path"}
    assert unread - launcher_only - ours <= set(REFUSED)


def test_what_deepspeed_config_file_excludes_is_what_accelerate_refuses(write, monkeypatch):
    Path("ds.json").write_text('{"zero_optimization": {"stage": 2}}')
    keys = [key for key in accelerate_yaml._hints() if key.startswith(SECTIONS["deepspeed_config"][0])]
    values = {"zero_stage": 2, "zero3_init_flag": "true", "zero3_save_16bit_model": "true"}
    for key in sorted({*keys, "mixed_precision"} - set(REFUSED) - {"deepspeed_config_file"}):
        value = values.get(key, {"mixed_precision": "bf16", "deepspeed_multinode_launcher": "standard"}.get(key, "cpu"))
        where = f"\n{key}: " if key == "mixed_precision" else f"\n  {key}: "
        text = f"distributed_type: DEEPSPEED\ndeepspeed_config:\n  deepspeed_config_file: ds.json{where}{value}\n"
        refused = any("cannot stand beside" in line for line in lint(write(text)))
        monkeypatch.setenv("ACCELERATE_CONFIG_DS_FIELDS", f"deepspeed_config_file,{key}")
        monkeypatch.setenv("ACCELERATE_DEEPSPEED_CONFIG_FILE", "ds.json")
        try:
            DeepSpeedPlugin()
            assert not refused, key
        except ValueError as error:
            assert refused and "will be ignored" in str(error), key


# ---- which file was launched ------------------------------------------------------------------------

SHOW = """
from llm_recipes.accelerate_yaml import launch_file, launch_options, read
print(f"SEEN {launch_file()} {launch_options().get('num_processes')} {read(launch_file())['tp_size']}", flush=True)
"""


@pytest.mark.parametrize(
    ("command", "text", "found"),
    [
        ("accelerate launch --num_processes 1 --config_file=a.yaml", DDP, "a.yaml 1 1"),
        ("python -m accelerate.commands.launch --config-file a.yaml", sized(DDP, tp=2, pp=2), "a.yaml None 2"),
        ("accelerate-launch", ZERO, "accelerate/default_config.yaml None 1"),
    ],
    ids=["one process", "two processes", "DeepSpeed, default file"],
)
def test_launch_file(write, command, text, found):
    """Through real launches, with a relative path, and a script that changes neither."""
    file, _, rest = found.partition(" ")
    Path("accelerate").mkdir()
    write(text.replace("num_processes: 4", "num_processes: 2")).rename(file)
    Path("show.py").write_text(SHOW)
    program, *words = command.split()
    words = [str(Path(sys.executable).with_name(program)), *words, "--main_process_port", "0", "show.py"]
    env = os.environ | {"HF_HOME": str(Path.cwd()), "PYTHONPATH": str(ROOT)}
    done = subprocess.run([*words, "--config_file", "other.yaml"], capture_output=True, text=True, timeout=240, env=env)
    ranks = 1 if "num_processes 1" in command else 2
    seen = [line for line in done.stdout.splitlines() if line.startswith("SEEN")]
    assert seen == [f"SEEN {Path.cwd() / file} {rest}"] * ranks, done.stderr


def test_launch_file_without_a_launcher(monkeypatch):
    assert launch_file() is None and launch_options() == {}

    def gone(self):
        raise psutil.NoSuchProcess(self.pid)

    monkeypatch.setattr(psutil.Process, "cmdline", gone)
    assert launch_file() is None and launch_options() == {}
