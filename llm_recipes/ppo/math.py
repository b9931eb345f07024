"""The formulas of PPO for language models, in torch alone.

All tensors are `(B, T)`: B completions, T tokens, `mask` true where a completion has a token. What stands under the mask
counts for nothing, NaN included. N+ is Huang et al. 2024 (arXiv 2403.17031).
"""

import torch

LOG_RATIO = 20.0  # beyond it exp overflows; such a token is clipped anyway


def masked_mean(values: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    return torch.where(mask, values, 0).sum() / mask.sum().clamp(min=1)


def masked_variance(values: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """Over all tokens, divided by their number."""
    return masked_mean((values - masked_mean(values, mask)) ** 2, mask)


def whiten(values: torch.Tensor, mask: torch.Tensor, shift_mean: bool = True) -> torch.Tensor:
    """Unit (unbiased) variance over the mask, and mean 0, or the mean they had without `shift_mean`; 0 elsewhere."""
    mean = masked_mean(values, mask)
    variance = torch.where(mask, (values - mean) ** 2, 0).sum() / (mask.sum() - 1).clamp(min=1)
    whitened = (values - mean) * torch.rsqrt(variance + 1e-8)
    return torch.where(mask, whitened if shift_mean else whitened + mean, 0)


def kl(logprobs: torch.Tensor, ref_logprobs: torch.Tensor, estimator: str = "k1") -> torch.Tensor:
    """Per-token estimate of KL(policy || reference) from tokens that the policy drew (Schulman 2020, "Approximating KL").

    k1 = log p/q is unbiased and may be negative; k2 = (log p/q)^2 / 2; k3 = q/p - 1 + log p/q, clamped to 10, is neither
    biased nor negative.
    """
    difference = logprobs - ref_logprobs
    if estimator == "k1":
        return difference
    if estimator == "k2":
        return difference**2 / 2
    if estimator == "k3":
        return (torch.exp(-difference) - 1 + difference).clamp(max=10)
    raise ValueError(f"estimator {estimator!r} is none of k1, k2, k3")


def token_rewards(scores: torch.Tensor, kl: torch.Tensor, mask: torch.Tensor, coefficient: float) -> torch.Tensor:
    """-coefficient * kl at every token, plus the score `(B,)` at the last one (Ziegler et al. 2019, eq. 2)."""
    rewards = torch.where(mask, -coefficient * kl, 0)
    places = torch.arange(mask.shape[1], device=mask.device)
    last = torch.where(mask, places, -1).amax(1, keepdim=True)
    return rewards + torch.where(mask & (places == last), scores[:, None], 0)


def gae(
    rewards: torch.Tensor, values: torch.Tensor, mask: torch.Tensor, gamma: float = 1.0, lam: float = 0.95
) -> tuple[torch.Tensor, torch.Tensor]:
    """(advantages, returns): generalised advantage estimation (Schulman et al. 2015, eq. 16).

    `values` are those of the states before the tokens. The state after the last token has value 0, cut completions
    included. Tokens outside the mask are stepped over, as if they were not there.
    """
    advantages = torch.zeros_like(rewards)
    advantage = next_value = torch.zeros_like(rewards[:, 0])
    for t in reversed(range(rewards.shape[1])):
        delta = rewards[:, t] + gamma * next_value - values[:, t]
        advantage = torch.where(mask[:, t], delta + gamma * lam * advantage, advantage)
        next_value = torch.where(mask[:, t], values[:, t], next_value)
        advantages[:, t] = torch.where(mask[:, t], advantage, 0)
    return advantages, torch.where(mask, advantages + values, 0)


def ratio(logprobs: torch.Tensor, old_logprobs: torch.Tensor) -> torch.Tensor:
    return torch.exp((logprobs - old_logprobs).clamp(-LOG_RATIO, LOG_RATIO))


def policy_loss(
    ratio: torch.Tensor, advantages: torch.Tensor, epsilon: float = 0.2, epsilon_high: float | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """(loss, whether it is the clipped one) of each token (Schulman et al. 2017, eq. 7)."""
    clipped = ratio.clamp(1 - epsilon, 1 + (epsilon if epsilon_high is None else epsilon_high))
    losses, clipped_losses = -advantages * ratio, -advantages * clipped
    return torch.maximum(losses, clipped_losses), clipped_losses > losses


def value_loss(
    values: torch.Tensor, old_values: torch.Tensor, returns: torch.Tensor, clip: float | None = 0.2
) -> tuple[torch.Tensor, torch.Tensor]:
    """(loss, whether it is the clipped one) of each token: half the squared error, values held near those of the rollout."""
    losses = 0.5 * (values - returns) ** 2
    if clip is None:
        return losses, torch.zeros_like(losses, dtype=torch.bool)
    near = old_values + (values - old_values).clamp(-clip, clip)
    clipped_losses = 0.5 * (near - returns) ** 2
    return torch.maximum(losses, clipped_losses), clipped_losses > losses


def adapted(coefficient: float, kl: float, target: float, horizon: float, episodes: int) -> float:
    """The next KL coefficient after `episodes` completions with mean KL `kl` (Ziegler et al. 2019, section 2.2)."""
    error = min(max(kl / target - 1, -0.2), 0.2)
    return coefficient * (1 + error * episodes / horizon)


def explained_variance(values: torch.Tensor, returns: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """1 - Var(returns - values) / Var(returns), over the mask; NaN where the returns do not vary."""
    variance = masked_variance(returns, mask)
    return torch.where(variance > 0, 1 - masked_variance(returns - values, mask) / variance, torch.nan)
