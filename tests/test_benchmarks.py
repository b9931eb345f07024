"""The benchmarks run, in short, and their loss is exact."""

import importlib
import json
import math
import os
import subprocess
import sys

import numpy as np
import pytest
import torch

from tests.running import ROOT

sys.path.insert(0, str(ROOT / "benchmarks"))
common = importlib.import_module("common")


def run(script: str, folder, *argv) -> tuple[str, dict]:
    """(what it printed, what it wrote) of a benchmark on a small text in the place of Shakespeare's."""
    rng, output = np.random.default_rng(0), folder / "figures.json"
    text = "".join(rng.choice([*"abcdefgh \n"], 15_000))
    (folder / "tinyshakespeare.txt").write_text(text)
    command = [sys.executable, ROOT / f"benchmarks/{script}.py", *argv, "--output", output]
    env = os.environ | {"LLM_RECIPES_DATA": str(folder)}
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True, timeout=200, env=env)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout, json.loads(output.read_text())


def test_seconds_per_step(tmp_path):
    out, figures = run("pretrain_vs_loop", tmp_path, "--rounds", 1, "--steps", 4, "--first", 2)
    assert [line for line in out.splitlines() if line.startswith("1 ")] and out.count("median") == 8
    (row,) = figures["rounds"]
    assert set(row) == {"ours", "ours_bf16", "stock", "loop"}
    assert all(run[clock] > 0 for run in row.values() for clock in ("wall", "cpu", "start_up"))
    for clock in ("wall", "cpu"):
        assert figures["ratios"][f"ours/loop {clock}"] == [row["ours"][clock] / row["loop"][clock]]


def test_time_to_a_loss(tmp_path):
    out, figures = run("shakespeare", tmp_path, "--seeds", 1, "--steps", 4, "--ours", 4)
    (row,) = figures["seeds"]
    for side in ("ours", "loop"):
        assert f"0     {side} " in out and f"{row[side]['loss']:.4g}" in out
        assert row[side]["process"] > row[side]["loop"] > 0
        assert 2 < row[side]["loss"] < math.log(272)  # untrained, or hardly
    assert figures["ratios"]["ours/loop loop"] == [row["ours"]["loop"] / row["loop"]["loop"]]


@pytest.mark.parametrize("size", [common.LENGTH, 3 * common.LENGTH, 200])
def test_loss_of_a_hand_made_model(size):
    """Every character of the part counts once, however the blocks fall, and sees what comes before it in its block alone."""
    ids, first = np.arange(10 + size) % 7, 10
    assert common.nats(lambda rows: torch.zeros(*rows.shape, 7), ids, first) == pytest.approx(math.log(7), abs=1e-12)

    seen = []

    def sure_of_the_next(rows):  # of probability e^2 / (e^2 + 6) where rows count upwards, as they always do
        seen.extend(rows.flatten().tolist())
        return torch.nn.functional.one_hot((rows + 1) % 7, 7) * 2.0

    loss = common.nats(sure_of_the_next, ids, first)
    assert loss == pytest.approx(math.log(math.exp(2) + 6) - 2, abs=1e-9)
    assert seen == ids[first - 1 : -1].tolist()

    right = common.nats(lambda rows: torch.where(torch.arange(rows.shape[1]) == 0, 50.0, 0.0)[None, :, None]
                        * torch.nn.functional.one_hot((rows + 1) % 7, 7), ids, first)  # fmt: skip
    blocks = math.ceil(size / common.LENGTH)  # the first of each block for nothing, the others ln 7
    assert right == pytest.approx((size - blocks) * math.log(7) / size, abs=1e-9)
