"""Bytes that a process gives to collectives in one training step, by strategy; docs/parallelism.md has the formulas.

    python benchmarks/communication.py            # a small Llama in fp32 on 2 CPU processes, a launch a strategy
    python benchmarks/communication.py tp ep      # some of them

Counted is the tensor that a process puts into an all-reduce, a reduce-scatter, an all-to-all or a send, and the one that it
gets out of an all-gather; the mean of both processes. FSDP2 runs here with the shim of the tests.
"""

import json
import os
import runpy
import sys
import tempfile
from pathlib import Path

import torch
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import TrainerCallback
from transformers.trainer import DEFAULT_CALLBACKS

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
from tests.running import launch, metrics, write_config  # noqa: E402

LLAMA = {"model_type": "llama", "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 4}
LLAMA |= {"num_attention_heads": 4, "num_key_value_heads": 2, "tie_word_embeddings": False}
MIXTRAL = LLAMA | {"model_type": "mixtral", "num_local_experts": 4, "num_experts_per_tok": 2}
CASES = ("ddp", "zero1", "zero2", "zero3", "fsdp2", "tp", "pipeline", "fsdp2_cp", "zero3_sp", "ep")
SHIMS = {"fsdp2": "fsdp_on_cpu", "fsdp2_cp": "ring_on_cpu"}
KINDS = {"allreduce_": "all-reduce", "all_reduce": "all-reduce", "_allgather_base_": "all-gather", "send": "send"}
KINDS |= {"all_gather_into_tensor": "all-gather", "_reduce_scatter_base_": "reduce-scatter"}
KINDS |= {"all_to_all_single": "all-to-all", "alltoall_base_": "all-to-all"}


class Count(TorchDispatchMode, TrainerCallback):
    """Of the last step, without what is below 1 kB: numbers of targets, flags, rotary frequencies."""

    seen: dict[str, int]

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if DTensor in types:  # its own code comes first, and communicates with plain tensors
            return NotImplemented
        found, name = function(*args, **kwargs or {}), function.__name__.split(".")[0]
        if kind := KINDS.get(name):
            given = {"all_to_all_single": args[:1], "alltoall_base_": args[1:2]}.get(name, (args, found))
            size = max(x.nbytes for x in tree_leaves(given) if isinstance(x, torch.Tensor))
            self.seen[kind] = self.seen.get(kind, 0) + size * (size > 1000)
        return found

    def on_step_begin(self, args, state, control, **kwargs):
        self.seen = {}

    def on_step_end(self, args, state, control, **kwargs):
        Path(args.output_dir, f"sent{args.process_index}.json").write_text(json.dumps(self.seen))


def main():
    os.chdir(tempfile.mkdtemp())
    keys = {"max_steps": 2, "global_batch_size": 8, "per_device_train_batch_size": 2, "sequence_length": 64}
    for name in sys.argv[1:] or CASES:
        config = write_config(Path.cwd(), model_config=MIXTRAL if name == "ep" else LLAMA, **keys)
        argv = ["--config", config, "--output_dir", name]
        done = launch(name, *argv, script=Path(__file__).resolve(), fault=SHIMS.get(name, ""), timeout=600)
        assert done.code == 0, done.err[-3000:]
        sent = [json.loads(Path(name, f"sent{rank}.json").read_text()) for rank in (0, 1)]
        mean = {kind: f"{sum(one[kind] for one in sent) / 2:,.0f}" for kind in sent[0] if sent[0][kind]}
        print(f"{name}, {metrics(name)['parameters']:,} parameters: {mean}", flush=True)


if __name__ == "__main__" and "RANK" not in os.environ:
    main()
elif __name__ == "__main__":
    Count.seen, counted = {}, Count()
    DEFAULT_CALLBACKS.append(counted)
    sys.argv[0] = str(ROOT / "recipes/pretrain/run.py")
    with counted:
        runpy.run_path(sys.argv[0], run_name="__main__")
