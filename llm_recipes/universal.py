"""ZeRO checkpoints on another number of processes, through DeepSpeed's universal checkpoints."""

import argparse
import contextlib
import copy
import functools
import io
import shutil
from pathlib import Path

import torch
from accelerate import PartialState

from llm_recipes.errors import UserError

NAME = "universal"


@functools.cache
def accept_any_world_size() -> None:
    """Lets every DeepSpeed engine of this process load what another number of processes has written.

    Rank 0 then converts the checkpoint inside its own folder, all ranks load that, and it is removed again. While it
    converts, the others wait: `ddp_timeout` must be longer. Frozen weights and buffers stay as the model has them.
    Raises UserError when the conversion fails.
    """
    from deepspeed import DeepSpeedEngine  # only here: it is slow to import, and not everybody has it

    load_checkpoint = DeepSpeedEngine.load_checkpoint

    @functools.wraps(load_checkpoint)
    def load(engine, folder, *args, **kwargs):
        folder, state = Path(folder), PartialState()
        shards = folder / (folder / "latest").read_text().strip()
        written = len([*shards.glob("*_optim_states.pt")])
        if state.is_main_process:
            _remove(folder)  # what a start that was killed has left
            if written != state.num_processes:
                convert(folder, shards, written, state.num_processes)
        state.wait_for_everyone()
        if written == state.num_processes:
            return load_checkpoint(engine, folder, *args, **kwargs)
        engine.load_universal_checkpoint = lambda: True  # for this load only: later ones may be of the same size
        try:
            found = load_checkpoint(engine, folder, *args, **kwargs)
        finally:
            del engine.load_universal_checkpoint
        if engine.zero_optimization_stage() == 3:
            mend(engine.optimizer.optimizer, folder / NAME)
        state.wait_for_everyone()
        if state.is_main_process:
            _remove(folder)
        return found

    DeepSpeedEngine.load_checkpoint = load


def convert(folder: Path, shards: Path, written: int, processes: int) -> None:
    """Writes the checkpoint `shards` of `folder` as a universal one beside them. Raises UserError, and leaves nothing then."""
    from deepspeed.checkpoint import ds_to_universal

    print(f"{folder} was written with --num_processes {written}: converting it for {processes}", flush=True)
    # One worker is this process: no child may outlive a kill, nor be forked beside the threads of gloo.
    options = argparse.Namespace(
        input_folder=str(shards), output_folder=str(folder / NAME), keep_temp_folder=False, strict=True,
        inject_missing_state=True, num_extract_workers=1, num_merge_workers=1,
    )  # fmt: skip
    try:
        # needed at once: the pieces, the parameters merged from them, and with ZeRO-3 one rank's file as it is
        size, free = 3 * sum(file.stat().st_size for file in shards.iterdir()), shutil.disk_usage(folder).free
        if free < size:
            raise OSError(f"it needs {size / 1e6:,.0f} MB for a while, {free / 1e6:,.0f} MB are free")
        with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
            ds_to_universal.main(options)
    except Exception as error:  # a full disk is a RuntimeError of torch, what is missing an assertion of DeepSpeed
        _remove(folder)
        raise UserError(
            f"{folder} could not be converted for {processes} processes: {error}; launch with --num_processes {written}"
        ) from error


def _remove(folder: Path) -> None:
    (folder / "latest_universal").unlink(missing_ok=True)
    shutil.rmtree(folder / NAME, ignore_errors=True)


def mend(optimizer: torch.optim.Optimizer, universal: Path) -> None:
    """Puts right what DeepSpeed 0.19.8's ZeRO-3 loader (load_hp_checkpoint_state_from_checkpoint_dir_stage3) mixes up.

    It hands the same `step` tensor to all weights, so that each counts the updates of all, and the first parameter
    group's options, such as weight decay, to every group.
    """
    saved = torch.load(universal / "zero/optimizer_state.pt", map_location="cpu", weights_only=False)["param_groups"]
    for group, options in zip(optimizer.param_groups, saved, strict=True):
        group.update({key: value for key, value in options.items() if key != "params"})
    for state in optimizer.state.values():
        state["step"] = copy.deepcopy(state["step"])
