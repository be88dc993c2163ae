"""Read the weights of a checkpoint that this program saved, in one process; the optimizer's state is left."""

import hashlib
import warnings
from pathlib import PurePosixPath

import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.api import CheckpointException

from data.errors import DataError
from data.files.address import resolved_address
from data.files.strict_json import to_json
from model.config import ModelConfig
from model.transformer import global_shapes
from parallel.state.chunks import ChunkLoadPlanner, whole_chunk
from train.checkpoint.folder import DamagedFileError, Folder, read_marker, verify_file
from train.checkpoint.load import first_failure, steps_saved
from train.checkpoint.root import CheckpointError
from train.checkpoint.tensors import Reader
from train.config.tree import build
from train.initial.source import Source, Weights
from train.run.names import CHECKPOINTS, CONFIG, MARKER, checkpoint_name
from train.run.reader import RunError, RunReader


def find_checkpoint(folder: Folder) -> Folder | None:
    """Return the newest complete checkpoint of a run's folder, of a folder of checkpoints, or of a checkpoint's own.

    Returns:
        None if the folder is none of the three, or holds no complete checkpoint.

    Raises:
        CheckpointError: the run's config.json is damaged.
    """
    entries = folder.entries()
    if MARKER in entries:
        return folder
    root = folder
    if CHECKPOINTS in entries:
        root = folder.child(CHECKPOINTS)
    elif CONFIG in entries and folder.local_path is not None:  # a run that saves elsewhere
        try:
            path = ((RunReader(folder.local_path).config() or {}).get("checkpoint") or {}).get("path")
            root = Folder(resolved_address(path)) if isinstance(path, str) else folder
        except (RunError, DataError) as error:
            raise CheckpointError(str(error)) from None
    steps = steps_saved(root)
    return root.child(checkpoint_name(steps[-1])) if steps else None


def read_checkpoint(folder: Folder) -> Source:
    """Read the weights of a checkpoint, after checking the digest of every file.

    Raises:
        CheckpointError: it is damaged.
    """
    try:
        marker = read_marker(folder)
        for name, digest in sorted(marker["files"].items()):
            verify_file(folder, name, digest)
        faults: list[str] = []
        model = build(ModelConfig, marker["config"].get("model", {}), "model.", faults)
        if faults or (faults := model.faults()):
            raise CheckpointError(f"{folder.address}: {faults[0]}")
        model = model.resolved()
        if model.norm == "taper":
            raise CheckpointError(
                f"{folder.address}: has model.norm = 'taper', whose gate and scales cannot be carried over; name a "
                "model with other norms"
            )
        shapes = global_shapes(model, marker["dataset"]["vocab_size"])
        weights: Weights = {name: torch.empty(shape) for name, shape in shapes.items()}
        chunks = [whole_chunk(f"model.{name}", tensor) for name, tensor in weights.items()]
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # torch's, that one process loads: as is meant
            dcp.load({}, storage_reader=Reader(folder), planner=ChunkLoadPlanner(chunks), no_dist=True)
    except DamagedFileError as error:
        step = PurePosixPath(folder.path).name
        raise CheckpointError(f"{error}; name the folder of an earlier checkpoint than {step}") from None
    except CheckpointException as error:
        raise CheckpointError(f"{folder.address}: {first_failure(error)}") from None
    except KeyError as error:
        raise CheckpointError(f"{folder.address}: its marker lacks {error}; name another checkpoint") from None
    sha256 = hashlib.sha256(to_json(marker, sort_keys=True).encode()).hexdigest()  # with the digests of all files
    tokenizer = marker["dataset"].get("tokenizer_sha256")
    return Source(folder.address, "checkpoint", sha256, model, weights, tokenizer)
