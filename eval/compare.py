"""Evaluations side by side: python eval/compare.py RUN [RUN ...] [--task T] [--samples N], each an output_dir of eval/run.py."""

import argparse
import json
import math
from pathlib import Path
from typing import NamedTuple

from llm_recipes.errors import UserError, entrypoint
from llm_recipes.evaluation.results import load_results, markdown, read_jsonl
from llm_recipes.evaluation.statistics import Paired, detectable, paired, ratio_stderr
from llm_recipes.metrics import Z

SAME = ("version", "protocol", "num_fewshot", "limit")  # and data.sha256: what makes two scores comparable
SHOWN = 300  # characters of a prompt's end


class Run(NamedTuple):
    path: Path
    results: dict


def read_run(path: str) -> Run:
    """Raises UserError where there is no results.json of an evaluation."""
    results = load_results(Path(path))
    if results is None:
        raise UserError(f"{path} has no results.json: it is no output_dir of a finished eval/run.py")
    return Run(Path(path), results)


def check_same(first: Run, other: Run, task: str) -> None:
    """Raises UserError where the two did not do the same task in the same way on the same data."""
    a, b = (
        {key: run.results["tasks"][task][key] for key in SAME}
        | {"data sha256": run.results["tasks"][task]["data"]["sha256"]}
        for run in (first, other)
    )
    differ = [f"{key} {a[key]!r} against {b[key]!r}" for key in a if a[key] != b[key]]
    if differ:
        raise UserError(f"{task} of {first.path} and of {other.path} cannot be compared: {'; '.join(differ)}")


def read_scores(runs: list[Run], task: str) -> list[list[dict]] | None:
    """Lines of scores.jsonl of each run; None for a task that lm-eval ran, which keeps none.

    Raises UserError where documents are missing or not the same.
    """
    if runs[0].results["tasks"][task]["data"]["sha256"] is None:
        return None
    scores = []
    for run in runs:
        file, n = run.path / task / "scores.jsonl", run.results["tasks"][task]["n"]
        scores.append(read_jsonl(file))
        if len(scores[-1]) != n:
            raise UserError(f"{file} has {len(scores[-1])} documents and results.json {n}: run the evaluation again")
        for i, (ours, theirs) in enumerate(zip(scores[0], scores[-1], strict=True)):
            if not {"doc", "doc_sha", *scores[0][0]} <= theirs.keys():
                raise UserError(f"{file}, document {i} is damaged: run the evaluation again")
            if ours["doc_sha"] != theirs["doc_sha"]:
                raise UserError(
                    f"{task} of {runs[0].path} and of {run.path} cannot be compared: document {i} is another"
                )
    return scores


def difference(a: list[dict], b: list[dict], metric: str) -> Paired | None:
    """Of a metric that is the mean of documents' scores, or of bits a byte; None for another."""
    if all(metric in line["scores"] for line in a + b):
        groups = [line["group"] for line in a] if "group" in a[0] else None
        return paired(*([line["scores"][metric] for line in lines] for lines in (a, b)), groups)
    if metric == "bits_per_byte" and all(line["scores"]["bytes"] for line in a):  # windows of one text have none
        bits = [(y["scores"]["nats"] - x["scores"]["nats"]) / math.log(2) for x, y in zip(a, b, strict=True)]
        mean, stderr = ratio_stderr(bits, [line["scores"]["bytes"] for line in a])
        higher = sum(bit < 0 for bit in bits), sum(bit > 0 for bit in bits)
        return Paired(mean, stderr, mean - Z * stderr, mean + Z * stderr, *higher, None)
    return None


def number(value: float | None) -> str:
    return "n/a" if value is None or math.isnan(value) else f"{value:.4g}"


def shown(metric: dict) -> str:
    """The value with half its interval where that is symmetric, or else with the interval."""
    value, (low, high) = metric["value"], metric.get("ci95") or (None, None)
    if low is None:
        return number(value)
    if math.isclose(high - value, value - low, rel_tol=1e-3):
        return f"{number(value)} ± {number(high - value)}"
    return f"{number(value)} [{number(low)}, {number(high)}]"


def report(runs: list[Run], scores: dict[str, list[list[dict]] | None]) -> str:
    """`scores`: of each task the lines of each run, None where there are none."""
    names = [chr(ord("A") + i) for i in range(len(runs))]
    header = []
    for name, run in zip(names, runs, strict=True):
        model = run.results["model"]
        header.append(f"{name}: {run.path}, model {model['name']} ({model['fingerprint'][:12]}, {model['dtype']})")
    values, differences, without, notes = [], [], [], []
    for task, lines_of in scores.items():
        made = [run.results["tasks"][task] for run in runs]
        for key in ("seed", "generation"):
            if any(one[key] != made[0][key] for one in made):
                ways = "; ".join(f"{name} {json.dumps(one[key])}" for name, one in zip(names, made, strict=True))
                notes.append(f"{task}: not the same {key}: {ways}")
        limit = made[0]["limit"]
        title = f"{task} (first {limit})" if limit else task
        metrics = dict.fromkeys(name for one in made for name in one["metrics"])
        if not metrics:
            values.append([title, "no score", str(made[0]["n"]), *["n/a"] * len(runs)])
        for metric in metrics:
            cells = [shown(one["metrics"][metric]) if metric in one["metrics"] else "n/a" for one in made]
            values.append([title, metric, str(made[0]["n"]), *cells])
            for i, name in enumerate(names[1:], 1):
                found = difference(lines_of[0], lines_of[i], metric) if lines_of else None
                if found is None:
                    without.append(f"{title} {metric}")
                    continue
                varies = found.stderr > 1e-9  # all differences alike, but for rounding, say nothing of their spread
                span = f"[{number(found.low)}, {number(found.high)}]" if varies else "n/a"
                counts = [number(found.p), str(found.a_only), str(found.b_only)]
                cells = [
                    f"{found.difference:+.4g}",
                    span,
                    *counts,
                    number(detectable(found.stderr) if varies else None),
                ]
                differences.append([title, metric, f"{name} - A", *cells])
    parts = ["\n".join(header), markdown(["task", "metric", "n", *names], values)]
    if differences:
        head = ["task", "metric", "runs", "difference", "95 % interval", "p", "A higher", "other higher", "detectable"]
        parts += [
            markdown(head, differences),
            "Differences are paired by document; p is McNemar's exact test, of scores that are 0 or 1. detectable: the true\n"
            "difference that documents as many and as unlike as these find four times in five. n/a: differences that are all\n"
            "alike, or scores other than 0 and 1.",
        ]
    if without:
        parts.append(f"No difference, for single documents have no such score: {', '.join(dict.fromkeys(without))}.")
    return "\n\n".join(parts + notes)


def indented(text: str) -> str:
    return "\n".join(f"    {line}" for line in text.splitlines())


def samples(first: Run, other: Run, task: str, scores: tuple[list[dict], list[dict]], n: int) -> str:
    """Up to `n` documents that the two score differently, or answer differently where nothing is scored: the end of the
    prompt and the outputs of both.
    """
    if "nats" in scores[0][0].get("scores", {}):
        return f"{task}: its samples are windows of text, without prompts and outputs"
    kept = []
    for run in (first, other):
        file = run.path / task / "samples.jsonl"
        kept.append({line.get("doc"): line for line in read_jsonl(file) if "prompt" in line})
        if kept[-1].keys() != {line["doc"] for line in scores[0]}:
            raise UserError(f"{file} does not have the documents of scores.jsonl: run the evaluation again")
    sides = [
        [line.get("scores", lines[line["doc"]].get("outputs")) for line in of]
        for of, lines in zip(scores, kept, strict=True)
    ]
    differ = [i for i, (a, b) in enumerate(zip(*sides, strict=True)) if a != b]
    parts = [f"{task}: {first.path} and {other.path} differ on {len(differ)} documents; here {min(n, len(differ))}"]
    for i in differ[:n]:
        doc = scores[0][i]["doc"]
        prompt = kept[0][doc]["prompt"]
        cut = f" (the last {SHOWN} of {len(prompt)} characters)" if len(prompt) > SHOWN else ""
        parts.append(f"-- document {doc}, prompt{cut}:\n{indented(prompt[-SHOWN:])}")
        for run, lines, of in zip((first, other), kept, scores, strict=True):
            outputs = lines[doc].get("outputs", [json.dumps(lines[doc].get("logliks"))])
            marks = {name: float(f"{value:.4g}") for name, value in of[i].get("scores", {}).items()}
            given = json.dumps(marks or "no score")
            for k, output in enumerate(outputs, 1):
                which = f", output {k} of {len(outputs)}" if len(outputs) > 1 else ""
                parts.append(f"-- {run.path}{which}, {given}:\n{indented(output)}")
    return "\n".join(parts)


@entrypoint
def main():
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False)
    parser.add_argument(
        "runs", nargs="+", metavar="RUN", help="an output_dir of eval/run.py; the first is the baseline"
    )
    parser.add_argument("--task", help="this one alone")
    parser.add_argument(
        "--samples", type=int, default=0, metavar="N", help="show N documents a task that scores differ on"
    )
    args = parser.parse_args()
    if args.samples < 0:
        raise UserError(f"--samples {args.samples}: needs a number of documents")
    runs = [read_run(path) for path in args.runs]
    everywhere = [task for task in runs[0].results["tasks"] if all(task in run.results["tasks"] for run in runs)]
    tasks = [task for task in everywhere if args.task in (None, task)]
    if not tasks:
        named = f" named {args.task}" if args.task else ""
        raise UserError(f"no task to compare{named}; in all runs: {', '.join(everywhere) or 'none'}")
    for task in tasks:
        for run in runs[1:]:
            check_same(runs[0], run, task)
    scores = {task: read_scores(runs, task) for task in tasks}
    said = [report(runs, scores)]
    for task in dict.fromkeys(task for run in runs for task in run.results["tasks"]):
        if task not in everywhere and not args.task:
            only = ", ".join(str(run.path) for run in runs if task in run.results["tasks"])
            said.append(f"{task}: left out, only in {only}")
    for task in tasks if args.samples else ():
        if scores[task] is None:
            said.append(f"{task}: lm-eval ran it, no samples are kept")
            continue
        for run, lines in zip(runs[1:], scores[task][1:], strict=True):
            said.append(samples(runs[0], run, task, (scores[task][0], lines), args.samples))
    print("\n\n".join(said))


if __name__ == "__main__":
    main()
