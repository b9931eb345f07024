"""Where Accelerate's FSDP2 is not what the recipes promise."""

import torch
from accelerate import Accelerator
from torch.distributed.fsdp import MixedPrecisionPolicy


def keep_precision(accelerator: Accelerator) -> None:
    """Under FSDP2 in bf16, has gradients added up in fp32 and the loss left as it is: Accelerate makes all of them bf16.

    Call it before the model is prepared.
    """
    plugin = getattr(accelerator.state, "fsdp_plugin", None)
    if plugin is not None and (policy := plugin.mixed_precision_policy) is not None:
        plugin.mixed_precision_policy = MixedPrecisionPolicy(policy.param_dtype, torch.float32)
