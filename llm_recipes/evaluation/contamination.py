"""Which test items stand in training text: word n-grams that both have, 13 for pretraining (Brown et al. 2020, appendix
C), 8 for fine-tuning.

Words are runs of letters and digits in lower case, so case, punctuation and white space do not count. An item shorter
than n words has to stand in the training text whole.
"""

import re
from collections.abc import Iterable, Sequence

import numpy as np

from llm_recipes.evaluation.statistics import two_proportions

BASE = np.uint64(0x9E3779B97F4A7C15)  # any odd number; what the hash confuses is sorted out afterwards
WORD = re.compile(r"[^\W_]+")


def words(text: str) -> list[str]:
    return WORD.findall(text.lower())


def strings(value) -> str:
    """The text of a row's column: of a conversation its messages, without the roles."""
    if isinstance(value, dict):
        return "\n".join(strings(part) for key, part in value.items() if key != "role")
    if isinstance(value, list):
        return "\n".join(map(strings, value))
    return "" if value is None else str(value)


class Index:
    """The n-grams of the items of a benchmark, each with the items that have it."""

    def __init__(self, items: Sequence[str], n: int):
        self.n, self.size, self.vocabulary = n, len(items), {}
        self.empty = []  # items without a word, which nothing can match
        self.items: dict[tuple[int, ...], list[int]] = {}
        for item, text in enumerate(items):
            ids = tuple(self.vocabulary.setdefault(word, len(self.vocabulary) + 1) for word in words(text))
            if not ids:
                self.empty.append(item)
                continue
            length = min(n, len(ids))
            for gram in dict.fromkeys(ids[i : i + length] for i in range(len(ids) - length + 1)):
                self.items.setdefault(gram, []).append(item)
        self.names = {i: word for word, i in self.vocabulary.items()}
        by_length = {}
        for gram in self.items:
            by_length.setdefault(len(gram), []).append(gram)
        self.hashes = {  # sorted, of the n-grams of each length
            length: np.unique(next(h for size, h in _hashes(np.array(grams).T, length) if size == length))
            for length, grams in by_length.items()
        }

    def search(self, texts: Sequence[str]) -> list[dict[int, str]]:
        """For each text the items it shares an n-gram with, each with the first such n-gram."""
        ids, ends = [], []
        for text in texts:
            ids += [self.vocabulary.get(word, 0) for word in words(text)]
            ids.append(0)  # no n-gram goes on into the next text
            ends.append(len(ids))
        array, found = np.array(ids), [{} for _ in texts]
        columns = [array[i:] for i in range(max(self.hashes, default=0))]
        for length, hashes in _hashes(columns, max(self.hashes, default=0)):
            if length not in self.hashes:
                continue
            known = self.hashes[length]
            at = np.searchsorted(known, hashes).clip(max=len(known) - 1)
            starts = np.flatnonzero(known[at] == hashes)
            for start, row in zip(starts.tolist(), np.searchsorted(ends, starts, side="right").tolist(), strict=True):
                gram = tuple(ids[start : start + length])
                for item in self.items.get(gram, ()):
                    if item not in found[row]:
                        found[row][item] = " ".join(self.names[i] for i in gram)
        return found


def _hashes(columns: Sequence[np.ndarray], longest: int) -> Iterable[tuple[int, np.ndarray]]:
    """(m, polynomial hashes of the n-grams of m words) for m = 1 to `longest`; `columns[i]` holds the ids of word i."""
    hashes = np.zeros(len(columns[0]) if longest else 0, dtype=np.uint64)
    for i in range(longest):
        column = columns[i].astype(np.uint64) + np.uint64(1)
        hashes = hashes[: len(column)] * BASE + column
        yield i + 1, hashes


def scan(index: Index, batches: Iterable[Sequence[str]]) -> dict:
    """Flagged training rows and flagged items, each with the first partner, the n-gram they share and how many partners.

    `rows` holds {row, item, items, ngram}, `items` {item, row, rows, ngram}, in order.
    """
    rows, items, n_rows, size = [], {}, 0, 0
    for texts in batches:
        for text, found in zip(texts, index.search(texts), strict=True):
            if found:
                item = min(found)
                rows.append({"row": n_rows, "item": item, "items": len(found), "ngram": found[item]})
            for item, gram in found.items():
                items.setdefault(item, {"item": item, "row": n_rows, "rows": 0, "ngram": gram})["rows"] += 1
            n_rows, size = n_rows + 1, size + len(text.encode())
    return {
        "n": index.n, "train_rows": n_rows, "train_bytes": size, "flagged_rows": len(rows),
        "benchmark_items": index.size, "flagged_items": len(items), "items_without_words": len(index.empty),
        "rows": rows, "items": [items[item] for item in sorted(items)],
    }  # fmt: skip


def split_scores(scores: dict[int, dict[str, float]], flagged: set[int]) -> dict[str, dict]:
    """Means of each metric over the clean and the flagged items; `ci95`, of their difference, where scores are 0 or 1.

    `scores` are {item: {metric: score}} of the items that have any.
    """
    report = {}
    for metric in next(iter(scores.values())):
        parts = {"clean": [], "flagged": []}
        for item, score in scores.items():
            parts["flagged" if item in flagged else "clean"].append(score[metric])
        clean, dirty = parts.values()
        figures = {name: {"n": len(values), "mean": sum(values) / len(values) if values else None}
                   for name, values in parts.items()}  # fmt: skip
        if clean and dirty:
            figures["difference"] = figures["flagged"]["mean"] - figures["clean"]["mean"]
            if set(clean + dirty) <= {0, 1}:
                counts = int(sum(clean)), len(clean), int(sum(dirty)), len(dirty)
                figures["ci95"] = two_proportions(*counts)
        report[metric] = figures
    return report
