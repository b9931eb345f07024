"""What eval/run.py refuses: a sentence, exit code 2, nothing written."""

import json
import shutil
from pathlib import Path

import datasets
import huggingface_hub
import pytest
import torch
from transformers import AutoTokenizer, BertConfig, BertForMaskedLM

from llm_recipes import sandbox
from tests.evaluating import DATA, evaluate, lines, network, save, tokenizer
from tests.running import write_rows

HELLASWAG = str(DATA / "hellaswag.jsonl")
GSM8K = {"train": str(DATA / "gsm8k_train.jsonl"), "test": str(DATA / "gsm8k_test.jsonl")}


@pytest.fixture(scope="module")
def models(tmp_path_factory) -> Path:
    """Folders `base` and `chat`, and some in which something is wrong."""
    folder = tmp_path_factory.mktemp("models")
    save(folder / "base")
    save(folder / "chat", chat=True)
    shutil.copytree(folder / "base", folder / "other_tokenizer")
    more = AutoTokenizer.from_pretrained(folder / "base")
    more.add_tokens([f"word{i}" for i in range(10)])
    more.save_pretrained(folder / "other_tokenizer")
    network(context=256).save_pretrained(folder / "no_tokenizer")
    shutil.copytree(folder / "base", folder / "masked")
    shape = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 64}
    torch.manual_seed(0)
    BertForMaskedLM(BertConfig(vocab_size=300, initializer_range=0.2, **shape)).save_pretrained(folder / "masked")
    shutil.copytree(folder / "base", folder / "no_weights")
    (folder / "no_weights/model.safetensors").unlink()
    shutil.copytree(folder / "base", folder / "torn")
    weights = (folder / "base/model.safetensors").read_bytes()
    (folder / "torn/model.safetensors").write_bytes(weights[: len(weights) // 2])
    shutil.copytree(folder / "base", folder / "larger")
    config = json.loads((folder / "base/config.json").read_text()) | {"intermediate_size": 128}
    (folder / "larger/config.json").write_text(json.dumps(config))
    shutil.copytree(folder / "base", folder / "no_ends")
    bare = tokenizer()
    bare.eos_token = None
    bare.save_pretrained(folder / "no_ends")
    return folder


@pytest.fixture
def refused(tmp_path, monkeypatch, capfd, models):
    """`refused(*argv)` is the one or two lines on stderr; `model` is one of `models`."""
    monkeypatch.chdir(tmp_path)

    def call(*argv, model: str = "chat", lines: int = 2) -> str:
        argv = [*([] if "--model" in argv else ["--model", models / model]), *argv, "--output_dir", "out"]
        done = evaluate(monkeypatch, capfd, *argv)
        assert done.code == 2, (done.code, done.out, done.err)
        assert 1 <= len(done.err.splitlines()) <= lines and "Traceback" not in done.err, done.err
        assert not Path("out").exists()
        return done.err

    return call


def offline(monkeypatch) -> None:
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)


def files(**given) -> list[str]:
    return ["--data_files", json.dumps(given)]


# ---- the command -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("argv", "said"),
    [
        (["--tasks", "helaswag"], "tasks: unknown task `helaswag`, did you mean `hellaswag`?"),
        (["--tasks", "gsm8k,helaswag"], "did you mean `hellaswag`?"),
        (["--tasks", "lm_eval:no_such_task"], "tasks: lm-eval has no task no_such_task"),
        (["--tasks", "gsm8k, mmlu_close"], "unknown task `mmlu_close`, did you mean `mmlu_cloze`?"),
        (["--tasks", "[]"], "tasks: name at least one of "),
        (["--tasks", "gsm8k", "--num_fewshots", 3], "unknown key `num_fewshots`, did you mean `num_fewshot`?"),
        (["--tasks", "gsm8k", "--limit", 0], "limit: must be at least 1"),
        (["--tasks", "gsm8k", "--max_batch_tokens", 0], "max_batch_tokens: must be at least 1"),
        (["--tasks", "gsm8k", "--dtype", "float64"], "dtype: expects one of"),
        (["--tasks", "gsm8k", "--backend", "sglang"], "backend: expects one of"),
        (["--tasks", "gsm8k", "--backend", "vllm"], "vllm is not installed"),
        (["--tasks", "perplexity", "--rescore", "--dry_run"], "rescore and dry_run exclude each other"),
        (["--tasks", "lm_eval:sciq", "--rescore"], "those of lm-eval run in one process and are not rescored"),
        (["--tasks", "hellaswag", "--temperature", 0.5], "temperature: no task of this run writes answers"),
        (["--tasks", "hellaswag,perplexity", "--max_new_tokens", 5], "max_new_tokens: no task of this run writes answers"),
        (["--tasks", "arithmetic", "--num_samples", 4], "4 greedy answers of arithmetic are all the same"),
        (["--tasks", "arithmetic", "--num_samples", 4, "--temperature", 0], "4 greedy answers of arithmetic"),
        (["--tasks", "humaneval_64", "--temperature", 0], "64 greedy answers of humaneval_64"),
        (["--tasks", "arithmetic", "--top_p", 0.9], "top_p: answers are greedy"),
        (["--tasks", "arithmetic", "--temperature", 1, "--top_p", 1.5], "top_p: a share, at most 1, got 1.5"),
        (["--tasks", "perplexity", "--num_fewshot", 2], "num_fewshot: perplexity_rolling takes no examples"),
        (["--tasks", "humaneval", "--num_fewshot", 2, "--sandbox", "basic"], "num_fewshot: humaneval takes no examples"),
        (["--tasks", "arithmetic", "--num_fewshot", 5000], "num_fewshot: arithmetic has 1000 examples, fewer than 5000"),
    ],
)  # fmt: skip
def test_the_command(refused, argv, said):
    assert said in refused(*argv)


@pytest.mark.parametrize(
    ("env", "strategy"),
    [
        ({"ACCELERATE_USE_DEEPSPEED": "true", "ACCELERATE_DEEPSPEED_ZERO_STAGE": "3"}, "DeepSpeed ZeRO-3"),
        ({"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2"}, "FSDP2"),
    ],
)
def test_a_sharded_launch(refused, monkeypatch, env, strategy):
    """The environment in which zero3.yaml and fsdp2.yaml start a process."""
    for key, value in env.items():
        monkeypatch.setenv(key, value)
    said = refused("--tasks", "perplexity")
    assert f"a whole model on each process, {strategy} has no part: launch with ddp.yaml or cpu.yaml" in said


def test_a_sandbox_with_a_layer_missing(refused, monkeypatch):
    monkeypatch.setattr(sandbox, "layers", lambda: ("rlimits", "seccomp"))  # another machine
    assert "sandbox: no namespaces, no landlock on this machine" in refused("--tasks", "humaneval")


# ---- the model -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("model", "said"),
    [
        ("outputs/sft", "model: outputs/sft does not exist"),
        ("./nowhere", "model: ./nowhere does not exist (working directory:"),
        ("no/such-model", "model: no/such-model"),
    ],
)
def test_a_model_that_is_not_there(refused, monkeypatch, model, said):
    offline(monkeypatch)
    assert said in refused("--model", model, "--tasks", "perplexity")


def test_the_recipe_that_makes_the_model_is_named(refused, tmp_path):
    (tmp_path / "recipes/sft").mkdir(parents=True)
    (tmp_path / "recipes/sft/run.py").touch()
    assert "outputs/sft does not exist: run recipes/sft/run.py first" in refused(
        "--model", "outputs/sft", "--tasks", "perplexity"
    )


@pytest.mark.parametrize(
    ("model", "said"),
    [
        ("other_tokenizer", "has 310 ids, the model 300: it is another model's"),
        ("no_tokenizer", "has no tokenizer"),
        ("masked", "it is no causal language model"),
        ("no_weights", "no file named model.safetensors"),
        ("torn", "model: the weights of"),
        ("larger", "model: the weights of"),
        ("no_ends", "has neither a BOS nor an EOS"),
    ],
)
def test_a_model_that_cannot_be_measured(refused, model, said):
    assert said in refused("--tasks", "perplexity", model=model)


def test_a_chat_without_template(refused):
    said = refused("--tasks", "perplexity,gsm8k_chat", model="base")
    assert "gsm8k_chat asks through a chat template" in said and "base has none" in said


# ---- the rows --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"hellswag": HELLASWAG}, "unknown file of tasks `hellswag`, did you mean `hellaswag`?"),
        ({"gsm8k": GSM8K}, "unknown file of tasks `gsm8k`; this run has hellaswag"),
        ({"hellaswag": {"validtion": HELLASWAG}}, "unknown split `validtion`, did you mean `validation`?"),
        ({"hellaswag": {"train": HELLASWAG}}, "hellaswag has no file for the split validation"),
        ({"hellaswag": {}}, "hellaswag: expects a path, or one a split"),
        ({"hellaswag": 3}, "hellaswag: expects a path, or one a split"),
        ({"hellaswag": "nowhere.jsonl"}, "hellaswag: nowhere.jsonl does not exist"),
        ({"hellaswag": GSM8K["test"]}, "has no column activity_label; it has question, answer"),
    ],
)
def test_data_files(refused, given, said):
    assert said in refused("--tasks", "hellaswag", *files(**given))


def rows_with(**changes) -> list[dict]:
    rows = lines(HELLASWAG)
    return [*rows[:2], rows[2] | changes, rows[3]]


@pytest.mark.parametrize(
    ("rows", "said"),
    [
        (rows_with(ctx_b=None), "hellaswag: row 2 has nothing in its column ctx_b"),
        (rows_with(label=""), "hellaswag: row 2 is not one of this benchmark: ValueError"),  # its test rows are so
        ([], "hellaswag: rows.jsonl: no rows"),
    ],
)
def test_rows_that_are_broken(refused, tmp_path, rows, said):
    write_rows(tmp_path / "rows.jsonl", rows)
    assert said in refused("--tasks", "hellaswag", *files(hellaswag="rows.jsonl"))


def test_answers_that_are_no_text_are_found_before_the_model_runs(refused, tmp_path):
    write_rows(tmp_path / "rows.jsonl", [{"question": "Two and two?", "answer": 4}])
    said = refused("--tasks", "gsm8k_chat", *files(gsm8k="rows.jsonl"))
    assert "gsm8k_chat: row 0 has 4 in its column answer, where str belongs" in said


def test_folders_that_cannot_be_written(refused, monkeypatch, capfd, models, tmp_path):
    (tmp_path / "file").write_text("")
    base = str(models / "base")
    for folder, said in (
        ("file", "not a folder"),
        ("/proc/x", "cannot be written"),
        ("", "empty: not a folder"),
        (base, "holds a model"),
    ):
        argv = ["--model", base, "--tasks", "humaneval", "--output_dir", folder]
        done = evaluate(monkeypatch, capfd, *argv)
        assert done.code == 2 and f"output_dir: {folder}" in done.err and said in done.err, done.err
    assert "is a file: give the folder" in refused(
        "--tasks", "humaneval", "--model", str(models / "base/model.safetensors")
    )


def test_broken_json_with_its_line(refused, tmp_path):
    text = Path(HELLASWAG).read_text().splitlines()
    (tmp_path / "rows.jsonl").write_text("\n".join([*text[:2], text[2][:40], *text[3:]]))
    said = refused("--tasks", "hellaswag", *files(hellaswag="rows.jsonl"))
    assert "hellaswag: rows.jsonl: line 3 is not valid JSON" in said


def test_examples_from_the_test_itself(refused):
    """One file for all splits would put the question, with its answer, before itself."""
    said = refused("--tasks", "gsm8k", *files(gsm8k=GSM8K["test"]), "--num_fewshot", 3)
    assert "stands among its own examples" in said and "{gsm8k: {test: ..., train: ...}}" in said
    twice = {"test": GSM8K["test"], "train": GSM8K["test"]}
    assert "stands among its own examples" in refused("--tasks", "gsm8k", *files(gsm8k=twice), "--num_fewshot", 3)


def test_too_few_examples(refused):
    mmlu = {"dev": str(DATA / "mmlu_dev.jsonl"), "test": str(DATA / "mmlu_test.jsonl")}
    said = refused("--tasks", "mmlu", *files(mmlu=mmlu), "--num_fewshot", 6)
    assert "num_fewshot: mmlu has 5 examples for row 0, fewer than 6" in said
    said = refused("--tasks", "gsm8k", *files(gsm8k=GSM8K), "--num_fewshot", 8)
    assert "num_fewshot: gsm8k has 7 examples, fewer than 8" in said


def test_one_file_for_tasks_with_rows_of_their_own(refused):
    said = refused("--tasks", "arc_easy,arc_challenge", *files(arc=str(DATA / "arc.jsonl")))
    assert "arc_easy and arc_challenge have rows of their own: run them one by one" in said


def test_a_choice_that_is_longer_than_the_context(refused, tmp_path):
    write_rows(tmp_path / "rows.jsonl", rows_with(endings=["a", "b " * 400, "c", "d"]))
    said = refused("--tasks", "hellaswag", *files(hellaswag="rows.jsonl"))
    assert "hellaswag: row 2: choice 1 has " in said and "the model reads 1 to 256" in said


def test_rows_of_the_hub_that_cannot_be_had(refused, monkeypatch):
    offline(monkeypatch)
    said = refused("--tasks", "hellaswag")
    assert "hellaswag: Rowan/hellaswag" in said and "--data_files '{hellaswag: file.jsonl}'" in said


# ---- what is counted and said ----------------------------------------------------------------------


def test_prompts_that_are_cut(tmp_path, monkeypatch, capfd, models):
    monkeypatch.chdir(tmp_path)
    argv = ["--model", models / "base", "--tasks", "gsm8k", *files(gsm8k=GSM8K), "--output_dir", "out", "--dry_run"]
    done = evaluate(monkeypatch, capfd, *argv)
    assert done.code == 0 and "4 of 4 prompts cut on the left: with the answer they may have 256 tokens" in done.out
    assert "answers of up to 128 tokens, half of what the model reads, not 256" in done.out
    done = evaluate(monkeypatch, capfd, *argv, "--max_new_tokens", 4, "--num_fewshot", 0)
    assert done.code == 0 and "cut on the left" not in done.out
