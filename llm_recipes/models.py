"""Models from scratch, the same under every strategy."""

import torch
from transformers import AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel, set_seed
from transformers.initialization import no_init_weights
from transformers.integrations import is_deepspeed_zero3_enabled


def from_scratch(config: PreTrainedConfig, seed: int, **options) -> PreTrainedModel:
    """The causal LM of `config` with fresh fp32 weights that depend on `seed` alone.

    The library draws in another order under ZeRO-3 than elsewhere, so one seed gave two models.
    Here every strategy draws in ZeRO-3's order: once, children before parents. Call it after
    TrainingArguments exist, so that ZeRO-3 shards the model while it is built.
    """
    set_seed(seed)
    if is_deepspeed_zero3_enabled():
        return AutoModelForCausalLM.from_config(config, dtype=torch.float32, **options)
    with no_init_weights():
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float32, **options)
    model.init_weights()
    return model
