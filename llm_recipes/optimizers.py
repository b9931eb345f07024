"""The optimizers that TrainingArguments' `optim` does not offer, chosen by the key `optimizer`: adam, lion, muon.

Each leaves out an update without asking the device: with the attribute `found_inf` (a float tensor, 1.0: leave it out)
weights and state stay as they are, whatever the gradients. That is the contract of torch's fused kernels.
"""

import torch
from torch import nn
from transformers import TrainingArguments
from transformers.pytorch_utils import Conv1D

from llm_recipes.errors import UserError
from llm_recipes.launch import offloads_optimizer

OPTIONS = {  # what `optim_args` may set, and the published values
    "adam": {},
    "lion": {"beta1": 0.9, "beta2": 0.99},
    "muon": {"momentum": 0.95, "ns_steps": 5},
}


def own_optimizer(name: str | None, args: TrainingArguments, model: nn.Module) -> tuple[type, dict] | None:
    """The Trainer's `optimizer_cls_and_kwargs` for `optimizer: name`; None leaves the choice to `optim`.

    The Trainer adds the parameters in two groups, with and without weight decay.
    """
    if name is None:
        return None
    if args.optim != TrainingArguments.optim:
        raise UserError(f"optimizer: {name} and optim: {args.optim.value} are two optimizers: set one of them")
    options = _options(name, args.optim_args)
    keys = ("adam_beta1", "adam_beta2", "adam_epsilon")
    beta1, beta2, eps = given = [getattr(args, key) for key in keys]
    if name == "lion":
        if given != [getattr(TrainingArguments, key) for key in keys]:
            raise UserError(f"optimizer: lion does not read {', '.join(keys)}: set optim_args: beta1=0.9,beta2=0.99")
        return Lion, {"lr": args.learning_rate, "betas": tuple(options.values())}
    adam = {"lr": args.learning_rate, "betas": (beta1, beta2), "eps": eps}
    if name == "adam":
        return torch.optim.Adam, adam | {"fused": True}
    return Muon, adam | options | {"matrices": set(hidden_matrices(model).values())}


def optimizer_problems(name: str | None, strategy: str) -> list[str]:
    """What `optimizer: name` cannot do under `strategy`, in the words of `asked_strategy`."""
    if name and offloads_optimizer():  # Accelerate would put Adam in its place
        return [f"optimizer: {name} cannot be offloaded, only the default can: use a strategy without offloading"]
    if name == "muon" and strategy not in ("single process", "DDP"):
        return [f"optimizer: muon needs whole matrices and {strategy} shards them: use accelerate_configs/ddp.yaml"]
    return []


def _options(name: str, text: str | None) -> dict[str, float]:
    """`text`, such as "momentum=0.95,ns_steps=5", over the defaults."""
    options = dict(OPTIONS[name])
    for pair in text.replace(" ", "").split(",") if text else []:
        key, _, value = pair.partition("=")
        if key not in options:
            raise UserError(f"optim_args: {name} has no option {key!r}; it takes {' and '.join(options) or 'none'}")
        kind, low, high = (int, 1, 100) if key == "ns_steps" else (float, 0, 1)
        try:
            options[key] = kind(value)
            if not low <= options[key] < high:
                raise ValueError
        except ValueError:
            raise UserError(f"optim_args: {key} is at least {low} and below {high}, not {value!r}") from None
    return options


def hidden_matrices(model: nn.Module) -> dict[str, nn.Parameter]:
    """The trained weights of the linear layers between embedding and output head, by name."""
    ends = {end.weight for end in (model.get_input_embeddings(), model.get_output_embeddings()) if end is not None}
    return {
        f"{name}.weight": module.weight
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear | Conv1D) and module.weight.requires_grad and module.weight not in ends
    }


def _unless(found: torch.Tensor | None, new: torch.Tensor, old: torch.Tensor | float) -> torch.Tensor:
    """`new`, or `old` where `found` is set; without a host sync."""
    return new if found is None else torch.where(found > 0, old, new)


class Lion(torch.optim.Optimizer):
    """Chen et al. 2023, arXiv 2302.06675, algorithm 2: the sign of an interpolated momentum, decoupled weight decay.

    It moves every weight by the learning rate, further than AdamW: the paper takes a 3 to 10 times smaller one, and a
    3 to 10 times larger weight decay.
    """

    honours_found_inf = True

    def __init__(self, params, lr: float, betas: tuple[float, float] = (0.9, 0.99), weight_decay: float = 0.0):
        super().__init__(params, {"lr": lr, "betas": betas, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure=None):
        loss = torch.enable_grad()(closure)() if closure else None
        found = getattr(self, "found_inf", None)
        for group in self.param_groups:
            beta1, beta2 = group["betas"]
            for p in (p for p in group["params"] if p.grad is not None):
                if not self.state[p]:
                    self.state[p]["momentum"] = torch.zeros_like(p)
                momentum = self.state[p]["momentum"]
                grad = _unless(found, p.grad, momentum)  # interpolating the momentum with itself does not move it
                update = momentum.lerp(grad, 1 - beta1).sign_().add_(p, alpha=group["weight_decay"])
                p.add_(_unless(found, update, 0), alpha=-group["lr"])
                momentum.lerp_(grad, 1 - beta2)
        return loss


class Muon(torch.optim.Optimizer):
    """torch's Muon for `matrices` (Jordan et al. 2024, kellerjordan.github.io/posts/muon), fused AdamW for the rest.

    An orthogonal A x B matrix has an RMS of 1 / sqrt(max(A, B)). Scaled by 0.2 sqrt(max(A, B)) it is that of AdamW's
    updates, and one learning rate and weight decay serve both (Liu et al. 2025, Moonlight, arXiv 2502.16982, 2.2).
    """

    honours_found_inf = True

    def __init__(
        self, params: list[dict], lr: float, matrices: set, momentum: float, ns_steps: int, betas: tuple, eps: float
    ):
        hidden, rest = (
            [{**group, "params": [p for p in group["params"] if (p in matrices) is inside]} for group in params]
            for inside in (True, False)
        )
        if sum(len(group["params"]) for group in hidden) != len(matrices):
            raise ValueError("the model's weights were replaced after its matrices were listed")
        self.muon = torch.optim.Muon(hidden, lr, momentum=momentum, ns_steps=ns_steps, adjust_lr_fn="match_rms_adamw")
        self.adamw = torch.optim.AdamW(rest, lr, betas, eps, fused=True)
        super().__init__(self.muon.param_groups + self.adamw.param_groups, {"lr": lr})

    @torch.no_grad()
    def step(self, closure=None):
        loss = torch.enable_grad()(closure)() if closure else None
        found, count = getattr(self, "found_inf", None), len(self.param_groups) // 2
        self.adamw.param_groups, self.adamw.found_inf = self.param_groups[count:], found
        self.muon.state = self.adamw.state = self.state  # load_state_dict has replaced state and groups
        self.adamw.step()
        for group in self.param_groups[:count]:  # torch's Muon knows no found_inf: one matrix at a time, and put back
            for p in (p for p in group["params"] if p.grad is not None):
                before = p.clone()
                p.grad.copy_(_unless(found, p.grad, self.state[p].get("momentum_buffer", 0)))
                self.muon.param_groups = [{**group, "params": [p]}]
                self.muon.step()
                p.copy_(_unless(found, p, before))
        return loss
