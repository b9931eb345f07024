"""The PPO recipe: what it says before it starts, what it leaves behind, and which input it refuses. The trainer has tests of its own."""

import json
import shutil
import signal
from pathlib import Path

import pytest
import yaml
from safetensors.torch import load_file

from llm_recipes.checkpoints import checkpoints
from tests.running import (
    PPO,
    REWARD,
    ROOT,
    SHIMS,
    STRATEGIES,
    check_same_training,
    history,
    launch,
    metrics,
    post_training_stage,
    run,
    write_rows,
)

PROMPTS, ANSWERS = ({"path": f"builtin:arithmetic/{view}", "rows": 16} for view in ("prompts", "test"))
REWARDS = [{"path": "./scorer", "weight": 0.5}, {"path": "builtin:exact_match"}]


@pytest.fixture(scope="module", autouse=True)
def stage(tmp_path_factory):
    """The folder that all tests here work in, with a reward model and two rollouts of 8 problems to train on."""
    folder = post_training_stage(tmp_path_factory.mktemp("ppo"))
    (folder / "recipes").symlink_to(ROOT / "recipes")
    keys = yaml.safe_load((folder / "tiny.yaml").read_text())
    del keys["max_length"]
    keys |= {
        "model_name_or_path": "chat", "datasets": [PROMPTS], "eval_datasets": [PROMPTS | {"split": "test"}],
        "rewards": REWARDS, "max_prompt_length": 400, "max_completion_length": 12, "max_steps": 8, "save_steps": 8,
        "learning_rate": 1e-3, "temperature": 0.7,
    }  # fmt: skip
    (folder / "ppo.yaml").write_text(yaml.safe_dump(keys))
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        argv = ["--config", "tiny.yaml", "--output_dir", "scorer", "--model_name_or_path", "chat"]
        assert run(*argv, "--score_samples", "8", "--max_new_tokens", "8", script=REWARD).code == 0
        yield folder


def ppo(out, *argv, **options):
    return run("--config", "ppo.yaml", "--output_dir", out, *argv, script=PPO, **options)


@pytest.fixture(scope="module")
def one(stage):
    done = ppo("one", "--answers", json.dumps(ANSWERS), "--max_new_tokens", "8")
    assert done.code == 0, done.err
    return done


def test_the_first_screen_says_what_will_happen(one):
    scorer = json.loads(Path("scorer/config.json").read_text())
    how = f"less {scorer['score_mean']:.4g}, over {scorer['score_std']:.4g}"
    for line in (
        "rollout    8 completions of up to 12 tokens, drawn at temperature 0.7 until <|im_end|>",
        f"reward     0.5 x ./scorer: {how}, the ids of the policy",
        "reward     1 x builtin:exact_match",
        "batch      8 rows = 1 process x 8 x 1 accumulation",
        "steps      8: 1.00 epochs, 2 rollouts x 4 epochs x 1 mini-batches",
    ):
        assert f"{line}\n" in one.out
    assert "prompt     '<|im_start|>user\\n" in one.out and "<|im_start|>assistant\\n'\n" in one.out
    dry = ppo("dry", "--dry_run", "true", "--num_mini_batches", "2", "--num_ppo_epochs", "1")
    assert dry.code == 0 and not Path("dry").exists()
    assert (
        "rollout    16 completions" in dry.out and "8: 4.00 epochs, 4 rollouts x 1 epochs x 2 mini-batches\n" in dry.out
    )


def test_what_it_leaves_behind(one):
    found = metrics("one")
    assert found["steps"] == 8 and found["questions"] == 16 and "model_flops_per_second" not in found
    for key in ("kl", "score", "rlhf_reward", "kl_coef"):
        assert f"objective/{key}" in found and f"eval_objective/{key}" in found
    # weighed: what the rewards of held-out prompts add up to
    parts = [found[f"eval_rewards/{name}/mean"] for name in ("scorer", "exact_match")]
    assert found["eval_objective/score"] == pytest.approx(0.5 * parts[0] + parts[1], abs=1e-5)
    assert "rewarded by 0.5 x ./scorer" in Path("one/README.md").read_text()
    assert Path("one/model.safetensors").is_file()


def test_another_reward_model_makes_another_run(one):
    config = Path("scorer/config.json")
    before = config.read_text()
    config.write_text(json.dumps(json.loads(before) | {"score_std": 3.0}))
    again = ppo("one", "--answers", json.dumps(ANSWERS), "--max_new_tokens", "8")
    config.write_text(before)
    assert again.code == 2 and "output_dir: one holds another run (judges: " in again.err


BAD = {
    "no such reward": (["--rewards", "[{path: outputs/reward}]"], "rewards: outputs/reward does not exist: run recipes/rlhf/reward/run.py first"),
    "no such critic": (["--critic_model_name_or_path", "outputs/reward"], "critic_model_name_or_path: outputs/reward does not exist: run recipes/rlhf/reward/run.py first"),
    "no reward": (["--rewards", "[]"], "rewards: the list is empty"),
    "a policy": (["--rewards", "[{path: chat}]"], "rewards: chat is no reward model: it has 2 labels, not one score"),
    "no gold answer": (["--datasets", "[{path: plain.jsonl}]"], "rewards: builtin:exact_match needs a column `answer`; `columns: {ours: theirs}` renames"),
    "no prompt": (["--datasets", "[{path: none.jsonl}]"], "needed: prompt, or question. `columns: {ours: theirs}` renames them"),
    "context": (["--max_completion_length", "113"], "max_prompt_length + max_completion_length 513 is longer than the model's max_position_embeddings 512"),
    "few": (["--global_batch_size", "32"], "datasets: 16 rows to train on, fewer than one rollout of 32"),
    "part of a rollout": (["--max_steps", "6"], "max_steps 6 is not a multiple of the 4 steps of a rollout: use 8"),
    "unknown": (["--kl_cof", "1"], "command line: unknown key `kl_cof`, did you mean `kl_coef`?"),
    "refused": (["--reward_weights", "[1, 2]"], "command line: `reward_weights` is not taken: each of `rewards` has a `weight`"),
    "merge": (["--merge", "true"], "merge: true needs an adapter: set use_peft: true"),
}  # fmt: skip


@pytest.mark.parametrize("how", BAD)
def test_bad_input_is_one_sentence(how):
    write_rows("plain.jsonl", [{"prompt": "cat"}] * 16)
    write_rows("none.jsonl", [{"text": "cat"}] * 16)
    argv, said = BAD[how]
    done = ppo("bad", *argv)
    assert done.code == 2 and not Path("bad").exists()
    (sentence,) = done.err.splitlines()
    assert sentence.endswith(said)


def test_the_stage_before_is_named(stage):
    """The YAML as shipped, in a folder where nothing was made yet."""
    done = run(script=PPO)
    said = "model_name_or_path: outputs/sft does not exist: run recipes/sft/run.py first\n"
    assert (done.code, done.err) == (2, said) and not Path("outputs").exists()


# ---- the same on any number of processes -----------------------------------------------------------

FIGURES = ("loss", "grad_norm", "critic/loss", "critic/grad_norm", "objective/kl", "objective/score")
HELD_OUT = ("eval_objective/score", "eval_objective/kl", "objective/score", "objective/kl")
ROLLOUTS = ["--num_mini_batches", "2", "--num_ppo_epochs", "2", "--save_steps", "4"]  # two of 16 completions
LORA = ["--use_peft", "true", "--lora_r", "4", "--lora_target_modules", "[all-linear]"]


def curves(out):
    """FIGURES of all eight steps; those of a rollout are logged with its first step."""
    rows = history(out)
    assert [row["step"] for row in rows] == list(range(1, 9))
    assert all((name in row) == (row["step"] in (1, 5)) for row in rows for name in FIGURES[4:])
    return [[row.get(name, 0.0) for name in FIGURES] for row in rows]


def check_same_figures(first, second):
    """Of every step, within 2e-5."""
    pairs = zip(curves(first), curves(second), strict=True)
    apart = [abs(a - b) for one, two in pairs for a, b in zip(one, two, strict=True)]
    assert max(apart) < 2e-5, (curves(first), curves(second))


@pytest.fixture(scope="module")
def alone(stage):
    """Two rollouts on one process."""
    done = ppo("alone", *ROLLOUTS)
    assert done.code == 0, done.err
    first = history("alone")[0]
    assert first["policy/ratio_max_dev"] == 0.0 and first["objective/kl"] == 0.0 and first["grad_norm"] > 1e-2
    assert history("alone")[4]["objective/kl"] > 1e-3 and curves("alone")[0] != curves("alone")[2]
    return "alone"


def two(config, out, *argv, **options):
    given = ["--config", "ppo.yaml", "--output_dir", out, *ROLLOUTS, "--per_device_train_batch_size", "2", *argv]
    done = launch(config, *given, script=PPO, **options)
    assert done.code == 0, done.err[-3000:]
    return done


def test_sigterm_waits_for_the_end_of_the_rollout_and_resumes_to_the_bit(alone):
    """In the second of the four steps on the first rollout."""
    assert ppo("parts", *ROLLOUTS, fault=f"send_signal:2:{signal.SIGTERM.value}").code == 75
    assert [path.name for path in checkpoints("parts")] == ["checkpoint-4"]
    done = ppo("parts", *ROLLOUTS)
    assert done.code == 0, done.err
    assert curves("parts") == curves(alone)
    for name in ("model.safetensors", "checkpoint-8/critic/model.safetensors", "checkpoint-8/ppo_state.json"):
        assert Path("parts", name).read_bytes() == Path(alone, name).read_bytes()


@pytest.mark.parametrize(("config", "shards"), [strategy[:2] for strategy in STRATEGIES])
def test_two_processes_learn_what_one_learns(alone, config, shards):
    """And, where the models are in shards, go on after the first rollout as if there had been no stop."""
    fault = SHIMS.get(config, "")
    done = two(config, config, fault=fault)
    assert f"{shards}, 2 processes, cpu, fp32" in done.out
    assert "8 rows = 2 processes x 2 x 2 accumulation" in done.out
    check_same_training(alone, config, *HELD_OUT)
    check_same_figures(alone, config)
    if config in ("ddp", "zero2"):
        return
    assert history(config)[0]["policy/ratio_max_dev"] == 0.0
    before, whole = curves(config), load_file(f"{config}/model.safetensors")
    shutil.rmtree(f"{config}/checkpoint-8")
    for name in ("metrics.json", "model.safetensors"):  # else the run is finished
        Path(config, name).unlink()
    two(config, config, fault=fault)
    assert curves(config) == before
    again = load_file(f"{config}/model.safetensors")
    assert again.keys() == whole.keys() and all((again[name] == whole[name]).all() for name in whole)


def test_adapters_with_checkpointing_in_shards(stage):
    """LoRA on policy and critic, gradient checkpointing, ZeRO-3: what one process learns without the last two."""
    done = ppo("lora", *ROLLOUTS, *LORA)
    assert done.code == 0, done.err
    two("zero3", "lora_zero3", *LORA, "--activation_checkpointing", "true")
    check_same_figures("lora", "lora_zero3")
    assert history("lora_zero3")[0]["policy/ratio_max_dev"] == 0.0
    one, other = (load_file(f"{folder}/adapter_model.safetensors") for folder in ("lora", "lora_zero3"))
    assert one.keys() == other.keys() and max((one[name] - other[name]).abs().max() for name in one) < 1e-4
