"""Models to train: from scratch, the same under every strategy, or continued, and then whole."""

import copy

import torch
import transformers
import trl
from transformers import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING,
    AttentionInterface,
    AutoConfig,
    AutoModelForCausalLM,
    PreTrainedConfig,
    PreTrainedModel,
    TrainingArguments,
    set_seed,
)
from transformers.initialization import no_init_weights
from transformers.integrations import is_deepspeed_zero3_enabled
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from llm_recipes import _compat
from llm_recipes.config import ModelConfig, ObjectiveConfig
from llm_recipes.errors import UserError
from llm_recipes.launch import layout
from llm_recipes.objectives import SHIFTED, architecture_for
from llm_recipes.pipeline.sharding import split_model

# SDPA without the mask code of transformers. For unpadded causal windows there is nothing to mask beyond `is_causal`,
# yet that code looks at position ids on every forward (the host waits for the device), and under torch.compile, where
# it cannot look, builds a (B, 1, T, T) mask that turns FlashAttention off.
AttentionInterface.register("sdpa_causal", sdpa_attention_forward)


def attention(model: ModelConfig, config: PreTrainedConfig, objective: ObjectiveConfig, length: int) -> str | None:
    """The attention implementation to train with: `attn_implementation`, or "sdpa_causal" where that is the same function."""
    plain = objective.objective == "causal" and not objective.isolate_documents
    whole = min(getattr(config, key, None) or length for key in ("sliding_window", "attention_chunk_size")) >= length
    if model.attn_implementation in (None, "sdpa") and plain and whole and _compat.takes_any_attention(config):
        return "sdpa_causal"
    return model.attn_implementation


def load_model(
    model: ModelConfig,
    config: PreTrainedConfig,
    objective: ObjectiveConfig,
    length: int,
    args: TrainingArguments,
    pipeline_schedule: str = "1F1B",
) -> PreTrainedModel:
    """The model of `config` for `objective` in fp32: fresh, or with the weights of `model_name_or_path`.

    Call it after TrainingArguments exist, so that ZeRO-3 shards the model while it is built. Under a layout of our own it is
    this rank's part, cut for `pipeline_schedule`. Raises UserError when the stored weights do not cover the model.
    """
    _, auto = architecture_for(objective.objective)
    kernel = attention(model, config, objective, length)
    if args.torch_compile and kernel in (None, "sdpa") and args.process_index == 0:
        print(
            "attention  compiled as a whole, SDPA gets a mask tensor here and loses its flash kernel: launch with "
            "--dynamo_use_regional_compilation",
            flush=True,
        )
    options = {"attn_implementation": kernel, "dtype": torch.float32}

    def whole() -> PreTrainedModel:
        if model.model_name_or_path is None:
            return from_scratch(config, args.seed, auto, **options)
        loaded, info = auto.from_pretrained(
            config.name_or_path,
            config=config,
            revision=model.model_revision or "main",
            output_loading_info=True,
            **options,
        )
        if info["missing_keys"]:
            missing = ", ".join(sorted(info["missing_keys"])[:3])
            raise UserError(f"model_name_or_path: {model.model_name_or_path} has no weights for {missing}")
        return loaded

    if layout().own:
        ready = split_model(lambda: auto.from_config(copy.deepcopy(config), **options), whole, pipeline_schedule, args)
    else:
        ready = whole()
    if (
        objective.objective in SHIFTED
    ):  # GPT-2's class name tells the Trainer nothing: it would count the first label too
        ready.loss_type = "ForCausalLM"
    return ready


def from_scratch(
    config: PreTrainedConfig, seed: int, auto=AutoModelForCausalLM, dtype=torch.float32, **options
) -> PreTrainedModel:
    """Fresh fp32 weights that depend on `seed` alone.

    The library draws in another order under ZeRO-3 than elsewhere, so one seed gave two models.
    Here every strategy draws in ZeRO-3's order: once, children before parents.
    """
    set_seed(seed)
    options["dtype"] = dtype
    if is_deepspeed_zero3_enabled():
        return auto.from_config(config, **options)
    with no_init_weights():
        model = auto.from_config(config, **options)
    model.init_weights()
    return model


def trained_config(
    name: str, model: trl.ModelConfig, tokenizer, task: str = "CAUSAL_LM", added: int = 0
) -> PreTrainedConfig:
    """Configuration of a trained model `name` for post-training: `task` CAUSAL_LM, or SEQ_CLS with one score.

    `added` is the number of new ids that this recipe teaches. Raises UserError where the tokenizer cannot be this model's.
    """
    classes = MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING if task == "SEQ_CLS" else MODEL_FOR_CAUSAL_LM_MAPPING
    try:
        config = AutoConfig.from_pretrained(name, revision=model.model_revision)
    except (OSError, ValueError) as error:
        raise UserError(f"model_name_or_path: {name}: {str(error).splitlines()[0]}") from error
    if type(config) not in classes:
        raise UserError(f"model_name_or_path: {name} is a {config.model_type}: no text model for this recipe")
    if len(tokenizer) - added > config.vocab_size:
        raise UserError(
            f"model_name_or_path: the tokenizer for {name} has {len(tokenizer) - added} ids, the model {config.vocab_size}: it is "
            "another model's, or the chat template brings tokens that SFT has yet to teach"
        )
    config.pad_token_id = tokenizer.pad_token_id
    config.architectures = [classes[type(config)].__name__]
    if task == "SEQ_CLS":
        config.num_labels = 1
    return config


def check_context(said: str, config: PreTrainedConfig, longest: int) -> None:
    """Raises UserError where a prompt with its answer may be longer than the model of `config`, `said` for short, reads."""
    context = getattr(config, "max_position_embeddings", None)
    if context and longest > context:
        raise UserError(f"{said} reads up to {context} tokens; a prompt with its answer may have {longest}")


def stop_ids(model: PreTrainedModel) -> list[int]:
    """Ids at which `generate` stops."""
    ids = model.generation_config.eos_token_id
    return [ids] if isinstance(ids, int) else ids or []


def load_trained(
    name: str, model: trl.ModelConfig, config: PreTrainedConfig, tokenizer, stop_id: int | None = None
) -> PreTrainedModel:
    """The model of `trained_config`, in `dtype`, with room for the tokenizer's ids and generation that stops at `stop_id`.

    A new score head starts at zero: then no strategy draws another one, and the first loss is ln 2.
    Call it after TrainingArguments exist, so that ZeRO-3 shards the model while it is built.
    """
    scored = config.architectures[0].endswith("ForSequenceClassification")
    std, verbosity = config.initializer_range, transformers.logging.get_verbosity()
    config.initializer_range = 1e-30 if scored else std  # in the place of 0 the library puts 0.02
    transformers.logging.set_verbosity_error()  # it warns of a new score head; what else is missing is refused below
    loaded, info = getattr(transformers, config.architectures[0]).from_pretrained(
        name, config=config, revision=model.model_revision, dtype=model.dtype, output_loading_info=True,
        attn_implementation=model.attn_implementation, quantization_config=trl.get_quantization_config(model),
    )  # fmt: skip
    transformers.logging.set_verbosity(verbosity)
    loaded.config.initializer_range = std
    loaded.name_or_path = model.model_name_or_path  # an adapter names it as its base, rather than a folder in the cache
    if missing := sorted(set(info["missing_keys"]) - {"score.weight"}):
        raise UserError(f"model_name_or_path: {name} has no weights for {', '.join(missing[:3])}")
    if len(tokenizer) > config.vocab_size:
        loaded.resize_token_embeddings(len(tokenizer))
    if stop_id is not None:
        loaded.generation_config.eos_token_id = list(dict.fromkeys([stop_id, *stop_ids(loaded)]))
        loaded.generation_config.pad_token_id = tokenizer.pad_token_id
        loaded.config.eos_token_id = tokenizer.eos_token_id
    return loaded
