"""The pretraining recipe, saying at its end how many bytes each process gave to collectives: of tensors, and of scalars."""

import atexit
import runpy
import sys
from pathlib import Path

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class Count(TorchDispatchMode):
    """DDP's own all-reduce of a bucket, called from C++ in the backward, passes here too."""

    def __init__(self):
        super().__init__()
        self.seen = {}

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function.namespace == "c10d":
            sent = [x for x in tree_leaves(args) if isinstance(x, torch.Tensor)]
            kind = f"{function.__name__.split('.')[0]} {'tensors' if max(x.numel() for x in sent) > 1 else 'scalars'}"
            self.seen[kind] = self.seen.get(kind, 0) + sum(x.numel() * x.element_size() for x in sent)
        return function(*args, **kwargs or {})


if __name__ == "__main__":
    sys.argv[0] = str(Path(__file__).resolve().parents[2] / "recipes/pretrain/run.py")
    counted = Count()
    atexit.register(lambda: print(f"bytes: {counted.seen}", flush=True))
    with counted:
        runpy.run_path(sys.argv[0], run_name="__main__")
