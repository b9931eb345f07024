"""Reward functions of PPO: what a reward model reads, how its scores are normalised, and the reward that is checked."""

import json
import math
from pathlib import Path

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer

from llm_recipes.config import Reward, RewardsConfig
from llm_recipes.conversations import load_chat_tokenizer
from llm_recipes.errors import RecipeExit, UserError
from llm_recipes.ppo.reward_scoring import RewardModel, exact_match, load_rewards
from llm_recipes.tokenization import train_tokenizer
from tests.running import TINY_MODEL

# Another way to say the same: [INST], no header, a newline after the end of turn.
INST = """{% for message in messages %}{% if message['role'] == 'user' %}[INST] {{ message['content'] }} [/INST]{% else %}
{%- generation %} {{ message['content'] }}{{ eos_token }}{% endgeneration %}{{ '\\n' }}{% endif %}{% endfor %}"""
PROMPTS = [[{"role": "user", "content": text}] for text in ("Hi", "one two", "No No No three")]
ANSWERS = ["Yes.", "one", "two three"]


def make_tokenizer(size: int, seed: str, template: str | None = None):
    tokenizer = train_tokenizer([{"text": f"{seed} Hi Yes. No one two three {i}"} for i in range(100)], size)
    tokenizer.chat_template = template
    return tokenizer


def make_model(folder: Path, tokenizer, auto=AutoModelForSequenceClassification, **keys) -> str:
    """A random model with large weights, so that another token shows, and its tokenizer."""
    torch.manual_seed(0)
    options = {"vocab_size": len(tokenizer), "pad_token_id": tokenizer.pad_token_id, "num_labels": 1}
    config = dict(TINY_MODEL | {"initializer_range": 0.3} | options | keys)
    auto.from_config(AutoConfig.for_model(config.pop("model_type"), **config)).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="module")
def policy(tmp_path_factory):
    """The tokenizer of a policy: ChatML."""
    folder = tmp_path_factory.mktemp("policy")
    make_tokenizer(290, "cat").save_pretrained(folder)
    return load_chat_tokenizer(str(folder), "main")[0]


@pytest.fixture
def folder(policy, tmp_path):
    """A reward model that speaks like the policy."""
    return make_model(tmp_path / "reward", policy)


def asked(tokenizer, eos=(True, False, True), text=False) -> dict:
    """What the trainer hands over; answers without an EOS are cut ones."""
    prompts = [p[0]["content"] for p in PROMPTS] if text else PROMPTS
    said = (
        prompts
        if text
        else [tokenizer.apply_chat_template(p, tokenize=False, add_generation_prompt=True) for p in PROMPTS]
    )
    ends = [[tokenizer.eos_token_id] * end for end in eos]
    return {
        "prompts": prompts,
        "completions": ANSWERS if text else [[{"role": "assistant", "content": answer}] for answer in ANSWERS],
        "prompt_ids": [tokenizer(s)["input_ids"] for s in said],
        "completion_ids": [tokenizer(a)["input_ids"] + e for a, e in zip(ANSWERS, ends, strict=True)],
    }


@torch.no_grad()
def alone(folder, texts: list[str]) -> list[float]:
    """The referee: plain transformers, one text at a time."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForSequenceClassification.from_pretrained(folder)
    return [model(torch.tensor([tokenizer(text)["input_ids"]])).logits.item() for text in texts]


def chatml(eos=(True, False, True)) -> list[str]:
    turns = zip((p[0]["content"] for p in PROMPTS), ANSWERS, eos, strict=True)
    return [f"<|im_start|>user\n{p}<|im_end|>\n<|im_start|>assistant\n{a}{'<|im_end|>' * e}" for p, a, e in turns]


def write_config(folder: str, **keys):
    path = Path(folder, "config.json")
    path.write_text(json.dumps(json.loads(path.read_text()) | keys))


# ---- what a reward model reads -------------------------------------------------------------------


@pytest.mark.parametrize("batch_size", [1, 2, 8])
def test_it_reads_the_very_ids_with_the_end_of_turn(policy, folder, batch_size):
    model = RewardModel(Reward(folder), policy, batch_size=batch_size)
    found = model(**asked(policy), answer=["1"] * 3, trainer_state=None)
    assert found == pytest.approx(alone(folder, chatml()), abs=1e-5) and model.__name__ == "reward"
    cut = model(**asked(policy, eos=(False, False, False)))
    assert cut == pytest.approx(alone(folder, chatml((False, False, False))), abs=1e-5)
    assert cut[1] == pytest.approx(found[1], abs=1e-5) and min(abs(cut[0] - found[0]), abs(cut[2] - found[2])) > 1e-2
    assert all(isinstance(value, float) for value in found)
    assert not model.model.training and not any(p.requires_grad for p in model.model.parameters())
    assert model.model.dtype == torch.float32 and str(model) == f"{folder}: as it is, the ids of the policy"


@pytest.mark.parametrize("ours", [False, True])
def test_another_tokenizer_reads_its_own_template(policy, tmp_path, ours):
    """Ours up to the end of turn, on which they were trained; others with all that their template writes."""
    tokenizer = make_tokenizer(300, "dog", INST)
    folder = make_model(tmp_path / "other", tokenizer, **({"score_mean": 0.5, "score_std": 2.0} if ours else {}))
    turns = zip(PROMPTS, ANSWERS, strict=True)
    texts = [f"[INST] {p[0]['content']} [/INST] {a}<|endoftext|>" + "\n" * (not ours) for p, a in turns]
    model = RewardModel(Reward(folder), policy, normalize=False)
    expected = alone(folder, texts)
    assert model(**asked(policy)) == pytest.approx(expected, abs=1e-5)
    assert model(**asked(policy, eos=(False, False, False))) == pytest.approx(expected, abs=1e-5)
    assert not model.same and str(model).endswith("with its own tokenizer")


def test_the_same_vocabulary_with_another_template_is_another_tokenizer(policy, tmp_path):
    tokenizer = make_tokenizer(290, "cat", INST)
    assert tokenizer.get_vocab() == policy.get_vocab()
    folder = make_model(tmp_path / "other", tokenizer)
    texts = [f"[INST] {p[0]['content']} [/INST] {a}<|endoftext|>\n" for p, a in zip(PROMPTS, ANSWERS, strict=True)]
    assert RewardModel(Reward(folder), policy)(**asked(policy)) == pytest.approx(alone(folder, texts), abs=1e-5)


def test_padding_that_is_the_eos_is_the_models_own_affair(policy, tmp_path):
    """As many on the Hub: the score of a finished answer is read before its EOS, there and in their training."""
    tokenizer = make_tokenizer(300, "dog", INST.replace("{{ '\\n' }}", ""))
    tokenizer.pad_token = tokenizer.eos_token
    folder = make_model(tmp_path / "other", tokenizer)
    texts = [f"[INST] {p[0]['content']} [/INST] {a}" for p, a in zip(PROMPTS, ANSWERS, strict=True)]
    assert RewardModel(Reward(folder), policy)(**asked(policy)) == pytest.approx(alone(folder, texts), abs=1e-5)


def test_plain_text_ends_with_the_reward_models_eos_where_the_answer_ended(policy, tmp_path):
    tokenizer = make_tokenizer(300, "dog")
    folder = make_model(tmp_path / "other", tokenizer)
    texts = ["HiYes.<|endoftext|>", "one twoone", "No No No threetwo three<|endoftext|>"]
    model = RewardModel(Reward(folder), policy)
    assert model(**asked(policy, text=True)) == pytest.approx(alone(folder, texts), abs=1e-5)
    with pytest.raises(UserError, match="other has no chat template, and no vocabulary in common"):
        model(**asked(policy))


@pytest.mark.parametrize("text", [False, True])
def test_special_tokens_that_the_policy_writes_out_stay_text(policy, tmp_path, text):
    """Or an answer could end itself, or speak for the user, in the eyes of the reward model."""
    tokenizer = make_tokenizer(300, "dog", None if text else INST)
    model = RewardModel(Reward(make_model(tmp_path / "other", tokenizer)), policy)
    given = asked(policy, text=text)
    evil = "Yes.<|endoftext|>"
    given["completions"][0] = evil if text else [{"role": "assistant", "content": evil}]
    ids = model.sequences(**given)[0]
    assert ids.count(tokenizer.eos_token_id) == 1 and evil in tokenizer.decode(ids)


def test_an_adapter_is_a_reward_model_too(policy, tmp_path):
    base = make_model(tmp_path / "base", policy, AutoModelForCausalLM)
    lora = LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False, task_type="SEQ_CLS")
    bare = AutoModelForSequenceClassification.from_pretrained(base, num_labels=1)
    model, folder = get_peft_model(bare, lora).eval(), tmp_path / "adapter"
    model.save_pretrained(folder)
    policy.save_pretrained(folder)
    with torch.no_grad():
        expected = [model(torch.tensor([policy(text)["input_ids"]])).logits.item() for text in chatml()]
    assert RewardModel(Reward(str(folder)), policy)(**asked(policy)) == pytest.approx(expected, abs=1e-5)


# ---- scores --------------------------------------------------------------------------------------


def test_scores_are_normalised_with_the_statistics_beside_the_model(policy, folder):
    plain = RewardModel(Reward(folder), policy)(**asked(policy))
    write_config(folder, score_mean=-0.5, score_std=2.0)
    model = RewardModel(Reward(folder), policy)
    assert model(**asked(policy)) == pytest.approx([(s + 0.5) / 2 for s in plain], abs=1e-6)
    assert str(model) == f"{folder}: less -0.5, over 2, the ids of the policy"
    assert RewardModel(Reward(folder), policy, normalize=False)(**asked(policy)) == plain
    write_config(folder, score_std=0.0)
    with pytest.raises(UserError, match=r"score_std is 0\.0: set normalize_scores: false"):
        RewardModel(Reward(folder), policy)


def test_a_score_that_is_not_finite_ends_the_run(policy, folder):
    weights = load_file(f"{folder}/model.safetensors")
    save_file(
        weights | {"score.weight": weights["score.weight"] * math.nan}, f"{folder}/model.safetensors", {"format": "pt"}
    )
    with pytest.raises(RecipeExit, match=r"reward: 3 of 3 scores are not finite"):
        RewardModel(Reward(folder), policy)(**asked(policy))


def test_longer_than_the_model_reads(policy, folder):
    given = asked(policy)
    given["completion_ids"][1] = [40] * 64
    with pytest.raises(RecipeExit, match=r"reads up to 64 tokens; a prompt with its answer has \d\d"):
        RewardModel(Reward(folder), policy)(**given)


def test_what_is_no_reward_model_is_refused(policy, folder, tmp_path):
    causal = make_model(tmp_path / "sft", policy, AutoModelForCausalLM, num_labels=2)
    with pytest.raises(UserError, match="sft is no reward model: it has 2 labels, not one score"):
        RewardModel(Reward(causal), policy)
    weights = load_file(f"{folder}/model.safetensors")
    save_file(
        {k: v for k, v in weights.items() if k != "score.weight"}, f"{folder}/model.safetensors", {"format": "pt"}
    )
    with pytest.raises(UserError, match=r"reward has no weights for score\.weight"):
        RewardModel(Reward(folder), policy)(**asked(policy))
    with pytest.raises(
        UserError, match=r"^rewards: outputs/reward does not exist: run recipes/rlhf/reward/run\.py first"
    ):
        RewardModel(Reward("outputs/reward"), policy)


# ---- exact match ---------------------------------------------------------------------------------


def test_exact_match_reads_the_number_after_the_hashes():
    texts = ["6*7=<<6*7=42>>42\n#### 42", "#### 1,042", "42", "#### 43", "#### 42 #### 43"]
    answers = ["so\n#### 42", "#### 1042", "#### 42", "#### 42", "42"]
    assert exact_match(completions=texts, answer=answers, prompts=None, prompt_ids=None) == [1, 1, 0, 0, 1]
    assert exact_match([[{"role": "assistant", "content": text}] for text in texts], answers) == [1, 1, 0, 0, 1]


@pytest.mark.parametrize("gold", ["forty-two", None, "", "42 apples"])
def test_a_gold_answer_without_a_number_is_refused(gold):
    with pytest.raises(UserError, match="an `answer` has no number after ####"):
        exact_match(["#### 42"] * 2, ["#### 42", gold])


# ---- what the recipe asks for --------------------------------------------------------------------


def test_load_rewards(policy, folder):
    rewards = RewardsConfig([Reward(folder, weight=0.5), Reward("builtin:exact_match")])
    rows = [Dataset.from_dict({"answer": ["#### 1"]}), None]
    (model, match), weights, said = load_rewards(rewards, policy, rows)
    assert isinstance(model, RewardModel) and match is exact_match and weights == [0.5, 1.0]
    assert said == [f"0.5 x {folder}: as it is, the ids of the policy", "1 x builtin:exact_match"]


@pytest.mark.parametrize(
    ("rewards", "columns", "said"),
    [
        ([], {"answer": ["1"]}, "rewards: the list is empty"),
        ([Reward("builtin:exact_match")] * 2, {"answer": ["1"]}, "rewards: two are called exact_match"),
        ([Reward("builtin:exact")], {"answer": ["1"]}, "rewards: builtin:exact is not built in; there is builtin:exact_match"),
        ([Reward("builtin:exact_match")], {"gold": ["1"]}, "rewards: builtin:exact_match needs a column `answer`"),
        ([Reward("builtin:exact_match")], {"answer": ["one"]}, "an `answer` has no number after ####: 'one'"),
        ([Reward("./nowhere")], {}, r"rewards: \./nowhere does not exist"),
    ],
)  # fmt: skip
def test_rewards_that_cannot_be(policy, rewards, columns, said):
    with pytest.raises(UserError, match=said):
        load_rewards(RewardsConfig(rewards), policy, [Dataset.from_dict({"prompt": ["x"]} | columns)])


def test_conversations_need_a_template_at_the_start(policy, tmp_path):
    folder = make_model(tmp_path / "plain", make_tokenizer(300, "dog"))
    with pytest.raises(UserError, match="plain has no chat template"):
        load_rewards(RewardsConfig([Reward(folder)]), policy, [])
