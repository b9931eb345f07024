"""PPOTrainer on a tiny Llama: what it trains on against plain transformers, one completion at a time, and what it promises."""

import contextlib
import json
import math
from collections import Counter
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from accelerate.state import AcceleratorState, GradientState
from datasets import Dataset
from peft import LoraConfig, PeftModel
from safetensors.torch import load_file
from tokenizers import Tokenizer, models, pre_tokenizers
from torch.optim.optimizer import register_optimizer_step_post_hook
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    PreTrainedTokenizerFast,
    TrainerCallback,
)

from llm_recipes.answers import generate
from llm_recipes.errors import Diverged, UserError
from llm_recipes.ppo import PPOConfig, PPOTrainer
from tests.running import TINY_MODEL

VOCABULARY, PAD, EOS = 32, 30, 31
CHAT = (
    "{% for m in messages %}{{ m['role'][0] | replace('u', 't28') | replace('a', 't29') }} {{ m['content'] }} {% endfor %}"
    "{% if add_generation_prompt %}t29{% endif %}"
)
STILL = 1e-30  # a learning rate that moves no bit
LORA, CRITIC_LORA = (  # whose dropout must not work
    LoraConfig(r=4, lora_alpha=8, target_modules="all-linear", lora_dropout=0.3, task_type=task)
    for task in ("CAUSAL_LM", "SEQ_CLS")
)


def word_tokenizer(size: int, **special) -> PreTrainedTokenizerFast:
    """A token for each of the words t0, t1, ..."""
    plain = Tokenizer(models.WordLevel({f"t{i}": i for i in range(size)}, unk_token="t0"))
    plain.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=plain, **special)


def save_model(folder: str, auto=AutoModelForCausalLM, seed: int = 0, **keys) -> None:
    """A random model with weights large enough to show what they attend to, and its tokenizer."""
    torch.manual_seed(seed)
    keys = {"vocab_size": VOCABULARY, "eos_token_id": EOS, "pad_token_id": PAD, "bos_token_id": None} | keys
    config = dict(TINY_MODEL | {"initializer_range": 0.2} | keys)
    auto.from_config(AutoConfig.for_model(config.pop("model_type"), **config)).save_pretrained(folder)
    tokenizer = word_tokenizer(VOCABULARY, pad_token=f"t{PAD}", eos_token=f"t{EOS}")
    tokenizer.chat_template = CHAT
    tokenizer.save_pretrained(folder)


@pytest.fixture(scope="module", autouse=True)
def stage(tmp_path_factory):
    """The folder that all tests here work in: policy, two reward models, an adapter far from zero, and a GPT-2."""
    folder = tmp_path_factory.mktemp("trainer")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        save_model("policy")
        for seed, name in ((1, "scorer"), (2, "judge")):
            save_model(name, AutoModelForSequenceClassification, seed, num_labels=1)
        gpt2 = {"n_embd": 32, "n_layer": 2, "n_head": 2, "n_positions": 64, "n_inner": 64}
        save_model("wide", AutoModelForSequenceClassification, 4, num_labels=1, hidden_size=48)
        save_model("gpt2", model_type="gpt2", **gpt2)
        torch.manual_seed(3)
        far = LoraConfig(r=4, target_modules="all-linear", init_lora_weights=False, task_type="CAUSAL_LM")
        PeftModel(AutoModelForCausalLM.from_pretrained("policy"), far).save_pretrained("adapter")
        yield folder


@pytest.fixture(autouse=True)
def fresh_accelerate():
    """Its state outlives a trainer, and so would the precision and the accumulation of the test before."""

    def reset():
        AcceleratorState._reset_state(reset_partial_state=True)
        GradientState._reset_state()

    reset()
    yield
    reset()


def share(completion_ids, **columns):
    """The share of tokens below t16."""
    return [sum(token < 16 for token in ids) / len(ids) for ids in completion_ids]


def prompts(n: int = 32) -> Dataset:
    """Texts of one to six words."""
    rng = np.random.default_rng(0)
    return Dataset.from_list([{"prompt": " ".join(f"t{i}" for i in rng.integers(0, 28, 1 + k % 6))} for k in range(n)])


def make(rewards=share, model="policy", train=None, evaluation=None, tokenizer=None, out="out", options=None, **keys):
    """A trainer with rollouts of 16 completions, each trained on in four steps."""
    base = {
        "per_device_train_batch_size": 4, "gradient_accumulation_steps": 2, "num_mini_batches": 2, "num_ppo_epochs": 2,
        "max_steps": 4, "max_completion_length": 10, "temperature": 1.0, "learning_rate": 1e-2, "logging_steps": 1,
        "lr_scheduler_type": "constant", "bf16": False, "gradient_checkpointing": False, "use_cpu": True,
        "report_to": "none", "save_strategy": "no", "disable_tqdm": True, "seed": 1,
    }  # fmt: skip
    args = PPOConfig(out, **(base | keys))
    if isinstance(model, str):
        tokenizer = tokenizer or AutoTokenizer.from_pretrained(model)
        model = AutoModelForCausalLM.from_pretrained(model)
    tokenizer = tokenizer or AutoTokenizer.from_pretrained("policy")
    return PPOTrainer(model, rewards, args, train or prompts(), evaluation, tokenizer, **(options or {}))


def trained(*argv, resume=None, **keys):
    trainer = make(*argv, **keys)
    trainer.train(resume_from_checkpoint=resume)
    return trainer


def steps(trainer, *names):
    """What was logged at each step: one number, or a tuple of the `names`."""
    rows = [row for row in trainer.state.log_history if "loss" in row]
    found = [tuple(row.get(name) for name in names) for row in rows]
    return [one for (one,) in found] if len(names) == 1 else found


def weights(model) -> dict:
    return {name: value.detach().clone() for name, value in model.state_dict().items()}


def moved(before: dict, after: dict) -> float:
    assert before.keys() == after.keys()
    return max((before[name] - after[name]).abs().max().item() for name in before)


def completions(rollout):
    """(prompt, completion) ids of every row, by its lengths."""
    rows = zip(rollout.input_ids.tolist(), rollout.prompt_lengths.tolist(), rollout.lengths.tolist(), strict=True)
    return [(ids[:p], ids[p : p + n]) for ids, p, n in rows]


def logprobs_alone(model, rollout, temperature: float = 1.0) -> list[torch.Tensor]:
    """Log-probs of each completion's tokens by plain transformers, unpadded, one by one."""
    model.eval()
    found = []
    for prompt, completion in completions(rollout):
        logits = model(torch.tensor([prompt + completion])).logits[0, len(prompt) - 1 : -1] / temperature
        found.append(logits.log_softmax(-1).gather(1, torch.tensor(completion)[:, None])[:, 0])
    return found


def values_alone(critic, rollout) -> list[torch.Tensor]:
    """Values before each completion's tokens, the same way."""
    critic.eval()
    found = []
    for prompt, completion in completions(rollout):
        hidden = critic.base_model(torch.tensor([prompt + completion])).last_hidden_state
        found.append(critic.score(hidden)[0, len(prompt) - 1 : -1, 0])
    return found


def check_rows(table: torch.Tensor, expected: list[torch.Tensor], atol: float = 1e-5) -> None:
    """Each row of `(N, C)` begins with what is expected and goes on with zeros."""
    for row, values in zip(table, expected, strict=True):
        assert torch.allclose(row[: len(values)], values.detach(), rtol=0, atol=atol), (row, values)
        assert not row[len(values) :].any()


@pytest.fixture(scope="module")
def straight(stage):
    """Two rollouts, with held-out prompts; saving asked for at steps 3 and 6."""
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()
    return trained(
        out="straight", max_steps=8, save_strategy="steps", save_steps=3, save_only_model=False, evaluation=prompts(5),
        eval_strategy="steps", eval_steps=4, per_device_eval_batch_size=5, kl_target=3.0, kl_horizon=100,
    )  # fmt: skip


# ---- a rollout against plain transformers ----------------------------------------------------------


def test_first_step_of_a_rollout_has_ratio_1_and_the_first_rollout_kl_0(straight):
    """Exactly; afterwards neither."""
    deviation, kl = steps(straight, "policy/ratio_max_dev"), steps(straight, "objective/kl")
    assert [value == 0.0 for value in deviation] == [True, False, False, False] * 2
    assert kl[0] == 0.0 and kl[4] > 0.01 and kl[1:4] == [None] * 3
    assert steps(straight, "policy/ratio")[0] == 1.0 and steps(straight, "policy/approxkl")[0] == 0.0


@pytest.mark.parametrize(("batch", "accumulation"), [(16, 1), (8, 2), (4, 4)])
@pytest.mark.parametrize("critic", ["separate", "shared"])
def test_first_rollout_by_hand(batch, accumulation, critic):
    """Log-probs, values, rewards, advantages, and both models' gradient norms, from the definitions."""
    options = {"critic_model": "judge"} if critic == "separate" else None
    keys = {
        "num_mini_batches": 1,
        "num_ppo_epochs": 1,
        "max_steps": 1,
        "max_grad_norm": 1e9,
        "temperature": 0.8,
        "vf_coef": 0.3,
    }
    sizes = {"per_device_train_batch_size": batch, "gradient_accumulation_steps": accumulation}
    beta, gamma, lam = 0.1, 0.9, 0.8
    policy, reference = (AutoModelForCausalLM.from_pretrained("policy") for _ in range(2))
    with torch.no_grad():  # so that the KL is none of 0
        policy.model.layers[0].mlp.up_proj.weight.mul_(1.3)
    start = weights(policy)
    trainer = make(
        model=policy, kl_coef=beta, gamma=gamma, lam=lam, critic=critic, learning_rate=STILL, **sizes, **keys, options=options
    )  # fmt: skip
    if critic == "shared":
        judge = torch.nn.Linear(32, 1)
        trainer.critic.head.load_state_dict(judge.state_dict())
    trainer.train()
    rollout, (row,) = trainer.rollout, [row for row in trainer.state.log_history if "loss" in row]
    assert moved(start, weights(policy)) == 0 and len(set(rollout.lengths.tolist())) > 2
    policy = AutoModelForCausalLM.from_pretrained("policy")
    policy.load_state_dict(start)
    logps, refs = logprobs_alone(policy, rollout, 0.8), logprobs_alone(reference, rollout, 0.8)
    check_rows(rollout.old_logprobs, logps)
    check_rows(rollout.ref_logprobs, refs)
    kl = [(a - b).detach() for a, b in zip(logps, refs, strict=True)]
    assert row["objective/kl"] == pytest.approx(np.mean([part.sum().item() for part in kl]), abs=1e-5) != 0
    if critic == "separate":
        judge = AutoModelForSequenceClassification.from_pretrained("judge")
        values = values_alone(judge, rollout)
    else:
        values = values_alone(SimpleNamespace(base_model=policy.model, score=judge, eval=policy.eval), rollout)
    check_rows(rollout.values, values)
    scores = share([completion for _, completion in completions(rollout)])
    assert row["objective/score"] == pytest.approx(np.mean(scores), abs=1e-6)
    advantages, returns = [], []
    for k, v, score in zip(kl, values, scores, strict=True):
        rewards = (-beta * k).tolist()
        rewards[-1] += score
        v = [*v.tolist(), 0.0]
        errors = [r + gamma * v[t + 1] - v[t] for t, r in enumerate(rewards)]
        found = [sum((gamma * lam) ** (i - t) * e for i, e in enumerate(errors) if i >= t) for t in range(len(errors))]
        advantages.append(torch.tensor(found))
        returns.append(advantages[-1] + torch.tensor(v[:-1]))
    check_rows(rollout.returns, returns)
    every = torch.cat(advantages)
    advantages = [(part - every.mean()) / every.std() for part in advantages]
    check_rows(rollout.advantages, advantages)
    # at ratio 1: the gradient of -A log p, and of half the squared error, over all tokens
    norm = sum((-a * logp).sum() for a, logp in zip(advantages, logps, strict=True)) / len(every)
    error = sum(0.5 * ((v - r) ** 2).sum() for v, r in zip(values, returns, strict=True)) / len(every)
    assert row["critic/loss"] == pytest.approx(error.item(), abs=1e-5)
    assert row["policy/loss"] == pytest.approx(-torch.cat(advantages).mean().item(), abs=1e-5)
    if critic == "shared":  # one backward for both; the value loss counts over the returns' variance or its own double
        error = 0.3 * error / max(torch.cat(returns).var(correction=0), 2 * error.detach())
    (norm + error).backward()
    for model, name in ((policy, "grad_norm"), (judge, "critic/grad_norm")):
        gradients = [p.grad.flatten() for p in model.parameters() if p.grad is not None]
        assert row[name] == pytest.approx(torch.cat(gradients).norm().item(), abs=1e-5), name


@pytest.mark.parametrize("kind", ["separate", "shared", "lora"])
def test_accumulation_changes_nothing(kind):
    """Loss and gradient norms of policy and critic, in the first step and after it."""
    names = "loss", "grad_norm", "critic/loss", "critic/grad_norm", "policy/clipfrac", "policy/approxkl"
    curves = []
    for batch, accumulation in ((16, 1), (8, 2), (4, 4), (2, 8)):
        sizes = {"per_device_train_batch_size": batch, "gradient_accumulation_steps": accumulation}
        options = {"peft_config": LORA, "critic_peft_config": CRITIC_LORA, "critic_model": "judge"}
        keys = {"critic": "shared"} if kind == "shared" else {"options": options if kind == "lora" else None}
        trainer = trained(num_mini_batches=1, num_ppo_epochs=3, max_steps=3, learning_rate=1e-3, **keys, **sizes)
        curves.append(steps(trainer, *names))
    assert curves[0][0][1] > 0.1 and curves[0][0][3] > 0.05 and curves[0][2] != curves[0][1]
    assert np.abs(np.array(curves) - np.array(curves[0])).max() < 1e-5, curves


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_absolute_positions_count_from_the_prompt(temperature):
    """GPT-2: prompts of other lengths beside it change no log-prob. So they do not with a cache, in generation."""
    trainer = trained(model="gpt2", temperature=temperature, learning_rate=STILL)
    gpt2 = AutoModelForCausalLM.from_pretrained("gpt2")
    check_rows(trainer.rollout.old_logprobs, logprobs_alone(gpt2, trainer.rollout, temperature))
    assert len(set(trainer.rollout.prompt_lengths.tolist())) > 2
    rows = prompts()["prompt"]
    ids = [trainer.processing_class(text)["input_ids"] for text in rows]
    uniforms = torch.from_numpy(np.random.default_rng(0).random((len(ids), 10), np.float32))
    drawn = generate(gpt2, ids, PAD, 10, uniforms, temperature, [EOS])
    alone = [generate(gpt2, [one], PAD, 10, uniforms[i : i + 1], temperature, [EOS])[0] for i, one in enumerate(ids)]
    assert drawn == alone


# ---- scores ----------------------------------------------------------------------------------------

AT_ONCE = {"kl_coef": 0.0, "gamma": 0.0, "lam": 0.0, "max_steps": 4}  # then returns are the rewards of the tokens


def by_tokens(rollout, scores) -> list[torch.Tensor]:
    """The score at the last token, nothing before."""
    rows = [torch.zeros(length) for length in rollout.lengths.tolist()]
    for row, score in zip(rows, scores, strict=True):
        row[-1] = score
    return rows


def test_the_end_of_a_completion_where_pad_is_eos():
    """What is a token follows from lengths, and the score stands on the EOS, also after prompts that have one."""
    tokenizer = word_tokenizer(VOCABULARY, pad_token=f"t{EOS}", eos_token=f"t{EOS}")
    rows = Dataset.from_list([{"prompt_ids": [EOS] * (k % 3) + [k % 28, EOS]} for k in range(32)])
    trainer = trained(tokenizer=tokenizer, train=rows, max_completion_length=24, **AT_ONCE)
    rollout = trainer.rollout
    ended = [completion[-1] == EOS for _, completion in completions(rollout)]
    assert 3 < sum(ended) < 16 and rollout.ended.tolist() == ended
    assert all(EOS not in completion[:-1] for _, completion in completions(rollout))
    assert all(
        len(completion) == 24 for (_, completion), end in zip(completions(rollout), ended, strict=True) if not end
    )
    assert rollout.mask.sum(1).tolist() == rollout.lengths.tolist()
    check_rows(rollout.returns, by_tokens(rollout, share([completion for _, completion in completions(rollout)])))
    start = AutoModelForCausalLM.from_pretrained("policy")
    check_rows(rollout.old_logprobs, logprobs_alone(start, rollout))


def test_every_id_that_ends_a_completion():
    """Those of the model's generation_config, not the tokenizer's alone."""
    policy = AutoModelForCausalLM.from_pretrained("policy")
    policy.generation_config.eos_token_id = [EOS, 5, 7]
    trainer = trained(model=policy, missing_eos_penalty=2.0, **AT_ONCE)
    ids = [completion for _, completion in completions(trainer.rollout)]
    assert len({completion[-1] for completion in ids} & {EOS, 5, 7}) > 1
    assert all(not {EOS, 5, 7} & {*completion[:-1]} for completion in ids)
    expected = [s - 2.0 * (c[-1] not in (EOS, 5, 7)) for s, c in zip(share(ids), ids, strict=True)]
    assert trainer.rollout.scores.tolist() == pytest.approx(expected) and 0 < trainer.rollout.ended.sum() < 16


def test_penalty_and_clip():
    """First the one, then the other; figures have the score that counts, `reward` what was given."""
    trainer = trained(lambda completion_ids, **_: [3 * s - 1 for s in share(completion_ids)],
                      missing_eos_penalty=0.5, score_clip=0.4, **AT_ONCE)  # fmt: skip
    ids = [completion for _, completion in completions(trainer.rollout)]
    given = [3 * s - 1 for s in share(ids)]
    whole = [s - 0.5 * (c[-1] != EOS) for s, c in zip(given, ids, strict=True)]
    expected = [min(max(s, -0.4), 0.4) for s in whole]
    assert any(s > 0.4 for s in whole) and any(s < -0.4 for s in whole) and any(abs(s) < 0.4 for s in whole)
    check_rows(trainer.rollout.returns, by_tokens(trainer.rollout, expected), 1e-6)
    (score, reward) = steps(trainer, "objective/score", "reward")[0]
    assert score == pytest.approx(np.mean(expected), abs=1e-6) and reward == pytest.approx(np.mean(given), abs=1e-6)


def test_whitened_rewards():
    """Variance 1 over the tokens of the rollout, and the mean that they had."""
    trainer = trained(whiten_rewards=True, **AT_ONCE)
    rows = by_tokens(trainer.rollout, share([completion for _, completion in completions(trainer.rollout)]))
    every = torch.cat(rows)
    check_rows(trainer.rollout.returns, [(row - every.mean()) / every.std() + every.mean() for row in rows])


@pytest.mark.parametrize("estimator", ["k2", "k3"])
def test_other_estimates_of_the_kl(estimator):
    """In the figures and in the rewards of the second rollout; never negative."""
    trainer = trained(kl_estimator=estimator, max_steps=8, gamma=0.0, lam=0.0, kl_coef=0.1)
    rollout = trainer.rollout
    with torch.no_grad():
        refs = logprobs_alone(AutoModelForCausalLM.from_pretrained("policy"), rollout)
    scores, expected = share([completion for _, completion in completions(rollout)]), []
    kl = [old[: len(ref)] - ref for old, ref in zip(rollout.old_logprobs, refs, strict=True)]
    kl = [d**2 / 2 if estimator == "k2" else ((-d).exp() - 1 + d).clamp(max=10) for d in kl]
    for row, score in zip(kl, scores, strict=True):
        expected.append(-0.1 * row)
        expected[-1][-1] += score
    check_rows(rollout.returns, expected, 1e-4)
    assert steps(trainer, "objective/kl")[4] == pytest.approx(np.mean([k.sum().item() for k in kl]), rel=1e-4)
    assert rollout.kl.min() >= 0


def test_rewards_are_added_up_by_weight():
    """Functions, one of them async, and None where one has no opinion."""
    seen = []

    def first(prompts, completions, prompt_ids, completion_ids, gold, **columns):
        seen.append((prompts, completions, prompt_ids, completion_ids, gold))
        return share(completion_ids)

    async def length(completion_ids, **columns):
        return [len(ids) / 10 for ids in completion_ids]

    def some(completion_ids, **columns):
        return [None if ids[0] % 2 else 1.0 for ids in completion_ids]

    rows = prompts().map(lambda row, i: {"gold": i}, with_indices=True)
    trainer = trained([first, length, some], train=rows, reward_weights=[1.0, 0.5, 2.0], **AT_ONCE)
    ids = [completion for _, completion in completions(trainer.rollout)]
    expected = [s + 0.05 * len(c) + 2.0 * (c[0] % 2 == 0) for s, c in zip(share(ids), ids, strict=True)]
    assert trainer.rollout.scores.tolist() == pytest.approx(expected) and trainer.rollout.scored.all()
    (said, texts, prompt_ids, completion_ids, gold) = seen[0]
    assert completion_ids == ids and prompt_ids == [prompt for prompt, _ in completions(trainer.rollout)]
    assert [rows[i]["prompt"] for i in gold] == said == [" ".join(f"t{i}" for i in prompt) for prompt in prompt_ids]
    assert texts == [" ".join(f"t{i}" for i in c if i not in (EOS, PAD)) for c in ids]
    assert steps(trainer, "rewards/length/mean")[0] == pytest.approx(np.mean([len(c) / 10 for c in ids]))
    assert steps(trainer, "rewards/some/mean")[0] == 1.0 and steps(trainer, "rewards/some/std")[0] == 0.0


def test_a_completion_without_any_score_trains_nothing():
    """The gradient is that of the others; a rollout without any score leaves all weights as they are."""

    def some(completion_ids, **columns):
        return [None if ids[0] % 2 else s for ids, s in zip(completion_ids, share(completion_ids), strict=True)]

    one = {"num_mini_batches": 1, "num_ppo_epochs": 1, "max_steps": 1, "gradient_accumulation_steps": 4}
    trainer = trained([some], learning_rate=STILL, **one)
    rollout, policy = trainer.rollout, AutoModelForCausalLM.from_pretrained("policy")
    kept = [i for i, (_, completion) in enumerate(completions(rollout)) if completion[0] % 2 == 0]
    assert 3 < len(kept) < 13 and rollout.scored.nonzero()[:, 0].tolist() == kept
    logps, tokens = logprobs_alone(policy, rollout), int(rollout.lengths[kept].sum())
    (sum((-rollout.advantages[i, : len(logps[i])] * logps[i]).sum() for i in kept) / tokens).backward()
    norm = torch.cat([p.grad.flatten() for p in policy.parameters()]).norm().item()
    (row,) = [row for row in trainer.state.log_history if "loss" in row]
    assert row["grad_norm"] == pytest.approx(norm, abs=1e-5) and norm > 0.1
    assert row["completions/unscored"] == 1 - len(kept) / 16
    white = torch.cat([rollout.advantages[i, : len(logps[i])] for i in kept])
    assert white.mean().item() == pytest.approx(0, abs=1e-6) and white.std().item() == pytest.approx(1, abs=1e-5)
    policy, start = AutoModelForCausalLM.from_pretrained("policy"), AutoModelForCausalLM.from_pretrained("policy")
    trainer = trained(lambda prompts, **_: [None] * len(prompts), model=policy)
    assert moved(weights(policy), weights(start)) == 0 and steps(trainer, "objective/score")[0] is None


@torch.no_grad()
def scores_alone(folder, sequences):
    model = AutoModelForSequenceClassification.from_pretrained(folder).eval()
    return [model(torch.tensor([ids])).logits.item() for ids in sequences]


def test_a_reward_model_reads_the_ids_up_to_the_eos():
    """Given by its path, as a model, and beside a function."""
    found = {}
    for how in ("path", "model", "list"):
        given, scale = "scorer", 1
        if how != "path":  # not what is on disk
            given, scale = AutoModelForSequenceClassification.from_pretrained("scorer"), 2
            given.score.weight.data *= scale
        trainer = trained([given, share] if how == "list" else given, **AT_ONCE)
        rows = completions(trainer.rollout)
        expected = [scale * s for s in scores_alone("scorer", [prompt + completion for prompt, completion in rows])]
        assert trainer.rollout.rewards[:, 0].tolist() == pytest.approx(expected, abs=1e-5)
        found[how] = steps(trainer, "rewards/scorer/mean")[0]
        assert found[how] == pytest.approx(np.mean(expected), abs=1e-5)
    ended = [prompt + completion for prompt, completion in rows if completion[-1] == EOS]
    with_end, without = scores_alone("scorer", ended), scores_alone("scorer", [ids[:-1] for ids in ended])
    assert len(ended) > 3 and min(abs(a - b) for a, b in zip(with_end, without, strict=True)) > 1e-4
    assert trainer.rollout.scores.tolist() == pytest.approx(
        [a + b for a, b in zip(expected, share([c for _, c in rows]), strict=True)], abs=1e-5
    )


# ---- prompts ---------------------------------------------------------------------------------------


def test_text_and_ids_make_the_same_rollout():
    texts = prompts()
    tokenizer = AutoTokenizer.from_pretrained("policy")
    ids = Dataset.from_list([{"prompt_ids": tokenizer(text)["input_ids"]} for text in texts["prompt"]])
    runs = [trained(train=rows, max_steps=8) for rows in (texts, ids)]
    assert completions(runs[0].rollout) == completions(runs[1].rollout)
    assert moved(*(weights(run.model) for run in runs)) == 0


def test_conversations_get_the_template_and_messages_are_rewarded():
    seen = []

    def look(prompts, completions, prompt_ids, completion_ids, **columns):
        seen.append((prompts, completions, prompt_ids))
        return share(completion_ids)

    rows = Dataset.from_list([{"prompt": [{"role": "user", "content": text}]} for text in prompts()["prompt"]])
    trainer = trained([look], train=rows, evaluation=rows.select(range(3)))
    said, answers, ids = seen[0]
    assert ids == [prompt for prompt, _ in completions(trainer.rollout)]
    for prompt, answer, got in zip(said, answers, ids, strict=True):
        assert got == [28, *(int(word[1:]) for word in prompt[0]["content"].split()), 29]
        assert [message["role"] for message in answer] == ["assistant"]
    assert math.isfinite(trainer.evaluate()["eval_objective/score"])


def test_every_prompt_has_as_many_completions_as_asked():
    """Side by side, each with random numbers of its own; an epoch has every prompt once."""
    trainer = make(num_generations=2, max_steps=16)
    rows = [row["prompt"] for number in range(4) for row in trainer.prompts_of(number)]
    assert rows[::2] == rows[1::2] and Counter(rows[::2]) == Counter(prompts()["prompt"])
    assert [row["prompt"] for row in trainer.prompts_of(4)] != rows[:16]
    trainer.train()
    pairs = completions(trainer.rollout)
    assert [p for p, _ in pairs[::2]] == [p for p, _ in pairs[1::2]]
    assert sum(a != b for (_, a), (_, b) in zip(pairs[::2], pairs[1::2], strict=True)) > 4


# ---- optimisation ----------------------------------------------------------------------------------


class _Steps(contextlib.ContextDecorator):
    """How often each optimizer took a step, by the first of its weights."""

    def __enter__(self):
        self.counts = Counter()

        def count(optimizer, args, kwargs):
            self.counts[id(optimizer.param_groups[0]["params"][0])] += 1

        self.handle = register_optimizer_step_post_hook(count)
        return self

    def __exit__(self, *error):
        self.handle.remove()


@pytest.mark.parametrize("mini_batches", [1, 2, 4])
def test_a_rollout_makes_epochs_times_mini_batches_steps(mini_batches):
    calls = []

    def counted(completion_ids, **columns):
        calls.append(len(completion_ids))
        return share(completion_ids)

    keys = {"num_mini_batches": mini_batches, "num_ppo_epochs": 3, "max_steps": 6 * mini_batches}
    with _Steps() as optimizers:
        trainer = trained(counted, gradient_accumulation_steps=2, **keys)
    assert calls == [8 * mini_batches] * 2 and trainer.state.global_step == 6 * mini_batches
    assert list(optimizers.counts.values()) == [6 * mini_batches] * 2
    critic = [p for p in trainer.critic.model.parameters() if p.requires_grad]
    assert optimizers.counts.keys() == {id(critic[0]), id(next(trainer.model.parameters()))}


def test_an_epoch_trains_on_every_completion_once():
    """In another order each time; micro-batches are of like length."""
    trainer = trained(num_ppo_epochs=3, max_steps=6)
    orders = []
    for epoch in range(3):
        plan = trainer.plan(trainer.rollout, 0, epoch)
        assert [[len(rows) for rows in batch] for batch in plan] == [[4, 4]] * 2
        orders.append([sorted(torch.cat(batch).tolist()) for batch in plan])
        assert sorted(orders[-1][0] + orders[-1][1]) == list(range(16))
        lengths = trainer.rollout.prompt_lengths + trainer.rollout.lengths
        for first, second in plan:
            assert lengths[first].max() <= lengths[second].min()
    assert orders[0] != orders[1] != orders[2] != orders[0]


@pytest.mark.parametrize("kind", ["separate", "shared", "lora"])
def test_gradient_checkpointing_changes_nothing(kind):
    """But memory: it is on in policy and critic, and the first ratio is still 1."""
    options = {"peft_config": LORA, "critic_peft_config": CRITIC_LORA} if kind == "lora" else {}
    keys = {"critic": "shared" if kind == "shared" else "separate", "options": options, "learning_rate": 1e-3}
    plain, saving = trained(**keys), trained(gradient_checkpointing=True, **keys)
    models = [saving.model] if kind == "shared" else [saving.model, saving.critic.model]
    assert all(model.is_gradient_checkpointing for model in models)
    names = "loss", "grad_norm", "critic/loss", "critic/grad_norm", "policy/ratio_max_dev"
    assert steps(saving, *names)[0][-1] == 0.0
    assert np.abs(np.array(steps(plain, *names)) - np.array(steps(saving, *names))).max() < 1e-5


def test_bf16_has_a_first_ratio_of_1():
    """Under autocast too; the weights stay fp32."""
    trainer = trained(bf16=True, max_steps=8)
    assert [value == 0.0 for value in steps(trainer, "policy/ratio_max_dev")] == [True, False, False, False] * 2
    assert {p.dtype for model in (trainer.model, trainer.critic.model) for p in model.parameters()} == {torch.float32}
    assert steps(trainer, "objective/kl")[0] == 0.0 and steps(trainer, "loss") != steps(trained(max_steps=8), "loss")


@pytest.mark.parametrize("critic", ["separate", "shared"])
def test_a_tiny_max_grad_norm_leaves_the_weights_still(critic):
    found = {}
    for limit in (1e-9, 1.0):
        options = {"critic_model": "judge"} if critic == "separate" else None
        trainer = make(max_grad_norm=limit, optim="sgd", learning_rate=1.0, critic=critic, options=options)
        value = trainer.critic.head if critic == "shared" else trainer.critic.model
        before = weights(trainer.model), weights(value)
        trainer.train()
        found[limit] = [moved(a, weights(b)) for a, b in zip(before, (trainer.model, value), strict=True)]
        assert min(steps(trainer, "critic/grad_norm")) > 1e-2 and min(steps(trainer, "grad_norm")) > 1e-2
    assert max(found[1e-9]) < 1e-6 and min(found[1.0]) > 1e-2, found


def test_the_critic_has_a_learning_rate_of_its_own():
    """On the policy's schedule."""
    keys = {"learning_rate": 1e-3, "critic_learning_rate": 1e-2, "lr_scheduler_type": "linear"}
    trainer = trained(max_steps=8, **keys)
    rates = steps(trainer, "learning_rate", "critic/learning_rate")
    assert [b for _, b in rates] == pytest.approx([10 * a for a, _ in rates])
    assert [a for a, _ in rates] == pytest.approx([1e-3 * (8 - k) / 8 for k in range(8)])


@pytest.mark.parametrize("still", ["policy", "critic"])
def test_a_learning_rate_of_0_leaves_the_weights_as_they_were(still):
    """Those of the policy, or of the critic; the other moves."""
    rates = {"learning_rate": 0.0, "critic_learning_rate": 1e-2} if still == "policy" else {"critic_learning_rate": 0.0}
    trainer = make(options={"critic_model": "judge"}, **rates)
    models = {"policy": trainer.model, "critic": trainer.critic.model}
    before = {name: weights(model) for name, model in models.items()}
    trainer.train()
    changed = {name for name, model in models.items() if moved(before[name], weights(model))}
    assert changed == {"policy", "critic"} - {still}


@pytest.mark.parametrize("critic", ["separate", "shared"])
@pytest.mark.parametrize("decay", [0.0, 0.1])
def test_weight_decay_is_that_of_the_config(decay, critic):
    """Without scores there are no gradients, so decay alone moves weights: those of the critic as those of the policy,
    and of neither the norms and biases."""
    trainer = make(lambda prompts, **_: [None] * len(prompts), weight_decay=decay, critic=critic)
    value = trainer.critic.head if critic == "shared" else trainer.critic.model
    with torch.no_grad():
        for parameter in value.parameters():
            parameter.fill_(1.0)
    start = weights(trainer.model)
    trainer.train()
    shrunk = (1 - 1e-2 * decay) ** 4
    for before, after in (
        (start, weights(trainer.model)),
        ({name: torch.ones(()) for name in weights(value)}, weights(value)),
    ):
        for name, weight in after.items():
            factor = 1.0 if "norm" in name or name == "bias" else shrunk
            assert torch.allclose(weight, before[name] * factor, rtol=0, atol=1e-6 if decay else 0), name


def test_a_new_critic_says_zero_and_an_own_one_is_taken():
    start = steps(trained(), "critic/value", "critic/explained_variance")[0]
    assert start == pytest.approx((0, 0), abs=1e-12)
    trainer = trained(options={"critic_model": AutoModelForSequenceClassification.from_pretrained("judge")},
                      critic_learning_rate=0.0)  # fmt: skip
    check_rows(
        trainer.rollout.values,
        values_alone(AutoModelForSequenceClassification.from_pretrained("judge"), trainer.rollout),
    )


@pytest.mark.parametrize("weight_decay", [0.0, 0.1])
def test_warmup_trains_the_critic_alone(weight_decay):
    """For one rollout the policy keeps every bit, and so the second has KL 0."""
    start = weights(AutoModelForCausalLM.from_pretrained("policy"))
    one = make(critic_warmup_rollouts=1, weight_decay=weight_decay)
    critic = weights(one.critic.model)
    one.train()
    assert moved(start, weights(one.model)) == 0 and moved(critic, weights(one.critic.model)) > 1e-3
    two = trained(critic_warmup_rollouts=1, weight_decay=weight_decay, max_steps=8)
    assert moved(start, weights(two.model)) > 1e-3 and steps(two, "objective/kl")[4] == 0.0


def test_without_kl_there_is_no_reference():
    trainer = trained(kl_coef=0.0, max_steps=8)
    assert trainer.ref_model is None and "ref_logprobs" not in trainer.rollout.columns
    assert set(steps(trainer, "objective/kl")) == {None}


# ---- adapters --------------------------------------------------------------------------------------


def test_adapters_leave_the_base_as_it_was():
    """On policy and critic. The reference is the policy with its adapter off, and does not move."""
    options = {"peft_config": LORA, "critic_peft_config": CRITIC_LORA, "critic_model": "judge"}
    trainer = trained(out="lora", options=options, max_steps=8, save_strategy="steps", save_steps=8)
    for name, model in (("policy", trainer.model), ("judge", trainer.critic.saved)):
        auto = AutoModelForCausalLM if name == "policy" else AutoModelForSequenceClassification
        with_adapter = weights(model)
        for key, value in auto.from_pretrained(name).state_dict().items():
            parts = [k for k in with_adapter if k.replace(".base_layer", "").endswith(f"base_model.model.{key}")]
            parts += [f"base_model.model.{key.replace('score', 'score.original_module')}"] if "score" in key else []
            assert parts and torch.equal(with_adapter[parts[-1]], value), key
        assert max(value.abs().max() for key, value in with_adapter.items() if "lora_B" in key) > 1e-3
    assert trainer.ref_model is None
    plain = AutoModelForCausalLM.from_pretrained("policy")
    with torch.no_grad():
        check_rows(trainer.rollout.ref_logprobs, logprobs_alone(plain, trainer.rollout))
    assert not torch.allclose(trainer.rollout.ref_logprobs, trainer.rollout.old_logprobs, atol=1e-2)
    folder = Path("lora/checkpoint-8")
    assert not (folder / "model.safetensors").exists() and not (folder / "critic/model.safetensors").exists()
    ids = torch.tensor([[1, 2, 3, 4]])
    with torch.no_grad():
        loaded = PeftModel.from_pretrained(plain, folder).eval()
        assert torch.allclose(loaded(ids).logits, trainer.model.eval()(ids).logits, atol=1e-5)
        judge = AutoModelForSequenceClassification.from_pretrained("judge")
        (critic,) = (path.parent for path in folder.glob("critic/**/adapter_config.json"))
        value = PeftModel.from_pretrained(judge, critic).eval()(ids).logits.item()
        rollout = trainer.critic.values(ids, torch.tensor([[False, False, False, True]])).item()
        assert value == pytest.approx(rollout, abs=1e-5)


def test_a_pretrained_adapter_is_its_own_reference():
    """Its copy `ref`, rather than the model without it."""
    policy = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained("policy"), "adapter", is_trainable=True)
    trainer = trained(model=policy, max_steps=8, learning_rate=1e-2)
    assert steps(trainer, "objective/kl")[0] == 0.0 and steps(trainer, "objective/kl")[4] > 0.01
    start = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained("policy"), "adapter")
    with torch.no_grad():
        check_rows(trainer.rollout.ref_logprobs, logprobs_alone(start, trainer.rollout))
    after = weights(policy)
    copies = {name: value for name, value in weights(start).items() if "lora_" in name}
    assert copies and all(torch.equal(after[name.replace("default", "ref")], value) for name, value in copies.items())
    assert max((after[name] - value).abs().max() for name, value in copies.items()) > 1e-3


# ---- the KL coefficient, figures, evaluation -------------------------------------------------------


def test_the_coefficient_follows_its_target_and_is_in_the_checkpoint(straight):
    """Target 3, horizon 100, 16 completions a rollout."""
    kl, coefficient = steps(straight, "objective/kl"), steps(straight, "objective/kl_coef")
    expected = [0.05]
    for value in (kl[0], kl[4]):
        expected.append(expected[-1] * (1 + min(max(value / 3 - 1, -0.2), 0.2) * 16 / 100))
    assert [coefficient[0], coefficient[4]] == pytest.approx(expected[:2]) and expected[1] == 0.05 * (1 - 0.032)
    for step, value in ((4, expected[1]), (8, expected[2])):
        assert json.loads(Path(f"straight/checkpoint-{step}/ppo_state.json").read_text())["kl_coef"] == pytest.approx(
            value
        )


METRICS = (
    *(f"objective/{name}" for name in "kl kl_per_token score rlhf_reward non_score_reward entropy kl_coef".split()),  # noqa: SIM905
    *(f"policy/{name}" for name in "loss ratio ratio_max_dev approxkl clipfrac entropy".split()),  # noqa: SIM905
    *(f"critic/{name}" for name in "loss clipfrac value return explained_variance grad_norm learning_rate".split()),  # noqa: SIM905
    *(f"completions/{name}" for name in "mean_length min_length max_length clipped_ratio".split()),  # noqa: SIM905
    "rewards/share/mean", "rewards/share/std", "reward", "grad_norm", "padding_fraction", "time/generate",
)  # fmt: skip


def test_figures_are_there_and_finite_and_add_up(straight):
    first, second = ([row for row in straight.state.log_history if "loss" in row][k] for k in (0, 4))
    for row in (first, second):
        assert all(math.isfinite(row[name]) for name in METRICS)
        assert row["objective/rlhf_reward"] == pytest.approx(row["objective/score"] + row["objective/non_score_reward"])
        assert row["objective/non_score_reward"] == pytest.approx(-row["objective/kl_coef"] * row["objective/kl"])
        assert 0 < row["policy/entropy"] < math.log(VOCABULARY) and 0 < row["padding_fraction"] < 1
        assert row["loss"] == pytest.approx(row["policy/loss"], abs=1e-6)
    rollout = straight.rollout
    assert second["completions/mean_length"] == pytest.approx(rollout.lengths.float().mean().item())
    assert second["completions/clipped_ratio"] == pytest.approx(1 - rollout.ended.float().mean().item())
    assert second["objective/kl_per_token"] == pytest.approx((rollout.kl.sum() / rollout.lengths.sum()).item())
    assert second["objective/entropy"] == pytest.approx(-rollout.old_logprobs.sum(1).mean().item(), rel=1e-5)


EVALUATED = [f"eval_objective/{name}" for name in ("score", "kl", "rlhf_reward", "entropy")]


def test_evaluation_is_the_same_twice(straight):
    """By the same random numbers each time; between them the policy has learnt."""
    logged = [row for row in straight.state.log_history if "eval_objective/score" in row]
    assert [row["step"] for row in logged] == [4, 8] and logged[0] != logged[1]
    assert all(math.isfinite(row[name]) for row in logged for name in EVALUATED)
    still = trained(max_steps=8, learning_rate=STILL, evaluation=prompts(5), eval_strategy="steps", eval_steps=4)
    logged = [[row[name] for name in EVALUATED] for row in still.state.log_history if EVALUATED[0] in row]
    last = still.evaluate()
    assert logged[0] == logged[1] == [last[name] for name in EVALUATED] and len(logged) == 2


def test_every_held_out_prompt_counts_the_same():
    """In whatever batches they come, the last of which is smaller."""
    trainer = trained(evaluation=prompts(5), learning_rate=1e-3)
    found = []
    for size in (5, 2, 4):
        trainer.args.per_device_eval_batch_size = size
        whole = trainer.evaluate()
        found.append([whole[name] for name in EVALUATED])
    assert found[1] == pytest.approx(found[0], abs=1e-5) and found[2] == pytest.approx(found[0], abs=1e-5)


def test_evaluation_does_not_change_the_training(straight):
    other = trained(max_steps=8, kl_target=3.0, kl_horizon=100)
    assert moved(weights(other.model), weights(straight.model)) == 0
    assert steps(other, "loss", "critic/loss") == steps(straight, "loss", "critic/loss")


def test_the_best_model_is_kept():
    trainer = trained(
        out="best", max_steps=12, evaluation=prompts(8), eval_strategy="steps", eval_steps=4, save_strategy="best",
        metric_for_best_model="eval_objective/score", greater_is_better=True, load_best_model_at_end=True,
        learning_rate=3e-2,
    )  # fmt: skip
    scores = {
        row["step"]: row["eval_objective/score"] for row in trainer.state.log_history if "eval_objective/score" in row
    }
    best = max(scores, key=scores.get)
    assert trainer.state.best_metric == scores[best] and len(scores) == 3
    assert Path(trainer.state.best_model_checkpoint).name == f"checkpoint-{best}"
    saved = load_file(f"best/checkpoint-{best}/model.safetensors")
    assert all(torch.equal(value, weights(trainer.model)[name]) for name, value in saved.items())


def test_the_table_of_completions(capsys, monkeypatch):
    """A line for each completion, with prompt, score, advantage, and what reward functions log."""

    def noted(completion_ids, log_extra, log_metric, **columns):
        log_extra("first", [f"begins-{ids[0]}" for ids in completion_ids])
        log_metric("noted/length", 4.5)
        return share(completion_ids)

    monkeypatch.setenv("COLUMNS", "400")
    trainer = trained([noted], log_completions=True, num_completions_to_print=16, num_generations=1)
    out = capsys.readouterr().out
    lines = [line for line in out.splitlines() if "begins-" in line][:16]
    rollout, decode = trainer.rollout, trainer.processing_class.decode
    for row, (prompt, completion) in enumerate(completions(rollout)):
        length = int(rollout.lengths[row])
        cells = [
            decode(prompt), decode(completion, skip_special_tokens=True), f"begins-{completion[0]}",
            f"{rollout.rewards[row, 0].item():.2f}", f"{rollout.advantages[row, :length].mean().item():.2f}",
        ]  # fmt: skip
        assert any(all(cell in line for cell in cells) for line in lines), (cells, lines)
    assert steps(trainer, "noted/length")[0] == 4.5


# ---- checkpoints -----------------------------------------------------------------------------------


def test_a_checkpoint_is_a_policy_and_a_critic(straight):
    """Written at the end of a rollout, though asked for before; `from_pretrained` takes both."""
    assert sorted(path.name for path in Path("straight").glob("checkpoint-*")) == ["checkpoint-4", "checkpoint-8"]
    ids = torch.tensor([[1, 2, 3, 4]])
    with torch.no_grad():
        policy = AutoModelForCausalLM.from_pretrained("straight/checkpoint-8").eval()
        assert torch.equal(policy(ids).logits, straight.model.eval()(ids).logits)
        critic = AutoModelForSequenceClassification.from_pretrained("straight/checkpoint-8/critic").eval()
        value = straight.critic.model(ids, torch.tensor([[False, False, False, True]]))
    assert critic(ids).logits.item() == pytest.approx(value.item(), abs=1e-6) and abs(value.item()) > 1e-3
    assert critic.config.num_labels == 1


RESUMED = {
    "separate": {"critic_model": "judge"},
    "shared": {},
    "lora": {"peft_config": LORA, "critic_peft_config": CRITIC_LORA},
    "lora, another critic": {"peft_config": LORA, "critic_peft_config": CRITIC_LORA, "critic_model": "wide"},
    "lora, whole critic": {"peft_config": LORA, "critic_model": "wide"},
    "lora, shared": {"peft_config": LORA},
    "pretrained adapter": {"critic_model": "judge"},
}


@pytest.mark.parametrize("kind", RESUMED)
def test_resume_is_exact_to_the_bit(kind, stage):
    """Weights of policy and critic, and every figure but times, after a checkpoint between two rollouts."""
    keys = {
        "max_steps": 12, "save_strategy": "steps", "save_steps": 4, "kl_target": 3.0, "kl_horizon": 100,
        "lr_scheduler_type": "linear", "critic": "shared" if "shared" in kind else "separate", "options": RESUMED[kind],
    }  # fmt: skip

    def all_weights(trainer):
        value = trainer.critic.head if "shared" in kind else trainer.critic.model
        return weights(trainer.model), weights(value)

    def model():
        policy = AutoModelForCausalLM.from_pretrained("policy")
        return PeftModel.from_pretrained(policy, "adapter", is_trainable=True) if "adapter" in kind else policy

    def figures(trainer):
        rows = [row for row in trainer.state.log_history if "loss" in row]
        return [{k: v for k, v in row.items() if not k.startswith(("time/", "step_time"))} for row in rows]

    whole = trained(model=model(), out=f"whole-{kind}", **keys)
    resumed = trained(model=model(), out=f"resumed-{kind}", resume=f"whole-{kind}/checkpoint-4", **keys)
    assert figures(resumed) == figures(whole) and len(figures(whole)) == 12
    for one, other in zip(all_weights(whole), all_weights(resumed), strict=True):
        assert moved(one, other) == 0
    assert whole.kl_coef == resumed.kl_coef != 0.05
    assert whole.state.num_input_tokens_seen == resumed.state.num_input_tokens_seen > 0


@pytest.mark.parametrize("how", ["before", "after"])
@pytest.mark.parametrize("when", [1, 3])
def test_a_stop_waits_for_the_end_of_the_rollout(when, how):
    """Whether the callback that asks for it is called before the trainer's own or after it."""

    class Stop(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            if state.global_step == when:
                control.should_training_stop = control.should_save = True

    trainer = make(out=f"stop-{when}-{how}", max_steps=12, save_strategy="steps", save_steps=100)
    place = 0 if how == "before" else len(trainer.callback_handler.callbacks)
    trainer.callback_handler.callbacks.insert(place, Stop())
    trainer.train()
    assert trainer.state.global_step == 4
    assert [path.name for path in Path(f"stop-{when}-{how}").glob("checkpoint-*")] == ["checkpoint-4"]


# ---- what is refused -------------------------------------------------------------------------------

REFUSED = {
    "epochs": ({"num_ppo_epochs": 0}, "num_ppo_epochs must be at least 1"),
    "mini-batches": ({"num_mini_batches": 0}, "num_mini_batches must be at least 1"),
    "generations": ({"num_generations": 0}, "num_generations must be at least 1"),
    "length": ({"max_completion_length": 0}, "max_completion_length must be at least 1"),
    "no length": ({"max_completion_length": None}, "max_completion_length must be at least 1"),
    "temperature": ({"temperature": 0.0}, "temperature must be above 0: PPO needs completions that the policy draws"),
    "negative KL": ({"kl_coef": -0.1}, "kl_coef must not be negative, and above 0 with a kl_target above 0"),
    "target without KL": ({"kl_coef": 0.0, "kl_target": 6.0}, "kl_coef must not be negative, and above 0 with a kl_target above 0"),
    "target": ({"kl_target": 0.0}, "kl_coef must not be negative, and above 0 with a kl_target above 0"),
    "warm-up": ({"critic": "shared", "critic_warmup_rollouts": 1}, "critic_warmup_rollouts needs critic: separate: a shared one moves the policy too"),
    "sampler": ({"generation_kwargs": {"top_k": 5}}, "generation_kwargs: top_k may draw from another distribution than the policy's"),
    "generations do not divide": ({"num_generations": 3}, "num_generations 3 does not divide the 16 completions of a process"),
    "max_steps": ({"max_steps": 6}, "max_steps 6 is not a multiple of the 4 steps of a rollout: use 8"),
    "eval_steps": ({"metric_for_best_model": "eval_objective/score", "eval_strategy": "steps", "eval_steps": 3, "save_strategy": "best"}, "eval_steps 3 is not a multiple of the 4 steps of a rollout: use 4"),
    "save_steps": ({"load_best_model_at_end": True, "eval_strategy": "steps", "eval_steps": 2, "save_strategy": "steps", "save_steps": 2}, "save_steps 2 is not a multiple of the 4 steps of a rollout: use 4"),
    "top_p": ({"top_p": 0.9}, "unexpected keyword argument 'top_p'"),
    "beta": ({"beta": 0.1}, "unexpected keyword argument 'beta'"),
}  # fmt: skip


@pytest.mark.parametrize("how", REFUSED)
def test_a_config_that_makes_no_sense_is_refused(how):
    keys, said = REFUSED[how]
    with pytest.raises((ValueError, TypeError)) as error:
        make(**keys)
    assert said in str(error.value)


def test_fp16_is_refused():
    with pytest.raises(
        ValueError, match="fp16: use bf16: true: a second optimizer has no place in fp16's loss scaling"
    ):
        PPOConfig("out", fp16=True, bf16=False, use_cpu=True, report_to="none")


def test_every_problem_is_named_at_once():
    with pytest.raises(ValueError, match=r"num_ppo_epochs.*; temperature.*; kl_coef"):
        make(num_ppo_epochs=0, temperature=-1.0, kl_coef=-1.0)


def test_what_the_trainer_refuses():
    with pytest.raises(UserError, match="PPO takes its prompts by number: give a Dataset, not a stream"):
        make(train=prompts().to_iterable_dataset())
    for options in ({"critic_model": "judge"}, {"critic_peft_config": CRITIC_LORA}):
        with pytest.raises(
            UserError, match="critic: shared is a layer on the policy: a critic model has no place in it"
        ):
            make(critic="shared", options=options)
    with pytest.raises(UserError, match="num_train_epochs: the run has 3 steps and a rollout 4: set max_steps"):
        trained(max_steps=-1, num_train_epochs=0.375)


@pytest.mark.parametrize("asked", [False, True])
def test_experts_with_a_balance_loss_are_refused(asked):
    """And trained without one, as the refusal says, also where the config asks for what the router says."""
    experts = {"num_local_experts": 2, "num_experts_per_tok": 1, "num_key_value_heads": 2}
    save_model("experts", model_type="mixtral", output_router_logits=asked, router_aux_loss_coef=0.01, **experts)
    with pytest.raises(UserError, match="PPO trains no balance loss of experts: set router_aux_loss_coef: 0"):
        make(model="experts")
    trainer = trained(model="experts", router_aux_loss_coef=0.0)
    assert steps(trainer, "policy/ratio_max_dev")[0] == 0.0 and trainer.state.global_step == 4


@pytest.mark.parametrize("kind", ["reward", "reward, shared", "critic"])
def test_what_is_not_finite_stops_the_run_before_an_update(kind):
    policy = AutoModelForCausalLM.from_pretrained("policy")
    start = weights(policy)
    given = [math.inf] * 16 if "reward" in kind else None
    trainer = make(lambda completion_ids, **_: given or share(completion_ids), model=policy,
                   critic="shared" if "shared" in kind else "separate")  # fmt: skip
    if kind == "critic":
        with torch.no_grad():
            trainer.critic.model.score.weight.fill_(math.inf)
    with pytest.raises(
        Diverged, match=r"critic is not finite; stopped before its update\. Look at critic/loss and the scores"
    ):
        trainer.train()
    assert moved(start, weights(policy)) == 0


# ---- the sampler -----------------------------------------------------------------------------------


def test_draws_have_the_models_frequencies():
    """4,000 draws of two tokens: chi-square of the first, and of the second after the likeliest first, within the
    99.9 % quantile; at another temperature than theirs, far beyond it."""
    policy, n, temperature = AutoModelForCausalLM.from_pretrained("policy"), 4000, 0.7
    uniforms = torch.from_numpy(np.random.default_rng(0).random((n, 2), np.float32))
    drawn = generate(policy, [[3, 4]] * n, PAD, 2, uniforms, temperature, [EOS], batch_size=1000)

    def statistic(tokens, prompt, temperature):
        with torch.no_grad():
            expected = (policy(torch.tensor([prompt])).logits[0, -1].double() / temperature).softmax(-1).numpy() * len(
                tokens
            )
        counts = np.bincount(tokens, minlength=VOCABULARY)
        rare = expected < 5  # together they are one cell
        cells = [
            *zip(counts[~rare], expected[~rare], strict=True),
            (counts[rare].sum(), max(expected[rare].sum(), 1e-9)),
        ]
        degrees = len(cells) - 1
        limit = degrees * (1 - 2 / (9 * degrees) + 3.09 * math.sqrt(2 / (9 * degrees))) ** 3  # Wilson and Hilferty
        return sum((count - e) ** 2 / e for count, e in cells) / limit

    first = [ids[0] for ids in drawn]
    assert statistic(first, [3, 4], temperature) < 1 < statistic(first, [3, 4], 1.0)
    top = Counter(token for token in first if token != EOS).most_common(1)[0][0]
    second = [ids[1] for ids in drawn if ids[0] == top]
    assert len(second) > 200 and statistic(second, [3, 4, top], temperature) < 1
    assert all(len(ids) == 1 for ids in drawn if ids[0] == EOS) and EOS in first


def test_a_draw_follows_from_its_own_numbers():
    """Whatever stands beside it, and in any batch."""
    policy = AutoModelForCausalLM.from_pretrained("policy")
    ids = [AutoTokenizer.from_pretrained("policy")(text)["input_ids"] for text in prompts()["prompt"]]
    uniforms = torch.from_numpy(np.random.default_rng(1).random((32, 10), np.float32))
    whole = generate(policy, ids, PAD, 10, uniforms, 1.0, [EOS], batch_size=32)
    assert whole == generate(policy, ids, PAD, 10, uniforms, 1.0, [EOS], batch_size=5)
    order = np.random.default_rng(2).permutation(32)
    mixed = generate(policy, [ids[i] for i in order], PAD, 10, uniforms[order], 1.0, [EOS], batch_size=7)
    assert [whole[i] for i in order] == mixed and len({tuple(row) for row in whole}) > 25
    assert whole != generate(policy, ids, PAD, 10, uniforms.flip(0), 1.0, [EOS], batch_size=32)


def test_rollouts_differ_by_number_and_seed():
    first, second = trained(learning_rate=STILL, max_steps=8), trained(learning_rate=STILL, max_steps=8, seed=2)
    kept, again = (first.collect(first.prompts_of(0), [(101, k, i) for i in range(16)], 0)[0] for k in (0, 1))
    assert completions(kept) != completions(again) and completions(first.rollout) != completions(second.rollout)


# ---- it learns -------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", [1, 2, 3])
def test_it_learns_the_toy_task(seed):
    """Tokens below t32 of 128, from a score near 1/4: 0.8 and more in the 23rd rollout, with values that explain it."""
    tokenizer = word_tokenizer(128, pad_token="t126", eos_token="t127")
    toy = {"vocab_size": 128, "hidden_size": 64, "intermediate_size": 128, "num_attention_heads": 4}
    ids = {"pad_token_id": 126, "eos_token_id": 127, "initializer_range": 0.02}
    save_model(f"toy{seed}", seed=seed, **toy, **ids)
    rng = np.random.default_rng(seed)
    rows = Dataset.from_list([{"prompt_ids": rng.integers(0, 120, 8).tolist()} for _ in range(512)])
    trainer = trained(
        lambda completion_ids, **_: [sum(token < 32 for token in ids) / len(ids) for ids in completion_ids],
        model=AutoModelForCausalLM.from_pretrained(f"toy{seed}"), tokenizer=tokenizer, train=rows, seed=seed,
        per_device_train_batch_size=8, gradient_accumulation_steps=4, num_mini_batches=2, num_ppo_epochs=4, max_steps=184,
        max_completion_length=16, learning_rate=1e-3, critic_learning_rate=3e-3, kl_coef=0.02, lam=1.0, logging_steps=8,
    )  # fmt: skip
    curve = steps(trainer, "objective/score", "objective/kl", "critic/explained_variance")
    assert len(curve) == 23 and curve[0][0] < 0.35 and curve[0][1] == 0.0
    assert curve[-1][0] >= 0.8 and curve[-1][2] > 0.3, curve
