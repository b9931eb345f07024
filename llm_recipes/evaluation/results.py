"""`results.json`: what was measured, how, and on what (eval/results.schema.json), and the table of it."""

import json
import os
from pathlib import Path

from llm_recipes.errors import UserError
from llm_recipes.evaluation.runs import write_json

SCHEMA = 1


def load_results(folder: Path) -> dict | None:
    """What the folder's results.json says, None without one. Raises UserError where it is damaged."""
    path = folder / "results.json"
    if not path.is_file():
        return None
    try:
        found = json.loads(path.read_text())
        if found["schema"] != SCHEMA:
            raise KeyError(f"schema {found['schema']}")
        found["tasks"], found["model"]["fingerprint"]
    except (ValueError, TypeError, KeyError) as error:
        raise UserError(f"{path} is not a results file of this version: {error}") from error
    return found


def add_result(folder: Path, head: dict, task: str, entry: dict) -> dict:
    """results.json with one more task, or one anew; `head` is the model's. Written at once."""
    found = load_results(folder) or {"tasks": {}}
    results = {"schema": SCHEMA, **head, "tasks": found["tasks"] | {task: entry}}
    write_json(folder / "results.json", results)
    return results


def read_jsonl(path: str | Path) -> list[dict]:
    """The objects in the lines of a file. Raises UserError for a file or a line that is none."""
    try:
        text = Path(path).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: {getattr(error, 'strerror', None) or error}") from error
    rows = []
    for number, line in enumerate(text.split("\n"), 1):  # answers may hold other line separators
        try:
            rows += [json.loads(line)] if line.strip() else []
        except ValueError as error:
            raise UserError(f"{path}, line {number} is not JSON: mend or delete it") from error
        if rows and not isinstance(rows[-1], dict):
            raise UserError(f"{path}, line {number} is not an object")
    return rows


def check_output(path: str | Path) -> Path:
    """The path of a file to write. Raises UserError where that cannot be, before any work is done for it."""
    path = Path(path)
    if path.is_dir():
        raise UserError(f"{path} is a folder: name a file in it")
    if not path.parent.is_dir() or not os.access(path.parent, os.W_OK):
        raise UserError(f"{path} cannot be written: {path.parent} is not a folder that you can write to")
    return path


def markdown(head: list[str], rows: list[list]) -> str:
    """A table."""
    return "\n".join(f"| {' | '.join(map(str, line))} |" for line in [head, ["---"] * len(head), *rows])


def table(results: dict) -> str:
    """Markdown: a row for each metric of each task, with its 95 % interval."""
    lines = ["| task | metric | value | 95 % | n |", "| --- | --- | ---: | ---: | ---: |"]
    for name, task in results["tasks"].items():
        limited = f" (first {task['limit']})" if task["limit"] else ""
        for metric, m in task["metrics"].items():
            interval = "" if m["ci95"] is None else f"{m['ci95'][0]:.4g} to {m['ci95'][1]:.4g}"
            lines.append(f"| {name}{limited} | {metric} | {m['value']:.4g} | {interval} | {m['n']:,} |")
        if not task["metrics"]:
            lines.append(f"| {name}{limited} | no score | | | {task['n']:,} |")
    return "\n".join(lines)
