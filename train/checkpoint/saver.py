"""Save a run's checkpoints in the background, and delete those that need not be kept.

Training waits only while the state is copied to host memory. A thread then writes it through
torch.distributed.checkpoint, the marker last.
"""

import contextlib
import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch.distributed import ProcessGroup
from torch.distributed.checkpoint.api import CheckpointException

from data.errors import first_line
from data.files.strict_json import finite_or_none
from parallel.engine.engine import Engine
from parallel.state.chunks import Chunk, ChunkSavePlanner
from train.checkpoint.folder import DamagedFileError, Folder, parse_marker
from train.checkpoint.load import first_failure, steps_saved
from train.checkpoint.root import OwnedRoot
from train.checkpoint.staging import Staging
from train.checkpoint.tensors import Writer
from train.config import Config
from train.run.names import MARKER, checkpoint_name, step_of
from train.run.provenance import description

FAILURES_IN_A_ROW = 2


class SaveError(RuntimeError):
    """A checkpoint could not be saved; the message is one line."""


@dataclass(frozen=True)
class Progress:
    """Where a run stands; `validation_loss` is that of an evaluation at this very step, if there was one.

    `logs` is what the files of rows hold (train.loop.log.RunLog.prefixes); empty on ranks that write none.
    """

    step: int
    data_state: dict[str, Any]
    health_state: dict[str, Any]
    validation_loss: float | None = None
    logs: dict[str, Any] = field(default_factory=dict)


class CheckpointSaver:
    """Saves a run's checkpoints in the background, one at a time, and deletes those that need not be kept.

    All ranks hold one and call the same methods at the same steps.

    Args:
        recorded: what each checkpoint records of the run besides its configuration: the run's identity, and the
            dataset's (train.checkpoint.load.dataset_identity), which a resumed run must share.
        owned: on rank 0, the run's checkpoints; None elsewhere.
        report: on rank 0, called from the background thread with each finished save's event and fields; None elsewhere.
    """

    def __init__(
        self,
        config: Config,
        engine: Engine,
        vocab_size: int,
        recorded: dict[str, Any],
        group: ProcessGroup,
        owned: OwnedRoot | None,
        report: Callable[..., None] | None,
    ) -> None:
        self._config, self._engine, self._vocab_size = config, engine, vocab_size
        self._group, self._owned, self._report = group, owned, report
        self._description = {**recorded, "world_size": dist.get_world_size(), **description(config)}
        self._root = Folder(config.checkpoint_folder)
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="checkpoint")
        self._staging: Future[Staging] = self._thread.submit(Staging, engine.state_chunks(vocab_size))
        self._pending: Future[None] | None = None
        self._failures = 0
        self.saved_step: int | None = None

    def save(self, progress: Progress) -> None:
        """Wait for the save before, copy the state, and write it in the background.

        Raises:
            SaveError: two saves in a row failed; earlier checkpoints are intact.
        """
        started = time.perf_counter()
        self._settle()
        chunks = self._staging.result().copy(self._engine.state_chunks(self._vocab_size))
        state = {
            "step": progress.step,
            "adam_step": self._engine.adam_step,
            "data_state": progress.data_state,
            "health_state": progress.health_state,
            "validation_loss": finite_or_none(progress.validation_loss),
            "logs": progress.logs,
            **self._description,
        }
        self.saved_step = progress.step
        self._pending = self._thread.submit(self._write, chunks, state, time.perf_counter() - started)

    def finish(self) -> None:
        """Wait until the last save is written; raise SaveError if it failed."""
        self._settle(last=True)

    def forget_after(self, step: int) -> None:
        """Delete the checkpoints of later steps, after the run went back to `step`."""
        if self._owned is not None:
            for later in (saved for saved in steps_saved(self._root) if saved > step):
                self._owned.discard(checkpoint_name(later))

    def close(self) -> None:
        """Finish the save that is being written, then end the background thread."""
        self._thread.shutdown(wait=True)
        if self._staging.done() and self._staging.exception() is None:
            self._staging.result().close()

    def _settle(self, last: bool = False) -> None:
        if self._pending is None:
            return
        pending, self._pending = self._pending, None
        try:
            pending.result()
            self._failures = 0
        except SaveError as error:
            self._failures += 1
            if last or self._failures == FAILURES_IN_A_ROW:
                raise SaveError(f"{error}; checkpoints that were complete before it are intact") from None

    def _write(self, chunks: list[Chunk], state: dict[str, Any], blocked_s: float) -> None:
        started = time.perf_counter()
        name = checkpoint_name(state["step"])
        folder = self._root.child(name)
        try:
            writer = Writer(folder, dist.get_rank(), state, lambda: self._begin(name))
            dcp.save({}, storage_writer=writer, planner=ChunkSavePlanner(chunks), process_group=self._group)
        except (Exception, CheckpointException) as error:  # a full disk, a store that does not answer, a rank gone
            cause = first_failure(error) if isinstance(error, CheckpointException) else first_line(error)
            message = f"{folder.address}: could not be saved ({cause})"
            if self._owned is not None:
                self._tell("save failed", step=state["step"], reason=message)
                with contextlib.suppress(Exception):  # the next save prunes it
                    self._owned.discard(name)
            raise SaveError(message) from None
        if self._owned is not None:
            write_s = round(time.perf_counter() - started, 3)
            self._tell("saved", step=state["step"], blocked_s=round(blocked_s, 3), write_s=write_s)
            with contextlib.suppress(OSError):  # if the store does not list now, the next save prunes
                if left := prune(self._owned, self._config, state["step"]):
                    self._tell("left alone", names=left)

    def _begin(self, name: str) -> None:
        assert self._owned is not None
        self._owned.begin(name)

    def _tell(self, event: str, **fields: Any) -> None:
        if self._report is not None:
            self._report(event, **fields)


def prune(owned: OwnedRoot, config: Config, newest: int) -> list[str]:
    """Delete this run's checkpoints, finished or not, but the newest `keep`, multiples of `keep_every` and the best.

    Checkpoints of steps after `newest` were found damaged when the run resumed. They do not count and are left alone.

    Returns:
        What lies there under the name of a checkpoint and is not this run's: it is left alone, too.

    Raises:
        OSError: the store does not answer; nothing more is deleted.
    """
    root = owned.root
    saved = [step for step in steps_saved(root) if owned.is_ours(checkpoint_name(step))]
    steps = [step for step in saved if step <= newest]
    kept = set(steps[-config.checkpoint.keep :]) | (set(saved) - set(steps))
    if config.checkpoint.keep_every:
        kept |= {step for step in steps if step % config.checkpoint.keep_every == 0}
    if config.checkpoint.keep_best:
        losses = {
            step: loss for step in steps if (loss := _validation_loss(root.child(checkpoint_name(step)))) is not None
        }
        kept |= {min(losses, key=lambda step: (losses[step], -step))} if losses else set()
    there = [step for name in root.names() if (step := step_of(name)) is not None]
    return [left for step in sorted(set(there) - kept) for left in owned.discard(checkpoint_name(step))]


def _validation_loss(folder: Folder) -> float | None:
    """Return the loss that a marker states; None if it is damaged or states none. OSError: it cannot be read now."""
    try:
        loss = parse_marker(folder, folder.read(MARKER)).get("validation_loss")
    except (DamagedFileError, ValueError):
        return None
    return float(loss) if isinstance(loss, int | float) else None
