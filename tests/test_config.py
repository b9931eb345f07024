import dataclasses
import typing

import pytest
import trl
from transformers import TrainingArguments

from llm_recipes.config import (
    AdapterConfig,
    AnswerConfig,
    ConversationConfig,
    DataConfig,
    ModelConfig,
    ObjectiveConfig,
    OptimizationConfig,
    PromptConfig,
    RewardModelConfig,
    RewardsConfig,
    RunConfig,
    TokenizerConfig,
    TokenizerTrainingConfig,
    WindowConfig,
    cast,
    parse,
)
from llm_recipes.errors import UserError
from llm_recipes.ppo import PPOConfig
from tests.running import ROOT

PARTS = (
    RunConfig, DataConfig, WindowConfig, ObjectiveConfig, OptimizationConfig, TokenizerConfig, ModelConfig,
    TrainingArguments,
)  # fmt: skip
BASE = "output_dir: out\ndatasets:\n  - path: builtin:python\n"


def parse_text(tmp_path, text, *argv, parts=PARTS):
    (tmp_path / "config.yaml").write_text(text)
    return parse(*parts, script=str(tmp_path / "run.py"), argv=list(argv))


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("learnin_rate: 1e-3", "config.yaml:4: unknown key `learnin_rate`, did you mean `learning_rate`?"),
        ("zzz: 1", "config.yaml:4: unknown key `zzz`"),
        ("env: {A: 1}", "unknown key `env`"),
        ("learning_rate: true", "learning_rate: expects a number, got true"),
        ("learning_rate: fast", "learning_rate: expects a number, got 'fast'"),
        ("learning_rate: 0.1abc", "learning_rate: expects a number"),
        ("learning_rate: [1e-4, 2e-4]", "learning_rate: expects a number, got [0.0001, 0.0002]"),
        ("learning_rate: .nan", "learning_rate: expects a finite number"),
        ("learning_rate: null", "learning_rate: expects a number, got null"),
        ("learning_rate: -0.1", "learning_rate: must be at least 0, got -0.1"),
        ("per_device_train_batch_size: 4.5", "per_device_train_batch_size: expects a whole number, got 4.5"),
        ("per_device_train_batch_size: 0", "must be at least 1"),
        ("max_steps: '10'", "max_steps: expects a whole number, got '10'"),
        ("bf16: no", "bf16: expects true or false, got 'no'"),
        ("eval_strategy: maybe", "eval_strategy: expects one of no, steps, epoch; got 'maybe'"),
        ("optim: adamw_torch_fussed", "optim: expects one of adamw_torch"),
        ("log_level: loud", "log_level: expects one of detail, debug"),
        ("max_steps: 1\nmax_steps: 2", "config.yaml: max_steps is set twice (lines 4 and 5)"),
        ("model_config: {hidden_size: 1, hidden_size: 2}", "hidden_size is set twice (lines 4 and 4)"),
        ("sample_prompts: [1]", "sample_prompts: expects text, got 1"),
        ("hub_token: hf_x", "`hub_token` is not taken: tokens do not belong in configs"),
        ("deepspeed: ds.json", "the strategy comes from accelerate_configs/"),
        ("resume_from_checkpoint: true", "use `resume: auto | never | <path>`"),
        ("a: b: c", "config.yaml:4: mapping values are not allowed here"),
        ("\tmax_steps: 1", "config.yaml:4:"),
        ("x: !!python/object/apply:os.system [ls]", "config.yaml:4: could not determine a constructor"),
        ("load_best_model_at_end: true", "--load_best_model_at_end requires the save and eval strategy to match"),
        ("global_batch_size: 8\ngradient_accumulation_steps: 2", "derived from global_batch_size"),
    ],
)
def test_bad_value(tmp_path, line, message):
    with pytest.raises(UserError) as error:
        parse_text(tmp_path, BASE + line + "\n")
    assert message in str(error.value)
    assert len(str(error.value).splitlines()) == 1


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        ("path: x, split: 3", "datasets: split: expects text, got 3"),
        ("path: x, wieght: 1", "datasets: unknown key `wieght`, did you mean `weight`?"),
        ("name: x", "datasets: missing 1 key: 'path'"),
    ],
)
def test_bad_source(tmp_path, entry, message):
    with pytest.raises(UserError, match="datasets") as error:
        parse_text(tmp_path, f"output_dir: out\ndatasets: [{{{entry}}}]\n")
    assert message in str(error.value)


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        ("{path: x, weight: much}", "rewards: weight: expects a number, got 'much'"),
        ("{path: x, wieght: 1}", "rewards: unknown key `wieght`, did you mean `weight`?"),
        ("{weight: 1}", "rewards: missing 1 key: 'path'"),
        ("outputs/reward", "rewards: expects keys such as `path: ...`, got 'outputs/reward'"),
    ],
)
def test_bad_reward(tmp_path, entry, message):
    with pytest.raises(UserError) as error:
        parse_text(tmp_path, f"{BASE}rewards: [{entry}]\n", parts=(PromptConfig, RewardsConfig, PPOConfig))
    assert str(error.value).endswith(message) and len(str(error.value).splitlines()) == 1


def test_rewards_have_their_weights_with_them(tmp_path):
    lines = "rewards: [{path: a/b, revision: v1, weight: 2}, {path: builtin:exact_match}]\n"
    _, found, _ = parse_text(tmp_path, BASE + lines, parts=(PromptConfig, RewardsConfig, PPOConfig))
    assert [vars(reward) for reward in found.rewards] == [
        {"path": "a/b", "weight": 2, "revision": "v1"},
        {"path": "builtin:exact_match", "weight": 1.0, "revision": "main"},
    ]
    with pytest.raises(UserError, match="`reward_weights` is not taken: each of `rewards` has a `weight`"):
        parse_text(tmp_path, f"{BASE}{lines}reward_weights: [1]\n", parts=(PromptConfig, RewardsConfig, PPOConfig))


def test_all_problems_at_once(tmp_path):
    with pytest.raises(UserError) as error:
        parse_text(tmp_path, "output_dir: out\nlr: 1\nbf16: 3\n", "--max_step", "4")
    text = str(error.value).splitlines()
    assert len(text) == 4 and "lr" in text[0] and "bf16" in text[1] and "did you mean `max_steps`" in text[2]
    assert "`datasets` is missing" in text[3]


def test_values_as_written(tmp_path):
    run, data, _, _, _, _, model, args = parse_text(
        tmp_path,
        BASE + "learning_rate: 5e-7\neval_strategy: no\nsave_strategy: no\nwarmup_steps: 3\nrun_name: on\n"
        "lr_scheduler_kwargs: {min_lr_rate: 1e-1}\nmodel_config: {model_type: llama, tie_word_embeddings: true}\n",
    )
    assert args.learning_rate == 5e-7 and args.eval_strategy == "no" and args.run_name == "on"
    assert args.lr_scheduler_kwargs == {"min_lr_rate": 0.1} and model.model_config["tie_word_embeddings"] is True
    assert data.datasets[0].path == "builtin:python" and data.datasets[0].split == "train"
    assert args.logging_nan_inf_filter is False and args.use_cpu is True and args.bf16 is False
    assert run.resolved["learning_rate"] == 5e-7 and "seed" not in run.resolved


def test_command_line_overrides(tmp_path):
    other = tmp_path / "other.yaml"
    other.write_text(BASE + "max_steps: 7\n")
    for form in (["--config", str(other)], [f"--config={other}"]):
        assert parse_text(tmp_path, BASE, *form)[-1].max_steps == 7
    run, data, *_, args = parse_text(
        tmp_path, BASE + "max_steps: 5\n", "--max-steps=9", "--dry_run", "--learning_rate", "1e-3", "--run_name", "7",
        "--datasets", "[{path: a.txt, weight: 2}]", "--sample_prompts", "[a, b]",
    )  # fmt: skip
    assert args.max_steps == 9 and run.dry_run and args.learning_rate == 1e-3 and args.run_name == "7"
    assert data.datasets[0].weight == 2 and run.sample_prompts == ["a", "b"]
    for argv, message in (
        (["--max_steps", "x"], "command line: max_steps: expects a whole number, got 'x'"),
        (["--seed", "1", "--seed", "2"], "--seed is given twice"),
        (["seed"], "`seed` is not an option"),
        (["--optim", "foo"], "expects one of"),
    ):
        with pytest.raises(UserError) as error:
            parse_text(tmp_path, BASE, *argv)
        assert message in str(error.value)


@pytest.mark.parametrize("text", ["", "- a\n", "just words\n"])
def test_file_without_mapping(tmp_path, text):
    with pytest.raises(UserError, match="has none"):
        parse_text(tmp_path, text)


def test_missing_file(tmp_path):
    with pytest.raises(UserError, match=r"nowhere\.yaml: cannot read this config: No such file"):
        parse_text(tmp_path, BASE, "--config", "nowhere.yaml")


@pytest.mark.parametrize(
    ("world_size", "limit", "batch", "expected"),
    [
        (1, 16, 32, (16, 2)),
        (2, 16, 32, (16, 1)),
        (8, 16, 32, (4, 1)),
        (1, 12, 32, (8, 4)),
        (64, 4, 512, (4, 2)),
        (1, 8, 7, (7, 1)),
    ],
)
def test_batch_is_the_same_on_any_world_size(tmp_path, monkeypatch, world_size, limit, batch, expected):
    from llm_recipes import config

    monkeypatch.setenv("WORLD_SIZE", str(world_size))
    values = {"global_batch_size": batch, "per_device_train_batch_size": limit}
    assert config._derive(values) == []
    assert (values["per_device_train_batch_size"], values["gradient_accumulation_steps"]) == expected
    assert expected[0] * expected[1] * world_size == batch


def test_batch_that_does_not_divide(monkeypatch):
    from llm_recipes import config

    monkeypatch.setenv("WORLD_SIZE", "3")
    assert config._derive({"global_batch_size": 32}) == [
        "global_batch_size 32 does not divide over 3 processes: use a multiple of 3"
    ]


def test_accelerate_precision_is_not_overridden_silently(monkeypatch):
    from llm_recipes import config

    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "bf16")
    assert "mixed_precision: bf16" in config._derive({"bf16": False})[0]
    values = {}
    assert config._derive(values) == [] and values["bf16"] is True


@pytest.mark.parametrize("cls", [TrainingArguments, trl.SFTConfig, PPOConfig])
def test_library_defaults_pass_their_own_types(cls):
    hints = typing.get_type_hints(cls)
    wrong = {}
    for field in dataclasses.fields(cls):
        if not field.init or field.default in (dataclasses.MISSING, None):
            continue
        try:
            assert cast(field.default, hints[field.name], list(field.metadata.get("choices", []))) == field.default
        except ValueError as error:
            wrong[field.name] = str(error)
    assert wrong == {}


CHAT = (RunConfig, ConversationConfig, AdapterConfig, trl.ModelConfig)
PARSED_BY = {
    "recipes/pretrain": PARTS,
    "recipes/tokenizer": (TokenizerTrainingConfig, DataConfig),
    "recipes/sft": (*CHAT, AnswerConfig, trl.SFTConfig),
    "recipes/rlhf/reward": (*CHAT, RewardModelConfig, trl.RewardConfig),
    "recipes/dpo": (*CHAT, AnswerConfig, trl.DPOConfig),
    "recipes/rlhf/ppo": (
        RunConfig,
        PromptConfig,
        RewardsConfig,
        AdapterConfig,
        trl.ModelConfig,
        AnswerConfig,
        PPOConfig,
    ),
}
RECIPE_YAMLS = sorted((ROOT / "recipes").rglob("*.yaml"))


@pytest.mark.parametrize("path", RECIPE_YAMLS, ids=lambda p: str(p.relative_to(ROOT)))
def test_every_recipe_yaml_parses(path):
    parse(
        *PARSED_BY[str(path.parent.relative_to(ROOT))], script=str(path.parent / "run.py"), argv=["--config", str(path)]
    )


def test_every_yaml_is_known():
    """A YAML added anywhere must be covered by a test; change the counts together with the tree."""
    accelerate = {p.stem for p in (ROOT / "accelerate_configs").glob("*.yaml")}
    assert len(accelerate) == 22
    assert len(RECIPE_YAMLS) == 29
    tracked = [p for p in ROOT.rglob("*.yaml") if not {".venv", "outputs"} & set(p.relative_to(ROOT).parts)]
    assert len(tracked) == len(RECIPE_YAMLS) + len(accelerate) + len(["eval/config.yaml"])
