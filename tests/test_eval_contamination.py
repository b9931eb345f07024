import json
import random
import runpy
import sys

import pytest

from llm_recipes.evaluation.contamination import Index, scan, split_scores, strings, words
from llm_recipes.evaluation.statistics import two_proportions
from llm_recipes.evaluation.tasks import digest
from tests.running import ROOT

ITEM = "Natalia sold clips to 48 of her friends in April, and then she sold half as many clips in May. How many?"
rng = random.Random(0)


def filler(n: int, alphabet: str = "abcdefgh") -> str:
    return " ".join("".join(rng.choices(alphabet, k=5)) for _ in range(n))


def found(items, text, n=13) -> dict[int, str]:
    return Index(items, n).search([text])[0]


def test_words():
    assert words("It's <<48/2=24>>24 clips,\n_and_ ÄÖÜ!") == ["it", "s", "48", "2", "24", "24", "clips", "and", "äöü"]
    assert words(" .,;!?_-\n") == []


@pytest.mark.parametrize("before", [0, 1, 300])
@pytest.mark.parametrize("after", [0, 1, 300])
def test_a_leak_at_the_start_in_the_middle_at_the_end(before, after):
    text = f"{filler(before)} {ITEM} {filler(after)}"
    gram = " ".join(words(ITEM)[:13])
    assert found([filler(30), ITEM], text) == {1: gram}


@pytest.mark.parametrize(
    "changed",
    [
        ITEM.upper(), ITEM.replace(" ", "\n\n"), ITEM.replace(" ", " -- "), ITEM.replace(",", ""), f"({ITEM})**",
        ITEM.replace("clips", "'clips'"), f"x_{ITEM}_", ITEM.replace(" ", "_"), "\ufeff" + ITEM, ITEM.title(),
    ],
)  # fmt: skip
def test_case_punctuation_and_space_do_not_count(changed):
    assert found([ITEM], f"{filler(5)}. {changed} {filler(5)}")


def test_thirteen_words_and_no_fewer():
    parts = words(ITEM)
    for start in range(len(parts) - 12):
        gram = " ".join(parts[start : start + 13])
        assert found([ITEM], f"so {gram} so") == {0: gram}
        assert not found([ITEM], f"so {' '.join(parts[start : start + 12])} so")
        assert found([ITEM], f"so {' '.join(parts[start : start + 8])} so", n=8)
    assert not found([ITEM], " ".join(reversed(parts)))
    assert not found([ITEM], " so ".join(" ".join(parts[i : i + 12]) for i in range(0, len(parts), 12)))


def test_an_item_that_is_short_has_to_be_there_whole():
    items = ["What is two plus two?", "Paris", filler(40)]
    assert found(items, "they ask: what is TWO plus two. Four") == {0: "what is two plus two"}
    assert not found(items, "what is two plus") and not found(items, "what is two minus two")
    assert not found(items, "comparisons of Parisians") and found(items, "In Paris!") == {1: "paris"}
    assert set(found(items, "Paris. What is two plus two")) == {0, 1}
    thirteen, twelve = filler(13), filler(12)
    assert set(found([thirteen, twelve], f"{thirteen} {twelve}")) == {0, 1}


def test_items_without_words_match_nothing():
    index = Index(["", "?!", "a b"], 13)
    assert index.empty == [0, 1] and index.search(["", "?!", "x", "a b"]) == [{}, {}, {}, {2: "a b"}]
    assert Index([], 13).search(["a b c"]) == [{}] and Index(["a b"], 13).search([]) == []


def test_no_ngram_goes_from_one_text_into_the_next():
    first, second = " ".join(words(ITEM)[:10]), " ".join(words(ITEM)[10:])
    hits = Index([ITEM], 13).search([first, second, f"{first} {second}"])
    assert hits == [{}, {}, {0: " ".join(words(ITEM)[:13])}]


def brute_force(items, texts, n) -> list[set[int]]:
    """By joined texts with a space at either end, one item after another."""
    flagged = []
    for text in texts:
        inside, hits = f" {' '.join(words(text))} ", set()
        for i, item in enumerate(map(words, items)):
            size = min(n, len(item))
            grams = (item[k : k + size] for k in range(len(item) - size + 1))
            hits |= {i} if item and any(f" {' '.join(gram)} " in inside for gram in grams) else set()
        flagged.append(hits)
    return flagged


@pytest.mark.parametrize("n", [1, 2, 3, 5])
def test_against_brute_force(n):
    """Three words only, so that there is much to find."""
    draw = random.Random(n)
    some = lambda k: " ".join(draw.choices(["a", "B", "c.", "d"], k=draw.randint(0, k)))  # noqa: E731
    items, texts = [some(9) for _ in range(60)], [some(25) for _ in range(120)]
    hits = Index(items, n).search(texts)
    assert [set(hit) for hit in hits] == brute_force(items, texts, n)
    for text, hit in zip(texts, hits, strict=True):
        for item, gram in hit.items():
            assert all(f" {gram} " in f" {' '.join(words(side))} " for side in (text, items[item]))
    # the batches do not matter
    assert [hit for i in range(0, 120, 7) for hit in Index(items, n).search(texts[i : i + 7])] == hits


def test_the_janitor_of_lm_eval_agrees():
    """It deletes punctuation where we part words at it, so on text whose punctuation stands beside a space. Its word
    n-grams are found on its normalised text."""
    janitor = pytest.importorskip("lm_eval.decontamination.janitor")
    clean, leaked = f"{filler(200)}.", f"{filler(100)}. {ITEM} {filler(100)}."
    referee = janitor.Janitor(ngram_n=13, window_to_remove=1, minimum_slice_length=0)
    referee.register_contaminant_python(ITEM)
    for text in (clean, leaked, ITEM, ITEM.upper(), f"{clean} {ITEM[:40]}"):
        assert (len(referee.clean_python(text)) != 1) == bool(found([ITEM], text))
        assert referee.normalize_string(text).split() == words(text)


def test_no_false_positives():
    """A hundred thousand words that look like those of the items, and some that are: pairs and triples, by chance."""
    items = [filler(40, "abcd") for _ in range(200)]
    texts = [filler(2000, "bcda") for _ in range(50)]
    assert [set(hit) for hit in Index(items, 2).search(texts[:5])] == brute_force(items, texts[:5], 2)
    assert any(Index(items, 2).search(texts)) and not any(Index(items, 6).search(texts))


def test_scan_counts_rows_and_items():
    items = [ITEM, filler(30), "two plus two"]
    texts = ["nothing", f"{ITEM} two plus two", "", f"it was: {ITEM}"]
    report = scan(Index(items, 13), [texts[:3], texts[3:]])
    gram = " ".join(words(ITEM)[:13])
    assert report["rows"] == [
        {"row": 1, "item": 0, "items": 2, "ngram": gram}, {"row": 3, "item": 0, "items": 1, "ngram": gram},
    ]  # fmt: skip
    assert report["items"] == [
        {"item": 0, "row": 1, "rows": 2, "ngram": gram}, {"item": 2, "row": 1, "rows": 1, "ngram": "two plus two"},
    ]  # fmt: skip
    counts = {key: report[key] for key in ("train_rows", "flagged_rows", "benchmark_items", "flagged_items", "n")}
    assert counts == {"train_rows": 4, "flagged_rows": 2, "benchmark_items": 3, "flagged_items": 2, "n": 13}
    assert report["train_bytes"] == sum(len(text.encode()) for text in texts) and report["items_without_words"] == 0


def test_text_of_columns():
    messages = [{"role": "user", "content": "Hi you"}, {"role": "assistant", "content": "Yes"}]
    assert strings([messages, None, 5, "x"]) == "Hi you\nYes\n\n5\nx"


def test_scores_on_either_side():
    scores = [{"exact_match": x, "f": x / 2} for x in (1.0, 1.0, 0.0, 0.0, 1.0)]
    scores = dict(enumerate(scores)) | {9: {"exact_match": 0.0, "f": 0.0}}
    assert split_scores(scores, {0, 9})["exact_match"]["flagged"] == {"n": 2, "mean": 0.5}
    del scores[9]
    report = split_scores(scores, {0, 1})
    assert report["exact_match"] == {
        "clean": {"n": 3, "mean": pytest.approx(1 / 3)}, "flagged": {"n": 2, "mean": 1.0},
        "difference": pytest.approx(2 / 3), "ci95": two_proportions(1, 3, 2, 2),
    }  # fmt: skip
    assert "ci95" not in report["f"] and report["f"]["difference"] == pytest.approx(1 / 3)
    alone = {"clean": {"n": 5, "mean": 0.6}, "flagged": {"n": 0, "mean": None}}
    assert split_scores(scores, set())["exact_match"] == alone


# ---- the command -----------------------------------------------------------------------------------


@pytest.fixture
def command(tmp_path, monkeypatch, capsys):
    """Runs it on two small files; returns (exit code, stdout, stderr)."""
    monkeypatch.chdir(tmp_path)
    rows = [{"question": ITEM, "answer": "72"}, {"question": filler(30), "answer": "5"}]
    texts = [filler(50), f"{ITEM} 72"] + [filler(20)] * 400
    for name, lines in (("test", rows), ("train", [{"text": text} for text in texts])):
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))

    def run(*argv, train="train.jsonl", columns="question,answer"):
        start = ["contamination.py", "--train", train, "--benchmark", "test.jsonl", "--benchmark-columns", columns]
        monkeypatch.setattr(sys, "argv", [*start, *argv])
        code = 0
        try:
            runpy.run_path(str(ROOT / "eval/contamination.py"), run_name="__main__")
        except SystemExit as stop:
            code = stop.code
        return code, *capsys.readouterr()

    return run


def score(tmp_path, values: list[float], rows: slice = slice(None), task: str = "gsm8k") -> str:
    """scores.jsonl as eval/run.py writes it, in another order, of some rows of the benchmark."""
    (tmp_path / task).mkdir()
    lines = (tmp_path / "test.jsonl").read_text().splitlines()[rows]
    made = [
        {"doc_sha": digest(json.loads(line))[:16], "scores": {"em": x}} for line, x in zip(lines, values, strict=True)
    ]
    (tmp_path / task / "scores.jsonl").write_text("".join(json.dumps(line) + "\n" for line in made[::-1]))
    return f"{task}/scores.jsonl"


def test_scores_of_some_rows_are_found_by_their_digest(command, tmp_path):
    """As of MBPP, whose file has 974 rows, 500 of which are scored; other columns do not matter."""
    scores = score(tmp_path, [0.5], slice(1, 2))
    lines = [json.loads(line) | {"url": "x"} for line in (tmp_path / "test.jsonl").read_text().splitlines()]
    (tmp_path / "test.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    code, out, _ = command("--scores", scores, columns="question, answer ")
    assert code == 0 and "items with scores: 1 of 2" in out and "em: clean 0.5000 (n 1)\n" in out
    (tmp_path / "test.jsonl").write_text(json.dumps(lines[0]) + "\n")
    said = (
        "gsm8k/scores.jsonl: 1 of 1 documents are not among the 1 rows of test.jsonl: the benchmark rows must be those"
    )
    code, out, err = command("--scores", scores)
    assert (code, out) == (2, "") and said in err
    (tmp_path / "test.jsonl").write_text('{"question": "q"}\n')
    assert (
        "test.jsonl has no column answer, which the rows of gsm8k have"
        in command("--scores", scores, columns="question")[2]
    )


@pytest.mark.parametrize("output", ["none/report.json", "folder", "train.jsonl/x"])
def test_nothing_is_searched_for_an_output_that_cannot_be_written(command, tmp_path, output):
    (tmp_path / "folder").mkdir()
    code, out, err = command("--output", output, train="none.jsonl")  # which would be the next error
    assert (code, out) == (2, "") and err.startswith(output) and "folder" in err and err.count("\n") == 1


def test_the_command(command, tmp_path):
    code, out, _ = command("--scores", score(tmp_path, [1.0, 0.0]), "--output", "report.json")
    assert code == 0 and "rows that share 13 words, or a shorter item: 1 of 402 (0.25%)" in out
    assert "items that share 13 words, or a shorter item: 1 of 2 (50.00%)" in out
    low, high = two_proportions(0, 1, 1, 1)
    line = f"em: clean 0.0000 (n 1), flagged 1.0000 (n 1), difference +1.0000 [{low:+.4f}, {high:+.4f}]"
    assert line in out and f"item 0, row 1 (of 1 rows): {' '.join(words(ITEM)[:13])}" in out
    report = json.loads((tmp_path / "report.json").read_text())
    assert report["train"] == "train.jsonl" and [item["item"] for item in report["items"]] == [0]
    assert report["scores"]["em"]["ci95"] == [low, high] and not (tmp_path / "report.json.partial").exists()


@pytest.mark.parametrize(
    ("argv", "changed", "said"),
    [
        (["--train-columns", "content"], {}, "train.jsonl has no column content; it has text"),
        ([], {"columns": "q"}, "test.jsonl has no column q; it has question, answer"),
        ([], {"train": "none.jsonl"}, "none.jsonl does not exist"),
        ([], {"train": "broken.jsonl"}, "broken.jsonl: after row 0: JSON parse error"),
        (["--n", "0"], {}, "--n 0: needs a number of words above 0"),
        (["--scores", "none"], {}, "none: No such file"),
        (["--scores", "train.jsonl"], {}, "--scores train.jsonl is no scores.jsonl of a task that is scored"),
        (["--scores", "scores.jsonl"], {}, " is no task; needed is <output_dir>/<task>/scores.jsonl"),
        (["--scores", "mixed.jsonl"], {}, "--scores mixed.jsonl is no scores.jsonl"),
        (["--scores", "broken.jsonl"], {}, "broken.jsonl, line 2 is not JSON"),
    ],
)
def test_what_the_user_can_mend(command, tmp_path, argv, changed, said):
    (tmp_path / "scores.jsonl").write_text('{"doc_sha": "0", "scores": {"em": 1.0}}\n')
    (tmp_path / "mixed.jsonl").write_text('{"doc_sha": "0", "scores": {"em": 1.0}}\n{"doc_sha": "1", "scores": {}}\n')
    (tmp_path / "broken.jsonl").write_text('{"text": "a"}\n{"text":\n')
    code, out, err = command(*argv, "--output", "report.json", **changed)
    assert code == 2 and said in err and "Traceback" not in err and out == ""
    assert not (tmp_path / "report.json").exists()


def test_the_built_in_questions_are_in_no_training_row(command, tmp_path):
    """Whole, that is: they come from the same sentences, so they share n-grams. An --n above their length says so."""
    argv = ["--benchmark", "builtin:arithmetic/test", "--benchmark-columns", "question", "--train-columns", "messages"]
    code, out, _ = command(*argv, "--n", "100", train="builtin:arithmetic/sft")
    assert code == 0 and "items that share 100 words, or a shorter item: 0 of 20000" in out
    assert "rows that share 100 words, or a shorter item: 0 of 20000" in out
