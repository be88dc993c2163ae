"""Make a stage's folder ready to be trained in; a branch starts from its trunk's checkpoint."""

import json
import os
import shutil
from pathlib import Path

from data.files.own import write_atomically
from train.run.names import ENTROPY, FAILURE, JOURNAL, METRICS, RANKS, STAGE
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
    write_atomically(config_file, json.dumps(stage.config.as_dict(), indent=2) + "\n", stage.config.file_mode)
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
    for file in (METRICS, ENTROPY, RANKS, JOURNAL):  # before the checkpoint, which says that a branch has begun
        if not (stage.copied_from / file).exists():
            continue  # training the branch warns of what its checkpoint says there was
        shutil.copyfile(stage.copied_from / file, stage.folder / f"{file}.tmp")
        os.replace(stage.folder / f"{file}.tmp", stage.folder / file)  # resuming cuts it back to the checkpoint's step
    finished = branch.checkpoint(max(earlier))
    unfinished = finished.with_name(f"{finished.name}.tmp")
    shutil.rmtree(unfinished, ignore_errors=True)
    shutil.copytree(trunk.checkpoint(max(earlier)), unfinished, copy_function=_link_or_copy)
    os.replace(unfinished, finished)


def _link_or_copy(source: str, target: str) -> None:
    try:
        os.link(source, target)  # a checkpoint is never written to once complete
    except OSError:
        shutil.copyfile(source, target)
