"""What each step trains on: exact, whatever the number of processes, the micro-batch, the ramp and what is left out."""

import json

import numpy as np
import pytest
import torch
from datasets import Dataset
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AutoConfig, AutoModelForCausalLM, Trainer, TrainingArguments

from llm_recipes.batches import Batches, Examples, StreamedExamples, train_on
from llm_recipes.checkpoints import protect
from llm_recipes.config import ObjectiveConfig, Ramp
from llm_recipes.errors import UserError
from llm_recipes.objectives import causal, collate, exact_loss
from llm_recipes.progress import Throughput, show_progress
from tests.running import TINY_MODEL, run


class Args:
    """What Batches reads of TrainingArguments."""

    def __init__(self, output_dir="out", micro=4, accumulation=1, world_size=1, rank=0, max_steps=-1, epochs=1.0):
        self.output_dir, self.per_device_train_batch_size, self.gradient_accumulation_steps = (
            str(output_dir),
            micro,
            accumulation,
        )
        self.world_size, self.process_index = world_size, rank
        self.max_steps, self.num_train_epochs = max_steps, epochs


def flat(batches, step):
    return [p for micro in batches.positions(step) for p in micro]


def windows_dataset(n=40, length=16, vocab=50):
    ids = np.random.default_rng(0).integers(0, vocab, (n, length)).tolist()
    return Dataset.from_dict({"input_ids": ids}).with_format("numpy")


def test_steps_cover_the_epochs_in_order():
    batches = Batches(10, 16, Args(micro=4, max_steps=5), None)
    assert [flat(batches, s) for s in range(5)] == [list(range(4 * s, 4 * s + 4)) for s in range(5)]
    assert len(batches) == batches.steps == 5 and list(batches)[1] == [[4, 5, 6, 7]]


@pytest.mark.parametrize(("world_size", "micro", "accumulation"), [(1, 4, 4), (2, 4, 2), (4, 2, 2), (16, 1, 1)])
def test_world_size_and_micro_batch_change_nothing(world_size, micro, accumulation, monkeypatch):
    """The ranks' parts of a step, in order, are the step; each is cut into equal micro-batches."""
    ramp = None if world_size == 16 else Ramp(start=4, steps=2)
    whole = Batches(100, 16, Args(micro=16, max_steps=6), ramp)
    monkeypatch.setenv("WORLD_SIZE", str(world_size))
    for step in range(6):
        parts = [
            Batches(
                100, 16, Args(micro=micro, accumulation=accumulation, world_size=world_size, rank=r, max_steps=6), ramp
            )
            for r in range(world_size)
        ]
        assert [p for part in parts for p in flat(part, step)] == flat(whole, step)
        assert all(
            len(m) <= micro and len(m) == len(ms[0]) for part in parts for ms in [part.positions(step)] for m in ms
        )


def test_ramp_by_hand():
    """2 for 3 steps, 6 for 3 steps, then the full 8 (the factor would overshoot to 18)."""
    batches = Batches(100, 16, Args(micro=2, accumulation=4, max_steps=8), Ramp(start=2, steps=3, factor=3))
    assert batches.stages == [(2, 3), (6, 3)]
    assert [len(flat(batches, s)) for s in range(8)] == [2, 2, 2, 6, 6, 6, 8, 8]
    assert [len(batches.positions(s)) for s in (0, 3, 6)] == [1, 3, 4]  # accumulation grows, the micro-batch stays
    assert [p for s in range(8) for p in flat(batches, s)] == list(range(40))
    assert batches.sequences(8) == 40 == batches.start(8)


@pytest.mark.parametrize(("epochs", "steps"), [(1.0, 25), (0.04, 1), (2.0, 50), (1.01, 26)])
def test_epochs_become_steps(epochs, steps):
    assert Batches(100, 16, Args(micro=4, epochs=epochs), None).steps == steps


def test_ramp_by_tokens():
    """64 tokens a stage in windows of 16: 2 steps of 2, 1 of 4, then the full 8."""
    batches = Batches(100, 16, Args(micro=8, max_steps=5), Ramp(start=2, tokens=64))
    assert [len(flat(batches, s)) for s in range(5)] == [2, 2, 4, 8, 8]


def test_epochs_become_steps_with_a_ramp():
    """100 windows: 5 steps of 2, 5 of 4, then 70 more in batches of 8."""
    assert Batches(100, 16, Args(micro=8), Ramp(2, 5)).steps == 5 + 5 + 9
    assert Batches(31, 16, Args(micro=8), Ramp(2, 5)).steps == 5 + 5 + 1


@pytest.mark.parametrize(
    ("ramp", "world_size", "message"),
    [(Ramp(2), 1, "set steps or tokens"), (Ramp(2, 3), 1, "comes after 9 steps, and the run has 9: shorten the ramp"), (Ramp(16, 5), 1, "start must lie between 0 and the full batch of 16"), (Ramp(2, 0), 1, "steps or tokens at least 1"),
     (Ramp(2, 5, factor=1), 1, "factor be at least 2"), (Ramp(3, 5), 2, "a batch of 3 does not divide over 2 processes")],
)  # fmt: skip
def test_ramps_that_do_not_fit(ramp, world_size, message, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", str(world_size))
    with pytest.raises(UserError, match=message):
        Batches(100, 16, Args(micro=16 // world_size, world_size=world_size, max_steps=9), ramp)


def test_batch_left_out(tmp_path):
    """The other batches move up; what came before stays; a resume reads it from the file, a fresh start does not."""
    batches = Batches(100, 16, Args(tmp_path, max_steps=10), None)
    before = [flat(batches, s) for s in range(10)]
    assert batches.leave_out(3) == 3 and batches.leave_out(5) == 6
    assert [flat(batches, s) for s in range(8)] == before[:3] + before[4:6] + before[7:10]
    assert json.loads((tmp_path / "left_out_batches.json").read_text()) == [3, 6]
    assert Batches(100, 16, Args(tmp_path, max_steps=10), None).left_out == []
    (tmp_path / "checkpoint-2").mkdir()
    again = Batches(100, 16, Args(tmp_path, max_steps=10), None)
    assert [flat(again, s) for s in range(8)] == [flat(batches, s) for s in range(8)]
    assert batches.sequences(8) == 32


def test_examples_are_a_permutation_in_every_epoch():
    examples = Examples(windows_dataset(), causal, seed=1, shuffle=True)
    first, second = ([examples.window(e * 40 + i) for i in range(40)] for e in (0, 1))
    assert sorted(first) == sorted(second) == list(range(40)) and first != second != list(range(40))
    other = Examples(windows_dataset(), causal, seed=2, shuffle=True)
    assert [other.window(i) for i in range(40)] != first
    row = examples[43]
    assert np.array_equal(row["input_ids"], examples.windows[second[3]]["input_ids"])
    plain = Examples(windows_dataset(), causal, seed=1, shuffle=False)
    assert [plain.window(i) for i in range(40)] == list(range(40))


def test_noise_follows_from_the_position_alone():
    def noise(ids, rng):
        return {"noise": rng.random(3)}

    examples = Examples(windows_dataset(), noise, seed=1, shuffle=True)
    together = [row["noise"] for row in examples.__getitems__([7, 47, 8])]
    assert all(np.array_equal(a, examples[p]["noise"]) for a, p in zip(together, (7, 47, 8), strict=True))
    assert len({row.tobytes() for row in together}) == 3  # another epoch, other noise
    stream = list(StreamedExamples([{"input_ids": np.arange(4)}] * 3, noise, seed=1))
    assert np.array_equal(stream[2]["noise"], np.random.default_rng([1, 2]).random(3))


def tiny_model(seed=0):
    keys = dict(TINY_MODEL)
    torch.manual_seed(seed)
    config = AutoConfig.for_model(keys.pop("model_type"), vocab_size=50, **keys)
    return AutoModelForCausalLM.from_config(config, attn_implementation="sdpa_causal")


def trainer_of(tmp_path, ramp=None, guard=None, z_loss=0.0, **keys):
    """A Trainer as recipes/pretrain/run.py makes it."""
    import llm_recipes.models  # noqa: F401 - registers sdpa_causal

    settings = {"max_steps": 6, "per_device_train_batch_size": 2, "gradient_accumulation_steps": 4} | keys
    args = TrainingArguments(
        str(tmp_path),
        use_cpu=True,
        report_to="none",
        logging_nan_inf_filter=False,
        **({"save_strategy": "no"} | settings),
    )
    examples = Examples(windows_dataset(), causal, 0, shuffle=True)
    batches = Batches(40, 16, args, ramp)
    trainer = Trainer(tiny_model(), args, collate, examples)
    show_progress(trainer, Throughput(batches.sequences))
    train_on(trainer, examples, batches, "causal", flops_per_example=10.0)
    exact_loss(trainer, ObjectiveConfig(z_loss=z_loss))
    trainer.watch = protect(trainer, spike_guard=guard, windows=(examples, batches))
    trainer.examples, trainer.batches = examples, batches
    return trainer


def test_ramp_equals_a_plain_loop(tmp_path):
    """Weights after a run with a ramp are those of a hand-written loop over the same batches; Adam's state is never touched."""
    ramp, keys = Ramp(start=2, steps=2), {"learning_rate": 1e-2, "lr_scheduler_type": "constant", "max_grad_norm": 0.5}
    trainer = trainer_of(tmp_path, ramp, **keys)
    trainer.train()
    model = tiny_model()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, weight_decay=0.0)
    order, windows, start = np.random.default_rng([0, 0]).permutation(40), windows_dataset(), 0
    for size in (2, 2, 4, 4, 8, 8):
        ids = torch.tensor(np.stack([windows[int(i)]["input_ids"] for i in order[start : start + size]])).long()
        start += size
        optimizer.zero_grad()
        model(input_ids=ids, labels=ids).loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 0.5)
        optimizer.step()
    ours = dict(trainer.model.named_parameters())
    assert all(torch.allclose(p, ours[name], atol=2e-6) for name, p in model.named_parameters())
    assert trainer.state.total_flos == 10.0 * 28
    assert trainer.state.epoch == pytest.approx(28 / 40)


def test_strategies_that_go_by_epochs(tmp_path):
    """40 windows in batches of 8: an epoch ends every 5 steps."""
    trainer = trainer_of(tmp_path, max_steps=11, logging_strategy="epoch")
    trainer.train()
    assert [row["step"] for row in trainer.state.log_history if "loss" in row] == [5, 10, 11]


class Waits(TorchDispatchMode):
    """Notes every operation that makes the host wait for a tensor's value."""

    def __init__(self):
        super().__init__()
        self.found = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        by_mask = (
            any(t is not None and t.dtype == torch.bool for t in args[1])
            if func is torch.ops.aten.index.Tensor
            else False
        )
        if by_mask or func.overloadpacket.__name__ in (
            "_local_scalar_dense",
            "is_nonzero",
            "nonzero",
            "equal",
            "masked_select",
        ):
            self.found.append(func)
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("optimizer", ["adamw_torch_fused", "lion", "muon"])
@pytest.mark.parametrize("guarded", [False, True])
def test_the_host_does_not_wait_between_logging_steps(tmp_path, optimizer, guarded):
    """What would be a device synchronisation on a GPU is a read of a tensor's value here."""
    from llm_recipes.config import SpikeGuard

    guard = SpikeGuard(window=2, z=1e9, action="skip") if guarded else None
    trainer = trainer_of(tmp_path, guard=guard, z_loss=1e-4, logging_steps=6, max_steps=12)
    if optimizer != "adamw_torch_fused":
        from llm_recipes.optimizers import own_optimizer

        trainer.optimizer_cls_and_kwargs = own_optimizer(optimizer, trainer.args, trainer.model)
    waits, at = Waits(), {}
    from transformers import TrainerCallback

    class Note(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            at[state.global_step] = len(waits.found)

    trainer.callback_handler.callbacks.insert(0, Note())  # before the guard and before the log
    with waits:
        trainer.train()
    assert at[11] == at[7], waits.found[at[7] : at[11]]
    assert at[8] > at[5]  # the log itself does read values: the test can fail
    assert trainer.state.global_step == 12


def test_ramp_in_a_run(tiny):
    """The recipe with a ramp: stopped and resumed equals straight, and the log says what the batch was."""
    from pathlib import Path

    keys = {"batch_size_ramp": {"start": 2, "steps": 3}, "global_batch_size": 8, "max_steps": 10, "save_steps": 4}
    config = tiny(**keys)
    straight = run("--config", config)
    assert straight.code == 0, straight.err
    assert "after 3 steps of 2, then 3 steps of 4" in straight.out
    assert json.loads(Path("out/metrics.json").read_text())["tokens"] == (3 * 2 + 3 * 4 + 4 * 8) * 32
    stopped = run("--config", config, "--output_dir", "two", fault="kill_in_save:2:2")
    assert stopped.code != 0
    assert run("--config", config, "--output_dir", "two").code == 0
    assert Path("two/model.safetensors").read_bytes() == Path("out/model.safetensors").read_bytes()
