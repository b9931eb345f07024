"""The private names that llm_recipes/_compat.py leans on are still there and still mean what it takes them for."""

import ast
import inspect
import re

import torch
from accelerate import Accelerator
from accelerate.commands.launch import launch_command_parser
from datasets import Dataset
from deepspeed.runtime.zero.stage3 import DeepSpeedZeroOptimizer_Stage3
from deepspeed.runtime.zero.stage_1_and_2 import DeepSpeedZeroOptimizer
from transformers import AutoConfig, AutoModelForCausalLM, Trainer
from transformers.distributed import DistributedConfig
from trl import DPOTrainer

from llm_recipes import _compat
from tests.running import ROOT


def test_trainer_methods():
    assert list(inspect.signature(Trainer._save_checkpoint).parameters) == ["self", "model", "trial"]
    assert list(inspect.signature(Trainer._get_grad_norm).parameters) == ["self", "model", "grad_norm"]
    source = inspect.getsource(Trainer._run_epoch)
    assert source.index("self._get_grad_norm(") < source.index("self.optimizer.step()")
    for step in (Trainer.training_step, Trainer.prediction_step):
        source = inspect.getsource(step)
        assert "cp_context, inputs = self._prepare_context_parallel_inputs(model, inputs)" in source
        assert source.index("cp_context()") < source.index("self.compute_loss(")
    assert source.index("self._get_num_items_in_batch(") < source.index("self._prepare_context_parallel_inputs(")
    save = inspect.getsource(Trainer._maybe_log_save_evaluate)
    assert "self._save_checkpoint(model, trial)" in save


def test_deepspeed_computes_the_norm_before_the_update():
    for optimizer, norm, update in (
        (DeepSpeedZeroOptimizer_Stage3, "self._get_norm_groups()", "self._optimizer_step("),
        (DeepSpeedZeroOptimizer, "self.scaled_global_norm()", "self._optimizer_step("),
    ):
        source = inspect.getsource(optimizer).partition("    def step(self, closure=None):")[
            2
        ]  # the method is decorated
        assert source.index(norm) < source.index(update)
    assert not hasattr(DeepSpeedZeroOptimizer, "_get_norm_groups")


def test_which_optimizers_leave_out_an_update():
    weights = [torch.nn.Parameter(torch.ones(2))]
    adamw, sgd = torch.optim.AdamW, torch.optim.SGD
    assert _compat.honours_found_inf(adamw(weights, fused=True)) and not _compat.honours_found_inf(adamw(weights))
    assert not _compat.honours_found_inf(sgd(weights, 1.0, fused=True)) and not _compat.honours_found_inf(
        sgd(weights, 1.0)
    )
    optimizer = adamw(weights, lr=1.0, fused=True)
    optimizer.found_inf, weights[0].grad = torch.tensor(1.0), torch.full((2,), float("nan"))
    optimizer.step()
    assert weights[0].tolist() == [1.0, 1.0] and optimizer.state[weights[0]]["step"] == 0


def test_sync_gradients_is_what_backward_reads():
    accelerator = Accelerator(cpu=True)
    for sync in (False, True):
        _compat.set_sync_gradients(accelerator, sync)
        assert accelerator.sync_gradients is sync


def test_which_models_take_any_attention():
    taken = [_compat.takes_any_attention(AutoConfig.for_model(kind)) for kind in ("llama", "gpt2", "bloom", "mamba")]
    assert taken == [True, True, False, False]


def test_fingerprint_follows_the_content():
    first, same, other = (Dataset.from_dict({"text": [t]}) for t in ("a", "a", "b"))
    assert _compat.fingerprint(first) == _compat.fingerprint(same) != _compat.fingerprint(other)
    assert _compat.fingerprint(first.shuffle(seed=1)) != _compat.fingerprint(first)


def test_best_model_is_loaded_at_the_end():
    assert "self._load_best_model()" in inspect.getsource(Trainer._finalize_training)


def test_dpo_keeps_the_reference_under_our_hash():
    source = inspect.getsource(DPOTrainer._precompute_ref_logps)
    assert "model_hash = self._precompute_model_hash" in source
    assert "Hasher.hash((dataset._fingerprint, model_hash))" in source
    first, second = torch.nn.Linear(3, 3), torch.nn.Linear(3, 3)
    assert _compat.state_digest(first) != _compat.state_digest(second)
    second.load_state_dict(first.state_dict())
    assert _compat.state_digest(first) == _compat.state_digest(second)


def test_flags_of_accelerate_launch():
    flags = {action.dest: action for action in _compat.actions(launch_command_parser())}
    assert flags["zero_stage"].type is int and flags["mixed_precision"].choices == ["no", "fp16", "bf16", "fp8"]
    assert flags["fsdp_offload_params"].default == "false" and flags["same_network"].nargs == 0
    assert "(true|false)" in flags["zero3_init_flag"].help


def test_a_model_split_beforehand_goes_through_the_trainer():
    """What `take_over` replaces is where the Trainer asks, and nothing of it wraps or moves such a model."""
    source = inspect.getsource(Trainer._prepare_for_training)
    assert "if self.is_distributed_loading_by_transformers:" in source
    assert "self._sync_replicated_trainable_parameters(model)" in source
    assert "self._load_optimizer_and_scheduler(resume_from_checkpoint)" in source
    source = inspect.getsource(Trainer._run_epoch)
    assert source.index("self._clip_grad_norm(model)") < source.index("self._get_grad_norm(model, grad_norm=grad_norm)")
    assert "self._save_optimizer_and_scheduler(output_dir)" in inspect.getsource(Trainer._save_checkpoint)
    assert "self._load_from_checkpoint(resume_from_checkpoint)" in inspect.getsource(Trainer.train)


def test_plans_and_views():
    config = AutoConfig.for_model(
        "llama", hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=2
    )
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    tp, ep, fsdp = _compat.parallel_plans(model, DistributedConfig(tp_size=2, fsdp_size=2))
    assert tp["model.layers.0.self_attn.q_proj.weight"] == "colwise" and not ep and "model.layers.0" in fsdp
    view = _compat.view(model)
    view.lm_head = torch.nn.Identity()
    assert view.model is model.model and isinstance(model.lm_head, torch.nn.Linear)
    assert _compat.uncompiled(torch.compile(model)) is model and _compat.uncompiled(model) is model
    tensors = {"a": torch.ones(2)}
    assert _compat.plain_shards(_compat.plain_shards(tensors), tensors)["a"] is tensors["a"]


def test_private_names_are_nowhere_else():
    """`x._name` on anything but self, cls or our own modules belongs in _compat."""
    found = []
    for path in [*ROOT.glob("llm_recipes/**/*.py"), *ROOT.glob("recipes/**/*.py")]:
        if path.name in ("_compat.py", "_trl_compat.py"):
            continue
        for node in ast.walk(ast.parse(path.read_text())):
            private = isinstance(node, ast.Attribute) and re.fullmatch(r"_[a-z]\w*", node.attr)
            if (
                private
                and not (isinstance(node.value, ast.Name) and node.value.id in ("self", "cls", "_compat"))
                and node.attr != "_exit"
            ):  # os._exit is public
                found.append(f"{path.name}:{node.lineno} {ast.unparse(node)}")
    assert found == []
