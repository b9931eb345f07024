"""How a recipe ends: one sentence for the person, one exit code for the scheduler."""

import functools
import os
import sys
import time
import warnings

import datasets
import huggingface_hub
import torch.distributed
import transformers

from llm_recipes import _compat


class RecipeExit(Exception):
    """Ends the run with `exit_code` and its message as the only output; never a traceback."""

    exit_code = 1


class UserError(RecipeExit):
    """Something the user can mend: config, data, disk, launch line. Raised before anything is lost."""

    exit_code = 2


class Diverged(RecipeExit):
    """Loss or gradient norm is not finite. Raised before the optimizer would have used it."""

    exit_code = 4


class Finished(RecipeExit):
    """There is nothing left to do."""

    exit_code = 0


class PushFailed(RecipeExit):
    """The Hub did not take the result; the local copy is whole."""

    exit_code = 3


class Interrupted(RecipeExit):
    """SIGTERM or SIGINT arrived and a checkpoint was written. 75 is EX_TEMPFAIL of sysexits.h: try again."""

    exit_code = 75


def entrypoint(main):
    """Decorates a recipe's `main`: `RecipeExit` becomes its message on stderr and its exit code.

    All ranks usually fail for the same reason, so the others wait for rank 0 to speak first;
    the launcher ends them as soon as it has exited.
    """

    @functools.wraps(main)
    def run():
        _quiet()
        try:
            main()
        except RecipeExit as stop:
            rank = int(os.environ.get("RANK", 0))
            if rank and stop.exit_code:
                time.sleep(5)
            if stop.exit_code or not rank:
                print(f"[rank {rank}] {stop}" if rank else str(stop), file=sys.stderr, flush=True)
            sys.exit(stop.exit_code)
        if torch.distributed.is_initialized():
            torch.distributed.destroy_process_group()
            _leave()

    return run


def _leave() -> None:
    """Ends the process well, without taking the interpreter apart.

    Threads of gloo outlive `destroy_process_group`. One that lets go of a tensor while the interpreter is taken apart
    aborts the process (SIGABRT, "terminate called without an active exception"), and the launcher fails a finished run.
    """
    _compat.run_exit_functions()  # trackers say goodbye here
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)


def _quiet() -> None:
    """Bars are for terminals: in a log file each refresh is a line. Some calls between libraries warn at every step, and
    TRL reports its use over the network.
    """
    huggingface_hub.constants.HF_HUB_DISABLE_TELEMETRY = True
    warnings.filterwarnings("ignore", r"`torch\.distributed\.\w+` is deprecated", FutureWarning)
    warnings.filterwarnings("ignore", r"`is_gradient_checkpointing` is deprecated", FutureWarning)
    if not sys.stderr.isatty():
        datasets.disable_progress_bars()
        transformers.utils.logging.disable_progress_bar()
