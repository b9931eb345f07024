"""recipes/plan/simulate.py: bytes worked out by hand, real optimizers and DeepSpeed's own engine as referees, real shapes."""

import json
import runpy

import pytest
import torch
import torch.distributed as dist
from torch.distributed.tensor import DTensor
from transformers import AutoConfig

from llm_recipes.launch import Layout
from llm_recipes.metrics import meta_model
from llm_recipes.pipeline.sharding import device_mesh, shard
from tests.running import ROOT, run

SCRIPT = ROOT / "recipes/plan/simulate.py"

# Embedding 64 x 16 and head as large; a layer: q and o 16 x 16, k and v 8 x 16, three matrices of 32 x 16, two norms of 16;
# the last norm. 2 x 1024 + 2 x (768 + 1536 + 32) + 16 = 6736.
TINY = {
    "model_type": "llama", "vocab_size": 64, "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2,
}  # fmt: skip
EXPERTS = TINY | {"model_type": "mixtral", "num_local_experts": 4, "head_dim": 4}


def write_model(folder, **keys):
    AutoConfig.for_model(**TINY | keys).save_pretrained(folder)
    return folder


def simulated(model, *argv) -> dict:
    """The one row of this command line."""
    done = run("--model_name_or_path", model, *argv, "--output_json", "rows.json", script=SCRIPT)
    assert done.code == 0, done.err
    with open("rows.json") as file:
        return json.load(file)[0]


def check_causes(row: dict) -> None:
    for key in ("first", "last", "heaviest"):
        assert sum(row[key]["causes"].values()) == pytest.approx(row[key]["difference"], abs=1e-9)


@pytest.mark.parametrize(
    ("argv", "first", "last"),
    [
        ("--ranks 1", 6736, 6736),
        ("--ranks 4", 6736 / 4, 6736 / 4),
        ("--ranks 8 --dp_replicate 2", 6736 / 4, 6736 / 4),
        ("--dp_replicate 8", 6736, 6736),
        ("--tp 2", (6736 - 80) / 2 + 80, (6736 - 80) / 2 + 80),  # five norms are whole on each
        ("--ranks 4 --tp 2", 6656 / 4 + 80 / 2, 6656 / 4 + 80 / 2),
        ("--pp 2", 1024 + 2336, 2336 + 16 + 1024),
        ("--pp 2 --dp_replicate 2 --dp_shard 2", 3360 / 2, 3376 / 2),
        # thirds of rows: 64 in 22, 22, 20; 16 in 6, 6, 4; 8 in 3, 3, 2; 32 in 11, 11, 10; norms of 16 in 6, 6, 4
        (
            "--ranks 3",
            2 * 22 * 16 + 6 + 2 * (2 * 6 * 16 + 2 * 3 * 16 + 2 * 11 * 16 + 6 * 32 + 2 * 6),
            2 * 20 * 16 + 4 + 2 * (2 * 4 * 16 + 2 * 2 * 16 + 2 * 10 * 16 + 4 * 32 + 2 * 4),
        ),
    ],
)
def test_bytes_by_hand(tmp_path, monkeypatch, argv, first, last):
    monkeypatch.chdir(tmp_path)
    row = simulated(write_model(tmp_path / "m"), *argv.split())
    for key, n in (("first", first), ("last", last), ("heaviest", max(first, last))):
        held = [row[key][kind] for kind in ("weights", "gradients", "optimizer", "total")]
        assert held == [4 * n, 4 * n, 8 * n, 16 * n], key
    assert row["parameters"] == 6736 and row["formula"] == 16 * 6736 * row["dp_replicate"] / row["ranks"]
    assert row["last"]["rank"] == row["ranks"] - 1
    check_causes(row)


@pytest.mark.parametrize(
    ("zero", "part"),
    [
        (1, 2 * 1123),  # 6736 up to a multiple of 6, over 3 ranks
        (2, 2 * 1123),
        (3, 2 * 342 + 5 * 6 + 2 * (2 * 86 + 2 * 43 + 3 * 171)),  # a third of each parameter, rounded up
    ],
)
def test_zero_is_what_deepspeed_holds(tmp_path, monkeypatch, zero, part):
    """DeepSpeed's engine, with real tensors, in the same kind of process group: what it says and what is simulated."""
    monkeypatch.chdir(tmp_path)
    script = tmp_path / "engine.py"
    script.write_text(
        f"""
import deepspeed, torch, torch.distributed as dist
from transformers import AutoConfig, AutoModelForCausalLM
dist.init_process_group("fake", rank=1, world_size=3)
model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained("m"))
_, optimizer, _, _ = deepspeed.initialize(
    model=model, optimizer=torch.optim.AdamW(model.parameters()), dist_init_required=False,
    config={{"train_micro_batch_size_per_gpu": 1, "zero_optimization": {{"stage": {zero}}},
            "zero_force_ds_cpu_optimizer": False}})
trained = optimizer.single_partition_of_fp32_groups if {zero} < 3 else optimizer.fp32_partitioned_groups_flat
weights = [p.ds_tensor if {zero} == 3 else p for p in model.parameters()]
assert {{t.untyped_storage().data_ptr() for t in trained}}.isdisjoint(w.untyped_storage().data_ptr() for w in weights)
print("holds", sum(t.numel() for t in trained), sum(w.numel() for w in weights), {{t.dtype for t in trained}})
"""
    )
    row = simulated(write_model(tmp_path / "m"), "--ranks", 3, "--zero", zero)
    env = {"RANK": "1", "WORLD_SIZE": "3", "LOCAL_RANK": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "1"}
    done = run(script=script, env=env)
    assert f"holds {part} {part if zero == 3 else 6736} {{torch.float32}}" in done.out, done.err
    weights, gradients = (part if zero >= stage else 6736 for stage in (3, 2))
    for key in ("first", "last", "heaviest"):
        held = [row[key][kind] for kind in ("weights", "gradients", "optimizer")]
        assert held == [4 * weights, 4 * gradients, 12 * part]
    assert row["formula"] == 4 * (6736 if zero < 3 else 6736 / 3) + 4 * (6736 if zero < 2 else 6736 / 3) + 4 * 6736


@pytest.fixture(scope="module")
def script():
    return runpy.run_path(str(SCRIPT))


@pytest.mark.parametrize(
    ("keys", "ways", "whole"),  # `whole` parameters are on every rank of a tp group
    [
        (TINY | {"num_hidden_layers": 5, "intermediate_size": 22}, Layout(pp=2, dp_shard=3, tp=2), 11 * 16),
        (TINY | {"vocab_size": 50}, Layout(dp_replicate=2, dp_shard=5), 0),
        (EXPERTS, Layout(dp_shard=6, ep=2), 0),
        (EXPERTS, Layout(dp_shard=3, tp=2, ep=2), 5 * 16 + 2 * 4 * 16),  # norms and routers
    ],
)
def test_ranks_hold_the_model_between_them(script, keys, ways, whole):
    """Every rank simulated: together they have each parameter once a replica, and the heaviest is the one that is reported."""
    config = AutoConfig.for_model(**keys)
    held = [script["hold"](config, ways, rank)[0] for rank in range(ways.size)]
    row = script["simulate"]("tiny", config, ways, 0)
    assert sum(held) == ways.dp_replicate * (row["parameters"] + (ways.tp - 1) * whole)
    assert max(held) > min(held)
    assert [row[key]["weights"] for key in ("first", "last", "heaviest")] == [4 * held[0], 4 * held[-1], 4 * max(held)]
    check_causes(row)


def test_a_real_step_leaves_as_much(script):
    """Forward, backward and AdamW on this rank's real tensors: bytes of weights, gradients and moments."""
    config, ways = AutoConfig.for_model(**TINY | {"vocab_size": 50}), Layout(dp_shard=3, tp=2)
    row = script["simulate"]("tiny", config, ways, 0)
    dist.init_process_group("fake", rank=0, world_size=6)
    try:
        model = meta_model(config)
        shard(model, ways, device_mesh(ways, "cpu"), "1F1B")
        model.to_empty(device="cpu")
        ids = torch.zeros(1, 4, dtype=torch.long)
        model(input_ids=ids, labels=ids).loss.backward()
        optimizer = torch.optim.AdamW(model.parameters())
        optimizer.step()
        moments = [t for p in model.parameters() for key, t in optimizer.state[p].items() if key != "step"]
        kinds = list(model.parameters()), [p.grad for p in model.parameters()], moments
        held = [sum((t.to_local() if isinstance(t, DTensor) else t).nbytes for t in kind) for kind in kinds]
    finally:
        dist.destroy_process_group()
    assert held == [row["first"][key] for key in ("weights", "gradients", "optimizer")]


def test_a_tied_head_is_there_twice(script):
    """On the first stage as the embedding, on the last as the head."""
    config = AutoConfig.for_model(**TINY, tie_word_embeddings=True)
    row = script["simulate"]("tiny", config, Layout(pp=2), 0)
    assert row["parameters"] == 6736 - 1024
    assert row["first"]["weights"] == 4 * (1024 + 2336) and row["last"]["weights"] == 4 * (1024 + 2336 + 16)
    check_causes(row)


@pytest.fixture(scope="module")
def table(tmp_path_factory):
    """The table of the command without arguments, and its rows."""
    folder = tmp_path_factory.mktemp("table")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        done = run("--output_json", "rows.json", script=SCRIPT, timeout=900)
    assert done.code == 0, done.err
    return done.out, json.loads((folder / "rows.json").read_text())


def test_real_shapes(table):
    """Parameters by formula, and those of the papers."""
    layers, hidden, inner = {"8B": 32, "70B": 80, "405B": 126}, (4096, 8192, 16384), (14336, 28672, 53248)
    totals = {
        name: 2 * 128256 * h + n * (2 * h * h + 2 * h * 8 * 128 + 3 * h * f + 2 * h) + h
        for (name, n), h, f in zip(layers.items(), hidden, inner, strict=True)
    }
    assert {name: round(n / 1e9, 2) for name, n in totals.items()} == {"8B": 8.03, "70B": 70.55, "405B": 405.85}
    experts = 8 * 3 * 4096 * 14336 + 8 * 4096
    totals["8x7B"] = 2 * 32000 * 4096 + 32 * (2 * 4096**2 + 2 * 4096 * 1024 + experts + 2 * 4096) + 4096
    assert totals["8x7B"] == 46_702_792_704
    assert {row["model"]: row["parameters"] for row in table[1]} == totals


def test_even_splits_are_within_one_percent(table):
    rows = {
        (row["model"], *(row[key] for key in ("pp", "dp_replicate", "dp_shard", "tp", "ep", "zero"))): row
        for row in table[1]
    }
    uneven = {
        ("8B", 2, 1, 4, 1, 1, 0),
        ("8B", 1, 1, 512, 8, 1, 0),
        ("70B", 4, 1, 32, 8, 1, 0),
        ("8x7B", 1, 1, 16, 1, 8, 0),
    }
    assert {key for key, row in rows.items() if abs(row["heaviest"]["difference"]) > 0.01} == uneven
    assert {row["ranks"] for row in table[1]} >= {8, 1024, 16384}
    for row in rows.values():
        check_causes(row)
        for key in ("first", "last"):
            assert row[key]["total"] <= row["heaviest"]["total"]
    assert rows["405B", 1, 16, 128, 8, 1, 0]["formula"] == 16 * 405_853_388_800 / 1024


def test_imbalance_is_named(table):
    lines = {tuple(line.split(" | ")[:3]): line for line in table[0].splitlines()}
    both = lines["| 8B", "8", "2 x 1 x 4 x 1 x 1"]
    assert "+6.5% embedding on the first stage" in both and "+5.4% 17 of 32 layers" in both
    assert "k_proj.weight not split evenly" in lines["| 8B", "4,096", "1 x 1 x 512 x 8 x 1"]
    # 8 experts over 8 ranks leave one each, which FSDP2 cannot halve: one rank has all of it, its twin none
    experts = lines["| 8x7B", "16", "1 x 1 x 16 x 1 x 8"]
    assert "| +96.6% | -96.6% | +96.6% | rank 0: +64.4% mlp.experts.gate_up_proj not split evenly" in experts
    assert lines["| 405B", "16,384", "1 x 16 x 128 x 8 x 1"].endswith("|  |")


@pytest.mark.parametrize(
    ("argv", "said"),
    [
        ("--ranks 8", "a layout of what?"),
        ("--pp 0", "a layout of what?"),
        ("--model_name_or_path 9B", "--model_name_or_path 9B: there is no such folder; known are 8B, 70B, 405B, 8x7B"),
        ("--model_name_or_path ./none", "./none does not exist"),
        ("--model_name_or_path 8B --tp 0", "--tp must be at least 1, got 0"),
        (
            "--model_name_or_path 8B --ranks 16 --pp 2 --dp_shard 4 --tp 4",
            "pp 2 x dp_replicate 1 x dp_shard 4 x tp 4 is 32 ranks, and --ranks says 16",
        ),
        ("--model_name_or_path 8B --ranks 16 --pp 3", "is 15 ranks, and --ranks says 16"),
        ("--model_name_or_path 8B --tp 3", "--tp 3 does not divide the 32 attention heads"),
        ("--model_name_or_path 8B --tp 16", "--tp 16 does not divide the 8 key_value heads"),
        ("--model_name_or_path 8B --pp 33", "--pp 33: 8B has 32 layers, and every stage needs one"),
        ("--model_name_or_path 8B --ranks 8 --ep 8", "no `ep_plan`"),
        ("--model_name_or_path 8x7B --ranks 48 --ep 3", "Cannot evenly shard 8 experts"),
        ("--model_name_or_path 8x7B --ranks 8 --tp 4 --ep 2", "--ep 2 must be a multiple of tp"),
        ("--model_name_or_path 8x7B --ranks 16 --pp 2 --ep 8", "and goes without pp"),
        ("--model_name_or_path 8B --ranks 8 --tp 2 --zero 3", "--zero: DeepSpeed splits over all ranks"),
        (
            "--model_name_or_path 8B --ranks 8 --output_json none/rows.json",
            "--output_json none/rows.json: there is no such",
        ),
    ],
)
def test_bad_input_is_one_line(tmp_path, monkeypatch, argv, said):
    monkeypatch.chdir(tmp_path)
    output = [] if "--output_json" in argv else ["--output_json", "rows.json"]
    done = run(*argv.split(), *output, script=SCRIPT)
    assert done.code == 2 and said in done.err and len(done.err.splitlines()) == 1, done.err
    assert done.out == "" and {p.name for p in tmp_path.iterdir()} == {"child.out", "child.err"}
