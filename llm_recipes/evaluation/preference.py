"""Preferences between models' answers: blind sheets, votes, and what follows from them.

An item is a prompt with the answers of two models, here called "a" and "b". A vote is "a", "b", "tie" or "bad" (both
are); each of the last two is half a win for both sides. Votes of one prompt are not independent of each other, so
intervals and tests take prompts, not votes, for the sample.
"""

import csv
import hashlib
import io
import json
import math
import os
import random
import re
from collections import Counter
from itertools import combinations
from pathlib import Path

import numpy as np

from llm_recipes.errors import UserError
from llm_recipes.evaluation.results import check_output, read_jsonl
from llm_recipes.evaluation.runs import write_json, write_lines, write_text
from llm_recipes.evaluation.statistics import sign_test
from llm_recipes.metrics import wilson

QUALITIES = ("helpful", "harmless", "honest")  # Askell et al. 2021, arXiv 2112.00861
RATINGS = tuple(f"{side}_{quality}" for side in ("left", "right") for quality in QUALITIES)
VOTES = ("left", "right", "tie", "bad")
ITEM = {"item", "prompt_id", "prompt", "models", "answers", "left"}  # what key.json has of each
SCORES = {"a": 1.0, "b": 0.0, "tie": 0.5, "bad": 0.5}
ELO = 400 / math.log(10)  # points a unit of log-odds
UNDEFINED = 0.05  # share of bootstrap draws without a value beyond which there is no interval


# ---- files ------------------------------------------------------------------------------------------


def read_key(folder: str) -> dict:
    """What eval/preference/sheets.py knows about the sheets in `folder`. Raises UserError where there are none."""
    path = Path(folder, "key.json")
    try:
        key = json.loads(path.read_text(encoding="utf-8"))
        whole = key["items"] and {"seed", "models", "raters", "identical"} <= key.keys()
        for item in key["items"]:
            whole &= item.keys() >= ITEM and set(key["raters"]) <= item["left"].keys()
    except OSError as error:
        raise UserError(f"{folder} has no key.json: make the sheets with eval/preference/sheets.py") from error
    except (ValueError, TypeError, LookupError, AttributeError):
        whole = False
    if not whole:
        raise UserError(f"{path} is damaged: it is not as eval/preference/sheets.py wrote it")
    return key


# ---- sheets -----------------------------------------------------------------------------------------


def read_answers(run: str, task: str) -> tuple[list[dict], int]:
    """Rows {doc_sha or None, prompt, answer} of an evaluation run's folder or of a jsonl file, and how many have further
    answers: of several `outputs` the first is the answer."""
    path = Path(run) / task / "samples.jsonl" if Path(run).is_dir() else Path(run)
    answers, more = [], 0
    for number, row in enumerate(read_jsonl(path), 1):
        outputs = [row["answer"]] if "answer" in row else row.get("outputs")
        prompt = row.get("prompt")
        answered = isinstance(outputs, list) and outputs and isinstance(outputs[0], str)
        if not (isinstance(prompt, str) and answered and isinstance(row.get("doc_sha"), str | None)):
            raise UserError(f"{path}, row {number}: needed are a text prompt and an answer (or outputs), both text")
        answers.append({"doc_sha": row.get("doc_sha"), "prompt": prompt, "answer": outputs[0]})
        more += len(outputs) > 1
    if not answers:
        raise UserError(f"{path} is empty")
    return answers, more


def align(runs: dict[str, list[dict]]) -> list[tuple[str, str, dict[str, str]]]:
    """(id, prompt, {model: answer}) of each prompt, in the first run's order; the id is its doc_sha, or the prompt itself
    where some run has none. Raises UserError unless all runs answered the same prompts, each once."""
    by = "doc_sha" if all(row["doc_sha"] for rows in runs.values() for row in rows) else "prompt"
    tables = {model: {row[by]: row for row in rows} for model, rows in runs.items()}
    first, table = next(iter(tables.items()))
    for model, other in tables.items():
        if len(other) < len(runs[model]):
            raise UserError(f"{model}: {len(runs[model]) - len(other)} prompts are there more than once")
        if other.keys() != table.keys():
            raise UserError(
                f"not the same prompts: {len(table.keys() - other.keys())} only in {first}, "
                f"{len(other.keys() - table.keys())} only in {model}, {len(table.keys() & other.keys())} in both"
            )
        if changed := sum(row["prompt"] != table[i]["prompt"] for i, row in other.items()):
            raise UserError(f"{changed} documents have one prompt in {first} and another in {model}")
    return [(i, row["prompt"], {model: tables[model][i]["answer"] for model in tables}) for i, row in table.items()]


def left_side(seed: int, prompt_id: str, pair: tuple[str, str], rater: str) -> int:
    """Which of the pair stands on the left for a rater: 0 or 1, by hash, so that it depends on no order of calls."""
    return hashlib.sha256(json.dumps([seed, prompt_id, *pair, rater]).encode()).digest()[0] & 1


def make_items(aligned: list[tuple], raters: list[str], seed: int) -> tuple[list[dict], list[dict]]:
    """(items, [{models, count} of identical answers, which are left out]): each pair of models on each prompt.

    The order is drawn, and the same for all raters, so that those who stop early have judged the same items.
    """
    items, identical = [], Counter()
    for prompt_id, prompt, answers in aligned:
        for pair in combinations(answers, 2):
            texts = [answers[model] for model in pair]
            same = texts[0].strip() == texts[1].strip()
            identical[pair] += same
            if not same:
                left = {rater: left_side(seed, prompt_id, pair, rater) for rater in raters}
                items.append({"prompt_id": prompt_id, "prompt": prompt, "models": pair, "answers": texts, "left": left})
    random.Random(seed).shuffle(items)  # noqa: S311
    items = [{"item": number} | item for number, item in enumerate(items, 1)]
    return items, [{"models": pair, "count": count} for pair, count in identical.items()]


def sheet(items: list[dict], rater: str) -> list[dict]:
    """What the rater sees: {item, prompt, left, right}."""
    return [
        {"item": i["item"], "prompt": i["prompt"]}
        | {"left": i["answers"][i["left"][rater]], "right": i["answers"][1 - i["left"][rater]]}
        for i in items
    ]


def _cell(value) -> str:
    """A spreadsheet runs a cell that begins like a formula: an apostrophe makes it text."""
    return f"'{value}" if str(value).startswith(("=", "+", "-", "@", "\t", "\r")) else value


def write_sheets(folder: str, key: dict, raters: list[str]) -> None:
    """sheet-<rater>.jsonl and .csv for each rater, then key.json. Raises UserError where there can be no such folder."""
    try:
        Path(folder).mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"{folder} cannot be made: {error.strerror}") from error
    check_output(Path(folder, "key.json"))
    for rater in raters:
        rows = sheet(key["items"], rater)
        write_lines(Path(folder, f"sheet-{rater}.jsonl"), rows)
        table = csv.writer(text := io.StringIO())
        table.writerow([*rows[0], "vote", *RATINGS, "comment"])
        table.writerows([_cell(value) for value in row.values()] + [""] * (len(RATINGS) + 2) for row in rows)
        marked = "\ufeff" + text.getvalue()  # Excel takes it for UTF-8 by this mark
        write_text(Path(folder, f"sheet-{rater}.csv"), marked)
    write_json(Path(folder, "key.json"), key)


# ---- votes ------------------------------------------------------------------------------------------


def append_vote(path: str | Path, vote: dict) -> None:
    """Adds a line and returns when the disk has it. A line that a crash cut short stays a line of its own."""
    with open(path, "a+b") as file:
        if file.tell():
            file.seek(-1, os.SEEK_END)
            if file.read(1) != b"\n":
                file.write(b"\n")
        file.write((json.dumps(vote, ensure_ascii=False) + "\n").encode())
        file.flush()
        os.fsync(file.fileno())


def check_vote(vote: dict, numbers: set[int], where: str) -> dict:
    """The vote. Raises UserError for one that is not {item, vote, ratings 1 to 5 or None}."""
    given = [vote[name] for name in RATINGS if vote.get(name) is not None]
    bad = [rating for rating in given if type(rating) is not int or not 1 <= rating <= 5]  # True is no 1
    if type(vote.get("item")) is not int or vote["item"] not in numbers:
        raise UserError(f"{where}: there is no item {vote.get('item')}")
    if vote.get("vote") not in VOTES or bad:
        raise UserError(f"{where}, item {vote['item']}: a vote is one of {', '.join(VOTES)}; ratings are 1 to 5")
    return vote


def read_page_votes(path: Path, numbers: set[int]) -> dict[int, dict]:
    """{item: last vote} of what the page wrote; none where there is no such file."""
    rows = read_jsonl(path) if path.exists() else []
    return {row.get("item"): check_vote(row, numbers, str(path)) for row in rows}


def read_csv_votes(path: str | Path, numbers: set[int]) -> dict[int, dict]:
    """{item: vote} of the rows that are filled in in a CSV sheet; none where there is no such file, or an empty one.

    Raises UserError for what is no such sheet, and for an item with two votes.
    """
    try:
        text, votes = Path(path).read_bytes().decode("utf-8-sig"), {}
    except FileNotFoundError:
        return {}
    except UnicodeDecodeError as error:
        raise UserError(f"{path} is not UTF-8: save it as CSV UTF-8") from error
    delimiter = max(",;\t", key=text.partition("\n")[0].count)  # as the spreadsheet saved it
    csv.field_size_limit(max(csv.field_size_limit(), len(text)))  # an answer may be longer than the library expects
    rows = csv.DictReader(io.StringIO(text, newline=""), delimiter=delimiter)
    if text.strip() and not {"item", "vote"} <= set(rows.fieldnames):
        raise UserError(f"{path}: the first row has to name the columns, as in the sheet; item or vote is missing")
    for row in rows:
        cells = {name: (row.get(name) or "").strip() for name in ("item", "vote", *RATINGS, "comment")}
        if any(cells[name] for name in ("vote", *RATINGS, "comment")):
            vote = {name: int(cell) if cell.isdecimal() else cell or None for name, cell in cells.items()}
            vote |= {"vote": cells["vote"].lower(), "comment": cells["comment"]}
            if check_vote(vote, numbers, str(path))["item"] in votes:
                raise UserError(f"{path}: there are two votes on item {vote['item']}: delete one")
            votes[vote["item"]] = vote
    return votes


def read_votes(folder: str, key: dict) -> list[dict]:
    """Votes of all raters, of each item the last one, from votes-<rater>.jsonl of the page and filled-in CSV sheets."""
    numbers, votes = {item["item"] for item in key["items"]}, []
    for rater in key["raters"]:
        path = Path(folder, f"votes-{rater}.jsonl")
        paged = read_page_votes(path, numbers)
        table = Path(folder, f"sheet-{rater}.csv")
        filled = read_csv_votes(table, numbers)
        if both := paged.keys() & filled.keys():
            raise UserError(f"{rater} voted on {len(both)} items both in {path} and in {table}: empty one of them")
        votes += [{"rater": rater} | vote for vote in (paged | filled).values()]
    return votes


def read_judged(path: str, key: dict) -> list[dict]:
    """The rows of eval/preference/judge.py. Raises UserError for any other, and for an item that is there twice."""
    numbers, rows = {item["item"] for item in key["items"]}, read_jsonl(path)
    for number, row in enumerate(rows, 1):
        picks = [row.get(name) in ("a", "b", "tie", "none") for name in ("first", "second")]
        if not all(picks) or row.get("vote") not in ("a", "b", "tie") or not isinstance(row.get("judge"), str):
            raise UserError(f"{path}, row {number} is none of judge.py's: {{item, judge, first, second, vote}}")
        if type(row.get("item")) is not int or row["item"] not in numbers:
            raise UserError(f"{path}, row {number}: there is no item {row.get('item')}, or it is there twice")
        numbers.remove(row["item"])
    if not rows:
        raise UserError(f"{path} is empty")
    return rows


def outcomes(key: dict, votes: list[dict]) -> list[dict]:
    """Votes by side as votes by model: {rater, item, outcome a | b | tie | bad, left a | b}."""
    items, rows = {item["item"]: item for item in key["items"]}, []
    for vote in votes:
        left = items[vote["item"]]["left"][vote["rater"]]
        sides = {"left": "ab"[left], "right": "ab"[1 - left]}
        outcome = sides.get(vote["vote"], vote["vote"])
        rows.append({"rater": vote["rater"], "item": vote["item"], "outcome": outcome, "left": sides["left"]})
    return rows


def majority(found: list[str]) -> str | None:
    """The outcome that more than half have voted for."""
    outcome, count = Counter(found).most_common(1)[0]
    return outcome if 2 * count > len(found) else None


def majorities(rows: list[dict]) -> dict[int, str | None]:
    """{item: majority} of the items with a vote."""
    by_item = {}
    for row in rows:
        by_item.setdefault(row["item"], []).append(row["outcome"])
    return {item: majority(found) for item, found in by_item.items()}


def preference_rows(key: dict, rows: list[dict]) -> tuple[list[dict], dict[str, int]]:
    """({prompt, chosen, rejected} as messages, for recipes/dpo, and how many items are left out for which reason)."""
    decided, pairs, left_out = majorities(rows), [], Counter()
    for item in key["items"]:
        outcome = decided.get(item["item"]) if item["item"] in decided else "without a vote"
        if outcome in ("a", "b") and item["prompt"].strip() and all(text.strip() for text in item["answers"]):
            chosen, rejected = item["answers"] if outcome == "a" else item["answers"][::-1]
            said = {"prompt": item["prompt"], "chosen": chosen, "rejected": rejected}
            roles = {"prompt": "user", "chosen": "assistant", "rejected": "assistant"}
            pairs.append({name: [{"role": roles[name], "content": text}] for name, text in said.items()})
        else:
            names = {"tie": "ties", "bad": "both bad", None: "no majority", "a": "empty text", "b": "empty text"}
            left_out[names.get(outcome, outcome)] += 1
    return pairs, dict(left_out)


# ---- statistics -------------------------------------------------------------------------------------


def bootstrap(statistic, prompts, draws: int = 1000, seed: int = 0) -> tuple[np.ndarray, int]:
    """(95 % percentile interval `(2, ...)`, draws without a value) of `statistic(weights (n,))`, prompts drawn anew.

    `prompts` (n,) says whose prompt each row is; a draw weighs a row by how often its prompt was drawn. The interval is
    of the draws with a value, and NaN where more than 5 % have none, or where it has no width: draws that are all alike,
    as of one prompt, say nothing of the spread.
    """
    names, of = np.unique(prompts, return_inverse=True)
    draw = np.random.default_rng(seed)
    even = np.full(len(names), 1 / len(names))
    found = np.array([statistic(draw.multinomial(len(names), even)[of].astype(float)) for _ in range(draws)])
    defined = np.isfinite(found.reshape(draws, -1)).all(1)
    if defined.mean() < 1 - UNDEFINED:
        return np.full((2, *found.shape[1:]), np.nan), int((~defined).sum())
    ends = np.percentile(found[defined], [2.5, 97.5], axis=0)
    return np.where(np.isclose(*ends, rtol=1e-9), np.nan, ends), int((~defined).sum())


def mean_interval(values, prompts) -> tuple[float, float]:
    """95 % interval of a mean, by bootstrap over prompts; NaN where it has no width."""
    values = np.asarray(values, float)

    def mean(weights):
        return weights @ values / weights.sum()

    low, high = bootstrap(mean, prompts)[0]
    return float(low), float(high)


def share_interval(values, prompts) -> tuple[float, float]:
    """95 % interval of the mean of values in [0, 1]: Wilson where each prompt has one value, else bootstrap over prompts.

    Where the bootstrap has no width, as of values that are all alike, it is Wilson with the number of prompts.
    """
    mean, count = float(np.mean(values)), len(set(prompts))
    if count < len(values) and not np.isnan(ends := mean_interval(values, prompts)).any():
        return ends
    return wilson(mean * count, count)


def logistic(x: np.ndarray, y: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """Coefficients (k,) of greatest likelihood of sigmoid(x @ b), for shares y (n,) with weights (n,), by Newton's method.

    NaN where there are none: `x` (n, k) does not tell them apart, or it separates the votes and they are infinite. With a
    condition of `x` above 1e6 it hardly does: the equations of a step have the square of it, and no digits would be left.
    """
    x, y, weights = x[weights > 0], y[weights > 0], weights[weights > 0]
    b = np.zeros(x.shape[1])
    if len(x) < len(b) or np.linalg.cond(x) > 1e6:
        return np.full(len(b), np.nan)
    for _ in range(200):
        log_odds = x @ b
        if abs(log_odds).max() > 30:
            break
        p = 1 / (1 + np.exp(-log_odds))
        try:
            step = np.linalg.solve((x * (weights * p * (1 - p))[:, None]).T @ x, x.T @ (weights * (y - p)))
        except np.linalg.LinAlgError:
            break
        b += step / max(1, abs(step).max())  # a whole step may go too far
        if abs(step).max() < 1e-10:
            return b
    return np.full(len(b), np.nan)


def bradley_terry(first, second, scores, models: int, weights=None) -> np.ndarray:
    """Log-odds (models,) with mean 0: P(i beats j) = sigmoid(s_i - s_j) (Bradley & Terry 1952), ties as half wins each.

    `first` and `second` (n,) are model numbers, `scores` (n,) what the first one won, in [0, 1]. All NaN where no finite
    scores are best: models that never met, even through others, or some that never lost to the rest.
    """
    weights = np.ones(len(scores)) if weights is None else weights
    won = np.zeros((models, models))
    np.add.at(won, (first, second), weights * scores)
    np.add.at(won, (second, first), weights * (1 - np.asarray(scores)))
    i, j = np.triu_indices(models, 1)
    count = won[i, j] + won[j, i]
    x = np.eye(models)[i] - np.eye(models)[j]
    found = logistic(x[:, :-1], won[i, j] / np.maximum(count, 1e-300), count)  # the last one at 0
    return np.append(found, 0) - found.sum() / models


def length_controlled(scores, lengths_a, lengths_b, prompts) -> dict:
    """{lc_win_rate, lc_ci95, length_coefficient, lc_undefined_draws}: win rate of a if all answers were of b's length.

    sigmoid(theta + phi tanh((len a - len b) / sd)) is fitted to the votes and read at length difference 0 (Dubois et al.
    2024, arXiv 2404.04475, eq. 2). Lengths are in characters. Without the paper's term for the difficulty of the
    instruction, which takes many models to estimate, and without its regularisation. None where length alone separates
    the votes, or its difference is always about the same.
    """
    difference = np.asarray(lengths_a, float) - np.asarray(lengths_b, float)
    spread = difference.std(ddof=1) if len(difference) > 1 else 0.0
    x = np.stack([np.ones(len(difference)), np.tanh(difference / (spread or 1))], 1)
    scores = np.asarray(scores, float)
    theta, phi = logistic(x, scores, np.ones(len(scores)))
    if math.isnan(theta):
        return {"lc_win_rate": None, "lc_ci95": None, "length_coefficient": None, "lc_undefined_draws": None}
    interval, undefined = bootstrap(lambda weights: 1 / (1 + np.exp(-logistic(x, scores, weights)[0])), prompts)
    return {
        "lc_win_rate": float(1 / (1 + np.exp(-theta))), "lc_ci95": _interval(interval),
        "length_coefficient": float(phi), "lc_undefined_draws": undefined,
    }  # fmt: skip


def krippendorff_alpha(values: np.ndarray, ordinal: bool = False) -> float:
    """Agreement of raters beyond chance (Krippendorff 2011, "Computing Krippendorff's alpha-reliability").

    `values` (raters, units), NaN where a rater has none. 1 is perfect, 0 is chance. NaN where nothing can disagree: no unit
    has two values, or all values are equal. Our own, because the package of that name is GPL.
    """
    values = values[:, (~np.isnan(values)).sum(0) > 1]
    levels = np.unique(values[~np.isnan(values)])
    counts = (values[:, :, None] == levels).sum(0)  # (units, levels)
    pairs = counts.sum(1)[:, None, None] - 1
    observed = ((counts[:, :, None] * counts[:, None, :] - counts[:, :, None] * np.eye(len(levels))) / pairs).sum(0)
    total = observed.sum(1)
    expected = (np.outer(total, total) - np.diag(total)) / max(total.sum() - 1, 1)
    ranks = total.cumsum() - total / 2  # of the middle of a level
    distance = (ranks[:, None] - ranks) ** 2 if ordinal else 1 - np.eye(len(levels))
    chance = (expected * distance).sum()
    return float(1 - (observed * distance).sum() / chance) if chance else math.nan


# ---- report -----------------------------------------------------------------------------------------


def _interval(ends) -> list[float] | None:
    return None if np.isnan(ends).any() else [float(end) for end in ends]


def _number(value: float) -> float | None:
    return None if math.isnan(value) else value


def _share(values, prompts) -> dict:
    if not len(values):
        return {"share": None, "ci95": None, "n": 0}
    return {"share": float(np.mean(values)), "ci95": list(share_interval(values, prompts)), "n": len(values)}


def _alpha(rows: list[tuple[str, object, float]], ordinal: bool) -> dict:
    """{alpha, units with two values or more} of (rater, unit, value)."""
    raters, units = ({name: n for n, name in enumerate(dict.fromkeys(row[at] for row in rows))} for at in (0, 1))
    values = np.full((len(raters), len(units)), np.nan)
    for rater, unit, value in rows:
        values[raters[rater], units[unit]] = value
    alpha = krippendorff_alpha(values, ordinal)
    return {"alpha": _number(alpha), "units": int(((~np.isnan(values)).sum(0) > 1).sum())}


def compare(key: dict, rows: list[dict]) -> dict:
    """{pairs, bradley_terry} of outcomes, one entry a pair of models with votes and one a model."""
    items, pairs = {item["item"]: item for item in key["items"]}, []
    for models in combinations(key["models"], 2):
        here = [row for row in rows if tuple(items[row["item"]]["models"]) == models]
        if not here:
            continue
        of = [items[row["item"]] for row in here]
        scores, prompts = [SCORES[row["outcome"]] for row in here], [item["prompt_id"] for item in of]
        net = Counter()
        for prompt, score in zip(prompts, scores, strict=True):
            net[prompt] += score - 0.5
        counts = Counter(row["outcome"] for row in here)
        codes = [(row["rater"], row["item"], list(SCORES).index(row["outcome"])) for row in here]
        agreement = _alpha(codes, ordinal=False)
        pairs.append({
            "a": models[0], "b": models[1], "votes": len(here), "prompts": len(net), "wins": counts["a"],
            "losses": counts["b"], "ties": counts["tie"], "both_bad": counts["bad"],
            "win_rate": float(np.mean(scores)), "ci95": list(share_interval(scores, prompts)),
            "sign_test_p": sign_test(sum(n > 0 for n in net.values()), sum(n < 0 for n in net.values())),
            **length_controlled(scores, *([len(i["answers"][side]) for i in of] for side in (0, 1)), prompts),
            "alpha": agreement["alpha"], "alpha_items": agreement["units"],
        })  # fmt: skip
    of = [items[row["item"]] for row in rows]
    first, second = (np.array([key["models"].index(item["models"][side]) for item in of]) for side in (0, 1))
    scores, count = np.array([SCORES[row["outcome"]] for row in rows]), len(key["models"])
    strengths = 1000 + ELO * bradley_terry(first, second, scores, count)
    ends, undefined = bootstrap(
        lambda weights: 1000 + ELO * bradley_terry(first, second, scores, count, weights),
        [item["prompt_id"] for item in of],
    )
    table = [
        {"model": model, "score": _number(float(strengths[n])), "ci95": _interval(ends[:, n])}
        for n, model in enumerate(key["models"])
    ]
    return {"pairs": pairs, "bradley_terry": {"scores": table, "undefined_draws": undefined}}


def rating_table(key: dict, votes: list[dict]) -> dict:
    """{model: {quality: mean, share of 4 and 5, both with intervals, n}} and {quality: alpha} of the 1 to 5 ratings."""
    items, found = {item["item"]: item for item in key["items"]}, {}
    for vote in votes:
        item = items[vote["item"]]
        left = item["left"][vote["rater"]]
        for name in RATINGS:
            if vote.get(name) is not None:
                side, quality = name.split("_")
                which = left if side == "left" else 1 - left
                rating = (vote["rater"], (item["item"], which), vote[name], item["models"][which], item["prompt_id"])
                found.setdefault(quality, []).append(rating)
    table, alphas = {}, {}
    for quality, rows in found.items():
        alphas[quality] = _alpha([row[:3] for row in rows], ordinal=True)
        for model in dict.fromkeys(row[3] for row in rows):
            values, prompts = zip(*((row[2], row[4]) for row in rows if row[3] == model), strict=True)
            high = _share([float(value >= 4) for value in values], prompts)
            table.setdefault(model, {})[quality] = {
                "mean": float(np.mean(values)), "ci95": _interval(mean_interval(values, prompts)), "n": len(values),
                "share_4_or_5": high["share"], "share_4_or_5_ci95": high["ci95"],
            }  # fmt: skip
    return {"models": table, "alpha": alphas}


def judge_table(key: dict, judged: list[dict], raters: dict[int, str | None]) -> dict:
    """How far a judge's votes depend on the order, and how often they are the raters' majority; "bad" counts as a tie."""
    prompts = {item["item"]: item["prompt_id"] for item in key["items"]}
    both = [prompts[row["item"]] for row in judged]
    consistent = _share([float(row["first"] == row["second"] != "none") for row in judged], both)
    named = [(row["item"], pick == at) for row in judged for pick, at in ((row["first"], "a"), (row["second"], "b"))
             if pick in ("a", "b")]  # fmt: skip
    shared = [row for row in judged if raters.get(row["item"])]
    same = [float(row["vote"] == raters[row["item"]].replace("bad", "tie")) for row in shared]
    picks = [pick for row in judged for pick in (row["first"], row["second"])]
    return {
        "items": len(judged), "no_answer": picks.count("none"), "position_consistency": consistent,
        "first_shown_wins": _share([float(first) for _, first in named], [prompts[item] for item, _ in named]),
        "agreement_with_raters": _share(same, [prompts[row["item"]] for row in shared]),
    }  # fmt: skip


def make_report(key: dict, votes: list[dict], judged: list[dict]) -> dict:
    """All figures of report.json."""
    rows, prompts = outcomes(key, votes), {item["item"]: item["prompt_id"] for item in key["items"]}
    report = {name: key[name] for name in ("seed", "models", "identical")} | {"schema": 1, "items": len(key["items"])}

    def left_wins(rows):
        rows = [row for row in rows if row["outcome"] in ("a", "b")]
        return _share([float(row["outcome"] == row["left"]) for row in rows], [prompts[row["item"]] for row in rows])

    report["raters"] = {
        rater: {"votes": len(own), "left_wins": left_wins(own)}
        for rater in key["raters"]
        for own in [[row for row in rows if row["rater"] == rater]]
    }
    if rows:
        report |= compare(key, rows) | {"left_wins": left_wins(rows), "ratings": rating_table(key, votes)}
    if judged:
        seen = [{"rater": row["judge"], "item": row["item"], "outcome": row["vote"]} for row in judged]
        report["judge"] = {"name": judged[0]["judge"]} | judge_table(key, judged, majorities(rows)) | compare(key, seen)
    return report


def check_name(rater: str) -> str:
    """The name, which becomes part of file names. Raises UserError for one that cannot."""
    if not re.fullmatch(r"[\w-]{1,40}", rater):
        raise UserError(f"{rater!r} is no rater's name: use letters, digits, _ and -")
    return rater
