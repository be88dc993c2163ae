"""Where a run writes: its folder and the root of its checkpoints. Rank 0 holds both against other processes."""

from collections.abc import Callable
from typing import Any

from parallel.agreement import on_rank_zero
from train.checkpoint.folder import Folder
from train.checkpoint.root import OwnedRoot, claim
from train.config import Config
from train.run.directory import RunDirectory


class Places:
    """The places of a run. All ranks hold one and call its methods, but for `check` and `close`.

    Attributes:
        run_id: the run's identity, once `open` has returned.
        owned: the run's checkpoints, on rank 0; None elsewhere.
    """

    def __init__(self, config: Config) -> None:
        self._config = config
        self._directory: RunDirectory | None = None
        self.owned: OwnedRoot | None = None
        self.run_id = ""

    def open(self) -> None:
        """Lock both places, and find out which run it is.

        Raises:
            RunError, CheckpointError: one of them cannot be used; the message is one line.
        """
        self.run_id = on_rank_zero(self._open)

    def in_the_way(self, after: int, is_due: Callable[[int], bool]) -> list[str]:
        """Return what `OwnedRoot.in_the_way` returns."""
        return on_rank_zero(lambda: self.owned and self.owned.in_the_way(after, is_due))

    def describe(self, dataset: dict[str, Any]) -> None:
        """Write config.json; `dataset` is the dataset's identity (train.checkpoint.load.dataset_identity)."""
        on_rank_zero(lambda: self._describe(dataset))

    def check(self) -> None:
        """Raise LockLostError if another process may have taken one of the places."""
        for each in (self._directory, self.owned):
            if each is not None:
                each.check()

    def close(self) -> None:
        """Release the places."""
        for each in (self.owned, self._directory):
            if each is not None:
                each.close()

    def _describe(self, dataset: dict[str, Any]) -> None:
        if self._directory is not None:
            self._directory.describe(dataset)

    def _open(self) -> str:
        self._directory = RunDirectory(self._config.run_dir, self._config)
        self.owned = claim(Folder(self._config.checkpoint_folder), self._directory)
        return self.owned.run_id
