"""Held-out report of a reward model: accuracy, calibration, lengths, and whether the saved folder scores alike."""

import json
from pathlib import Path

import numpy as np
import torch
from accelerate.utils import extract_model_from_parallel
from datasets import Dataset
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

from llm_recipes._compat import no_deepspeed
from llm_recipes.adapters import whole_model
from llm_recipes.answers import generate
from llm_recipes.config import RewardModelConfig
from llm_recipes.conversations import Encoder
from llm_recipes.errors import RecipeExit
from llm_recipes.metrics import wilson

BINS = 15  # of confidence, as in Guo et al. 2017


def score(model, sequences: list[list[int]], pad_id: int, batch_size: int, side: str = "right") -> np.ndarray:
    """Scores `(n,)` in float64 of `n` token sequences by a sequence classifier with one label, padded on `side`.

    They are read where transformers reads them, in training too: at the last token that is not
    `pad_id`. So where the end of a text is `pad_id`, its score is that of the token before, and a
    finished text scores as a cut one: give the tokenizer a pad token of its own.

    Computed in the weights' own precision even after training under autocast: a linear head's bf16
    output has 8 bits, and pairs that the model tells apart would tie.
    """
    if model.config.get_text_config().pad_token_id != pad_id:
        raise ValueError(f"model.config.pad_token_id is {model.config.get_text_config().pad_token_id}, not {pad_id}")
    if not all(any(token != pad_id for token in tokens) for tokens in sequences):
        raise ValueError("a sequence to score is empty or only padding")
    scores, order = np.zeros(len(sequences)), sorted(range(len(sequences)), key=lambda i: -len(sequences[i]))
    attributes = dict(vars(model))  # of which unwrapping removes two; training may go on after this
    extract_model_from_parallel(model, keep_fp32_wrapper=False)
    model.eval()
    try:
        for start in range(0, len(order), batch_size):
            rows = order[start : start + batch_size]
            ids = torch.full((len(rows), len(sequences[rows[0]])), pad_id)
            mask = torch.zeros_like(ids)
            for i, row in enumerate(rows):
                length = len(sequences[row])
                where = slice(0, length) if side == "right" else slice(ids.shape[1] - length, None)
                ids[i, where], mask[i, where] = torch.tensor(sequences[row]), 1
            # Models count positions from the first column unless told; after right padding that is correct.
            positions = {} if side == "right" else {"position_ids": (mask.cumsum(1) - 1).clamp(min=0).to(model.device)}
            with torch.no_grad():
                logits = model(
                    input_ids=ids.to(model.device),
                    attention_mask=mask.to(model.device),
                    use_cache=False,
                    **positions,
                ).logits
            scores[rows] = logits[:, 0].double().cpu().numpy()
    finally:
        model.train(attributes["training"])
        vars(model).update(attributes)
    return scores


def _reliability(margins: np.ndarray) -> list[dict]:
    """Non-empty bins of confidence sigmoid(|margin|), equal parts of [0.5, 1] that hold their upper edge."""
    confidence = np.exp(-np.logaddexp(0, -np.abs(margins)))
    bins = np.clip(np.ceil((confidence - 0.5) * 2 * BINS).astype(int) - 1, 0, BINS - 1)
    return [
        {
            "confidence": float(confidence[bins == i].mean()),
            "accuracy": float((margins[bins == i] > 0).mean()),
            "n": int((bins == i).sum()),
        }
        for i in np.unique(bins)
    ]


def report(chosen, rejected, chosen_lengths, rejected_lengths) -> dict:
    """Figures of `n` held-out pairs from scores `(n,)` and lengths `(n,)` of both sides; margin = chosen - rejected.

    Bradley-Terry: P(chosen is better) = sigmoid(margin). A tie counts as wrong. Brier is the mean of
    (P - 1)^2; ECE is the mean over the pairs of |accuracy - confidence| of the bin (Guo et al. 2017,
    eq. 3). The standard deviation divides by n. None stands for what no pair or no spread defines.
    """
    chosen, rejected, chosen_lengths, rejected_lengths = (
        np.asarray(x, dtype=np.float64) for x in (chosen, rejected, chosen_lengths, rejected_lengths)
    )
    if chosen.shape != rejected.shape or not chosen.shape == chosen_lengths.shape == rejected_lengths.shape:
        raise ValueError("chosen, rejected and their lengths differ in number")
    margins = chosen - rejected
    n, right = len(margins), margins > 0
    if not n:
        raise RecipeExit("The reward model cannot be judged: there are no held-out pairs")
    if not np.isfinite(margins).all():
        raise RecipeExit(f"The reward model's scores of {(~np.isfinite(margins)).sum()} of {n} pairs are not finite")
    low, high = wilson(int(right.sum()), n)
    log_loss = np.logaddexp(0, -margins)
    bins = _reliability(margins)
    scores, lengths = np.concatenate([chosen, rejected]), np.concatenate([chosen_lengths, rejected_lengths])
    spread = np.ptp(scores) > 0 and np.ptp(lengths) > 0
    shorter, longer = chosen_lengths < rejected_lengths, chosen_lengths > rejected_lengths
    return {
        "n": n,
        "accuracy": float(right.mean()),
        "accuracy_low": low,
        "accuracy_high": high,
        "ties": int((margins == 0).sum()),
        "log_loss": float(log_loss.mean()),
        "margin_mean": float(margins.mean()),
        "margin_std": float(margins.std()),
        **{f"margin_p{q:02}": float(np.percentile(margins, q)) for q in (5, 25, 50, 75, 95)},
        "brier": float(np.mean(np.expm1(-log_loss) ** 2)),
        "ece": sum(row["n"] * abs(row["accuracy"] - row["confidence"]) for row in bins) / n,
        "reliability": bins,
        "score_length_correlation": float(np.corrcoef(scores, lengths)[0, 1]) if spread else None,
        "accuracy_chosen_shorter": float(right[shorter].mean()) if shorter.any() else None,
        "n_chosen_shorter": int(shorter.sum()),
        "accuracy_chosen_longer": float(right[longer].mean()) if longer.any() else None,
        "n_chosen_longer": int(longer.sum()),
    }


def statistics(scores) -> dict:
    """Mean and standard deviation of scores `(n,)`, divided by n: normalised with them, these very scores have 0 and 1."""
    if not len(scores) or not np.isfinite(scores).all():
        raise RecipeExit("The reward model's scores cannot be normalised: there are none, or some are not finite")
    return {"score_mean": float(np.mean(scores)), "score_std": float(np.std(scores))}


def plot(report: dict, margins, path: Path) -> None:
    """Draws the reliability diagram of `report`, each bin with its number of pairs, and a histogram of margins `(n,)`."""
    from matplotlib.figure import Figure  # only here: it is slow to import

    figure = Figure(figsize=(9, 4), layout="constrained")
    left, right = figure.subplots(1, 2)
    left.plot([0.5, 1], [0.5, 1], color="grey", linestyle="--", label="calibrated")
    points = [(row["confidence"], row["accuracy"]) for row in report["reliability"]]
    left.plot(*zip(*points, strict=True), marker="o", label=f"ECE {report['ece']:.3f}")
    for row, point in zip(report["reliability"], points, strict=True):
        left.annotate(f"{row['n']:,}", point, xytext=(0, 6), textcoords="offset points", ha="center", fontsize=7)
    left.set(xlabel="confidence", ylabel="accuracy", xlim=(0.48, 1.02), ylim=(-0.05, 1.1))
    left.legend(loc="lower right")
    right.hist(margins, bins=40)
    right.axvline(0, color="grey", linestyle="--")
    right.set(xlabel="score of chosen - score of rejected", ylabel="pairs", title=f"accuracy {report['accuracy']:.3f}")
    figure.savefig(path, dpi=120)


def load_saved(folder: str | Path, model):
    """What `folder` holds, a whole reward model or an adapter, on the device and in the dtype of the trained `model`."""
    try:
        with no_deepspeed():
            saved = AutoModelForSequenceClassification.from_pretrained(whole_model(str(folder)), dtype=model.dtype)
    except Exception as error:  # peft's own are many, a KeyError for a head that is not in the file among them
        reason = " ".join(str(error).split())[:300]
        raise RecipeExit(f"The reward model in {folder} does not load: {type(error).__name__}: {reason}") from error
    return saved.to(model.device)


def check_saved(folder: str | Path, saved, sequences: list[list[int]], expected, pad_id: int, batch_size: int) -> float:
    """Greatest difference, relative to max(1, |score|), between `expected`, the trained model's scores `(n,)`, and those
    of the model `saved` in `folder`. RecipeExit above 1e-4, or 2e-2 for bf16 weights.

    It scores the sequences padded left, padded right, and each alone. Transformers draws a score head that is not in
    the folder anew, with no more than a warning.
    """
    found = [
        score(saved, sequences, pad_id, size, side)
        for size, side in ((batch_size, "left"), (batch_size, "right"), (1, "right"))
    ]
    difference = float(np.max(np.abs(np.stack(found) - expected) / np.maximum(1, np.abs(expected))))
    if not difference <= (1e-4 if saved.dtype == torch.float32 else 2e-2):  # NaN is no agreement
        raise RecipeExit(
            f"The reward model in {folder} is not the one that was trained: its scores differ by up to {difference:.3g}; "
            "was the score head saved?"
        )
    return difference


def judge(trainer, pairs: Dataset, policy: tuple[str, str], encoder: Encoder, scoring: RewardModelConfig) -> dict:
    """Figures for metrics.json on held-out `pairs`, from `report`, `check_saved` and `statistics`; every rank takes part.

    The statistics are those of the scores of answers that the SFT model `policy` (name, revision) draws to their prompts;
    PPO normalises with them, so config.json holds them too. reward_report.json has the whole report, reliability.png shows it.
    """
    folder, batch_size = Path(trainer.args.output_dir), trainer.args.per_device_eval_batch_size
    pad_id, sides = encoder.tokenizer.pad_token_id, [pairs[name] for name in ("chosen_ids", "rejected_ids")]
    scores = [score(trainer.model, side, pad_id, batch_size) for side in sides]
    if trainer.args.process_index:
        return {}
    figures = report(*scores, *([len(ids) for ids in side] for side in sides))
    (folder / "reward_report.json").write_text(json.dumps(figures, indent=2) + "\n")
    plot(figures, scores[0] - scores[1], folder / "reliability.png")
    del figures["reliability"]
    saved = load_saved(folder, trainer.model)
    figures["saved_difference"] = check_saved(folder, saved, sides[0][:32], scores[0][:32], pad_id, batch_size)
    if scoring.score_samples:
        rows = pairs.select(range(min(scoring.score_samples, len(pairs))))
        prompts = [ids[:size] for ids, size in zip(rows["chosen_ids"], rows["prompt_size"], strict=True)]
        with no_deepspeed():  # or generating would wait for the other ranks
            name, revision = policy
            model = AutoModelForCausalLM.from_pretrained(name, revision=revision, dtype=saved.dtype).to(saved.device)
            model.generation_config.eos_token_id = encoder.stop_id
            random = torch.Generator().manual_seed(trainer.args.seed)
            uniforms = torch.rand(len(prompts), scoring.max_new_tokens, generator=random)
            drawn = generate(model, prompts, pad_id, scoring.max_new_tokens, uniforms)
        figures |= statistics(score(saved, [p + d for p, d in zip(prompts, drawn, strict=True)], pad_id, batch_size))
        if (folder / "config.json").is_file():
            config = json.loads((folder / "config.json").read_text())
            config |= {key: figures[key] for key in ("score_mean", "score_std")}
            (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    return figures
