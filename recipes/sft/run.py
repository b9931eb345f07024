"""Supervised fine-tuning on conversations, with the loss on what the assistant says.

    accelerate launch --config_file accelerate_configs/zero3.yaml recipes/sft/run.py
    python recipes/sft/run.py --config recipes/sft/lora.yaml
    python recipes/sft/run.py --dry_run        # every check, the plan, and one example with its loss mask

Without --config it reads config.yaml beside this file. Copy the folder and change both.
"""

import time

from trl import ModelConfig, SFTConfig, SFTTrainer

from llm_recipes import outputs, post_training
from llm_recipes.adapters import lora_config, trained_parameters, weights_digest, whole_model
from llm_recipes.answers import exact_match, load_questions
from llm_recipes.checkpoints import find_checkpoint, protect
from llm_recipes.config import AdapterConfig, AnswerConfig, ConversationConfig, RunConfig, parse
from llm_recipes.conversations import Encoder, load_chat_tokenizer, make_rows
from llm_recipes.errors import entrypoint
from llm_recipes.guard import check_strategy
from llm_recipes.models import load_trained, trained_config
from llm_recipes.progress import Throughput, show_progress


@entrypoint
def main():
    started = time.perf_counter()

    # 1. Config. SFTConfig also joins the process group that the launcher prepared.
    run, data, answers, model_config, adapter, args = parse(
        RunConfig, ConversationConfig, AnswerConfig, ModelConfig, AdapterConfig, SFTConfig, script=__file__
    )

    # 2. Model's configuration and tokenizer, and every check that needs no more than these
    name = whole_model(model_config.model_name_or_path, model_config.model_revision)
    tokenizer, report, added, untrained = load_chat_tokenizer(
        name, model_config.model_revision, args.chat_template_path
    )
    config = trained_config(name, model_config, tokenizer, added=added)
    peft_config = lora_config(model_config, config, untrained)
    trained = trained_parameters(config, peft_config)
    post_training.preflight(args, run, data, model_config, adapter, config, trained)
    questions = load_questions(answers.answers) if answers.answers else None

    # 3. Conversations become token ids and labels. One process does it; the others wait, then read the same file.
    encoder = Encoder(tokenizer)
    train, evaluation, said, digests = make_rows(data, encoder, "sft", args)

    # 4. The plan
    base = weights_digest(name, model_config.model_revision)
    record = outputs.describe(run.resolved, {"data": digests, "tokenizer": encoder.digest, "model": base})
    post_training.plan(args, run, config, encoder, train, evaluation, report + said, record, trained)
    if run.dry_run:
        return
    outputs.claim(args, run.push_to_hub, record)  # up to here nothing is written to output_dir

    # 5. Model and trainer; the rows are token ids already
    model = load_trained(name, model_config, config, tokenizer, encoder.stop_id)
    args.dataset_kwargs, args.chat_template_path = {"skip_prepare_dataset": True}, None
    trainer = SFTTrainer(
        model, args, train_dataset=train, eval_dataset=evaluation, processing_class=tokenizer, peft_config=peft_config
    )
    check_strategy(trainer)
    throughput = Throughput(post_training.token_counter(args, train))
    show_progress(trainer, throughput)
    post_training.exact_evaluation(trainer, evaluation)
    protect(trainer, outputs.pusher(args, run.push_to_hub))

    # 6. Train, from the newest checkpoint that is whole
    trainer.train(resume_from_checkpoint=find_checkpoint(args, run.resume))

    # 7. Save first, then measure and show
    outputs.save_model(trainer, adapter.merge)
    results, samples = post_training.measure(trainer, train, throughput, started), []
    if questions is not None:
        figures, samples = exact_match(trainer.model, encoder, questions, answers.max_new_tokens)
        results |= figures
    if args.process_index == 0:
        sentence = f"{model_config.model_name_or_path} fine-tuned on {results['tokens']:,} tokens of conversations."
        outputs.write_results(args.output_dir, record, results, sentence, samples, trainer.state.log_history)

    # 8. Push last: a failure there loses nothing
    if run.push_to_hub and args.process_index == 0:
        print(f"pushed to {outputs.push(args)}")


if __name__ == "__main__":
    main()
