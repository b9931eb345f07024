"""Answers out of text, against lm-eval's own functions."""

import importlib.metadata
import json
import os
import random
import threading
from pathlib import Path

import pytest
import yaml

from llm_recipes.evaluation.extract import (
    INVALID,
    equal_all,
    gsm8k_cot_strict,
    gsm8k_equal,
    gsm8k_flexible,
    gsm8k_strict,
    last_boxed,
    minerva_final_answer,
    normalize_final_answer,
    same_text,
)
from tests.running import ROOT

lm_eval = pytest.importorskip("lm_eval")
DATA = Path(os.environ.get("LLM_RECIPES_DATA", ROOT.parent / "shared/data"))

# ---- GSM8K -----------------------------------------------------------------------------------------

OUTPUTS = [
    "", " ", "####", "#### ", "#### 72", "####72", "#### 72.", "#### 1,234.50", "#### -5", "#### $5", "#### - 5", "#### .",
    "a\n#### 3\n#### 4", "#### 3 #### 4", "#### 3\nQuestion: no", "so it is 72", "so it is 72.", "$1,200.00", "-$5", "$-5",
    "costs $5 or €6", "1/2", "2+2=4", "<<48/2=24>>24\n#### 24 clips", "The answer is 7.", "The answer is 7", "The answer is 18",
    "The answer is -1,000.5!", "the answer is 7.", "The answer is $7.", "The answer is 7.\n\nQ: The answer is 8. ",
    "12 apples, 3.", "...", "$$", "-", "--5", "1e5", "\u0663 + \u0664", "\uff15", "3\u066b5", "1 000", "0.", ".5", "-.5.", "10%", "#### 10%",
    "#### 1\u00a0000", "#### 5\r\n", "x" * 2000 + "1", "no number at all", "#### ,", "#### 1.2.3", "5 - 3", "5-3", "$,.", "\x0b7",
]  # fmt: skip


def published(name: str) -> dict:
    return yaml.safe_load((Path(lm_eval.__file__).parent / "tasks/gsm8k" / name).read_text())


@pytest.mark.parametrize(
    ("file", "which", "ours"),
    [
        ("gsm8k.yaml", "strict-match", gsm8k_strict),
        ("gsm8k.yaml", "flexible-extract", gsm8k_flexible),
        ("gsm8k-cot.yaml", "strict-match", gsm8k_cot_strict),
        ("gsm8k-cot.yaml", "flexible-extract", gsm8k_flexible),
    ],
)
def test_gsm8k_extraction_is_that_of_lm_eval(file, which, ours):
    from lm_eval.filters.extraction import RegexFilter

    (steps,) = (one["filter"] for one in published(file)["filter_list"] if one["name"] == which)
    assert [step["function"] for step in steps] == ["regex", "take_first"]
    referee = RegexFilter(**{key: value for key, value in steps[0].items() if key != "function"})
    rng = random.Random(0)
    made = ["".join(rng.choices("#$.,- 0159ax\n", k=12)) for _ in range(2000)]
    texts = OUTPUTS + made + [f"The answer is {text}" for text in made] + [f"#### {text}" for text in made]
    expected = [answer for (answer,) in referee.apply([[text] for text in texts], [])]
    assert [ours(text) for text in texts] == expected and len(set(expected)) > 20


def test_gsm8k_by_hand():
    assert gsm8k_strict("She has <<3*4=12>>12.\n#### 1,012\n#### 5") == "1,012"
    assert gsm8k_flexible("She has 12 and then $1,012.") == "$1,012." and gsm8k_equal("$1,012.", "text\n#### 1012")
    assert gsm8k_strict("no") == gsm8k_flexible("no") == gsm8k_cot_strict("The answer is 7") == INVALID
    assert not gsm8k_equal(INVALID, "#### 5") and not gsm8k_equal("12", "#### 1")


def test_gsm8k_equality_is_that_of_lm_eval():
    from lm_eval.api.metrics import exact_match_hf_evaluate

    (metric,) = published("gsm8k.yaml")["metric_list"]
    options = {key: metric[key] for key in ("ignore_case", "ignore_punctuation", "regexes_to_ignore")}
    answers = [*OUTPUTS, "A", "a", "ABC.", "abc", "x#### y#### 7.", "7.."]
    pairs = [(a, b) for a in answers for b in answers]
    expected = [bool(exact_match_hf_evaluate([a], [b], **options)["exact_match"]) for a, b in pairs]
    assert [gsm8k_equal(*pair) for pair in pairs] == expected and len(pairs) / 2 > sum(expected) > len(answers)
    plain = [bool(exact_match_hf_evaluate([a], [b])["exact_match"]) for a, b in pairs]
    assert [same_text(*pair) for pair in pairs] == plain


@pytest.mark.skipif(not (DATA / "gsm8k_train.jsonl").is_file(), reason="no gsm8k_train.jsonl in LLM_RECIPES_DATA")
def test_every_gold_of_gsm8k_is_its_own_answer():
    golds = [json.loads(line)["answer"] for line in (DATA / "gsm8k_train.jsonl").read_text().splitlines()]
    assert len(golds) == 7473
    for gold in golds:
        number = gold.split("#### ")[1]
        assert gsm8k_strict(gold) == number and gsm8k_equal(gsm8k_strict(gold), gold)
        assert gsm8k_equal(gsm8k_flexible(gold), gold) and not gsm8k_equal(f"{number}1", gold)


# ---- MATH ------------------------------------------------------------------------------------------

PAIRS = [
    (r"2\sqrt{3}", r"\sqrt{12}"), ("1,000", "1000"), ("x+1", "1+x"), (r"10\%", "10"), (r"3\pi", "9.42477796"),
    (r"\frac{1}{2}", "0.5"), (r"\frac12", r"\frac{1}{2}"), (r"\dfrac{3}{4}", r"\frac34"), (r"\tfrac{3}{4}", "0.75"),
    ("1/2", r"\frac{1}{2}"), ("(1,2)", "(1,2)"), ("(1,2)", "(1, 2)"), ("[2,5)", "[2,5)"), ("(2,5)", "[2,5)"),
    ("0,1", "0,1"), ("0,1", "01"), ("1,2,3", "3,2,1"), (r"12\text{ cm}", "12"), (r"12\mbox{ inches}", "12"),
    (r"\$18.90", "18.9"), ("18.90", "18.9"), (r"90^\circ", "90"), (r"90^{\circ}", "90"), ("x=5", "5"), ("k = 7", "7"),
    ("y=2x+3", "2x+3"), (r"\text{Friday}", "Friday"), (r"\text{(A)}", "A"), (r"\textbf{C}", "C"), (r"\boxed{7}", "7"),
    (r"\left(\frac{3}{2},-1\right)", r"(\frac{3}{2},-1)"), (r"\left[0,\infty\right)", r"[0,\infty)"),
    (r"\sqrt[3]{8}", "2"), (r"\sqrt[3]8", "2"), (r"\sqrt2", r"\sqrt{2}"), (r"\sqrt{50}", r"5\sqrt{2}"),
    (r"\sqrt{x^2}", "x"), ("(x+1)^2", "x^2+2x+1"), ("x^2-1", "(x-1)(x+1)"), (r"\sin^2 x+\cos^2 x", "1"),
    ("2^{10}", "1024"), (r"e^{i\pi}", "-1"), (r"\frac{\sqrt{2}}{2}", r"\frac{1}{\sqrt{2}}"), ("3!", "6"),
    (r"\binom{5}{2}", "10"), (r"\log_2 8", "3"), (r"\infty", r"\infty"), (r"-\frac{2}{3}", r"\frac{-2}{3}"),
    (r"-\frac{2}{3}", "-0.6666666"), ("0.333", r"\frac{1}{3}"), (".5", "0.5"), ("-.5", r"-\frac12"), ("", ""), ("", "5"),
    (r"\frac{", r"\frac{"), ("}{", "{}"), (r"\frac", "1"), (r"\sqrt", "1"), ("a/b", r"\frac{a}{b}"), ("3/4/5", "3/4/5"),
    ("1{,}000", "1000"), (r"10,\!000", "10000"), (r"5\text{ and }7", "5,7"), (r"5,\text{and}7", "5,7"),
    (r"\begin{pmatrix}1\\2\end{pmatrix}", r"\begin{pmatrix} 1 \\ 2 \end{pmatrix}"), (r"x \in [0,1]", "[0,1]"),
    ("x<3", "x < 3"), ("x>3", "3<x"), ("3x", "x3"), (r"2 \cdot 3", "6"), (r"2\times3", "6"), (r"1\frac{1}{2}", "3/2"),
    (r"\frac{\pi}{4}", r"\pi/4"), ("1e3", "1000"), ("A", "a"), (r"\text{even}", "even"), (r"6\text{th}", "6"),
    (r"6^\mathrm{th}", "6"), (r"100\text{ square feet}", "100"), ("11_{2}", "3"), ("4210_{5}", "4210_5"), (r"\pm 3", "3"),
    (r"\{1,2\}", r"\{2,1\}"), (r"\overline{AB}", "AB"), (r"0.\overline{3}", r"\frac13"), ("2+3i", "3i+2"), ("|{-3}|", "3"),
    ("x^{2}", "x^2"), (r"3 \text{ or } 4", "3,4"), (r"\cot x", r"\frac{1}{\tan x}"), (r"50\%", "0.5"), (r"50\%", r"50\%"),
    ("7 ", "7"), ("7.0", "7"), ("007", "7"), ("-0", "0"), ("a b", "ab"), ("$5$", "5"), ("the answer is $5$", "5"),
    (r"\frac12x", r"\frac{x}{2}"), ("\n5", "5"), (r"\frac1\frac23", r"\frac1\frac23"), (r"\frac1", r"\frac 1"), ("12/0", "1/0"),
    (r"\text{ cm}\text{ m}", "5"), ("=", "="), ("ab=3", "3"), ("abc=3", "3"), (r"\frac{1}2", r"\frac12"), (r"\left", "left"),
]  # fmt: skip
SOLUTIONS = [
    "", "no box", r"$\boxed{5}$", r"\boxed{\frac{1}{2}} and \boxed{x^{2}}.", r"so $\boxed 7$.", r"\boxed 7 or \boxed{8}",
    r"\boxed{{}", r"\boxed{a} } b", r"\boxed{\boxed{3}}", r"\boxed", "\\boxed{\n4\n}", r"$\boxed{5}$ and $\boxed{6}",
]  # fmt: skip


@pytest.fixture(scope="module")
def minerva():
    """lm-eval's module. sympy and lm-eval ask for ANTLR's runtime 4.11 by name; with 4.13 their results are the same."""
    import math_verify  # noqa: F401  # first: it has other tables for 4.11

    version = importlib.metadata.version
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            importlib.metadata, "version", lambda name: "4.11" if name.startswith("antlr4") else version(name)
        )
        from lm_eval.tasks.minerva_math import utils

        utils.parse_latex("1")
    return utils


def test_minerva_is_that_of_lm_eval(minerva):
    texts = [text for pair in PAIRS for text in pair]
    normal = [normalize_final_answer(text) for text in texts]
    assert normal == [minerva.normalize_final_answer(text) for text in texts]
    words = [*minerva.REMOVED_EXPRESSIONS, *(before for before, _ in minerva.SUBSTITUTIONS)]
    for text in [
        before + word + after for word in words for before in ("5", "5 ", "$5$ ", "\\pi") for after in ("", " x")
    ]:
        assert normalize_final_answer(text) == minerva.normalize_final_answer(text)
    pairs = list(zip(normal[::2], normal[1::2], strict=True))
    equal, ended = equal_all(pairs, "minerva")
    assert equal == [bool(minerva.is_equiv(*pair)) for pair in pairs] and ended == 0
    assert 60 < sum(equal) < len(PAIRS) - 30


def test_the_final_answer_of_minerva(minerva):
    whole = "Final Answer: The final answer is ${}$. I hope it is correct."
    texts = [f"Reason.\n{whole.format(a)}{rest}" for a, _ in PAIRS for rest in ("", f"\n{whole.format(1)}")]
    texts += [
        "",
        "5",
        "Final Answer: The final answer is 5",
        "Final Answer: The final answer is 5.",
        "The final answer is 5.",
    ]
    assert [minerva_final_answer(t) for t in texts] == [minerva.get_unnormalized_answer(t) for t in texts]
    assert minerva_final_answer(whole.format("[2,5)")) == "$[2,5)$" and minerva_final_answer("5") == "[invalidanswer]"


def test_the_last_box(minerva):
    for text in SOLUTIONS:
        whole = minerva.last_boxed_only_string(text)
        assert last_boxed(text) == (None if whole is None else minerva.remove_boxed(whole)), text
    assert last_boxed(r"\fbox{4}") == "4" and last_boxed(r"\boxed{\frac{1}{2}}!") == r"\frac{1}{2}"


def test_math_verify_is_that_of_lm_eval():
    """The library itself, with its own timers in this main thread."""
    from math_verify import parse, verify

    table = [*PAIRS, (r"(3,\infty)", "x>3"), ("x>3", r"(3,\infty)")]  # gold and output are not alike
    pairs = [(rf"So $\boxed{{{gold}}}$.", f"I think it is ${output}$.") for output, gold in table]
    equal, ended = equal_all(pairs, "math_verify")
    assert equal == [bool(verify(parse(gold), parse(output))) for gold, output in pairs] and ended == 0
    right = {pair for pair, one in zip(table, equal, strict=True) if one}
    assert len(right & set(table[-2:])) == 1
    assert {PAIRS[0], PAIRS[1], PAIRS[2], (r"3\pi", "9.42477796")} <= right and ("(2,5)", "[2,5)") not in right


def test_what_does_not_end_is_wrong_and_counted():
    """One of C code, which no handler in Python would stop, between others, outside the main thread."""
    found = []
    pairs = [("2", "2.0"), ("10^{10^{10}}", "3"), (r"\frac{4}{2}", "2"), ("10^{10^{10}}", "10^{10^{10}}"), ("1", "2")]
    thread = threading.Thread(target=lambda: found.extend(equal_all(pairs, "minerva")))
    thread.start()
    thread.join()
    assert found == [[True, False, True, True, False], 1]


def test_a_worker_that_cannot_work_is_no_wrong_answer():
    with pytest.raises(RuntimeError, match="ended with code 1"):
        equal_all([("1", "2")], "minervva")
    assert equal_all([], "minerva") == ([], 0)
