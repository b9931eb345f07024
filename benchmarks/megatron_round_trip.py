"""A small Llama from transformers to Megatron-Core and back, through mbridge, on CPU processes: bits, and the logits between.

    pip install --no-deps --target /tmp/megatron megatron-core==0.16.1 mbridge==0.15.1
    PYTHONPATH=/tmp/megatron torchrun --nproc-per-node 2 benchmarks/megatron_round_trip.py tp    # or pp

mbridge builds Megatron-Core's layers with Transformer Engine, which needs a GPU. Here they are Megatron-Core's own, whose
norms have other names, and two functions say that there is no GPU.
"""

import contextlib
import sys
import tempfile

import torch
import torch.distributed as dist
from mbridge.models.llama import LLaMABridge
from megatron.core import parallel_state
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
from megatron.core.tensor_parallel.random import CudaRNGStatesTracker
from transformers import LlamaConfig, LlamaForCausalLM

NORM = "model.layers.{layer_number}.%s.weight"


class Bridge(LLaMABridge):
    _OTHER_MAPPING = {"input_layernorm.weight": [NORM % "input_layernorm"]}  # noqa: RUF012
    _MLP_MAPPING = LLaMABridge._MLP_MAPPING | {"pre_mlp_layernorm.weight": [NORM % "post_attention_layernorm"]}

    def _get_transformer_layer_spec(self, vp_stage=None):
        return get_gpt_layer_local_spec(normalization="RMSNorm")

    def _build_config(self):
        config = super()._build_config()
        config.use_cpu_initialization, config.sequence_parallel = True, False
        return config


def main():
    dist.init_process_group("gloo")
    torch.cuda.current_device = lambda: "cpu"
    CudaRNGStatesTracker.fork = lambda self, name=None: contextlib.nullcontext()
    rank, ways = dist.get_rank(), dist.get_world_size()
    parallel_state.initialize_model_parallel(*((ways, 1) if sys.argv[1] == "tp" else (1, ways)))
    folders = [tempfile.mkdtemp() for _ in range(2)]
    dist.broadcast_object_list(folders)
    config = LlamaConfig(
        vocab_size=256, hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2,
    )  # fmt: skip
    torch.manual_seed(0)
    model = LlamaForCausalLM(config)
    if rank == 0:
        model.save_pretrained(folders[0])
    dist.barrier()
    config.rope_theta = config.rope_parameters["rope_theta"]  # where transformers had it before 5
    bridge = Bridge(config, dtype=torch.float32)
    ends = parallel_state.is_pipeline_first_stage(), parallel_state.is_pipeline_last_stage()
    there = bridge._model_provider([])(*ends).eval()
    bridge.load_weights([there], folders[0])
    bridge.save_weights([there], folders[1])
    dist.barrier()
    back = LlamaForCausalLM.from_pretrained(folders[1]).state_dict()
    print(f"rank {rank}: the same bits: {all(torch.equal(t, back[name]) for name, t in model.state_dict().items())}")
    if all(ends):
        ids, hidden = torch.arange(16)[None] * 7 % 256, torch.ones(1, 1, 16, 16, dtype=torch.bool).triu(1)
        with torch.no_grad():
            logits, whole = there(ids, torch.arange(16)[None], hidden), model(ids).logits
        print(f"rank {rank}: logits differ by {(logits - whole.chunk(ways, -1)[rank]).abs().max():.1e}")


if __name__ == "__main__":
    main()
