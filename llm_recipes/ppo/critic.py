"""The critic: the value of the state before each token, from a model with an engine of its own or from the policy's backbone."""

import dataclasses
import types
from pathlib import Path

import torch
import trl
from peft import PeftModel
from safetensors.torch import load_file, save_file
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)
from transformers import AutoConfig, AutoTokenizer, PreTrainedConfig, PreTrainedModel, Trainer

from llm_recipes.adapters import whole_model
from llm_recipes.errors import Diverged, UserError
from llm_recipes.models import check_context, trained_config
from llm_recipes.ppo.config import PPOConfig

WHOLE = StateDictOptions(full_state_dict=True, cpu_offload=True)
TRAINED = StateDictOptions(full_state_dict=True, cpu_offload=True, ignore_frozen_params=True)
PART = StateDictOptions(full_state_dict=True, cpu_offload=True, strict=False)


def _token_values(self, input_ids: torch.Tensor, places: torch.Tensor) -> torch.Tensor:
    """Values `(n,)` at the `n` places of `places`, `(B, L)`, in the place of a sequence classifier's forward."""
    hidden = self.base_model(input_ids=input_ids, use_cache=False).last_hidden_state
    return self.score(hidden[places])[:, 0].float()


def critic_config(
    critic: str | None, policy: str, model: trl.ModelConfig, args: PPOConfig, tokenizer, longest: int
) -> tuple[str, trl.ModelConfig, PreTrainedConfig] | None:
    """What `load_trained` makes a separate critic from: `critic`, adapters too, or the `policy`; None with a shared one.

    Raises UserError for a critic that cannot value what the policy says.
    """
    key = "critic_model_name_or_path"
    if args.critic == "shared":
        if critic:
            raise UserError(f"{key}: a shared critic is a layer on the policy: set critic: separate, or leave it out")
        return None
    if not critic:
        return policy, model, trained_config(policy, model, tokenizer, "SEQ_CLS")
    name = whole_model(critic, key=key)
    model = dataclasses.replace(model, model_name_or_path=critic, model_revision="main")
    try:
        config, theirs = AutoConfig.from_pretrained(name), AutoTokenizer.from_pretrained(name)
    except (OSError, ValueError) as error:
        raise UserError(f"{key}: {critic}: {str(error).splitlines()[0]}") from error
    if theirs.get_vocab() != tokenizer.get_vocab():
        raise UserError(f"{key}: {critic} has another vocabulary than the policy, whose ids it is to read")
    if any("ForSequenceClassification" in kind for kind in config.architectures or []) and config.num_labels != 1:
        raise UserError(f"{key}: {critic} has {config.num_labels} labels, and a value is one number")
    check_context(f"{key}: {critic}", config, longest)
    return name, model, trained_config(name, model, tokenizer, "SEQ_CLS")


class SeparateCritic:
    """A sequence classifier with one label. Every strategy that trains the policy trains it too.

    Wrappers (DDP, FSDP2, DeepSpeed) act around `forward`, so that is what gives the values. An adapter's layers are in the
    model itself, and its PeftModel is needed for saving alone.
    """

    def __init__(self, model: PreTrainedModel | PeftModel):
        self.saved, self.adapted = model, isinstance(model, PeftModel)
        self.model = model.get_base_model() if self.adapted else model
        self.model.forward = types.MethodType(_token_values, self.model)

    def prepare(self, trainer: Trainer) -> None:
        """Builds engine and optimizer. The policy must have its own: accelerate takes the first for the one to clip."""
        self.accelerator, self.args = trainer.accelerator, trainer.args
        optimizer = _optimizer(self.model, trainer)
        policy = getattr(self.accelerator, "deepspeed_engine_wrapped", None)
        if policy is not None:
            self.accelerator.deepspeed_engine_wrapped = None
        self.engine, self.optimizer = self.accelerator.prepare(self.model, optimizer)
        self.deepspeed = None
        if policy is not None:
            self.deepspeed = self.accelerator.deepspeed_engine_wrapped
            self.accelerator.deepspeed_engine_wrapped = policy

    def values(self, input_ids: torch.Tensor, places: torch.Tensor) -> torch.Tensor:
        with self.accelerator.autocast():
            return self.engine(input_ids=input_ids, places=places)

    def step(self, loss: torch.Tensor, last: bool, learning_rate: float) -> float | None:
        """Adds the gradient of one micro-batch; with the `last` one of a step, updates. Returns the gradient norm then."""
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate
        if self.deepspeed is not None:
            self.deepspeed.backward(loss, sync_gradients=last, scale_wrt_gas=False)
            return checked(self.deepspeed.get_global_grad_norm()) if last else None
        if not last:
            with self.accelerator.no_sync(self.engine):
                loss.backward()
            return None
        loss.backward()
        return _update(self.model, self.optimizer, self.args.max_grad_norm)

    def save(self, folder: Path) -> None:
        """A model that `AutoModelForSequenceClassification` loads, or an adapter, and the optimizer; every rank takes part."""
        weights = self.accelerator.get_state_dict(self.engine)
        state = {}
        if self.deepspeed is not None:
            self.engine.save_checkpoint(folder / "deepspeed")
        else:
            state["optimizer"] = get_optimizer_state_dict(self.model, self.optimizer.optimizer, options=WHOLE)
            if self.adapted:  # peft stores its weights under other names
                state["adapter"] = get_model_state_dict(self.model, options=TRAINED)
        if self.args.process_index == 0:
            if self.adapted:
                self.saved.save_pretrained(  # in critic/ itself the Trainer would load it onto the policy
                    folder / "adapter",
                    state_dict={f"base_model.model.{name}": value for name, value in weights.items()},
                )
            else:
                self.saved.save_pretrained(folder, state_dict=weights, save_original_format=False)  # names to load by
            torch.save(state, folder / "optimizer.pt")

    def load(self, folder: Path) -> None:
        if self.deepspeed is not None:
            self.engine.load_checkpoint(folder / "deepspeed", load_module_strict=not self.adapted)
            return
        state = torch.load(folder / "optimizer.pt", weights_only=True)
        weights = state.get("adapter")
        if weights is None:
            weights = {
                name: value for path in folder.glob("model*.safetensors") for name, value in load_file(path).items()
            }
        found = set_model_state_dict(self.model, weights, options=PART if self.adapted else WHOLE)
        if found.unexpected_keys:
            raise UserError(f"{folder} holds another critic: it has {found.unexpected_keys[0]}")
        set_optimizer_state_dict(self.model, self.optimizer.optimizer, state["optimizer"], options=WHOLE)


class SharedCritic:
    """One linear layer on the policy's last hidden states, which its loss moves too.

    The layer stays outside the policy, whole on every process, so that no strategy, save or push has to know of it.
    """

    def __init__(self, hidden_size: int, device: torch.device):
        self.head = torch.nn.Linear(hidden_size, 1, device=device)
        torch.nn.init.zeros_(self.head.weight)
        torch.nn.init.zeros_(self.head.bias)

    def prepare(self, trainer: Trainer) -> None:
        self.accelerator, self.args = trainer.accelerator, trainer.args
        self.optimizer = _optimizer(self.head, trainer)

    def values(self, hidden: torch.Tensor) -> torch.Tensor:
        """Values `(n,)` of hidden states `(n, H)`."""
        return self.head(hidden.float())[:, 0]

    def step(self, learning_rate: float) -> float:
        """Updates the layer with the gradients that the policy's backward left in it."""
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate
        for parameter in self.head.parameters():
            parameter.grad = self.accelerator.reduce(parameter.grad, "mean")
        return _update(self.head, self.optimizer, self.args.max_grad_norm)

    def save(self, folder: Path) -> None:
        if self.args.process_index == 0:
            save_file(self.head.state_dict(), folder / "value_head.safetensors")
            torch.save(self.optimizer.state_dict(), folder / "optimizer.pt")

    def load(self, folder: Path) -> None:
        self.head.load_state_dict(load_file(folder / "value_head.safetensors"))
        self.optimizer.load_state_dict(torch.load(folder / "optimizer.pt", weights_only=True))


def _optimizer(model: torch.nn.Module, trainer: Trainer) -> torch.optim.Optimizer:
    """The Trainer's kind, with its weight decay: none on norms and biases."""
    kind, options = Trainer.get_optimizer_cls_and_kwargs(trainer.args)
    decayed, groups = set(trainer.get_decay_parameter_names(model)), {True: [], False: []}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            groups[name in decayed].append(parameter)
    decay = trainer.args.weight_decay
    return kind([{"params": group, "weight_decay": decay * yes} for yes, group in groups.items() if group], **options)


def _update(model: torch.nn.Module, optimizer, max_grad_norm: float) -> float:
    """Clips, steps, and returns the gradient norm before the clipping; FSDP2 has it in parts."""
    norm = torch.nn.utils.clip_grad_norm_(model.parameters(), max_grad_norm or float("inf"))
    norm = checked((norm.full_tensor() if hasattr(norm, "full_tensor") else norm).item())
    optimizer.step()
    optimizer.zero_grad()
    return norm


def checked(norm: float) -> float:
    """The critic's gradient norm. Raises Diverged before the update when it is not finite; DeepSpeed says -1 for that."""
    if not 0 <= norm < float("inf"):
        raise Diverged(
            "the gradient norm of the critic is not finite; stopped before its update. Look at critic/loss and the scores"
        )
    return norm
