"""Tasks that eval/tasks/ does not have, measured by lm-eval itself."""

import functools
from collections.abc import Sequence

from llm_recipes.config import EvaluationConfig
from llm_recipes.errors import UserError
from llm_recipes.evaluation.model import Model

PREFIX = "lm_eval:"


@functools.cache
def _manager():
    from lm_eval.tasks import TaskManager  # only here: it is slow to import, and reads 15,000 files

    return TaskManager()


def check(names: Sequence[str]) -> None:
    """Raises UserError for a name that lm-eval does not know."""
    for name in names:
        if not _manager().match_tasks([name.removeprefix(PREFIX)]):
            raise UserError(f"tasks: lm-eval has no task {name.removeprefix(PREFIX)}: `lm_eval ls tasks` lists them")


def measure(name: str, model: Model, config: EvaluationConfig) -> dict[str, dict]:
    """Entries of results.json for the task or group `name` of lm-eval. Raises UserError for what it refuses."""
    import lm_eval  # only here: it is slow to import
    from lm_eval.models.huggingface import HFLM

    batch = max(1, min(64, config.max_batch_tokens // 1024))
    try:
        found = lm_eval.simple_evaluate(
            model=HFLM(pretrained=model.model, tokenizer=model.tokenizer, batch_size=batch), tasks=[name],
            num_fewshot=config.num_fewshot, limit=config.limit, task_manager=_manager(), bootstrap_iters=0,
        )  # fmt: skip
    except Exception as error:  # every task has errors of its own
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise UserError(f"tasks: {PREFIX}{name}: lm-eval: {reason}") from error
    entries = {}
    for task, values in found["results"].items():
        metrics = {}
        for key, value in values.items():
            metric, _, filtered = key.partition(",")
            if filtered and not metric.endswith("_stderr") and isinstance(value, int | float):
                stderr = values.get(f"{metric}_stderr,{filtered}")
                known = isinstance(stderr, int | float)
                metrics[metric if filtered == "none" else f"{metric}_{filtered}"] = {
                    "value": value, "stderr": stderr if known else None,
                    "ci95": [value - 1.96 * stderr, value + 1.96 * stderr] if known else None,
                    "n": found["n-samples"].get(task, {}).get("effective", 0),
                }  # fmt: skip
        entries[PREFIX + task] = {
            "version": f"lm-eval {lm_eval.__version__}, {found['versions'].get(task)}", "protocol": "lm-eval's own run",
            "num_fewshot": found["n-shot"].get(task, 0), "seed": 1234, "n": found["n-samples"].get(task, {}).get("effective", 0),
            "limit": config.limit, "data": {"path": str(found["configs"].get(task, {}).get("dataset_path")), "own_files": False, "sha256": None},
            "generation": None, "sandbox": None, "truncated": 0, "unfinished": 0, "seconds": 0.0, "metrics": metrics,
        }  # fmt: skip
    return entries
