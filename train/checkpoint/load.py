"""Find and load checkpoints. Their tensors have global names, so any layout resumes what any other saved.

    checkpoints/step_00000500/    see train/checkpoint/folder.py

Before a checkpoint is loaded, the size and sha256 of every file are checked, each file by one rank. If any file is
damaged, the checkpoint before is taken. The ranks agree over a gloo group of their own, so that the collectives of the
training are not disturbed; a process that has joined no group reads alone (train/checkpoint/whole.py).
train/checkpoint/saver.py saves checkpoints.
"""

import warnings
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed import ProcessGroup
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.metadata import TensorStorageMetadata

from data.errors import first_line
from data.shards.manifest import Manifest
from parallel.agreement import on_rank_zero
from parallel.state.chunks import Chunk, ChunkLoadPlanner, whole_chunk
from train.checkpoint.folder import DamagedFileError, Folder, read_marker, verify_file
from train.checkpoint.root import CheckpointError
from train.checkpoint.tensors import Reader
from train.config import Config
from train.run import same_run
from train.run.names import JOURNAL, MARKER, checkpoint_name, step_of
from train.run.reader import RunReader
from train.run.same_run import Use

VERIFYING_THREADS = 4


class SavedCheckpoint:
    """A complete checkpoint whose files are as they were written.

    Attributes:
        marker: what checkpoint.json holds.
        names: global names of its tensors.
    """

    def __init__(self, folder: Folder, marker: dict[str, Any], group: ProcessGroup | None) -> None:
        self.folder, self.marker, self._group = folder, marker, group
        self.step: int = marker["step"]
        self.adam_step: float = marker["adam_step"]
        self._reader = Reader(folder)
        self.names = self._reader.read_metadata().state_dict_metadata.keys()

    def read(self, chunks: list[Chunk]) -> None:
        """Fill the chunks with the saved values; all ranks call.

        Raises:
            CheckpointError: a tensor is missing or has another shape.
        """
        planner = ChunkLoadPlanner(chunks)
        try:
            with warnings.catch_warnings(action="ignore", category=UserWarning):  # of a process that is alone
                dcp.load({}, storage_reader=self._reader, planner=planner, process_group=self._group)
        except CheckpointException as error:
            raise CheckpointError(f"{self.folder.address}: {first_failure(error)}") from None

    def read_whole(self, name: str) -> Tensor:
        """Return one whole tensor by its name in the checkpoint, without other ranks.

        Raises:
            CheckpointError: there is none of that name, or its file is damaged.
        """
        metadata = self._reader.read_metadata()
        found = metadata.state_dict_metadata.get(name)
        if not isinstance(found, TensorStorageMetadata):
            raise CheckpointError(f"{self.folder.address}: {name} is not in the checkpoint; restore it from a copy")
        tensor = torch.empty(found.size, dtype=found.properties.dtype)
        planner = ChunkLoadPlanner([whole_chunk(name, tensor)])
        planner.set_up_planner({}, metadata, is_coordinator=True)
        try:
            self._reader.read_data(planner.create_local_plan(), planner)
        except (ValueError, OSError, DamagedFileError) as error:
            raise CheckpointError(f"{self.folder.address}: {first_line(error)}") from None
        return tensor


def checkpoint_group(timeout_s: float) -> ProcessGroup:
    """Create the process group over which ranks agree on checkpoints; all ranks call."""
    return dist.new_group(backend="gloo", timeout=timedelta(seconds=timeout_s))


def steps_saved(root: Folder) -> list[int]:
    """Return the steps of the complete checkpoints below a folder, oldest first."""
    steps = [step for name in root.names() if (step := step_of(name)) is not None]
    return sorted(step for step in steps if MARKER in root.child(checkpoint_name(step)).entries())


def newest_sound(
    root: Folder, group: ProcessGroup | None, run_id: str | None, before: int | None = None
) -> tuple[SavedCheckpoint | None, list[str]]:
    """Find the newest checkpoint whose files are all intact; all ranks call and get the same answer.

    Args:
        root: folder of the run's checkpoints.
        group: from `checkpoint_group`; None in a process that has joined no group.
        run_id: identity of the run; None, of a run of an earlier version, takes any.
        before: only steps below this one count; None takes all.

    Returns:
        The checkpoint, or None if none is sound; and what is wrong with each newer one.

    Raises:
        CheckpointError: the newest intact one is of another run.
        OSError: the folder cannot be read now.
    """
    steps = on_rank_zero(lambda: steps_saved(root), group)
    faults: list[str] = []
    for step in reversed([step for step in steps if before is None or step < before]):
        saved, fault = _sound(root.child(checkpoint_name(step)), group, run_id)
        if fault is None:
            return saved, faults
        faults.append(fault)
    return None, faults


def sound_at(root: Folder, group: ProcessGroup | None, run_id: str | None, step: int) -> SavedCheckpoint:
    """Find the checkpoint of a step; arguments as for `newest_sound`.

    Raises:
        CheckpointError: there is none, it is damaged, or it is of another run.
        OSError: the folder cannot be read now.
    """
    steps = on_rank_zero(lambda: steps_saved(root), group)
    if step not in steps:
        there = f"complete are steps {', '.join(map(str, steps))}" if steps else "none is complete"
        raise CheckpointError(f"{root.address}: holds no complete checkpoint of step {step}; {there}")
    saved, fault = _sound(root.child(checkpoint_name(step)), group, run_id)
    if saved is None:
        raise CheckpointError(f"{fault}; choose another step")
    return saved


def _sound(folder: Folder, group: ProcessGroup | None, run_id: str | None) -> tuple[SavedCheckpoint | None, str | None]:
    """Return a complete checkpoint, or what is wrong with it; raise CheckpointError if it is of another run."""
    marker, fault = _verified_marker(folder, group)
    if fault is not None:
        return None, fault
    check_owner(folder, marker, run_id)
    return _opened(folder, marker, group)


def check_owner(folder: Folder, marker: dict[str, Any], run_id: str | None) -> None:
    """Raise CheckpointError if a checkpoint is of another run; those of earlier versions do not say whose they are."""
    theirs = marker.get("run_id")
    if run_id is not None and theirs not in (None, run_id):
        raise CheckpointError(
            f"{folder.address}: is of run {theirs}, and this is run {run_id}; move it away. To go on from it, give it "
            "to a new run_dir: as its checkpoints/, with nothing else"
        )


def newest_to_resume(
    root: Folder, group: ProcessGroup, run_id: str, config: Config, dataset: dict[str, Any]
) -> tuple[SavedCheckpoint | None, list[str]]:
    """Find the checkpoint to resume from; all ranks call.

    Returns:
        As `newest_sound`; None for a new run.

    Raises:
        CheckpointError: there are checkpoints but none is sound; it is of another run, model, dataset or batch size; or
            the run has saved checkpoints that are not there.
    """
    saved, faults = newest_sound(root, group, run_id)
    if saved is None and faults:
        raise CheckpointError(
            f"{root.address}: no checkpoint is intact: {'; '.join(faults)}; restore one from a copy, or choose another "
            "run_dir to start anew"
        )
    if saved is None:
        on_rank_zero(lambda: check_not_lost(root, Path(config.run_dir)))
    else:
        check_fits(saved, config, dataset, Use.RESUME)
    return saved, faults


def _verified_marker(folder: Folder, group: ProcessGroup | None) -> tuple[dict[str, Any], str | None]:
    """Return the marker, and the first fault in it or in the files; the ranks share the files between them."""
    rank, ranks = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
    try:
        marker, fault = (read_marker(folder) if rank == 0 else {}), None
    except DamagedFileError as error:
        marker, fault = {}, str(error)
    marker, fault = on_rank_zero(lambda: (marker, fault), group)
    if fault is None:
        names = sorted(marker["files"])[rank::ranks]
        fault = _first_of_all_ranks(_fault_of(folder, names, marker["files"]), group)
    return marker, fault


def _opened(
    folder: Folder, marker: dict[str, Any], group: ProcessGroup | None
) -> tuple[SavedCheckpoint | None, str | None]:
    """Open the checkpoint on every rank; return it, and the first fault that any rank met."""
    saved, fault = None, None
    try:
        saved = SavedCheckpoint(folder, marker, group)
    except DamagedFileError as error:
        fault = str(error)
    return saved, _first_of_all_ranks(fault, group)


def _first_of_all_ranks(fault: str | None, group: ProcessGroup | None) -> str | None:
    if not dist.is_initialized():
        return fault
    gathered: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(gathered, fault, group=group)
    return next((each for each in gathered if each is not None), None)


def _fault_of(folder: Folder, names: list[str], files: dict[str, Any]) -> str | None:
    def check(name: str) -> str | None:
        try:
            verify_file(folder, name, files[name])
        except DamagedFileError as error:
            return str(error)
        return None

    with ThreadPoolExecutor(VERIFYING_THREADS, thread_name_prefix="verify") as threads:
        return next((fault for fault in threads.map(check, names) if fault is not None), None)


def dataset_identity(manifest: Manifest) -> dict[str, str | int]:
    """Return what a checkpoint records of its dataset."""
    return {
        "vocab_size": manifest.vocab_size,
        "tokenizer_sha256": manifest.tokenizer_sha256,
        "fingerprint": manifest.fingerprint,
    }


def check_fits(saved: SavedCheckpoint, config: Config, dataset: dict[str, Any], use: Use) -> None:
    """Check that a checkpoint is of the same run, as far as its use requires.

    Args:
        dataset: identity of the dataset here (dataset_identity).
        use: Use.WEIGHTS or Use.RESUME; train/run/same_run.py says which keys each one compares.

    Raises:
        CheckpointError: it is of another model or dataset, or its steps have another size.
    """
    there = {**saved.marker["config"], "dataset": saved.marker["dataset"]}
    differing = same_run.same_run(there, {**config.as_dict(), "dataset": dataset}, use)
    if not differing:
        return
    first, address = differing[0], saved.folder.address
    if first.key.startswith("dataset."):
        key = first.key.removeprefix("dataset.")
        raise CheckpointError(
            f"{address}: trained on a dataset with {key} = {first.there!r}, but {config.data.path} has {first.here!r}; "
            "use the same dataset or another run_dir"
        )
    done = "written" if first.key.startswith("model.") else "trained"
    raise CheckpointError(
        f"{address}: {done} with {first.key} = {first.there!r}, but the configuration has {first.here!r}; "
        "use the same value or another run_dir"
    )


def check_not_lost(root: Folder, run_dir: Path) -> None:
    """Raise CheckpointError if a run without checkpoints has saved some: starting anew would cut its curve."""
    saved = [row["step"] for row in RunReader(run_dir).journal() if row.get("event") == "saved"]
    if saved:
        raise CheckpointError(
            f"{root.address}: holds no checkpoint, but the run in {run_dir} saved one at step {saved[-1]} "
            f"({JOURNAL}); set checkpoint.path to where that is, or choose another run_dir to start anew"
        )


def changed_settings(saved: SavedCheckpoint, config: Config) -> dict[str, list[Any]]:
    """Return [old, new] of each setting that is not what the checkpoint was trained with."""
    return same_run.changed_settings(saved.marker["config"], config.record())


def first_failure(error: CheckpointException) -> str:
    """Return the error of the first rank that failed, with its number."""
    rank, (cause, _) = next(iter(error.failures.items()))
    return f"rank {rank}: {first_line(cause)}"
