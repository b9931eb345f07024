"""Test items that stand in a training set:

python eval/contamination.py --train PATH --benchmark PATH --benchmark-columns question,answer [--n 13] [--output report.json]

PATH is a Hub id, a local file or folder, or builtin:<name>. With --scores <output_dir>/<task>/scores.jsonl of eval/run.py
it also says how the model does on clean and on flagged items; the benchmark has to have all rows that were scored.
"""

import argparse
import time
from pathlib import Path

from datasets.exceptions import DatasetsError

from llm_recipes.config import Source
from llm_recipes.datasets import load_rows
from llm_recipes.errors import UserError, entrypoint
from llm_recipes.evaluation.contamination import Index, scan, split_scores, strings
from llm_recipes.evaluation.results import check_output, read_jsonl
from llm_recipes.evaluation.runs import write_json
from llm_recipes.evaluation.tasks import digest, load_tasks

TASKS = Path(__file__).parent / "tasks"
BATCH = 200  # rows searched at a time
SHOWN = 3


def batches(source: Source, columns: list[str]):
    """Texts of the columns together, BATCH rows at a time. Raises UserError for a column or text that cannot be had."""
    done = 0
    try:
        for batch in load_rows(source, streaming=True).iter(BATCH):
            if missing := [column for column in columns if column not in batch]:
                raise UserError(f"{source.path} has no column {missing[0]}; it has {', '.join(batch)}")
            yield [strings(list(row)) for row in zip(*(batch[column] for column in columns), strict=True)]
            done += len(batch[columns[0]])
    except (DatasetsError, ValueError, OSError) as error:  # of the file; it is read only now
        raise UserError(f"{source.path}: after row {done}: {str(error).splitlines()[0]}") from error


def read_scores(path: str, benchmark: Source) -> dict[int, dict[str, float]]:
    """{benchmark row: its scores}, found by doc_sha. Raises UserError unless all that was scored is among the rows."""
    lines, name = read_jsonl(path), Path(path).absolute().parent.name
    kinds = {
        tuple(line["scores"]) if isinstance(line.get("doc_sha"), str) and isinstance(line.get("scores"), dict) else ()
        for line in lines
    }
    if len(kinds) != 1 or () in kinds:
        raise UserError(f"--scores {path} is no scores.jsonl of a task that is scored: doc_sha and scores in each line")
    try:
        task = load_tasks(TASKS, [name])[name][1]
    except (UserError, KeyError) as error:
        raise UserError(f"--scores {path}: {name} is no task; needed is <output_dir>/<task>/scores.jsonl") from error
    rows, scores = load_rows(benchmark), {line["doc_sha"]: line["scores"] for line in lines}
    if missing := [column for column in task.columns if column not in rows.column_names]:
        raise UserError(f"--scores: {benchmark.path} has no column {missing[0]}, which the rows of {name} have")
    shas = [digest(row)[:16] for row in rows.select_columns(list(task.columns)).to_list()]
    if strange := len(scores.keys() - set(shas)):
        raise UserError(
            f"--scores {path}: {strange} of {len(scores)} documents are not among the {len(shas)} rows of {benchmark.path}: "
            "the benchmark rows must be those that were scored"
        )
    return {item: scores[sha] for item, sha in enumerate(shas) if sha in scores}


def names(text: str) -> list[str]:
    return [name.strip() for name in text.split(",")]


def summarise(report: dict, seconds: float, output: str | None) -> None:
    size, n_rows, n_items = report["train_bytes"] / 1e6, report["train_rows"], report["benchmark_items"]
    print(f"{report['train']}: {n_rows} rows, {size:.1f} MB, {seconds:.1f} s ({size / seconds:.1f} MB/s)")
    for what, flagged, of in (("rows", report["flagged_rows"], n_rows), ("items", report["flagged_items"], n_items)):
        print(f"{what} that share {report['n']} words, or a shorter item: {flagged} of {of} ({flagged / of:.2%})")
    if report["items_without_words"]:
        print(f"items without a word, which nothing matches: {report['items_without_words']}")
    for item in report["items"][:SHOWN]:
        print(f"  item {item['item']}, row {item['row']} (of {item['rows']} rows): {item['ngram']}")
    if (more := len(report["items"]) - SHOWN) > 0:
        print(f"  ... {more} more items {f'in {output}' if output else '(--output writes them)'}")
    if "scores" in report:
        print(f"items with scores: {report['scored_items']} of {n_items}")
    for metric, figures in report.get("scores", {}).items():
        means = (
            f"{of} {figures[of]['mean']:.4f} (n {figures[of]['n']})" for of in ("clean", "flagged") if figures[of]["n"]
        )
        line = f"{metric}: {', '.join(means)}"
        if "difference" in figures:
            line += f", difference {figures['difference']:+.4f}"
        if "ci95" in figures:
            line += " [{:+.4f}, {:+.4f}]".format(*figures["ci95"])
        print(line)


@entrypoint
def main():
    parser = argparse.ArgumentParser(
        description=__doc__, allow_abbrev=False, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    for side, columns in (("train", "text"), ("benchmark", None)):
        parser.add_argument(f"--{side}", required=True, metavar="PATH")
        parser.add_argument(f"--{side}-name", help="Hub configuration")
        parser.add_argument(f"--{side}-split", default="train")
        parser.add_argument(
            f"--{side}-columns", type=names, default=columns, required=columns is None, help="comma-separated"
        )
    parser.add_argument("--n", type=int, default=13, help="words; 13 for pretraining, 8 for SFT and RL")
    parser.add_argument("--scores", help="<output_dir>/<task>/scores.jsonl")
    parser.add_argument("--output", help="JSON with every flagged row and item")
    args = parser.parse_args()
    if args.n < 1:
        raise UserError(f"--n {args.n}: needs a number of words above 0")
    output = args.output and check_output(args.output)
    train = Source(args.train, name=args.train_name, split=args.train_split)
    benchmark = Source(args.benchmark, name=args.benchmark_name, split=args.benchmark_split)
    items = [text for texts in batches(benchmark, args.benchmark_columns) for text in texts]
    scores = read_scores(args.scores, benchmark) if args.scores else None
    index, started = Index(items, args.n), time.perf_counter()
    report = {"train": args.train, "benchmark": args.benchmark} | scan(index, batches(train, args.train_columns))
    seconds = time.perf_counter() - started
    if not report["train_rows"] or not items:
        raise UserError(f"{args.benchmark if not items else args.train} has no rows")
    if scores:
        report["scores"] = split_scores(scores, {item["item"] for item in report["items"]})
        report["scored_items"] = len(scores)
    if output:
        write_json(output, report)
    summarise(report, seconds, output)


if __name__ == "__main__":
    main()
