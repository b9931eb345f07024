"""How sure a score is, and a difference of two. Miller is Miller 2024 (arXiv 2411.00640)."""

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from llm_recipes.metrics import Z, wilson

Z_POWER = 0.841621  # 80 % quantile of the normal distribution
CLUSTERS = 20  # fewer do not say how much they differ; the sums of one cancel altogether


def _binary(values: np.ndarray) -> bool:
    return bool(np.isin(values, (0, 1)).all())


def mean_stderr(values: Sequence[float]) -> tuple[float, float]:
    """(mean, sample standard deviation / sqrt n), as lm-eval has it. The error of one value is NaN."""
    values = np.asarray(values, dtype=np.float64)
    if len(values) < 2:
        return float(values.mean()), math.nan
    return float(values.mean()), float(values.std(ddof=1) / math.sqrt(len(values)))


def estimate(values: Sequence[float], clusters: Sequence | None = None) -> tuple[float, float, float, float]:
    """(mean, standard error, low, high) with the 95 % interval of the mean; the error as in `clustered_stderr`.

    Wilson's interval where all values are 0 or 1 and there are no clusters, or too few, and where values in [0, 1] have
    no spread; or else mean -+ 1.96 standard errors, within [0, 1] if all values are.
    """
    values = np.asarray(values, dtype=np.float64)
    mean, stderr = clustered_stderr(values, clusters)
    low, high = mean - Z * stderr, mean + Z * stderr
    if values.min() < 0 or values.max() > 1:
        return mean, stderr, low, high
    if (_binary(values) and not _enough(clusters)) or not stderr > 1e-12:
        return mean, stderr, *wilson(values.sum(), len(values))  # of all with this mean, 0 and 1 vary most
    return mean, stderr, max(low, 0.0), min(high, 1.0)


def ratio_stderr(numerators: Sequence[float], denominators: Sequence[float]) -> tuple[float, float]:
    """(sum of numerators / sum of denominators, its standard error) over documents, such as nats a byte.

    Linearised: the error of the mean of numerator - ratio * denominator, divided by the mean denominator (Cochran 1977,
    chapter 6).
    """
    above, below = np.asarray(numerators, dtype=np.float64), np.asarray(denominators, dtype=np.float64)
    ratio = float(above.sum() / below.sum())
    return ratio, mean_stderr(above - ratio * below)[1] / float(below.mean())


def _enough(clusters: Sequence | None) -> bool:
    return clusters is not None and len(set(clusters)) >= CLUSTERS


def clustered_stderr(values: Sequence[float], clusters: Sequence | None) -> tuple[float, float]:
    """(mean, standard error) of values that are drawn in clusters, such as questions on one text (Miller, section 2).

    With the factor G / (G - 1) of G clusters, so that clusters of one value give `mean_stderr`, as do None and G < 20.
    """
    mean, stderr = mean_stderr(values)
    if _enough(clusters):
        rest = np.asarray(values, dtype=np.float64) - mean
        sums = np.bincount(np.unique(np.asarray(clusters), return_inverse=True)[1], weights=rest)
        stderr = math.sqrt((sums**2).sum() * len(sums) / (len(sums) - 1)) / len(rest)
    return mean, stderr


class Paired(NamedTuple):
    """Scores b less scores a on the same items."""

    difference: float
    stderr: float
    low: float  # of the 95 % interval
    high: float
    a_only: int  # items with the higher score in a
    b_only: int
    p: float | None  # two-sided, of McNemar's exact test; None where a score is neither 0 nor 1


def paired(a: Sequence[float], b: Sequence[float], clusters: Sequence | None = None) -> Paired:
    """Mean of the differences, which vary less than a difference of means does (Miller, section 4); clusters as above."""
    a, b = np.asarray(a, dtype=np.float64), np.asarray(b, dtype=np.float64)
    if a.shape != b.shape:
        raise ValueError(f"{len(a)} and {len(b)} scores are not of the same items")
    mean, stderr = clustered_stderr(b - a, clusters)
    a_only, b_only = int((a > b).sum()), int((b > a).sum())
    p = sign_test(a_only, b_only) if _binary(a) and _binary(b) else None
    return Paired(mean, stderr, mean - Z * stderr, mean + Z * stderr, a_only, b_only, p)


def sign_test(wins: int, losses: int) -> float:
    """Exact two-sided p of `wins` against `losses` if both were as likely, without the ties: McNemar's test of two models,
    by the items that one of them alone has right.
    """
    n, ways, few = wins + losses, 1, 0
    for k in range(min(wins, losses) + 1):
        few += ways
        ways = ways * (n - k) // (k + 1)  # n over k + 1, far faster than each anew
    return min(1.0, 2 * few / 2**n)


def pass_at_k(n: int, c: int, k: int) -> float:
    """Chance that one of k programs drawn from n, of which c are right, is right (Chen et al. 2021, eq. 1)."""
    if not 0 <= c <= n or not 1 <= k <= n:
        raise ValueError(f"pass@{k} of {c} right among {n} programs")
    return 1.0 - float(np.prod(1.0 - k / np.arange(n - c + 1, n + 1))) if n - c >= k else 1.0


def two_proportions(right_a: int, n_a: int, right_b: int, n_b: int) -> tuple[float, float]:
    """95 % interval of right_b / n_b - right_a / n_a, of different items (Newcombe 1998, method 10)."""
    a, b = right_a / n_a, right_b / n_b
    (low_a, high_a), (low_b, high_b) = wilson(right_a, n_a), wilson(right_b, n_b)
    return b - a - math.hypot(b - low_b, high_a - a), b - a + math.hypot(high_b - b, a - low_a)


def detectable(stderr: float) -> float:
    """The smallest true difference that is found at 5 % (two-sided) four times in five (Miller, section 5)."""
    return (Z + Z_POWER) * stderr
