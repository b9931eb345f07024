"""Proximal policy optimisation: the SFT model answers prompts, rewards score the answers, a critic learns what to expect.

    accelerate launch --config_file accelerate_configs/zero3.yaml recipes/rlhf/ppo/run.py
    python recipes/rlhf/ppo/run.py --config recipes/rlhf/ppo/lora.yaml
    python recipes/rlhf/ppo/run.py --dry_run        # every check and the plan, nothing written

Without --config it reads config.yaml beside this file. `rewards` are reward models and builtin:exact_match; a function of your
own goes into the list `reward_funcs` below. Copy the folder and change both.
"""

import time

from trl import ModelConfig

from llm_recipes import outputs, post_training
from llm_recipes.adapters import lora_config, trained_parameters, weights_digest, whole_model
from llm_recipes.answers import exact_match, load_questions
from llm_recipes.checkpoints import find_checkpoint, protect
from llm_recipes.config import AdapterConfig, AnswerConfig, PromptConfig, RewardsConfig, RunConfig, parse
from llm_recipes.conversations import Encoder, load_chat_tokenizer, make_rows
from llm_recipes.errors import entrypoint
from llm_recipes.guard import check_strategy
from llm_recipes.models import load_trained, trained_config
from llm_recipes.ppo import PPOConfig, PPOTrainer
from llm_recipes.ppo.critic import critic_config
from llm_recipes.ppo.reward_scoring import load_rewards
from llm_recipes.progress import Throughput, show_progress


@entrypoint
def main():
    started = time.perf_counter()

    # 1. Config. PPOConfig also joins the process group that the launcher prepared.
    run, data, rewards, answers, model_config, adapter, args = parse(
        RunConfig, PromptConfig, RewardsConfig, AnswerConfig, ModelConfig, AdapterConfig, PPOConfig, script=__file__
    )

    # 2. Model's configuration and tokenizer, and every check that needs no more than these
    name = whole_model(model_config.model_name_or_path, model_config.model_revision)
    tokenizer, report, _, untrained = load_chat_tokenizer(name, model_config.model_revision)
    config = trained_config(name, model_config, tokenizer)
    peft_config = lora_config(model_config, config, untrained)
    trained = trained_parameters(config, peft_config)
    longest = data.max_prompt_length + (args.max_completion_length or 0)
    critic = critic_config(rewards.critic_model_name_or_path, name, model_config, args, tokenizer, longest)
    post_training.preflight(args, run, data, model_config, adapter, config, trained)
    questions = load_questions(answers.answers) if answers.answers else None

    # 3. Prompts become token ids, up to where the answer begins; what else is in a row goes to the rewards
    encoder = Encoder(tokenizer)
    train, evaluation, said, digests = make_rows(data, encoder, "prompts", args)
    reward_funcs, args.reward_weights, scoring = load_rewards(
        rewards, tokenizer, [train, evaluation], longest, args.per_device_eval_batch_size, args.device
    )

    # 4. The plan
    base = weights_digest(name, model_config.model_revision)
    judges = [weights_digest(func.name, func.revision) for func in reward_funcs if hasattr(func, "revision")]
    identity = {
        "data": digests,
        "tokenizer": encoder.digest,
        "model": base,
        "judges": [*judges, weights_digest(rewards.critic_model_name_or_path)],
    }
    record = outputs.describe(run.resolved, identity)
    post_training.plan(args, run, config, encoder, train, evaluation, report + said, record, trained, scoring)
    if run.dry_run:
        return
    outputs.claim(args, run.push_to_hub, record)  # up to here nothing is written to output_dir

    # 5. Models and trainer. The trainer loads the reference, unless an adapter switched off is one.
    model = load_trained(name, model_config, config, tokenizer, encoder.stop_id)
    if model_config.model_revision != "main":
        args.model_init_kwargs = {"revision": model_config.model_revision}  # the reference's
    trainer = PPOTrainer(
        model, reward_funcs, args, train, evaluation, tokenizer, peft_config=peft_config,
        critic_model=critic and load_trained(*critic, tokenizer), critic_peft_config=critic and lora_config(*critic[1:]),
    )  # fmt: skip
    check_strategy(trainer)
    throughput = Throughput(post_training.rollout_counter(trainer))
    throughput.left_out = args.steps_per_rollout  # the whole first rollout, for its steps share the drawing
    show_progress(trainer, throughput)
    protect(trainer, outputs.pusher(args, run.push_to_hub))

    # 6. Train, from the newest checkpoint that is whole
    trainer.train(resume_from_checkpoint=find_checkpoint(args, run.resume))

    # 7. Save first, then measure and show: the last rollouts, held-out prompts, and greedy answers
    outputs.save_model(trainer, adapter.merge)
    history = trainer.state.log_history
    results = {key: value for row in history for key, value in row.items() if key.startswith("objective/")}
    results |= post_training.measure(trainer, train, throughput, started)
    samples = trainer.samples()
    if questions is not None:
        figures, answered = exact_match(trainer.model, encoder, questions, answers.max_new_tokens)
        results, samples = results | figures, samples + answered
    if args.process_index == 0:
        sentence = (
            f"{model_config.model_name_or_path} after PPO on {len(train):,} prompts, rewarded by {'; '.join(scoring)}."
        )
        outputs.write_results(args.output_dir, record, results, sentence, samples, history)

    # 8. Push last: a failure there loses nothing
    if run.push_to_hub and args.process_index == 0:
        print(f"pushed to {outputs.push(args)}")


if __name__ == "__main__":
    main()
