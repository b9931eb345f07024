"""Answers out of text, and whether two are the same, with the results of lm-eval 0.4.13.

GSM8K after lm_eval/tasks/gsm8k; MATH after minerva_math (Lewkowycz et al. 2022, appendix D), whose table of words is
copied here; math-verify is its own library.
"""

import importlib.metadata
import json
import logging
import re
import resource
import signal
import subprocess
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path

INVALID = "[invalid]"
GSM8K_IGNORED = (",", r"\$", r"(?s).*#### ", r"\.$")
SECONDS = 5  # of CPU time for one pair
MEMORY = 4 << 30  # bytes that one comparison may take


def _found(pattern: str, text: str, which: int) -> str:
    """lm-eval's regex filter: of match number `which` the first group that is not empty."""
    found = re.findall(pattern, text)
    if not found:
        return INVALID
    groups = [found[which]] if isinstance(found[which], str) else found[which]
    return next((group for group in groups if group), INVALID).strip()


def gsm8k_strict(text: str) -> str:
    """The number after the first `#### `, or `[invalid]`."""
    return _found(r"#### (\-?[0-9\.\,]+)", text, 0)


def gsm8k_flexible(text: str) -> str:
    """The last number, or `[invalid]`."""
    return _found(r"(-?[$0-9.,]{2,})|(-?[0-9]+)", text, -1)


def gsm8k_cot_strict(text: str) -> str:
    """The number after the first `The answer is `, or `[invalid]`; one character has to follow it."""
    return _found(r"The answer is (\-?[0-9\.\,]+).", text, 0)


def same_text(predicted: str, gold: str, ignore_case: bool = False, regexes_to_ignore: Sequence[str] = ()) -> bool:
    """exact_match of lm-eval and `evaluate`: equal once what the patterns match is deleted from both, in their order."""
    for pattern in regexes_to_ignore:
        predicted, gold = re.sub(pattern, "", predicted), re.sub(pattern, "", gold)
    return predicted.lower() == gold.lower() if ignore_case else predicted == gold


def gsm8k_equal(predicted: str, gold: str) -> bool:
    """Whether an extracted answer is that of `gold`, a number or a whole solution."""
    return same_text(predicted, gold, ignore_case=True, regexes_to_ignore=GSM8K_IGNORED)


# ---- MATH ------------------------------------------------------------------------------------------


def last_boxed(solution: str) -> str | None:
    r"""What the last `\boxed{}` of a solution holds (or `\boxed `, up to the next $; or `\fbox{}`); None without."""
    if "\\boxed " in solution:
        return solution.split("\\boxed ")[-1].split("$")[0]
    start, depth = solution.rfind("\\boxed"), 0
    if start < 0 and (start := solution.rfind("\\fbox")) < 0:
        return None
    for i in range(start, len(solution)):
        depth += (solution[i] == "{") - (solution[i] == "}")
        if solution[i] == "}" and depth == 0:
            return solution[solution.index("{", start) + 1 : i]
    return None


def minerva_final_answer(text: str) -> str:
    """What stands in "Final Answer: The final answer is ... . I hope it is correct.", or `[invalidanswer]`."""
    found = re.search(r"Final Answer: The final answer is(.*?). I hope it is correct.", text + "I hope it is correct.")
    return found[1].strip() if found else "[invalidanswer]"


# fmt: off
REPLACED = (
    ("an ", ""), ("a ", ""), (".$", "$"), ("\\$", ""), ("\\ ", ""), (" ", ""), ("mbox", "text"), (",\\text{and}", ","),
    ("\\text{and}", ","), ("\\text{m}", "\\text{}"),
)
REMOVED = (
    "square", "ways", "integers", "dollars", "mph", "inches", "ft", "hours", "km", "units", "\\ldots", "sue", "points",
    "feet", "minutes", "digits", "cents", "degrees", "cm", "gm", "pounds", "meters", "meals", "edges", "students",
    "childrentickets", "multiples", "\\text{s}", "\\text{.}", "\\text{\ns}", "\\text{}^2", "\\text{}^3", "\\text{\n}",
    "\\text{}", "\\mathrm{th}", "^\\circ", "^{\\circ}", "\\;", ",\\!", "{,}", '"', "\\dots",
)
# fmt: on
SHORTHAND = (
    (r"(.*?)(\$)(.*?)(\$)(.*)", r"$\3$"),  # what is in dollars, in text, bold, overlined, boxed
    (r"(\\text\{)(.*?)(\})", r"\2"),
    (r"(\\textbf\{)(.*?)(\})", r"\2"),
    (r"(\\overline\{)(.*?)(\})", r"\2"),
    (r"(\\boxed\{)(.*)(\})", r"\2"),
    (r"(frac)([^{])(.)", r"frac{\2}{\3}"),  # \frac12, \sqrt[3]8, \sqrt2
    (r"(sqrt)(\[[^\]]*\])(\w)", r"\1\2{\3}"),
    (r"(sqrt)(?!\[)([^{])", r"sqrt{\2}"),
)


def normalize_final_answer(answer: str) -> str:
    """Without units, spaces, text and shorthand; what is after the last `=`."""
    answer = answer.split("=")[-1]
    for word in filter(str.isalpha, REMOVED):  # while spaces still part them from what they measure
        answer = re.sub(rf"(?<!\\)\b{word}\b", "", answer)
    for before, after in REPLACED:
        answer = answer.replace(before, after)
    for word in REMOVED:
        if word.isalpha():  # but \left keeps its ft
            parts = re.split(r"(\\[a-zA-Z]+)", answer)
            answer = "".join(part if i % 2 else part.replace(word, "") for i, part in enumerate(parts))
        else:
            answer = answer.replace(word, "")
    for pattern, replacement in SHORTHAND:
        answer = re.sub(pattern, replacement, answer)
    answer = answer.replace("$", "")
    return answer.replace(",", "") if re.fullmatch(r"-?\d{1,3}(,\d{3})+", answer) else answer


# ---- comparisons that may not end ------------------------------------------------------------------


def equal_all(pairs: Iterable[tuple[str, str]], which: str) -> tuple[list[bool], int]:
    """(whether each pair is equal, how many had no end and so count as unequal).

    `which` is "minerva", for two answers from `normalize_final_answer`: the same text, or sympy simplifies their
    difference to 0; or "math_verify", for a whole gold solution and a whole output.

    A worker process compares them, from whatever thread this is called: what sympy has begun cannot be stopped
    otherwise. It dies after SECONDS of CPU time with one pair, and the next pair gets another.
    """
    equal, ended, worker = [], 0, None
    try:
        for pair in pairs:
            if worker is None:
                worker = subprocess.Popen(
                    [sys.executable, "-c", "from llm_recipes.evaluation.extract import serve; serve()"],
                    stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=Path(__file__).parents[2],
                )  # fmt: skip
            worker.stdin.write(json.dumps([which, *pair]) + "\n")
            worker.stdin.flush()
            answer = worker.stdout.readline()
            if not answer:
                if worker.wait() > 0:  # not a signal: it never worked
                    raise RuntimeError(f"the worker that compares answers ended with code {worker.returncode}")
                worker.communicate()
                worker, ended = None, ended + 1
            equal.append(answer == "true\n")
    finally:
        if worker is not None:
            worker.kill()
            worker.communicate()
    return equal, ended


def serve() -> None:
    """The worker of `equal_all`: a JSON line in, a JSON line out."""
    compare = {"minerva": _minerva_equal, "math_verify": _math_verify_equal}
    answers, sys.stdout = sys.stdout, None  # ANTLR's runtime prints
    logging.disable(logging.WARNING)  # math-verify warns that it has no timer; the one below is better
    hard = resource.getrlimit(resource.RLIMIT_AS)[1]
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY if hard == resource.RLIM_INFINITY else min(MEMORY, hard), hard))
    for line in sys.stdin:
        which, *pair = json.loads(line)
        function = compare[which]
        _import_parsers()
        signal.setitimer(signal.ITIMER_PROF, SECONDS)  # nobody catches SIGPROF, so C code dies of it too
        try:
            equal = function(*pair)
        except Exception:  # what cannot be parsed or subtracted, as lm-eval has it
            equal = False
        signal.setitimer(signal.ITIMER_PROF, 0)
        print(json.dumps(bool(equal)), file=answers, flush=True)


def _import_parsers() -> None:
    """sympy asks for ANTLR's runtime 4.11 by version; 4.13, which math-verify brings, reads the same tables."""
    if "sympy.parsing.latex" in sys.modules:
        return
    version = importlib.metadata.version
    importlib.metadata.version = lambda name: "4.11" if name == "antlr4-python3-runtime" else version(name)
    from sympy.parsing.latex import parse_latex

    parse_latex("1")
    importlib.metadata.version = version
    import math_verify  # noqa: F401


def _minerva_equal(predicted: str, gold: str) -> bool:
    import sympy
    from sympy.parsing.latex import parse_latex

    if predicted and predicted == gold:  # intervals and tuples do not parse
        return True
    return sympy.simplify(parse_latex(predicted) - parse_latex(gold)) == 0


def _math_verify_equal(solution: str, output: str) -> bool:
    from math_verify import parse, verify

    # texts first: comparing them always ends
    gold, found = (
        sorted(parse(text, parsing_timeout=None), key=lambda one: not isinstance(one, str))
        for text in (solution, output)
    )
    return verify(gold, found, timeout_seconds=None)
