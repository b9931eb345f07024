"""Every optimizer against its published update rule, every schedule against its closed form."""

import math

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, Trainer, TrainerCallback, TrainingArguments, set_seed

from llm_recipes.config import RunConfig
from llm_recipes.errors import UserError
from llm_recipes.optimizers import hidden_matrices, optimizer_problems, own_optimizer
from llm_recipes.preflight import run_problems

LR, DECAY = 1e-2, 0.1
ATTENTION = [f"self_attn.{name}_proj.weight" for name in "qkvo"]
LLAMA = [*ATTENTION, "mlp.gate_proj.weight", "mlp.up_proj.weight", "mlp.down_proj.weight"]


def tiny_model(seed=0, model_type="llama", **sizes):
    """Two layers, with biases in the attention so that something but norms goes without weight decay."""
    if model_type != "gpt2":
        sizes = {
            "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2,
            "num_key_value_heads": 2,
        } | sizes  # fmt: skip
    set_seed(seed)
    return AutoModelForCausalLM.from_config(AutoConfig.for_model(model_type, vocab_size=50, **sizes))


class Watch(TrainerCallback):
    """The gradients and the learning rate of every update, as the optimizer gets them, and what is logged of it."""

    def __init__(self):
        self.grads, self.rates, self.logged = [], [], []

    def on_pre_optimizer_step(self, args, state, control, model, optimizer, **kwargs):
        self.grads.append({name: p.grad.clone() for name, p in model.named_parameters()})
        self.rates.append(optimizer.param_groups[0]["lr"])

    def on_log(self, args, state, control, logs, **kwargs):
        self.logged += [logs["learning_rate"]] if "learning_rate" in logs else []


def make_trainer(folder, optimizer=None, model=None, **options):
    """(Trainer on 24 rows of 12 random ids, four a step, its Watch); the order is that of seed 42."""
    options = {
        "max_steps": 3, "per_device_train_batch_size": 4, "learning_rate": LR, "weight_decay": DECAY, "use_cpu": True,
        "max_grad_norm": 0.0, "lr_scheduler_type": "constant", "report_to": "none", "save_strategy": "no",
        "logging_steps": 1, "disable_tqdm": True, "dataloader_pin_memory": False,
    } | options  # fmt: skip
    model = model or tiny_model(attention_bias=True)
    args = TrainingArguments(str(folder), **options)
    ids = torch.randint(50, (24, 12), generator=torch.Generator().manual_seed(1))
    rows, watch = [{"input_ids": row, "labels": row} for row in ids], Watch()
    own = own_optimizer(optimizer, args, model)
    return Trainer(model, args, train_dataset=rows, callbacks=[watch], optimizer_cls_and_kwargs=own), watch


def weights(model):
    return {name: p.detach().clone() for name, p in model.named_parameters()}


def same(first, second):
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


# The published rules: `rule(t, lr, w, g, state, decay)` changes the weights `w` at step t = 1, 2, ...; decay is 0 or DECAY.


def sgd(t, lr, w, g, state, decay):
    """torch's momentum: b = 0.9 b + g, L2 decay in g."""
    g = g + decay * w
    state["b"] = g if t == 1 else 0.9 * state["b"] + g
    w -= lr * state["b"]


def adam(t, lr, w, g, state, decay, beta1=0.9, beta2=0.999, eps=1e-8):
    """Kingma and Ba 2015, algorithm 1; L2 decay in g."""
    g = g + decay * w
    state["m"] = beta1 * state.get("m", 0) + (1 - beta1) * g
    state["v"] = beta2 * state.get("v", 0) + (1 - beta2) * g * g
    w -= lr * (state["m"] / (1 - beta1**t)) / ((state["v"] / (1 - beta2**t)).sqrt() + eps)


def adamw(t, lr, w, g, state, decay):
    """Loshchilov and Hutter 2019, algorithm 2: the decay is outside."""
    w *= 1 - lr * decay
    adam(t, lr, w, g, state, 0)


def adafactor(t, lr, w, g, state, decay):
    """Shazeer and Stern 2018, algorithms 4 and 5 with a given learning rate: no parameter scale, no momentum, d = 1."""
    beta2, square = 1 - t**-0.8, g * g + 1e-30
    if g.ndim == 2:
        state["r"] = beta2 * state.get("r", 0) + (1 - beta2) * square.sum(1)
        state["c"] = beta2 * state.get("c", 0) + (1 - beta2) * square.sum(0)
        v = state["r"].outer(state["c"]) / state["r"].sum()
    else:
        state["v"] = v = beta2 * state.get("v", 0) + (1 - beta2) * square
    u = g / v.sqrt()
    w -= lr * u / max(1.0, u.square().mean().sqrt().item()) + lr * decay * w


def lion(t, lr, w, g, state, decay, beta1=0.9, beta2=0.99):
    """Chen et al. 2023, algorithm 2."""
    m = state.get("m", torch.zeros_like(w))
    c = beta1 * m + (1 - beta1) * g
    w -= lr * (c.sign() + decay * w)
    state["m"] = beta2 * m + (1 - beta2) * g


def orthogonal(x, steps=5):
    """Newton-Schulz in bf16, the quintic of Jordan et al. 2024: x <- a x + (b x x' + c (x x')^2) x."""
    a, b, c = 3.4445, -4.7750, 2.0315
    wide = x.bfloat16() if x.shape[0] <= x.shape[1] else x.bfloat16().T
    wide = wide / wide.norm()
    for _ in range(steps):
        gram = wide @ wide.T
        wide = torch.addmm(wide, torch.addmm(gram, gram, gram, beta=b, alpha=c), wide, beta=a)  # rounds once, as torch
    return (wide if x.shape[0] <= x.shape[1] else wide.T).float()


def muon(t, lr, w, g, state, decay, momentum=0.95, steps=5):
    """Liu et al. 2025, section 2.2, with Nesterov momentum. The averages round as torch's do: five Newton-Schulz steps
    raise a difference in the last bit up to 3.4**5 times."""
    state["m"] = torch.lerp(state.get("m", torch.zeros_like(g)), g, 1 - momentum)
    update = orthogonal(torch.lerp(g, state["m"], momentum), steps)
    w *= 1 - lr * decay
    w -= lr * 0.2 * math.sqrt(max(w.shape)) * update


RULES = {
    "sgd": (sgd, {"optim": "sgd", "optim_args": "momentum=0.9"}),
    "adamw": (adamw, {"optim": "adamw_torch_fused"}),
    "adafactor": (adafactor, {"optim": "adafactor"}),
    "adam": (adam, {"optimizer": "adam"}),
    "adam betas": (lambda *a: adam(*a, 0.8, 0.95, 1e-3), {"optimizer": "adam", "adam_beta1": 0.8, "adam_beta2": 0.95, "adam_epsilon": 1e-3}),
    "lion": (lion, {"optimizer": "lion"}),
    "lion betas": (lambda *a: lion(*a, 0.5, 0.8), {"optimizer": "lion", "optim_args": "beta1=0.5, beta2=0.8"}),
    "muon": (muon, {"optimizer": "muon"}),
    "muon options": (lambda *a: muon(*a, 0.8, 3), {"optimizer": "muon", "optim_args": "momentum=0.8,ns_steps=3"}),
}  # fmt: skip


@pytest.mark.parametrize("name", RULES)
def test_three_steps_of_the_trainer_are_the_published_rule(tmp_path, name):
    """To 1e-6 in every weight, where a step moves about 1e-2. The rule is fed the gradients that the optimizer got, so
    a wrong update shows at once; weight decay is on whatever is neither norm nor bias."""
    rule, options = RULES[name]
    trainer, watch = make_trainer(tmp_path, lr_scheduler_type="linear", **options)
    expected, state = weights(trainer.model), {}
    matrices = [f"model.layers.{layer}.{name}" for layer in (0, 1) for name in LLAMA]
    trainer.train()
    for t, (lr, grads) in enumerate(zip((LR, LR * 2 / 3, LR / 3), watch.grads, strict=True), start=1):
        for key, w in expected.items():
            decay = 0 if "norm" in key or key.endswith("bias") else DECAY
            one = adamw if name.startswith("muon") and key not in matrices else rule
            one(t, lr, w, grads[key], state.setdefault(key, {}), decay)
    for key, w in weights(trainer.model).items():
        torch.testing.assert_close(w, expected[key], rtol=0, atol=1e-6, msg=lambda text, key=key: f"{key}: {text}")


def test_newton_schulz_orthogonalises():
    """Whatever the singular values, they end in [0.5, 1.5] along the same singular vectors."""
    x = torch.randn(32, 64, generator=torch.Generator().manual_seed(0))
    for matrix in (x, x.T):
        u, s, vh = torch.linalg.svd(matrix, full_matrices=False)
        inside = u.T @ orthogonal(matrix) @ vh.T
        assert s.max() > 4 * s.min() and inside.diagonal().min() > 0.5 and inside.diagonal().max() < 1.5
        assert (inside - inside.diagonal().diag()).abs().max() < 0.05


def test_update_of_muon_has_the_size_of_adamws(tmp_path):
    """The claim behind one learning rate for both: an RMS of 0.2 lr, whatever the shape; singular values are not all 1."""
    trainer, _ = make_trainer(tmp_path, "muon", max_steps=1, weight_decay=0.0)
    before, matrices = weights(trainer.model), hidden_matrices(trainer.model)
    trainer.train()
    for name, weight in matrices.items():
        assert 0.15 < (weight - before[name]).square().mean().sqrt() / LR < 0.25


@pytest.mark.parametrize(
    ("model", "names"),
    [
        ({}, LLAMA),
        ({"tie_word_embeddings": True}, LLAMA),
        ({"model_type": "mixtral", "num_local_experts": 4}, ATTENTION),
        ({"model_type": "gpt2", "n_embd": 32, "n_layer": 2, "n_head": 2, "n_positions": 16},
         ["attn.c_attn.weight", "attn.c_proj.weight", "mlp.c_fc.weight", "mlp.c_proj.weight"]),
    ],
    ids=["llama", "tied", "mixtral", "gpt2"],
)  # fmt: skip
def test_which_weights_muon_takes(tmp_path, model, names):
    """Neither embeddings nor output head; of experts neither router nor 3-D weights; frozen weights not at all."""
    trainer, _ = make_trainer(tmp_path, "muon", model=tiny_model(**model))
    layers = "transformer.h" if "n_embd" in model else "model.layers"
    expected = [f"{layers}.{layer}.{name}" for layer in (0, 1) for name in names]
    assert sorted(hidden_matrices(trainer.model)) == sorted(expected)
    optimizer = trainer.create_optimizer()
    names = {p: name for name, p in trainer.model.named_parameters()}
    taken = [[names[p] for p in group["params"]] for group in optimizer.param_groups]
    assert [set(group) for group in taken[:2]] == [set(expected), set()]
    assert sorted(name for group in taken for name in group) == sorted(names.values())
    assert [group["weight_decay"] for group in optimizer.param_groups] == [DECAY, 0.0, DECAY, 0.0]
    decayed = trainer.get_decay_parameter_names(trainer.model)
    assert set(taken[2]) == {name for name in names.values() if name in decayed} - set(expected)
    trainer.model.get_parameter(expected[0]).requires_grad_(False)
    assert sorted(hidden_matrices(trainer.model)) == sorted(expected[1:])


@pytest.mark.parametrize("optimizer", ["adam", "lion", "muon"])
def test_a_resumed_run_is_the_same_to_the_bit(tmp_path, optimizer):
    """Six steps, against the last three from the checkpoint in the middle in a new Trainer with other weights."""
    options = {
        "max_steps": 6,
        "save_strategy": "steps",
        "save_steps": 3,
        "lr_scheduler_type": "cosine",
        "warmup_steps": 2,
    }
    whole, watch = make_trainer(tmp_path, optimizer, **options)
    whole.train()
    resumed, again = make_trainer(tmp_path, optimizer, model=tiny_model(seed=7, attention_bias=True), **options)
    assert not same(weights(resumed.model), weights(whole.model))
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-3"))
    assert same(weights(resumed.model), weights(whole.model)) and again.rates == watch.rates[3:]
    states = [trainer.optimizer.state_dict()["state"] for trainer in (whole, resumed)]
    assert len(states[0]) == len(weights(whole.model))
    assert all(same(states[0][key], states[1][key]) for key in states[0])


def test_train_again_continues(tmp_path):
    """A second train() on the same Trainer, which gets the same class and options, moves the weights on."""
    trainer, watch = make_trainer(tmp_path, "muon")
    trainer.train()
    first = weights(trainer.model)
    trainer.train()
    moved = weights(trainer.model)
    assert len(watch.grads) == 6 and not any(torch.equal(first[name], moved[name]) for name in first)


def prepared(folder, name):
    """(model, optimizer) as the Trainer makes them, after two updates, so that there is state; and gradients."""
    trainer, _ = make_trainer(folder, **({"optimizer": name} if name != "adamw" else {}))
    model, optimizer = trainer.model, trainer.create_optimizer()
    for step in range(2):
        fill(model, step)
        optimizer.step()
    return model, optimizer


def fill(model, seed, scale=1.0):
    generator = torch.Generator().manual_seed(seed)
    for p in model.parameters():
        p.grad = torch.randn(p.shape, generator=generator) * scale


def snapshot(model, optimizer):
    state = optimizer.state_dict()["state"]
    return weights(model) | {f"{i}.{key}": value.clone() for i in state for key, value in state[i].items()}


@pytest.mark.parametrize("name", ["adamw", "adam", "lion", "muon"])
def test_an_update_left_out_leaves_no_trace(tmp_path, name):
    """With found_inf 1 and gradients of nan nothing changes, the count of steps neither; the next update is the one that
    the run without it makes. Also as the first update of all."""
    (model, optimizer), (other, plain) = prepared(tmp_path, name), prepared(tmp_path, name)
    before = snapshot(model, optimizer)
    fill(model, 5, math.nan)
    optimizer.found_inf = torch.tensor(1.0)
    optimizer.step()
    assert same(snapshot(model, optimizer), before)
    for one in (model, other):
        fill(one, 6)
    optimizer.found_inf = torch.tensor(0.0)
    optimizer.step()
    plain.step()
    assert same(snapshot(model, optimizer), snapshot(other, plain))
    assert not same(snapshot(model, optimizer), before)


@pytest.mark.parametrize("name", ["adamw", "adam", "lion", "muon"])
def test_the_first_update_left_out(tmp_path, name):
    trainers = [make_trainer(tmp_path, **({"optimizer": name} if name != "adamw" else {}))[0] for _ in range(2)]
    optimizer, plain = (trainer.create_optimizer() for trainer in trainers)
    fill(trainers[0].model, 5, math.nan)
    optimizer.found_inf = torch.tensor(1.0)
    optimizer.step()
    for trainer in trainers:
        fill(trainer.model, 6)
    optimizer.found_inf = torch.tensor(0.0)
    optimizer.step()
    plain.step()
    assert same(snapshot(trainers[0].model, optimizer), snapshot(trainers[1].model, plain))


@pytest.mark.parametrize("name", ["lion", "muon"])
def test_found_inf_is_not_read_by_the_host(tmp_path, name):
    """On the meta device there are no values: `.item()` or `if tensor` would raise."""
    with pytest.raises((RuntimeError, NotImplementedError)):
        bool(torch.zeros((), device="meta"))
    layer = torch.nn.Linear(8, 8, bias=False, device="meta")
    model = tiny_model().to("meta")
    args = TrainingArguments(str(tmp_path), use_cpu=True)
    kind, options = own_optimizer(name, args, model)
    if name == "muon":  # torch's fused AdamW has no kernel for this device
        options["matrices"] = {layer.weight}
    optimizer = kind([{"params": [layer.weight], "weight_decay": DECAY}], **options)
    layer.weight.grad = torch.zeros_like(layer.weight)
    optimizer.found_inf = torch.zeros((), device="meta")
    for _ in range(2):
        optimizer.step()
    assert len(optimizer.state) == 1


PEAK, WARMUP, STEPS = 0.1, 4, 12


@pytest.mark.parametrize(
    ("kind", "options", "factor"),
    [
        ("linear", None, lambda s: (STEPS - s) / (STEPS - WARMUP)),
        ("cosine", None, lambda s: (1 + math.cos(math.pi * (s - WARMUP) / (STEPS - WARMUP))) / 2),
        ("cosine_with_min_lr", {"min_lr": 0.01}, lambda s: 0.1 + 0.9 * (1 + math.cos(math.pi * (s - WARMUP) / (STEPS - WARMUP))) / 2),
        ("inverse_sqrt", None, lambda s: min(s / WARMUP, math.sqrt(WARMUP / s))),
        ("warmup_stable_decay", {"num_decay_steps": 3}, lambda s: 1 if s <= STEPS - 3 else (1 + math.cos(math.pi * (s - STEPS + 3) / 3)) / 2),
        ("warmup_stable_decay", {"num_decay_steps": 3, "decay_type": "linear", "min_lr_ratio": 0.1},
         lambda s: 1 if s <= STEPS - 3 else 0.1 + 0.9 * (STEPS - s) / 3),
    ],
)  # fmt: skip
def test_schedule(tmp_path, kind, options, factor):
    """Update n = 1, 2, ... runs at, and is logged with, the rate of s = n - 1 updates made before: the first has rate 0,
    number WARMUP + 1 the peak, and what the decay ends in at s = STEPS is never used. inverse_sqrt is the shape of
    Vaswani et al. 2017, 5.3, whose count starts at s = 1."""
    trainer, watch = make_trainer(
        tmp_path, optim="sgd", max_steps=STEPS, learning_rate=PEAK, lr_scheduler_type=kind, warmup_steps=WARMUP, lr_scheduler_kwargs=options
    )  # fmt: skip
    trainer.train()
    floor = (options or {}).get("min_lr_ratio", 0)  # warmup_stable_decay starts there too
    rise = [floor + (1 - floor) * s / WARMUP for s in range(WARMUP)]
    expected = [PEAK * f for f in rise + [factor(s) for s in range(WARMUP, STEPS)]]
    assert watch.rates == pytest.approx(expected, rel=1e-12, abs=1e-15)
    assert watch.logged == watch.rates and watch.rates[WARMUP] == PEAK
    rest = PEAK * factor(STEPS)
    assert trainer.lr_scheduler.get_last_lr()[0] == pytest.approx(rest, rel=1e-12, abs=1e-15)


def test_gradients_are_clipped_by_their_global_norm(tmp_path):
    """SGD with a rate of 1 moves by the clipped gradient: by max_grad_norm where the raw norm is above, else by that."""
    moved = {}
    for limit in (1e-9, 0.5, 1e6, 0.0):
        model = tiny_model().double()  # 1e-9 is below what fp32 weights can move by
        trainer, _ = make_trainer(
            tmp_path, model=model, optim="sgd", learning_rate=1.0, weight_decay=0.0, max_grad_norm=limit, max_steps=1
        )
        before = weights(model)
        trainer.train()
        moved[limit] = math.sqrt(sum((p - before[name]).square().sum().item() for name, p in weights(model).items()))
    assert 0.9e-9 < moved[1e-9] <= 1e-9 and moved[0.5] == pytest.approx(0.5, abs=1e-5)
    assert moved[0.0] == moved[1e6] > 0.5


@pytest.mark.parametrize(
    ("optimizer", "options", "words"),
    [
        ("lion", {"optim": "sgd"}, "two optimizers"),
        ("lion", {"adam_beta2": 0.95}, "lion does not read"),
        ("lion", {"optim_args": "momentum=0.9"}, "no option 'momentum'; it takes beta1 and beta2"),
        ("adam", {"optim_args": "beta1=0.9"}, "it takes none"),
        ("muon", {"optim_args": "momentum"}, "momentum is at least 0 and below 1, not ''"),
        ("muon", {"optim_args": "momentum=1"}, "below 1, not '1'"),
        ("muon", {"optim_args": "momentum=nan"}, "below 1, not 'nan'"),
        ("muon", {"optim_args": "momentum=0.9,ns_steps=2.5"}, "ns_steps is at least 1 and below 100, not '2.5'"),
    ],
)
def test_what_cannot_be_meant_is_one_sentence(tmp_path, optimizer, options, words):
    with pytest.raises(UserError, match=words) as error:
        own_optimizer(optimizer, TrainingArguments(str(tmp_path), use_cpu=True, **options), tiny_model())
    assert "\n" not in str(error.value)


def test_muon_needs_whole_matrices():
    assert own_optimizer(None, TrainingArguments("unused", use_cpu=True, optim="sgd"), None) is None
    for strategy in ("DeepSpeed ZeRO-1", "DeepSpeed ZeRO-3", "FSDP2"):
        assert strategy in optimizer_problems("muon", strategy)[0]
        assert optimizer_problems("lion", strategy) == optimizer_problems(None, strategy) == []
    assert optimizer_problems("muon", "DDP") == optimizer_problems("muon", "single process") == []


def test_only_adam_is_offloaded(tmp_path, monkeypatch):
    """Accelerate puts DeepSpeed's Adam in the place of any other without a word."""
    args = [TrainingArguments(str(tmp_path / name), use_cpu=True, optim=name) for name in ("sgd", "adamw_torch_fused")]
    assert optimizer_problems("lion", "DeepSpeed ZeRO-2") == [] == run_problems(args[0], RunConfig(), True, 1)
    monkeypatch.setenv("ACCELERATE_DEEPSPEED_OFFLOAD_OPTIMIZER_DEVICE", "cpu")
    assert "optimizer: lion cannot be offloaded" in optimizer_problems("lion", "DeepSpeed ZeRO-2")[0]
    assert "optim: sgd cannot be offloaded" in run_problems(args[0], RunConfig(), True, 1)[0]
    assert run_problems(args[1], RunConfig(), True, 1) == [] == optimizer_problems(None, "DeepSpeed ZeRO-2")


def test_weights_replaced_after_they_were_listed_are_an_error(tmp_path):
    trainer, _ = make_trainer(tmp_path, "muon")
    trainer.model.model.layers[0].mlp.up_proj.weight = torch.nn.Parameter(torch.zeros(64, 32))
    with pytest.raises(ValueError, match="replaced"):
        trainer.create_optimizer()
