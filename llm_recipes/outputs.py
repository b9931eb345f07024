"""What a run leaves behind: run.yaml, weights, metrics.json, a model card, and the Hub's copy."""

import fcntl
import importlib.metadata
import json
import math
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import yaml
from huggingface_hub import HfApi, ModelCardData
from safetensors import safe_open
from transformers import Trainer, TrainingArguments

from llm_recipes import adapters
from llm_recipes.errors import Finished, PushFailed, RecipeExit, UserError
from llm_recipes.launch import asked_strategy
from llm_recipes.metrics import meta_model

# Keys that may change between two starts of the same run: they do not change what is learnt.
FREE = {
    "output_dir", "resume", "dry_run", "sample_prompts", "disable_tqdm", "run_name", "project", "report_to", "use_cpu",
    "per_device_train_batch_size", "per_device_eval_batch_size", "gradient_accumulation_steps", "push_to_hub",
    "logging_steps", "logging_strategy", "logging_first_step", "log_level", "save_steps", "save_strategy",
    "save_total_limit", "eval_steps", "eval_strategy", "eval_on_start", "dataloader_num_workers", "hub_model_id",
    "monitor", "pipeline_schedule", "hub_strategy", "hub_private_repo", "hub_revision", "hub_always_push", "ddp_timeout",
}  # fmt: skip
SHARED_WITHIN = 60  # seconds: a network file system may remember for a while that a file is not there
LIBRARIES = ("torch", "transformers", "trl", "accelerate", "datasets", "tokenizers", "deepspeed", "peft")


def describe(config: dict, identity: dict) -> dict:
    """Content of run.yaml: the resolved `config`, data and tokenizer, launch, commit, versions."""
    here = Path(sys.argv[0]).resolve().parent
    git = shutil.which("git") and subprocess.run(["git", "rev-parse", "HEAD"], cwd=here, capture_output=True, text=True)
    return {
        "config": config,
        "identity": identity,
        "launch": {"strategy": asked_strategy(), "world_size": int(os.environ.get("WORLD_SIZE", 1))},
        "git_commit": (git and git.stdout.strip()) or None,
        "versions": {
            "python": sys.version.split()[0],
            **{name: importlib.metadata.version(name) for name in LIBRARIES},
        },
    }


def changed_keys(output_dir: str, run: dict) -> list[str]:
    """How `run` differs from the run that `output_dir` holds: 'key: there -> here'; empty when it is the same or new."""
    path = Path(output_dir) / "run.yaml"
    if not path.is_file():
        return []
    try:
        there = yaml.safe_load(path.read_text())
        there["config"], there["identity"]
    except (yaml.YAMLError, TypeError, KeyError) as error:
        raise UserError(f"{path} is damaged: remove it to continue, or choose another --output_dir") from error
    old, new = ({**r["config"], **r["identity"]} for r in (there, run))
    if old.get("global_batch_size") is None:  # then the batch is what the per-device keys and the launch make of it
        for side, r in ((old, there), (new, run)):
            side["batch"] = [
                side.get("per_device_train_batch_size"),
                side.get("gradient_accumulation_steps"),
                r["launch"]["world_size"],
            ]
    order = [*there["config"], *run["config"], *old, *new]  # what the user wrote first
    keys = [key for key in dict.fromkeys(order) if key not in FREE and old.get(key) != new.get(key)]
    return [f"{key}: {_short(old.get(key))} -> {_short(new.get(key))}" for key in keys]


def _short(value) -> str:
    text = "default" if value is None else str(value)
    return text if len(text) <= 60 else text[:57] + "..."


def output_problems(output_dir: str, record: dict | None, needed: int = 0) -> list[str]:
    """Why the run `record` (if known) cannot write `needed` bytes to output_dir."""
    folder = Path(output_dir).absolute()
    nearest = next(path for path in (folder, *folder.parents) if path.exists())
    if not nearest.is_dir() or not os.access(nearest, os.W_OK):
        return [f"output_dir: {nearest} is not a folder you can write to"]
    needed -= sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())  # what it has written already
    if needed > (free := shutil.disk_usage(nearest).free):
        return [f"output_dir: this run needs about {needed / 1e6:,.1f} MB, {free / 1e6:,.1f} MB are free in {nearest}"]
    begun = [*folder.glob("*checkpoint-*"), *folder.glob("*.safetensors"), *folder.glob("*.json")]
    if not begun:  # nothing that could be lost
        return []
    if not (folder / "run.yaml").is_file():
        return [
            f"output_dir: {output_dir} holds a model that no recipe wrote. Choose another --output_dir, or move it away"
        ]
    if record and (changes := changed_keys(output_dir, record)):
        return [
            f"output_dir: {output_dir} holds another run ({'; '.join(changes[:4])}). Choose another --output_dir, or move it away"
        ]
    return []


def claim(args, push_to_hub: bool, record: dict) -> None:
    """Takes `args.output_dir` for this run and writes run.yaml there, on rank 0. The first write of a run.

    Raises UserError when another process has the folder, and Finished when this very run is already
    complete there; then only a push that is asked for is done again.
    """
    if problems := output_problems(args.output_dir, record):
        raise UserError("\n".join(problems))
    folder, main = Path(args.output_dir), int(os.environ.get("RANK", 0)) == 0
    if (folder / "metrics.json").is_file():
        where = f"; pushed to {push(args)}" if push_to_hub and main else ""
        raise Finished(
            f"{folder}: this run is finished{where}. Move the folder away or choose another --output_dir to run again"
        )
    if main:
        folder.mkdir(parents=True, exist_ok=True)
        file = (folder / ".lock").open("w")
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            raise UserError(f"output_dir: {folder} is in use by another run: choose another") from error
        _locks.append(file)
        (folder / "run.yaml.partial").write_text(yaml.safe_dump(record, sort_keys=False, allow_unicode=True))
        os.replace(folder / "run.yaml.partial", folder / "run.yaml")
    if getattr(args, "world_size", 1) > 1:
        args.distributed_state.wait_for_everyone()
        give_up = time.monotonic() + SHARED_WITHIN
        while not (folder / "run.yaml").is_file():
            if time.monotonic() > give_up:
                raise UserError(
                    f"output_dir: {folder} of the first process cannot be seen here: all machines must share it"
                )
            time.sleep(0.1)


_locks = []  # open files: closing one gives its folder up


def save_model(trainer: Trainer, merge: bool = False) -> None:
    """Writes weights, tokenizer and configs to `output_dir`, then counts what the file holds.

    An adapter stands there alone, or with `merge` in the folder `adapter` beside the merged weights.

    Counts, not names: some architectures are stored under other names than they train with.
    """
    plugin = getattr(trainer.accelerator.state, "fsdp_plugin", None)
    if plugin is not None:
        plugin.set_state_dict_type("FULL_STATE_DICT")  # with shards, save_model writes nothing at all
    trainer.save_model()
    if trainer.args.process_index == 0:
        folder = Path(trainer.args.output_dir)
        (folder / "training_args.bin").unlink(missing_ok=True)  # a pickle, and no one needs it
        adapted = (folder / "adapter_config.json").is_file()
        if adapted and (generation := getattr(trainer.model, "generation_config", None)) is not None:
            generation.save_pretrained(folder)  # where answers end; peft leaves it out
        if adapted and not merge:
            return
        if merge:
            _set_beside(folder)
        saved = {}
        for path in folder.glob("model*.safetensors"):
            with safe_open(path, "pt") as file:
                saved |= {name: math.prod(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118
        model = meta_model(trainer.model.config)
        tied = set(getattr(model, "all_tied_weights_keys", {}))
        expected = sum(t.numel() for name, t in model.state_dict().items() if name not in tied)  # buffers are saved too
        found = sum(size for name, size in saved.items() if name not in tied)
        if found != expected:
            raise RecipeExit(f"{folder}: the saved weights are not whole: {found:,} of {expected:,} numbers")


def _set_beside(folder: Path) -> None:
    """Moves the adapter in `folder` to `folder/adapter`, and writes the merged model in its place."""
    (folder / "adapter").mkdir(exist_ok=True)
    for path in folder.glob("adapter_*"):
        os.replace(path, folder / "adapter" / path.name)
    for path in [*folder.glob("*token*"), *folder.glob("chat_template.jinja"), *folder.glob("generation_config.json")]:
        shutil.copy(path, folder / "adapter")
    adapters.merge(folder / "adapter", folder)


def write_results(
    output_dir: str, record: dict, metrics: dict, sentence: str, samples: list[str] = (), history: list[dict] = ()
) -> None:
    """Model card README.md with the loss curve of `history`, for PPO that of reward against KL, and metrics.json last: it
    marks the run as finished.

    Prints the samples, the metrics and where everything is.
    """
    folder, sources = Path(output_dir), [source["path"] for source in record["config"]["datasets"]]
    plots = []
    if history:
        _loss_curve(history, folder / "loss.png")
        plots.append("![loss](loss.png)")
    if steps := [row for row in history if "objective/kl" in row]:
        _reward_and_kl(steps, folder / "reward_kl.png")
        plots.append("![reward against KL](reward_kl.png)")
    front = ModelCardData(
        library_name="transformers", pipeline_tag=_task(folder) if history else None, tags=["llm-recipes"],
        datasets=[path for path in sources if path.count("/") == 1 and not Path(path).exists()] or None,
    )  # fmt: skip
    shown = {
        key: f"{value:,.4f}" if isinstance(value, float) else f"{value:,}" if isinstance(value, int) else value
        for key, value in metrics.items()
    }
    body = [f"# {folder.resolve().name}", sentence, "Settings, versions and data fingerprints: `run.yaml`."]
    body += plots
    body += [
        "\n".join(["| metric | value |", "| --- | ---: |", *(f"| {key} | {value} |" for key, value in shown.items())])
    ]
    body += ["## Samples", *(f"````text\n{text}\n````" for text in samples)] if samples else []
    (folder / "README.md").write_text("\n\n".join([f"---\n{front.to_yaml()}\n---", *body]) + "\n")
    (folder / "metrics.json.partial").write_text(json.dumps(metrics, indent=2) + "\n")
    os.replace(folder / "metrics.json.partial", folder / "metrics.json")
    for text in samples:
        print(f"---- sample\n{text}")
    print("---- results")
    for key, value in shown.items():
        print(f"{key:<28} {value}")
    print(
        f"---- {folder}: {', '.join(sorted(p.name for p in folder.iterdir() if p.is_file() and p.name[0] != '.'))}",
        flush=True,
    )


def _task(folder: Path) -> str:
    """What the Hub calls the use of the model or adapter in `folder`."""
    if (folder / "config.json").is_file():
        name = json.loads((folder / "config.json").read_text())["architectures"][0]
    else:
        name = json.loads((folder / "adapter_config.json").read_text())["task_type"]
    tasks = {
        "ForMaskedLM": "fill-mask", "ForConditionalGeneration": "text2text-generation",
        "ForSequenceClassification": "text-classification", "SEQ_CLS": "text-classification",
    }  # fmt: skip
    return next((task for suffix, task in tasks.items() if name.endswith(suffix)), "text-generation")


def _loss_curve(history: list[dict], path: Path) -> None:
    from matplotlib.figure import Figure  # only here: it is slow to import

    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.subplots()
    for key, label in (("loss", "train"), ("eval_loss", "held out")):
        if points := [(row["step"], row[key]) for row in history if key in row]:
            axes.plot(*zip(*points, strict=True), marker="o" if key == "eval_loss" else None, label=label)
    axes.set(xlabel="step", ylabel="loss")
    axes.legend()
    figure.savefig(path, dpi=120)


def _reward_and_kl(steps: list[dict], path: Path) -> None:
    """What the reward costs in distance from the reference, step by step (Gao et al. 2022)."""
    from matplotlib.figure import Figure  # only here: it is slow to import

    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.subplots()
    kl, score, at = ([row[key] for row in steps] for key in ("objective/kl", "objective/score", "step"))
    axes.plot(kl, score, color="lightgrey", zorder=1)
    figure.colorbar(axes.scatter(kl, score, c=at, zorder=2), label="step")
    axes.set(xlabel="KL to the reference, nats a completion", ylabel="score")
    figure.savefig(path, dpi=120)


def repo_id(args) -> str:
    return args.hub_model_id or Path(args.output_dir).resolve().name


def push(args, folder: Path | None = None, message: str = "End of training", tries: int = 3) -> str:
    """Uploads what others can use, never checkpoints or pickles, and returns the commit's URL.

    Raises PushFailed after `tries` attempts; nothing local is touched.
    """
    folder = folder or Path(args.output_dir)
    kinds = (".safetensors", ".json", ".jinja", ".txt", ".model", ".md", ".png", ".yaml")
    ours = ("complete.json", "trainer_state.json", "spike_guard.json", "left_out_batches.json")
    files = [path for path in folder.iterdir() if path.is_file() and path.suffix in kinds]
    names = [path.name for path in files if path.name not in ours]
    api = HfApi()
    for attempt in range(tries):
        try:
            repo = api.create_repo(repo_id(args), private=args.hub_private_repo, exist_ok=True).repo_id
            if args.hub_revision:
                api.create_branch(repo, branch=args.hub_revision, exist_ok=True)
            return api.upload_folder(
                repo_id=repo,
                folder_path=folder,
                allow_patterns=names,
                commit_message=message,
                revision=args.hub_revision,
            ).commit_url
        except Exception as error:  # the client lets many kinds through, and none may cost the result
            reason = " ".join(str(error.__cause__ or error).split()) or type(error).__name__
            time.sleep(2**attempt * (attempt + 1 < tries))
    raise PushFailed(
        f"push of {repo_id(args)} to the Hub failed: {reason[:300]}. The model is whole in {folder}; the same command pushes it again"
    )


def pusher(args: TrainingArguments, push_to_hub: bool):
    """For `protect`: pushes each checkpoint's model when hub_strategy is every_save; a failure is said and training goes on."""
    if not (push_to_hub and args.hub_strategy == "every_save"):
        return None

    def after_save(checkpoint: Path) -> None:
        try:
            push(args, checkpoint, f"Training in progress, {checkpoint.name}", tries=1)
        except PushFailed as failure:
            print(f"{failure}; training goes on", flush=True)

    return after_save
