"""PPO for language models with a learnt critic, on Hugging Face's Trainer."""

from llm_recipes.ppo.config import PPOConfig
from llm_recipes.ppo.trainer import PPOTrainer

__all__ = ["PPOConfig", "PPOTrainer"]
