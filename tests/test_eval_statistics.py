import itertools
import math
import random

import numpy as np
import pytest
from scipy import stats

from llm_recipes.evaluation.statistics import (
    clustered_stderr,
    detectable,
    estimate,
    mean_stderr,
    paired,
    pass_at_k,
    ratio_stderr,
    two_proportions,
)

approx = pytest.approx


def test_mean_and_error_by_hand():
    assert mean_stderr([1, 0, 0, 1]) == (0.5, approx(math.sqrt(1 / 12)))
    assert mean_stderr([2.0, 4.0, 9.0]) == (5.0, approx(math.sqrt(13 / 3)))
    mean, stderr = mean_stderr([3.0])
    assert mean == 3 and math.isnan(stderr)


def test_mean_and_error_are_those_of_lm_eval():
    metrics = pytest.importorskip("lm_eval.api.metrics")
    values = np.random.default_rng(0).normal(size=300).tolist()
    for some in (values, [1, 0] * 50, values[:2]):
        assert mean_stderr(some) == (approx(metrics.mean(some)), approx(metrics.mean_stderr(some)))


@pytest.mark.parametrize(("right", "n"), [(0, 5), (5, 5), (19, 1319), (1, 1), (82, 164)])
def test_shares_have_wilsons_interval(right, n):
    expected = stats.binomtest(right, n).proportion_ci(0.95, "wilson")
    assert estimate([1] * right + [0] * (n - right))[2:] == approx(tuple(expected), abs=1e-6)


def test_other_scores_have_a_normal_interval():
    assert estimate([2.0, 4.0, 9.0])[2:] == approx((5 - 1.959964 * math.sqrt(13 / 3), 5 + 1.959964 * math.sqrt(13 / 3)))
    values = [0, 1, 0.5] * 10
    half = 1.959964 * np.std(values, ddof=1) / math.sqrt(30)
    assert estimate(values)[2:] == approx((0.5 - half, 0.5 + half))


def test_the_error_of_a_ratio_agrees_with_the_bootstrap():
    """Nats that go with the bytes, as of documents of unlike sizes; the documents are drawn again as wholes."""
    draw = np.random.default_rng(1)
    size = draw.lognormal(6, 1, 400)
    nats = size * draw.normal(0.7, 0.1, 400) + 30
    ratio, stderr = ratio_stderr(nats, size)
    again = draw.integers(0, 400, (4000, 400))
    ratios = nats[again].sum(1) / size[again].sum(1)
    assert ratio == approx(nats.sum() / size.sum()) and stderr == approx(ratios.std(), rel=0.08)
    # documents of one size are values like others
    assert ratio_stderr(nats, np.full(400, 2.0)) == approx(tuple(x / 2 for x in mean_stderr(nats)))
    assert ratio_stderr(3 * size, size) == (approx(3), approx(0, abs=1e-12))


def test_the_clustered_error():
    values, draw = [1.0, 0.0, 1.0, 1.0, 0.0, 0.5], random.Random(0)
    # each its own cluster: nothing changes; the same questions twice: as if asked once, but for the n - 1
    assert clustered_stderr(values, range(6)) == approx(mean_stderr(values))
    many = values * 50
    assert clustered_stderr(many + many, [*range(300)] * 2) == approx(mean_stderr(many), rel=2e-3)
    # all pairs within a cluster, by brute force; cluster names may be texts in any order
    values = [draw.random() for _ in range(100)]
    clusters = [f"cluster {draw.randrange(25)}" for _ in values]
    rest, g = np.array(values) - np.mean(values), len(set(clusters))
    among = sum(rest[i] * rest[j] for i, j in itertools.product(range(100), repeat=2) if clusters[i] == clusters[j])
    expected = math.sqrt(among * g / (g - 1)) / 100
    assert g >= 20 and clustered_stderr(values, clusters) == (approx(np.mean(values)), approx(expected))


def test_few_clusters_are_none():
    """The residuals of one cluster sum to 0, and those of two nearly so: an error of 0 would be worth nothing."""
    draw = random.Random(0)
    values = [float(draw.random() < 0.25) for _ in range(190)]
    for clusters in (["a"] * 190, [i // 95 for i in range(190)], [i // 10 for i in range(190)]):
        assert clustered_stderr(values, clusters) == mean_stderr(values) and estimate(values, clusters) == estimate(
            values
        )
        assert paired(values, values[::-1], clusters) == paired(values, values[::-1])
    twenty = [i % 20 for i in range(190)]
    assert clustered_stderr(values, twenty)[1] != mean_stderr(values)[1]
    assert paired(values, values[::-1], twenty).stderr != paired(values, values[::-1]).stderr


@pytest.mark.parametrize("groups", [None, 1, 19, 20, 40])
def test_the_interval_of_an_estimate(groups):
    draw = random.Random(1)
    clusters = groups and [i % groups for i in range(80)]
    values = [float(draw.random() < 0.05) for _ in range(80)]
    mean, stderr, low, high = estimate(values, clusters)
    assert (mean, stderr) == clustered_stderr(values, clusters) and 0 <= low < mean < high <= 1
    plain = groups is None or groups < 20
    wilson = tuple(stats.binomtest(int(sum(values)), 80).proportion_ci(0.95, "wilson"))
    assert (low, high) == approx(
        wilson if plain else (max(0, mean - 1.959964 * stderr), mean + 1.959964 * stderr), abs=1e-6
    )
    # all alike: no clusters have been seen to differ
    for value, right in ((0.0, 0), (1.0, 80), (0.5, 40), (0.1, 8)):
        mean, stderr, low, high = estimate([value] * 80, clusters)
        expected = stats.binomtest(right, 80).proportion_ci(0.95, "wilson")
        assert (mean, stderr) == approx((value, 0)) and (low, high) == approx(tuple(expected), abs=1e-6)
    # shares stay shares, whatever their spread; other numbers do not
    mean, stderr, low, high = estimate([0.0] * 78 + [0.1, 1.0], clusters)
    assert low == 0 and mean < high == approx(mean + 1.959964 * stderr)
    mean, stderr, low, high = estimate([0.0] * 78 + [0.1, 2.0], clusters)
    assert low == approx(mean - 1.959964 * stderr) and low < 0 < mean < high
    assert math.isnan(estimate([1.0], ["a"])[1])


def test_clustered_errors_cover():
    """Of means of clusters that go up and down together, about 95 % lie within 1.96 clustered errors of the truth; the
    plain error is far too sure."""
    draw = np.random.default_rng(0)
    for g in (20, 60):
        hits = np.zeros(2)
        for _ in range(1000):
            values = np.repeat(draw.normal(size=g), 8) + 0.3 * draw.normal(size=8 * g)
            for i, (mean, stderr) in enumerate((clustered_stderr(values, np.repeat(range(g), 8)), mean_stderr(values))):
                hits[i] += abs(mean) < 1.96 * stderr
        assert 0.92 < hits[0] / 1000 < 0.98 and hits[1] / 1000 < 0.7


def test_paired_by_hand():
    a, b = [1, 1, 0, 0, 1, 0], [1, 0, 1, 1, 1, 1]
    found = paired(a, b)
    assert found.difference == approx(1 / 3) and (found.a_only, found.b_only) == (1, 3)
    assert found.stderr == approx(np.std([0, -1, 1, 1, 0, 1], ddof=1) / math.sqrt(6))
    assert found.p == approx(2 * (1 + 4) / 16)
    assert (found.high + found.low) / 2 == approx(1 / 3) and found.high - found.low == approx(
        2 * 1.959964 * found.stderr
    )


@pytest.mark.parametrize(
    ("a_only", "b_only"), [(0, 0), (1, 0), (5, 5), (0, 9), (3, 14), (40, 61), (900, 1011), (6000, 6300)]
)
def test_mcnemar_is_the_sign_test(a_only, b_only):
    a, b = [1] * a_only + [0] * b_only + [1, 0], [0] * a_only + [1] * b_only + [1, 0]
    expected = stats.binomtest(a_only, a_only + b_only).pvalue if a_only + b_only else 1.0
    assert paired(a, b).p == approx(expected, rel=1e-9) == paired(b, a).p


def test_paired_is_of_the_same_items():
    draw = np.random.default_rng(3)
    a, b = draw.random(50), draw.random(50)
    found, back, same = paired(a, b), paired(b, a), paired(a, a)
    assert found.p is None and found.difference == approx(b.mean() - a.mean()) == -back.difference
    assert found.stderr == approx(back.stderr) and (found.a_only, found.b_only) == (back.b_only, back.a_only)
    assert same[:6] == (0, 0, 0, 0, 0, 0)
    assert paired(a, b, range(50))[:6] == approx(found[:6])
    assert paired(a, b, [*range(25)] * 2).stderr == approx(clustered_stderr(b - a, [*range(25)] * 2)[1])
    with pytest.raises(ValueError, match="50 and 49 scores"):
        paired(a, b[:-1])


def test_pass_at_k_is_the_share_of_drawn_sets_with_a_right_one():
    for n in range(1, 8):
        for c in range(n + 1):
            for k in range(1, n + 1):
                sets = list(itertools.combinations([True] * c + [False] * (n - c), k))
                assert pass_at_k(n, c, k) == approx(sum(map(any, sets)) / len(sets))
    assert pass_at_k(200, 0, 100) == 0 and pass_at_k(200, 7, 1) == approx(0.035)


@pytest.mark.parametrize(("n", "c", "k"), [(5, 1, 6), (5, 6, 1), (5, -1, 1), (5, 1, 0)])
def test_pass_at_k_of_nothing(n, c, k):
    with pytest.raises(ValueError, match=f"pass@{k} of {c} right among {n}"):
        pass_at_k(n, c, k)


def test_two_proportions_as_newcombe_has_them():
    """The examples (a) to (h) of Newcombe 1998, table II, method 10, to its four digits."""
    cases = {
        (56, 70, 48, 80): (0.0524, 0.3339), (9, 10, 3, 10): (0.1705, 0.8090), (6, 7, 2, 7): (0.0582, 0.8062),
        (5, 56, 0, 29): (-0.0381, 0.1926), (0, 10, 0, 20): (-0.1611, 0.2775), (0, 10, 0, 10): (-0.2775, 0.2775),
        (10, 10, 0, 20): (0.6791, 1.0000), (10, 10, 0, 10): (0.6075, 1.0000),
    }  # fmt: skip
    for (right, n, other, m), expected in cases.items():
        assert two_proportions(other, m, right, n) == approx(expected, abs=6e-5)


def test_what_is_detectable_is_detected_four_times_in_five():
    draw = np.random.default_rng(0)
    means = detectable(0.1) + 0.1 * draw.normal(size=100_000)
    assert (means > 1.959964 * 0.1).mean() == approx(0.8, abs=0.005)
