"""Private names of other libraries, all of them, so that an upgrade breaks here and in one test."""

from datasets import Dataset


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
    """Calls `check(norm)` inside DeepSpeed's step, after the norm is known and before the update.

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
        for norm in norms if isinstance(norms, list) else [norms]:
            check(norm)
        return norms

    setattr(optimizer, name, checked)


def load_best_model(trainer) -> None:
    """What the Trainer does at the end of training for load_best_model_at_end."""
    trainer._load_best_model()
