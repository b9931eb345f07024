"""The attention that models train with: the same function as the library's, without its mask."""

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, Trainer, TrainingArguments

from llm_recipes.config import ModelConfig, ObjectiveConfig
from llm_recipes.models import attention, load_model

SIZES = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "vocab_size": 50}
LLAMA = {"model_type": "llama", "intermediate_size": 64, **SIZES}


def config_of(keys):
    keys = dict(keys)
    return AutoConfig.for_model(keys.pop("model_type"), **keys)


@pytest.mark.parametrize(
    ("keys", "model", "objective", "expected"),
    [
        (LLAMA, {}, {}, "sdpa_causal"),
        (LLAMA, {"attn_implementation": "sdpa"}, {}, "sdpa_causal"),
        (LLAMA, {"attn_implementation": "eager"}, {}, "eager"),
        (LLAMA, {"attn_implementation": "flash_attention_2"}, {}, "flash_attention_2"),
        (LLAMA, {}, {"isolate_documents": True}, None),
        (LLAMA, {}, {"objective": "prefix"}, None),
        ({**LLAMA, "model_type": "mistral", "sliding_window": 16}, {}, {}, "sdpa_causal"),
        ({**LLAMA, "model_type": "mistral", "sliding_window": 15}, {}, {}, None),
        ({"model_type": "bloom", **SIZES}, {}, {}, None),
        ({"model_type": "mamba", "hidden_size": 32, "num_hidden_layers": 1, "vocab_size": 50}, {}, {}, None),
    ],
)
def test_which_attention(keys, model, objective, expected):
    got = attention(ModelConfig(model_config=keys, **model), config_of(keys), ObjectiveConfig(**objective), 16)
    assert got == expected


@pytest.mark.parametrize(
    "kind", ["llama", "gpt2", "mixtral", "qwen3", "gpt_neox", "phi3", "mistral", "falcon", "opt", "gemma3_text"]
)
def test_same_function_as_the_library_without_a_mask(kind, monkeypatch):
    """Where `attention` chooses sdpa_causal: the same logits to the bit, and no mask reaches SDPA in eager mode either."""
    kv_heads = (
        {"num_key_value_heads": 1} if kind in ("llama", "mixtral", "qwen3", "mistral", "phi3", "gemma3_text") else {}
    )
    feed_forward = {"ffn_dim": 64, "word_embed_proj_dim": 32} if kind == "opt" else {"intermediate_size": 64}
    extra = {"pad_token_id": 0} | kv_heads | ({} if kind in ("gpt2", "falcon") else feed_forward)
    keys = {"model_type": kind, **SIZES, **extra}
    if attention(ModelConfig(model_config=keys), config_of(keys), ObjectiveConfig(), 16) is None:
        pytest.skip(f"{kind} trains with the library's own mask")
    torch.manual_seed(0)
    ids, masks = torch.randint(1, 50, (2, 16)), []
    library = AutoModelForCausalLM.from_config(config_of(keys), attn_implementation="sdpa").eval()
    ours = AutoModelForCausalLM.from_config(config_of(keys), attn_implementation="sdpa_causal").eval()
    ours.load_state_dict(library.state_dict())
    sdpa = torch.nn.functional.scaled_dot_product_attention
    expected = library(input_ids=ids, use_cache=False).logits

    def seen(*args, **kwargs):
        masks.append((kwargs.get("attn_mask"), kwargs.get("is_causal")))
        return sdpa(*args, **kwargs)

    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", seen)
    assert torch.equal(ours(input_ids=ids, use_cache=False).logits, expected)
    assert masks == [(None, True)] * 2


def compiled_graphs(kind, implementation):
    """FX graphs of a whole causal LM, as torch.compile hands them to its backend."""
    keys = {"llama": LLAMA, "gpt2": {"model_type": "gpt2", **SIZES}}[kind]
    model, graphs = AutoModelForCausalLM.from_config(config_of(keys), attn_implementation=implementation), []
    model.loss_type = "ForCausalLM"
    model.config.use_cache = False
    torch._dynamo.reset()
    ids = torch.randint(0, 50, (2, 16))
    torch.compile(model, fullgraph=True, backend=lambda gm, inputs: graphs.append(gm) or gm)(input_ids=ids, labels=ids)
    return graphs


def masks_in(graphs):
    nodes = [node for graph in graphs for node in graph.graph.nodes]
    calls = [node for node in nodes if "scaled_dot_product_attention" in str(node.target)]
    four = [n for n in nodes if getattr(v := n.meta.get("example_value"), "dtype", None) == torch.bool and v.ndim == 4]
    return [(node.kwargs.get("attn_mask"), node.kwargs.get("is_causal")) for node in calls], four


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_no_mask_is_built_under_compile(kind):
    """One graph without breaks, SDPA on its causal path, no (B, 1, T, T) mask. The library's own path has one."""
    calls, four = masks_in(compiled_graphs(kind, "sdpa_causal"))
    assert calls == [(None, True)] * 2 and four == []
    calls, four = masks_in(compiled_graphs(kind, "sdpa"))
    assert all(mask is not None and not causal for mask, causal in calls) and four, "the trap is gone: drop sdpa_causal"


def test_gpt2_counts_its_targets(tmp_path):
    """The Trainer takes GPT-2's labels for unshifted; its losses were T - 1 / T of what they are."""
    keys = {"model_type": "gpt2", **SIZES, "resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
    args = TrainingArguments(str(tmp_path), use_cpu=True, report_to="none", per_device_eval_batch_size=2)
    model = load_model(ModelConfig(model_config=keys), config_of(keys), ObjectiveConfig(), 4, args)
    rows = [{"input_ids": list(ids), "labels": list(ids)} for ids in torch.randint(0, 50, (4, 4)).tolist()]
    expected = model.eval()(**{k: torch.tensor([r[k] for r in rows]) for k in rows[0]}).loss.item()
    assert Trainer(model, args, eval_dataset=rows).evaluate()["eval_loss"] == pytest.approx(expected, rel=1e-6)
    model.loss_type = None
    wrong = Trainer(model, args, eval_dataset=rows).evaluate()["eval_loss"]
    assert wrong == pytest.approx(expected * 3 / 4, rel=1e-6), "the Trainer is mended: drop _ready"
