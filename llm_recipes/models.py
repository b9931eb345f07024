"""Models to train: from scratch, the same under every strategy, or continued, and then whole."""

import torch
from transformers import AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel, set_seed
from transformers.initialization import no_init_weights
from transformers.integrations import is_deepspeed_zero3_enabled

from llm_recipes.config import ModelConfig
from llm_recipes.errors import UserError


def load_model(model: ModelConfig, config: PreTrainedConfig, seed: int) -> PreTrainedModel:
    """The causal LM of `config` in fp32: fresh, or with the weights of `model_name_or_path`.

    Call it after TrainingArguments exist, so that ZeRO-3 shards the model while it is built.
    Raises UserError when the stored weights do not cover the model.
    """
    options = {"attn_implementation": model.attn_implementation}
    if model.model_name_or_path is None:
        return from_scratch(config, seed, **options)
    options |= {
        "config": config,
        "revision": model.model_revision or "main",
        "dtype": torch.float32,
        "output_loading_info": True,
    }
    loaded, info = AutoModelForCausalLM.from_pretrained(config.name_or_path, **options)
    if info["missing_keys"]:
        missing = ", ".join(sorted(info["missing_keys"])[:3])
        raise UserError(f"model_name_or_path: {model.model_name_or_path} has no weights for {missing}")
    return loaded


def from_scratch(config: PreTrainedConfig, seed: int, **options) -> PreTrainedModel:
    """Fresh fp32 weights that depend on `seed` alone.

    The library draws in another order under ZeRO-3 than elsewhere, so one seed gave two models.
    Here every strategy draws in ZeRO-3's order: once, children before parents.
    """
    set_seed(seed)
    if is_deepspeed_zero3_enabled():
        return AutoModelForCausalLM.from_config(config, dtype=torch.float32, **options)
    with no_init_weights():
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float32, **options)
    model.init_weights()
    return model
