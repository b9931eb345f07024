"""What a layout cannot train is said beforehand; stages that are not the model are found by trying; the split is the best one."""

import itertools
import os
import random
from types import SimpleNamespace

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from llm_recipes.config import ObjectiveConfig, OptimizationConfig, Ramp, WindowConfig
from llm_recipes.errors import UserError
from llm_recipes.launch import Layout
from llm_recipes.pipeline.checks import layout_problems
from llm_recipes.pipeline.stages import SCHEDULES, Stage, balanced, split, stages_of_rank
from llm_recipes.probes import check_stages
from tests.parallel.matrix import MIXTRAL, MODEL


@pytest.fixture
def launched(monkeypatch):
    """`launched(pp=2)`: as if that layout of ours had been launched."""

    def launch(**sizes):
        monkeypatch.setenv("ACCELERATE_USE_PARALLELISM_CONFIG", "own")
        for kind in ("pp", "dp_replicate", "dp_shard", "cp", "sp", "tp", "ep"):
            monkeypatch.setenv(f"PARALLELISM_CONFIG_{kind.upper()}_SIZE", str(sizes.get(kind, 1)))
        monkeypatch.setenv("WORLD_SIZE", str(Layout(**sizes).size))

    return launch


def problems(model=MODEL, objective=None, windows=None, optimization=None, **keys):
    plain = {
        "fp16": False,
        "torch_compile": False,
        "use_liger_kernel": False,
        "load_best_model_at_end": False,
        "hub_strategy": "end",
    }
    sizes = {
        "per_device_train_batch_size": 1,
        "gradient_accumulation_steps": 8,
        "world_size": int(os.environ["WORLD_SIZE"]),
    }
    args = SimpleNamespace(**plain | sizes | keys)
    config = AutoConfig.for_model(**{"vocab_size": 300, **model})
    return layout_problems(
        config,
        objective or ObjectiveConfig(),
        windows or WindowConfig(32),
        optimization or OptimizationConfig(),
        args,
    )


@pytest.mark.parametrize(
    ("sizes", "given", "sentence"),
    [
        ({"tp": 2}, {}, None),
        ({"pp": 2, "dp_shard": 2, "tp": 2}, {}, None),
        ({"tp": 4}, {}, "num_key_value_heads 2 does not divide over TP 4"),
        ({"tp": 2}, {"model": {"model_type": "gpt2"}}, "has no `tp_plan`"),
        ({"tp": 2}, {"objective": ObjectiveConfig("masked")}, "objective: masked is not taken under TP 2"),
        ({"tp": 2}, {"model": MODEL | {"attention_dropout": 0.1}}, "attention_dropout 0.1 is not taken under TP 2"),
        (
            {"pp": 2, "dp_shard": 2},
            {"optimization": OptimizationConfig(batch_size_ramp=Ramp(start=1, steps=2))},  # 1 does not divide: said elsewhere
            "a step of 2 has 1 micro-batches",
        ),
        ({"tp": 2}, {"fp16": True}, "fp16 is not taken under TP 2"),
        ({"tp": 2}, {"windows": WindowConfig(32, streaming=True)}, "set streaming: false"),
        ({"tp": 2}, {"hub_strategy": "every_save"}, "hub_strategy: every_save is not taken"),
        ({"dp_shard": 2, "ep": 2}, {}, "has no `ep_plan`"),
        ({"dp_shard": 2, "ep": 2}, {"model": MIXTRAL}, None),
        ({"dp_shard": 3, "ep": 3}, {"model": MIXTRAL}, "4 experts do not divide over EP 3"),
        ({"dp_shard": 2, "ep": 2}, {"model": MIXTRAL | {"tie_word_embeddings": True}}, "needs tie_word_embeddings: false"),
        ({"pp": 2, "dp_shard": 2, "ep": 2}, {"model": MIXTRAL}, "expert parallel does not go with a pipeline"),
        ({"pp": 2}, {"model": MIXTRAL}, "the balance loss of experts needs all layers in one place"),
        ({"pp": 2}, {"model": {"model_type": "gpt2"}}, "gpt2 has no pipeline plan in transformers"),
        ({"pp": 5}, {}, "1F1B cuts 5 stages, and the model has 4 layers"),
        ({"pp": 3}, {"optimization": OptimizationConfig(pipeline_schedule="Interleaved1F1B")}, "cuts 6 stages"),
        (
            {"pp": 2, "dp_shard": 2},
            {"model": MODEL | {"tie_word_embeddings": True}, "optimization": OptimizationConfig(pipeline_schedule="ZBVZeroBubble")},
            "ZBVZeroBubble with tied weights does not go with data parallel",
        ),
        ({"pp": 2}, {"gradient_accumulation_steps": 1}, "1F1B needs a micro-batch for each of its 2 stages"),
        ({"pp": 2}, {"gradient_accumulation_steps": 1, "optimization": OptimizationConfig(pipeline_schedule="GPipe")}, None),
        (
            {"pp": 2},
            {"gradient_accumulation_steps": 5, "optimization": OptimizationConfig(pipeline_schedule="InterleavedZeroBubble")},
            "needs a multiple of 2 micro-batches",
        ),
        ({"pp": 2}, {"optimization": OptimizationConfig(batch_size_ramp=Ramp(start=1, steps=2))}, "a step of 1 has 1 micro-batches"),
    ],
)  # fmt: skip
def test_what_a_layout_cannot_train(sizes, given, sentence, launched):
    launched(**sizes)
    found = problems(**given)
    assert found == [] if sentence is None else any(sentence in line for line in found), found


def test_balanced_is_the_best_split():
    """Against every split there is."""
    rng = random.Random(0)
    for _ in range(50):
        costs = [rng.randint(1, 9) for _ in range(rng.randint(4, 9))]
        for parts in range(1, 5):
            found = balanced(costs, parts)
            assert [i for part in found for i in part] == list(range(len(costs))) and all(found)
            cuts = itertools.combinations(range(1, len(costs)), parts - 1)
            every = [max(sum(costs[a:b]) for a, b in itertools.pairwise((0, *cut, len(costs)))) for cut in cuts]
            assert max(sum(costs[i] for i in part) for part in found) == min(every)


def test_the_head_counts_as_layers():
    """Of eight layers of 36,992 weights and a head of 128,000, the last of four stages has one layer."""
    model = AutoModelForCausalLM.from_config(
        AutoConfig.for_model(**MODEL | {"num_hidden_layers": 8, "vocab_size": 2000})
    )
    assert [len(part) for part in split(model, 4)] == [2, 2, 3, 1]


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_every_stage_has_one_rank(schedule):
    held = [stage for rank in range(4) for stage in stages_of_rank(schedule, rank, 4)]
    assert sorted(held) == list(range(4 * SCHEDULES[schedule]))


@pytest.mark.parametrize("kind", ["llama", "mistral", "qwen2", "qwen3", "gemma2", "gemma3_text", "olmo2", "mixtral"])
def test_stages_in_a_row_are_the_model(kind):
    """To the bit, for architectures that nobody changed."""
    keys = {key: value for key, value in MODEL.items() if key not in ("model_type", "num_hidden_layers")}
    config = AutoConfig.for_model(kind, **keys, num_hidden_layers=5, vocab_size=128, head_dim=16)
    model = AutoModelForCausalLM.from_config(config).eval()
    hidden = ids = torch.randint(0, 128, (2, 16))
    with torch.no_grad():
        for number, own in enumerate(parts := split(model, 3)):
            hidden = Stage(model, own, number == 0, number == len(parts) - 1)(hidden)
        assert torch.equal(hidden, model(input_ids=ids).logits)
    check_stages(config, None)


def test_stages_that_are_not_the_model_are_found(monkeypatch):
    """Gemma's first version scales what it embeds; were it to scale what a stage is given, too, the last would see other states."""
    from transformers.models.llama.modeling_llama import LlamaModel

    forward = LlamaModel.forward

    def scaled(self, input_ids=None, inputs_embeds=None, **kwargs):
        inputs_embeds = self.embed_tokens(input_ids) if inputs_embeds is None else inputs_embeds
        return forward(self, inputs_embeds=inputs_embeds * 2, **kwargs)

    monkeypatch.setattr(LlamaModel, "forward", scaled)
    with pytest.raises(UserError, match="pipeline: llama with attn_implementation sdpa is not the sum of its stages"):
        check_stages(AutoConfig.for_model(**MODEL), "sdpa")
