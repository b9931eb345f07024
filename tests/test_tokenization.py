import random

import pytest
from transformers import AutoTokenizer

from llm_recipes.config import DataConfig, Source, TokenizerConfig
from llm_recipes.datasets import load_documents, load_source
from llm_recipes.errors import UserError
from llm_recipes.tokenization import CHAT, EOS, PAD, SPARE, load_tokenizer, quality, train_tokenizer
from tests.running import ROOT, run, write_texts


@pytest.fixture(scope="module")
def tokenizer():
    return train_tokenizer(load_source(Source("builtin:python")).select(range(80)), 1024)


def test_any_text_round_trips(tokenizer):
    rng = random.Random(0)
    texts = ["", " ", "\n\n\t x", "naïve 日本語 \U0001f600\u200d", f"a{EOS}b", "  def f(x):\n\treturn 'é'\r\n"]
    texts += [
        "".join(chr(rng.choice([rng.randrange(32, 127), rng.randrange(0xA0, 0xD7FF)])) for _ in range(50))
        for _ in range(50)
    ]
    for text in texts:
        ids = tokenizer(text, add_special_tokens=False, split_special_tokens=True)["input_ids"]
        assert tokenizer.decode(ids) == text


def test_special_ids_are_first_and_pad_is_not_eos(tokenizer):
    assert len(tokenizer) == 1024 and tokenizer.eos_token == EOS and tokenizer.pad_token == PAD
    assert tokenizer.convert_tokens_to_ids([EOS, PAD, *CHAT, *SPARE]) == list(range(16))
    assert tokenizer("x", add_special_tokens=True)["input_ids"] == tokenizer("x", add_special_tokens=False)["input_ids"]


def test_digits_are_single_tokens(tokenizer):
    tokens = tokenizer.tokenize("x = 2024 + 137")
    assert [t for t in tokens if any(c.isdigit() for c in t)] == list("2024137")


def test_saved_tokenizer_is_the_same(tokenizer, tmp_path):
    tokenizer.save_pretrained(tmp_path)
    again = AutoTokenizer.from_pretrained(tmp_path)
    text = "import os\nprint(f'{os.name} 42')  # <|im_end|>"
    assert (
        again(text)["input_ids"] == tokenizer(text)["input_ids"] and again.all_special_ids == tokenizer.all_special_ids
    )
    assert again.clean_up_tokenization_spaces is False


def test_training_is_deterministic():
    rows = load_source(Source("builtin:python")).select(range(30))
    assert (
        train_tokenizer(rows, 600).backend_tokenizer.to_str() == train_tokenizer(rows, 600).backend_tokenizer.to_str()
    )


def test_sizes_the_text_cannot_give_are_refused():
    with pytest.raises(UserError, match="asked for 5000, the text supports 2"):
        train_tokenizer([{"text": "few words"}], 5000)
    with pytest.raises(UserError, match="below the 272 ids"):
        train_tokenizer([{"text": "few words"}], 10)


def test_quality_on_a_hand_made_case(tokenizer):
    ids = tokenizer("import os", add_special_tokens=False)["input_ids"]
    report = quality(tokenizer, ["import os"] * 3)
    assert report == {"bytes_per_token": 9 / len(ids), "tokens_per_word": len(ids) / 2, "round_trip_failures": 0}


def test_load_tokenizer(tokenizer, tmp_path):
    tokenizer.save_pretrained(tmp_path / "tok")
    documents = load_documents(DataConfig([Source(str(write_texts(tmp_path / "t.jsonl")))], 0.1), 0)
    assert len(load_tokenizer(TokenizerConfig(str(tmp_path / "tok")), documents)) == 1024
    assert len(load_tokenizer(TokenizerConfig(tokenizer_vocab_size=300), documents)) == 300
    for config, message in (
        (TokenizerConfig(), "set tokenizer_name_or_path, or tokenizer_vocab_size"),
        (TokenizerConfig("x", 5), "not both"),
        (TokenizerConfig(str(tmp_path / "nowhere")), "tokenizer_name_or_path: .*nowhere"),
    ):
        with pytest.raises(UserError, match=message) as error:
            load_tokenizer(config, documents)
        assert "\n" not in str(error.value)


def test_recipe(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    source = write_texts(tmp_path / "t.jsonl", rows=200)
    argv = ["--datasets", f"[{{path: {source}}}]", "--vocab_size", "300", "--output_dir", "out"]
    done = run(*argv, script=ROOT / "recipes/tokenizer/run.py")
    assert done.code == 0, done.err
    assert {"tokenizer.json", "tokenizer_config.json", "run.yaml", "metrics.json", "README.md"} <= {
        p.name for p in (tmp_path / "out").iterdir()
    }
    assert len(AutoTokenizer.from_pretrained(tmp_path / "out")) == 300
    again = run(*argv, script=ROOT / "recipes/tokenizer/run.py")
    assert again.code == 0 and "is finished" in again.err
    other = run(*argv[:-4], "--vocab_size", "310", "--output_dir", "out", script=ROOT / "recipes/tokenizer/run.py")
    assert other.code == 2 and "holds another run (vocab_size: 300 -> 310)" in other.err
