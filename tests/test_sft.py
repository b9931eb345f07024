"""The SFT recipe: what it optimises, worked out with plain transformers, and what it leaves behind."""

import json
import shutil
import signal
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from torch.nn.functional import cross_entropy
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, GenerationConfig

from llm_recipes.adapters import whole_model
from llm_recipes.answers import generate
from llm_recipes.models import from_scratch
from tests.running import (
    ROOT,
    SFT,
    SHIMS,
    STRATEGIES,
    check_same_training,
    curve,
    launch,
    metrics,
    post_training_stage,
    read_rows,
    run,
    write_rows,
)

# Few words, so that a tiny model can learn them by heart; the answers have 1 to 8 tokens.
EIGHT = [
    {"messages": [{"role": "user", "content": f"{animal} {number}"}, {"role": "assistant", "content": answer}]}
    for animal, number, answer in [
        ("cat", "a", "red"), ("cat", "12", "the dog"), ("cat", "345", "fish"), ("dog", "a", "12"),
        ("dog", "12", "the cat sees a dog"), ("dog", "345", "a"), ("fish", "a", "345 345"), ("fish", "12", "runs"),
    ]
]  # fmt: skip
HEARD = ["--datasets", "[{path: eight.jsonl}]", "--eval_datasets", "[]", "--eval_fraction", "0"]
LEARN = [*HEARD, "--max_steps", "80", "--save_steps", "80", "--per_device_train_batch_size", "4"]
ANSWERS = ["--answers", "{path: builtin:arithmetic/test, rows: 4, difficulty: 1}", "--max_new_tokens", "8"]
LORA = ["--model_name_or_path", "chat", "--use_peft", "true", "--lora_r", "4", "--lora_target_modules", "[all-linear]"]


@pytest.fixture(scope="module", autouse=True)
def stage(tmp_path_factory):
    """The folder that all tests here work in, each with an output_dir of its own."""
    folder = post_training_stage(tmp_path_factory.mktemp("sft"))
    write_rows(folder / "eight.jsonl", EIGHT)
    (folder / "recipes").symlink_to(ROOT / "recipes")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        yield folder


def sft(out, *argv, **options):
    return run("--config", "tiny.yaml", "--output_dir", out, *argv, script=SFT, **options)


def trained(out, *argv):
    done = sft(out, *argv)
    assert done.code == 0, done.err
    return out


@pytest.fixture(scope="module")
def one(stage):
    """16 rows in batches of 8, three steps: one epoch and the beginning of the next."""
    return trained("one", "--per_device_eval_batch_size", "3", *ANSWERS)


@pytest.fixture(scope="module")
def learnt(stage):
    """Eight conversations, all of them in every batch, learnt by heart."""
    return trained("learnt", *LEARN)


def as_text(row):
    """(prompt, answer) as ChatML has them."""
    if "messages" in row:
        prompt, answer = (message["content"] for message in row["messages"])
    else:
        prompt, answer = row["prompt"], row["completion"]
    return f"<|im_start|>user\n{prompt}<|im_end|>\n<|im_start|>assistant\n", f"{answer}<|im_end|>"


@torch.no_grad()
def answer_losses(model, tokenizer, rows):
    """Loss of every token of every answer, one row at a time: no padding, no batch, no trainer."""
    losses = []
    for row in rows:
        prompt, answer = (tokenizer(text)["input_ids"] for text in as_text(row))
        logits = model(torch.tensor([prompt + answer])).logits[0, len(prompt) - 1 : -1]
        losses.append(cross_entropy(logits, torch.tensor(answer), reduction="none"))
    return torch.cat(losses)


def loaded(folder):
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval(), AutoTokenizer.from_pretrained(
        "base"
    )


# ---- the optimisation ----------------------------------------------------------------------------


def test_accumulation_changes_nothing(one):
    small = trained("small", "--per_device_train_batch_size", "1", "--per_device_eval_batch_size", "1")
    check_same_training(one, small, "eval_loss")


@pytest.mark.parametrize(("config", "shards", "size"), STRATEGIES)
def test_two_processes_learn_what_one_learns(one, config, shards, size):
    sizes = ["--per_device_train_batch_size", size, "--per_device_eval_batch_size", "8"]
    done = launch(
        config,
        "--config",
        "tiny.yaml",
        "--output_dir",
        config,
        *sizes,
        *ANSWERS,
        script=SFT,
        fault=SHIMS.get(config, ""),
    )
    assert done.code == 0, done.err[-3000:]
    assert f"{shards}, 2 processes, cpu, fp32" in done.out
    assert f"8 rows = 2 processes x {size} x {4 // size} accumulation" in done.out
    check_same_training(one, config, "eval_loss", "exact_match", "stopped", "answer_tokens")


def test_held_out_loss_is_the_mean_over_all_answer_tokens(one):
    """In batches of 2, here; `check_same_training` has held those of 1, 4 and 4 a process to the same figure.

    The mean of the rows' means would be another figure, for their answers differ in length.
    """
    losses = answer_losses(*loaded(one), read_rows("held.jsonl"))
    means = [answer_losses(*loaded(one), [row]).mean().item() for row in read_rows("held.jsonl")]
    assert metrics(one)["eval_loss"] == pytest.approx(losses.mean().item(), abs=1e-5)
    assert abs(losses.mean().item() - sum(means) / len(means)) > 1e-2


def test_first_loss_is_the_mean_over_the_answers_of_the_batch(learnt):
    """The whole data is one batch, in two micro-batches whose answers differ in length."""
    expected = answer_losses(*loaded("base"), EIGHT).mean().item()
    assert curve(learnt)[0][0] == pytest.approx(expected, abs=1e-5)


def test_packing_keeps_conversations_apart(learnt):
    """All rows in one packed row give every loss and gradient norm that they give one by one, within 2e-5."""
    argv = [*HEARD, "--packing", "true", "--max_length", "512", "--global_batch_size", "1"]
    done = sft("packed", *argv)
    assert done.code == 0 and "8 rows packed into 1 of up to 512 tokens" in done.out, done.out + done.err
    pairs = zip(curve("packed"), curve(learnt)[:3], strict=True)
    assert max(abs(x - y) for a, b in pairs for x, y in zip(a, b, strict=True)) < 2e-5
    model, tokenizer = loaded("base")  # what would be seen if one could look at those before
    text = "".join("".join(as_text(row)) for row in EIGHT)
    leaking = model(torch.tensor([tokenizer(text)["input_ids"]])).logits
    last = tokenizer("".join(as_text(EIGHT[-1])))["input_ids"]
    assert (leaking[0, -len(last) :] - model(torch.tensor([last])).logits[0]).abs().max() > 1e-2


def test_resume_after_sigterm_is_exact_to_the_bit(learnt):
    stopped = sft("parts", *LEARN, fault=f"send_signal:30:{signal.SIGTERM.value}")
    assert stopped.code == 75 and "SIGTERM: saved parts/checkpoint-30" in stopped.err
    trained("parts", *LEARN)
    assert curve("parts") == curve(learnt)
    assert Path("parts/model.safetensors").read_bytes() == Path(learnt, "model.safetensors").read_bytes()


# ---- what it leaves behind -----------------------------------------------------------------------


def test_answers_are_learnt_and_so_is_their_end(learnt):
    """`generate` as anybody would call it: the saved folder alone knows the prompt's form and where to stop."""
    model, tokenizer = AutoModelForCausalLM.from_pretrained(learnt), AutoTokenizer.from_pretrained(learnt)
    for row in EIGHT:
        prompt, answer = as_text(row)
        assert tokenizer.apply_chat_template(row["messages"][:1], tokenize=False, add_generation_prompt=True) == prompt
        ids = tokenizer(prompt, return_tensors="pt")["input_ids"]
        out = model.generate(ids, max_new_tokens=40)[0, ids.shape[1] :]
        assert tokenizer.decode(out) == answer
    assert metrics(learnt)["tokens"] == 80 * sum(
        len(tokenizer(text)["input_ids"]) for row in EIGHT for text in as_text(row)
    )


def test_an_answer_may_end_with_another_token_than_a_document():
    """The tokenizer's EOS is <|endoftext|>, the template ends a turn with <|im_end|>: `generate` must stop at both."""
    shutil.copytree("chat", "ends")
    tokenizer = AutoTokenizer.from_pretrained("chat")
    tokenizer.eos_token = "<|endoftext|>"
    tokenizer.save_pretrained("ends")
    trained("ended", "--model_name_or_path", "ends", *HEARD, "--max_steps", "1")
    ends = GenerationConfig.from_pretrained("ended").eos_token_id
    assert sorted(tokenizer.convert_ids_to_tokens(ends)) == ["<|endoftext|>", "<|im_end|>"]


def test_a_template_is_a_file_of_any_name():
    shutil.copy("chat/chat_template.jinja", "template.txt")
    trained("template", "--chat_template_path", "template.txt", "--max_steps", "1", "--save_steps", "1")
    assert Path("template/chat_template.jinja").read_text() == Path("template.txt").read_text()


def test_greedy_is_greedy_whatever_the_generation_config_says():
    model, _ = loaded("chat")
    plain = generate(model, [[10, 20, 30], [40, 50]], 1, 12)
    model.generation_config.repetition_penalty, model.generation_config.no_repeat_ngram_size = 3.0, 1
    assert generate(model, [[10, 20, 30], [40, 50]], 1, 12) == plain


def test_dry_run_shows_what_is_learnt_and_writes_nothing():
    row = {"messages": [
        {"role": "system", "content": "red"}, {"role": "user", "content": "cat"}, {"role": "assistant", "content": "12"},
        {"role": "user", "content": "a <|im_end|> dog"}, {"role": "assistant", "content": "the fish"},
    ]}  # fmt: skip
    write_rows("single.jsonl", [row])
    done = sft("dry", "--datasets", "[{path: single.jsonl}]", *HEARD[2:], "--global_batch_size", "1", "--dry_run")
    assert done.code == 0 and not Path("dry").exists()
    assert (
        r"example    '<|im_start|>system\nred<|im_end|>\n<|im_start|>user\ncat<|im_end|>\n<|im_start|>assistant\n"
        r"[[12<|im_end|>]]\n<|im_start|>user\na <|im_end|> dog<|im_end|>\n<|im_start|>assistant\n"
        r"[[the fish<|im_end|>]]'"
    ) in done.out
    assert "the loss is on what stands between [[ and ]]" in done.out


# ---- adapters ------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def adapter(stage):
    return trained("adapter", *LORA)


@torch.no_grad()
def test_an_adapter_is_trained_and_nothing_else(adapter):
    """The figures of the run are those of the stored base with the adapter on it, so no other weight has moved."""
    assert Path(adapter, "adapter_model.safetensors").is_file() and not list(Path(adapter).glob("model*.safetensors"))
    assert {name.split(".")[-2] for name in load_file(f"{adapter}/adapter_model.safetensors")} == {"lora_A", "lora_B"}
    base, tokenizer = loaded("chat")
    before = answer_losses(base, tokenizer, read_rows("held.jsonl")).mean().item()
    after = answer_losses(PeftModel.from_pretrained(base, adapter), tokenizer, read_rows("held.jsonl")).mean().item()
    assert metrics(adapter)["eval_loss"] == pytest.approx(after, abs=1e-5) and after < before - 0.1


def test_an_adapter_resumes_exactly(adapter):
    """With its dropout, of which the default is 0.05."""
    assert sft("halves", *LORA, fault=f"send_signal:2:{signal.SIGTERM.value}").code == 75
    trained("halves", *LORA)
    one, two = (Path(folder, "adapter_model.safetensors").read_bytes() for folder in (adapter, "halves"))
    assert one == two and curve("halves") == curve(adapter)


@torch.no_grad()
def test_merged_is_base_and_adapter(adapter):
    trained("merged", *LORA, "--merge", "true")
    ids = torch.randint(0, 300, (4, 50), generator=torch.Generator().manual_seed(0))
    peft = PeftModel.from_pretrained(loaded("chat")[0], "merged/adapter")
    logits = loaded("merged")[0](ids).logits
    assert (logits - peft(ids).logits).abs().max() < 1e-5 < 1e-2 < (logits - loaded("chat")[0](ids).logits).abs().max()
    base, merged, later = (load_file(f"{f}/model.safetensors") for f in ("chat", "merged", whole_model(adapter)))
    assert base.keys() == merged.keys() == later.keys()
    for name, weight in merged.items():
        assert torch.equal(weight, later[name])  # the same run without merge, merged by the next stage
        assert torch.equal(weight, base[name]) != ("_proj" in name), name
    assert AutoTokenizer.from_pretrained("merged/adapter").eos_token == "<|im_end|>"
    end = AutoTokenizer.from_pretrained("merged").convert_tokens_to_ids("<|im_end|>")
    for folder in (adapter, "merged", "merged/adapter", whole_model(adapter)):  # the base knows of another end alone
        assert end in GenerationConfig.from_pretrained(folder).eos_token_id, folder


@torch.no_grad()
@pytest.mark.parametrize("tied", [False, True])
def test_embeddings_are_trained_where_turns_are_new(tied):
    """A base model has never seen <|im_end|>: what is saved, merged by the next stage, is what was measured."""
    config = AutoConfig.from_pretrained("base", tie_word_embeddings=tied)
    start, out = f"start_{tied}", f"new_{tied}"
    shutil.copytree("base", start)
    from_scratch(config, seed=0).save_pretrained(start)
    trained(out, *LORA[2:], "--model_name_or_path", start)
    parts = {name.split(".")[-2] for name in load_file(f"{out}/adapter_model.safetensors")}
    assert parts == {"lora_A", "lora_B", "embed_tokens", "lm_head"}
    model = AutoModelForCausalLM.from_pretrained(whole_model(out), dtype=torch.float32)
    losses = answer_losses(model, AutoTokenizer.from_pretrained("base"), read_rows("held.jsonl"))
    assert metrics(out)["eval_loss"] == pytest.approx(losses.mean().item(), abs=1e-5)
    assert (model.get_input_embeddings().weight is model.get_output_embeddings().weight) == tied


# ---- bad input -----------------------------------------------------------------------------------

CAT, RED = {"role": "user", "content": "cat"}, {"role": "assistant", "content": "red"}
BAD_ROWS = {
    "no column": ({"prompt": "cat", "answer": "red"}, "has the columns prompt, answer; needed: messages, or conversations, or completion and prompt, or instruction and output. `columns: {ours: theirs}` renames them"),
    "no answer": ({"prompt": "cat", "completion": " "}, "no row is left to train on: 16 have an empty answer"),
    "too long": ({"prompt": "cat", "completion": "the dog sees a fish " * 50}, "no row is left to train on: 16 are longer than max_length 256"),
    "image": ({"image": "cat.png", "messages": [CAT, RED]}, "has a column image: these recipes train on text alone"),
    "no text": ({"messages": [{"role": "user", "content": [{"type": "image"}]}, RED]}, "no row is left to train on: 16 hold something else than text (images, tool calls); these recipes train on text"),
}  # fmt: skip
BAD_KEYS = {
    "context": (["--max_length", "513"], "max_length 513 is longer than the model's max_position_embeddings 512"),
    "tokenizer": (["--model_name_or_path", "mixed"], "the tokenizer for mixed has 340 ids, the model 300: it is another model's, or the chat template brings tokens that SFT has yet to teach"),
    "model": (["--model_name_or_path", "outputs/pretrain"], "model_name_or_path: outputs/pretrain does not exist: run recipes/pretrain/run.py first"),
    "merge": (["--merge", "true"], "merge: true needs an adapter: set use_peft: true"),
    "qlora": (["--use_peft", "true", "--load_in_4bit", "true"], "load_in_4bit needs an NVIDIA GPU: bitsandbytes' kernels are not made for training on the CPU"),
    "adapter": (["--use_peft", "true", "--lora_target_modules", "[word]"], "(`modules_to_save`)."),
    "eval_packing": (["--eval_packing", "true"], "eval_packing: true means nothing without packing: true"),
    "template": (["--chat_template_path", "broken.jinja"], "a user's and an assistant's message are refused by the chat template (Encountered unknown tag 'word'.)"),
    "answers": (["--answers", "{path: null.jsonl}"], "answers: null.jsonl: row 0 has no question or no final answer after #### (1 such rows)"),
    "unknown": (["--learnin_rate", "1"], "command line: unknown key `learnin_rate`, did you mean `learning_rate`?"),
    "refused": (["--assistant_only_loss", "true"], "command line: `assistant_only_loss` is not taken: the loss is always on what the assistant says, and only there"),
}  # fmt: skip


@pytest.mark.parametrize("how", [*BAD_ROWS, *BAD_KEYS])
def test_bad_input_is_one_sentence(stage, how):
    if how == "tokenizer":
        shutil.copytree("base", "mixed")
        tokenizer = AutoTokenizer.from_pretrained("base")
        tokenizer.add_tokens([f"word{i}" for i in range(40)])
        tokenizer.save_pretrained("mixed")
    Path("broken.jinja").write_text("{% word %}")
    write_rows("null.jsonl", [{"question": None, "answer": "#### 1"}, {"question": "cat", "answer": "#### 1"}])
    if how in BAD_ROWS:
        row, said = BAD_ROWS[how]
        argv = ["--datasets", json.dumps([{"path": write_rows("bad.jsonl", [row] * 16)}])]
    else:
        argv, said = BAD_KEYS[how]
    done = sft("bad", *argv)
    assert done.code == 2 and not Path("bad").exists()
    (sentence,) = done.err.splitlines()
    assert sentence.endswith(said)
