"""eval/card.py: results in both formats of the Hub, and nothing else of the card changed."""

import json

import pytest
import yaml
from huggingface_hub import ModelCard, parse_eval_result_entries

from llm_recipes._compat import state_digest
from tests.evaluating import load, save
from tests.running import ROOT, run

CARD = ROOT / "eval/card.py"
FRONT = """---
license: apache-2.0  # a comment that YAML would lose
tags: [llm-recipes,   "sft"]
{}library_name: transformers
---
"""
BODY = "\n# A model\n\n---\nmodel-index: in the body\n---\n\u2028 é\n"


def entry(value: float = 0.25, metric: str = "exact_match_strict", **keys) -> dict:
    metrics = {metric: {"value": value, "stderr": 0.1, "ci95": [0.1, 0.4], "n": 40}}
    return {
        "version": "lm-eval 3", "protocol": "as published", "num_fewshot": 5, "seed": 1234, "n": 40, "limit": None,
        "data": {"path": "openai/gsm8k", "own_files": False, "sha256": "0" * 64}, "generation": None, "sandbox": None, "truncated": 0,
        "unfinished": 0, "seconds": 1.0, "metrics": metrics,
    } | keys  # fmt: skip


@pytest.fixture
def measured(tmp_path, monkeypatch):
    """`measured(**tasks)` writes the results of a model in the folder `model`."""
    monkeypatch.chdir(tmp_path)
    save(tmp_path / "model")
    fingerprint = state_digest(load("model"))

    def write(**tasks) -> None:
        model = {"name": "model", "fingerprint": fingerprint, "dtype": "float32"}
        (tmp_path / "run").mkdir(exist_ok=True)
        (tmp_path / "run/results.json").write_text(json.dumps({"schema": 1, "model": model, "tasks": tasks}))

    return write


def card() -> ModelCard:
    return ModelCard.load("model/README.md")


def test_both_formats(measured, tmp_path):
    names = {"value": 0.5, "metric": "acc_norm", "num_fewshot": 0}
    wikitext = entry(26.5, "word_perplexity", num_fewshot=0)
    own = entry(data=entry()["data"] | {"path": "mine.jsonl", "own_files": True})
    warm = {"max_new_tokens": 1024, "num_samples": 1, "temperature": 0.7, "top_p": 1.0, "stop": []}
    measured(
        gsm8k=entry(), hellaswag=entry(**names), wikitext=wikitext, mmlu=entry(limit=5), arithmetic=entry(),
        gsm8k_chat=entry(), commonsense_qa=own, arc_easy=entry(num_fewshot=25), humaneval=entry(generation=warm, num_fewshot=0),
        **{"lm_eval:piqa": entry()},
    )  # fmt: skip
    (tmp_path / "model/README.md").write_text(FRONT.format("") + BODY)
    done = run("run", "model", script=CARD)
    assert done.code == 0, done.err
    assert "mmlu is left out: the first rows alone" in done.out
    for name, why in (
        ("arithmetic", "not the protocol of a benchmark of the Hub"), ("commonsense_qa", "its rows are your own files"),
        ("gsm8k_chat", "not the protocol"), ("lm_eval:piqa", "not the protocol"),
        ("arc_easy", "num_fewshot is not the benchmark's"), ("humaneval", "temperature is not the benchmark's"),
    ):  # fmt: skip
        assert f"{name} is left out: {why}" in done.out
    folder = tmp_path / "model/.eval_results"
    assert sorted(path.name for path in folder.iterdir()) == ["gsm8k.yaml", "hellaswag.yaml", "wikitext.yaml"]
    (gsm8k,) = parse_eval_result_entries(yaml.safe_load((folder / "gsm8k.yaml").read_text()))
    assert (gsm8k.dataset_id, gsm8k.task_id, gsm8k.value) == ("openai/gsm8k", "gsm8k", 25.0)
    assert gsm8k.notes == "exact_match_strict; 5-shot; lm-eval 3; as published; n=40"
    values = {(r.dataset_type, r.metric_type): r.metric_value for r in card().data.eval_results}
    assert values == {
        ("openai/gsm8k", "exact_match_strict"): 25.0,
        ("Rowan/hellaswag", "acc_norm"): 50.0,
        ("EleutherAI/wikitext_document_level", "word_perplexity"): 26.5,
    }
    assert card().data.model_name == "model" and card().data.license == "apache-2.0"


OTHERS = """model-index:
- name: mine
  results:
  - task: {type: text-generation}
    dataset: {name: else, type: some/other}
    metrics: [{type: acc, value: 3, name: theirs}]
"""


@pytest.mark.parametrize("line_break", ["\n", "\r\n"])
@pytest.mark.parametrize("index", ["", OTHERS])
def test_the_rest_of_the_card_stays_byte_for_byte(measured, tmp_path, line_break, index):
    readme = tmp_path / "model/README.md"
    readme.write_bytes((FRONT.format(index) + BODY).replace("\n", line_break).encode())
    measured(gsm8k=entry())
    assert run("run", "model", script=CARD).code == 0
    first = readme.read_bytes()
    assert first.endswith(("---\n" + BODY).replace("\n", line_break).encode())
    for line in FRONT.format("").splitlines():
        assert f"{line}{line_break}".encode() in first
    assert b"\n" in first and (line_break == "\n") == (b"\r" not in first)
    values = {r.metric_name: r.metric_value for r in card().data.eval_results}
    assert values == {"gsm8k exact_match_strict": 25.0} | ({"theirs": 3} if index else {})
    assert card().data.model_name == ("mine" if index else "model")
    run("run", "model", script=CARD)
    assert readme.read_bytes() == first  # again, and nothing changes
    measured(gsm8k=entry(0.75))
    run("run", "model", script=CARD)
    assert readme.read_bytes() == first.replace(b"25.0", b"75.0")


@pytest.mark.parametrize("text", [None, "", "# No front matter\n"])
def test_a_card_without_front_matter(measured, tmp_path, text):
    if text is not None:
        (tmp_path / "model/README.md").write_text(text)
    measured(gsm8k=entry())
    assert run("run", "model", script=CARD).code == 0
    assert card().data.eval_results[0].metric_value == 25.0
    assert (tmp_path / "model/README.md").read_text().endswith(f"---\n{text or ''}")


def test_results_of_other_weights_are_refused(measured, tmp_path):
    measured(gsm8k=entry())
    save(tmp_path / "model", seed=1)
    done = run("run", "model", script=CARD)
    assert done.code == 2 and "the weights in model are not those" in done.err and len(done.err.splitlines()) == 1
    assert not (tmp_path / "model/README.md").exists() and not (tmp_path / "model/.eval_results").exists()


def test_what_is_not_there(measured, tmp_path):
    for argv, message in (
        (("nothing", "model"), "nothing has no results.json"),
        (("run", "nowhere"), "nowhere does not exist"),
        (("run", "model"), "nothing for a card"),
    ):
        measured(gsm8k=entry(limit=4), arithmetic=entry())
        done = run(*argv, script=CARD)
        assert done.code == 2 and message in done.err and "Traceback" not in done.err, done.err
    assert not (tmp_path / "model/README.md").exists()
