"""The checks of every start, all problems at once, and the first screen, which says what will happen."""

import dataclasses
import os

import torch
from accelerate.utils import gather_object
from huggingface_hub import HfApi
from huggingface_hub.utils import validate_repo_id
from transformers import (
    MODEL_FOR_MASKED_LM_MAPPING,
    AutoConfig,
    PreTrainedConfig,
    Trainer,
    TrainingArguments,
    get_scheduler,
)
from transformers.integrations import get_available_reporting_integrations
from transformers.utils import (
    is_flash_attn_2_available,
    is_flash_attn_3_available,
    is_kernels_available,
    is_liger_kernel_available,
)

from llm_recipes.batches import Batches
from llm_recipes.checkpoints import CHECKPOINT_BYTES
from llm_recipes.config import (
    DataConfig,
    ModelConfig,
    ObjectiveConfig,
    OptimizationConfig,
    RunConfig,
    WindowConfig,
    check_local,
    unknown_key,
)
from llm_recipes.diloco import diloco_problems
from llm_recipes.errors import UserError
from llm_recipes.launch import asked_strategy, checkpoint_format, idle_devices, layout, offloads_optimizer, state_bytes
from llm_recipes.metrics import meta_model, parameter_count
from llm_recipes.monitor import monitor_problems
from llm_recipes.objectives import architecture_for, objective_problems
from llm_recipes.optimizers import optimizer_problems, own_optimizer
from llm_recipes.outputs import output_problems, repo_id
from llm_recipes.pipeline.checks import layout_problems
from llm_recipes.probes import check_isolation, check_parts, check_prefix, check_stages
from llm_recipes.sampling import prompt_problems
from llm_recipes.stability import spike_guard_problems

# Keys of the Trainer's own data loader, whose place `batches.train_on` takes.
UNUSED = {
    "data_seed": "the order follows from seed",
    "train_sampling_strategy": "the order follows from seed",
    "dataloader_drop_last": "no window is left out to fill batches",
    "dataloader_persistent_workers": "the workers live as long as the run anyway",
    "dataloader_multiprocessing_context": "workers are started in the platform's own way",
    "dataloader_in_order": "batches come in order",
    "include_num_input_tokens_seen": "tokens are in metrics.json",
}


def architecture(model: ModelConfig, tokenizer, objective: str = "causal") -> PreTrainedConfig:
    """The model's configuration: `model_config` for a model from scratch, or that of `model_name_or_path`.

    From scratch, vocabulary and special ids come from the tokenizer unless given. `architectures`
    names the class that `objective` trains. Raises UserError for a key the architecture does not
    have, for values it refuses, and for models that do not fit the objective.
    """
    if (model.model_config is None) == (model.model_name_or_path is None):
        raise UserError("set model_config to train from scratch, or model_name_or_path to continue")
    if model.model_name_or_path:
        name = check_local("model_name_or_path", model.model_name_or_path)
        try:
            config = AutoConfig.from_pretrained(name, revision=model.model_revision or "main")
        except (OSError, ValueError) as error:
            raise UserError(f"model_name_or_path: {name}: {str(error).splitlines()[0]}") from error
    else:
        keys = dict(model.model_config)
        kind = keys.pop("model_type", None)
        try:
            known = AutoConfig.for_model(kind)
            names = {f.name for f in dataclasses.fields(known)} | set(known.attribute_map)
            for key in keys:
                if key not in names:
                    raise ValueError(f"{kind}: {unknown_key(key, names)}")
            kinds = ("bos", "eos", "pad", "cls", "sep", "mask")
            ids = {f"{kind}_token_id": getattr(tokenizer, f"{kind}_token_id") for kind in kinds}
            ids = {key: value for key, value in ids.items() if key in names}
            if objective == "span_corruption":
                ids["decoder_start_token_id"] = tokenizer.pad_token_id  # T5's convention
            config = AutoConfig.for_model(kind, **{"vocab_size": len(tokenizer), **ids, **keys})
        except Exception as error:  # validation errors of huggingface_hub have no common public base
            raise UserError(f"model_config: {' '.join(str(error).split())[:300]}") from error
    heads, kv_heads = (getattr(config, f"num_{kind}_heads", None) for kind in ("attention", "key_value"))
    if heads and kv_heads and heads % kv_heads:
        raise UserError(
            f"model_config: num_attention_heads {heads} is not a multiple of num_key_value_heads {kv_heads}"
        )
    classes, _ = architecture_for(objective)
    looks_ahead = type(config) in MODEL_FOR_MASKED_LM_MAPPING and getattr(config, "is_decoder", True) is False
    if type(config) not in classes or (objective in ("causal", "prefix") and looks_ahead):
        needed = {
            "masked": "an encoder such as bert or modernbert",
            "span_corruption": "an encoder-decoder such as t5",
        }.get(objective, "a causal language model (an encoder needs is_decoder: true)")
        raise UserError(f"{config.model_type} does not fit objective {objective}, which trains {needed}")
    config.architectures = [classes[type(config)].__name__]
    return config


def preflight(
    args: TrainingArguments, run: RunConfig, data: DataConfig, windows: WindowConfig, objective: ObjectiveConfig,
    optimization: OptimizationConfig, model: ModelConfig, config: PreTrainedConfig, tokenizer,
) -> None:  # fmt: skip
    """Checks all that does not need the tokenized data. Raises UserError with every problem, one a line; nothing is written."""
    parameters = parameter_count(config)
    context = getattr(config, "max_position_embeddings", None) or windows.sequence_length
    problems = []
    if len(tokenizer) > config.vocab_size:
        problems.append(
            f"the tokenizer has {len(tokenizer)} ids, the model's vocab_size is {config.vocab_size}: raise vocab_size"
        )
    if windows.sequence_length > context:
        problems.append(
            f"sequence_length {windows.sequence_length} is longer than the model's max_position_embeddings {context}"
        )
    problems += prompt_problems(tokenizer, run.sample_prompts, objective.objective, context)
    problems += objective_problems(objective, args, run.resolved)
    problems += [
        f"{key} is not taken here: {why}"
        for key, why in UNUSED.items()
        if key in run.resolved and not windows.streaming
    ]
    saved = parameters * (1 + args.world_size) if optimization.diloco else None  # every worker saves as much again
    problems += run_problems(args, run, bool(data.eval_fraction), parameters, saved)
    problems += attention_problems(model.attn_implementation)
    strategy = asked_strategy()
    problems += _optimisation_problems(args, optimization.optimizer, config)
    problems += optimizer_problems(optimization.optimizer, strategy)
    problems += spike_guard_problems(optimization.spike_guard, args, strategy, windows.streaming)
    problems += diloco_problems(optimization.diloco, optimization.spike_guard, args, strategy, windows.streaming)
    problems += monitor_problems(optimization.monitor, strategy, args)
    if "pipeline_schedule" in run.resolved and layout().pp == 1:
        problems.append(
            "pipeline_schedule means nothing without a pipeline: launch with accelerate_configs/pipeline.yaml"
        )
    problems += layout_problems(config, objective, windows, optimization, args)
    if problems:
        raise UserError("\n".join(problems))
    if layout().pp > 1:
        check_stages(config, model.attn_implementation)
    if layout().cp * layout().sp > 1:
        check_parts(config, model.attn_implementation)
    if objective.isolate_documents:
        check_isolation(config, model.attn_implementation)
    if objective.objective == "prefix":
        check_prefix(config, model.attn_implementation, windows.sequence_length)


def run_problems(
    args: TrainingArguments, run: RunConfig, evaluates: bool, parameters: int, trained: int | None = None
) -> list[str]:
    """What every recipe checks: schedule, evaluation, reporting, precision, disk, Hub. `trained` parameters, if not all."""
    problems = []
    if args.use_liger_kernel and not is_liger_kernel_available():
        problems.append("use_liger_kernel: liger-kernel is not installed: pip install -e '.[gpu]'")
    if args.max_steps > 0:
        problems += _schedule_problems(args, args.max_steps)
    if args.eval_strategy != "no" and not evaluates:
        problems.append(f"eval_strategy: {args.eval_strategy.value} needs data: set eval_fraction above 0")
    if missing := set(args.report_to) - set(get_available_reporting_integrations()):
        problems.append(f"report_to: {', '.join(sorted(missing))} is not installed: pip install -e '.[track]'")
    if args.hub_strategy not in ("end", "every_save"):
        problems.append(f"hub_strategy: {args.hub_strategy.value} is not supported: use end or every_save")
    if args.hub_strategy == "every_save" and checkpoint_format().endswith("SHARDED_STATE_DICT"):
        problems.append(
            "hub_strategy: every_save needs whole checkpoints: set fsdp_state_dict_type: FULL_STATE_DICT, or hub_strategy: end"
        )
    if offloads_optimizer() and not args.optim.value.startswith(
        "adamw_torch"
    ):  # Accelerate would put Adam in its place
        problems.append(
            f"optim: {args.optim.value} cannot be offloaded, only adamw_torch can: use a strategy without offloading"
        )
    if args.fp16 and args.device.type == "cpu":
        problems.append("fp16 needs a GPU: use bf16: true, or neither for fp32")
    kept = 0 if args.save_strategy == "no" else min(args.save_total_limit or 10, 10)
    problems += output_problems(
        args.output_dir, None, needed=4 * parameters + CHECKPOINT_BYTES * kept * (trained or parameters)
    )
    if run.push_to_hub and args.process_index == 0:
        problems += hub_problems(args)
    return problems


def attention_problems(name: str | None) -> list[str]:
    """Why the attention implementation `name` cannot be had here; otherwise the library fails when the model is built."""
    needs = {"flash_attention_2": is_flash_attn_2_available, "flash_attention_3": is_flash_attn_3_available}
    there = needs.get(name, is_kernels_available if name and "/" in name else None)
    if there is None or there():
        return []
    return [
        f"attn_implementation: {name} needs a GPU and its package: pip install -e '.[gpu]', or leave the key out for sdpa"
    ]


def _schedule_problems(args: TrainingArguments, steps: int) -> list[str]:
    """Parts of the schedule that do not fit into `steps`; the library would start deep in the decay."""
    decay = (args.lr_scheduler_kwargs or {}).get("num_decay_steps", 0)
    warmup = args.get_warmup_steps(steps)  # a value below 1 is a share of the steps
    if warmup >= steps:
        return [f"warmup_steps {warmup:g} is not below the {steps} steps of the run"]
    if warmup + decay > steps:
        return [f"warmup_steps {warmup:g} and num_decay_steps {decay} are more than the {steps} steps of the run"]
    return []


def _optimisation_problems(args: TrainingArguments, name: str | None, config: PreTrainedConfig) -> list[str]:
    """Builds the optimizer and the schedule over one parameter, and says what they refuse."""
    try:
        own = own_optimizer(name, args, meta_model(config)) if name else None
        kind, options = own or Trainer.get_optimizer_cls_and_kwargs(args)
        weights = [torch.nn.Parameter(torch.zeros(2, 2))]
        optimizer = torch.optim.SGD(weights) if name else kind(weights, **options)
        steps = {"num_warmup_steps": 1, "num_training_steps": 10}
        get_scheduler(
            args.lr_scheduler_type, optimizer, **steps, scheduler_specific_kwargs=dict(args.lr_scheduler_kwargs or {})
        )
    except UserError as error:
        return [str(error)]
    except Exception as error:  # whatever the optimizer's own package raises
        return [
            f"optim {args.optim.value} with lr_scheduler_type {args.lr_scheduler_type.value}: {' '.join(str(error).split())}"
        ]
    return []


def plan(
    args: TrainingArguments, run: RunConfig, length: int, config: PreTrainedConfig, tokenizer, train, evaluation,
    batches: Batches, report: list[str], record: dict,
) -> None:  # fmt: skip
    """The checks that need the data, then the first screen, on rank 0: what will happen, in a dozen lines.

    `train` and `evaluation` are the examples, `length` the tokens of a window.
    """
    batch, steps, sequences = batches.batch_size, batches.steps, batches.sequences(batches.steps)
    check_plan(args, record, steps)
    if args.process_index != 0:
        return

    parameters, tokens = parameter_count(config), sequences * length
    sizes = f"{batches.size:,} windows of {length} tokens" if batches.size else "a stream"
    epochs = f", {sequences / batches.size:.2f} epochs" if batches.size else ""
    ramp = ", then ".join(f"{stage} steps of {size}" for size, stage in batches.stages)
    example = next(iter(train)) if evaluation is None else evaluation[0]
    diloco = run.resolved.get("diloco")
    targets = example["labels"][example["labels"] >= 0]
    lines = [
        *(("data", line) for line in report),
        ("data", f"{sizes} to train on, {0 if evaluation is None else len(evaluation):,} windows held out"),
        ("tokenizer", f"{len(tokenizer):,} ids, documents end with {tokenizer.eos_token}"),
        (
            "model",
            f"{config.model_type}, {parameters:,} parameters, context {getattr(config, 'max_position_embeddings', length)}",
        ),
        (
            "batch",
            f"{batch} sequences = {processes(layout().data)} x {args.per_device_train_batch_size} x {args.gradient_accumulation_steps} "
            f"accumulation; {batch * length:,} tokens a step{f', after {ramp}' if ramp else ''}",
        ),
        ("steps", f"{steps:,}: {tokens:,} tokens{epochs}, {tokens / parameters:.1f} a parameter"),
        *launch_lines(args, run, parameters),
        (
            "samples",
            "none are drawn: no process holds the whole model" if layout().own and run.sample_prompts else None,
        ),
        (
            "diloco",
            diloco
            and f"every process alone for {diloco['sync_every']} steps; {8 * parameters / 1e6:,.0f} MB a device and "
            f"{CHECKPOINT_BYTES * args.world_size * parameters / 1e6:,.0f} MB a checkpoint on top",
        ),
        ("batches", f"{len(batches.left_out)} left out after rollbacks" if batches.left_out else None),
        ("example", repr(tokenizer.decode(example["input_ids"][:40]))),
        ("targets", repr(tokenizer.decode(targets[:40])) if len(targets) < len(example["input_ids"]) else None),
    ]
    show(lines)


def check_plan(args: TrainingArguments, record: dict, steps: int) -> None:
    """Raises UserError unless the run `record` of `steps` steps may go to output_dir and is the same on every process."""
    problems = output_problems(args.output_dir, record) + _schedule_problems(args, steps)
    if args.world_size > 1 and any(other != record["identity"] for other in gather_object([record["identity"]])):
        problems.append("the processes do not see the same data or tokenizer: share the files between the machines")
    if problems:
        raise UserError("\n".join(problems))


def processes(number: int) -> str:
    return f"{number} process{'es' if number > 1 else ''}"


def launch_lines(args: TrainingArguments, run: RunConfig, parameters: int, trained: int | None = None) -> list[tuple]:
    """Lines of the first screen on strategy, memory and output; `trained` parameters, if not all."""
    strategy, trained = asked_strategy(), trained or parameters
    dtype = "bf16" if args.bf16 else "fp16" if args.fp16 else "fp32"
    dtype = "fp8" if os.environ.get("ACCELERATE_MIXED_PRECISION") == "fp8" else dtype
    shards, average = layout().shards, " on average" if layout().pp > 1 else ""
    frozen = 4 * (parameters - trained) / (1 if "ZeRO-1" in strategy or "ZeRO-2" in strategy else shards)
    memory = frozen + state_bytes(strategy, shards) * trained
    return [
        ("strategy", f"{strategy}, {processes(args.world_size)}, {args.device.type}, {dtype}; seed {args.seed}"),
        ("strategy", idle_devices()),
        (
            "memory",
            f"{memory / 1e6:,.0f} MB a device{average} for weights, gradients and AdamW's states, activations on top",
        ),
        ("output", f"{args.output_dir}; a checkpoint is about {CHECKPOINT_BYTES * trained / 1e6:,.0f} MB"),
        ("hub", f"will push to {repo_id(args)}" if run.push_to_hub else None),
    ]


def show(lines: list[tuple]) -> None:
    """Prints (label, text) pairs, those with a text."""
    for label, text in lines:
        if text:
            print(f"{label:<10} {text}", flush=True)


def hub_problems(args) -> list[str]:
    """Why the Hub would refuse the push of `args`, as far as can be known beforehand."""
    try:
        validate_repo_id(repo_id(args))
        HfApi().whoami()
        return []
    except Exception as error:  # as in outputs.push
        reason = " ".join(str(error).split())[:200]
        return [f"push_to_hub: {repo_id(args)}: {reason}. Check hub_model_id, and `hf auth login` or HF_TOKEN"]
