"""Figures of each layer at logging steps: size of its output, of its gradient and of its update."""

import os
import re
from functools import partial

import torch
from transformers import PreTrainedModel, TrainerCallback, TrainingArguments

PART = re.compile(r"(?:[^.\d][^.]*\.)+\d+(?=\.|$)|[^.]+")  # a name up to its first number, else its first word


def compiles(args: TrainingArguments) -> bool:
    """True where the recipe or the launcher asks for torch.compile."""
    return args.torch_compile or os.environ.get("ACCELERATE_DYNAMO_BACKEND", "no").lower() != "no"


def monitor_problems(kinds: list[str], strategy: str, args: TrainingArguments) -> list[str]:
    """Why `kinds` cannot be monitored in this run; `strategy` as from `launch.asked_strategy`."""
    checks = {
        f"{strategy} leaves no process with whole weights and gradients": strategy not in ("single process", "DDP"),
        f"logging_strategy: {args.logging_strategy.value} has no logging steps": args.logging_strategy != "steps",
        "activations: compiled code skips hooks added after its first call": "activations" in kinds and compiles(args),
    }
    return [f"monitor: {problem}" for problem, found in checks.items() if kinds and found]


class Monitor(TrainerCallback):
    """Adds to the log, for each layer, and for each part outside the layers such as `embed_tokens`:

    `activation_rms/<layer>` of the output, over this process's micro-batches; layers only.
    `grad_norm/<part>` before clipping; their squares add up to that of `grad_norm`.
    `update_ratio/<part>`, norm of the step's change of the weights over their norm before it.
    `expert_load_max/<layer>`, always where the model puts out `router_logits`: tokens of the busiest expert over the mean of
    all, 1 when they are even, over all processes.
    At other steps nothing is computed, hooked or copied, and the device is not waited for before the log.
    """

    def __init__(self, model: PreTrainedModel, kinds: list[str]):
        self.kinds, self.hooks, self.before, self.figures, self.weights = [*kinds], [], {}, {}, {}
        self.model, self.config, self.routed = model, model.config, []
        if getattr(model.config, "output_router_logits", False):
            self.kinds.append("experts")
        own = f"{model.base_model_prefix}."
        modules = {name.removeprefix(own): module for name, module in model.named_modules()}
        self.layers = {name: module for name, module in modules.items() if "." in name and PART.fullmatch(name)}
        for name, weight in model.named_parameters():
            self.weights.setdefault(PART.match(name.removeprefix(own)).group(), []).append(weight)

    def on_step_begin(self, args, state, control, **kwargs):
        logged = (step := state.global_step + 1) % state.logging_steps == 0 or (step == 1 and args.logging_first_step)
        self.active, self.outputs, self.figures = self.kinds if logged else [], {}, {}
        if "experts" in self.active:
            self.hooks, self.routed = [self.model.register_forward_hook(self._count)], []
        if "activations" in self.active:
            self.hooks += [m.register_forward_hook(partial(self._keep, name)) for name, m in self.layers.items()]

    def _keep(self, name, module, inputs, output):
        hidden = (output[0] if isinstance(output, tuple) else output).detach()
        self.outputs.setdefault(name, []).append((_norm([hidden]), hidden.numel()))

    def _count(self, module, inputs, output):
        chosen = torch.stack(output.router_logits).detach().topk(self.config.num_experts_per_tok).indices.flatten(1)
        layers, experts = len(chosen), output.router_logits[0].shape[-1]
        counts = torch.zeros(layers, experts, device=chosen.device)
        self.routed.append(counts.scatter_add_(1, chosen, torch.ones_like(chosen, dtype=counts.dtype)))

    def on_pre_optimizer_step(self, args, state, control, **kwargs):
        while self.hooks:
            self.hooks.pop().remove()
        if self.routed:
            counts = sum(self.routed)
            if args.world_size > 1:
                torch.distributed.all_reduce(counts)
            loads = counts.max(1).values / counts.mean(1)
            self.figures |= {f"expert_load_max/{layer}": load for layer, load in enumerate(loads)}
            self.routed = []
        for name, outputs in self.outputs.items():
            self.figures[f"activation_rms/{name}"] = _norm(n for n, _ in outputs) / sum(s for _, s in outputs) ** 0.5
        for name, weights in self.weights.items():
            if "gradients" in self.active and (gradients := [w.grad for w in weights if w.grad is not None]):
                self.figures[f"grad_norm/{name}"] = _norm(gradients)
            if "updates" in self.active:
                self.before[name] = [w.detach().clone() for w in weights]

    def on_optimizer_step(self, args, state, control, **kwargs):
        for name, before in self.before.items():
            change = _norm(w.detach() - old for w, old in zip(self.weights[name], before, strict=True))
            self.figures[f"update_ratio/{name}"] = change / _norm(before)
        self.before = {}

    def on_log(self, args, state, control, logs=None, **kwargs):
        if self.figures and "loss" in logs:
            values = torch.stack([*self.figures.values()]).tolist()  # the one wait for the device
            figures, self.figures = dict(zip(self.figures, values, strict=True)), {}
            norms = {key: value for key, value in figures.items() if key.startswith("grad_norm/")}
            if clipped := sum(value**2 for value in norms.values()) ** 0.5:  # clipping scaled all gradients alike
                figures |= {key: value * logs["grad_norm"] / clipped for key, value in norms.items()}
            logs.update(figures)  # for the reporters
            state.log_history[-1].update(figures)  # the Trainer keeps a copy made before the callbacks


def _norm(tensors) -> torch.Tensor:
    return torch.linalg.vector_norm(torch.stack([torch.linalg.vector_norm(t, dtype=torch.float32) for t in tensors]))
