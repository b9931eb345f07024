"""The pretraining recipe; with BATCH set, Slurm's warning goes to that process during step 5, and the step waits for SIGTERM."""

import os
import runpy
import signal
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
from tests import running


def warn():
    if os.environ["RANK"] == "0":
        os.kill(int(os.environ["BATCH"]), signal.SIGUSR1)
    while signal.getsignal(signal.SIGTERM) is not signal.SIG_DFL:  # as the guard leaves it when it has the signal
        time.sleep(0.05)


if os.environ.get("BATCH"):
    running._at_step(5, warn)
sys.argv[0] = str(running.PRETRAIN)
runpy.run_path(sys.argv[0], run_name="__main__")
