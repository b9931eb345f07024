"""Bytes that one process gives to collectives in one training step, by strategy: docs/parallelism.md has the formulas.

    python -m benchmarks.communication            # a small Llama on 2 CPU processes, fp32; ten minutes on two cores
    python -m benchmarks.communication tp ep      # some of them

The whole tensor counts: what a process gives to an all-reduce, a send, an all-to-all or a reduce-scatter, and what it has
after an all-gather. FSDP2 needs a shim of the tests to run without GPUs.
"""

import json
import os
import sys
import tempfile
from pathlib import Path

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import TrainerCallback
from transformers.trainer import DEFAULT_CALLBACKS

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from tests.running import launch, metrics, write_config

MODEL = {
    "model_type": "llama", "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 4, "num_attention_heads": 4,
    "num_key_value_heads": 2, "tie_word_embeddings": False,
}  # fmt: skip
EXPERTS = MODEL | {"model_type": "mixtral", "num_local_experts": 4, "num_experts_per_tok": 2}
SHIMS = {"fsdp2": "fsdp_on_cpu", "fsdp2_cp": "ring_on_cpu"}
CASES = ("ddp", "zero1", "zero2", "zero3", "fsdp2", "tp", "pipeline", "fsdp2_cp", "zero3_sp", "ep")


class Count(TorchDispatchMode, TrainerCallback):
    """Collectives of the second step, scalars left out."""

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        found = function(*args, **kwargs or {})
        if "c10d" in function.namespace:
            sizes = [sum(x.nbytes for x in tree_leaves(part) if isinstance(x, torch.Tensor)) for part in (*args, found)]
            if max(sizes) > 8:
                self.seen.setdefault(function.__name__.split(".")[0], []).append(max(sizes))
        return found

    def on_step_begin(self, args, state, control, **kwargs):
        self.seen = {}

    def on_step_end(self, args, state, control, **kwargs):
        Path(args.output_dir, f"sent{args.process_index}.json").write_text(json.dumps(self.seen))


if __name__ == "__main__" and "RANK" in os.environ:
    import runpy
    count = Count(); count.seen = {}
    DEFAULT_CALLBACKS.append(count)
    sys.argv[0] = str(Path(__file__).resolve().parents[1] / "recipes/pretrain/run.py")
    with count:
        runpy.run_path(sys.argv[0], run_name="__main__")
elif __name__ == "__main__":
    os.chdir("/tmp/ev/docs/comm")
    for name in sys.argv[1:] or CASES:
        path = write_config(Path.cwd(), f"{name}.yaml", model_config=EXPERTS if name == "ep" else MODEL, max_steps=2, global_batch_size=8, per_device_train_batch_size=2, sequence_length=64)
        done = launch(name, "--config", path, "--output_dir", name, script=Path(__file__).resolve(), fault=SHIMS.get(name, ""), timeout=600)
        if done.code: sys.exit(done.err[-3000:])
        for r in (0, 1):
          seen = json.loads(Path(name, f"sent{r}.json").read_text())
          print(name, metrics(name)["parameters"], r, {k: (len(v), sum(v), v[:6]) for k, v in seen.items()}, flush=True)
