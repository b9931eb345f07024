"""From sources to windows: load, check, hold out, tokenize once, mix.

A *document* is one row of text. A *window* is `sequence_length` consecutive tokens of the stream
`doc EOS doc EOS ...`; nothing is lost at batch borders, only the tail of a source shorter than one
window. Documents are shuffled before they are packed, windows again in every epoch.

The meaning of `weight`: the source's share of the tokens of the final mixture. Sources are never
repeated; the mixture is as large as the scarcest source allows. Without weights everything is used.
"""

import json
import os
import shutil
import sysconfig
from collections.abc import Callable, Iterator
from itertools import chain, count, islice
from pathlib import Path
from typing import NamedTuple

import datasets
import numpy as np
import pyarrow as pa
import torch
import xxhash
from datasets import Dataset, IterableDataset, concatenate_datasets
from filelock import FileLock
from transformers import TrainingArguments

from llm_recipes import arithmetic
from llm_recipes._compat import fingerprint
from llm_recipes.config import DataConfig, Source, WindowConfig, micro_batch
from llm_recipes.errors import UserError
from llm_recipes.launch import layout

BUILDERS = {".txt": "text", ".md": "text", ".jsonl": "json", ".json": "json", ".parquet": "parquet", ".csv": "csv"}
BATCH = 8_000_000  # characters tokenized at a time
ROWS = 20_000  # problems of builtin:arithmetic, unless told
STREAMED_EVAL = 512  # windows held out of each stream, which has no size to take a share of


def hasher(*parts) -> str:
    """128-bit hex digest of the parts' text."""
    digest = xxhash.xxh3_128()
    for part in parts:
        digest.update(f"{part}\x00".encode())
    return digest.hexdigest()


def cache_dir() -> Path:
    """Where windows and tokenizers trained on the spot are kept; inside the cache of `datasets`."""
    return Path(datasets.config.HF_DATASETS_CACHE) / "llm_recipes"


def built_once(name: str, build: Callable[[Path], None]) -> Path:
    """The folder `name` of the cache, which `build` fills if it is not there. One process does; the others wait at a file lock."""
    folder = cache_dir() / name
    folder.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(f"{folder}.lock"):
        if not folder.is_dir():
            partial = Path(f"{folder}.partial")
            shutil.rmtree(partial, ignore_errors=True)
            build(partial)
            shutil.move(partial, folder)
    return folder


# ---- documents -----------------------------------------------------------------------------------


def python_files(packages: bool) -> list[Path]:
    """Source and documentation of the Python installation, sorted; with `packages` the installed ones instead.

    Left out: tests, and `encodings`, which is tables of numbers rather than text.
    """
    paths = sysconfig.get_paths()
    root = Path(paths["purelib"] if packages else paths["stdlib"])
    found = (path for path in root.rglob("*") if path.suffix in (".py", ".md", ".rst", ".txt") and path.is_file())
    skip = {"test", "tests", "idle_test", "__pycache__", "encodings"} | (
        set() if packages else {"site-packages", "dist-packages"}
    )
    return sorted(path for path in found if not skip & set(path.relative_to(root).parts))


def _builtin(source: Source) -> Dataset:
    kind, _, view = source.path.partition("/")
    if kind == "builtin:arithmetic":
        options = {key: getattr(source, key) for key in ("rows", "difficulty") if getattr(source, key) is not None}
        return Dataset.from_dict(arithmetic.generate(view, **{"rows": ROWS, "split": source.split} | options))
    if source.path != "builtin:python" or source.name not in (None, "packages"):
        views = ", ".join(f"builtin:arithmetic/{view}" for view in arithmetic.VIEWS)
        raise UserError(
            f"datasets: {source.path} (name: {source.name}) is not built in; there is builtin:python, with "
            f"name: packages, and {views}"
        )
    rows, other = {"text": [], "path": []}, []
    for path in python_files(source.name == "packages"):
        try:
            rows["text"].append(path.read_text(encoding="utf-8"))
            rows["path"].append(str(path))
        except UnicodeDecodeError:
            other.append(path.name)
    _left_out(source, other, "are not UTF-8")
    return Dataset.from_dict(rows)


def _left_out(source: Source, names: list[str], why: str) -> None:
    if names and int(os.environ.get("RANK", 0)) == 0:
        print(
            f"datasets: {source.path}: {len(names)} files left out, they {why}: {', '.join(names[:3])} ...", flush=True
        )


def _local_files(source: Source, path: Path) -> tuple[str, list[str]]:
    """(builder of `datasets`, files) of a file or folder."""
    found = [path] if path.is_file() else sorted(f for f in path.rglob("*") if f.is_file() and f.name[0] != ".")
    files = [f for f in found if _suffix(f) in BUILDERS]
    if len({BUILDERS[_suffix(f)] for f in files}) != 1:
        what = ", ".join(sorted({f.suffix or "no suffix" for f in files or found})) or "no files"
        raise UserError(
            f"datasets: {source.path} holds {what}; use one kind of {', '.join(BUILDERS)}, or these with .gz"
        )
    _left_out(source, [f.name for f in found if f not in files], f"are none of {', '.join(BUILDERS)}")
    return BUILDERS[_suffix(files[0])], [str(f) for f in files]


def _suffix(path: Path) -> str:
    return Path(path.name.removesuffix(".gz")).suffix


def load_rows(source: Source, streaming: bool = False) -> Dataset | IterableDataset:
    """One source as it is stored. Raises UserError that names what is missing."""
    path = Path(source.path).expanduser()
    builtin = source.path.startswith("builtin:")
    saved = (path / "state.json").is_file() or (path / "dataset_dict.json").is_file()
    if builtin or path.exists():
        taken = {"name"} if source.path == "builtin:python" else {"split"} if saved else set()
        if source.path.startswith("builtin:arithmetic"):
            taken = {"split", "rows", "difficulty"}
        for key in sorted({"name", "split", "revision", "data_files", "rows", "difficulty"} - taken):
            if getattr(source, key) != getattr(Source(source.path), key):
                kind = "built-in" if builtin else "local"
                raise UserError(f"datasets: {source.path}: `{key}` means nothing for a {kind} source")
    try:
        if builtin:
            data = _builtin(source)
            data = data.to_iterable_dataset() if streaming else data
        elif saved:
            data = datasets.load_from_disk(str(path))
            if isinstance(data, datasets.DatasetDict):
                if source.split not in data:
                    raise UserError(f"datasets: {source.path} has no split {source.split}; it has {', '.join(data)}")
                data = data[source.split]
            data = data.to_iterable_dataset() if streaming else data
        elif path.exists():
            builder, files = _local_files(source, path)
            whole = {"sample_by": "document"} if builder == "text" else {}
            data = datasets.load_dataset(builder, data_files=files, split="train", streaming=streaming, **whole)
        elif source.path.startswith((".", "/", "~")) or _suffix(path) in BUILDERS:
            raise UserError(f"datasets: {source.path} does not exist (working directory: {Path.cwd()})")
        else:
            options = {"data_files": source.data_files, "revision": source.revision, "streaming": streaming}
            data = datasets.load_dataset(source.path, source.name, split=source.split, **options)
    except (datasets.exceptions.DatasetsError, ValueError, OSError, StopIteration) as error:
        raise UserError(f"datasets: {source.path}: {_reason(error, path)}") from error
    return data


def rename(rows: Dataset, source: Source, key: str) -> Dataset:
    """`rows` with the columns that `source` renames; another column that has such a name already gives way."""
    for theirs in source.columns.values():
        if theirs not in rows.column_names:
            raise UserError(f"{key}: {source.path} has no column {theirs}; it has {', '.join(rows.column_names)}")
    others = set(source.columns) & set(rows.column_names) - set(source.columns.values())
    return rows.remove_columns(sorted(others)).rename_columns({theirs: ours for ours, theirs in source.columns.items()})


def load_source(source: Source, streaming: bool = False) -> Dataset | IterableDataset:
    """One source as a dataset with the column `text`. Raises UserError that names what is missing."""
    data = load_rows(source, streaming)
    theirs = source.columns.get("text", "text")
    for ours in set(source.columns) - {"text"}:
        raise UserError(f"datasets: {source.path}: columns maps `{ours}`, but only `text` is read here")
    # Some streams do not know their features before the first row.
    features = data.features or dict.fromkeys(next(iter(data), {}))
    if theirs not in features:
        raise UserError(
            f"datasets: {source.path} has no column {theirs}; it has {', '.join(features)}. Set columns: {{text: ...}}"
        )
    if data.features and getattr(features[theirs], "dtype", None) not in ("string", "large_string"):
        raise UserError(f"datasets: {source.path}: column {theirs} holds {features[theirs]}, not text")
    data = data.select_columns([theirs])
    if isinstance(data, Dataset) and (column := data.data.column(theirs)).null_count:
        row = int(np.flatnonzero(column.is_null())[0])
        raise UserError(
            f"datasets: {source.path}: row {row} has null where text belongs ({column.null_count} such rows)"
        )
    return data if theirs == "text" else data.rename_column(theirs, "text")


def _reason(error: Exception, path: Path) -> str:
    """The cause at the bottom of an error of `datasets`, with the line for broken JSON."""
    if path.suffix == ".jsonl" and path.is_file():
        for number, line in enumerate(path.read_bytes().splitlines(), 1):
            try:
                json.loads(line)
            except ValueError as broken:
                return f"line {number} is not valid JSON in UTF-8: {broken}"
    while error.__cause__ is not None:
        error = error.__cause__
    empty = path.is_file() and path.stat().st_size == 0
    if empty or isinstance(error, StopIteration) or "corresponds to no data" in str(error):
        return "no rows"
    return str(error).splitlines()[0] if str(error) else type(error).__name__


def texts(documents, name: str) -> Iterator[str]:
    """Texts of `documents`; empty ones are left out. Raises UserError at the first row without text."""
    number = -1
    try:
        for number, row in enumerate(documents):
            text = row["text"]
            if not isinstance(text, str):
                raise UserError(f"datasets: {name}: row {number} has {text!r} where text belongs")
            if text:
                yield text
    except UnicodeDecodeError as error:
        raise UserError(f"datasets: {name}: the text after row {number} is not UTF-8: {error}") from error


class Documents(NamedTuple):
    """A source's documents, split; `eval` is None when nothing is held out."""

    source: Source
    train: Dataset | IterableDataset
    eval: Dataset | IterableDataset | None


def load_documents(data: DataConfig, seed: int, streaming: bool = False) -> list[Documents]:
    """Every source of `data`, with `eval_fraction` of its documents held out and the rest shuffled.

    Of a source with a single document the end is held out. The split depends on `seed` alone, so it
    is the same on every rank. Streams cannot be counted or shuffled: there the documents at which
    i * eval_fraction passes a whole number are held out, and the order stays.
    """
    if not data.datasets:
        raise UserError("datasets: the list is empty")
    if data.eval_fraction >= 1:
        raise UserError(f"eval_fraction {data.eval_fraction} leaves nothing to train on")
    return [Documents(s, *hold_out(load_source(s, streaming), data.eval_fraction, seed)) for s in data.datasets]


def hold_out(documents, fraction: float, seed: int):
    if isinstance(documents, IterableDataset):
        if not fraction:
            return documents, None
        train = documents.filter(lambda _, i: int((i + 1) * fraction) == int(i * fraction), with_indices=True)
        return train, documents.filter(lambda _, i: int((i + 1) * fraction) > int(i * fraction), with_indices=True)
    if not fraction:
        return documents.shuffle(seed=seed), None
    if len(documents) == 1:  # one long text: its end is held out, from the nearest line on
        text = documents[0]["text"] or ""
        cut = text.rfind("\n", 0, round(len(text) * (1 - fraction))) + 1 or round(len(text) * (1 - fraction))
        return Dataset.from_dict({"text": [text[:cut]]}), Dataset.from_dict({"text": [text[cut:]]})
    size = min(max(1, round(fraction * len(documents))), len(documents) - 1)
    parts = documents.train_test_split(test_size=size, seed=seed)
    return parts["train"], parts["test"]


# ---- windows -------------------------------------------------------------------------------------


def token_stream(documents, tokenizer, name: str, stats: dict | None = None) -> Iterator[np.ndarray]:
    """Token ids of `documents`, each followed by EOS. Text that looks like a special token stays text."""
    take_text_whole(tokenizer)
    for batch in _batches(texts(documents, name)):
        encodings = tokenizer.backend_tokenizer.encode_batch_fast(batch, add_special_tokens=False)
        if stats is not None:
            stats["documents"] += len(batch)
            stats["bytes"] += sum(len(text.encode("utf-8", "surrogatepass")) for text in batch)
        for encoding in encodings:
            yield np.asarray([*encoding.ids, tokenizer.eos_token_id], dtype=np.int32)


def take_text_whole(tokenizer) -> None:
    """Special strings stay text, and a truncation or padding that the tokenizer.json carries does not apply."""
    tokenizer.backend_tokenizer.encode_special_tokens = True
    tokenizer.backend_tokenizer.no_truncation()
    tokenizer.backend_tokenizer.no_padding()


def _batches(source: Iterator[str]) -> Iterator[list[str]]:
    """Lists of texts of about BATCH characters: the tokenizer's memory follows the characters, not the rows."""
    batch, size = [], 0
    for text in source:
        batch.append(text)
        size += len(text)
        if size >= BATCH:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


def windows_of(stream: Iterator[np.ndarray], length: int, stats: dict | None = None) -> Iterator[np.ndarray]:
    """Cuts a stream of id arrays into windows `(n, length)`, carrying the rest across documents."""
    rest = np.empty(0, dtype=np.int32)
    for ids in stream:
        rest = np.concatenate([rest, ids])
        full = len(rest) // length
        if full:
            yield rest[: full * length].reshape(full, length)
            rest = rest[full * length :]
    if stats is not None:
        stats["tail"] = len(rest)


def tokenize(documents: Dataset, tokenizer, length: int, name: str) -> tuple[Dataset, dict]:
    """(windows, stats) of `documents`: column `input_ids` of `length` int32, memory-mapped.

    Cached under data, tokenizer and length. One process does the work while the others wait at a
    file lock, not in a collective, so no time-out ends them however long it takes. `stats` counts
    documents, empty ones, bytes, windows, tokens, the tail of tokens that fill no window, and has
    the digest of the windows.
    """
    take_text_whole(tokenizer)  # before its text is hashed: a rank that finds the cache must hash the same one
    key = hasher(fingerprint(documents), tokenizer.backend_tokenizer.to_str(), tokenizer.eos_token_id, length)
    arrow, info = cache_dir() / f"{key}.arrow", cache_dir() / f"{key}.json"
    cache_dir().mkdir(parents=True, exist_ok=True)
    with FileLock(str(arrow) + ".lock"):
        if not (arrow.is_file() and info.is_file()):
            stats = {"documents": 0, "bytes": 0, "windows": 0, "tail": 0}
            column = pa.list_(pa.int32(), length)
            partial, digest = arrow.with_suffix(".partial"), xxhash.xxh3_128()
            with (
                pa.OSFile(str(partial), "wb") as sink,
                pa.ipc.new_stream(sink, pa.schema({"input_ids": column})) as out,
            ):
                for block in windows_of(token_stream(documents, tokenizer, name, stats), length, stats):
                    stats["windows"] += len(block)
                    digest.update(block.tobytes())
                    out.write_batch(
                        pa.record_batch({"input_ids": pa.FixedSizeListArray.from_arrays(block.reshape(-1), length)})
                    )
            stats["empty"] = len(documents) - stats["documents"]
            stats["tokens"] = stats["windows"] * length
            stats["digest"] = digest.hexdigest()
            info.write_text(json.dumps(stats))
            os.replace(partial, arrow)
    return Dataset.from_file(str(arrow)).with_format("numpy"), json.loads(info.read_text())


def mix(
    parts: list[Dataset], weights: list[float | None], seed: int, tokens: list[int] | None = None
) -> tuple[Dataset, list[int]]:
    """(mixture, rows taken of each part). See the top of this file for the meaning of `weights`.

    `tokens` of each part, where its rows differ in length; then the shares hold on average.
    """
    if all(weight is None for weight in weights):
        return concatenate_datasets(parts), [len(part) for part in parts]
    parts_of_one, tokens = shares(weights), tokens or [len(part) for part in parts]
    total = min(size / share for size, share in zip(tokens, parts_of_one, strict=True))
    taken = [
        min(len(part), round(len(part) * total * share / size))
        for part, share, size in zip(parts, parts_of_one, tokens, strict=True)
    ]
    chosen = [part.shuffle(seed=seed).select(range(n)) for part, n in zip(parts, taken, strict=True)]
    return concatenate_datasets(chosen), taken


def shares(weights: list[float | None]) -> list[float]:
    """Weights as shares of one. Raises UserError unless every source has a positive one."""
    if any(weight is None or weight <= 0 for weight in weights):
        raise UserError(f"datasets: give every source a weight above 0, or none; got {weights}")
    return [weight / sum(weights) for weight in weights]


class StreamedWindows(torch.utils.data.IterableDataset):
    """Endless windows of streamed sources, mixed by weight, in an order that depends on nothing but the sources.

    Sources are read again from the start when they end. The next window comes from the source that
    is furthest behind its weight. Resume is exact: the Trainer reads and drops what was trained on,
    at the speed of the tokenizer.
    """

    def __init__(self, documents: list[Documents], tokenizer, length: int):
        self.documents, self.tokenizer, self.length = documents, tokenizer, length
        weights = [part.source.weight for part in documents]
        if len(weights) > 1 and None in weights:
            raise UserError("datasets: streams have no size to mix them by: give every source a weight")
        self.weights = shares(weights) if len(weights) > 1 else [1.0]

    def _windows(self, part: Documents) -> Iterator[np.ndarray]:
        def passes():
            for _ in count():
                empty = True
                for ids in token_stream(part.train, self.tokenizer, part.source.path):
                    empty = False
                    yield ids
                if empty:
                    raise UserError(f"datasets: {part.source.path} has no text")

        for block in windows_of(passes(), self.length):
            yield from block

    def __iter__(self):
        iterators, taken = [self._windows(part) for part in self.documents], [0] * len(self.documents)
        while True:
            behind = min(range(len(iterators)), key=lambda i: (taken[i] + 1) / self.weights[i])
            taken[behind] += 1
            yield {"input_ids": next(iterators[behind])}


def make_windows(
    documents: list[Documents], tokenizer, windows: WindowConfig, batch_size: int, args: TrainingArguments
):
    """(train windows, eval windows or None, report, digests) for the Trainer.

    `report` is a list of sentences for the first screen, `digests` tells the training data of two runs apart.

    The held-out set is cut to whole batches of `batch_size`, and its micro-batch to a divisor of it:
    then every world size sees the same batches, and the mean of the losses is exact.
    """
    length, report, digests, trains, evals = windows.sequence_length, [], [], [], []
    if windows.streaming:
        stream = StreamedWindows(documents, tokenizer, length)
        if args.max_steps <= 0:
            raise UserError("streaming has no end: set max_steps")
        if args.dataloader_num_workers:
            raise UserError("streaming reads in one process: set dataloader_num_workers: 0")
    for part in documents:
        name = part.source.path
        if windows.streaming:
            if part.eval is not None:
                cut = chain.from_iterable(windows_of(token_stream(part.eval, tokenizer, name), length))
                evals.append(Dataset.from_dict({"input_ids": list(islice(cut, STREAMED_EVAL))}))
            digests.append(name)  # what it holds is not known before it is read
            report.append(
                f"{name}: streamed in stored order, shuffle it beforehand; a resume reads again what was trained on "
                "and does not notice changed data"
            )
            continue
        if part.eval is not None:
            evals.append(tokenize(part.eval, tokenizer, length, name)[0])
        cut, stats = tokenize(part.train, tokenizer, length, name)
        trains.append(cut)
        digests.append(stats["digest"])
        left_out = f"; {stats['empty']:,} empty documents left out" if stats["empty"] else ""
        report.append(
            f"{name}: {stats['documents']:,} documents, {stats['bytes'] / 1e6:.1f} MB, {stats['tokens']:,} tokens{left_out}"
        )
    evaluation = None
    if evals:
        args.per_device_eval_batch_size = micro_batch(batch_size // layout().data, args.per_device_eval_batch_size)
        whole = concatenate_datasets([part for part in evals if len(part)] or evals)
        evaluation = whole_batches(whole, batch_size, report, args.seed, "held-out windows").with_format("numpy")
    if windows.streaming:
        return stream, evaluation, report, digests
    train, taken = mix(trains, [part.source.weight for part in documents], args.seed)
    for part, cut, used in zip(documents, trains, taken, strict=True):
        if used < len(cut):
            report.append(f"{part.source.path}: {used:,} of {len(cut):,} windows used, to keep the weights")
    if len(train) < batch_size:
        raise UserError(f"datasets: {len(train)} training windows, fewer than one batch of {batch_size}")
    return train, evaluation, report, digests


def whole_batches(cut: Dataset, batch_size: int, report: list[str], seed: int, what: str) -> Dataset:
    """`cut` without the rest that fills no batch: then every world size sees the same batches."""
    rest = len(cut) % batch_size
    if rest == len(cut):
        raise UserError(f"datasets: {len(cut)} {what}, fewer than one batch of {batch_size}: raise eval_fraction")
    if rest:
        report.append(f"{rest} of {len(cut):,} {what} left out, so that all batches are full")
        cut = cut.shuffle(seed=seed)  # or the last source would lose them all
    return cut.select(range(len(cut) - rest))
