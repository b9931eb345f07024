"""What PPO takes for granted in TRL and transformers: an upgrade that changes it fails here, by name."""

import ast
import inspect
import textwrap

import pytest
import torch
from accelerate.state import AcceleratorState, GradientState
from transformers import Trainer, TrainingArguments
from trl import RLOOTrainer
from trl.models import utils as models_utils
from trl.trainer import utils as trainer_utils

from llm_recipes.ppo import PPOConfig, _trl_compat

METHODS = {  # that RolloutTrainer and PPOTrainer call or put their own in the place of
    "_calculate_rewards": "(self, inputs, prompts, completions, completion_ids_list)",
    "_compute_loss": "(self, model, inputs)",
    "_generate_single_turn": "(self, prompt_ids, images, multimodal_fields)",
    "_load_optimizer_and_scheduler": "(self, checkpoint: str | None) -> None",
    "_prepare_inputs": "(self, generation_batch: dict[str, torch.Tensor | typing.Any]) -> dict[str, torch.Tensor | typing.Any]",
    "_save_optimizer_and_scheduler": "(self, output_dir: str) -> None",
    "_tokenize_prompts": "(self, prompts: list)",
    "compute_loss": "(self, model, inputs, return_outputs=False, num_items_in_batch=None)",
    "floating_point_ops": "(self, inputs: dict[str, torch.Tensor | typing.Any]) -> int",
    "get_train_dataloader": "(self)",
    "log": "(self, logs: dict[str, float], start_time: float | None = None) -> None",
    "prediction_step": "(self, model, inputs, prediction_loss_only, ignore_keys: list[str] | None = None)",
    "training_step": "(self, model, inputs, num_items_in_batch)",
}
FUNCTIONS = {
    models_utils: {
        "unwrap_model_for_generation": (
            "(model: 'DistributedDataParallel | DeepSpeedEngine', accelerator: 'Accelerator', gather_deepspeed3_params: "
            "bool = True, generation_kwargs: dict | None = None, gradient_checkpointing_kwargs: dict | None = None)"
        ),
    },
    trainer_utils: {
        "disable_dropout_in_model": "(model: torch.nn.modules.module.Module) -> None",
        "get_config_model_id": "(config: transformers.configuration_utils.PreTrainedConfig) -> str",
        "identity": "(x)",
        "use_adapter": "(model: 'PeftModel', adapter_name: str | None)",
    },
}
ATTRIBUTES = (  # that RLOOTrainer.__init__ makes
    "_logs", "_metrics", "_pending_extra_logs", "_pending_metrics", "aux_loss_enabled", "eos_token_ids", "ref_model",
    "reward_func_names", "reward_funcs", "reward_weights",
)  # fmt: skip


def differences(owner, signatures: dict[str, str]) -> list[str]:
    """What is no longer as recorded, one sentence each."""
    found = []
    for name, signature in signatures.items():
        function = getattr(owner, name, None)
        now = None if function is None else str(inspect.signature(function))
        if now != signature:
            found.append(f"{owner.__name__}.{name} " + (f"is {now}, was {signature}" if now else "is gone"))
    return found


def parsed(function_or_class) -> ast.AST:
    return ast.parse(textwrap.dedent(inspect.getsource(function_or_class)))


def assigned(cls) -> set[str]:
    """Attributes of self that `__init__` sets."""
    return {
        node.attr
        for node in ast.walk(parsed(cls.__init__))
        if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store) and ast.unparse(node.value) == "self"
    }


def read_from_args(cls) -> set[str]:
    """X of every `args.X` and `self.args.X` in the class."""
    return {
        node.attr
        for node in ast.walk(parsed(cls))
        if isinstance(node, ast.Attribute) and ast.unparse(node.value) in ("args", "self.args")
    }


def called(function) -> list[str]:
    """What is called in it, in this order."""
    calls = [node for node in ast.walk(parsed(function)) if isinstance(node, ast.Call)]
    return [ast.unparse(node.func) for node in sorted(calls, key=lambda node: (node.lineno, node.col_offset))]


def test_methods_have_the_signatures_that_they_had():
    assert differences(RLOOTrainer, METHODS) == []
    assert [said for owner, signatures in FUNCTIONS.items() for said in differences(owner, signatures)] == []


def test_attributes_are_made_by_the_constructor():
    assert set(ATTRIBUTES) - assigned(RLOOTrainer) == set()


def test_every_private_name_is_recorded():
    """That RolloutTrainer overrides, calls on itself or on super, or reads; its own constants are not TRL's."""
    private = set()
    for node in ast.walk(parsed(_trl_compat)):
        if isinstance(node, ast.Attribute) and ast.unparse(node.value) in ("self", "super()"):
            private |= {node.attr} if node.attr.startswith("_") else set()
        if isinstance(node, ast.FunctionDef) and node.name.startswith("_"):
            private.add(node.name)
    assert private == {name for name in (*METHODS, *ATTRIBUTES) if name.startswith("_")} - {"__init__"}
    constants = [name for name in vars(_trl_compat.RolloutTrainer) if name in ("_name", "_tag_names", "_paper")]
    assert all(name in vars(RLOOTrainer) for name in constants) and len(constants) == 3


def test_a_changed_class_is_told_by_name():
    class Renamed(RLOOTrainer):
        _tokenize_prompts = None

        def _compute_loss(self, model, inputs, extra):
            pass

        def __init__(self, args):
            self._metrics = args.metrics_of_tomorrow

        def begin(self):
            self.state.save(self.hidden)
            print(super().begin)
            super().begin()

    assert differences(Renamed, METHODS) == [
        "Renamed._compute_loss is (self, model, inputs, extra), was (self, model, inputs)",
        "Renamed._tokenize_prompts is gone",
    ]
    assert assigned(Renamed) == {"_metrics"} and read_from_args(Renamed) == {"metrics_of_tomorrow"}
    assert called(Renamed.begin) == ["self.state.save", "print", "super", "super().begin", "super"]


def test_the_config_has_every_key_that_the_trainer_reads():
    """RLOOTrainer takes a PPOConfig for its own; keys that PPO has no use for stand there with a fixed value."""
    read = read_from_args(RLOOTrainer)
    config = PPOConfig("out", use_cpu=True, bf16=False, report_to="none")
    assert {name for name in read if not hasattr(config, name)} == set() and len(read) > 40


def test_a_checkpoint_has_the_critic_before_it_is_told_or_pushed():
    calls = called(Trainer._save_checkpoint)
    places = [calls.index(f"self.{name}") for name in ("_save_optimizer_and_scheduler", "state.save_to_json")]
    assert places == sorted(places) and calls.index("self._push_from_checkpoint") > places[0]
    assert "super()._save_checkpoint" in called(RLOOTrainer._save_checkpoint)


def test_a_checkpoint_is_loaded_before_training_begins():
    """The critic's engine is made, and its state loaded, when the callbacks hear of the beginning."""
    calls = called(Trainer._inner_training_loop)
    assert calls.index("self._prepare_for_training") < calls.index("self.callback_handler.on_train_begin")
    assert "self._load_optimizer_and_scheduler" in called(Trainer._prepare_for_training)


def test_generation_and_rewards_return_what_is_unpacked():
    """Prompt ids are the first of three; rewards are those of all processes."""
    last = [node for node in ast.walk(parsed(RLOOTrainer._tokenize_prompts)) if isinstance(node, ast.Return)]
    assert [ast.unparse(node.value) for node in last] == ["(prompt_ids, images, multimodal_fields)"]
    last = [node for node in parsed(RLOOTrainer._calculate_rewards).body[0].body if isinstance(node, ast.Return)]
    assert [ast.unparse(node.value) for node in last] == ["rewards_per_func"]
    assert "gather" in called(RLOOTrainer._calculate_rewards)


@pytest.mark.parametrize(("scaled", "expected"), [(True, 6.0), (False, 1.5)])
def test_the_loss_is_taken_as_it_is(scaled, expected, tmp_path):
    """With `loss_is_scaled_for_ga` the Trainer divides nothing by the four micro-batches of the step."""

    class Sum(Trainer):
        loss_is_scaled_for_ga = scaled

        def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
            return model(inputs["x"]).sum()

    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()
    args = TrainingArguments(tmp_path, use_cpu=True, bf16=False, report_to="none", gradient_accumulation_steps=4)
    trainer = Sum(torch.nn.Linear(1, 1, bias=False), args, train_dataset=[0])
    trainer.current_gradient_accumulation_steps = 4
    trainer.training_step(trainer.model, {"x": torch.tensor([[1.0], [2.0], [3.0]])})
    assert trainer.model.weight.grad.item() == pytest.approx(expected)
    AcceleratorState._reset_state(reset_partial_state=True)
    assert _trl_compat.RolloutTrainer.loss_is_scaled_for_ga is True
