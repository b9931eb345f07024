"""eval/compare.py on folders written by hand in the format of eval/run.py."""

import json
import math
import re
import runpy
import sys

import numpy as np
import pytest

from llm_recipes.evaluation.statistics import detectable, estimate, mean_stderr, paired
from tests.running import ROOT

A, B = [1, 1, 0, 0, 1, 0, 0, 0], [1, 0, 1, 1, 1, 1, 0, 1]


def write_run(folder, scores, task="gsm8k", name="outputs/a", outputs=None, extra=None, **changed):
    """`scores` are those of the documents, a list of dicts; `changed` replaces what results.json says of the task."""
    metrics = {}
    for metric in scores[0]:
        values = [score[metric] for score in scores]
        if metric not in ("nats", "bytes"):
            mean, stderr, *ends = estimate(values)
            metrics[metric] = {"value": mean, "stderr": stderr, "ci95": ends, "n": len(values)}
    figures = {
        "version": "lm-eval 3", "protocol": "5-shot", "num_fewshot": 5, "seed": 1234, "n": len(scores), "limit": None,
        "data": {"path": "openai/gsm8k", "sha256": "ab" * 32}, "generation": {"max_new_tokens": 256}, "sandbox": None,
        "truncated": 0, "seconds": 1.0, "metrics": metrics | (extra or {}),
    }  # fmt: skip
    (folder / task).mkdir(parents=True)
    file, model = folder / "results.json", {"name": name, "fingerprint": "0123456789abcdef", "dtype": "float32"}
    results = json.loads(file.read_text()) if file.exists() else {"schema": 1, "model": model, "tasks": {}}
    results["tasks"][task] = figures | changed
    file.write_text(json.dumps(results))
    with (folder / task / "scores.jsonl").open("w") as lines, (folder / task / "samples.jsonl").open("w") as raw:
        for doc, score in enumerate(scores):
            line = {"doc": doc, "doc_sha": f"{doc:016x}"}
            lines.write(json.dumps(line | ({"scores": score} if score else {})) + "\n")
            given = outputs[doc] if outputs else f"out {doc}"
            raw.write(
                json.dumps(
                    line | {"prompt": "x" * 400 + f"\u2028\nQuestion {doc}", "outputs": [given]}, ensure_ascii=False
                )
                + "\n"
            )
    return folder


def exact(values) -> list[dict]:
    return [{"exact_match": float(value)} for value in values]


@pytest.fixture
def compare(monkeypatch, capsys):
    """Runs the command; returns (exit code, stdout, stderr)."""

    def run(*argv):
        monkeypatch.setattr(sys, "argv", ["compare.py", *map(str, argv)])
        code = 0
        try:
            runpy.run_path(str(ROOT / "eval/compare.py"), run_name="__main__")
        except SystemExit as stop:
            code = stop.code
        return code, *capsys.readouterr()

    return run


def cells(out: str, *start: str) -> list[str]:
    """The cells after `start` of the one table row that begins so."""
    (row,) = (line for line in out.splitlines() if line.startswith(f"| {' | '.join(start)} |"))
    return [cell.strip() for cell in row.split("|")[1:-1]][len(start) :]


def test_two_runs(tmp_path, compare):
    a, b = write_run(tmp_path / "a", exact(A)), write_run(tmp_path / "b", exact(B), name="outputs/b")
    code, out, _ = compare(a, b)
    low, high = estimate(A)[2:]
    assert code == 0 and cells(out, "gsm8k", "exact_match", "8")[0] == f"0.375 [{low:.4g}, {high:.4g}]"
    found = paired(A, B)
    assert cells(out, "gsm8k", "exact_match", "B - A") == [
        "+0.375", f"[{found.low:.4g}, {found.high:.4g}]", "0.375", "1", "4", f"{detectable(found.stderr):.4g}",
    ]  # fmt: skip
    assert found.p == 2 * (1 + 5) / 2**5
    assert f"A: {a}, model outputs/a (0123456789ab, float32)" in out and f"B: {b}, model outputs/b" in out
    assert "samples" not in out and "document 1" not in out


def test_one_run_and_three(tmp_path, compare):
    folders = [write_run(tmp_path / name, exact(scores)) for name, scores in (("a", A), ("b", B), ("c", A))]
    _, out, _ = compare(folders[0])
    assert cells(out, "gsm8k", "exact_match")[0] == "8" and "difference" not in out
    code, out, _ = compare(*folders)
    assert code == 0 and len(cells(out, "gsm8k", "exact_match", "8")) == 3
    assert cells(out, "gsm8k", "exact_match", "C - A") == ["+0", "n/a", "1", "0", "0", "n/a"]
    assert cells(out, "gsm8k", "exact_match", "B - A")[0] == "+0.375"


def test_scores_that_are_no_shares(tmp_path, compare):
    draw = np.random.default_rng(0)
    a, b = ([{"pass@10": float(x)} for x in draw.random(20)] for _ in range(2))
    runs = [write_run(tmp_path / name, scores) for name, scores in (("a", a), ("b", b))]
    _, out, _ = compare(*runs)
    mean, stderr = mean_stderr([score["pass@10"] for score in a])
    assert cells(out, "gsm8k", "pass@10", "20")[0] == f"{mean:.4g} ± {1.959964 * stderr:.4g}"
    assert cells(out, "gsm8k", "pass@10", "B - A")[2] == "n/a"  # no McNemar


def test_bits_per_byte_are_paired_through_their_nats(tmp_path, compare):
    draw = np.random.default_rng(0)
    size = draw.integers(100, 5000, 50)
    a, b = 0.7 * size + draw.normal(0, 5, 50), 0.65 * size + draw.normal(0, 5, 50)
    runs = []
    for name, nats in (("a", a), ("b", b)):
        scores = [{"nats": float(x), "bytes": int(y)} for x, y in zip(nats, size, strict=True)]
        bits = float(nats.sum() / size.sum() / math.log(2))
        extra = {"bits_per_byte": {"value": bits, "stderr": None, "ci95": None, "n": 50}}
        extra["byte_perplexity"] = {"value": 2**bits, "stderr": None, "ci95": None, "n": 50}
        runs.append(write_run(tmp_path / name, scores, task="perplexity", extra=extra))
    _, out, _ = compare(*runs)
    values = cells(out, "perplexity", "bits_per_byte", "50")
    difference = cells(out, "perplexity", "bits_per_byte", "B - A")
    assert float(difference[0]) == pytest.approx(float(values[1]) - float(values[0]), abs=1e-3)
    low, high = map(float, re.findall(r"-?[\d.]+", difference[1]))
    assert low < -0.05 / math.log(2) < high and high - low < 0.01
    assert difference[3:5] == [str((b < a).sum()), str((b > a).sum())]
    assert "perplexity | byte_perplexity | B - A" not in out
    assert "No difference, for single documents have no such score: perplexity byte_perplexity.\n" in out


def test_figures_have_four_digits(tmp_path, compare):
    extra = {"word_perplexity": {"value": 1.23456789e23, "stderr": 1e22, "ci95": [1.1111111e23, 1.4444444e23], "n": 3}}
    thirds = [[1 / 3, 2 / 3, 0.0], [2 / 3, 1.0, 0.0]]
    runs = [write_run(tmp_path / name, exact(values), extra=extra) for name, values in zip("ab", thirds, strict=True)]
    code, out, _ = compare(*runs, "--samples", 3)
    assert code == 0 and cells(out, "gsm8k", "word_perplexity", "3") == ["1.235e+23 [1.111e+23, 1.444e+23]"] * 2
    assert '{"exact_match": 0.3333}' in out and '{"exact_match": 0.6667}' in out and not re.search(r"\.[1-9]\d{4}", out)


def test_groups_are_clusters(tmp_path, compare):
    a, b = [1, 1, 0, 0, 1, 0, 0, 0] * 6, [1, 0, 1, 1, 1, 1, 0, 1] * 6
    runs = [write_run(tmp_path / name, exact(scores)) for name, scores in (("a", a), ("b", b))]
    groups = [f"subject {i // 2}" for i in range(48)]
    for run in runs:
        file = run / "gsm8k/scores.jsonl"
        lines = [json.loads(line) | {"group": g} for line, g in zip(file.read_text().splitlines(), groups, strict=True)]
        file.write_text("".join(json.dumps(line) + "\n" for line in lines))
    found = paired(a, b, groups)
    assert found.stderr != paired(a, b).stderr
    assert cells(compare(*runs)[1], "gsm8k", "exact_match", "B - A")[1] == f"[{found.low:.4g}, {found.high:.4g}]"


def test_samples_are_those_that_differ(tmp_path, compare):
    a = write_run(tmp_path / "a", exact(A), outputs=[f"first\nof {i}" for i in range(8)])
    b = write_run(tmp_path / "b", exact(B), outputs=[f"second {i}" for i in range(8)])
    _, out, _ = compare(a, b, "--samples", 2)
    assert f"gsm8k: {a} and {b} differ on 5 documents; here 2" in out
    assert re.findall(r"-- document (\d)", out) == ["1", "2"]
    assert "(the last 300 of 412 characters)" in out and "    Question 1\n" in out and "x" * 300 not in out
    assert (
        f'-- {a}, {{"exact_match": 1.0}}:\n    first\n    of 1\n-- {b}, {{"exact_match": 0.0}}:\n    second 1\n' in out
    )
    _, out, _ = compare(a, b, "--samples", 99)
    assert len(re.findall("-- document", out)) == 5 and "here 5" in out


def test_limited_runs_are_marked(tmp_path, compare):
    runs = [write_run(tmp_path / name, exact(A), limit=8) for name in "ab"]
    assert cells(compare(*runs)[1], "gsm8k (first 8)", "exact_match", "8")


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({"version": "lm-eval 2"}, "version 'lm-eval 3' against 'lm-eval 2'"),
        ({"protocol": "0-shot"}, "protocol '5-shot' against '0-shot'"),
        ({"num_fewshot": 0}, "num_fewshot 5 against 0"),
        ({"limit": 8}, "limit None against 8"),
        ({"data": {"path": "openai/gsm8k", "sha256": "cd"}}, "data sha256 'abab"),
    ],
)
def test_what_is_not_the_same_task_is_refused(tmp_path, compare, changed, said):
    a, b = write_run(tmp_path / "a", exact(A)), write_run(tmp_path / "b", exact(A), **changed)
    code, out, err = compare(a, b)
    assert (code, out) == (2, "") and said in err and f"{a} and of {b} cannot be compared" in err
    assert "Traceback" not in err
    # but the tasks that are the same can be
    for run in (a, b):
        write_run(run, exact(A), task="mmlu")
    assert compare(a, b)[0] == 2 and compare(a, b, "--task", "mmlu")[0] == 0


def test_other_documents_are_refused(tmp_path, compare):
    a, b = write_run(tmp_path / "a", exact(A)), write_run(tmp_path / "b", exact(A))
    file = b / "gsm8k/scores.jsonl"
    file.write_text(file.read_text().replace(f"{3:016x}", "f" * 16))
    code, out, err = compare(a, b)
    assert (code, out) == (2, "") and "document 3 is another" in err


def test_another_way_to_generate_is_said(tmp_path, compare):
    a, b = write_run(tmp_path / "a", exact(A)), write_run(tmp_path / "b", exact(A), generation={"max_new_tokens": 9})
    code, out, _ = compare(a, b)
    assert code == 0 and 'gsm8k: not the same generation: A {"max_new_tokens": 256}; B {"max_new_tokens": 9}' in out


def test_tasks_of_one_run_alone_are_named(tmp_path, compare):
    a, b = write_run(tmp_path / "a", exact(A)), write_run(tmp_path / "b", exact(A))
    write_run(b, exact(A), task="mmlu")
    code, out, _ = compare(a, b)
    assert code == 0 and f"mmlu: left out, only in {b}\n" in out
    code, _, err = compare(a, b, "--task", "mmlu")
    assert code == 2 and "no task to compare named mmlu; in all runs: gsm8k" in err


def test_runs_that_are_not_finished(tmp_path, compare):
    a, b = write_run(tmp_path / "a", exact(A)), write_run(tmp_path / "b", exact(A))
    file = b / "gsm8k/scores.jsonl"
    file.write_text("".join(file.read_text().splitlines(True)[:5]))
    assert "has 5 documents and results.json 8" in compare(a, b)[2]
    for damaged in (
        '{"doc": 0',
        "[1]\n" * 8,
        '{"doc": 0, "scores": {"exact_match": 1.0}}\n' * 8,
        '{"doc_sha": "0"}\n' * 8,
    ):
        file.write_text(damaged)
        code, out, err = compare(a, b)
        assert (code, out) == (2, "") and str(file) in err and "Traceback" not in err, err
    file.unlink()
    assert compare(a, b)[:2] == (2, "")
    write_run(tmp_path / "c", exact(A))
    file = tmp_path / "c/gsm8k/samples.jsonl"
    lines = file.read_text().split("\n")[:-1]
    for damaged in (
        [],
        lines[1:],
        [*lines[1:], lines[1]],
        [*lines[1:], '{"doc": 0}'],
        [*lines[1:], "{}"],
        [*lines, "{"],
    ):
        file.write_text("\n".join(damaged))
        assert compare(a, tmp_path / "c")[0] == 0
        code, out, err = compare(a, tmp_path / "c", "--samples", 1)
        assert (code, out) == (2, "") and str(file) in err and "Traceback" not in err, err
    assert "--samples -1: needs a number" in compare(a, a, "--samples", -1)[2]
    (b / "results.json").write_text("{}")
    code, _, err = compare(a, b)
    assert code == 2 and f"{b / 'results.json'} is not a results file" in err
    code, _, err = compare(a, tmp_path / "none")
    assert code == 2 and "none has no results.json" in err


def test_tasks_without_scores_of_documents(tmp_path, compare):
    """What lm-eval ran itself; windows of one stream; answers that nobody scores."""
    whole = {"acc": {"value": 0.25, "stderr": 0.1, "ci95": [0.05, 0.45], "n": 8}}
    bits = {"bits_per_byte": {"value": 1.5, "stderr": None, "ci95": None, "n": 2}}
    windows = [{"nats": 9.0, "bytes": 12}, {"nats": 3.0, "bytes": 0}]
    for name in "ab":
        run = write_run(tmp_path / name, [{}] * 3, task="open", outputs=[f"{name} 0", "same", f"{name} 2"])
        write_run(run, [{}], task="lm_eval:piqa", extra=whole, data={"path": "piqa", "sha256": None})
        write_run(run, windows, task="strided", extra=bits)
        (run / "lm_eval:piqa/scores.jsonl").unlink()
        (run / "strided/samples.jsonl").write_text('{"doc": 0, "nats": 9.0}\n{"doc": 1, "nats": 3.0}\n')
    code, out, err = compare(tmp_path / "a", tmp_path / "b", "--samples", 5)
    assert code == 0, err
    assert cells(out, "open", "no score") == ["3", "n/a", "n/a"]
    assert cells(out, "lm_eval:piqa", "acc", "1") == ["0.25 ± 0.2"] * 2
    assert "No difference, for single documents have no such score: lm_eval:piqa acc, strided bits_per_byte.\n" in out
    assert (
        "B - A" not in out and "paired by document" not in compare(tmp_path / "a", tmp_path / "b", "--task", "open")[1]
    )
    assert "lm_eval:piqa: lm-eval ran it, no samples are kept" in out and "strided: its samples are windows" in out
    assert re.findall(r"-- document (\d)", out) == ["0", "2"] and "    a 2\n" in out and "    b 2" in out
