"""Results of a run into the card of its model: python eval/card.py RUN MODEL_FOLDER

RUN is an output_dir of eval/run.py. Whole runs of tasks that the Hub knows go to MODEL_FOLDER/.eval_results/<task>.yaml
and to `model-index` in the README's front matter; the rest of the README stays as it is. Shares are in percent.
"""

import argparse
import re
from pathlib import Path

import yaml
from huggingface_hub import EvalResult, EvalResultEntry, ModelCard, ModelCardData, eval_result_entries_to_yaml
from transformers import AutoModelForCausalLM

from llm_recipes import _compat
from llm_recipes.adapters import whole_model
from llm_recipes.errors import UserError, entrypoint
from llm_recipes.evaluation.lm_eval_tasks import PREFIX
from llm_recipes.evaluation.results import load_results
from llm_recipes.evaluation.runs import write_text
from llm_recipes.evaluation.setup import OF_ANSWERS
from llm_recipes.evaluation.tasks import Task, load_tasks

FRONT = re.compile(r"\A(\s*---[ \t]*\r?\n)(.*?)^(---[ \t]*(?:\r?\n|\Z))", re.S | re.M)
INDEX = re.compile(r"^model-index:.*?(?=^[^\s\-#]|\Z)", re.S | re.M)  # up to the next key


def percent(name: str, metric: dict) -> float:
    return round(metric["value"] * (1 if "perplexity" in name or "bits" in name else 100), 4)


def left_out(task: Task | None, result: dict) -> str | None:
    """Why a result is not what the Hub's readers take it for."""
    if task is None or task.hub is None:
        return "not the protocol of a benchmark of the Hub"
    if result["limit"]:
        return "the first rows alone"
    if result["data"]["own_files"]:
        return "its rows are your own files"
    generation = result["generation"] or {}
    keys = [key for key in OF_ANSWERS if key in generation and generation[key] != getattr(task, key)]
    keys += ["num_fewshot"] if result["num_fewshot"] != task.num_fewshot else []
    return f"{', '.join(keys)} is not the benchmark's" if keys else None


def card_with(text: str, name: str, results: list[EvalResult]) -> str:
    """The README `text` with `results` in its front matter, which replace those of the same dataset and name."""
    there = FRONT.match(text)
    head, front, end, body = (*there.groups(), text[there.end() :]) if there else ("---\n", "", "---\n", text)
    old = ModelCard(there[0]).data if there else ModelCardData()
    new = {(result.dataset_type, result.metric_name) for result in results}
    kept = [result for result in old.eval_results or [] if (result.dataset_type, result.metric_name) not in new]
    line_break = "\r\n" if head.endswith("\r\n") else "\n"
    index = ModelCardData(model_name=old.model_name or name, eval_results=[*kept, *results]).to_yaml(line_break)
    return head + INDEX.sub("", front) + index + line_break + end + body


@entrypoint
def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], allow_abbrev=False)
    parser.add_argument("run", type=Path)
    parser.add_argument("model_folder", type=Path)
    args = parser.parse_args()
    found = load_results(args.run)
    if found is None:
        raise UserError(f"{args.run} has no results.json: it is no output_dir of a finished eval/run.py")
    whole = whole_model(str(args.model_folder.absolute()), key="MODEL_FOLDER")
    model = AutoModelForCausalLM.from_pretrained(whole, dtype=found["model"]["dtype"])
    if _compat.state_digest(model) != found["model"]["fingerprint"]:
        raise UserError(
            f"{args.run} measured {found['model']['name']}; the weights in {args.model_folder} are not those"
        )

    named = [task for task in found["tasks"] if not task.startswith(PREFIX)]
    tasks = load_tasks(Path(__file__).parent / "tasks", named) if named else {}
    taken, results = [], []
    for name, result in found["tasks"].items():
        task = tasks[name][1] if name in tasks else None
        if why := left_out(task, result):
            print(f"{name} is left out: {why}")
            continue
        dataset, hub_name, headline = task.hub
        metrics = {metric: percent(metric, values) for metric, values in result["metrics"].items()}
        notes = f"{headline}; {result['num_fewshot']}-shot; {result['version']}; {result['protocol']}; n={result['n']}"
        entry = EvalResultEntry(dataset, hub_name, metrics[headline], notes=notes)
        taken.append((name, yaml.safe_dump(eval_result_entries_to_yaml([entry]), sort_keys=False, allow_unicode=True)))
        results += [
            EvalResult(
                task_type="text-generation", dataset_type=dataset, dataset_name=hub_name, metric_type=metric,
                metric_value=value, metric_name=f"{name} {metric}",
            )
            for metric, value in metrics.items()
        ]  # fmt: skip
    if not results:
        raise UserError(f"{args.run} has nothing for a card: it takes whole runs of benchmarks that the Hub knows")

    readme = args.model_folder / "README.md"
    text = readme.read_bytes().decode() if readme.is_file() else ""
    write_text(readme, card_with(text, args.model_folder.absolute().name, results))
    (args.model_folder / ".eval_results").mkdir(exist_ok=True)
    for name, entries in taken:
        write_text(args.model_folder / f".eval_results/{name}.yaml", entries)
    print(f"{readme} and .eval_results/: {', '.join(name for name, _ in taken)}")


if __name__ == "__main__":
    main()
