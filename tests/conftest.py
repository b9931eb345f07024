"""Every test works in its own folder, with its own caches, without the network and on the CPU."""

import os
import tempfile

_cache = tempfile.TemporaryDirectory(prefix="llm-recipes-tests-")
os.environ |= {
    "HF_DATASETS_CACHE": f"{_cache.name}/datasets",  # read at import, so before anything else
    "HF_HOME": f"{_cache.name}/hf",
    "OMP_NUM_THREADS": "1",
    "TOKENIZERS_PARALLELISM": "false",  # children are forked
    "ACCELERATE_USE_CPU": "true",
}

import pytest  # noqa: E402

from tests.running import write_config  # noqa: E402


@pytest.fixture
def tiny(tmp_path, monkeypatch):
    """`tiny(**keys)` writes a config that trains a 20,000-parameter Llama for a few steps, and returns its path."""
    monkeypatch.chdir(tmp_path)
    return lambda **keys: write_config(tmp_path, **keys)
