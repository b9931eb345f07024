"""Train a reward model on pairs of answers: a score head on the SFT model, Bradley-Terry loss.

    accelerate launch --config_file accelerate_configs/zero3.yaml recipes/rlhf/reward/run.py
    python recipes/rlhf/reward/run.py --dry_run        # every check and the plan, nothing written

Without --config it reads config.yaml beside this file. It ends with a report on held-out pairs. Copy the folder and change both.
"""

import time

from trl import ModelConfig, RewardConfig, RewardTrainer

from llm_recipes import outputs, post_training, reward
from llm_recipes.adapters import lora_config, trained_parameters, weights_digest, whole_model
from llm_recipes.checkpoints import find_checkpoint, protect
from llm_recipes.config import AdapterConfig, ConversationConfig, RewardModelConfig, RunConfig, parse
from llm_recipes.conversations import Encoder, load_chat_tokenizer, make_rows
from llm_recipes.errors import entrypoint
from llm_recipes.guard import check_strategy
from llm_recipes.models import load_trained, trained_config
from llm_recipes.progress import Throughput, show_progress


@entrypoint
def main():
    started = time.perf_counter()

    # 1. Config. RewardConfig also joins the process group that the launcher prepared.
    run, data, scoring, model_config, adapter, args = parse(
        RunConfig, ConversationConfig, RewardModelConfig, ModelConfig, AdapterConfig, RewardConfig, script=__file__
    )

    # 2. Model's configuration and tokenizer, and every check that needs no more than these
    name = whole_model(model_config.model_name_or_path, model_config.model_revision)
    tokenizer, report, _, untrained = load_chat_tokenizer(name, model_config.model_revision, args.chat_template_path)
    config = trained_config(name, model_config, tokenizer, "SEQ_CLS")
    peft_config = lora_config(model_config, config, untrained)
    trained = trained_parameters(config, peft_config)
    post_training.preflight(args, run, data, model_config, adapter, config, trained)

    # 3. Pairs become token ids: the whole conversation, up to the end of the chosen or rejected answer
    encoder = Encoder(tokenizer)
    train, evaluation, said, digests = make_rows(data, encoder, "scored", args)

    # 4. The plan
    base = weights_digest(name, model_config.model_revision)
    record = outputs.describe(run.resolved, {"data": digests, "tokenizer": encoder.digest, "model": base})
    post_training.plan(args, run, config, encoder, train, evaluation, report + said, record, trained)
    if run.dry_run:
        return
    outputs.claim(args, run.push_to_hub, record)  # up to here nothing is written to output_dir

    # 5. Model and trainer; the rows are token ids already, and the tokenizer has its template
    args.chat_template_path = None
    model = load_trained(name, model_config, config, tokenizer)
    trainer = RewardTrainer(
        model, args, train_dataset=train, eval_dataset=evaluation, processing_class=tokenizer, peft_config=peft_config
    )
    check_strategy(trainer)
    throughput = Throughput(post_training.token_counter(args, train))
    show_progress(trainer, throughput)
    protect(trainer, outputs.pusher(args, run.push_to_hub))

    # 6. Train, from the newest checkpoint that is whole
    trainer.train(resume_from_checkpoint=find_checkpoint(args, run.resume))

    # 7. Save first, then judge what was saved on the held-out pairs
    outputs.save_model(trainer, adapter.merge)
    results = post_training.measure(trainer, train, throughput, started)
    results |= reward.judge(trainer, evaluation, (name, model_config.model_revision), encoder, scoring)
    if args.process_index == 0:
        sentence = f"A reward model from {model_config.model_name_or_path}, trained on {len(train):,} pairs."
        outputs.write_results(args.output_dir, record, results, sentence, history=trainer.state.log_history)

    # 8. Push last: a failure there loses nothing
    if run.push_to_hub and args.process_index == 0:
        print(f"pushed to {outputs.push(args)}")


if __name__ == "__main__":
    main()
