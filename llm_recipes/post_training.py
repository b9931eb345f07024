"""What SFT, reward modelling and DPO share: their checks, first screen, and figures."""

import math
from itertools import groupby

import pyarrow.compute as pc
import trl
from accelerate.utils import is_peft_model
from datasets import Dataset
from transformers import PreTrainedConfig

from llm_recipes import metrics
from llm_recipes.adapters import adapter_problems
from llm_recipes.config import AdapterConfig, ConversationConfig, RunConfig
from llm_recipes.conversations import Encoder
from llm_recipes.errors import UserError
from llm_recipes.metrics import parameter_count
from llm_recipes.preflight import attention_problems, check_plan, launch_lines, processes, run_problems, show
from llm_recipes.probes import check_isolation

SHOWN = 512  # tokens of the example


def preflight(
    args, run: RunConfig, data: ConversationConfig, model: trl.ModelConfig, adapter: AdapterConfig,
    config: PreTrainedConfig, trained: int | None = None,
) -> None:  # fmt: skip
    """Checks all that does not need the rows; `trained` parameters, if not all. Raises UserError with every problem, one a line; nothing is written."""
    parameters = parameter_count(config)
    held_out = bool(data.eval_fraction or data.eval_datasets)
    problems = run_problems(args, run, held_out, parameters, trained)
    if not held_out and config.architectures[0].endswith("ForSequenceClassification"):
        problems.append("a reward model is judged on held-out pairs: set eval_fraction above 0, or eval_datasets")
    problems += adapter_problems(model, adapter, args) + attention_problems(model.attn_implementation)
    if getattr(args, "packing", False) and args.packing_strategy == "wrapped":
        problems.append("packing_strategy: wrapped cuts rows and lets them see each other: use bfd")
    if getattr(args, "eval_packing", None) and not args.packing:
        problems.append("eval_packing: true means nothing without packing: true")
    context = getattr(config, "max_position_embeddings", None)
    if args.max_length is None:
        problems.append("max_length: null lets one long row take all memory: give a number of tokens")
    elif context and args.max_length > context:
        problems.append(f"max_length {args.max_length} is longer than the model's max_position_embeddings {context}")
    if problems:
        raise UserError("\n".join(problems))
    if getattr(args, "packing", False):
        check_isolation(config, model.attn_implementation)


def token_count(rows: Dataset) -> int:
    """Ids in all columns of `rows` but labels."""
    total = 0
    for batch in rows.with_format("arrow").iter(10_000):
        names = [name for name in batch.column_names if name.endswith("_ids")]
        total += sum(pc.sum(pc.list_value_length(batch.column(name))).as_py() for name in names)
        if "prompt_ids" in names:  # read with each of the two answers
            total += pc.sum(pc.list_value_length(batch.column("prompt_ids"))).as_py()
    return total


def token_counter(args, rows: Dataset):
    """For Throughput: tokens of the first `step` steps, on average, for rows differ in length."""
    tokens = token_count(rows) / len(rows) * batch_rows(args)
    return lambda step: round(step * tokens)


def batch_rows(args) -> int:
    return args.per_device_train_batch_size * args.gradient_accumulation_steps * args.world_size


def steps_of(args, rows: int) -> int:
    """Optimizer steps of the run; rows fill whole batches."""
    return args.max_steps if args.max_steps > 0 else math.ceil(args.num_train_epochs * rows / batch_rows(args))


def shown_example(row: dict, tokenizer) -> list[tuple]:
    """Lines with one row as the model sees it, up to SHOWN tokens; what the loss is on stands between [[ and ]]."""
    if "labels" not in row:
        sides = [name for name in row if name.endswith("_ids")]
        return [(name.removesuffix("_ids"), repr(tokenizer.decode(row[name][:SHOWN]))) for name in sides]
    text, pairs = "", zip(row["input_ids"][:SHOWN], row["labels"], strict=False)
    for learnt, run in groupby(pairs, key=lambda pair: pair[1] >= 0):
        said = tokenizer.decode([token for token, _ in run])
        text += f"[[{said}]]" if learnt else said
    return [("example", repr(text)), ("example", "the loss is on what stands between [[ and ]]")]


def plan(
    args, run: RunConfig, config: PreTrainedConfig, encoder: Encoder, train: Dataset, evaluation: Dataset | None,
    report: list[str], record: dict, trained: int | None = None,
) -> None:  # fmt: skip
    """The checks that need the rows, then the first screen, on rank 0."""
    steps, batch, tokenizer = steps_of(args, len(train)), batch_rows(args), encoder.tokenizer
    check_plan(args, record, steps)
    if args.process_index != 0:
        return
    parameters, tokens = parameter_count(config), token_count(train) / len(train)
    part = f", {trained:,} of them trained" if trained else ""
    stop = tokenizer.convert_ids_to_tokens(encoder.stop_id)
    show(
        [
            *(("data", line) for line in report),
            ("data", f"{len(train):,} rows to train on, {0 if evaluation is None else len(evaluation):,} held out"),
            ("tokenizer", f"{len(tokenizer):,} ids, answers end with {stop}, padding is {tokenizer.pad_token}"),
            ("model", f"{config.architectures[0]}, {parameters:,} parameters{part}"),
            (
                "batch",
                f"{batch} rows = {processes(args)} x "
                f"{args.per_device_train_batch_size} x {args.gradient_accumulation_steps} accumulation; about "
                f"{batch * tokens:,.0f} tokens a step",
            ),
            (
                "steps",
                f"{steps:,}: {steps * batch / len(train):.2f} epochs, about {steps * batch * tokens:,.0f} tokens",
            ),
            *launch_lines(args, run, parameters, trained),
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
        skip = ("runtime", "per_second", "num_tokens", "epoch", "entropy", "token_accuracy", "min_reward", "max_reward")
        results |= {key: value for key, value in found.items() if not any(word in key for word in skip)}
    length = round(token_count(rows) / len(rows) / (1 if "labels" in rows.column_names else 2))
    flops = metrics.flops_per_token(trainer.model.config, length)
    if is_peft_model(trainer.model):
        flops *= 2 / 3  # frozen weights need no gradient
    return results | metrics.speed(trainer, throughput, flops, started)
