"""Pretrain a causal language model.

    accelerate launch --config_file accelerate_configs/zero3.yaml recipes/pretrain/run.py
    python recipes/pretrain/run.py --config my.yaml --learning_rate 1e-3
    python recipes/pretrain/run.py --dry_run        # every check and the plan, nothing written

Without --config it reads config.yaml beside this file. Copy the folder and change both.
"""

import time

from transformers import Trainer, TrainingArguments

from llm_recipes import metrics, outputs
from llm_recipes.checkpoints import find_checkpoint, protect
from llm_recipes.config import DataConfig, ModelConfig, RunConfig, TokenizerConfig, WindowConfig, parse
from llm_recipes.datasets import hasher, load_documents, make_windows
from llm_recipes.errors import entrypoint
from llm_recipes.launch import check_strategy
from llm_recipes.models import load_model
from llm_recipes.objectives import causal_lm
from llm_recipes.preflight import architecture, plan, preflight
from llm_recipes.progress import Throughput, show_progress
from llm_recipes.tokenization import load_tokenizer


@entrypoint
def main():
    started = time.perf_counter()

    # 1. Config. TrainingArguments also joins the process group that the launcher prepared.
    run, data, windows, tokenizer_config, model_config, args = parse(
        RunConfig, DataConfig, WindowConfig, TokenizerConfig, ModelConfig, TrainingArguments, script=__file__
    )

    # 2. Documents, tokenizer, architecture, and every check that needs no more than these
    documents = load_documents(data, args.seed, windows.streaming)
    tokenizer = load_tokenizer(tokenizer_config, documents, model_config.model_name_or_path)
    config = architecture(model_config, tokenizer)
    preflight(args, run, data, windows, config, tokenizer)

    # 3. Windows, then the plan. One process tokenizes; the others wait, then read the same file.
    batch_size = args.per_device_train_batch_size * args.gradient_accumulation_steps * args.world_size
    train_dataset, eval_dataset, report, digests = make_windows(documents, tokenizer, windows, batch_size, args)
    record = outputs.describe(
        run.resolved, {"data": digests, "tokenizer": hasher(tokenizer.backend_tokenizer.to_str())}
    )
    plan(args, run, windows, config, tokenizer, train_dataset, eval_dataset, report, record)
    if run.dry_run:
        return
    outputs.claim(args, run.push_to_hub, record)  # up to here nothing is written to output_dir

    # 4. Model, in fp32: bf16 is the Trainer's autocast
    model = load_model(model_config, config, args.seed)

    # 5. Trainer
    trainer = Trainer(model, args, causal_lm, train_dataset, eval_dataset, processing_class=tokenizer)
    check_strategy(trainer.accelerator)
    throughput = Throughput(batch_size * windows.sequence_length)
    show_progress(trainer, throughput)
    protect(trainer, after_save=outputs.pusher(args, run.push_to_hub))

    # 6. Train, from the newest checkpoint that is whole
    trainer.train(resume_from_checkpoint=find_checkpoint(args, run.resume))

    # 7. Save first, then measure and show
    outputs.save_model(trainer)
    results = metrics.measure(trainer, eval_dataset, tokenizer, throughput, started)
    samples = outputs.sample(trainer, tokenizer, run.sample_prompts)
    if args.process_index == 0:
        origin = (
            f"continued from {model_config.model_name_or_path}" if model_config.model_name_or_path else "from scratch"
        )
        sentence = f"A {config.model_type} language model pretrained on {results['tokens']:,} tokens, {origin}."
        outputs.write_results(args.output_dir, record, results, sentence, samples, trainer.state.log_history)

    # 8. Push last: a failure there loses nothing
    if run.push_to_hub and args.process_index == 0:
        print(f"pushed to {outputs.push(args)}")


if __name__ == "__main__":
    main()
