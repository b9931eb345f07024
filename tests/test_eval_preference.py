"""Preferences: the statistics against closed forms and other implementations, and the tools from sheets to DPO rows."""

import csv
import json
import math
import random
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import pytest

from llm_recipes.evaluation.preference import (
    RATINGS,
    align,
    append_vote,
    bootstrap,
    bradley_terry,
    krippendorff_alpha,
    length_controlled,
    logistic,
    majority,
    make_items,
    make_report,
    mean_interval,
    read_votes,
    share_interval,
)
from llm_recipes.evaluation.statistics import sign_test
from tests.running import ROOT, read_rows, run, write_rows

SHEETS, REPORT, JUDGE, EXPORT = (
    ROOT / f"eval/preference/{name}.py" for name in ("sheets", "report", "judge", "export")
)
NAN = math.nan


def sigmoid(x):
    return 1 / (1 + np.exp(-np.asarray(x, float)))


# ---- shares and tests -------------------------------------------------------------------------------


def test_wilson_of_one_vote_a_prompt_is_the_value_worked_out_by_hand():
    low, high = share_interval([1.0] * 8 + [0.0] * 2, list("abcdefghij"))
    assert (low, high) == pytest.approx((0.490162, 0.943318), abs=1e-5)
    # 8 of 10 as 6 wins, 4 ties; and no win at all
    assert share_interval([1.0] * 6 + [0.5] * 4, list("abcdefghij")) == pytest.approx((low, high))
    assert share_interval([0.0] * 10, range(10)) == pytest.approx((0, 0.277533), abs=1e-5)
    # three raters who agree are one vote: no narrower than the prompts allow
    assert share_interval([1.0] * 30, [n // 3 for n in range(30)]) == share_interval([1.0] * 10, range(10))


def test_sign_test_is_the_exact_binomial():
    assert sign_test(8, 2) == 2 * (1 + 10 + 45) / 1024 == sign_test(2, 8)
    assert sign_test(5, 5) == sign_test(0, 0) == 1 and sign_test(0, 6) == 1 / 32
    stats = pytest.importorskip("scipy.stats")
    for wins, losses in ((1, 7), (30, 12), (400, 350)):
        assert sign_test(wins, losses) == pytest.approx(stats.binomtest(wins, wins + losses).pvalue)


def test_bootstrap_over_prompts_covers_where_counting_votes_as_independent_does_not():
    draw, hit, naive = np.random.default_rng(0), 0, 0
    prompts = np.repeat(np.arange(40), 5)  # five raters who mostly agree
    for _ in range(200):
        won = draw.random(40) < 0.6
        votes = np.where(draw.random((40, 5)) < 0.9, won[:, None], ~won[:, None]).astype(float).ravel()
        truth = 0.9 * 0.6 + 0.1 * 0.4
        low, high = bootstrap(lambda weights, votes=votes: weights @ votes / weights.sum(), prompts, draws=200)[0]
        hit += low <= truth <= high
        low, high = share_interval(votes, range(200))
        naive += low <= truth <= high
    assert 0.90 <= hit / 200 <= 0.99 and naive / 200 < 0.8, (hit, naive)


def test_bootstrap_says_how_many_draws_had_no_value():
    def statistic(weights):
        return np.nan if weights[0] == 0 else weights[0]

    interval, undefined = bootstrap(statistic, range(10))
    assert np.isnan(interval).all() and 300 < undefined < 400  # (9 / 10)^10 = 35 %
    assert mean_interval([2, 4] * 50, range(100)) == pytest.approx((2.8, 3.2), abs=0.02)  # 3 +- 1.96 * 0.1


def test_no_interval_has_no_width():
    for values, prompts in (([4], ["p"]), ([4, 4, 4], list("pqr")), ([2, 5], ["p", "p"]), ([0.1] * 7, range(7))):
        assert np.isnan(mean_interval(values, prompts)).all()
    # shares of n prompts vary most where each is 0 or 1, so Wilson's is safe
    assert share_interval([0.5] * 12, [n // 2 for n in range(12)]) == share_interval([0.5] * 6, range(6))
    low, high = share_interval([1.0, 0.0], ["p", "p"])
    assert low < 0.1 and high > 0.9
    first, second = bradley_terry_draws([0.5] * 6, range(6)), bradley_terry_draws([1, 1, 0], ["p"] * 3)
    assert np.isnan(first).all() and np.isnan(second).all()


def bradley_terry_draws(scores, prompts):
    zero, one = np.zeros(len(scores), int), np.ones(len(scores), int)
    return bootstrap(lambda weights: bradley_terry(zero, one, np.array(scores, float), 2, weights), prompts)[0]


# ---- Bradley-Terry ----------------------------------------------------------------------------------


def battles(strengths, n, seed, ties=0.0):
    draw = np.random.default_rng(seed)
    first, second = np.array([draw.choice(len(strengths), 2, replace=False) for _ in range(n)]).T
    won = draw.random(n) < sigmoid(np.asarray(strengths)[first] - np.asarray(strengths)[second])
    return first, second, np.where(draw.random(n) < ties, 0.5, won)


@pytest.mark.parametrize("share", [0.5, 0.75, 0.9, 0.999])
def test_two_models_are_the_logit_of_the_win_rate(share):
    first, second = np.zeros(1000, int), np.ones(1000, int)
    a, b = bradley_terry(first, second, (np.arange(1000) < round(1000 * share)).astype(float), 2)
    assert a - b == pytest.approx(math.log(share / (1 - share))) and a + b == pytest.approx(0)
    halves = bradley_terry(np.zeros(2, int), np.ones(2, int), np.array([1.0, 0.5]), 2)  # ties are half wins
    assert halves[0] - halves[1] == pytest.approx(math.log(3))


@pytest.mark.parametrize("seed", range(5))
def test_bradley_terry_agrees_with_choix(seed):
    choix = pytest.importorskip("choix")
    first, second, scores = battles([0, 1, -2, 0.5, 3], 400, seed, ties=0.2)
    pairs = []  # twice each, so that a tie is a win for both
    for i, j, score in zip(first, second, scores, strict=True):
        pairs += {1: [(i, j)] * 2, 0: [(j, i)] * 2, 0.5: [(i, j), (j, i)]}[score]
    expected = choix.opt_pairwise(5, pairs, tol=1e-12)
    assert bradley_terry(first, second, scores, 5) == pytest.approx(expected - expected.mean(), abs=1e-5)


def test_bradley_terry_depends_on_no_order_and_no_names():
    first, second, scores = battles([0, 1, -1], 200, 0, ties=0.3)
    found = bradley_terry(first, second, scores, 3)
    order = np.random.default_rng(1).permutation(200)
    assert bradley_terry(first[order], second[order], scores[order], 3) == pytest.approx(found)
    assert bradley_terry(second, first, 1 - scores, 3) == pytest.approx(found)
    renamed = np.array([2, 0, 1])
    assert bradley_terry(renamed[first], renamed[second], scores, 3)[renamed] == pytest.approx(found)
    assert bradley_terry(first, second, scores, 3, np.full(200, 7.0)) == pytest.approx(found)


def test_bradley_terry_finds_planted_strengths_and_refuses_infinite_ones():
    first, second, scores = battles([-1, 0, 1], 20_000, 2)
    assert bradley_terry(first, second, scores, 3) == pytest.approx([-1, 0, 1], abs=0.06)
    zero, one = np.zeros(3, int), np.ones(3, int)
    assert np.isnan(bradley_terry(zero, one, np.ones(3), 2)).all()  # never lost
    assert np.isnan(bradley_terry(np.array([0, 0, 2, 2]), np.array([1, 1, 3, 3]), np.array([1, 0, 1, 0]), 4)).all()


# ---- length control ---------------------------------------------------------------------------------


def test_length_alone_gives_a_length_controlled_win_rate_of_half():
    draw = np.random.default_rng(0)
    a, b = draw.integers(50, 900, 300), draw.integers(50, 500, 300)  # a is longer most of the time
    pull = sigmoid(2.5 * np.tanh((a - b) / (a - b).std(ddof=1)))  # how often the longer one is preferred
    found = length_controlled(pull, a, b, range(300))
    assert pull.mean() > 0.65 and found["lc_win_rate"] == pytest.approx(0.5) and found["lc_undefined_draws"] == 0
    assert found["length_coefficient"] == pytest.approx(2.5)
    votes = (draw.random(300) < pull).astype(float)
    low, high = length_controlled(votes, a, b, range(300))["lc_ci95"]
    assert low < 0.5 < high


def test_length_control_finds_a_planted_effect_and_mirrors_with_the_names():
    draw = np.random.default_rng(1)
    a, b = draw.integers(50, 900, 6000), draw.integers(50, 500, 6000)
    votes = (draw.random(6000) < sigmoid(0.4 + 1.5 * np.tanh((a - b) / (a - b).std(ddof=1)))).astype(float)
    found = length_controlled(votes, a, b, range(6000))
    assert found["lc_win_rate"] == pytest.approx(sigmoid(0.4), abs=0.03)
    assert found["length_coefficient"] == pytest.approx(1.5, abs=0.15)
    assert found["lc_ci95"][0] < sigmoid(0.4) < found["lc_ci95"][1]
    mirrored = length_controlled(1 - votes, b, a, range(6000))
    assert mirrored["lc_win_rate"] == pytest.approx(1 - found["lc_win_rate"])
    assert mirrored["lc_ci95"] == pytest.approx([1 - end for end in found["lc_ci95"][::-1]])


def test_logistic_is_the_maximum_that_scipy_finds():
    optimize = pytest.importorskip("scipy.optimize")
    draw = np.random.default_rng(2)
    x, y, weights = draw.normal(size=(80, 3)), draw.choice([0, 0.5, 1], 80), draw.integers(0, 4, 80).astype(float)

    def loss(b):
        return -(weights * (y * np.log(sigmoid(x @ b)) + (1 - y) * np.log(sigmoid(-x @ b)))).sum()

    assert logistic(x, y, weights) == pytest.approx(optimize.minimize(loss, np.zeros(3), tol=1e-10).x, abs=1e-4)


@pytest.mark.parametrize(
    ("scores", "a", "b"),
    [
        (
            [1, 1, 0, 0],
            [9, 8, 1, 2],
            [5, 5, 5, 5],
        ),  # the longer one always wins, and there is no end to the coefficient
        ([1, 0, 1, 0], [5, 5, 5, 5], [5, 5, 5, 5]),
        ([1], [5], [4]),
        ([1, 0.5, 0], [6, 7, 6], [0, 0, 0]),  # tanh of 12 is 1 but for 2e-9
    ],
)
def test_length_control_is_none_where_it_cannot_be_told(scores, a, b):
    assert set(length_controlled(scores, a, b, range(len(a))).values()) == {None}


def test_lengths_that_differ_by_about_as_much_everywhere():
    """Answers of 600 and of 300 characters, give or take 15: nothing says what equal ones would have been voted."""
    draw = np.random.default_rng(0)
    for _ in range(200):
        a, b = 600 + draw.integers(-15, 16, 30), 300 + draw.integers(-15, 16, 30)
        votes = draw.choice([0, 0.5, 1], 30)
        assert length_controlled(votes, a, b, range(30))["lc_win_rate"] is None
    for off in range(100):  # up to where they tell
        found = length_controlled(votes, a + 5 * off - 300, b, range(30))
        assert all(value is None or np.isfinite(value).all() for value in found.values())
        assert off != 0 or 0 < found["lc_win_rate"] < 1


def test_draws_of_ties_alone_give_a_rate_without_an_interval():
    found = length_controlled([0.5] * 6, [1, 2, 3, 4, 5, 6], [3, 3, 3, 3, 3, 3], range(6))
    assert found["lc_win_rate"] == 0.5 and found["lc_ci95"] is None and found["lc_undefined_draws"] < 50


# ---- agreement --------------------------------------------------------------------------------------

# Krippendorff 2011, section C: four observers, twelve units
TEXTBOOK = np.array([
    [1, 2, 3, 3, 2, 1, 4, 1, 2, NAN, NAN, NAN], [1, 2, 3, 3, 2, 2, 4, 1, 2, 5, NAN, 3],
    [NAN, 3, 3, 3, 2, 3, 4, 2, 2, 5, 1, NAN], [1, 2, 3, 3, 2, 4, 4, 1, 2, 5, 1, NAN],
])  # fmt: skip


def test_alpha_of_krippendorffs_example():
    assert krippendorff_alpha(TEXTBOOK) == pytest.approx(0.743, abs=5e-4)
    assert krippendorff_alpha(TEXTBOOK, ordinal=True) == pytest.approx(0.815, abs=5e-4)
    assert krippendorff_alpha(TEXTBOOK * 10, ordinal=True) == krippendorff_alpha(TEXTBOOK, ordinal=True)  # ranks alone
    assert krippendorff_alpha(-TEXTBOOK) == pytest.approx(krippendorff_alpha(TEXTBOOK))  # names alone


@pytest.mark.parametrize("seed", range(5))
def test_alpha_agrees_with_the_package(seed):
    package = pytest.importorskip("krippendorff")
    draw = np.random.default_rng(seed)
    values = np.clip(draw.integers(1, 6, 40) + draw.integers(-1, 2, (4, 40)), 1, 5).astype(float)
    values[draw.random((4, 40)) < 0.3] = NAN
    for ordinal, level in ((False, "nominal"), (True, "ordinal")):
        expected = package.alpha(reliability_data=values, level_of_measurement=level)
        assert krippendorff_alpha(values, ordinal) == pytest.approx(expected)


def test_alpha_of_chance_of_perfection_and_of_nothing():
    assert abs(krippendorff_alpha(np.random.default_rng(0).integers(0, 2, (3, 5000)).astype(float))) < 0.03
    assert krippendorff_alpha(np.array([[1.0, 2, 3], [1, 2, 3]])) == 1
    assert math.isnan(krippendorff_alpha(np.array([[1.0, 1], [1, 1]])))
    assert math.isnan(krippendorff_alpha(np.array([[1.0, NAN], [NAN, 2]])))


# ---- sheets -----------------------------------------------------------------------------------------


def answered(model, n=40):
    return [{"doc_sha": None, "prompt": f"Question {i}?", "answer": f"{model} says {i}"} for i in range(n)]


def test_items_hold_each_pair_once_with_sides_that_depend_on_the_hash_alone():
    aligned = align({name: answered(name) for name in ("one", "two", "three")})
    items, identical = make_items(aligned, ["alice", "bob"], 0)
    assert len(items) == 40 * 3 == len({(item["prompt"], item["models"]) for item in items})
    assert [item["item"] for item in items] == list(range(1, 121)) and not any(e["count"] for e in identical)
    alice, bob = ([item["left"][rater] for item in items] for rater in ("alice", "bob"))
    assert (
        40 < sum(alice) < 80 and 40 < sum(bob) < 80 and 40 < sum(a != b for a, b in zip(alice, bob, strict=True)) < 80
    )
    again, _ = make_items(aligned[::-1], ["bob"], 0)  # fewer raters and another order: the same sides
    sides = {(item["prompt"], item["models"]): item["left"]["bob"] for item in again}
    assert all(sides[item["prompt"], item["models"]] == item["left"]["bob"] for item in items)
    assert [item["left"]["alice"] for item in make_items(aligned, ["alice"], 1)[0]] != alice


def test_sheets_of_runs_are_blind_and_leave_identical_answers_out(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("secret_sft", "secret_dpo"):
        Path(name, "open_ended").mkdir(parents=True)
        rows = [
            {"doc": i, "doc_sha": f"{i:016x}", "prompt": f"Question {i}?", "outputs": [text, "another"]}
            for i, text in enumerate(["same", f"=1+{name[-1]}", f"line\u2028one\n{name[-3:]}", "-7", "x", name[::-1]])
        ]
        rows[4]["outputs"] = ["x \n" if name.endswith("dpo") else "x"]
        write_rows(f"{name}/open_ended/samples.jsonl", rows if name.endswith("sft") else rows[::-1])
    command = ["--runs", "secret_sft", "secret_dpo", "--raters", "alice", "bob", "--output", "out"]
    done = run(*command, script=SHEETS)
    assert done.code == 0, done.err
    assert "secret_sft: 5 prompts have more than one output" in done.out
    assert "secret_sft | secret_dpo: 3 of 6 answers are identical and left out" in done.out and "3 items" in done.out
    key = json.loads(Path("out/key.json").read_text())
    assert key["models"] == ["secret_sft", "secret_dpo"] and key["identical"][0]["count"] == 3
    for rater in ("alice", "bob"):
        rows = read_rows_exactly(f"out/sheet-{rater}.jsonl")
        with open(f"out/sheet-{rater}.csv", encoding="utf-8-sig", newline="") as file:
            table = list(csv.DictReader(file))
        for item, row, cells in zip(key["items"], rows, table, strict=True):
            assert list(row) == ["item", "prompt", "left", "right"]
            side = item["left"][rater]
            assert (row["left"], row["right"]) == (item["answers"][side], item["answers"][1 - side])
            assert cells["left"] == ("'" if row["left"][0] == "=" else "") + row["left"] and cells["vote"] == ""
        for kind in ("jsonl", "csv"):
            assert "secret_" not in Path(f"out/sheet-{rater}.{kind}").read_text()
        assert Path(f"out/sheet-{rater}.csv").read_bytes().startswith(b"\xef\xbb\xbfitem,prompt")
    assert (again := run(*command, script=SHEETS)).code == 2 and "out has sheets" in again.err
    check(
        run(*command[:-1], "secret_sft/open_ended/samples.jsonl", script=SHEETS),
        "samples.jsonl cannot be made: File exists",
    )
    check(run(*command[:-1], "out/key.json/x", script=SHEETS), "out/key.json/x cannot be made: Not a directory")
    check(run(*command, "--raters", "alice", "bob", "Alice", script=SHEETS), "names that differ by case alone share")


def check(done, said: str) -> None:
    """One sentence and nothing else."""
    assert done.code == 2 and said in done.err and "Traceback" not in done.err and done.err.count("\n") == 1, done


def read_rows_exactly(path):
    """Lines end at \\n alone: answers may hold other line separators."""
    return [json.loads(line) for line in Path(path).read_text().split("\n") if line]


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda rows: rows[:-2], "2 only in one.jsonl, 0 only in two.jsonl, 3 in both"),
        (
            lambda rows: [row | {"prompt": "?" + row["prompt"]} for row in rows],
            "5 only in one.jsonl, 5 only in two.jsonl",
        ),
        (lambda rows: [*rows, rows[0]], "two.jsonl: 1 prompts are there more than once"),
        (lambda rows: [*rows[:3], {"prompt": "Q"}], "two.jsonl, row 4: needed are"),
        (lambda rows: [], "two.jsonl is empty"),
    ],
)
def test_runs_that_did_not_answer_the_same_prompts_are_refused(tmp_path, monkeypatch, change, said):
    monkeypatch.chdir(tmp_path)
    write_rows("one.jsonl", answered("one", 5))
    write_rows("two.jsonl", change(answered("two", 5)))
    done = run("--runs", "one.jsonl", "two.jsonl", "--output", "out", script=SHEETS)
    assert done.code == 2 and said in done.err and not Path("out").exists(), done.err


def test_one_document_with_two_prompts_is_refused(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("one", "two"):
        write_rows(f"{name}.jsonl", [{"doc_sha": "ab", "prompt": f"Q {name}", "answer": name}])
    done = run("--runs", "one.jsonl", "two.jsonl", script=SHEETS)
    assert done.code == 2 and "1 documents have one prompt in one.jsonl and another in two.jsonl" in done.err


# ---- votes ------------------------------------------------------------------------------------------


@pytest.fixture
def sheets(tmp_path, monkeypatch):
    """A folder `out` of sheets for alice, bob and carol on 12 prompts and two models, and its key."""
    monkeypatch.chdir(tmp_path)
    rng = random.Random(0)
    for name in ("one", "two"):
        text = [f"{name} {i} {'word ' * rng.randint(1, 30)}" for i in range(12)]
        write_rows(f"{name}.jsonl", [{"prompt": f"Question {i}?", "answer": t} for i, t in enumerate(text)])
    command = ["--runs", "one.jsonl", "two.jsonl", "--raters", "alice", "bob", "carol", "--output", "out"]
    assert run(*command, script=SHEETS).code == 0
    return json.loads(Path("out/key.json").read_text())


def vote(key, rater, number, outcome, **ratings):
    """The rater votes by model: outcome a, b, tie or bad."""
    left = key["items"][number - 1]["left"][rater]
    side = {"ab"[left]: "left", "ba"[left]: "right"}.get(outcome, outcome)
    append_vote(f"out/votes-{rater}.jsonl", {"item": number, "vote": side, **ratings})


def test_the_last_vote_counts_and_a_torn_line_does_not_take_the_next_one_with_it(sheets):
    vote(sheets, "alice", 1, "a")
    vote(sheets, "alice", 2, "b")
    vote(sheets, "alice", 1, "tie")
    assert [(row["item"], row["vote"] == "tie") for row in read_votes("out", sheets)] == [(1, True), (2, False)]
    with open("out/votes-alice.jsonl", "a") as file:
        file.write('{"item": 3, "vo')
    vote(sheets, "alice", 4, "bad")
    assert [len(line) > 20 for line in Path("out/votes-alice.jsonl").read_text().splitlines()].count(True) == 4
    done = run("--sheets", "out", script=REPORT)
    assert done.code == 2 and "out/votes-alice.jsonl, line 4 is not JSON: mend or delete it" in done.err


@pytest.mark.parametrize("delimiter", [",", ";"])
def test_a_filled_in_spreadsheet_counts_as_votes(sheets, delimiter):
    path = Path("out/sheet-bob.csv")
    with path.open(encoding="utf-8-sig", newline="") as file:
        header, *rows = csv.reader(file)
    at = {name: header.index(name) for name in header}
    rows[0][at["vote"]], rows[0][at["left_helpful"]], rows[4][at["vote"]] = "Left", "4", " tie "
    with path.open("w", encoding="utf-8", newline="") as file:
        csv.writer(file, delimiter=delimiter).writerows([header, *rows])
    votes = read_votes("out", sheets)
    assert [(row["rater"], row["item"], row["vote"], row["left_helpful"]) for row in votes] == [
        ("bob", 1, "left", 4), ("bob", 5, "tie", None),
    ]  # fmt: skip
    vote(sheets, "bob", 5, "a")
    done = run("--sheets", "out", script=REPORT)
    path.write_bytes(path.read_bytes().replace(b"Question", "Qu\u00e9stion".encode("latin-1")))
    assert "out/sheet-bob.csv is not UTF-8" in run("--sheets", "out", script=REPORT).err
    assert done.code == 2 and "bob voted on 1 items both in" in done.err


@pytest.mark.parametrize(
    ("row", "said"),
    [
        ({"item": 99, "vote": "left"}, "there is no item 99"),
        ({"item": 1, "vote": "a"}, "item 1: a vote is one of left, right, tie, bad"),
        ({"item": 1, "vote": "tie", "left_honest": 7}, "ratings are 1 to 5"),
        ({"item": 1, "vote": "tie", "left_honest": True}, "ratings are 1 to 5"),
        ({"item": True, "vote": "tie"}, "there is no item True"),
        ({"item": [1], "vote": "tie"}, "there is no item [1]"),
        ({"item": 1, "vote": ["tie"]}, "item 1: a vote is one of"),
        ({"vote": "tie"}, "there is no item None"),
    ],
)
def test_what_is_no_vote_is_refused(sheets, row, said):
    append_vote("out/votes-alice.jsonl", row)
    check(run("--sheets", "out", script=REPORT), said)
    assert not Path("out/report.json").exists()


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("item,vote\n1,left\n2,tie\n1,right\n", "two votes on item 1: delete one"),
        ("item,Vote\n1,left\n", "the first row has to name the columns"),
        ("1,left\n", "the first row has to name the columns"),
        ("item,vote\none,left\n", "there is no item one"),
    ],
)
def test_a_spreadsheet_that_is_none_of_ours_is_refused(sheets, text, said):
    Path("out/sheet-bob.csv").write_text(text)
    check(run("--sheets", "out", script=REPORT), said)


def test_long_answers_and_an_emptied_spreadsheet(sheets):
    path = Path("out/sheet-bob.csv")
    path.write_text(f"item,vote,left\n1,left,{'x' * 200_000}\n")
    assert [row["item"] for row in read_votes("out", sheets)] == [1]
    path.write_text("")
    assert read_votes("out", sheets) == []


JUDGED = {"item": 1, "judge": "j", "first": "a", "second": "a", "vote": "a"}


@pytest.mark.parametrize(
    ("rows", "said"),
    [
        ([{"item": 1}], "judge.jsonl, row 1 is none of judge.py's"),
        ([JUDGED, JUDGED | {"item": 2, "vote": "left"}], "judge.jsonl, row 2 is none of judge.py's"),
        ([JUDGED | {"first": ["a"]}], "row 1 is none of judge.py's"),
        ([JUDGED | {"item": [1]}], "row 1: there is no item [1]"),
        ([JUDGED, JUDGED], "row 2: there is no item 1, or it is there twice"),
        ([JUDGED | {"item": 13}], "row 1: there is no item 13"),
        ([], "judge.jsonl is empty"),
    ],
)
def test_what_no_judge_wrote_is_refused(sheets, rows, said):
    vote(sheets, "alice", 1, "a")
    write_rows("judge.jsonl", rows)
    check(run("--sheets", "out", "--judge", "judge.jsonl", script=REPORT), said)
    assert not Path("out/report.json").exists()


def test_a_damaged_key_is_one_sentence(sheets):
    vote(sheets, "alice", 1, "a")
    item = sheets["items"][0]
    damaged = [
        {},
        [],
        sheets | {"items": []},
        sheets | {"items": [1]},
        sheets | {"raters": None},
        sheets | {"raters": ["x"]},
    ]
    damaged.append(sheets | {"items": [{name: item[name] for name in item if name != "answers"}]})
    for key in damaged:
        Path("out/key.json").write_text(json.dumps(key))
        check(run("--sheets", "out", script=REPORT), "out/key.json is damaged")
    check(run("--sheets", "out", "--output", "x.jsonl", script=EXPORT), "out/key.json is damaged")
    check(run("--sheets", "out", "--model_name_or_path", "none", script=JUDGE), "out/key.json is damaged")
    assert not Path("out/report.json").exists()


def test_outputs_that_cannot_be_written_are_refused_first(sheets, endpoint):
    """Of the judge before it is asked: no server is there."""
    vote(sheets, "alice", 1, "a")
    Path("folder").mkdir()
    for output, said in (("none/x", "none is not a folder"), ("one.jsonl/x", "one.jsonl is not a folder")):
        check(run("--sheets", "out", "--output", output, script=EXPORT), said)
        judging = ["--endpoint", "http://127.0.0.1:9", "--judge_model", "stub", "--output", output]
        check(run("--sheets", "out", *judging, script=JUDGE), said)
    check(run("--sheets", "out", "--output", "folder", script=EXPORT), "folder is a folder: name a file in it")
    check(run("--sheets", "out", *judging[:-1], "x", "--batch_size", 0, script=JUDGE), "--batch_size 0: needs a number")
    Path("out/report.json").mkdir()
    check(run("--sheets", "out", script=REPORT), "out/report.json is a folder")


def test_what_has_no_interval_is_said(sheets):
    for number in range(1, 7):
        vote(sheets, "alice", number, "tie", left_helpful=3 if number == 1 else None)
    done = run("--sheets", "out", script=REPORT)
    assert done.code == 0 and "| one.jsonl | 1000 [no interval] |" in done.out, done.err
    assert " | 50.0 [18.8, 81.2] | 1 | 50.0 [no interval] | " in done.out and " | 3.00 [no interval] | " in done.out
    assert done.out.count("[no interval]: the draws of the bootstrap are all alike") == 1
    report = json.loads(Path("out/report.json").read_text())
    assert [row["ci95"] for row in report["bradley_terry"]["scores"]] == [None, None]


def voted(key, seed=0):
    """Ratings and votes of three raters who see one.jsonl ahead, and one of whom stops early."""
    rng = random.Random(seed)
    for rater in ("alice", "bob", "carol"):
        for number in range(1, 13 if rater != "carol" else 8):
            left = key["items"][number - 1]["left"][rater]
            good = {side: 2 + 2 * ((side == "left") == (left == 0)) + rng.randint(0, 1) for side in ("left", "right")}
            ratings = {name: good[name.split("_")[0]] for name in RATINGS}
            vote(key, rater, number, rng.choices(["a", "b", "tie", "bad"], [6, 2, 1, 1])[0], **ratings)
    return read_votes("out", key)


def test_report_of_hand_counted_votes(sheets):
    for number, outcome in enumerate(["a", "a", "a", "b", "tie", "bad"], 1):
        vote(sheets, "alice", number, outcome, left_helpful=5, right_helpful=2)
    vote(sheets, "bob", 1, "a")
    vote(sheets, "bob", 4, "a")
    done = run("--sheets", "out", script=REPORT)
    assert done.code == 0, done.err
    report = json.loads(Path("out/report.json").read_text())
    (pair,) = report["pairs"]
    counts = [pair[name] for name in ("votes", "prompts", "wins", "losses", "ties", "both_bad", "alpha_items")]
    assert counts == [8, 6, 5, 1, 1, 1, 2] and pair["win_rate"] == 6 / 8
    assert pair["sign_test_p"] == 2 / 8  # three prompts for a, none for b; on the fourth the raters cancel out
    scores = {row["model"]: row["score"] for row in report["bradley_terry"]["scores"]}
    assert scores["one.jsonl"] - scores["two.jsonl"] == pytest.approx(400 / math.log(10) * math.log(3))
    assert sum(scores.values()) == pytest.approx(2000)
    assert report["raters"]["alice"]["votes"] == 6 and report["raters"]["carol"]["votes"] == 0
    left = [
        row["vote"] == "left" for r in ("alice", "bob") for row in read_rows(f"out/votes-{r}.jsonl")
        if row["vote"] in ("left", "right")
    ]  # fmt: skip
    assert report["left_wins"]["share"] == sum(left) / 6 and report["left_wins"]["n"] == 6
    rated = report["ratings"]["models"]
    assert sum(model["helpful"]["mean"] * model["helpful"]["n"] for model in rated.values()) == 6 * 7
    assert {model["helpful"]["n"] for model in rated.values()} == {6} and "honest" not in rated["one.jsonl"]
    assert "| one.jsonl | two.jsonl | 8 | 5 / 1 / 1 / 1 | 75.0 [" in done.out


def test_report_depends_on_no_order_of_votes_and_mirrors_when_models_are_swapped(sheets):
    votes = voted(sheets)
    report = make_report(sheets, votes, [])
    shuffled = make_report(sheets, random.Random(1).sample(votes, len(votes)), [])
    assert flat(shuffled) == pytest.approx(flat(report), nan_ok=True)
    swapped = sheets | {"models": sheets["models"][::-1], "items": [
        item | {"models": item["models"][::-1], "answers": item["answers"][::-1]}
        | {"left": {rater: 1 - side for rater, side in item["left"].items()}} for item in sheets["items"]
    ]}  # fmt: skip
    mirror = make_report(swapped, votes, [])
    (one,), (two,) = report["pairs"], mirror["pairs"]
    for name, ends in (("win_rate", "ci95"), ("lc_win_rate", "lc_ci95")):
        assert two[name] == pytest.approx(1 - one[name])
        assert two[ends] == pytest.approx([1 - end for end in one[ends][::-1]])
    for name in ("sign_test_p", "alpha", "length_coefficient"):
        assert two[name] == pytest.approx(one[name])
    by_name = [{row["model"]: row for row in found["bradley_terry"]["scores"]} for found in (report, mirror)]
    for model in sheets["models"]:
        assert by_name[0][model]["score"] == pytest.approx(by_name[1][model]["score"])
        assert by_name[0][model]["ci95"] == pytest.approx(by_name[1][model]["ci95"])
    for part in ("models", "alpha"):
        assert flat(mirror["ratings"][part]) == pytest.approx(flat(report["ratings"][part]))
    assert mirror["left_wins"] == report["left_wins"] and mirror["raters"] == report["raters"]


def flat(value) -> dict:
    """{path: number} of all numbers in nested lists and dicts."""
    if isinstance(value, dict | list):
        parts = value.items() if isinstance(value, dict) else enumerate(value)
        return {f"{name}/{path}": number for name, part in parts for path, number in flat(part).items()}
    return {"": value} if isinstance(value, int | float) else {}


def test_report_finds_planted_ratings_side_bias_and_three_models():
    runs = {name: answered(name, 60) for name in ("weak", "middle", "strong")}
    items, identical = make_items(align(runs), ["r", "s"], 0)
    key = {"seed": 0, "models": list(runs), "raters": ["r", "s"], "identical": identical, "items": items}
    rng, votes, level = random.Random(0), [], {"weak": 2, "middle": 3, "strong": 4}
    for item in items:
        for rater in ("r", "s"):
            left = item["left"][rater]
            quality = [level[item["models"][side]] for side in (left, 1 - left)]
            won = "left" if rng.random() < sigmoid(quality[0] - quality[1] + 0.8) else "right"  # 0.8 for the left
            rated = {f"{side}_helpful": q for side, q in zip(("left", "right"), quality, strict=True)}
            votes.append({"rater": rater, "item": item["item"], "vote": won, **rated})
    report = make_report(key, votes, [])
    assert len(report["pairs"]) == 3 and report["left_wins"]["ci95"][0] > 0.5
    for row, truth in zip(report["bradley_terry"]["scores"], (-1, 0, 1), strict=True):
        assert row["ci95"][0] < 1000 + truth * 400 / math.log(10) < row["ci95"][1]
    for model, helpful in ((model, found["helpful"]) for model, found in report["ratings"]["models"].items()):
        assert helpful["mean"] == level[model] and helpful["ci95"] is None and helpful["n"] == 240  # all alike
        assert helpful["share_4_or_5"] == (model == "strong")
    assert report["ratings"]["alpha"]["helpful"] == {"alpha": 1.0, "units": 360}
    assert abs(report["pairs"][0]["alpha"]) < 0.4


# ---- export -----------------------------------------------------------------------------------------


def test_majority():
    assert majority(["a", "a", "b"]) == "a" and majority(["bad"]) == "bad"
    assert majority(["a", "b"]) is None and majority(["a", "tie", "bad"]) is None


def test_export_gives_rows_that_dpo_encodes(sheets):
    from transformers import AutoTokenizer

    from llm_recipes.config import Source
    from llm_recipes.conversations import Encoder, encode_rows, load_chat_tokenizer, to_preference
    from llm_recipes.datasets import load_rows
    from llm_recipes.tokenization import train_tokenizer

    for rater in ("alice", "bob", "carol"):
        vote(sheets, rater, 1, "a")
        vote(sheets, rater, 2, {"carol": "a"}.get(rater, "b"))
        vote(sheets, rater, 3, "tie")
        vote(sheets, rater, 4, "bad")
        vote(sheets, rater, 5, {"alice": "a", "bob": "b", "carol": "tie"}[rater])
    vote(sheets, "bob", 6, "b")
    done = run("--sheets", "out", "--output", "preferences.jsonl", script=EXPORT)
    assert done.code == 0, done.err
    said = "3 of 12 items written to preferences.jsonl; left out: 1 ties, 1 both bad, 1 no majority, 6 without a vote"
    assert said in done.out
    rows = load_rows(Source(path="preferences.jsonl")).to_list()
    one, two, six = (sheets["items"][number - 1]["answers"] for number in (1, 2, 6))
    chosen, rejected = ([row[side][0]["content"] for row in rows] for side in ("chosen", "rejected"))
    assert chosen == [one[0], two[1], six[1]] and rejected == [one[1], two[0], six[0]]
    assert to_preference(rows[0])[0] == [{"role": "user", "content": sheets["items"][0]["prompt"]}]
    train_tokenizer([{"text": "one two word Question user assistant"}] * 50, 290).save_pretrained("base")
    encoder = Encoder(load_chat_tokenizer("base", "main").tokenizer)
    encoded = encode_rows(encoder, rows, "pairs", None)
    assert [row["chosen_ids"] != row["rejected_ids"] for row in encoded] == [True] * 3
    assert AutoTokenizer.from_pretrained("base").decode(encoded[0]["chosen_ids"]).startswith(one[0])


def test_nothing_to_export_or_to_report_is_an_error(sheets):
    vote(sheets, "alice", 1, "tie")
    done = run("--sheets", "out", "--output", "preferences.jsonl", script=EXPORT)
    assert done.code == 2 and "no item has a winner (left out: 1 ties, 11 without a vote)" in done.err
    Path("out/votes-alice.jsonl").unlink()
    assert (done := run("--sheets", "out", script=REPORT)).code == 2 and "out has no votes yet" in done.err
    assert (done := run("--sheets", "nowhere", script=REPORT)).code == 2 and "nowhere has no key.json" in done.err


# ---- judge ------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def judges(tmp_path_factory):
    """Folders with a tokenizer, with (`chat`) and without (`plain`) chat template, of a model that always says A."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    from llm_recipes.conversations import load_chat_tokenizer
    from llm_recipes.tokenization import train_tokenizer
    from tests.running import TINY_MODEL

    folder = tmp_path_factory.mktemp("judges")
    text = [{"text": "Compare two answers to a prompt. Which one is better? Question A B word one two"}] * 50
    plain = train_tokenizer(text, 300)
    plain.save_pretrained(folder / "plain")
    chat = load_chat_tokenizer(str(folder / "plain"), "main").tokenizer
    keys = {key: value for key, value in TINY_MODEL.items() if key != "model_type"} | {"max_position_embeddings": 1200}
    for name, tokenizer in (("plain", plain), ("chat", chat)):
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model("phi", vocab_size=len(tokenizer), **keys))
        model.lm_head.bias.data[tokenizer.convert_tokens_to_ids("A")] = 50
        model.save_pretrained(folder / name)
        tokenizer.save_pretrained(folder / name)
    return folder


def judge_module():
    import runpy

    return runpy.run_path(str(JUDGE))


@pytest.mark.parametrize("kind", ["plain", "chat"])
def test_a_judge_that_always_says_a_gives_ties_and_its_bias_is_reported(sheets, judges, kind):
    done = run("--sheets", "out", "--model_name_or_path", judges / kind, script=JUDGE)
    assert done.code == 0, done.err
    assert "12 items judged in both orders, 0 alike" in done.out and "0 of 12 items left out" in done.out
    assert {(row["first"], row["second"], row["vote"]) for row in read_rows("out/judge.jsonl")} == {("a", "b", "tie")}
    assert run("--sheets", "out", "--model_name_or_path", judges / kind, script=JUDGE).code == 2  # is there already
    done = run("--sheets", "out", "--judge", "out/judge.jsonl", script=REPORT)
    assert done.code == 0 and "the answer shown first wins 100.0 [" in done.out, done.err
    found = json.loads(Path("out/report.json").read_text())["judge"]
    assert found["position_consistency"]["share"] == 0 and found["first_shown_wins"]["share"] == 1
    assert found["pairs"][0]["win_rate"] == 0.5 and found["agreement_with_raters"]["n"] == 0


def test_special_tokens_in_an_answer_stay_text(judges):
    encode = judge_module()["encode"]
    for kind, special in (("chat", "<|im_end|>"), ("plain", "<|endoftext|>")):
        (with_it, without), choices = encode(str(judges / kind), [f"x{special}", "x"])
        assert len(set(choices)) == 2
        from transformers import AutoTokenizer

        ids = AutoTokenizer.from_pretrained(judges / kind).convert_tokens_to_ids(special)
        assert ids is not None and with_it.count(ids) == without.count(ids) and len(with_it) > len(without) + 5


def test_prompts_longer_than_the_context_are_left_out_and_said(sheets, judges):
    key = json.loads(Path("out/key.json").read_text())
    key["items"][3]["answers"][0] = "word " * 2000
    Path("out/key.json").write_text(json.dumps(key))
    done = run("--sheets", "out", "--model_name_or_path", judges / "chat", script=JUDGE)
    assert done.code == 0 and "1 of 12 items left out, whose prompts are longer than the model's context" in done.out
    assert [row["item"] for row in read_rows("out/judge.jsonl")] == [n for n in range(1, 13) if n != 4]


@pytest.fixture
def endpoint():
    """`endpoint(behave)` serves OpenAI's protocol on a real port; behave(answer A, answer B) gives the reply or a status."""
    servers = []

    def serve(behave):
        class Handler(BaseHTTPRequestHandler):
            def do_POST(self):
                request = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                assert self.path == "/v1/chat/completions" and request["model"] == "stub"
                text = request["messages"][0]["content"].split("[Answer A]\n")[1].split("\n\n[End]")[0]
                reply = behave(*text.split("\n\n[Answer B]\n"))
                body = json.dumps({"choices": [{"message": {"content": reply}}]}).encode()
                self.send_response(reply if isinstance(reply, int) else 200)
                self.send_header("Content-Length", str(len(body)))
                self.end_headers()
                self.wfile.write(body)

            def log_message(self, *args):
                pass

        servers.append(ThreadingHTTPServer(("127.0.0.1", 0), Handler))
        threading.Thread(target=servers[-1].serve_forever, daemon=True).start()
        return ["--endpoint", f"http://127.0.0.1:{servers[-1].server_port}/v1", "--judge_model", "stub"]

    yield serve
    for server in servers:
        server.shutdown()
        server.server_close()


def test_an_endpoint_that_prefers_one_model_is_consistent_and_agrees_with_raters_who_do(sheets, endpoint):
    prefers_one = endpoint(lambda a, b: "A" if a.startswith("one") else " **B**\nbecause")
    done = run("--sheets", "out", *prefers_one, script=JUDGE)
    assert done.code == 0 and "12 items judged in both orders, 12 alike; 0 with" in done.out, done.err
    for number in range(1, 9):
        vote(sheets, "alice", number, "a" if number < 7 else "bad")
    assert run("--sheets", "out", "--judge", "out/judge.jsonl", script=REPORT).code == 0
    found = json.loads(Path("out/report.json").read_text())["judge"]
    assert found["position_consistency"]["share"] == 1 and found["first_shown_wins"]["share"] == 0.5
    assert found["pairs"][0]["wins"] == 12 and found["agreement_with_raters"] | {"ci95": 0} == {
        "share": 0.75, "ci95": 0, "n": 8,
    }  # fmt: skip


def test_replies_that_are_no_letter_are_ties_and_refused_texts_are_left_out(sheets, endpoint):
    texts = [item["answers"] for item in sheets["items"]]

    def behave(a, b):
        return "Both are fine" if a == texts[0][0] else 413 if a == texts[1][1] else "A" if len(a) > len(b) else "B"

    done = run("--sheets", "out", *endpoint(behave), script=JUDGE)
    assert done.code == 0, done.err
    assert "1 with a reply that is no answer" in done.out and "1 of 12 items left out" in done.out
    rows = {row["item"]: row for row in read_rows("out/judge.jsonl")}
    assert (rows[1]["first"], rows[1]["vote"]) == ("none", "tie") and 2 not in rows
    longer = {n: "ab"[len(b) > len(a)] for n, (a, b) in enumerate(texts, 1) if len(a) != len(b)}
    assert all(rows[n]["vote"] == winner for n, winner in longer.items() if n > 2)


def test_an_endpoint_that_fails_is_one_sentence(sheets, endpoint):
    done = run("--sheets", "out", *endpoint(lambda a, b: 500), script=JUDGE)
    assert done.code == 2 and "replies 500" in done.err and not Path("out/judge.jsonl").exists()
    done = run("--sheets", "out", *endpoint(lambda a, b: 413), script=JUDGE)
    assert done.code == 2 and "12 of 12 items left out, whose prompts the endpoint refuses" in done.err
    done = run("--sheets", "out", "--endpoint", "http://127.0.0.1:9/v1", "--judge_model", "stub", script=JUDGE)
    assert done.code == 2 and "http://127.0.0.1:9/v1: " in done.err
    for url in ("http://127.0.0.1:port", "httpx"):
        check(run("--sheets", "out", "--endpoint", url, "--judge_model", "stub", script=JUDGE), f"{url}: ")
    check(run("--sheets", "out", *endpoint(lambda a, b: ["A"]), script=JUDGE), "expected string")
