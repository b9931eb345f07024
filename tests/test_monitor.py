"""Every figure against a loop by hand; nothing held between logging steps; no wait for the device before the log."""

import math

import pytest
import torch
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSeq2SeqLM,
    Trainer,
    TrainerCallback,
    TrainingArguments,
)

from llm_recipes.metrics import meta_model
from llm_recipes.monitor import Monitor, monitor_problems
from tests.running import TINY_MODEL

KINDS = ["activations", "gradients", "updates"]
PARTS = ["embed_tokens", "layers.0", "layers.1", "norm", "lm_head"]
LR, CLIP = 0.5, 0.2


def tiny_llama():
    torch.manual_seed(0)
    keys = dict(TINY_MODEL)
    return AutoModelForCausalLM.from_config(AutoConfig.for_model(keys.pop("model_type"), vocab_size=50, **keys))


def train(folder, model, monitor, ids, extra=(), **keys):
    args = TrainingArguments(
        folder, use_cpu=True, optim="sgd", learning_rate=LR, lr_scheduler_type="constant", max_grad_norm=CLIP,
        per_device_train_batch_size=2, gradient_accumulation_steps=2, max_steps=4, logging_steps=2, save_strategy="no",
        logging_first_step=True, train_sampling_strategy="sequential", disable_tqdm=True, **keys,
    )  # fmt: skip
    trainer = Trainer(model, args, train_dataset=[{"input_ids": row, "labels": row} for row in ids], callbacks=[*extra])
    trainer.callback_handler.callbacks.insert(0, monitor)
    trainer.train()
    return trainer


def part_of(name):
    return ".".join(name.split(".")[1:3]) if ".layers." in name else name.removesuffix(".weight").split(".")[-1]


def by_hand(model, ids):
    """{step: figures} of plain SGD on whole batches of four rows."""
    model.train()
    seen, inputs = {}, {}
    for name, module in [("layers.0", model.model.layers[1]), ("layers.1", model.model.norm)]:
        module.register_forward_pre_hook(lambda m, args, kwargs, n=name: inputs.update({n: args[0]}), with_kwargs=True)
    for step, rows in enumerate(ids.split(4), 1):
        model.zero_grad()
        model(input_ids=rows, labels=rows).loss.backward()
        norm = lambda tensors: math.sqrt(sum(t.double().square().sum().item() for t in tensors))  # noqa: E731
        total = norm(p.grad for p in model.parameters())
        figures = {f"activation_rms/{n}": hidden.double().square().mean().sqrt().item() for n, hidden in inputs.items()}
        for part in PARTS:
            weights = [p for n, p in model.named_parameters() if part_of(n) == part]
            figures[f"grad_norm/{part}"] = norm(p.grad for p in weights)
            change = LR * min(1, CLIP / total) * figures[f"grad_norm/{part}"]
            figures[f"update_ratio/{part}"] = change / norm(p.detach() for p in weights)
        assert total > CLIP
        seen[step] = figures
        with torch.no_grad():
            for p in model.parameters():
                p -= LR * CLIP / total * p.grad
    return seen


class Held(TrainerCallback):
    """What the monitor holds while a step is under way, and after it."""

    def __init__(self, monitor):
        self.monitor, self.during, self.after = monitor, [], []

    def held(self):
        hooks = sum(len(m._forward_hooks) for m in self.monitor.layers.values())
        return hooks, len(self.monitor.before), len(self.monitor.figures)

    def on_substep_end(self, args, state, control, **kwargs):
        self.during.append(self.held())

    def on_step_end(self, args, state, control, **kwargs):
        self.after.append(self.held())


@pytest.mark.parametrize("checkpointing", [False, True])
def test_figures_are_those_by_hand_and_nothing_is_held_between(tmp_path, checkpointing):
    ids = torch.randint(0, 50, (16, 12), generator=torch.Generator().manual_seed(1))
    expected = by_hand(tiny_llama(), ids)
    monitor = Monitor(model := tiny_llama(), KINDS)
    held = Held(monitor)
    trainer = train(tmp_path, model, monitor, ids, [held], activation_checkpointing=checkpointing)
    rows = {row["step"]: row for row in trainer.state.log_history if "loss" in row}
    assert set(rows) == {1, 2, 4}
    for step, row in rows.items():
        figures = {key: value for key, value in row.items() if "/" in key}
        assert figures == pytest.approx(expected[step], rel=1e-4)
    assert held.during == [(2, 0, 0), (2, 0, 0), (0, 0, 0), (2, 0, 0)]  # steps 1, 2 and 4 are logged
    assert held.after == [(0, 0, 12), (0, 0, 12), (0, 0, 0), (0, 0, 12)]
    assert held.held() == (0, 0, 0)


def test_reporters_see_the_figures_and_only_what_was_asked(tmp_path):
    seen = []

    class Reporter(TrainerCallback):
        def on_log(self, args, state, control, logs=None, **kwargs):
            seen.append([key for key in logs if "/" in key])

    model = tiny_llama()
    train(tmp_path, model, Monitor(model, ["updates"]), torch.randint(0, 50, (16, 12)), [Reporter()])
    assert seen == [[f"update_ratio/{part}" for part in PARTS]] * 3 + [[]]  # the last is the summary of the run


def test_the_device_is_not_waited_for_before_the_log():
    """Values of meta tensors cannot be read: any `.item()`, `bool` or copy to the host would raise."""
    model = meta_model(tiny_llama().config)
    monitor = Monitor(model, KINDS)
    args, state = TrainingArguments("out", use_cpu=True), type("State", (), {"global_step": 1, "logging_steps": 2})
    monitor.on_step_begin(args, state, None)
    ids = torch.zeros(2, 8, dtype=torch.long, device="meta")
    model(input_ids=ids, labels=ids).loss.backward()
    monitor.on_pre_optimizer_step(args, state, None)
    torch.optim.SGD(model.parameters(), 0.1).step()
    monitor.on_optimizer_step(args, state, None)
    assert len(monitor.figures) == 12 and all(figure.is_meta for figure in monitor.figures.values())


def test_the_load_of_experts(tmp_path):
    """Two layers of four experts, over both micro-batches of a logging step; in evaluation and other steps nothing is counted."""
    torch.manual_seed(0)
    keys = {"hidden_size": 16, "intermediate_size": 8, "num_hidden_layers": 2, "num_attention_heads": 2, "num_local_experts": 4,
            "num_key_value_heads": 1, "vocab_size": 50, "output_router_logits": True}  # fmt: skip
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model("mixtral", **keys))
    ids = torch.randint(0, 50, (16, 12))
    with torch.no_grad():
        routed = model(input_ids=ids[:4], labels=ids[:4]).router_logits
    expected = {}
    for layer, logits in enumerate(routed):
        counts = [0] * 4
        for token in logits.tolist():
            for expert in sorted(range(4), key=lambda e: -token[e])[:2]:
                counts[expert] += 1
        expected[f"expert_load_max/{layer}"] = max(counts) / (sum(counts) / 4)
    trainer = train(tmp_path, model, Monitor(model, []), ids)
    logged = [row for row in trainer.state.log_history if "loss" in row]
    assert [row["step"] for row in logged] == [1, 2, 4]
    assert all(logged[0][key] == pytest.approx(value) and value > 1 for key, value in expected.items())
    assert all(expected.keys() <= row.keys() for row in logged) and not model._forward_hooks


@pytest.mark.parametrize(
    ("keys", "auto", "layers", "parts"),
    [
        ({"model_type": "gpt2", "n_embd": 8, "n_layer": 2, "n_head": 2}, AutoModelForCausalLM, ["h.0", "h.1"], ["wte", "wpe", "ln_f"]),
        ({"model_type": "mixtral", "hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2,
          "num_key_value_heads": 1, "tie_word_embeddings": True}, AutoModelForCausalLM, ["layers.0"], ["embed_tokens", "norm"]),
        ({"model_type": "t5", "d_model": 8, "d_ff": 8, "num_layers": 1, "num_heads": 2, "d_kv": 4}, AutoModelForSeq2SeqLM,
         ["encoder.block.0", "decoder.block.0"], ["shared", "encoder", "decoder"]),
    ],
)  # fmt: skip
def test_names(keys, auto, layers, parts):
    keys = dict(keys)
    model = auto.from_config(AutoConfig.for_model(keys.pop("model_type"), vocab_size=50, **keys))
    monitor = Monitor(model, KINDS)
    assert list(monitor.layers) == layers and set(monitor.weights) == {*layers, *parts}
    assert sum(w.numel() for group in monitor.weights.values() for w in group) == model.num_parameters()


def test_what_is_refused(monkeypatch):
    plain = TrainingArguments("out", use_cpu=True)
    for strategy in ("DeepSpeed ZeRO-2", "DeepSpeed ZeRO-3", "FSDP2"):
        assert len(monitor_problems(["updates"], strategy, plain)) == 1
        assert monitor_problems([], strategy, plain) == []
    assert monitor_problems(KINDS, "DDP", plain) == monitor_problems(KINDS, "single process", plain) == []
    compiled = TrainingArguments("out", use_cpu=True, torch_compile=True, logging_strategy="epoch")
    assert len(monitor_problems(KINDS, "DDP", compiled)) == 2
    assert monitor_problems(["updates"], "DDP", TrainingArguments("out", use_cpu=True, torch_compile=True)) == []
    monkeypatch.setenv("ACCELERATE_DYNAMO_BACKEND", "INDUCTOR")
    assert "skips hooks" in monitor_problems(KINDS, "DDP", plain)[0]


def test_compiled_code_does_skip_hooks_added_later():
    """The reason for the refusal; when this fails, lift it."""
    model, calls = torch.nn.Sequential(torch.nn.Linear(2, 2)), []
    compiled = torch.compile(model, backend="eager")
    compiled(torch.ones(1, 2))
    model[0].register_forward_hook(lambda *_: calls.append(1))
    compiled(torch.ones(1, 2))
    assert calls == []
