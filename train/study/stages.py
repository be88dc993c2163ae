"""Make a stage's folder ready to be trained in; a branch starts from its trunk's checkpoint."""

import os
import shutil
from pathlib import Path

from data.files.own import replacing, write_atomically
from data.files.strict_json import to_json
from train.checkpoint.folder import Folder, is_file_of_ours
from train.checkpoint.root import OwnedRoot
from train.run.directory import recorded_run_id
from train.run.identity import Identity, new_run_id
from train.run.names import (
    ENTROPY,
    EVALUATION,
    FAILURE,
    IDENTITY,
    JOURNAL,
    LOG,
    MARKER,
    METRICS,
    RANKS,
    STAGE,
    TENSORBOARD,
    TRAINED,
)
from train.run.reader import RunReader
from train.study.suite import Stage


def prepare(stage: Stage) -> Path:
    """Make a stage's folder ready to be trained in.

    Returns:
        The configuration file to train with.
    """
    stage.folder.mkdir(parents=True, exist_ok=True)
    (stage.folder / FAILURE).unlink(missing_ok=True)
    if stage.copied_from is not None:
        branch_off(stage)
    config_file = stage.folder / STAGE
    write_atomically(config_file, to_json(stage.config.as_dict(), indent=2) + "\n", stage.config.file_mode)
    return config_file


def branch_off(stage: Stage) -> None:
    """Give a branch its trunk's history and the trunk's newest checkpoint up to the step where the branch begins.

    A branch that has begun is left as it is. Up to the step where a branch begins, it has the same learning rate as its
    trunk. So it may begin at an earlier checkpoint, or at step 0 if the trunk keeps none, and be the same run.
    """
    assert stage.copied_from is not None
    trunk, branch = RunReader(stage.copied_from), RunReader(stage.folder)
    earlier = [step for step in trunk.complete_steps() if step <= stage.copied_step]
    if branch.complete_steps() or not earlier:
        return
    run_id = recorded_run_id(stage.folder) or recorded_run_id(stage.copied_from) or new_run_id()
    identity = Identity(run_id, str(stage.folder.absolute()))
    write_atomically(stage.folder / IDENTITY, identity.to_json())
    for file in (METRICS, ENTROPY, RANKS, JOURNAL):  # before the checkpoint, which says that a branch has begun
        if not (stage.copied_from / file).exists():
            continue  # training the branch warns of what its checkpoint says there was
        _copy(stage.copied_from / file, stage.folder / file)  # resuming cuts it back to the checkpoint's step
    source, target = trunk.checkpoint(max(earlier)), branch.checkpoint(max(earlier))
    OwnedRoot(Folder(str(target.parent)), run_id).begin(target.name)
    for name in sorted(each.name for each in source.iterdir() if is_file_of_ours(each.name) and each.name != MARKER):
        _link_or_copy(source / name, target / name)
    _copy(source / MARKER, target / MARKER)  # last, since it makes the checkpoint complete


def discard(stage: Stage) -> None:
    """Delete what a training has written, so that the stage begins anew. Other files in its folder stay.

    Raises:
        RunError: config.json is damaged.
    """
    root = Folder(stage.config.checkpoint_folder)
    OwnedRoot(root, recorded_run_id(stage.folder) or new_run_id()).discard_all()
    if root.local_path is not None:
        (root.local_path / IDENTITY).unlink(missing_ok=True)
    for name in (*TRAINED, EVALUATION, FAILURE, LOG):
        (stage.folder / name).unlink(missing_ok=True)
    for events in (stage.folder / TENSORBOARD).glob("events.out.tfevents.*"):
        events.unlink()


def _link_or_copy(source: Path, target: Path) -> None:
    try:
        os.link(source, target)  # a checkpoint is never written to once complete
    except OSError:
        _copy(source, target)


def _copy(source: Path, target: Path) -> None:
    """Copy a file; the target is there as a whole or not at all."""
    with replacing(target) as unfinished:
        shutil.copyfile(source, unfinished)
