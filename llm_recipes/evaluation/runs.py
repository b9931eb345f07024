"""One task of one run: the work in units, what is done already, and what comes out of it.

A unit is a few prompts that go through the model together. Units follow from the prompts and `max_batch_tokens` alone, and a
killed run does its unfinished units again whole: so neither the number of processes nor a kill changes a number.
"""

import hashlib
import json
import math
import os
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch

from llm_recipes.errors import UserError
from llm_recipes.evaluation.model import Model, Sampling
from llm_recipes.evaluation.scores import perplexity_scores
from llm_recipes.evaluation.statistics import estimate, ratio_stderr
from llm_recipes.evaluation.tasks import Item, Task
from llm_recipes.metrics import Z

ROUNDS = 4  # times that each place of the batch is filled in a unit of answers


def make_units(task: Task, items: Sequence[Item], model: Model, max_new_tokens: int, samples: int) -> list[list[int]]:
    """Indices of items that are worked on together: of one group, similar in length, the longest first."""
    order = sorted(range(len(items)), key=lambda i: (items[i].group or "", -_length(items[i]), i))
    units: list[list[int]] = []
    for i in order:
        unit = units[-1] if units else []
        if not unit or items[i].group != items[unit[0]].group:
            full = True
        elif task.kind == "generate":
            full = len(unit) * samples >= ROUNDS * model.rows(_length(items[unit[0]]), max_new_tokens)
        else:
            rows = sum(_rows(items[j]) for j in (*unit, i))
            full = rows * _length(items[unit[0]]) > model.max_batch_tokens
        units.append([i]) if full else unit.append(i)
    return sorted(units, key=lambda unit: -_length(items[unit[0]]))  # what does not fit into memory fails at once


def _rows(item: Item) -> int:
    """Sequences in memory: one for each choice; choices of one token follow from the context's."""
    return max(1, sum(len(ids) > 1 for ids in item.continuations))


def _length(item: Item) -> int:
    return len(item.context) + max(map(len, item.continuations), default=0)


class Samples:
    """The lines of `<folder>/samples.jsonl`, appended unit by unit, each process to a file of its own, then joined."""

    def __init__(self, folder: Path, units: list[list[int]], rank: int, world_size: int):
        self.folder, self.rank = folder, rank
        done = read_lines(folder)
        self.mine = [unit for unit in units if not all(i in done for i in unit)][rank::world_size]

    def append(self, lines: list[dict]) -> None:
        """Writes the lines of one unit."""
        with (self.folder / f"part-{self.rank}.jsonl").open("a", encoding="utf-8") as file:
            file.write("".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines))


def claim(folder: Path, identity: dict) -> None:
    """Marks the folder as that of the answers which depend on `identity`."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        write_json(folder / "identity.json", identity)
    except OSError as error:
        raise UserError(f"output_dir: {folder} cannot be written: {error.strerror}") from error


def in_order(folder: Path) -> list[dict]:
    """All lines that are there, by item."""
    return [line for _, line in sorted(read_lines(folder).items())]


def joined(folder: Path) -> list[dict]:
    """All lines in order, as `samples.jsonl`, after every process has appended its own."""
    lines = in_order(folder)
    write_lines(folder / "samples.jsonl", lines)
    for part in folder.glob("part-*.jsonl"):
        part.unlink()
    return lines


def read_identity(folder: Path) -> dict:
    """What the answers in `folder` depend on; {} without any. Raises UserError where the file is damaged."""
    path = folder / "identity.json"
    try:
        return json.loads(path.read_text()) if path.is_file() else {}
    except ValueError as error:
        raise UserError(f"{path} is damaged ({error}): move the folder away") from error


def changes(folder: Path, identity: dict) -> list[str]:
    """How the answers in `folder` differ in what they depend on; empty when they do not, or there are none."""
    there = read_identity(folder)
    keys = [key for key in {**there, **identity} if there and there.get(key) != identity.get(key)]
    return [f"{key}: {_short(there.get(key))} -> {_short(identity.get(key))}" for key in keys]


def read_lines(folder: Path) -> dict[int, dict]:
    """{item: line} of what is in the folder; a line that a kill has torn is cut off. Raises UserError for other damage."""
    lines = {}
    for path in [*folder.glob("samples.jsonl"), *sorted(folder.glob("part-*.jsonl"))]:
        text = path.read_bytes()
        if not text.endswith(b"\n"):
            with path.open("r+b") as file:
                file.truncate(text.rfind(b"\n") + 1)
        whole = text[: text.rfind(b"\n") + 1]
        for number, line in enumerate(whole.split(b"\n")[:-1], 1):  # splitlines would part at U+2028 too
            try:
                row = json.loads(line)
                lines[row["item"]] = row
            except (ValueError, TypeError, KeyError) as error:
                raise UserError(f"{path}, line {number} is damaged ({error}): move the folder away") from error
    return lines


def _short(value) -> str:
    text = str(value)
    return text if len(text) <= 60 else text[:57] + "..."


def write_text(path: Path, text: str) -> None:
    partial = path.with_name(path.name + ".partial")
    partial.write_text(text, encoding="utf-8")
    os.replace(partial, path)


def write_lines(path: Path, lines: list[dict]) -> None:
    write_text(path, "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines))


def write_json(path: Path, value) -> None:
    write_text(path, json.dumps(value, indent=2, ensure_ascii=False) + "\n")


def work(
    task: Task, items: Sequence[Item], unit: list[int], model: Model, generation: dict | None, seed: int
) -> Iterator[dict]:
    """The lines of one unit. One that does not fit into the memory of a GPU is halved until it does."""
    try:
        yield from list(_work(task, [items[i] for i in unit], unit, model, generation, seed))
    except torch.OutOfMemoryError:
        if len(unit) == 1:
            raise UserError("one prompt alone does not fit into this device's memory: use a smaller dtype") from None
        print(
            f"out of memory with {len(unit)} prompts: half as many; a smaller max_batch_tokens avoids this", flush=True
        )
        torch.cuda.empty_cache()
        for half in (unit[: len(unit) // 2], unit[len(unit) // 2 :]):
            yield from work(task, items, half, model, generation, seed)


def _work(task, items: list[Item], indices: list[int], model: Model, generation, seed) -> Iterator[dict]:
    if task.kind != "generate":
        found = model.loglikelihoods([(item.context, item.continuations) for item in items])
        for i, item, logliks in zip(indices, items, found, strict=True):
            line = {"item": i, "doc": item.doc, "doc_sha": item.sha}
            yield line | (
                {"nats": -logliks[0], **item.counts} if item.counts else {"prompt": item.prompt, "logliks": logliks}
            )
        return
    samples, length, stop = generation["num_samples"], generation["max_new_tokens"], generation["stop"]
    sampling, ends = Sampling(generation["temperature"], generation["top_p"]), model.ends(stop)

    def uniforms(i: int) -> torch.Tensor:
        item, sample = items[i // samples], i % samples
        key = hashlib.sha256(f"{seed} {item.sha} {sample}".encode()).digest()
        return torch.rand(length, generator=torch.Generator().manual_seed(int.from_bytes(key[:7], "big")))

    prompts = [item.context for item in items for _ in range(samples)]
    written = model.generate(prompts, stop, length, sampling, uniforms if sampling.temperature else None)
    for place, (i, item) in enumerate(zip(indices, items, strict=True)):
        mine = written[place * samples : (place + 1) * samples]
        cut = [t for t in mine if len(t) == length and t[-1] not in ends and not model.stopped(t, stop)]
        yield {
            "item": i, "doc": item.doc, "doc_sha": item.sha, "prompt": item.prompt, "outputs": [model.text(tokens, stop) for tokens in mine],
            "tokens": [len(tokens) for tokens in mine], "unfinished": len(cut),
        }  # fmt: skip


def score(task: Task, rows: Sequence[dict], lines: Sequence[dict], strict: bool) -> tuple[list[dict], dict[str, dict]]:
    """(lines of `scores.jsonl`, metrics) of a task's samples; `strict` is the sandbox's."""
    if task.kind in ("rolling", "strided"):
        return _perplexities(task, lines)
    kept = [{"doc": line["doc"], "doc_sha": line["doc_sha"]} for line in lines]
    if task.score is None:
        return kept, {}
    asked = [rows[line["doc"]] for line in lines]
    options = {"strict": strict} if task.runs_code else {}
    scores = task.score(asked, [line["logliks" if task.kind == "choice" else "outputs"] for line in lines], **options)
    kept = [line | {"scores": each} for line, each in zip(kept, scores, strict=True)]
    groups = [task.group(row) for row in asked] if task.group else None
    if groups:
        kept = [line | {"group": group} for line, group in zip(kept, groups, strict=True)]
    return kept, {name: metric([each[name] for each in scores], groups) for name in scores[0]}


def metric(values: Sequence[float], clusters: Sequence | None = None) -> dict:
    """Mean, standard error and 95 % interval; of questions in clusters both take account of these."""
    return _metric(*estimate(values, clusters), len(values))


def _metric(value: float, stderr: float, low: float, high: float, n: int) -> dict:
    known = stderr == stderr  # nan of a single value
    return {"value": value, "stderr": stderr if known else None, "ci95": [low, high] if known else None, "n": n}


def _perplexities(task: Task, lines: Sequence[dict]) -> tuple[list[dict], dict[str, dict]]:
    """Nats over tokens, bytes and words of all windows; errors over documents, or windows where there is one text."""
    documents: dict[int, dict] = {}
    for line in lines:
        document = documents.setdefault(line["doc"], {"doc": line["doc"], "doc_sha": line["doc_sha"], "scores": {}})
        for name in ("nats", "tokens", "bytes", "words", "weight"):
            if name in line:
                document["scores"][name] = document["scores"].get(name, 0) + line[name]
    kept = list(documents.values())
    column = {name: [each["scores"][name] for each in kept] for name in kept[0]["scores"]}
    whole = {name: sum(values) for name, values in column.items()}
    if task.kind == "strided":  # the mean of each window, weighted by its targets less one
        nats = [n / t * w for n, t, w in zip(column["nats"], column["tokens"], column["weight"], strict=True)]
        column |= {"nats": nats, "tokens": column["weight"]}
        weighted = perplexity_scores(sum(nats), whole["weight"], whole["bytes"], 1)
        whole_text = perplexity_scores(whole["nats"], whole["tokens"], whole["bytes"], 1)
        values = {"perplexity": weighted["perplexity"], "bits_per_byte": whole_text["bits_per_byte"]}
    else:
        values = perplexity_scores(whole["nats"], whole["tokens"], whole["bytes"], whole["words"])
    metrics = {}
    for name, value in values.items():
        below = {"perplexity": "tokens", "word_perplexity": "words"}.get(name, "bytes")
        if task.kind == "strided" and below == "bytes":  # of one stream, whose windows have no bytes of their own
            metrics[name] = _metric(value, math.nan, 0, 0, len(kept))
            continue
        _, stderr = ratio_stderr(column["nats"], column[below])
        if name == "bits_per_byte":
            stderr /= math.log(2)
            metrics[name] = _metric(value, stderr, value - Z * stderr, value + Z * stderr, len(kept))
        else:  # d exp(x) = exp(x) dx
            low, high = value * math.exp(-Z * stderr), value * math.exp(Z * stderr)
            metrics[name] = _metric(value, value * stderr, low, high, len(kept))
    return kept, metrics
