"""Private names of other libraries, all of them, so that an upgrade breaks here and in one test."""

import atexit
import contextlib
import copy
import math

import torch
import xxhash
from datasets import Dataset
from transformers import MODEL_FOR_CAUSAL_LM_MAPPING
from transformers.distributed.checkpoint import _redistribute_state_dict
from transformers.integrations import deepspeed
from trl import DPOTrainer


def fingerprint(dataset: Dataset) -> str:
    """What `datasets` knows a dataset's content and history by."""
    return dataset._fingerprint


def methods(trainer):
    """The Trainer's methods that write a checkpoint and that return the gradient norm before the update."""
    return trainer._save_checkpoint, trainer._get_grad_norm


def set_methods(trainer, save, get_norm) -> None:
    """Puts wrappers in their place on this one trainer."""
    trainer._save_checkpoint, trainer._get_grad_norm = save, get_norm


def hook_deepspeed_norm(trainer, check) -> None:
    """Calls `check(norm)` inside DeepSpeed's step, after the whole norm is known and before the update.

    The Trainer learns the norm only after DeepSpeed has stepped. Nothing under another strategy,
    nor with fp16, where dynamic loss scaling skips such steps itself.
    """
    engine = getattr(getattr(trainer.accelerator, "deepspeed_engine_wrapped", None), "engine", None)
    if engine is None or engine.fp16_enabled():
        return
    optimizer = engine.optimizer
    name = "_get_norm_groups" if hasattr(optimizer, "_get_norm_groups") else "scaled_global_norm"
    original = getattr(optimizer, name)

    def checked(*args, **kwargs):
        norms = original(*args, **kwargs)
        parts = [float(norm) for norm in (norms if isinstance(norms, list) else [norms])]  # one a parameter group
        check(-1.0 if min(parts) < 0 else math.hypot(*parts))  # -1 stands for a norm that is not finite
        return norms

    setattr(optimizer, name, checked)


def load_best_model(trainer) -> None:
    """What the Trainer does at the end of training for load_best_model_at_end."""
    trainer._load_best_model()


def set_sync_gradients(accelerator, sync: bool) -> None:
    """Says whether the coming backward is the last of its step; DeepSpeed steps inside that one."""
    accelerator.gradient_state._set_sync_gradients(sync)


def honours_found_inf(optimizer) -> bool:
    """True when the optimizer leaves an update out, on the device, where its `found_inf` is 1: ours, and fused Adam(W).

    Others refuse the attribute or ignore it; fused SGD starts from an uninitialised momentum after a first step left out.
    """
    fused_adam = isinstance(optimizer, torch.optim.Adam) and getattr(optimizer, "_step_supports_amp_scaling", False)
    return fused_adam or getattr(optimizer, "honours_found_inf", False)


def takes_any_attention(config) -> bool:
    """True when the causal LM of `config` calls whatever is registered as its attention, SDPA included."""
    kind = MODEL_FOR_CAUSAL_LM_MAPPING[type(config)]
    return kind._supports_sdpa and kind._supports_attention_backend


def run_exit_functions() -> None:
    """What is registered with `atexit`, now."""
    atexit._run_exitfuncs()


@contextlib.contextmanager
def no_deepspeed():
    """Models are loaded whole here, whatever DeepSpeed does to others."""
    reference = deepspeed._hf_deepspeed_config_weak_ref
    deepspeed.unset_hf_deepspeed_config()
    try:
        yield
    finally:
        deepspeed._hf_deepspeed_config_weak_ref = reference


class PairsTrainer(DPOTrainer):
    """DPOTrainer on rows that are token ids already: prompt_ids, chosen_ids, rejected_ids."""

    _name = "DPO"

    def _prepare_dataset(self, dataset, processing_class, args, dataset_name):
        return dataset

    def _precompute_ref_logps(self, dataset, name, batch_size):
        # TRL keeps the log-probs under a hash that is the same for all models of a shape that ZeRO-3 has sharded, and with
        # any ld_alpha and precision: another model's would be taken for those of this reference.
        options = self.args.ld_alpha, self.accelerator.mixed_precision
        self._precompute_model_hash = f"{state_digest(self.model)} {options}"
        return super()._precompute_ref_logps(dataset, name, batch_size)


def uncompiled(model: torch.nn.Module) -> torch.nn.Module:
    """What torch.compile was given."""
    return getattr(model, "_orig_mod", model)


def view(module: torch.nn.Module) -> torch.nn.Module:
    """A copy of `module` whose children can be exchanged; until then they are the same objects."""
    copied = copy.copy(module)
    copied._modules = dict(module._modules)
    return copied


def parallel_plans(model, config) -> tuple[dict, dict, dict]:
    """{module or parameter: style} of tensor parallel, expert parallel and FSDP2 that transformers has for `model`."""
    return model._resolve_parallel_plans(config)


def plain_shards(tensors: dict, like: dict | None = None) -> dict:
    """Tensors whose shards are pieces in one part: torch writes interleaved ones, as of packed weights, over each other.

    With `like` the other way round.
    """
    return _redistribute_state_dict(tensors, like)


def take_over(trainer, save, load, norm) -> None:
    """Has `trainer` train a model that is sharded already: nothing is wrapped or moved, and its state goes through the given
    functions: `save(folder)` and `load(folder)` for weights and optimizer in a checkpoint, `norm(greatest or None)` for the
    gradient norm and its clipping.
    """
    trainer.is_distributed_loading_by_transformers = True
    trainer._sync_replicated_trainable_parameters = lambda model: None  # they are alike, by construction
    trainer._clip_grad_norm = lambda model: norm(trainer.args.max_grad_norm)
    trainer._get_grad_norm = lambda model, grad_norm=None: norm(None) if grad_norm is None else grad_norm
    trainer._save_optimizer_and_scheduler, trainer._load_optimizer_and_scheduler = save, load
    trainer._load_from_checkpoint = lambda folder, model=None: None  # with the optimizer, later


def split_inputs(trainer, split) -> None:
    """Has `split(model, inputs)` say, in training and evaluation, in which context to run a batch, and give this rank's part."""
    trainer._prepare_context_parallel_inputs = split


def _whole(tensor):
    """A context in which a parameter that ZeRO-3 has sharded is there whole."""
    if not hasattr(tensor, "ds_id"):
        return contextlib.nullcontext()
    from deepspeed.runtime.zero import GatheredParameters  # only here: it is slow to import, and not everybody has it

    return GatheredParameters([tensor])


def state_digest(model) -> str:
    """Of all weights and their names, the same whether ZeRO-3 has sharded them or not; every rank takes part."""
    digest = xxhash.xxh3_128()
    for name, tensor in sorted(model.state_dict(keep_vars=True).items()):
        with _whole(tensor):
            whole = tensor.detach().cpu().contiguous().reshape(-1)
            digest.update(f"{name} {whole.dtype}".encode())
            digest.update(whole.view(torch.uint8).numpy())
    return digest.hexdigest()


def actions(parser) -> list:
    """The arguments of an argparse parser: dest, type, choices, default, help of each."""
    return parser._actions
