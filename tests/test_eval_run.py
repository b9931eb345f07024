"""eval/run.py from end to end: what it writes, and that neither kills nor processes change a number."""

import json
import shutil
from pathlib import Path

import jsonschema
import pytest
import torch
from peft import PeftModel

from llm_recipes.evaluation import runs
from llm_recipes.evaluation.model import Model
from tests.evaluating import DATA, EVALUATE, evaluate, lines, load, results, save, tokenizer
from tests.running import ROOT, add_adapter, launch, run, write_rows

SCHEMA = json.loads((ROOT / "eval/results.schema.json").read_text())
FILES = {
    "hellaswag": {"validation": str(DATA / "hellaswag.jsonl")},
    "gsm8k": {"train": str(DATA / "gsm8k_train.jsonl"), "test": str(DATA / "gsm8k_test.jsonl")},
}
FEW = ["--tasks", "gsm8k,hellaswag", "--data_files", json.dumps(FILES), "--max_new_tokens", 12, "--num_fewshot", 0]
FEW += ["--max_batch_tokens", 300]  # several units each


@pytest.fixture(scope="module")
def chat(tmp_path_factory) -> str:
    return save(tmp_path_factory.mktemp("models") / "chat", chat=True)


@pytest.fixture
def ours(tmp_path, monkeypatch, capfd):
    """`ours(*argv)` runs eval/run.py in an empty folder."""
    monkeypatch.chdir(tmp_path)
    return lambda *argv: evaluate(monkeypatch, capfd, *argv)


def written(folder, names=("samples.jsonl", "scores.jsonl", "identity.json")) -> dict:
    """Every file of the tasks, and results.json but for the seconds."""
    found = {str(path.relative_to(folder)): path.read_bytes() for name in names for path in Path(folder).rglob(name)}
    head = results(folder)
    for task in head["tasks"].values():
        del task["seconds"], task["run"]["world_size"]
    return found | {"results.json": head}


# ---- what is written -------------------------------------------------------------------------------


def test_everything_at_once(ours, tmp_path, chat):
    """Tasks of all kinds; results.json keeps to its schema, and every output says that the run was limited."""
    files = {
        **FILES, "mmlu": {split: str(DATA / f"mmlu_{split}.jsonl") for split in ("dev", "test")},
        "perplexity": write_rows(tmp_path / "pages.jsonl", [{"text": r["page"]} for r in lines(DATA / "wikitext.jsonl")]),
    }  # fmt: skip
    tasks = ["perplexity", "gsm8k", "hellaswag", "mmlu", "arithmetic", "arithmetic_chat", "gsm8k_chat", "humaneval"]
    argv = ["--model", chat, "--tasks", ",".join(tasks), "--limit", 3, "--data_files", json.dumps(files)]
    done = ours(*argv, "--max_new_tokens", 8, "--output_dir", "out", "--sandbox", "basic")
    assert done.code == 0, done.err
    found = results("out")
    jsonschema.Draft202012Validator.check_schema(SCHEMA)
    jsonschema.validate(found, SCHEMA, jsonschema.Draft202012Validator)
    assert list(found["tasks"]) == ["perplexity_rolling", "perplexity_strided", *tasks[1:]]
    assert {task["limit"] for task in found["tasks"].values()} == {3}
    table = Path("out/results.md").read_text()
    assert table in done.out and table.count("(first 3)") == len(table.splitlines()) - 2
    assert "the first 3 rows of each task: figures for trying out" in done.out
    for name, task in found["tasks"].items():
        samples, scores = lines(f"out/{name}/samples.jsonl"), lines(f"out/{name}/scores.jsonl")
        assert len(scores) == task["n"] and sorted(p.name for p in Path("out", name).iterdir()) == [
            "identity.json",
            "samples.jsonl",
            "scores.jsonl",
        ]
        assert [line["doc"] for line in scores] == sorted({line["doc"] for line in samples})
        shas = {line["doc"]: line["doc_sha"] for line in samples}
        assert all(line["doc_sha"] == shas[line["doc"]] for line in scores)
        for metric, values in task["metrics"].items():
            if "perplexity" not in metric and "bits" not in metric:
                mean = sum(line["scores"][metric] for line in scores) / len(scores)
                assert values["value"] == pytest.approx(mean) and values["n"] == len(scores)
    assert {line["group"] for line in lines("out/mmlu/scores.jsonl")} == {"abstract_algebra"}
    assert found["tasks"]["gsm8k"]["truncated"] == 3 and "3 of 3 prompts cut on the left" in done.out
    assert found["tasks"]["gsm8k"]["num_fewshot"] == 5 and found["tasks"]["gsm8k"]["seed"] == 1234
    assert found["tasks"]["arithmetic_chat"]["generation"]["stop"] == ["<|im_end|>"]  # where a turn ends
    assert found["tasks"]["humaneval"]["sandbox"] is not None and found["tasks"]["gsm8k"]["sandbox"] is None
    unfinished = sum(line["unfinished"] for line in lines("out/arithmetic/samples.jsonl"))
    assert found["tasks"]["arithmetic"]["unfinished"] == unfinished


@pytest.mark.parametrize("where", [(), ("model",), ("tasks", "gsm8k"), ("tasks", "gsm8k", "data")])
def test_the_schema_takes_nothing_else(where, ours, chat):
    ours("--model", chat, *FEW, "--output_dir", "out", "--limit", 1)
    found = results("out")
    jsonschema.validate(found, SCHEMA)
    place = found
    for key in where:
        place = place[key]
    place["more"] = 1
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate(found, SCHEMA)


def test_answers_may_hold_any_character(ours, tmp_path, chat):
    """Line separators of Unicode among them, which part no lines of a JSON Lines file."""
    odd = "a\u2028b\u0085c\u2029d\x0be\x1cf\r\ng\u00e9\U0001f600"
    rows = [{"question": odd, "answer": "#### 1"}, {"question": "two?", "answer": "#### 2"}]
    files = json.dumps({"gsm8k": {"test": write_rows(tmp_path / "rows.jsonl", rows)}})
    argv = ["--model", chat, "--tasks", "gsm8k", "--num_fewshot", 0, "--max_new_tokens", 4, "--data_files", files]
    for _ in range(2):
        done = ours(*argv, "--output_dir", "out")
        assert done.code == 0, done.err
    assert lines("out/gsm8k/samples.jsonl")[0]["prompt"] == f"Question: {odd}\nAnswer:"


def only(task: str, *argv) -> list:
    return ["--tasks", task, "--data_files", json.dumps({task: FILES[task]}), *argv]


def test_samples_are_drawn_with_the_seed(ours, chat):
    argv = only("gsm8k", "--model", chat, "--num_fewshot", 0, "--max_new_tokens", 12, "--num_samples", 3)
    for out, more in (("a", ("--max_batch_tokens", 300)), ("b", ()), ("c", ("--seed", 7))):
        done = ours(*argv, "--temperature", 1.0, "--top_p", 0.9, *more, "--output_dir", out)
        assert done.code == 0, done.err
    a, b, c = ([line["outputs"] for line in lines(f"{out}/gsm8k/samples.jsonl")] for out in "abc")
    assert a == b != c and all(len({*texts}) == 3 for texts in a)
    assert results("c")["tasks"]["gsm8k"]["seed"] == 7


def test_an_adapter_is_merged(ours, tmp_path, chat):
    add_adapter(chat, str(tmp_path / "adapter"))
    argv = only("hellaswag", "--model", "./adapter", "--max_batch_tokens", 1)
    done = ours(*argv, "--output_dir", "out")
    assert done.code == 0, done.err
    model = PeftModel.from_pretrained(load(chat), str(tmp_path / "adapter")).eval()
    reference = Model(model, tokenizer(), 1)
    sample = lines("out/hellaswag/samples.jsonl")[0]
    (row, *_) = lines(DATA / "hellaswag.jsonl")
    for loglik, ending in zip(sample["logliks"], row["endings"], strict=True):
        ending = " " + ending.replace("  ", " ")
        context, continuation = reference.encode_pair(sample["prompt"], ending)
        with torch.no_grad():
            logprobs = model(torch.tensor([context + continuation[:-1]])).logits[0, len(context) - 1 :].log_softmax(-1)
        expected = logprobs.gather(1, torch.tensor(continuation)[:, None]).sum().item()
        assert loglik == pytest.approx(expected, abs=2e-3)
    other = ours(*only("hellaswag", "--model", chat, "--max_batch_tokens", 1), "--output_dir", "out")
    assert other.code == 2 and "holds results of another model (./adapter, float32)" in other.err


# ---- once, twice, killed, in two processes ---------------------------------------------------------


@pytest.fixture(scope="module")
def whole(chat, tmp_path_factory) -> dict:
    """What a run without a kill writes."""
    folder = tmp_path_factory.mktemp("whole")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        done = run("--model", chat, *FEW, "--output_dir", "out", script=EVALUATE)
    assert done.code == 0, done.err
    return written(folder / "out")


# Kills the run in the middle of the unit or of the replacement of a file with this number, counted over the whole run.
KILLED = """
import json, os, runpy, signal
from llm_recipes.evaluation import runs

kind, left = "{kind}", [{number}]
append, replace = runs.Samples.append, os.replace

def now():
    left[0] -= 1
    return left[0] == 0

def torn(self, lines):
    if kind == "unit" and now():
        text = "".join(json.dumps(line, ensure_ascii=False) + chr(10) for line in lines).encode()
        with (self.folder / f"part-{{self.rank}}.jsonl").open("ab") as file:
            file.write(text[: len(text) * 2 // 3])
        os.kill(os.getpid(), signal.SIGKILL)
    append(self, lines)

def replaced(*names):
    if kind == "file" and now():
        os.kill(os.getpid(), signal.SIGKILL)
    replace(*names)

runs.Samples.append, runs.os.replace = torn, replaced
runpy.run_path("{script}", run_name="__main__")
"""


@pytest.mark.parametrize(
    "kills", [[("unit", 1), ("unit", 2), ("unit", 1)], [("unit", 4), ("file", 3)], [("file", 1), ("file", 5)]]
)  # fmt: skip
def test_kills_change_nothing(tmp_path, monkeypatch, chat, whole, kills):
    """In the middle of a line, between the files of a task, before results.json: the same command goes on."""
    monkeypatch.chdir(tmp_path)
    argv = ["--model", chat, *FEW, "--output_dir", "out"]
    for kind, number in kills:
        Path("killed.py").write_text(KILLED.format(kind=kind, number=number, script=EVALUATE))
        shutil.copy(EVALUATE.with_name("config.yaml"), "config.yaml")
        assert run(*argv, script=Path("killed.py")).code == -9
    assert run(*argv, script=EVALUATE).code == 0
    assert written("out") == whole
    assert not [path for path in Path("out").rglob("*") if path.name.startswith("part-")]


def test_a_torn_last_line_is_written_again(ours, chat, whole):
    argv = ["--model", chat, *FEW, "--output_dir", "out"]
    for name in ("gsm8k", "hellaswag"):
        for cut in (1, 30, 10_000):
            assert ours(*argv).code == 0
            samples = Path(f"out/{name}/samples.jsonl")
            text = samples.read_bytes()
            samples.rename(samples.with_name("part-3.jsonl")).write_bytes(text[:-cut])
            Path("out/results.json").unlink()
            assert ours(*argv).code == 0
            assert written("out") == whole


def test_a_finished_run_computes_nothing(ours, chat, whole, monkeypatch):
    argv = ["--model", chat, *FEW, "--output_dir", "out"]
    assert ours(*argv).code == 0

    def asked(*_):
        raise AssertionError("the model is asked again")

    monkeypatch.setattr(runs, "work", asked)
    assert ours(*argv).code == 0 and written("out") == whole
    more = ours(*only("hellaswag", "--model", chat, "--output_dir", "out", "--max_batch_tokens", 300))
    assert more.code == 0 and written("out") == whole  # a task of them alone: the other stays


def test_two_processes_write_the_same(tmp_path, monkeypatch, chat, whole):
    monkeypatch.chdir(tmp_path)
    done = launch("ddp", "--model", chat, *FEW, "--output_dir", "out", script=EVALUATE)
    assert done.code == 0, done.err
    assert written("out") == whole and results("out")["tasks"]["hellaswag"]["run"]["world_size"] == 2
    assert not list(Path("out").rglob("part-*"))


# ---- what may not be mixed -------------------------------------------------------------------------


def test_another_model_is_refused(ours, tmp_path, chat, whole):
    model = str(shutil.copytree(chat, tmp_path / "model"))
    assert ours("--model", model, *FEW, "--output_dir", "out").code == 0
    before = written("out")
    for change in ("weights", "rope", "end"):
        if change == "weights":
            save(tmp_path / "model", seed=1)
        else:
            shutil.rmtree(model)
            shutil.copytree(chat, model)
            file, key, value = {
                "rope": ("config.json", "rope_parameters", {"rope_theta": 500.0, "rope_type": "default"}),
                "end": ("generation_config.json", "eos_token_id", [0, 270]),
            }[change]
            keys = json.loads((tmp_path / "model" / file).read_text())
            (tmp_path / "model" / file).write_text(json.dumps(keys | {key: value}))
        done = ours("--model", model, *FEW, "--output_dir", "out")
        assert done.code == 2 and "hoose another --output_dir" in done.err, (change, done.err)
        assert written("out") == before


@pytest.mark.parametrize(
    ("key", "value", "said"),
    [("max_batch_tokens", 1, "max_batch_tokens: 300 -> 1"), ("limit", 2, "limit: None -> 2"), ("dtype", "bfloat16", "another model"),
     ("max_new_tokens", 9, "generation: ")],
)  # fmt: skip
def test_other_answers_are_refused(ours, chat, key, value, said):
    few = [str(word) for word in FEW]
    assert ours("--model", chat, *few, "--output_dir", "out").code == 0
    before = written("out")
    if f"--{key}" in few:
        few[few.index(f"--{key}") + 1] = str(value)
    else:
        few += [f"--{key}", str(value)]
    done = ours("--model", chat, *few, "--output_dir", "out")
    assert done.code == 2 and said in done.err and len(done.err.splitlines()) == 1
    assert written("out") == before


# ---- scores anew -----------------------------------------------------------------------------------


def test_rescore_needs_no_model(ours, tmp_path, chat):
    model = str(shutil.copytree(chat, tmp_path / "model"))
    argv = ["--model", model, *FEW, "--output_dir", "out"]
    assert ours(*argv).code == 0
    before = written("out")
    shutil.rmtree(model)
    for path in Path("out").rglob("scores.jsonl"):
        path.unlink()
    done = ours(*argv, "--rescore")
    assert done.code == 0, done.err
    assert written("out") == before
    limited = ours(*argv, "--rescore", "--limit", 2)
    assert limited.code == 2 and "are to other rows" in limited.err
    missing = ours("--model", model, "--tasks", "arithmetic", "--output_dir", "out", "--rescore")
    assert missing.code == 2 and "has no finished answers of arithmetic" in missing.err
    assert written("out") == before
    other = ours("--model", chat, *argv[2:], "--rescore")
    assert other.code == 2 and "are of " in other.err
    changed = ours(*argv, "--rescore", "--temperature", 0.7)
    assert changed.code == 2 and "temperature was 0.0" in changed.err, changed.err
    path = Path("out/hellaswag/samples.jsonl")
    path.write_text("".join(path.read_text().splitlines(keepends=True)[1:]))
    torn = ours(*argv, "--rescore")
    assert torn.code == 2 and "is not whole" in torn.err and written("out")["results.json"] == before["results.json"]
    path.write_text("not json\n")
    damaged = ours(*argv, "--rescore")
    assert damaged.code == 2 and "line 1 is damaged" in damaged.err
    path.unlink()
    gone = ours(*argv, "--rescore")
    assert gone.code == 2 and "is not whole" in gone.err and not path.exists()


def test_a_changed_protocol_is_not_put_on_old_answers(ours, chat):
    argv = only("hellaswag", "--model", chat, "--output_dir", "out")
    assert ours(*argv).code == 0
    identity = Path("out/hellaswag/identity.json")
    identity.write_text(identity.read_text().replace('"protocol": "lm-eval 1"', '"protocol": "lm-eval 0"'))
    for more in ((), ("--rescore",)):
        done = ours(*argv, *more)
        assert done.code == 2 and "lm-eval 0" in done.err and "lm-eval 1" in done.err, done.err


def test_dry_run_writes_nothing(ours, chat):
    done = ours("--model", chat, *FEW, "--output_dir", "out", "--dry_run")
    assert done.code == 0 and "Question: Half of 64 pupils" in done.out and not Path("out").exists()


def test_numbers_that_are_none_stop_the_run(ours, tmp_path):
    model = Path(save(tmp_path / "model"))
    weights = load(str(model))
    weights.lm_head.weight.data[5] = float("nan")
    weights.save_pretrained(model)
    done = ours("--model", model, *FEW, "--output_dir", "out")
    assert done.code == 1 and "not finite" in done.err and len(done.err.splitlines()) == 1
    assert not Path("out/results.json").exists()
