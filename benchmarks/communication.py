"""Bytes a process gives to collectives in one step (of an all-gather: what it gets), by strategy, mean of two CPU processes.

python benchmarks/communication.py [tp ep ...]    # a launch for each strategy of docs/parallelism.md, which has the formulas
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
from transformers import TrainerCallback, trainer

sys.path.insert(0, str(ROOT := Path(__file__).resolve().parents[1]))
from tests.parallel.matrix import MIXTRAL, MODEL
from tests.running import launch, write_config

CASES = dict.fromkeys(("ddp", "zero1", "zero2", "zero3", "tp", "pipeline", "zero3_sp", "ep"), "")
CASES |= {"fsdp2": "fsdp_on_cpu", "fsdp2_cp": "ring_on_cpu"}


class Count(TorchDispatchMode, TrainerCallback):
    """Of the last step, without what is below 1 kB: numbers of targets, flags, rotary frequencies."""

    seen: dict = {}  # noqa: RUF012

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if DTensor in types:  # its own code comes first, and communicates with plain tensors
            return NotImplemented
        found, name = function(*args, **kwargs or {}), function.__name__.split(".")[0].strip("_")
        if "c10d" in function.namespace and name.startswith(("all", "reduce_scatter", "send")):
            given = {"all_to_all_single": args[:1], "alltoall_base": args[1:2]}.get(name, (args, found))
            size = max(x.nbytes for x in tree_leaves(given) if isinstance(x, torch.Tensor))
            self.seen[name] = self.seen.get(name, 0) + size * (size > 1000)
        return found

    def on_step_end(self, args, state, control, **kwargs):
        Path(args.output_dir, f"sent{args.process_index}.json").write_text(json.dumps(self.seen))
        self.seen = {}


if __name__ == "__main__" and "RANK" in os.environ:  # a process of the launch below
    sys.argv[0] = str(ROOT / "recipes/pretrain/run.py")
    trainer.DEFAULT_CALLBACKS.append(counted := Count())
    with counted:
        runpy.run_path(sys.argv[0], run_name="__main__")
elif __name__ == "__main__":
    os.chdir(tempfile.mkdtemp())
    for name in sys.argv[1:] or CASES:
        sizes = {"max_steps": 2, "global_batch_size": 8, "per_device_train_batch_size": 2, "sequence_length": 64}
        sizes["model_config"] = MIXTRAL | {"num_hidden_layers": 4} if name == "ep" else MODEL
        argv = ["--config", write_config(Path.cwd(), **sizes), "--output_dir", name]
        done = launch(name, *argv, script=Path(__file__).resolve(), fault=CASES[name], timeout=600)
        assert done.code == 0, done.err[-3000:]
        sent = [json.loads(Path(name, f"sent{rank}.json").read_text()) for rank in (0, 1)]
        print(name, {kind: sum(one[kind] for one in sent) // 2 for kind in sent[0] if sent[0][kind]}, flush=True)
