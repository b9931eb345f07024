"""What stands before the first answer: processes, model, and every task with its rows, prompts and units of work."""

import dataclasses
import importlib.util
import os
from datetime import timedelta
from pathlib import Path

from accelerate import PartialState
from safetensors import SafetensorError
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerBase

from llm_recipes import outputs, sandbox
from llm_recipes.adapters import whole_model
from llm_recipes.config import EvaluationConfig, unknown_key
from llm_recipes.conversations import Encoder, load_chat_tokenizer
from llm_recipes.errors import UserError
from llm_recipes.evaluation import lm_eval_tasks, runs
from llm_recipes.evaluation.model import Model
from llm_recipes.evaluation.results import load_results
from llm_recipes.evaluation.tasks import SEED, Item, Task, build, choose_rows, digest, examples, read_rows
from llm_recipes.launch import asked_strategy, check_launch, has_accelerator
from llm_recipes.models import trained_config
from llm_recipes.preflight import show

OF_ANSWERS = ("max_new_tokens", "num_samples", "temperature", "top_p")


@dataclasses.dataclass
class Job:
    """One task of this run."""

    name: str
    task: Task
    rows: list[dict]
    items: list[Item]
    units: list[list[int]]
    identity: dict  # all that the answers depend on
    generation: dict | None
    facts: dict  # what results.json says beside the metrics
    layers: tuple[str, ...] | None  # of the sandbox
    strict: bool
    notes: list[str]

    def result(self, lines: list[dict], seconds: float | None) -> tuple[dict, list[dict]]:
        """(entry of results.json, lines of scores.jsonl) from the lines of samples.jsonl; `seconds` that the answers took.

        Raises UserError where lines are missing, or to other rows.
        """
        windows = self.task.kind in ("rolling", "strided")
        if len(lines) != self.identity["items"] or not (
            windows or all(line["doc_sha"] == digest(row)[:16] for line, row in zip(lines, self.rows, strict=True))
        ):
            raise UserError(f"{self.name}: its samples.jsonl is not whole, or not of these rows: move the folder away")
        scores, metrics = runs.score(self.task, self.rows, lines, self.strict)
        facts = self.facts | {"unfinished": sum(line.get("unfinished", 0) for line in lines), "n": len(scores)}
        if seconds is not None:
            facts["seconds"] = round(seconds, 2)
        return facts | {"sandbox": self.layers and list(self.layers), "metrics": metrics}, scores


def start(config: EvaluationConfig) -> PartialState:
    """The processes of this launch. Raises UserError for a launch or a combination of keys that cannot be."""
    problems, strategy = check_launch(), asked_strategy()
    if strategy.startswith(("DeepSpeed", "FSDP")):
        problems = [
            f"evaluation keeps a whole model on each process, {strategy} has no part: launch with ddp.yaml or cpu.yaml"
        ]
    if config.backend == "vllm" and importlib.util.find_spec("vllm") is None:
        problems.append("backend: vllm is not installed: pip install -e '.[vllm]'")
    if config.rescore and config.dry_run:
        problems.append("rescore and dry_run exclude each other")
    if problems:
        raise UserError("\n".join(problems))
    processes = PartialState(cpu=not has_accelerator(), timeout=timedelta(days=7))  # others wait while rank 0 scores
    if any(name.startswith(lm_eval_tasks.PREFIX) for name in config.tasks) and (
        processes.num_processes > 1 or config.rescore
    ):
        raise UserError("tasks: those of lm-eval run in one process and are not rescored")
    return processes


def load(config: EvaluationConfig, processes: PartialState, tasks: dict) -> tuple[Model, Encoder | None, dict]:
    """(model, what encodes messages where a task is a chat, head of results.json)."""
    try:
        name = whole_model(config.model, config.model_revision, key="model")
        try:
            tokenizer = AutoTokenizer.from_pretrained(name, revision=config.model_revision)
        except (OSError, ValueError) as error:
            raise UserError(f"model: {name} has no tokenizer: {str(error).splitlines()[0]}") from error
        if tokenizer.bos_token_id is None and tokenizer.eos_token_id is None:
            raise UserError(f"model: the tokenizer of {name} has neither a BOS nor an EOS, so no text can begin")
        settings = trained_config(name, config, tokenizer)
        encoder = _encoder(name, config, tokenizer, [name for name, (_, task) in tasks.items() if task.chat])
    except UserError as error:
        raise UserError(str(error).replace("model_name_or_path", "model")) from error
    try:
        loaded, info = AutoModelForCausalLM.from_pretrained(
            name, config=settings, revision=config.model_revision, dtype=config.dtype, output_loading_info=True
        )
    except (OSError, RuntimeError, SafetensorError, ValueError) as error:
        raise UserError(f"model: the weights of {config.model}: {str(error).splitlines()[0]}") from error
    if missing := sorted(info["missing_keys"]):
        raise UserError(f"model: {config.model} has no weights for {', '.join(missing[:3])}")
    if processes.device.type == "cpu":  # off the file's mapping: how that is aligned shows in the last bit
        for weight in loaded.parameters():
            weight.data = weight.data.clone()
    if config.backend == "vllm":
        from llm_recipes.evaluation.vllm_backend import VllmModel  # only here: it needs a GPU

        model = VllmModel(loaded, tokenizer, config, name)
    else:
        model = Model(loaded.to(processes.device), tokenizer, config.max_batch_tokens)
    head = {
        "model": {
            "name": config.model, "revision": config.model_revision, "fingerprint": model.fingerprint,
            "dtype": str(loaded.dtype).removeprefix("torch."), "parameters": loaded.num_parameters(),
        }
    }  # fmt: skip
    return model, encoder, head


def _encoder(
    name: str, config: EvaluationConfig, tokenizer: PreTrainedTokenizerBase, chats: list[str]
) -> Encoder | None:
    if not chats:
        return None
    if tokenizer.chat_template is None:
        raise UserError(
            f"tasks: {chats[0]} asks through a chat template, and {config.model} has none: take a task without _chat or "
            "_instruct, or a model after SFT"
        )
    return Encoder(load_chat_tokenizer(name, config.model_revision).tokenizer)


def prepare(
    name: str, family: str, task: Task, config: EvaluationConfig, model: Model | None, encoder: Encoder | None
) -> Job:
    """Rows, prompts and units of one task. Without a model, only what scoring needs."""
    n = task.num_fewshot if config.num_fewshot is None else config.num_fewshot
    if n and task.answer is None:
        raise UserError(f"num_fewshot: {name} takes no examples")
    files = config.data_files.get(family)
    all_rows = read_rows(task, name, family, task.data, files)
    rows = choose_rows(task, name, all_rows, config.limit)
    pool = list(task.shots)
    if n and pool and not isinstance(pool[0], dict):
        pool = [row for row in read_rows(task, name, family, pool, files) if task.shot(row)]
    shots = examples(task, name, rows, pool, n)
    own = [i for i, (row, few) in enumerate(zip(rows, shots, strict=True)) if row in few]
    if len(own) > len(rows) // 100:  # a few twins of training and test rows are in real data too
        raise UserError(
            f"num_fewshot: {name}: row {own[0]} stands among its own examples ({len(own)} such rows): give the examples a file "
            f"of their own: --data_files '{{{family}: {{{', '.join(f'{split}: ...' for split in _splits(task))}}}}}'"
        )
    data = {"path": _said(task, files), "own_files": files is not None, "sha256": digest([rows, shots])}
    layers = sandbox.require(config.sandbox == "strict") if task.runs_code else None
    facts = {
        "version": task.version, "protocol": task.protocol, "num_fewshot": n, "seed": SEED if n and task.draw == "random" else None,
        "n": len(rows), "limit": config.limit, "data": data,
    }  # fmt: skip
    identity = {"task": name, "limit": config.limit, "data": data["sha256"], "protocol": task.version}
    job = Job(name, task, rows, [], [], identity, None, facts, layers, config.sandbox == "strict", [])
    if own:
        job.notes.append(f"{len(own)} of {len(rows):,} rows stand among their own examples")
    if model is None:
        return job
    if task.kind == "generate":
        given = {key: getattr(config, key) for key in OF_ANSWERS if getattr(config, key) is not None}
        turn_end = [encoder.tokenizer.convert_ids_to_tokens(encoder.stop_id)] if task.chat else []
        job.generation = {key: getattr(task, key) for key in OF_ANSWERS} | given | {"stop": [*task.stop, *turn_end]}
        if job.generation["temperature"]:
            job.facts["seed"] = config.seed
        most = model.context // 2
        if job.generation["max_new_tokens"] > most:
            job.notes.append(
                f"answers of up to {most} tokens, half of what the model reads, not {job.generation['max_new_tokens']}"
            )
            job.generation["max_new_tokens"] = most
    length = job.generation and job.generation["max_new_tokens"]
    try:
        job.items, cut = build(task, rows, shots, model, encoder, length)
    except UserError as error:
        raise UserError(f"{name}: {error}") from error
    if cut:
        job.notes.append(
            f"{cut} of {len(rows):,} prompts cut on the left: with the answer they may have {model.context} tokens"
        )
    if not job.items:
        raise UserError(f"{name}: there is no text in {data['path']}")
    if task.kind == "rolling" and (empty := len(rows) - len({item.doc for item in job.items})):
        job.notes.append(f"{empty} of {len(rows):,} texts are empty: there is nothing to score")
    job.units = runs.make_units(
        task, job.items, model, length or 0, job.generation["num_samples"] if job.generation else 1
    )
    job.facts |= {"generation": job.generation, "truncated": cut}
    job.identity |= {
        "model": model.fingerprint, "dtype": str(model.model.dtype), "items": len(job.items),
        "prompts": digest([[item.context, item.continuations] for item in job.items]), "generation": job.generation,
        "seed": config.seed if job.generation and job.generation["temperature"] else None,
        "max_batch_tokens": config.max_batch_tokens, "backend": config.backend,
        "config": digest({**model.model.config.to_diff_dict(), "transformers_version": None}),
        "stop_ids": sorted(model.stop_ids),
    }  # fmt: skip
    return job


def run_facts(config: EvaluationConfig) -> dict:
    """What answers were written with."""
    processes, record = PartialState(), outputs.describe({}, {})
    return {
        "versions": record["versions"], "git_commit": record["git_commit"], "device": processes.device.type,
        "world_size": processes.num_processes, "backend": config.backend, "max_batch_tokens": config.max_batch_tokens,
    }  # fmt: skip


def _splits(task: Task) -> list[str]:
    """The splits that the task reads."""
    return sorted({source.split for source in (*task.data, *task.shots) if not isinstance(source, dict)})


def _said(task: Task, files: str | dict | None) -> str:
    """Where the rows are from."""
    if files is None:
        return Path(task.data[0].path).name if task.data[0].path.startswith("/") else task.data[0].path
    return files if isinstance(files, str) else ", ".join(sorted(set(files.values())))


def check_keys(config: EvaluationConfig, tasks: dict) -> None:
    """Raises UserError for a key that no task of this run takes, and for an output_dir that cannot be one."""
    folder = Path(config.output_dir).absolute()
    nearest = next(path for path in (folder, *folder.parents) if path.exists())
    if not config.output_dir or not nearest.is_dir() or not os.access(nearest, os.W_OK):
        raise UserError(f"output_dir: {config.output_dir or 'empty'}: not a folder that you can write to")
    if any((folder / name).is_file() for name in ("config.json", "adapter_config.json")):
        raise UserError(f"output_dir: {config.output_dir} holds a model: choose another --output_dir")
    if Path(config.model).is_file():
        raise UserError(f"model: {config.model} is a file: give the folder that holds it, with config and tokenizer")
    families = {family for family, _ in tasks.values()}
    if unknown := sorted(set(config.data_files) - families):
        raise UserError(
            f"data_files: {unknown_key(unknown[0], families, 'file of tasks')}; this run has {', '.join(families)}"
        )
    for family, files in config.data_files.items():
        values = list(files.values()) if isinstance(files, dict) else [files]
        if not values or not all(isinstance(value, str) for value in values):
            raise UserError(f"data_files: {family}: expects a path, or one a split, such as {{test: file.jsonl}}")
        mine = {name: task for name, (its, task) in tasks.items() if its == family}
        splits = sorted({split for task in mine.values() for split in _splits(task)})
        if isinstance(files, dict) and (unknown := [split for split in files if split not in splits]):
            known = unknown_key(unknown[0], splits, "split")
            raise UserError(f"data_files: {family}: {known}; it reads {', '.join(splits) or 'none'}")
        if any(task.data != next(iter(mine.values())).data for task in mine.values()):
            raise UserError(f"data_files: {family}: {' and '.join(mine)} have rows of their own: run them one by one")
    writing = {name: task for name, (_, task) in tasks.items() if task.kind == "generate"}
    for key in OF_ANSWERS:
        if getattr(config, key) is not None and not writing:
            raise UserError(f"{key}: no task of this run writes answers")
    warm = [n for n, t in writing.items() if (t.temperature if config.temperature is None else config.temperature)]
    for name, task in writing.items():
        if (samples := config.num_samples or task.num_samples) > 1 and name not in warm:
            raise UserError(f"num_samples: {samples} greedy answers of {name} are all the same: set a temperature")
    if config.top_p is not None and (config.top_p > 1 or not warm):
        raise UserError(
            "top_p: " + (f"a share, at most 1, got {config.top_p}" if warm else "answers are greedy: set a temperature")
        )


def check_folder(folder: Path, jobs: list[Job], head: dict | None, config: EvaluationConfig) -> dict:
    """The head of results.json. Raises UserError where the folder holds what this run may not mix with."""
    found = load_results(folder)
    if config.rescore:
        return _rescored(folder, jobs, found, config)
    if found and found["model"]["fingerprint"] != head["model"]["fingerprint"]:
        there = found["model"]
        raise UserError(
            f"output_dir: {folder} holds results of another model ({there['name']}, {there['dtype']}): choose another "
            "--output_dir"
        )
    for job in jobs:
        if changes := runs.changes(folder / job.name, job.identity):
            raise UserError(
                f"output_dir: {folder / job.name} holds other answers ({'; '.join(changes[:3])}). Choose another "
                "--output_dir, or move them away"
            )
        runs.read_lines(folder / job.name)  # damaged ones are said now
    return head


def _rescored(folder: Path, jobs: list[Job], found: dict | None, config: EvaluationConfig) -> dict:
    """The head of the answers that are there, whose facts the jobs take over: only the scoring is this run's."""
    for job in jobs:
        if found is None or job.name not in found["tasks"]:
            raise UserError(f"rescore: {folder} has no finished answers of {job.name}: run it without --rescore")
        there = runs.read_identity(folder / job.name)
        if there.get("protocol") != job.identity["protocol"]:
            raise UserError(
                f"rescore: {job.name} was measured as version {there.get('protocol')}, and its task is now "
                f"{job.identity['protocol']}: the answers are to other prompts"
            )
        if any(there.get(key) != value for key, value in job.identity.items()):
            raise UserError(
                f"rescore: the answers of {job.name} in {folder} are to other rows: give the same data_files, limit and num_fewshot"
            )
        given = {key: getattr(config, key) for key in OF_ANSWERS if getattr(config, key) is not None}
        for key, value in given.items():
            if (there.get("generation") or {}).get(key, value) != value:
                raise UserError(
                    f"rescore: {key} was {there['generation'][key]} for the answers that are there: leave it out"
                )
        job.identity, job.facts = there, dict(found["tasks"][job.name])
    if config.model != found["model"]["name"] or config.dtype not in ("auto", found["model"]["dtype"]):
        raise UserError(
            f"rescore: the answers in {folder} are of {found['model']['name']} in {found['model']['dtype']}, not of "
            f"{config.model}: give that --model, or another --output_dir"
        )
    return {"model": found["model"]}


def describe(config: EvaluationConfig, processes: PartialState, head: dict, jobs: list[Job], others: list[str]) -> None:
    """The first screen: what will happen, and with dry_run the first prompt of each task."""
    model = head["model"]
    count = f"{processes.num_processes} process" + ("es" if processes.num_processes > 1 else "")
    lines = [
        (
            "model",
            f"{model['name']}, {model['parameters']:,} parameters, {model['dtype']}, {model['fingerprint'][:12]}",
        ),
        ("processes", f"{count}, {processes.device.type}, backend {config.backend}"),
        ("limit", f"the first {config.limit} rows of each task: figures for trying out" if config.limit else None),
    ]
    for job in jobs:
        shots = f", {job.facts['num_fewshot']} examples" if job.facts["num_fewshot"] else ""
        most = f", up to {job.generation['max_new_tokens']} tokens" if job.generation else ""
        lines += [("task", f"{job.name}: {len(job.rows):,} rows{shots}{most}; {job.task.protocol}")]
        lines += [("", note) for note in job.notes]
        if job.layers is not None:
            lines += [("sandbox", ", ".join(job.layers) or "no layer of isolation")]
    lines += [("task", f"{name}, by lm-eval") for name in others]
    show([*lines, ("output", config.output_dir)])
    if config.dry_run:
        for job in jobs:
            print(f"---- {job.name}\n{job.items[0].prompt or f'{len(job.items)} windows of text'}")
