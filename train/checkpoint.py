"""Checkpoints of a run, under global parameter names: any layout resumes what any other saved.

    checkpoints/step_00000500/
        rank_00000.pt ...    each rank's pieces of the float32 master weights and Adam moments
        checkpoint.json      step, samples consumed, model, layout, dataset, file sizes; its presence means "complete"

A checkpoint is written beside its final name and renamed when all ranks are done, so a crash leaves the one before
intact. Files are read with torch's weights-only loader, which runs no code from them.
"""

import json
import os
import pickle
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from parallel import state
from parallel.engine import Engine
from parallel.megatron import Groups
from parallel.stage import Stage
from parallel.state import SavedState
from train.config import Config
from train.run_dir import finite_or_none


class CheckpointError(RuntimeError):
    """A checkpoint cannot be used; one clear line."""


@dataclass(frozen=True)
class Progress:
    """Where a run stands."""

    step: int
    data_state: dict[str, Any]


def save(folder: Path, engine: Engine, config: Config, dataset: dict[str, Any], progress: Progress) -> Path:
    """Writes a checkpoint (all ranks call) and deletes those beyond `checkpoint.keep`."""
    final = folder / f"step_{progress.step:08d}"
    temporary = final.with_suffix(".tmp")
    rank = dist.get_rank()
    if rank == 0:
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir(parents=True)
    dist.barrier()
    torch.save(engine.state_dict(), temporary / _rank_file(rank))
    dist.barrier()
    if rank == 0:
        sizes = {file.name: file.stat().st_size for file in sorted(temporary.iterdir())}
        marker = {
            "step": progress.step,
            "data_state": progress.data_state,
            "config": finite_or_none(config.as_dict()),
            "dataset": dataset,
            "world_size": dist.get_world_size(),
            "sizes_bytes": sizes,
        }
        (temporary / "checkpoint.json").write_text(json.dumps(marker, indent=2) + "\n")
        shutil.rmtree(final, ignore_errors=True)
        os.replace(temporary, final)
        for old in complete_checkpoints(folder)[: -config.checkpoint.keep]:
            shutil.rmtree(old, ignore_errors=True)
    dist.barrier()
    return final


def complete_checkpoints(folder: Path) -> list[Path]:
    """Folders of complete checkpoints, oldest first."""
    return sorted(path.parent for path in folder.glob("step_*[0-9]/checkpoint.json"))


def read_marker(path: Path) -> dict[str, Any]:
    """The description of a checkpoint, its files checked for presence and size."""
    try:
        marker = json.loads((path / "checkpoint.json").read_text())
        sizes = marker["sizes_bytes"]
    except (OSError, ValueError, KeyError) as error:
        raise CheckpointError(
            f"{path}/checkpoint.json: damaged ({error}); delete this checkpoint to use the one before"
        ) from None
    for name, size in sizes.items():
        found = (path / name).stat().st_size if (path / name).exists() else None
        if found != size:
            state = "is missing" if found is None else f"has {found} bytes, expected {size}"
            raise CheckpointError(f"{path / name} {state}; delete this checkpoint to use the one before")
    return dict(marker)


def check_fits(path: Path, marker: dict[str, Any], config: Config, dataset: dict[str, Any]) -> None:
    """Raises CheckpointError where the checkpoint is of another model or dataset."""
    here = config.as_dict()
    for key, value in here["model"].items():
        there = marker["config"]["model"].get(key)
        if there != value:
            raise CheckpointError(
                f"{path}: written with model.{key} = {there!r}, but the configuration has {value!r}; "
                "use the same value or another run_dir"
            )
    for key, value in dataset.items():
        if marker["dataset"].get(key) != value:
            raise CheckpointError(
                f"{path}: trained on a dataset with {key} = {marker['dataset'].get(key)!r}, but {config.data.path} "
                f"has {value!r}; "
                "use the same dataset or another run_dir"
            )


def read_state(path: Path, marker: dict[str, Any]) -> SavedState:
    """The pieces of all ranks, memory-mapped."""
    saved = []
    for name in sorted(marker["sizes_bytes"]):
        try:
            saved.append(torch.load(path / name, map_location="cpu", weights_only=True, mmap=True))
        except (OSError, RuntimeError, EOFError, pickle.UnpicklingError) as error:
            raise _damaged(path / name, error) from None
    return SavedState(saved)


def load(path: Path, marker: dict[str, Any], engine: Engine, vocab_size: int) -> None:
    """Restores an engine of any layout (all ranks call)."""
    try:
        engine.load_state_dict(read_state(path, marker), vocab_size)
    except (KeyError, RuntimeError) as error:
        raise _damaged(path, error) from None


def load_weights(path: Path, marker: dict[str, Any], stage: Stage, groups: Groups, vocab_size: int) -> None:
    """Fills the weights alone, for evaluation."""
    try:
        state.load_weights(stage, groups, read_state(path, marker), vocab_size)
    except (KeyError, RuntimeError) as error:
        raise _damaged(path, error) from None


def _damaged(path: Path, error: Exception) -> CheckpointError:
    return CheckpointError(
        f"{path}: damaged ({str(error).splitlines()[0]}); delete this checkpoint to use the one before"
    )


def _rank_file(rank: int) -> str:
    return f"rank_{rank:05d}.pt"
