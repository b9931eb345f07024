"""Scores of documents, and the same through `evaluate.load`."""

import json
import math
import os
import random
import subprocess
import sys

import numpy as np
import pytest

from llm_recipes.evaluation.extract import GSM8K_IGNORED
from llm_recipes.evaluation.scores import choice_scores, pass_scores, perplexity_scores
from llm_recipes.evaluation.statistics import estimate
from tests.running import ROOT

approx = pytest.approx


def test_choices_by_hand():
    """Characters and bytes change the order: -6 for 3 characters and -8 for 4 are equal, the first counts."""
    assert choice_scores([-6.0, -8.0], ["abc", "abcd"], 0) == {"acc": 1, "acc_norm": 1, "acc_bytes": 1}
    assert choice_scores([-6.0, -8.0], ["abc", "äöü€"], 1) == {"acc": 0, "acc_norm": 0, "acc_bytes": 1}
    assert choice_scores([-6.0, -7.9], ["abc", "abcd"], 1) == {"acc": 0, "acc_norm": 1, "acc_bytes": 1}
    assert choice_scores([-1.0, -1.0, -1.0], ["a", "b", "c"], 1) == {"acc": 0, "acc_norm": 0, "acc_bytes": 0}
    assert choice_scores([-9.0, -0.5], ["a", ""], 0) == {"acc": 0, "acc_norm": 1, "acc_bytes": 1}
    with pytest.raises(ValueError, match="zip"):
        choice_scores([-1.0], ["a", "b"], 0)


def test_choices_are_scored_as_in_lm_eval():
    """lm_eval.api.task: argmax of the sums, of the sums over len(choice), of the sums over its bytes."""
    rng = random.Random(0)
    for _ in range(500):
        choices = ["".join(rng.choices("ab é€", k=rng.randint(1, 6))) for _ in range(4)]
        logliks = [float(rng.randint(-9, -1)) for _ in choices]
        gold, lls = rng.randrange(4), np.array(logliks)
        by = {"acc": 1, "acc_norm": [len(c) for c in choices], "acc_bytes": [len(c.encode()) for c in choices]}
        expected = {name: float(np.argmax(lls / np.array(size)) == gold) for name, size in by.items()}
        assert choice_scores(logliks, choices, gold) == expected


def test_perplexities_are_those_of_lm_eval():
    metrics = pytest.importorskip("lm_eval.api.metrics")
    nats, counts = [30.0, 70.5], {"perplexity": (10, 20), "byte_perplexity": (50, 90), "word_perplexity": (9, 15)}
    found = perplexity_scores(
        sum(nats), *(sum(counts[k]) for k in ("perplexity", "byte_perplexity", "word_perplexity"))
    )
    for name, sizes in counts.items():
        pairs = list(zip((-n for n in nats), sizes, strict=True))
        assert found[name] == approx(metrics.weighted_perplexity(pairs))
    pairs = list(zip((-n for n in nats), counts["byte_perplexity"], strict=True))
    assert found["bits_per_byte"] == approx(metrics.bits_per_byte(pairs)) == approx(100.5 / 140 / math.log(2))
    assert perplexity_scores(1e6, 10, 10, 1)["word_perplexity"] == approx(math.exp(700))


def test_pass_scores_by_hand():
    assert pass_scores([True, False, False, False], [1, 2, 4]) == approx({"pass@1": 0.25, "pass@2": 0.5, "pass@4": 1})
    assert pass_scores([False] * 3, [1, 3]) == {"pass@1": 0, "pass@3": 0}
    with pytest.raises(ValueError, match="pass@5 of 0 right among 3"):
        pass_scores([False] * 3, [1, 5])


# one process for all four: that `evaluate` takes them from their folders without the network is what is tested
SCRIPT = """
import json, sys
import evaluate
calls = json.load(sys.stdin)
print(json.dumps([evaluate.load(sys.argv[1] + name).compute(**given) for name, given in calls]))
"""


def load_and_compute(home, *calls) -> list[dict]:
    env = os.environ | {"HF_HUB_OFFLINE": "1", "HF_HOME": str(home)}
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, str(ROOT / "eval/metrics") + "/"],
        input=json.dumps(calls), capture_output=True, text=True, env=env, cwd=home,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1])


def test_evaluate_loads_every_metric_offline(tmp_path):
    texts = {"predictions": ["$1,000", "b"], "references": ["It is\n#### 1000.", "c"]}
    options = {"ignore_case": True, "regexes_to_ignore": GSM8K_IGNORED}
    choices = [["abc", "abcd"], ["abc", "äöü€"]]
    logliks = [[-6.0, -8.0], [-6.0, -8.0]]
    programs = [
        ["def add(a, b):\n    return a + b", "def add(a, b):\n    return a - b", "import sys\nsys.exit(0)"],
        ["def two():\n    while True:\n        pass", "def two():\n    return 3", "def three():\n    return 2"],
    ]
    tests = ["assert add(2, 3) == 5", "assert two() == 2"]
    plain, loose, choice, perplexity, passed = load_and_compute(
        tmp_path,
        ("exact_match", texts),
        ("exact_match", texts | options),
        ("choice_accuracy", {"predictions": logliks, "choices": choices, "references": [0, 1]}),
        ("perplexity", {"predictions": [-30.0, -70.5], "tokens": [10, 20], "bytes": [50, 90], "words": [9, 15]}),
        ("pass_at_k", {"predictions": programs, "references": tests, "k": [1, 3], "strict": False}),
    )
    assert plain == {"exact_match": 0, "ci95": list(estimate([0, 0])[2:])}
    assert loose == {"exact_match": 0.5, "ci95": list(estimate([1, 0])[2:])}
    assert choice == {"acc": 0.5, "acc_norm": 0.5, "acc_bytes": 1.0}
    assert perplexity == approx(perplexity_scores(100.5, 30, 140, 24))
    assert passed == approx({"pass@1": 1 / 6, "pass@3": 0.5, "timeouts": 1})
