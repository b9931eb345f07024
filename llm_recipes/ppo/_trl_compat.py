"""Private names of TRL's RLOOTrainer and of the Trainer below it, as public ones. tests/test_ppo_contract.py holds them.

RLOOTrainer gives PPO its model and adapter handling, the reference model, reward functions, vLLM, logging and model card.
What is different in PPO is in the methods without an underscore, which `PPOTrainer` fills in.
"""

import statistics

import torch
from accelerate.utils import gather_object
from torch.utils.data import DataLoader
from trl import RLOOConfig, RLOOTrainer
from trl.models.utils import unwrap_model_for_generation
from trl.trainer.utils import disable_dropout_in_model, get_config_model_id, identity, use_adapter

# Of all that a log is about; other figures are averaged.
EXTREMES = {"policy/ratio_max_dev": max, "completions/max_length": max, "completions/min_length": min}

__all__ = [
    "RolloutTrainer",
    "check_training_arguments",
    "disable_dropout_in_model",
    "get_config_model_id",
    "use_adapter",
]


def check_training_arguments(args: RLOOConfig) -> None:
    """What the classes above RLOOConfig check and fill in."""
    super(RLOOConfig, args).__post_init__()


class RolloutTrainer(RLOOTrainer):
    """RLOOTrainer whose rollouts, losses and state are the methods of the subclass."""

    _name = "PPO"
    _tag_names = ["trl", "ppo"]  # noqa: RUF012 - TRL has a list
    _paper = {  # noqa: RUF012 - TRL reads it so
        "title": "Fine-Tuning Language Models from Human Preferences",
        "id": "1909.08593",
        "citation": "",
    }
    loss_is_scaled_for_ga = True  # divided by the tokens of the whole step

    # Between the Trainer's loop and PPO's

    def get_train_dataloader(self) -> DataLoader:
        """A clock: one item a micro-batch. What it trains on follows from the step, so no resume has to skip anything."""
        ticks = self.rollouts_per_epoch() * self.args.num_ppo_epochs * self.args.steps_per_generation
        return DataLoader(range(ticks), batch_size=1, collate_fn=identity)

    def floating_point_ops(self, inputs) -> int:
        return 0  # the ticks have none

    def _prepare_inputs(self, inputs):
        return self.next_micro_batch()

    def _compute_loss(self, model, inputs):
        return self.loss(model, inputs)

    def prediction_step(self, model, inputs, prediction_loss_only, ignore_keys=None):
        self.evaluate_prompts(inputs)
        return None, None, None

    # Checkpoints

    def _save_optimizer_and_scheduler(self, output_dir):
        super()._save_optimizer_and_scheduler(output_dir)
        self.save_state(output_dir)

    def _load_optimizer_and_scheduler(self, checkpoint):
        super()._load_optimizer_and_scheduler(checkpoint)
        self.resumed_from = checkpoint

    # What the rollout needs

    def metric(self, name: str, value: float, rows: int = 1) -> None:
        """Notes a figure of so many `rows`, averaged over them between two logs."""
        self._metrics["train" if self.model.training else "eval"][name] += [value] * rows

    def log(self, logs, start_time=None):
        figures = self._metrics["train" if self.model.training else "eval"]
        for name, extreme in EXTREMES.items():
            if name in figures:
                figures[name] = [extreme(figures[name])]
        super().log(logs, start_time)

    def rewards(self, rows, prompts, completions, completion_ids) -> torch.Tensor:
        """`(N, functions)` for the rows of all processes; NaN where a function has no opinion."""
        return self._calculate_rewards(rows, prompts, completions, completion_ids)

    def tokenized(self, prompts: list) -> list[list[int]]:
        """Ids of text or conversations, these with the chat template."""
        return self._tokenize_prompts(prompts)[0]

    def generate_with_vllm(self, prompt_ids: list[list[int]]) -> list[list[int]]:
        return self._generate_single_turn(prompt_ids, None, {})

    def whole_policy(self):
        """A context with the unwrapped policy, gathered under ZeRO-3, to generate with."""
        return unwrap_model_for_generation(
            self.model_wrapped, self.accelerator,
            gather_deepspeed3_params=self.args.ds3_gather_for_generation,
            gradient_checkpointing_kwargs=self.args.gradient_checkpointing_kwargs,
        )  # fmt: skip

    def log_table(self, prompts, completions, rewards: torch.Tensor, advantages: list[float]) -> None:
        """Rows of the table that `log_completions` prints, this process's texts and all processes' figures; and what
        reward functions have logged."""
        mine = len(prompts)
        self._logs["prompt"].extend(gather_object(prompts))
        self._logs["completion"].extend(gather_object(completions))
        for name, column in zip(self.reward_func_names, rewards.T.tolist(), strict=True):
            self._logs["rewards"][name].extend(column)
        self._logs["advantages"].extend(advantages)
        for name in sorted(set(gather_object(list(self._pending_extra_logs)))):
            self._logs["extra"][name].extend(gather_object(self._pending_extra_logs.get(name, [None] * mine)))
        for name in sorted(set(gather_object(list(self._pending_metrics)))):
            self.metric(name, statistics.fmean(gather_object(self._pending_metrics.get(name, []))))
        self._pending_extra_logs.clear()
        self._pending_metrics.clear()
