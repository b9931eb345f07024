"""Pretrain a language model: causal by default; prefix, masked and span corruption by `objective`.

    accelerate launch --config_file accelerate_configs/zero3.yaml recipes/pretrain/run.py
    python recipes/pretrain/run.py --config my.yaml --learning_rate 1e-3
    python recipes/pretrain/run.py --dry_run        # every check and the plan, nothing written

Without --config it reads config.yaml beside this file. Copy the folder and change both.
"""

import time

from transformers import Trainer, TrainingArguments

from llm_recipes import metrics, outputs
from llm_recipes.adapters import weights_digest
from llm_recipes.batches import Batches, Examples, StreamedExamples, train_on
from llm_recipes.checkpoints import find_checkpoint, protect
from llm_recipes.config import (
    DataConfig,
    ModelConfig,
    ObjectiveConfig,
    OptimizationConfig,
    RunConfig,
    TokenizerConfig,
    WindowConfig,
    parse,
)
from llm_recipes.datasets import hasher, load_documents, make_windows
from llm_recipes.diloco import train_apart
from llm_recipes.errors import entrypoint
from llm_recipes.guard import check_strategy
from llm_recipes.launch import global_batch
from llm_recipes.models import load_model
from llm_recipes.monitor import Monitor
from llm_recipes.objectives import collate, exact_loss, example_lengths, make_objective, prepare_tokenizer
from llm_recipes.optimizers import own_optimizer
from llm_recipes.pipeline.driving import drive
from llm_recipes.preflight import architecture, plan, preflight
from llm_recipes.progress import Throughput, show_progress
from llm_recipes.sampling import sample
from llm_recipes.tokenization import load_tokenizer


@entrypoint
def main():
    started = time.perf_counter()

    # 1. Config. TrainingArguments also joins the process group that the launcher prepared.
    run, data, windows, objective, optimization, tokenizer_config, model_config, args = parse(
        RunConfig, DataConfig, WindowConfig, ObjectiveConfig, OptimizationConfig, TokenizerConfig, ModelConfig,
        TrainingArguments, script=__file__,
    )  # fmt: skip
    length = windows.sequence_length

    # 2. Documents, tokenizer, architecture, and every check that needs no more than these
    documents = load_documents(data, args.seed, windows.streaming)
    tokenizer = load_tokenizer(tokenizer_config, documents, model_config.model_name_or_path)
    prepare_tokenizer(tokenizer, objective, length)
    config = architecture(model_config, tokenizer, objective.objective)
    preflight(args, run, data, windows, objective, optimization, model_config, config, tokenizer)

    # 3. Windows, and which of them each step trains on. One process tokenizes; the others wait, then read the same file.
    train_windows, eval_windows, report, digests = make_windows(documents, tokenizer, windows, global_batch(args), args)
    batches = Batches(None if windows.streaming else len(train_windows), length, args, optimization.batch_size_ramp)

    # 4. Windows become inputs and labels; all noise follows from the seed and the place in the run
    learn, hold = (make_objective(objective, tokenizer, length, held_out) for held_out in (False, True))
    streamed = windows.streaming and StreamedExamples(train_windows, learn, args.seed)
    train_dataset = streamed or Examples(train_windows, learn, args.seed, shuffle=True)
    eval_dataset = None if eval_windows is None else Examples(eval_windows, hold, args.seed, shuffle=False)

    # 5. The plan
    base = weights_digest(model_config.model_name_or_path, model_config.model_revision or "main")
    identity = {"data": digests, "tokenizer": hasher(tokenizer.backend_tokenizer.to_str()), "model": base}
    record = outputs.describe(run.resolved, identity)
    plan(args, run, length, config, tokenizer, train_dataset, eval_dataset, batches, report, record)
    if run.dry_run:
        return
    outputs.claim(args, run.push_to_hub, record)  # up to here nothing is written to output_dir

    # 6. Model, in fp32: bf16 is the Trainer's autocast
    model = load_model(model_config, config, objective, length, args, optimization.pipeline_schedule)

    # 7. Trainer
    trainer = Trainer(
        model, args, collate, train_dataset, eval_dataset, processing_class=tokenizer,
        optimizer_cls_and_kwargs=own_optimizer(optimization.optimizer, args, model),
    )  # fmt: skip
    check_strategy(trainer)
    flops = metrics.flops_per_example(config, *example_lengths(objective, length))
    throughput = Throughput(lambda step: batches.sequences(step) * length)
    show_progress(trainer, throughput, Monitor(model, optimization.monitor))
    if not windows.streaming:
        train_on(trainer, train_dataset, batches, objective.objective, flops)
    exact_loss(trainer, objective)
    drive(trainer, objective.z_loss)
    train_apart(trainer, optimization.diloco)
    known = None if windows.streaming else (train_dataset, batches)
    watch = protect(trainer, outputs.pusher(args, run.push_to_hub), optimization.spike_guard, known)

    # 8. Train, from the newest checkpoint that is whole
    trainer.train(resume_from_checkpoint=find_checkpoint(args, run.resume))

    # 9. Save first, then measure and show
    outputs.save_model(trainer)
    measured = (eval_dataset, tokenizer, throughput, flops / length, started)
    results = metrics.measure(trainer, objective.objective, *measured) | watch.figures()
    samples = sample(trainer, tokenizer, run.sample_prompts, objective.objective)
    if args.process_index == 0:
        origin = f"continued from {path}" if (path := model_config.model_name_or_path) else "from scratch"
        sentence = f"A {config.model_type} language model pretrained on {results['tokens']:,} tokens, {origin}."
        outputs.write_results(args.output_dir, record, results, sentence, samples, trainer.state.log_history)

    # 10. Push last: a failure there loses nothing
    if run.push_to_hub and args.process_index == 0:
        print(f"pushed to {outputs.push(args)}")


if __name__ == "__main__":
    main()
