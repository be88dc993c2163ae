import shutil
from pathlib import Path

import pytest

from train.config.config import config_from_dict
from train.run import names
from train.run.directory import RunDirectory
from train.run.lock import LockLostError


@pytest.mark.parametrize("how", ["removed", "replaced", "with the folder"])
def test_a_lock_that_is_gone_is_noticed(tmp_path: Path, how: str) -> None:
    config = config_from_dict({"run_dir": str(tmp_path / "run"), "training": {"train_steps": 1}})
    directory = RunDirectory(config.run_dir, config)
    directory.check()
    lock = directory.path / names.LOCK
    shutil.rmtree(directory.path) if how == "with the folder" else lock.unlink()
    other = RunDirectory(config.run_dir, config) if how == "replaced" else None
    with pytest.raises(LockLostError, match=r"run.lock: was removed or replaced"):
        directory.check()
    for each in filter(None, (directory, other)):
        each.close()
