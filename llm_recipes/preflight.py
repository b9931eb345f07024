"""The checks of every start, all problems at once, and the first screen, which says what will happen."""

from httpx2 import HTTPError
from huggingface_hub import HfApi
from huggingface_hub.errors import HfHubHTTPError
from transformers import AutoConfig, PreTrainedConfig, TrainingArguments
from transformers.integrations import get_available_reporting_integrations

from llm_recipes.config import ModelConfig, RunConfig, WindowConfig, check_local
from llm_recipes.errors import UserError
from llm_recipes.launch import asked_strategy
from llm_recipes.metrics import meta_model
from llm_recipes.outputs import output_problems, repo_id


def architecture(model: ModelConfig, tokenizer) -> PreTrainedConfig:
    """The model's configuration: `model_config` for a model from scratch, or that of `model_name_or_path`.

    From scratch, vocabulary and special ids come from the tokenizer unless given. Raises UserError
    for a key the architecture does not have and for values it refuses.
    """
    if (model.model_config is None) == (model.model_name_or_path is None):
        raise UserError("set model_config to train from scratch, or model_name_or_path to continue")
    if model.model_name_or_path:
        check_local("model_name_or_path", model.model_name_or_path)
        try:
            return AutoConfig.from_pretrained(model.model_name_or_path, revision=model.model_revision or "main")
        except (OSError, ValueError) as error:
            raise UserError(f"model_name_or_path: {model.model_name_or_path}: {str(error).splitlines()[0]}") from error
    keys = dict(model.model_config)
    kind = keys.pop("model_type", None)
    try:
        known = AutoConfig.for_model(kind)
        for key in keys:
            if not hasattr(known, key):
                raise ValueError(f"{kind} has no key `{key}`")
        ids = {
            "bos_token_id": tokenizer.bos_token_id,
            "eos_token_id": tokenizer.eos_token_id,
            "pad_token_id": tokenizer.pad_token_id,
        }
        return AutoConfig.for_model(kind, **{"vocab_size": len(tokenizer), **ids, **keys})
    except Exception as error:  # validation errors of huggingface_hub have no common public base
        raise UserError(f"model_config: {' '.join(str(error).split())[:300]}") from error


def preflight(
    args: TrainingArguments, run: RunConfig, windows: WindowConfig, config: PreTrainedConfig, tokenizer, train, evaluation,
    report: list[str], record: dict,
) -> None:  # fmt: skip
    """Checks everything that can be checked before the model exists and prints the plan on rank 0.

    Raises UserError with all problems, one a line, before anything is written.
    """
    problems = []
    world_size, length = args.world_size, windows.sequence_length
    batch = args.per_device_train_batch_size * args.gradient_accumulation_steps * world_size
    model = meta_model(config)
    parameters = sum(p.numel() for p in model.parameters())

    if len(tokenizer) > config.vocab_size:
        problems.append(
            f"the tokenizer has {len(tokenizer)} ids, the model's vocab_size is {config.vocab_size}: raise vocab_size"
        )
    limit = getattr(config, "max_position_embeddings", None)
    if limit and length > limit:
        problems.append(f"sequence_length {length} is longer than the model's max_position_embeddings {limit}")
    if tokenizer.pad_token_id == tokenizer.eos_token_id and tokenizer.pad_token_id is not None:
        report.append(
            f"pad and EOS are the same token {tokenizer.eos_token}: right here, where nothing is padded, wrong for SFT"
        )
    steps = args.max_steps if args.max_steps > 0 else int(args.num_train_epochs * len(train) // batch)
    if steps and args.warmup_steps >= steps:
        problems.append(f"warmup_steps {args.warmup_steps:g} is not below the {steps} steps of the run")
    if args.eval_strategy != "no" and evaluation is None:
        problems.append(f"eval_strategy: {args.eval_strategy.value} needs data: set eval_fraction above 0")
    if missing := set(args.report_to) - set(get_available_reporting_integrations()):
        problems.append(f"report_to: {', '.join(sorted(missing))} is not installed: pip install -e '.[track]'")
    if args.hub_strategy not in ("end", "every_save"):
        problems.append(f"hub_strategy: {args.hub_strategy.value} is not supported: use end or every_save")

    kept = 0 if args.save_strategy == "no" else min(args.save_total_limit or 10, 10)
    problems += output_problems(args.output_dir, record, needed=parameters * (4 + 16 * kept))
    if run.push_to_hub and args.process_index == 0:
        problems += _hub_problems(args)
    if problems:
        raise UserError("\n".join(problems))
    if args.process_index != 0:
        return

    dtype = "bf16" if args.bf16 else "fp16" if args.fp16 else "fp32"
    shard = {"3": 16 / world_size, "2": 4 + 12 / world_size, "1": 8 + 8 / world_size}
    strategy = asked_strategy()
    bytes_each = 16 / world_size if "FSDP" in strategy else shard.get(strategy[-1], 16) if "ZeRO" in strategy else 16
    first = next(iter(evaluation if evaluation is not None else train))["input_ids"]
    print(f"data       {report[0]}" + "".join(f"\n           {line}" for line in report[1:]))
    if not windows.streaming:
        print(
            f"           {len(train):,} windows of {length} tokens to train on, {len(evaluation) if evaluation is not None else 0:,} held out"
        )
    print(f"tokenizer  {len(tokenizer):,} ids, documents end with {tokenizer.eos_token}")
    print(f"model      {config.model_type}, {parameters:,} parameters, context {limit or length}")
    print(
        f"batch      {batch} sequences = {world_size} processes x {args.per_device_train_batch_size} x "
        f"{args.gradient_accumulation_steps} accumulation; {batch * length:,} tokens a step"
    )
    epochs = "" if windows.streaming else f", {steps * batch / len(train):.2f} epochs"
    print(
        f"steps      {steps:,}: {steps * batch * length:,} tokens{epochs}, {steps * batch * length / parameters:.1f} a parameter"
    )
    print(f"strategy   {strategy}, {world_size} processes, {args.device.type}, {dtype}; seed {args.seed}")
    print(
        f"memory     {bytes_each * parameters / 1e6:,.0f} MB a device for weights, gradients and Adam states, activations on top"
    )
    print(f"output     {args.output_dir}; a checkpoint is about {16 * parameters / 1e6:,.0f} MB")
    print(f"example    {tokenizer.decode(first[:40])!r}", flush=True)


def _hub_problems(args: TrainingArguments) -> list[str]:
    try:
        user = HfApi().whoami()["name"]
        if not args.hub_model_id or "/" not in args.hub_model_id:
            print(f"hub        will push to {user}/{repo_id(args)}")
        return []
    except (HfHubHTTPError, HTTPError, OSError, ValueError) as error:
        return [
            f"push_to_hub: the Hub does not accept this login ({str(error).strip().splitlines()[0]}): run `hf auth login` or set HF_TOKEN"
        ]
