import hashlib
import json
import os
import re
import subprocess
import sys
from collections import Counter
from fractions import Fraction
from itertools import islice

import pytest
from datasets import Dataset

from llm_recipes.arithmetic import (
    BOXES,
    ERRORS,
    FAMILIES,
    ITEMS,
    LIMITS,
    PLACES,
    VIEWS,
    final_answer,
    generate,
    in_test,
    is_correct,
    numbers_of,
    overlap,
    problems,
)
from llm_recipes.errors import UserError

LINE = re.compile(r"[A-Z][^<>\d]*(?:\d+[^<>\d]+)*?(\d+)([-+*/])(\d+)=<<(\d+)([-+*/])(\d+)=(\d+)>>(\d+)[^<>\d]*\.")
CEILINGS = {1: 12, 2: 20, 3: 50, 4: 100, 5: 1_000}
# Numbers that a question says in words, and those that everybody knows.
WORDS = {"twice": 2, "half": 2, "third": 3, "three": 3, "quarter": 4, "four": 4, "five": 5, "50%": 2, "25%": 4, "20%": 5,
         "10%": 10, "dozen": 12, "hours": 60, "weeks": 7}  # fmt: skip


def evaluate(x, sign, y):
    x, y = Fraction(x), Fraction(y)
    return {"+": lambda: x + y, "-": lambda: x - y, "*": lambda: x * y, "/": lambda: x / y}[sign]()


def parse(answer):
    """(equations, final): every line holds one equation, said twice, and nothing else that looks like one."""
    *lines, last = answer.split("\n")
    if not last.startswith("#### "):
        lines, last = [*lines, last], None
    found = [LINE.fullmatch(line).groups() for line in lines]
    assert all(f[:3] == f[3:6] and f[6] == f[7] for f in found), answer
    return [(int(x), sign, int(y), int(value)) for x, sign, y, value in (f[:3] + f[6:7] for f in found)], last


def said(question):
    """The numbers that a question gives, in digits, in words or because everybody knows them."""
    words = {number for word, number in WORDS.items() if word in question.lower()}
    means = {2, 3} if "average" in question else {2} if re.search("fence|perimeter|around", question) else set()
    return {int(n) for n in re.findall(r"\d+", question)} | words | means


def structure(family):
    """Operations on numbers (by the order of their use) and earlier results; a constant counts as a number."""
    seen, graph = {}, []
    for _, left, sign, right in family.parsed:
        operands = [
            (1, "rstu".index(name)) if name in "rstu" else (0, seen.setdefault(name, len(seen)))
            for name in (left, right)
        ]
        graph.append((sign, *(sorted(operands) if sign in "+*" else operands)))
    return tuple(graph)


def test_families_differ_in_structure():
    structures = {structure(family) for family in FAMILIES}
    assert len(structures) == len(FAMILIES) >= 36 and len({family.name for family in FAMILIES}) == len(FAMILIES)
    sizes = Counter(len(family.steps) for family in FAMILIES)
    assert set(sizes) == {1, 2, 3, 4} and sizes[2] + sizes[3] > 0.7 * len(FAMILIES)


def test_every_wording_says_every_number_and_can_be_told_apart():
    wordings = [wording for family in FAMILIES for wording in family.wordings]
    assert len(set(wordings)) == len(wordings) and all(len(family.wordings) >= 3 for family in FAMILIES)
    for family in FAMILIES:
        for wording in family.wordings:
            said = Counter(re.findall(r"{(\w)}", wording)) + Counter(["k"] * wording.count(f"{{{family.words}}}"))
            assert said == Counter(family.inputs), wording


@pytest.mark.parametrize("difficulty", LIMITS)
def test_answers_are_right(difficulty):
    rows = generate("sft", 3000, difficulty=difficulty)["messages"]
    for question, answer in rows:
        assert (question["role"], answer["role"]) == ("user", "assistant")
        equations, last = parse(answer["content"])
        assert last == f"#### {equations[-1][3]}"
        assert all(evaluate(x, sign, y) == value for x, sign, y, value in equations), answer
        used = {number for x, _, y, value in equations for number in (x, y, value)}
        assert min(used) >= 2 and max(used) <= CEILINGS[difficulty]
        known = said(question["content"])
        for x, _, y, value in equations:
            assert {x, y} <= known, (question, answer)
            known.add(value)


def test_questions_read_right():
    rows = generate("test", 10_000, difficulty=4)
    for text in rows["question"]:
        assert re.fullmatch(r"(?:[A-Z][^.?{}]*\. )*[A-Z][^.?{}]*\?", text), text
        assert 9 <= len(text.split()) <= 40
    for text in (*rows["question"], *rows["answer"]):
        assert not re.search(r"[{}]|  |\b1 [a-z]|\b(\w+) \1\b|[a-z]\.[A-Z]", text), text
        number_of_one = rf"\d (?:{'|'.join((*ITEMS, *BOXES))})\b"
        # "on each $5 apple" is the one right way to have a number before one thing
        assert not re.search(number_of_one, re.sub(r"each \$\d+ \w+", "", text)), text
    for question in rows["question"]:  # who is left to guess?
        named = set(re.findall(r"\b[A-Z][a-z]+\b", question))
        assert not {"He", "She", "His", "Her"} & named or len(named) > 1
    every = " ".join(rows["question"])
    assert all(f"the {place}" in every for place in PLACES) and len(ITEMS) >= 20
    assert all(re.search(rf"\d {plural}\b", every) for plural in ("apples", "peaches", "brushes", "boxes"))


@pytest.mark.parametrize("difficulty", LIMITS)
def test_every_family_and_wording_appears(difficulty):
    expected = {(f.name, i) for f in FAMILIES if f.level <= difficulty for i in range(len(f.wordings))}
    seen = Counter(problem.cell[:2] for problem in islice(problems("sft", difficulty=difficulty), 8000))
    assert set(seen) == expected
    assert {name for name, _ in expected} == {
        problem.family.name for problem in islice(problems("test", difficulty=difficulty, split="test"), 4000)
    }
    assert all(sum(map(len, numbers_of(f, difficulty))) >= 10 for f in FAMILIES if f.level <= difficulty)
    assert len(expected) == 3 * len(FAMILIES) or difficulty < 5


def test_wrong_answers_have_the_announced_error_alone():
    rows = generate("preference", 6000, difficulty=2)
    assert Counter(rows["error"]) == dict.fromkeys(ERRORS, 1500)
    longer, carried = Counter(), Counter()
    for prompt, chosen, rejected, error in zip(*rows.values(), strict=True):
        assert [m[0]["role"] for m in (prompt, chosen, rejected)] == ["user", "assistant", "assistant"]
        chosen, rejected = chosen[0]["content"], rejected[0]["content"]
        right, gold = parse(chosen)
        if error == "missing_answer":
            assert f"{rejected}\n{gold}" == chosen
            continue
        wrong, final = parse(rejected)
        longer[error] += len(rejected) - len(chosen)
        assert final != gold and final == f"#### {wrong[-1][3]}" and len(wrong) == len(right)
        # But for the equations, the text is the same.
        assert re.sub(r"\d+", "0", re.sub(r"\d\S*=\S+>>\d+|#### \d+", "", rejected)) == re.sub(
            r"\d+", "0", re.sub(r"\d\S*=\S+>>\d+|#### \d+", "", chosen)
        )
        assert all(2 <= value <= CEILINGS[2] for step in wrong for value in (step[0], step[2], step[3]))
        at = next(i for i, (a, b) in enumerate(zip(right, wrong, strict=True)) if a != b)
        carried[error] += at < len(right) - 1
        (x, sign, y, value), (x2, sign2, y2, value2) = right[at], wrong[at]
        assert (x, y) == (x2, y2)
        if error == "wrong_operation":
            assert sign != sign2 and evaluate(x2, sign2, y2) == value2
        else:
            assert sign == sign2
            assert abs(value - value2) == 1 if error == "off_by_one" else abs(value - value2) > 1
        # Later steps are right, given the wrong result: what was computed from it before is so now.
        same, changed = said(prompt[0]["content"]) | {step[3] for step in right[:at]}, {value: {value2}}
        for (x, sign, y, value), (x2, sign2, y2, value2) in zip(right[at + 1 :], wrong[at + 1 :], strict=True):
            assert sign == sign2 and evaluate(x2, sign2, y2) == value2
            for number, number2 in ((x, x2), (y, y2)):
                assert number2 in changed.get(number, set()) or (number2 == number and number in same)
            changed.setdefault(value, set()).add(value2)
    assert all(abs(total) < 0.5 * 1500 for total in longer.values()), longer
    assert all(300 < carried[error] < 1200 for error in ERRORS[:3]), carried


def test_pretraining_text_is_prose_and_what_is_marked():
    """Every equation in prose is right, every mark true, and half of what is marked is wrong."""
    kinds, marks = {"prose": 0, "drill": 0, "solution": 0}, []
    for text in generate("pretrain", 4000)["text"]:
        lines = text.split("\n")
        if "<<" not in text:
            kinds["prose"] += 1
            equations = re.findall(r"(\d+)([-+*/])(\d+)=(\d+)", text)
            assert all(evaluate(x, sign, y) == int(z) for x, sign, y, z in equations)
            assert lines[0].endswith("?") and lines[-1] == f"The answer is {equations[-1][3]}."
            continue
        kinds["solution" if "?" in text else "drill"] += 1
        for line in lines[1:] if "?" in text else lines:
            x, sign, y, z, mark = re.search(r"<<(\d+)([-+*/])(\d+)=(\d+)>>.* (right|wrong)$", line).groups()
            assert (mark == "right") == (evaluate(x, sign, y) == int(z))
            marks.append(mark)
    shares = {kind: count / 4000 for kind, count in kinds.items()}
    assert shares == pytest.approx({"prose": 0.4, "drill": 0.3, "solution": 0.3}, abs=0.03)
    assert marks.count("wrong") / len(marks) == pytest.approx(0.5, abs=0.03)


def test_prompts_and_test_set_have_the_same_answers_as_their_problems():
    rows = generate("prompts", 300, difficulty=5)
    for prompt, answer, problem in zip(rows["prompt"], rows["answer"], problems("prompts", difficulty=5), strict=False):
        assert prompt == [{"role": "user", "content": problem.question}] and is_correct(problem.gsm8k(), answer)
    rows = generate("test", 300)
    for question, answer, problem in zip(*rows.values(), problems("test", split="test"), strict=False):
        assert (question, answer) == (problem.question, problem.gsm8k())
    assert generate("test", 50, split="test") == generate("test", 50)


@pytest.mark.parametrize("difficulty", [1, 3])
def test_train_and_test_are_disjoint(difficulty):
    train = list(islice(problems("sft", difficulty=difficulty), 20_000))
    test = list(islice(problems("test", difficulty=difficulty, split="test"), 2000))
    report = overlap(train, test)
    assert report["cells"] == report["questions"] == 0 and 0.1 < report["numbers"] <= 1
    other = next(islice(problems("prompts", difficulty=4), 99, None))
    assert overlap(train, train)["cells"] == len({p.cell for p in train}) and overlap([other], [other])["numbers"] == 1
    texts = {row[0]["content"] for row in generate("sft", 5000, 7, difficulty)["messages"]}
    assert not texts & set(generate("test", 5000, 8, difficulty)["question"])


def test_split_is_a_tenth_of_the_cells():
    cells = [(family.name, 0, numbers) for family in FAMILIES for group in numbers_of(family, 4) for numbers in group]
    assert abs(sum(map(in_test, cells[::10])) / len(cells[::10]) - 0.1) < 0.01


def digest():
    rows = {view: generate(view, 200, seed=3, difficulty=3) for view in VIEWS}
    return hashlib.sha256(json.dumps(rows).encode()).hexdigest()


def test_rows_depend_on_the_arguments_alone():
    code = "from tests.test_arithmetic import digest; print(digest())"
    fresh = subprocess.run(
        [sys.executable, "-c", code],
        env=os.environ | {"PYTHONHASHSEED": "7"},
        capture_output=True,
        text=True,
        check=True,
    )
    assert fresh.stdout.strip() == digest()
    for view in VIEWS:
        rows = generate(view, 60)
        assert Dataset.from_dict(rows).num_rows == 60
        assert {column: values[:13] for column, values in rows.items()} == generate(view, 13)
        assert rows != generate(view, 60, seed=1) and rows != generate(view, 60, difficulty=2)
        assert (rows == generate(view, 60, split="test")) == (view == "test")
    questions = [[m[0]["content"] for m in generate("sft", 60)["messages"]]]
    questions += [[m[0]["content"] for m in generate(view, 60)["prompt"]] for view in ("preference", "prompts")]
    assert len({tuple(q[:5]) for q in questions}) == 3


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        ("So 2+2=<<2+2=4>>4.\n#### 4", "4"),
        ("#### 1,234", "1234"),
        ("#### -3.5 dollars", "-3.5"),
        ("#### 5\n#### 6", "5"),
        ("The answer is 4.", None),
        ("####4", None),
        ("#### four", None),
        ("", None),
    ],
)
def test_final_answer_is_taken_as_gsm8k_does(text, answer):
    assert final_answer(text) == answer
    assert is_correct(text, "4") == (answer == "4") and is_correct(text, "1,234") == (answer == "1234")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"view": "train", "rows": 1}, "there is no view 'train'; there is pretrain, sft, preference, prompts, test"),
        ({"view": "sft", "rows": 0}, "rows is 0; it must be at least 1"),
        ({"view": "sft", "rows": 1, "difficulty": 6}, "there is no difficulty 6; there is 1, 2, 3, 4, 5"),
        ({"view": "sft", "rows": 1, "split": "eval"}, "there is no split 'eval'; there is train, test"),
    ],
)
def test_errors_say_what_is_possible(arguments, message):
    with pytest.raises(UserError, match=re.escape(message)):
        generate(**arguments)
