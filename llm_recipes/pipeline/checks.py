"""What a layout asks of a model and of a run, found before anything is split."""

import os

from transformers import PreTrainedConfig, TrainingArguments

from llm_recipes import _compat
from llm_recipes.config import ObjectiveConfig, OptimizationConfig, WindowConfig, micro_batch
from llm_recipes.launch import asked_strategy, global_batch, layout
from llm_recipes.metrics import meta_model
from llm_recipes.monitor import compiles
from llm_recipes.objectives import SHIFTED
from llm_recipes.pipeline.sharding import distributed_config
from llm_recipes.pipeline.stages import SCHEDULES, V_SHAPED


def layout_problems(
    config: PreTrainedConfig, objective: ObjectiveConfig, windows: WindowConfig, optimization: OptimizationConfig,
    args: TrainingArguments,
) -> list[str]:  # fmt: skip
    """Why the launched layout cannot train the model of `config` in this run."""
    ways, strategy = layout(), asked_strategy()
    problems = []
    if ways.sharing > 1 and windows.streaming:
        problems.append(
            f"streaming deals every process other windows, and under {strategy} some share theirs: set streaming: false"
        )
    if ways.cp * ways.sp > 1:
        problems += _sequence_problems(config, objective, windows, args)
    if not ways.own:
        return problems
    refused = {
        f"objective: {objective.objective}": objective.objective not in SHIFTED,
        "fp16": args.fp16,
        "mixed_precision: fp8": os.environ.get("ACCELERATE_MIXED_PRECISION") == "fp8",
        "torch_compile": compiles(args),
        "use_liger_kernel": args.use_liger_kernel,
        "load_best_model_at_end": args.load_best_model_at_end,
        "hub_strategy: every_save": args.hub_strategy == "every_save",
    }
    problems += [f"{key} is not taken under {strategy}" for key, found in refused.items() if found]
    if ways.tp > 1:
        problems += [
            f"{key} {share} is not taken under TP {ways.tp}, whose ranks would not drop the same: set it to 0"
            for key, share in config.to_dict().items()
            if "drop" in key and isinstance(share, float) and share
        ]
    heads = {key: getattr(config, key, None) for key in ("num_attention_heads", "num_key_value_heads")}
    problems += [f"{key} {n} does not divide over TP {ways.tp}" for key, n in heads.items() if n and n % ways.tp]
    try:
        _compat.parallel_plans(meta_model(config), distributed_config(ways))
    except ValueError as error:
        problems.append(f"{config.model_type} under {strategy}: {' '.join(str(error).split())}")
    if ways.pp > 1 and ways.ep > 1:
        problems.append("expert parallel does not go with a pipeline")
    if ways.ep > 1 and config.tie_word_embeddings:
        problems.append("expert parallel needs tie_word_embeddings: false")
    experts = next((n for key in ("num_local_experts", "num_experts") if (n := getattr(config, key, None))), 0)
    if experts % ways.ep:
        problems.append(f"{experts} experts do not divide over EP {ways.ep}")
    return problems + (_pipeline_problems(config, optimization, args) if ways.pp > 1 else [])


def _sequence_problems(
    config: PreTrainedConfig, objective: ObjectiveConfig, windows: WindowConfig, args: TrainingArguments
) -> list[str]:
    ways, strategy, length, problems = layout(), asked_strategy(), windows.sequence_length, []
    if objective.objective != "causal" or objective.isolate_documents:
        problems.append(f"{strategy} splits causal windows: objective causal, without isolate_documents")
    parts = 2 * ways.cp * ways.sp  # a ring gives each rank a piece from the front and one from the back
    if length % parts:
        problems.append(f"sequence_length {length} is no multiple of {parts}, which {strategy} needs")
    for key in ("num_attention_heads", "num_key_value_heads"):
        if (heads := getattr(config, key, None) or ways.sp) % ways.sp:
            problems.append(f"{key} {heads} does not divide over SP {ways.sp}")
    if getattr(config, "output_router_logits", False):
        problems.append(
            "the balance loss of experts needs whole sequences: no cp or sp, or output_router_logits: false"
        )
    refused = {key: getattr(config, key, None) for key in ("sliding_window", "attention_chunk_size")}
    refused |= {"torch_compile": compiles(args), "use_liger_kernel": args.use_liger_kernel}
    return problems + [f"{key} is not taken under {strategy}" for key, found in refused.items() if found]


def _pipeline_problems(
    config: PreTrainedConfig, optimization: OptimizationConfig, args: TrainingArguments
) -> list[str]:
    schedule, ranks = optimization.pipeline_schedule, layout().pp
    stages, problems = ranks * SCHEDULES[schedule], []
    if not getattr(config, "base_model_pp_plan", None):
        return [
            f"{config.model_type} has no pipeline plan in transformers: use an architecture such as llama, or zero3.yaml"
        ]
    if config.num_hidden_layers < stages:
        problems.append(f"{schedule} cuts {stages} stages, and the model has {config.num_hidden_layers} layers")
    if getattr(config, "output_router_logits", False):
        problems.append(
            "the balance loss of experts needs all layers in one place: no pipeline, or output_router_logits: false"
        )
    if (
        schedule in V_SHAPED and config.tie_word_embeddings and layout().data > 1
    ):  # one FSDP unit would be in two stages
        problems.append(f"{schedule} with tied weights does not go with data parallel: use InterleavedZeroBubble")
    size, sizes = global_batch(args), []
    if ramp := optimization.batch_size_ramp:
        sizes = [ramp.start * ramp.factor**i for i in range(64) if ramp.start * ramp.factor**i < size]
    for batch in (b for b in [*sizes, size] if b > 0 and b % layout().data == 0):  # others are refused with the ramp
        share = batch // layout().data
        number = share // micro_batch(share, args.per_device_train_batch_size)
        said = f"a step of {batch} has {number} micro-batches of {share // number}: change per_device_train_batch_size"
        if schedule in ("1F1B", "ZBVZeroBubble", "DualPipeV") and number < stages:
            problems.append(f"{schedule} needs a micro-batch for each of its {stages} stages, and {said}")
        elif schedule.startswith("Interleaved") and number % ranks:
            problems.append(f"{schedule} needs a multiple of {ranks} micro-batches, and {said}")
    return problems
