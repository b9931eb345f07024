"""A recipe with a fault of tests/running.py in it, for `accelerate launch`."""

import os
import runpy
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from tests.running import apply

if os.environ["FAULT_RANK"] in ("", os.environ["RANK"]):
    apply(os.environ["FAULT"])
sys.argv[0] = os.environ["FAULT_SCRIPT"]
runpy.run_path(sys.argv[0], run_name="__main__")
