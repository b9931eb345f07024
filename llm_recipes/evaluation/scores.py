"""Scores of one document, or of all, from what the model gave."""

import math
from collections.abc import Callable, Sequence

from llm_recipes.evaluation.extract import (
    equal_all,
    gsm8k_equal,
    gsm8k_flexible,
    gsm8k_strict,
    last_boxed,
    minerva_final_answer,
    normalize_final_answer,
)
from llm_recipes.evaluation.statistics import pass_at_k
from llm_recipes.sandbox import Program, judge


def choice_scores(logliks: Sequence[float], choices: Sequence[str], gold: int) -> dict[str, float]:
    """1 or 0, whether the likeliest choice is `gold`: by log-likelihood, that per character, and per UTF-8 byte.

    `choices` without the space that parts them from the context. The first of equals counts. As lm-eval.
    """
    sizes = {"acc": (1,) * len(choices), "acc_norm": map(len, choices)}
    sizes["acc_bytes"] = (len(choice.encode()) for choice in choices)
    scores = {}
    for name, lengths in sizes.items():
        normed = [loglik / length if length else -math.inf for loglik, length in zip(logliks, lengths, strict=True)]
        scores[name] = float(normed.index(max(normed)) == gold)
    return scores


def perplexity_scores(nats: float, tokens: int, bytes: int, words: int) -> dict[str, float]:
    """Perplexities and bits a byte of text whose negative log-likelihood is `nats`; none is above e^700."""
    figures = {"perplexity": tokens, "byte_perplexity": bytes, "word_perplexity": words}
    return {name: math.exp(min(nats / count, 700)) for name, count in figures.items()} | {
        "bits_per_byte": nats / bytes / math.log(2)
    }


def pass_scores(passed: Sequence[bool], ks: Sequence[int]) -> dict[str, float]:
    """pass@k of one problem from the verdicts on its programs. Raises ValueError for a k above their number."""
    return {f"pass@{k}": pass_at_k(len(passed), sum(passed), k) for k in ks}


def number_scores(
    rows: Sequence[dict], answers: Sequence[Sequence[str]], strict: Callable[[str], str] = gsm8k_strict
) -> list[dict[str, float]]:
    """For each question the share of its answers that are right: by the number where it was asked for, and by the last
    number anywhere. Rows have a gold `answer` in GSM8K's format.
    """
    scores = []
    for row, texts in zip(rows, answers, strict=True):
        kinds = {"exact_match_strict": strict, "exact_match_flexible": gsm8k_flexible}
        right = {name: [gsm8k_equal(take(text), row["answer"]) for text in texts] for name, take in kinds.items()}
        scores.append({name: sum(each) / len(each) for name, each in right.items()})
    return scores


def math_scores(rows: Sequence[dict], answers: Sequence[Sequence[str]]) -> list[dict[str, float]]:
    """For each problem of MATH the share of its answers that are right: the final answer against the boxed one of the
    `solution`, as formulas, and math-verify's judgement of the whole answer. A comparison without end counts as wrong.
    """
    golds = [normalize_final_answer(last_boxed(row["solution"]) or "") for row in rows]
    pairs = [
        [(normalize_final_answer(minerva_final_answer(text)), gold) for text in texts]
        for gold, texts in zip(golds, answers, strict=True)
    ]
    exact = _shares("exact_match", "minerva", pairs)
    return [{"exact_match": share, **boxed} for share, boxed in zip(exact, boxed_scores(rows, answers), strict=True)]


def boxed_scores(rows: Sequence[dict], answers: Sequence[Sequence[str]]) -> list[dict[str, float]]:
    """math-verify's judgement alone, for answers that were asked for in `\\boxed{}`."""
    pairs = [[(row["solution"], text) for text in texts] for row, texts in zip(rows, answers, strict=True)]
    return [{"math_verify": share} for share in _shares("math_verify", "math_verify", pairs)]


def _shares(name: str, which: str, pairs: Sequence[Sequence[tuple[str, str]]]) -> list[float]:
    """The share of each row's pairs that are equal; says how many comparisons of the metric `name` had no end."""
    equal, endless = equal_all([pair for row in pairs for pair in row], which)
    if endless:
        print(f"{name}: {endless} comparisons did not end and count as wrong", flush=True)
    return [sum(found) / len(found) for found in regrouped(equal, pairs)]


def regrouped(values: Sequence, groups: Sequence[Sequence]) -> list[list]:
    """`values` in lists as long as the groups are."""
    rest = iter(values)
    return [[next(rest) for _ in group] for group in groups]


def program_scores(
    rows: Sequence[dict], answers: Sequence[Sequence[str]], program: Callable[[dict, str], Program], ks=(1,),
    cpu_seconds: float = 3, strict: bool = True,
) -> list[dict[str, float]]:  # fmt: skip
    """pass@k of each problem from all its answers, run in the sandbox, for each k up to their number."""
    programs = [program(row, text) for row, texts in zip(rows, answers, strict=True) for text in texts]
    verdicts = judge(programs, cpu_seconds=cpu_seconds, strict=strict)
    late = sum(verdict.status == "timeout" for verdict in verdicts)
    if late:
        print(f"{late} of {len(verdicts)} programs did not end in time and count as wrong", flush=True)
    passed = regrouped([verdict.passed for verdict in verdicts], answers)
    return [pass_scores(found, [k for k in ks if k <= len(found)]) for found in passed]


def rows_choice_scores(choices: Callable[[dict], list[str]], gold: Callable[[dict], int], names: Sequence[str]):
    """The `score` of a task with choices: `names` of `choice_scores`."""

    def score(rows: Sequence[dict], logliks: Sequence[Sequence[float]]) -> list[dict[str, float]]:
        found = [choice_scores(each, choices(row), gold(row)) for row, each in zip(rows, logliks, strict=True)]
        return [{name: scores[name] for name in names} for scores in found]

    return score
