"""Trains cases of matrix.py one after the other in the processes of one launch: imports cost more than they do.

accelerate launch --config_file accelerate_configs/ddp.yaml tests/parallel/worker.py cases.json
"""

import json
import os
import runpy
import sys
import traceback
from pathlib import Path

import torch
from transformers import TrainingArguments

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
from tests.parallel.matrix import begin
from tests.running import PRETRAIN


def main():
    for case in json.loads(Path(sys.argv[1]).read_text()):
        os.environ["ACCELERATE_USE_PARALLELISM_CONFIG"] = "true"
        for kind in ("pp", "dp_replicate", "dp_shard", "cp", "sp", "tp", "ep"):
            os.environ[f"PARALLELISM_CONFIG_{kind.upper()}_SIZE"] = str(case["sizes"].get(kind, 1))
        sys.argv[1:] = case["argv"]
        if os.environ["RANK"] == "0":
            begin(case["argv"][case["argv"].index("--output_dir") + 1], case["start"])
        TrainingArguments(use_cpu=True, report_to="none").distributed_state.wait_for_everyone()
        try:
            runpy.run_path(str(PRETRAIN))["main"].__wrapped__()
        except BaseException:
            print(case, traceback.format_exc(), file=sys.stderr, flush=True)
            os._exit(1)  # the others would wait for this one
        torch.distributed.barrier()
    os._exit(0)


if __name__ == "__main__":
    main()
