"""PPOConfig: TRL's RLOOConfig with PPO's own keys, and without those that mean nothing here."""

from dataclasses import dataclass, field
from typing import Literal

from trl import RLOOConfig

from llm_recipes.ppo import _trl_compat

HARMLESS = {"cache_implementation", "cache_config", "prefill_chunk_size", "compile_config", "disable_compile"}


# Beyond them a formula turns around, or means nothing.
BOUNDS = {
    "gamma": (0, 1), "lam": (0, 1), "epsilon": (0, 1), "epsilon_high": (0, 100), "cliprange_value": (0, 1e9), "vf_coef": (0, 1e9),
    "score_clip": (0, 1e9), "kl_horizon": (1, 1e12), "critic_learning_rate": (0, 1), "critic_warmup_rollouts": (0, 1e9),
}  # fmt: skip


def _fixed(value):
    """A field of RLOOConfig that the trainer reads and nobody may set."""
    return field(init=False, default=value)


@dataclass
class PPOConfig(RLOOConfig):
    """Keys beyond TrainingArguments, generation, reward_weights and vLLM.

    A rollout is `per_device_train_batch_size * gradient_accumulation_steps * num_mini_batches` completions a process. It is
    trained on for `num_ppo_epochs`, each in `num_mini_batches` optimizer steps, and all `*_steps` count optimizer steps.
    Defaults are those of N+ (Huang et al. 2024, arXiv 2403.17031) for its smallest model.
    """

    num_ppo_epochs: int = field(default=4, metadata={"help": "Passes over a rollout."})
    num_mini_batches: int = field(default=1, metadata={"help": "Optimizer steps a pass."})
    num_generations: int = field(default=1, metadata={"help": "Completions a prompt."})
    kl_coef: float = field(
        default=0.05, metadata={"help": "Weight of the KL to the reference in the reward; 0 needs no reference."}
    )
    kl_estimator: Literal["k1", "k2", "k3"] = field(
        default="k1", metadata={"help": "k1 is unbiased; k2 and k3 are never negative (Schulman 2020)."}
    )
    kl_target: float | None = field(
        default=None, metadata={"help": "Adapt kl_coef to this KL a completion, in nats. Without it kl_coef is fixed."}
    )
    kl_horizon: int = field(default=10_000, metadata={"help": "Completions over which kl_coef adapts."})
    gamma: float = field(default=1.0, metadata={"help": "Discount."})
    lam: float = field(default=0.95, metadata={"help": "Lambda of generalised advantage estimation."})
    epsilon: float = field(default=0.2, metadata={"help": "The ratio is clipped to 1 - epsilon ..."})
    epsilon_high: float | None = field(default=None, metadata={"help": "... and 1 + epsilon_high, or 1 + epsilon."})
    cliprange_value: float | None = field(
        default=0.2, metadata={"help": "Values are held this near those of the rollout in the loss; null: no limit."}
    )
    critic: Literal["separate", "shared"] = field(
        default="separate",
        metadata={"help": "separate: a model of its own. shared: one layer on the policy's last hidden states."},
    )
    critic_learning_rate: float | None = field(
        default=None, metadata={"help": "Peak, on the policy's schedule; learning_rate without it."}
    )
    critic_warmup_rollouts: int = field(
        default=0, metadata={"help": "Rollouts on which a separate critic alone is trained."}
    )
    vf_coef: float = field(
        default=0.1,
        metadata={"help": "Weight, with a shared critic, of the value loss over the variance of the returns."},
    )
    whiten_advantages: bool = field(default=True, metadata={"help": "Mean 0 and variance 1 over each rollout."})
    whiten_rewards: bool = field(default=False, metadata={"help": "Variance 1 of the token rewards of a rollout."})
    score_clip: float | None = field(default=None, metadata={"help": "Scores are clipped to +- this."})
    missing_eos_penalty: float | None = field(
        default=None, metadata={"help": "Subtracted from the score of a completion that does not end by itself."}
    )
    learning_rate: float = 3e-6
    adam_epsilon: float = 1e-5
    temperature: float = 0.7

    steps_per_generation: int | None = _fixed(None)
    generation_batch_size: int | None = _fixed(None)
    num_iterations: int = _fixed(1)
    beta: float = _fixed(0.0)
    top_p: float = _fixed(1.0)
    top_k: int = _fixed(0)
    min_p: float | None = _fixed(None)
    repetition_penalty: float = _fixed(1.0)
    normalize_advantages: bool = _fixed(False)
    reward_clip_range: tuple[float, float] | None = _fixed(None)
    mask_truncated_completions: bool = _fixed(False)
    disable_dropout: bool = _fixed(True)
    remove_unused_columns: bool = _fixed(False)
    shuffle_dataset: bool = _fixed(True)
    pad_to_multiple_of: int | None = _fixed(None)
    log_multimodal: bool = _fixed(False)
    use_transformers_continuous_batching: bool = _fixed(False)
    transformers_continuous_batching_config: dict | None = _fixed(None)  # noqa: RUF009 - a field
    use_transformers_paged: bool = _fixed(False)
    num_generations_eval: int | None = _fixed(1)
    sync_ref_model: bool = _fixed(False)  # the moved reference would be lost on a resume
    ref_model_mixup_alpha: float = _fixed(0.6)
    ref_model_sync_steps: int = _fixed(512)
    neftune_noise_alpha: float | None = _fixed(None)
    label_smoothing_factor: float = _fixed(0.0)
    data_seed: int | None = _fixed(None)
    train_sampling_strategy: str = _fixed("random")
    include_num_input_tokens_seen: str | bool = _fixed("no")

    @property
    def steps_per_rollout(self) -> int:
        return self.num_ppo_epochs * self.num_mini_batches

    @property
    def rollout_size(self) -> int:
        """Completions of a rollout, over all processes."""
        return self.generation_batch_size

    def __post_init__(self):
        best = self.load_best_model_at_end or self.save_strategy == "best" or "plateau" in str(self.lr_scheduler_type)
        if best and self.metric_for_best_model is None:  # there is no eval_loss
            self.metric_for_best_model, self.greater_is_better = "eval_objective/score", True
        _trl_compat.check_training_arguments(self)  # RLOOConfig's own would ask for two completions a prompt
        self.steps_per_generation = self.gradient_accumulation_steps * self.num_mini_batches
        self.generation_batch_size = self.per_device_train_batch_size * self.steps_per_generation * self.world_size
        self.num_iterations, self.beta = self.num_ppo_epochs, self.kl_coef
        problems = [
            f"{key} must be at least 1"
            for key in ("num_ppo_epochs", "num_mini_batches", "num_generations", "max_completion_length")
            if not (getattr(self, key) or 0) >= 1
        ]
        problems += [
            f"{key} must lie between {low:g} and {high:g}, got {value:g}"
            for key, (low, high) in BOUNDS.items()
            if (value := getattr(self, key)) is not None and not low <= value <= high
        ]
        if self.temperature <= 0:
            problems.append("temperature must be above 0: PPO needs completions that the policy draws")
        if self.kl_coef < 0 or (self.kl_target is not None and (self.kl_target <= 0 or not self.kl_coef)):
            problems.append("kl_coef must not be negative, and above 0 with a kl_target above 0")
        if (
            self.kl_target and self.generation_batch_size >= 5 * self.kl_horizon
        ):  # it changes by up to a fifth of their ratio
            problems.append(
                f"kl_horizon {self.kl_horizon} must be above a fifth of a rollout of {self.generation_batch_size}"
            )
        if self.critic == "shared" and self.critic_warmup_rollouts:
            problems.append("critic_warmup_rollouts needs critic: separate: a shared one moves the policy too")
        if self.fp16:
            problems.append("fp16: use bf16: true: a second optimizer has no place in fp16's loss scaling")
        if others := {*(self.generation_kwargs or {})} - HARMLESS:
            problems.append(
                f"generation_kwargs: {min(others)} may draw from another distribution than the policy's, and the KL would be "
                f"wrong: only {', '.join(sorted(HARMLESS))} are taken"
            )
        size, every = self.generation_batch_size, self.steps_per_rollout
        if self.num_generations and (own := size // self.world_size) % self.num_generations:
            problems.append(
                f"num_generations {self.num_generations} does not divide the {own} completions of a process"
            )
        aligned = ["max_steps"] if self.max_steps > 0 else []
        if self.load_best_model_at_end or self.save_strategy == "best":
            aligned += ["eval_steps"] if self.eval_strategy == "steps" else []
            aligned += ["save_steps"] if self.save_strategy == "steps" else []
        for key in aligned:
            if every and (steps := getattr(self, key)) and steps % every:
                near = max(round(steps / every), 1) * int(every)
                problems.append(f"{key} {steps} is not a multiple of the {every} steps of a rollout: use {near:g}")
        if problems:
            raise ValueError("; ".join(problems))
