"""What a benchmark is: where its rows are, how a row becomes a prompt, and how an answer becomes a score.

A file of `eval/tasks/` defines a family of them in the dict TASKS; the file is the registry. Prompts are built whole
before anything is shared out between processes, so the number of processes changes nothing.
"""

import hashlib
import importlib.util
import json
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from random import Random
from typing import Literal

from llm_recipes.config import Source, unknown_key
from llm_recipes.conversations import Encoder, Unusable
from llm_recipes.datasets import hold_out, load_rows, rename
from llm_recipes.errors import UserError
from llm_recipes.evaluation.model import Model

SEED = 1234  # lm-eval's, for the draw of examples
BETWEEN = "\n\n"  # between examples


@dataclass(frozen=True, kw_only=True)
class Task:
    """One benchmark with one protocol.

    `prompt(row)` is what the model continues, `answer(row)` what follows it in an example. A "choice" task compares the
    log-likelihoods of `choices(row)`; a "generate" task has answers written until one of `stop`; "rolling" and "strided"
    are the windows in which the text `prompt(row)` is scored. `score(rows, raw)` takes the log-likelihoods of the
    choices or the list of texts of every row, and gives a dict of numbers for each; their means are the metrics.
    """

    kind: Literal["choice", "generate", "rolling", "strided"]
    version: str  # of whose protocol
    protocol: str  # in a sentence
    data: tuple[Source, ...]
    columns: dict[str, type]
    prompt: Callable[[dict], str]
    score: Callable[[Sequence[dict], Sequence], list[dict[str, float]]] | None = None
    keep: Callable[[dict], bool] = lambda row: True
    held_out: tuple[float, int] | None = None  # share and seed of a training recipe: its held-out rows alone
    group: Callable[[dict], str] | None = None  # in scores.jsonl, and a cluster for the standard error
    # examples before the question
    num_fewshot: int = 0
    shots: tuple[Source, ...] | tuple[dict, ...] = ()
    shot: Callable[[dict], bool] = lambda row: True  # which rows may be one
    draw: Literal["random", "first"] = "random"
    spare: int = 0  # of random examples drawn and dropped: 1 where lm-eval thinks that the row itself may be among them
    answer: Callable[[dict], str] | None = None
    delimiter: str = " "  # between question and answer
    description: Callable[[dict], str] = lambda row: ""
    # of "rolling"
    counted: Callable[[dict], str] | None = None  # whose words and bytes count, where it is not the text itself
    # of "choice"
    choices: Callable[[dict], list[str]] | None = None
    # of "generate"
    stop: tuple[str, ...] = ()
    max_new_tokens: int = 256
    chat: bool = False  # the prompt is a user's message
    begun: Callable[[dict], str] | None = None  # what the assistant's answer begins with
    num_samples: int = 1
    temperature: float = 0.0
    top_p: float = 1.0
    runs_code: bool = False
    hub: tuple[str, str, str] | None = None  # (dataset, task, metric) of the Hub, where this is the protocol it means


@dataclass
class Item:
    """What the model is asked about one row, or one window of one."""

    doc: int
    sha: str
    prompt: str
    context: list[int]
    continuations: list[list[int]] = field(default_factory=list)
    group: str | None = None
    counts: dict[str, float] = field(default_factory=dict)  # of a window: what its log-likelihood is divided by


def load_tasks(folder: Path, names: Sequence[str]) -> dict[str, tuple[str, Task]]:
    """{name: (family, task)} of `names`, from the files of `folder`. Raises UserError for a name that none defines."""
    known, groups = {}, {}
    for path in sorted(folder.glob("*.py")):
        spec = importlib.util.spec_from_file_location(f"tasks_{path.stem}", path)
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        known |= {name: (path.stem, task) for name, task in module.TASKS.items()}
        groups |= getattr(module, "GROUPS", {})
    wanted = list(dict.fromkeys(member for name in names for member in groups.get(name, [name])))
    if not wanted:
        raise UserError(f"tasks: name at least one of {', '.join(known)}")
    for name in wanted:
        if name not in known:
            said = unknown_key(name, [*known, *groups], "task")
            listed = "" if "did you mean" in said else f"; there are {', '.join([*groups, *known])}"
            raise UserError(f"tasks: {said}{listed}. Those of lm-eval are lm_eval:<its name>")
    return {name: known[name] for name in wanted}


def read_rows(task: Task, name: str, family: str, sources: Sequence[Source], files: str | dict | None) -> list[dict]:
    """Rows of `sources`, or of the local `files` (one path, or one a split) in their place. Raises UserError."""
    rows = []
    if files is not None:
        splits = sorted({source.split for source in sources})
        given = dict.fromkeys(splits, files) if isinstance(files, str) else files
        if missing := [split for split in splits if split not in given]:
            raise UserError(
                f"data_files: {family} has no file for the split {missing[0]}, which {name} needs: "
                f"--data_files '{{{family}: {{{missing[0]}: file.jsonl}}}}'"
            )
        sources = [Source(path=given[split]) for split in splits]
    for source in sources:
        try:
            found = rename(load_rows(source), source, name)
            if task.held_out and files is None:
                found = hold_out(found, *task.held_out)[1]
        except UserError as error:
            hint = "" if files is not None else f"; or give a local file: --data_files '{{{family}: file.jsonl}}'"
            raise UserError(f"{name}: {str(error).removeprefix('datasets: ')}{hint}") from error
        if missing := [column for column in task.columns if column not in found.column_names]:
            raise UserError(f"{name}: {source.path} has no column {missing[0]}; it has {', '.join(found.column_names)}")
        rows += found.select_columns(list(task.columns)).to_list()
    return rows


def choose_rows(task: Task, name: str, rows: list[dict], limit: int | None) -> list[dict]:
    """The rows that belong to the benchmark, the first `limit` of them. Raises UserError where there are none."""
    for i, row in enumerate(rows):
        for column, kind in task.columns.items():
            if not isinstance(row[column], kind):
                found = "nothing" if row[column] is None else f"{row[column]!r:.40}"
                raise UserError(f"{name}: row {i} has {found} in its column {column}, where {kind.__name__} belongs")
    kept = [row for row in rows if task.keep(row)][:limit]
    if not kept:
        raise UserError(f"{name}: no rows" + (f"; none of {len(rows)} belongs to the benchmark" if rows else ""))
    return kept


def examples(task: Task, name: str, rows: list[dict], pool: list[dict], n: int) -> list[list[dict]]:
    """The `n` examples before each row, drawn as lm-eval draws them: one generator for the task, rows in order."""
    if not n:
        return [[] for _ in rows]
    if task.draw == "random":
        if n + task.spare > len(pool):
            raise UserError(f"num_fewshot: {name} has {len(pool)} examples, fewer than {n + task.spare}")
        random = Random(SEED)  # noqa: S311
        return [random.sample(pool, n + task.spare)[:n] for _ in rows]
    grouped: dict[str | None, list[dict]] = {}
    for row in pool:
        grouped.setdefault(task.group and task.group(row), []).append(row)
    drawn = [grouped.get(task.group and task.group(row), [])[:n] for row in rows]
    for i, few in enumerate(drawn):
        if len(few) < n:
            raise UserError(f"num_fewshot: {name} has {len(few)} examples for row {i}, fewer than {n}")
    return drawn


def question(task: Task, row: dict, shots: list[dict]) -> str:
    """The prompt: description, examples, question; no white space at the end that the task does not ask for."""
    before = [task.prompt(shot) + task.delimiter + task.answer(shot) + BETWEEN for shot in shots]
    return task.description(row) + "".join(before) + task.prompt(row)


def digest(value) -> str:
    """SHA-256 of a value as JSON."""
    return hashlib.sha256(json.dumps(value, sort_keys=True, ensure_ascii=False, default=str).encode()).hexdigest()


def build(
    task: Task, rows: list[dict], shots: list[list[dict]], model: Model, encoder: Encoder | None, max_new_tokens: int
) -> tuple[list[Item], int]:
    """(what the model is asked, how many prompts were cut on the left to fit into its context)."""
    if task.kind in ("rolling", "strided"):
        return (rolling if task.kind == "rolling" else strided)(task, rows, model), 0
    items, cut = [], 0
    for i, (row, few) in enumerate(zip(rows, shots, strict=True)):
        choices = []
        try:
            prompt, group = question(task, row, few), task.group and task.group(row)
            if task.kind == "choice":
                choices = task.choices(row)
                task.score([row], [[0.0] * len(choices)])  # now, not when all answers are there
        except (AttributeError, LookupError, TypeError, ValueError) as error:
            raise UserError(f"row {i} is not one of this benchmark: {type(error).__name__}: {error}") from error
        item = Item(i, digest(row)[:16], prompt, [], group=group)
        if task.kind == "choice":
            pairs = [model.encode_pair(prompt, task.delimiter + choice) for choice in choices]
            item.context, item.continuations = pairs[0][0], [continuation for _, continuation in pairs]
            for j, ids in enumerate(item.continuations):
                if not 0 < len(ids) <= model.context:
                    raise UserError(f"row {i}: choice {j} has {len(ids)} tokens; the model reads 1 to {model.context}")
            cut += len(item.context) + max(map(len, item.continuations)) > model.context + 1
        else:
            ids = _chat_ids(encoder, prompt, task.begun and task.begun(row), i) if task.chat else model.encode(prompt)
            room = model.context - max_new_tokens
            cut += len(ids) > room
            item.context = (ids or [model.prefix_id])[-room:]
        items.append(item)
    return items, cut


def _chat_ids(encoder: Encoder, prompt: str, begun: str | None, row: int) -> list[int]:
    try:
        pieces = encoder.pieces([{"role": "user", "content": prompt}], prompt=True)
    except Unusable as reason:
        raise UserError(f"row {row}: the messages {reason}") from reason
    ((ids, _),) = encoder.encode([[*pieces, (begun, False, False)] if begun else pieces])
    return ids


def rolling(task: Task, rows: list[dict], model: Model) -> list[Item]:
    """lm-eval's windows: each token is scored once, after a first BOS, in windows as long as the context; only the last
    looks back at tokens scored before it.
    """
    items = []
    for i, row in enumerate(rows):
        text = task.prompt(row)
        ids, done = model.encode(text), 0
        raw = task.counted(row) if task.counted else text
        while done < len(ids):
            size = min(model.context, len(ids) - done)
            end = done + size
            context = ids[max(0, end - model.context - 1) : done] if done else [model.prefix_id]
            counts = {"tokens": size, "bytes": 0, "words": 0}
            if done == 0:
                counts |= {"bytes": len(raw.encode()), "words": len(re.split(r"\s+", raw))}
            items.append(Item(i, digest(row)[:16], "", context, [ids[done:end]], counts=counts))
            done = end
    return items


def strided(task: Task, rows: list[dict], model: Model) -> list[Item]:
    """The windows of Hugging Face's page on perplexity: one stream, windows as long as the context, half of it context.

    The first token is never scored, and the mean of a window counts with its targets less one.
    """
    text = BETWEEN.join(task.prompt(row) for row in rows)
    ids, items, end = model.tokenizer.encode(text), [], 0
    for start in range(0, len(ids), model.context // 2):
        before, end = end, min(start + model.context, len(ids))
        scored = ids[max(before, start + 1) : end]
        if scored:
            counts = {"tokens": len(scored), "weight": end - before - 1, "bytes": 0}
            context = ids[start : end - len(scored)]
            items.append(Item(len(items), digest(scored)[:16], "", context, [scored], counts=counts))
        if end == len(ids):
            break
    if items:
        items[0].counts["bytes"] = len(text.encode()) - len(model.tokenizer.decode(ids[:1]).encode())
    return items
