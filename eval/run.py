"""Evaluation: a model on benchmarks, each with the protocol that its published numbers have.

    python eval/run.py --model outputs/sft --tasks perplexity,arithmetic_chat
    accelerate launch --config_file accelerate_configs/ddp.yaml eval/run.py --model outputs/sft --tasks gsm8k,humaneval
    python eval/run.py --dry_run        # every check and one prompt a task, nothing written
    python eval/run.py --rescore        # the answers that are there, scored again without the model

Without --config it reads config.yaml beside this file. A benchmark is a file in tasks/: copy one, and change it.
"""

import time
from pathlib import Path

from llm_recipes.config import EvaluationConfig, parse
from llm_recipes.errors import entrypoint
from llm_recipes.evaluation import lm_eval_tasks, runs
from llm_recipes.evaluation.results import add_result, table
from llm_recipes.evaluation.setup import check_folder, check_keys, describe, load, prepare, run_facts, start
from llm_recipes.evaluation.tasks import load_tasks


@entrypoint
def main():
    # 1. Config, processes, tasks and their rows; model-written code runs behind all layers of isolation, or not at all
    (config,) = parse(EvaluationConfig, script=__file__)
    processes = start(config)
    others = [name for name in config.tasks if name.startswith(lm_eval_tasks.PREFIX)]
    named = [name for name in config.tasks if name not in others]
    tasks = load_tasks(Path(__file__).parent / "tasks", named) if named or not others else {}
    check_keys(config, tasks)
    lm_eval_tasks.check(others)
    folder = Path(config.output_dir)

    # 2. The model, whole on every process, and the prompts: all are built before they are shared out
    model, encoder, head = (None, None, None) if config.rescore else load(config, processes, tasks)
    jobs = [prepare(name, family, task, config, model, encoder) for name, (family, task) in tasks.items()]
    head = check_folder(folder, jobs, head, config)
    if processes.is_main_process:
        describe(config, processes, head, jobs, others)
    if config.dry_run:
        return

    run = run_facts(config)

    # 3. Answers, unit by unit; what is there from a run that was stopped is taken
    for job in jobs:
        started = time.perf_counter()
        if not config.rescore:
            if processes.is_main_process:
                runs.claim(folder / job.name, job.identity)
            processes.wait_for_everyone()
            samples = runs.Samples(folder / job.name, job.units, processes.process_index, processes.num_processes)
            processes.wait_for_everyone()
            for unit in samples.mine:
                samples.append(list(runs.work(job.task, job.items, unit, model, job.generation, config.seed)))
            processes.wait_for_everyone()

        # 4. Scores and results, task by task, so that a later one's failure loses nothing
        if processes.is_main_process:
            seconds = None if config.rescore else time.perf_counter() - started
            lines = runs.in_order(folder / job.name) if config.rescore else runs.joined(folder / job.name)
            entry, scores = job.result(lines, seconds)
            runs.write_lines(folder / job.name / "scores.jsonl", scores)
            results = add_result(folder, head, job.name, {"run": run} | entry)
    for name in others:
        for task, entry in lm_eval_tasks.measure(name.removeprefix(lm_eval_tasks.PREFIX), model, config).items():
            results = add_result(folder, head, task, {"run": run} | entry)

    # 5. The table
    if processes.is_main_process:
        runs.write_text(folder / "results.md", table(results) + "\n")
        print(f"{table(results)}\n---- {folder}: results.json, results.md, and samples.jsonl of each task")


if __name__ == "__main__":
    main()
