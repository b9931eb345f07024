"""What SFT, reward modelling, DPO and PPO share: their checks, first screen, and figures."""

import importlib.util
import math
from itertools import groupby

import pyarrow.compute as pc
import trl
from accelerate.utils import is_peft_model
from datasets import Dataset
from transformers import PreTrainedConfig

from llm_recipes import metrics
from llm_recipes.adapters import adapter_problems
from llm_recipes.config import AdapterConfig, ConversationConfig, PromptConfig, RunConfig
from llm_recipes.conversations import IDS, Encoder
from llm_recipes.errors import UserError
from llm_recipes.launch import asked_strategy, global_batch, layout
from llm_recipes.metrics import parameter_count
from llm_recipes.preflight import attention_problems, check_plan, launch_lines, processes, run_problems, show
from llm_recipes.probes import check_isolation

SHOWN = 512  # tokens of the example


def preflight(
    args, run: RunConfig, data: ConversationConfig, model: trl.ModelConfig, adapter: AdapterConfig,
    config: PreTrainedConfig, trained: int | None = None,
) -> None:  # fmt: skip
    """Checks all that does not need the rows; `trained` parameters, if not all. Raises UserError with every problem, one a line; nothing is written."""
    held_out = bool(data.eval_fraction or data.eval_datasets)
    problems = run_problems(args, run, held_out, *_weights(args, parameter_count(config), trained))
    if layout().own or layout().sharing > 1:
        problems.append(f"{asked_strategy()} is for recipes/pretrain: use accelerate_configs/zero3.yaml or fsdp2.yaml")
    if not held_out and config.architectures[0].endswith("ForSequenceClassification"):
        problems.append("a reward model is judged on held-out pairs: set eval_fraction above 0, or eval_datasets")
    problems += adapter_problems(model, adapter, args) + attention_problems(model.attn_implementation)
    if getattr(args, "packing", False) and args.packing_strategy == "wrapped":
        problems.append("packing_strategy: wrapped cuts rows and lets them see each other: use bfd")
    if getattr(args, "eval_packing", None) and not args.packing:
        problems.append("eval_packing: true means nothing without packing: true")
    context = getattr(config, "max_position_embeddings", None)
    if isinstance(data, PromptConfig):
        key, longest = "max_prompt_length + max_completion_length", data.max_prompt_length + args.max_completion_length
    else:
        key, longest = "max_length", args.max_length
    if longest is None:
        problems.append(f"{key}: null lets one long row take all memory: give a number of tokens")
    elif context and longest > context:
        problems.append(f"{key} {longest} is longer than the model's max_position_embeddings {context}")
    if getattr(args, "use_vllm", False) and importlib.util.find_spec("vllm") is None:
        problems.append("use_vllm: vLLM is not installed: pip install -e '.[vllm]'")
    if problems:
        raise UserError("\n".join(problems))
    if getattr(args, "packing", False):
        check_isolation(config, model.attn_implementation)


def _weights(args, parameters: int, trained: int | None) -> tuple[int, int | None]:
    """(parameters held, parameters trained if not all): PPO has a critic and a reference beside its policy."""
    if not hasattr(args, "rollout_size"):
        return parameters, trained
    models = 1 + (args.critic == "separate")
    reference = parameters if args.kl_coef and trained is None else 0
    return models * parameters + reference, models * (trained or parameters)


def token_count(rows: Dataset) -> int:
    """Ids in all columns of `rows` but labels."""
    total = 0
    for batch in rows.with_format("arrow").iter(10_000):
        names = IDS & set(batch.column_names)
        total += sum(pc.sum(pc.list_value_length(batch.column(name))).as_py() for name in names)
        if {"prompt_ids", "chosen_ids"} <= names:  # the prompt is read with each of the two answers
            total += pc.sum(pc.list_value_length(batch.column("prompt_ids"))).as_py()
    return total


def token_counter(args, rows: Dataset):
    """For Throughput: tokens of the first `step` steps, on average, for rows differ in length."""
    tokens = token_count(rows) / len(rows) * global_batch(args)
    return lambda step: round(step * tokens)


def rollout_counter(trainer):
    """For Throughput: tokens of the rollouts, prompts and completions, of the first `step` steps; a rollout's are spread
    evenly over the steps that train on it."""
    every = trainer.args.steps_per_rollout

    def tokens_until(step: int) -> int:
        begun = math.ceil(trainer.state.global_step / every) * every
        return round(step * trainer.state.num_input_tokens_seen / max(begun, 1))

    return tokens_until


def uses(args) -> int:
    """How many rows of batches a row makes in an epoch: one, but for PPO's completions, which are trained on again."""
    return getattr(args, "num_generations", 1) * getattr(args, "num_ppo_epochs", 1)


def steps_of(args, rows: int) -> int:
    """Optimizer steps of the run; rows fill whole batches."""
    if args.max_steps > 0:
        return args.max_steps
    return math.ceil(args.num_train_epochs * rows * uses(args) / global_batch(args))


def shown_example(row: dict, tokenizer) -> list[tuple]:
    """Lines with one row as the model sees it, up to SHOWN tokens; what the loss is on stands between [[ and ]]."""
    if "labels" not in row:
        sides = [name for name in row if name in IDS]
        return [(name.removesuffix("_ids"), repr(tokenizer.decode(row[name][:SHOWN]))) for name in sides]
    text, pairs = "", zip(row["input_ids"][:SHOWN], row["labels"], strict=False)
    for learnt, run in groupby(pairs, key=lambda pair: pair[1] >= 0):
        said = tokenizer.decode([token for token, _ in run])
        text += f"[[{said}]]" if learnt else said
    return [("example", repr(text)), ("example", "the loss is on what stands between [[ and ]]")]


def plan(
    args, run: RunConfig, config: PreTrainedConfig, encoder: Encoder, train: Dataset, evaluation: Dataset | None,
    report: list[str], record: dict, trained: int | None = None, rewards: list[str] | None = None,
) -> None:  # fmt: skip
    """The checks that need the rows, then the first screen, on rank 0. With PPO's `rewards` the rows are prompts."""
    steps, batch, tokenizer = steps_of(args, len(train)), global_batch(args), encoder.tokenizer
    check_plan(args, record, steps)
    if rewards is not None and steps % args.steps_per_rollout:
        raise UserError(
            f"num_train_epochs: {steps} steps are not whole rollouts of {args.steps_per_rollout}: set max_steps to a multiple"
        )
    if args.process_index != 0:
        return
    parameters, tokens = parameter_count(config), token_count(train) / len(train)
    part = f", {trained:,} of them trained" if trained else ""
    stop = tokenizer.convert_ids_to_tokens(encoder.stop_id)
    each = f"; about {batch * tokens:,.0f} tokens a step"
    whole, rollouts = f"about {steps * batch * tokens:,.0f} tokens", []
    if rewards is not None:  # whose tokens are not known beforehand
        longest = f"up to {args.max_completion_length} tokens, drawn at temperature {args.temperature:g} until {stop}"
        rollouts = [
            ("rollout", f"{args.rollout_size} completions of {longest}"),
            *(("reward", line) for line in rewards),
        ]
        parts = f"{args.num_ppo_epochs} epochs x {args.num_mini_batches} mini-batches"
        each, whole = "", f"{steps // args.steps_per_rollout:,} rollouts x {parts}"
    show(
        [
            *(("data", line) for line in report),
            ("data", f"{len(train):,} rows to train on, {0 if evaluation is None else len(evaluation):,} held out"),
            ("tokenizer", f"{len(tokenizer):,} ids, answers end with {stop}, padding is {tokenizer.pad_token}"),
            ("model", f"{config.architectures[0]}, {parameters:,} parameters{part}"),
            *rollouts,
            (
                "batch",
                f"{batch} rows = {processes(args.world_size)} x "
                f"{args.per_device_train_batch_size} x {args.gradient_accumulation_steps} accumulation{each}",
            ),
            ("steps", f"{steps:,}: {steps * batch / uses(args) / len(train):.2f} epochs, {whole}"),
            *launch_lines(args, run, *_weights(args, parameters, trained)),
            *shown_example(train[0], tokenizer),
        ]
    )


def exact_evaluation(trainer, rows: Dataset | None) -> None:
    """Makes the held-out loss of SFT the mean over all its targets.

    The Trainer averages the means of the batches, whose answers differ in length, so the figure would follow the
    batch size. Each batch is divided by the mean number of targets of a batch instead.
    """
    if rows is None:
        return
    targets = sum(sum(label >= 0 for label in labels[1:]) for labels in rows["labels"])
    share = targets / (len(rows) / trainer.args.per_device_eval_batch_size) * trainer.args.world_size
    compute_loss = trainer.compute_loss

    def exact(model, inputs, return_outputs=False, num_items_in_batch=None):
        items = num_items_in_batch if trainer.model.training else share
        return compute_loss(model, inputs, return_outputs, num_items_in_batch=items)

    trainer.compute_loss = exact


def measure(trainer, rows: Dataset, throughput, started: float) -> dict:
    """Figures of a finished run for metrics.json: evaluation, tokens and speed; every rank takes part."""
    steps = trainer.state.global_step
    results = {
        "parameters": parameter_count(trainer.model.config),
        "steps": steps,
        "tokens": throughput.tokens_until(steps),
    }
    if trainer.eval_dataset is not None:
        found = trainer.evaluate()
        # of the run rather than the model, or averages of batches that follow the batch size
        skip = (
            "runtime", "per_second", "num_tokens", "epoch", "entropy", "token_accuracy", "min_reward", "max_reward",
            "time/", "padding", "/std", "per_token",
        )  # fmt: skip
        results |= {key: value for key, value in found.items() if not any(word in key for word in skip)}
    flops = None
    if not hasattr(trainer.args, "rollout_size"):  # whose tokens are read by several models, in many passes
        length = round(token_count(rows) / len(rows) / (1 if "labels" in rows.column_names else 2))
        flops = metrics.flops_per_token(trainer.model.config, length)
        if is_peft_model(trainer.model):
            flops *= 2 / 3  # frozen weights need no gradient
    return results | metrics.speed(trainer, throughput, flops, started)
