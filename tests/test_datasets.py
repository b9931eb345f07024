import copy
import json
import multiprocessing
import os
from pathlib import Path

import datasets
import numpy as np
import pytest
from datasets import Dataset, DatasetDict

from llm_recipes.config import DataConfig, Source, WindowConfig
from llm_recipes.datasets import (
    StreamedWindows,
    cache_dir,
    load_documents,
    load_source,
    make_windows,
    mix,
    python_files,
    token_stream,
    tokenize,
    windows_of,
)
from llm_recipes.errors import UserError
from llm_recipes.tokenization import EOS, train_tokenizer
from tests.running import write_texts


class Args:
    max_steps, seed, world_size, per_device_eval_batch_size, dataloader_num_workers = 100, 0, 1, 8, 0


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    path = write_texts(tmp_path_factory.mktemp("tok") / "t.jsonl")
    return train_tokenizer(load_source(Source(str(path))), 300)


def ids_of(tokenizer, text):
    return tokenizer(text, add_special_tokens=False, split_special_tokens=True)["input_ids"]


def test_windows_carry_over_every_border():
    stream = [np.arange(5), np.arange(5, 6), np.empty(0, int), np.arange(6, 19), np.arange(19, 22)]
    stats = {}
    blocks = list(windows_of(iter(stream), 4, stats))
    assert np.array_equal(np.concatenate(blocks), np.arange(20).reshape(5, 4)) and stats["tail"] == 2


def test_tokenize_equals_brute_force_and_loses_nothing(tokenizer, monkeypatch):
    monkeypatch.setattr("llm_recipes.datasets.BATCH", 20)  # many batch borders
    rows = ["the cat sees fish", "", "a dog " * 40, f"text {EOS} <|pad|> stays text", "12345", "naïve 日本 \U0001f600"]
    windows, stats = tokenize(Dataset.from_dict({"text": rows}), tokenizer, 7, "rows")
    stream = [i for row in rows if row for i in [*ids_of(tokenizer, row), tokenizer.eos_token_id]]
    assert np.array_equal(np.concatenate(windows["input_ids"]), stream[: len(stream) // 7 * 7])
    assert stats == {
        "documents": 5, "empty": 1, "windows": len(stream) // 7, "tokens": len(stream) // 7 * 7, "tail": len(stream) % 7,
        "bytes": sum(len(row.encode()) for row in rows), "digest": stats["digest"],
    }  # fmt: skip


def test_special_strings_in_documents_stay_text(tokenizer):
    ids = np.concatenate(list(token_stream([{"text": f"x{EOS}y<|im_start|>"}], tokenizer, "t")))
    assert ids[-1] == tokenizer.eos_token_id
    assert not set(ids[:-1]) & set(tokenizer.all_special_ids)
    assert tokenizer.decode(ids[:-1]) == f"x{EOS}y<|im_start|>"


def test_cache_is_keyed_on_data_tokenizer_and_length(tokenizer):
    documents = Dataset.from_dict({"text": ["the cat"] * 50})
    tokenize(documents, tokenizer, 8, "t")
    known = {p: p.stat().st_mtime_ns for p in cache_dir().glob("*.arrow")}
    tokenize(documents, tokenizer, 8, "t")
    assert {p: p.stat().st_mtime_ns for p in cache_dir().glob("*.arrow")} == known
    other = train_tokenizer([{"text": "other words entirely " * 9 + "abcdefghijklmnopqrstuvwxyz"}], 275)
    for changed in ((documents, tokenizer, 9), (documents.select(range(49)), tokenizer, 8), (documents, other, 8)):
        before = len(list(cache_dir().glob("*.arrow")))
        tokenize(*changed, "t")
        assert len(list(cache_dir().glob("*.arrow"))) == before + 1


def _tokenize_in_child(path, queue):
    source = load_source(Source(str(path)))
    tokenizer = train_tokenizer(source, 300)
    windows, stats = tokenize(source, tokenizer, 16, "t")
    (path,) = {Path(part["filename"]) for part in windows.cache_files}
    queue.put(
        (stats["windows"], int(np.sum(windows["input_ids"])), path.stat().st_ino)
    )  # each writing makes a new inode


def test_one_process_tokenizes_while_others_wait(tmp_path):
    path = write_texts(tmp_path / "t.jsonl", rows=3000)
    context = multiprocessing.get_context("forkserver")
    queue = context.Queue()
    children = [context.Process(target=_tokenize_in_child, args=(path, queue)) for _ in range(3)]
    [child.start() for child in children]
    results = [queue.get(timeout=100) for _ in children]
    [child.join() for child in children]
    assert results[0] == results[1] == results[2] and results[0][0] > 0


def test_hold_out_is_disjoint_complete_and_depends_on_the_seed_alone(tmp_path):
    source = Source(str(write_texts(tmp_path / "t.jsonl", rows=200)))
    data = DataConfig([source], eval_fraction=0.1)
    (first,), (again,), (other,) = (load_documents(data, seed) for seed in (1, 1, 2))
    assert first.train["text"] == again.train["text"] and first.eval["text"] == again.eval["text"]
    assert first.eval["text"] != other.eval["text"] and len(first.eval) == 20
    assert sorted([*first.train["text"], *first.eval["text"]]) == sorted(load_source(source)["text"])
    assert load_documents(DataConfig([source], eval_fraction=0), 1)[0].eval is None


def test_formats(tmp_path):
    rows = [{"text": f"row {i}\nline two"} for i in range(3)]
    data = Dataset.from_list(rows)
    (tmp_path / "texts").mkdir()
    for i, row in enumerate(rows):
        (tmp_path / f"texts/{i}.txt").write_text(row["text"])
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    data.to_parquet(tmp_path / "a.parquet")
    data.save_to_disk(tmp_path / "saved")
    DatasetDict(train=data, test=data.select([0])).save_to_disk(tmp_path / "dict")
    data.rename_column("text", "content").to_parquet(tmp_path / "content.parquet")
    expected = [row["text"] for row in rows]
    for path in ("texts", "a.jsonl", "a.parquet", "saved", "dict"):
        assert load_source(Source(str(tmp_path / path)))["text"] == expected, path
    assert load_source(Source(str(tmp_path / "dict"), split="test"))["text"] == expected[:1]
    assert load_source(Source(str(tmp_path / "content.parquet"), columns={"text": "content"}))["text"] == expected
    assert [row["text"] for row in load_source(Source(str(tmp_path / "a.jsonl")), streaming=True)] == expected


def test_builtin_python_is_source_and_documentation():
    paths = python_files(packages=False)
    assert any(p.name == "ast.py" for p in paths) and any(p.name == "topics.py" for p in paths)
    assert not any({"site-packages", "test", "encodings"} & set(p.parts) for p in paths)
    assert paths == sorted(paths)
    data = load_source(Source("builtin:python"))
    assert (
        5e6 < sum(map(len, data["text"])) < 1e8
        and data._fingerprint == load_source(Source("builtin:python"))._fingerprint
    )
    packages = python_files(packages=True)
    assert any(p.name == "trainer.py" for p in packages) and sum(p.stat().st_size for p in packages) > 1e7


@pytest.mark.parametrize(
    ("make", "source", "message"),
    [
        (None, {"path": "nowhere.jsonl"}, "nowhere.jsonl does not exist (working directory:"),
        (None, {"path": "./nowhere"}, "./nowhere does not exist"),
        (None, {"path": "builtin:java"}, "there is builtin:python"),
        (("a.jsonl", ""), {"path": "a.jsonl"}, "a.jsonl: no rows"),
        (("a.jsonl", '{"text": "x"}\n{"text": \n'), {"path": "a.jsonl"}, "a.jsonl: line 2 is not valid JSON"),
        (("a.jsonl", '{"id": 1, "content": "x"}\n'), {"path": "a.jsonl"}, "has no column text; it has id, content"),
        (("a.jsonl", '{"text": 5}\n'), {"path": "a.jsonl"}, "column text holds Value('int64'), not text"),
        (("a.jsonl", '{"text": "x"}\n'), {"path": "a.jsonl", "columns": {"prompt": "text"}}, "columns maps `prompt`"),
        (
            ("a.jsonl", '{"text": "x"}\n'),
            {"path": "a.jsonl", "split": "test"},
            "`split` means nothing for a local source",
        ),
        (None, {"path": "builtin:python", "revision": "main"}, "`revision` means nothing for a built-in source"),
        (("d/a.xyz", "x"), {"path": "d"}, "d holds .xyz; use one kind of"),
        (("d/.keep", "x"), {"path": "d"}, "d holds no files"),
    ],
)
def test_bad_source(tmp_path, monkeypatch, make, source, message):
    monkeypatch.chdir(tmp_path)
    if make:
        path = tmp_path / make[0]
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(make[1] if isinstance(make[1], bytes) else make[1].encode())
    with pytest.raises(UserError) as error:
        load_source(Source(**source))
    assert message in str(error.value) and "\n" not in str(error.value)


def test_text_that_is_not_utf8(tmp_path, tokenizer):
    (tmp_path / "a.jsonl").write_bytes(b'{"text": "caf\xe9"}\n')
    with pytest.raises(UserError, match=r"a\.jsonl: the text after row -1 is not UTF-8"):
        list(token_stream(load_source(Source(str(tmp_path / "a.jsonl"))), tokenizer, "a.jsonl"))


def test_files_left_out_of_a_folder_are_said(tmp_path, capsys):
    (tmp_path / "a.txt").write_text("x")
    (tmp_path / "b.png").write_bytes(b"x")
    assert load_source(Source(str(tmp_path)))["text"] == ["x"]
    assert "1 files left out, they are none of .txt" in capsys.readouterr().out


def test_split_that_is_not_there(tmp_path):
    DatasetDict(train=Dataset.from_dict({"text": ["x"]})).save_to_disk(tmp_path / "d")
    with pytest.raises(UserError, match="has no split validation; it has train"):
        load_source(Source(str(tmp_path / "d"), split="validation"))


def test_row_without_text_is_named(tokenizer, tmp_path):
    with pytest.raises(UserError, match="corpus: row 2 has None where text belongs"):
        tokenize(Dataset.from_dict({"text": ["a", "b", None]}), tokenizer, 4, "corpus")
    (tmp_path / "a.jsonl").write_text('{"text": "a"}\n{"text": null}\n{"text": "b"}\n')
    with pytest.raises(UserError, match=r"row 1 has null where text belongs \(1 such rows\)"):
        load_source(Source(str(tmp_path / "a.jsonl")))


def test_unreachable_hub_is_one_sentence(monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_ENDPOINT", "http://127.0.0.1:9")
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", "http://127.0.0.1:9")
    monkeypatch.setattr("time.sleep", lambda seconds: None)  # between the library's retries
    with pytest.raises(UserError, match=r"^datasets: someone/something: ") as error:
        load_source(Source("someone/something"))
    assert "\n" not in str(error.value)


def windows(n, value):
    return Dataset.from_dict({"input_ids": [[value]] * n})


def test_weight_is_the_share_of_the_mixture():
    mixed, taken = mix([windows(100, 0), windows(300, 1)], [1.0, 1.0], seed=0)
    assert taken == [100, 100] and len(mixed) == 200
    _, taken = mix([windows(100, 0), windows(300, 1), windows(50, 2)], [3.0, 6.0, 1.0], seed=0)
    assert taken == [100, 200, 33]
    _, taken = mix([windows(100, 0), windows(300, 1)], [None, None], seed=0)
    assert taken == [100, 300]
    for weights in ([1.0, None], [0.0, 1.0], [-1.0, 2.0]):
        with pytest.raises(UserError, match="give every source a weight above 0, or none"):
            mix([windows(1, 0), windows(1, 1)], weights, seed=0)


def test_weights_count_tokens_not_documents(tmp_path, tokenizer):
    """Half of the tokens each, though one source has documents ten times as long."""
    (tmp_path / "long.jsonl").write_text(json.dumps({"text": "the cat sees fish " * 100}) * 1 + "\n")
    long = "".join(json.dumps({"text": f"{i} the cat sees fish " * 50}) + "\n" for i in range(40))
    short = "".join(json.dumps({"text": f"{i} a dog runs " * 5}) + "\n" for i in range(120))
    (tmp_path / "long.jsonl").write_text(long)
    (tmp_path / "short.jsonl").write_text(short)
    sources = [Source(str(tmp_path / "long.jsonl"), weight=1), Source(str(tmp_path / "short.jsonl"), weight=1)]
    documents = load_documents(DataConfig(sources, eval_fraction=0.1), seed=0)
    train, _, report, _ = make_windows(documents, tokenizer, WindowConfig(16), 2, Args)
    parts = [tokenize(d.train, tokenizer, 16, "t")[0] for d in documents]
    rows = {row.tobytes() for row in parts[1]["input_ids"]}
    of_short = sum(row.tobytes() in rows for row in train["input_ids"])
    assert abs(of_short / len(train) - 0.5) < 0.01
    assert any("windows used, to keep the weights" in line for line in report)


def test_streaming_yields_the_same_windows_and_never_the_held_out(tmp_path, tokenizer):
    path = write_texts(tmp_path / "t.jsonl", rows=60)
    data = DataConfig([Source(str(path))], eval_fraction=0.2)
    documents = load_documents(data, 0, streaming=True)
    rows = load_source(Source(str(path)))["text"]
    kept = [row for i, row in enumerate(rows) if i % 5 != 4]
    stream = [i for row in kept * 2 for i in [*ids_of(tokenizer, row), tokenizer.eos_token_id]]
    got = StreamedWindows(documents, tokenizer, 16)
    n = len(stream) // 16
    assert np.array_equal(
        [row["input_ids"] for _, row in zip(range(n), got, strict=False)], np.reshape(stream[: n * 16], (n, 16))
    )
    train, evaluation, report, _ = make_windows(documents, tokenizer, WindowConfig(16, streaming=True), 4, Args)
    held = [i for row in rows[4::5] for i in [*ids_of(tokenizer, row), tokenizer.eos_token_id]]
    held_windows = {tuple(w) for w in np.reshape(held[: len(held) // 16 * 16], (-1, 16))}
    assert {tuple(w) for w in evaluation["input_ids"]} <= held_windows and len(evaluation) == len(held) // 64 * 4
    assert "a resume reads again" in report[0] and isinstance(train, StreamedWindows)


def test_no_source_is_left_out_to_fill_batches(tmp_path, tokenizer):
    """Held-out windows are cut to whole batches, and not at the cost of the last source; all others are trained on."""
    paths = [write_texts(tmp_path / "a.jsonl", rows=300), write_texts(tmp_path / "b.jsonl", rows=40, seed=5)]
    documents = load_documents(DataConfig([Source(str(p)) for p in paths], eval_fraction=0.5), seed=0)
    train, evaluation, report, _ = make_windows(documents, tokenizer, WindowConfig(32), 64, Args)
    trains, evals = (
        [tokenize(getattr(d, part), tokenizer, 32, "t")[0] for d in documents] for part in ("train", "eval")
    )
    assert len(train) == sum(map(len, trains))
    small = {row.tobytes() for row in evals[1]["input_ids"]}
    left = int(report[-1].split(" of ")[0])
    assert left > len(small) / 2 and sum(row.tobytes() in small for row in evaluation["input_ids"]) > 0.4 * len(small)


def test_touching_a_file_does_not_make_other_data(tmp_path, tokenizer):
    path = write_texts(tmp_path / "a.jsonl")
    digests = []
    for mtime in (1, 2):
        os.utime(path, (mtime, mtime))
        documents = load_documents(DataConfig([Source(str(path))], 0.1), 0)
        digests.append(make_windows(documents, tokenizer, WindowConfig(16), 2, Args)[-1])
    assert digests[0] == digests[1]
    documents = load_documents(DataConfig([Source(str(write_texts(path, seed=3)))], 0.1), 0)
    assert make_windows(documents, tokenizer, WindowConfig(16), 2, Args)[-1] != digests[0]


def test_truncation_in_a_tokenizer_file_does_not_cut_documents(tokenizer):
    documents = Dataset.from_dict({"text": ["the cat sees fish " * 20]})
    whole = np.concatenate(list(token_stream(documents, tokenizer, "t")))
    other = copy.deepcopy(tokenizer)
    other.backend_tokenizer.enable_truncation(8)
    other.backend_tokenizer.enable_padding(length=500)
    assert np.array_equal(np.concatenate(list(token_stream(documents, other, "t"))), whole)


def test_a_cached_tokenization_leaves_the_same_tokenizer_behind(tokenizer):
    """The rank, or the start, that only reads the cache must see the same tokenizer identity as the one that made it."""
    documents = Dataset.from_dict({"text": ["a dog runs " * 20]})
    texts, caches = [], []
    for _ in range(2):
        truncating = copy.deepcopy(tokenizer)
        truncating.backend_tokenizer.enable_truncation(8)
        caches.append(tokenize(documents, truncating, 8, "t")[0].cache_files)
        texts.append(truncating.backend_tokenizer.to_str())
    assert texts[0] == texts[1] and caches[0] == caches[1]


@pytest.mark.parametrize("fraction", [0.1, 0.4, 0.7])
def test_streams_hold_out_the_share_asked_for(tmp_path, fraction):
    source = Source(str(write_texts(tmp_path / "a.jsonl", rows=100)))
    (part,) = load_documents(DataConfig([source], fraction), 0, streaming=True)
    assert len(list(part.eval)) == round(100 * fraction) and len(list(part.train)) == 100 - round(100 * fraction)


@pytest.mark.parametrize("weights", [(None, None), (1, None), (0, 1), (-1, 2)])
def test_streams_need_weights(tmp_path, tokenizer, weights):
    path = str(write_texts(tmp_path / "a.jsonl"))
    documents = load_documents(DataConfig([Source(path, weight=w) for w in weights], 0), 0, streaming=True)
    with pytest.raises(UserError, match="give every source a weight"):
        StreamedWindows(documents, tokenizer, 8)


def test_streaming_is_read_by_one_process(tmp_path, tokenizer):
    class Workers(Args):
        dataloader_num_workers = 2

    documents = load_documents(DataConfig([Source(str(write_texts(tmp_path / "a.jsonl")))], 0), 0, streaming=True)
    with pytest.raises(UserError, match="dataloader_num_workers: 0"):
        make_windows(documents, tokenizer, WindowConfig(8, streaming=True), 2, Workers)


def test_streaming_mixes_by_weight(tmp_path, tokenizer):
    for name, word in (("a", "cat"), ("b", "dog")):
        (tmp_path / f"{name}.jsonl").write_text(json.dumps({"text": f"{word} " * 200}) + "\n")
    sources = [Source(str(tmp_path / "a.jsonl"), weight=3), Source(str(tmp_path / "b.jsonl"), weight=1)]
    documents = load_documents(DataConfig(sources, eval_fraction=0), 0, streaming=True)
    stream = StreamedWindows(documents, tokenizer, 8)
    text = [tokenizer.decode(row["input_ids"]) for _, row in zip(range(80), stream, strict=False)]
    assert sum("cat" in t for t in text) == 60


def test_too_little_data_is_said(tmp_path, tokenizer):
    path = write_texts(tmp_path / "t.jsonl", rows=10)
    for fraction, length, batch, message in (
        (0, 4096, 1, "0 training windows, fewer than one batch of 1"),
        (0, 16, 1000, "training windows, fewer than one batch of 1000"),
        (0.1, 128, 1, "0 held-out windows, fewer than one batch of 1: raise eval_fraction"),
    ):
        with pytest.raises(UserError, match=message):
            make_windows(
                load_documents(DataConfig([Source(str(path))], fraction), 0),
                tokenizer,
                WindowConfig(length),
                batch,
                Args,
            )


def test_the_end_of_a_single_document_is_held_out(tmp_path):
    text = "".join(f"line {i}\n" for i in range(100))
    (tmp_path / "one.txt").write_text(text)
    (part,) = load_documents(DataConfig([Source(str(tmp_path / "one.txt"))], 0.2), 0)
    assert part.train[0]["text"] + part.eval[0]["text"] == text
    assert part.eval[0]["text"].startswith("line ") and 0.19 < len(part.eval[0]["text"]) / len(text) < 0.22
