"""Direct preference optimisation on pairs of answers; the other losses of TRL by `loss_type`.

    accelerate launch --config_file accelerate_configs/zero3.yaml recipes/dpo/run.py
    python recipes/dpo/run.py --config recipes/dpo/lora.yaml
    python recipes/dpo/run.py --dry_run        # every check and the plan, nothing written

Without --config it reads config.yaml beside this file. Copy the folder and change both.
"""

import time

from trl import DPOConfig, ModelConfig

from llm_recipes import outputs, post_training
from llm_recipes._compat import PairsTrainer
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

    # 1. Config. DPOConfig also joins the process group that the launcher prepared.
    run, data, answers, model_config, adapter, args = parse(
        RunConfig, ConversationConfig, AnswerConfig, ModelConfig, AdapterConfig, DPOConfig, script=__file__
    )

    # 2. Model's configuration and tokenizer, and every check that needs no more than these
    name = whole_model(model_config.model_name_or_path, model_config.model_revision)
    tokenizer, report, _, untrained = load_chat_tokenizer(name, model_config.model_revision)
    config = trained_config(name, model_config, tokenizer)
    peft_config = lora_config(model_config, config, untrained)
    trained = trained_parameters(config, peft_config)
    post_training.preflight(args, run, data, model_config, adapter, config, trained)
    questions = load_questions(answers.answers) if answers.answers else None

    # 3. Pairs become token ids: prompt, chosen and rejected. One process does it; the others wait, then read the same file.
    encoder = Encoder(tokenizer)
    train, evaluation, said, digests = make_rows(data, encoder, "pairs", args)

    # 4. The plan
    base = weights_digest(name, model_config.model_revision)
    record = outputs.describe(run.resolved, {"data": digests, "tokenizer": encoder.digest, "model": base})
    post_training.plan(args, run, config, encoder, train, evaluation, report + said, record, trained)
    if run.dry_run:
        return
    outputs.claim(args, run.push_to_hub, record)  # up to here nothing is written to output_dir

    # 5. Model and trainer. The reference's log-probs are computed here, once, and cached beside the rows.
    model = load_trained(name, model_config, config, tokenizer, encoder.stop_id)
    trainer = PairsTrainer(
        model, args=args, train_dataset=train, eval_dataset=evaluation, processing_class=tokenizer,
        peft_config=peft_config,
    )  # fmt: skip
    check_strategy(trainer)
    throughput = Throughput(post_training.token_counter(args, train))
    show_progress(trainer, throughput)
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
        sentence = f"{model_config.model_name_or_path} after DPO ({', '.join(args.loss_type)}) on {len(train):,} pairs."
        outputs.write_results(args.output_dir, record, results, sentence, samples, trainer.state.log_history)

    # 8. Push last: a failure there loses nothing
    if run.push_to_hub and args.process_index == 0:
        print(f"pushed to {outputs.push(args)}")


if __name__ == "__main__":
    main()
