"""PPO's formulas: exact values worked out by hand, and what must hold on any mask."""

import math

import pytest
import torch

from llm_recipes.ppo.math import (
    LOG_RATIO,
    adapted,
    explained_variance,
    gae,
    kl,
    masked_mean,
    policy_loss,
    ratio,
    token_rewards,
    value_loss,
    whiten,
)

T = torch.tensor
NAN = float("nan")


def close(found, expected, atol=1e-6):
    return torch.allclose(found.double(), torch.as_tensor(expected, dtype=torch.float64), rtol=0, atol=atol)


def some(seed, rows=5, width=9):
    """Random values and a mask with holes, of which one row has all tokens and one a single one."""
    draw = torch.Generator().manual_seed(seed)
    mask = torch.rand(rows, width, generator=draw) < 0.6
    mask[0], mask[1] = True, torch.arange(width) == seed % width
    return [torch.randn(rows, width, generator=draw, dtype=torch.float64) for _ in range(3)], mask


# ---- generalised advantage estimation --------------------------------------------------------------

REWARDS, VALUES = T([[0.0, 0.0, 1.0]]), T([[0.5, 0.4, 0.3]])


@pytest.mark.parametrize(
    ("gamma", "lam", "advantages", "returns"),
    [
        (1.0, 0.95, [0.43675, 0.565, 0.7], [0.93675, 0.965, 1.0]),
        (0.9, 0.8, [0.12928, 0.374, 0.7], [0.62928, 0.774, 1.0]),
        (1.0, 1.0, [0.5, 0.6, 0.7], [1.0, 1.0, 1.0]),
        (1.0, 0.0, [-0.1, -0.1, 0.7], [0.4, 0.3, 1.0]),
    ],
)
def test_advantages_by_hand(gamma, lam, advantages, returns):
    found = gae(REWARDS, VALUES, torch.ones(1, 3, dtype=torch.bool), gamma, lam)
    assert close(found[0], [advantages]) and close(found[1], [returns])


def test_defaults_are_those_of_the_paper_on_language_models():
    assert close(gae(REWARDS, VALUES, torch.ones(1, 3, dtype=torch.bool))[0], [[0.43675, 0.565, 0.7]])


@pytest.mark.parametrize("what", [9.0, NAN, float("inf")])
def test_padding_counts_for_nothing(what):
    pad, mask = torch.full((1, 2), what), T([[True, True, True, False, False]])
    advantages, returns = gae(torch.cat([REWARDS, pad], 1), torch.cat([VALUES, pad], 1), mask)
    assert close(advantages, [[0.43675, 0.565, 0.7, 0, 0]]) and close(returns, [[0.93675, 0.965, 1.0, 0, 0]])


@pytest.mark.parametrize("place", [0, 1, 2])
def test_a_hole_is_stepped_over(place):
    """One decay from the token before it to the token after it, as if it were not there."""
    parts = [torch.cat([x[:, :place], T([[NAN]]), x[:, place:]], 1) for x in (REWARDS, VALUES)]
    mask = ~parts[0].isnan()
    advantages, returns = gae(*parts, mask)
    assert close(advantages[mask], [0.43675, 0.565, 0.7]) and close(returns[mask], [0.93675, 0.965, 1.0])
    assert advantages[~mask].tolist() == returns[~mask].tolist() == [0.0]


@pytest.mark.parametrize("seed", range(8))
def test_advantages_are_the_discounted_sum_of_td_errors(seed):
    """Schulman et al. 2015, equation 16, summed by force over the tokens that there are."""
    (rewards, values, _), mask = some(seed)
    gamma, lam = [(1.0, 0.95), (0.9, 0.8), (0.99, 1.0), (0.7, 0.0)][seed % 4]
    advantages, returns = gae(rewards, values, mask, gamma, lam)
    assert not advantages[~mask].any() and not returns[~mask].any()
    for row in range(len(mask)):
        places = mask[row].nonzero()[:, 0].tolist()
        r, v = rewards[row, places].tolist(), [*values[row, places].tolist(), 0.0]
        errors = [r[t] + gamma * v[t + 1] - v[t] for t in range(len(places))]
        expected = [
            sum((gamma * lam) ** (k - t) * errors[k] for k in range(t, len(places))) for t in range(len(places))
        ]
        assert close(advantages[row, places], expected, 1e-12)
        assert close(returns[row, places], [a + b for a, b in zip(expected, v, strict=False)], 1e-12)


# ---- KL and rewards --------------------------------------------------------------------------------

LOGP, REF = T([-1.0, -2.0]), T([-1.2, -1.5])


@pytest.mark.parametrize(
    ("estimator", "expected"), [("k1", [0.2, -0.5]), ("k2", [0.02, 0.125]), ("k3", [0.0187308, 0.1487213])]
)
def test_kl_estimates_by_hand(estimator, expected):
    assert close(kl(LOGP, REF, estimator), expected, 1e-7)


@pytest.mark.parametrize("seed", range(4))
def test_kl_estimates_of_a_distribution(seed):
    """Over all tokens, each with its probability, k1 and k3 give the KL; k2 gives nearly that where the two are close.
    k1 alone has either sign; all are 0 between equals."""
    draw = torch.Generator().manual_seed(seed)
    p = torch.randn(50, generator=draw, dtype=torch.float64).log_softmax(0)
    q = (p + 0.01 * torch.randn(50, generator=draw, dtype=torch.float64)).log_softmax(0)
    exact = torch.nn.functional.kl_div(q, p, log_target=True, reduction="sum").item()
    estimates = {name: kl(p, q, name) for name in ("k1", "k2", "k3")}
    mean = {name: (p.exp() * found).sum().item() for name, found in estimates.items()}
    assert mean["k1"] == pytest.approx(exact, rel=1e-9) == mean["k3"] and mean["k2"] == pytest.approx(exact, rel=0.05)
    assert (estimates["k1"] < 0).any() and (estimates["k1"] > 0).any()
    assert (estimates["k2"] >= 0).all() and (estimates["k3"] >= 0).all()
    assert all((kl(p, p, name) == 0).all() for name in ("k1", "k2", "k3"))


def test_only_k3_is_clamped():
    """Where the reference is far more likely, exp(30) would be the whole reward."""
    p, q = T([-30.0, -3.0]), T([0.0, -1.0])
    assert kl(p, q, "k3")[0] == 10 and kl(p, q, "k3")[1] == pytest.approx(math.e**2 - 1 - 2, rel=1e-5)
    assert kl(p, q, "k1").tolist() == [-30.0, -2.0] and kl(p, q, "k2").tolist() == [450.0, 2.0]


def test_another_estimator_is_refused():
    with pytest.raises(ValueError, match="'k4' is none of k1, k2, k3"):
        kl(LOGP, REF, "k4")


KL, MASK = T([[0.1, 0.2, 0.3], [0.4, 0.5, 0.6]]), T([[True, True, False], [True, True, True]])


def test_token_rewards_by_hand():
    found = token_rewards(T([2.0, -1.0]), KL, MASK, 0.05)
    assert close(found, [[-0.005, 1.99, 0], [-0.02, -0.025, -1.03]])


@pytest.mark.parametrize("seed", range(4))
def test_a_completion_has_its_score_less_the_penalty(seed):
    """At the last token, also where the mask has holes; what is masked may be NaN."""
    (penalty, _, _), mask = some(seed)
    scores = torch.arange(len(mask), dtype=torch.float64) + 1
    found = token_rewards(scores, torch.where(mask, penalty, NAN), mask, 0.3)
    assert close(found.sum(1), scores - 0.3 * torch.where(mask, penalty, 0).sum(1), 1e-12)
    for row in range(len(mask)):
        last = mask[row].nonzero()[-1].item()
        assert found[row, last] == pytest.approx(scores[row].item() - 0.3 * penalty[row, last].item())
        assert not found[row][~mask[row]].any()


@pytest.mark.parametrize(
    ("mean", "episodes", "expected"), [(12, 256, 0.201024), (5.4, 256, 0.199488), (0, 512, 0.197952)]
)
def test_the_coefficient_follows_the_kl(mean, episodes, expected):
    """Target 6, horizon 10,000; the error is held within 0.2, which 12 and 0 pass and 5.4 does not."""
    assert adapted(0.2, mean, 6.0, 10_000, episodes) == pytest.approx(expected, abs=1e-9)


def test_the_coefficient_rests_at_the_target():
    assert adapted(0.2, 6.0, 6.0, 10_000, 512) == 0.2
    assert adapted(0.2, 1e9, 6.0, 10_000, 512) == adapted(0.2, 7.3, 6.0, 10_000, 512) == pytest.approx(0.2 * 1.01024)


# ---- means and whitening ---------------------------------------------------------------------------

ROWS, KEPT = T([[1.0, 2.0, 3.0], [4.0, 5.0, 99.0]]), T([[True, True, True], [True, True, False]])
WHITE = T([[-1.26491, -0.63246, 0.0], [0.63246, 1.26491, 0.0]])


@pytest.mark.parametrize("x", [99.0, NAN, float("inf"), -1e30])
def test_whitened_by_hand(x):
    """Unbiased variance 2.5 of 1 to 5, over both rows at once; what is masked is nothing."""
    rows = ROWS.clone()
    rows[1, 2] = x
    assert close(whiten(rows, KEPT), WHITE, 1e-5)
    assert close(whiten(rows, KEPT, shift_mean=False), WHITE + 3 * KEPT, 1e-5)
    assert masked_mean(rows, KEPT) == 3


@pytest.mark.parametrize("seed", range(4))
def test_whitening_knows_no_scale_and_no_place(seed):
    (values, _, _), mask = some(seed)
    white = whiten(values, mask)
    assert abs(white[mask].mean()) < 1e-9 and white[mask].var() == pytest.approx(1, abs=1e-6)
    assert close(whiten(3 * values + 7, mask), white) and close(whiten(-values, mask), -white)
    order = torch.randperm(values.numel(), generator=torch.Generator().manual_seed(seed))
    moved = whiten(values.flatten()[order][None], mask.flatten()[order][None])
    assert close(moved, white.flatten()[order][None])
    kept = whiten(values, mask, shift_mean=False)
    assert close(kept[mask].mean(), values[mask].mean()) and not kept[~mask].any()


def test_nothing_to_whiten():
    """One value, or none, or equal ones: zeros rather than NaN."""
    for mask in (T([[False, True, False]]), torch.zeros(1, 3, dtype=torch.bool)):
        assert whiten(T([[NAN, 4.0, NAN]]), mask).tolist() == [[0.0, 0.0, 0.0]]
    assert whiten(T([[4.0, 4.0, 4.0]]), torch.ones(1, 3, dtype=torch.bool)).tolist() == [[0.0, 0.0, 0.0]]
    assert masked_mean(T([[NAN]]), T([[False]])) == 0


# ---- losses ----------------------------------------------------------------------------------------


def test_policy_loss_by_hand():
    """Clipped where the ratio has gone on where the advantage points; a step back is never clipped."""
    losses, clipped = policy_loss(T([1.5, 0.5, 1.5, 0.5]), T([1.0, -1.0, -1.0, 1.0]), 0.2)
    assert close(losses, [-1.2, 0.8, 1.5, -0.5]) and clipped.tolist() == [True, True, False, False]


def test_the_upper_clip_may_be_another():
    losses, clipped = policy_loss(T([1.5, 1.25, 0.5]), T([1.0, 1.0, -1.0]), 0.2, 0.3)
    assert close(losses, [-1.3, -1.25, 0.8]) and clipped.tolist() == [True, False, True]


def test_what_is_clipped_has_no_gradient():
    r = T([1.5, 0.5, 1.5, 0.5, 1.0], requires_grad=True)
    policy_loss(r, T([1.0, -1.0, -1.0, 1.0, 2.0]), 0.2)[0].sum().backward()
    assert r.grad.tolist() == [0, 0, 1, -1, -2]


def test_the_ratio_is_exactly_one_at_first_and_never_overflows():
    logps = T([-0.1, -5.3, -700.0])
    assert ratio(logps, logps).tolist() == [1.0, 1.0, 1.0]
    assert close(ratio(T([-1.0, -2.0]), T([-2.0, -1.0])), [math.e, 1 / math.e])
    far = ratio(T([0.0, -1000.0, 0.0, -21.0]), T([-1000.0, 0.0, -21.0, 0.0]))
    limits = [math.exp(LOG_RATIO), math.exp(-LOG_RATIO)]
    assert far.tolist() == pytest.approx(limits * 2, rel=1e-5) and limits[0] == pytest.approx(math.exp(20))


def test_value_loss_by_hand():
    """v 1, at the rollout .5, return 2: held at .7, half of 1.3 squared."""
    losses, clipped = value_loss(T([1.0]), T([0.5]), T([2.0]), 0.2)
    assert close(losses, [0.845]) and clipped.tolist() == [True]
    losses, clipped = value_loss(T([1.0]), T([0.5]), T([2.0]), None)
    assert close(losses, [0.5]) and clipped.tolist() == [False]
    # towards the return and within reach; and past the return, where the held one is nearer
    losses, clipped = value_loss(T([0.6, 3.0]), T([0.5, 1.9]), T([2.0, 2.0]))
    assert close(losses, [0.98, 0.5]) and clipped.tolist() == [False, False]


@pytest.mark.parametrize("seed", range(3))
def test_explained_variance(seed):
    (values, returns, _), mask = some(seed)
    assert explained_variance(returns, returns, mask) == 1 and explained_variance(returns - 5, returns, mask) == (
        pytest.approx(1)
    )
    assert explained_variance(torch.full_like(values, 0.3), returns, mask) == pytest.approx(0, abs=1e-12)
    assert explained_variance(-returns, returns, mask) == pytest.approx(-3)
    found = explained_variance(torch.where(mask, values, NAN), torch.where(mask, returns, NAN), mask)
    a, b = values[mask], returns[mask]
    assert found == pytest.approx(1 - ((b - a - (b - a).mean()) ** 2).sum().item() / ((b - b.mean()) ** 2).sum().item())


def test_returns_that_do_not_vary_have_no_explained_variance():
    """All scores are the same, say: NaN, which is logged as null, rather than an infinity."""
    (values, _, _), mask = some(0)
    assert explained_variance(values, torch.ones_like(values), mask).isnan()
    assert explained_variance(torch.ones_like(values), torch.ones_like(values), mask).isnan()
