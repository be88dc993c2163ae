"""How a training process ends: exit statuses, and for every foreseen fault its status and which ranks report it."""

import os
import sys
from dataclasses import dataclass
from enum import Enum

from data.errors import first_line, message_lines

DONE = 0
"""Trained to the end, or saved and stopped as asked."""
FAILED = 1
"""Failed while running; starting again goes on from the newest checkpoint."""
REFUSED = 2
"""Cannot start as asked; the message says what to change."""
DIVERGED = 3
"""The numbers went wrong and going back to a checkpoint did not help; starting again would not either."""
TIMED_OUT = 4
"""A section of the run exceeded its time limit."""


class Reporter(Enum):
    """Which processes print a fault: those that alone know of it."""

    RANK_ZERO = "rank 0"
    EACH_NODE = "the first rank of each node"
    EACH_RANK = "each rank that met it"


@dataclass(frozen=True)
class Fault:
    """What follows from an error.

    Attributes:
        status: of the process.
        reporter: who prints the message.
    """

    status: int
    reporter: Reporter = Reporter.RANK_ZERO


FAULTS = {
    # every rank raises these alike
    "ConfigError": Fault(REFUSED),
    "RunError": Fault(REFUSED),
    "CheckpointError": Fault(REFUSED),
    "DifferenceError": Fault(REFUSED),
    "DeepSpeedSectionError": Fault(REFUSED),
    "GradientError": Fault(REFUSED),
    "LibraryChangedError": Fault(REFUSED),
    "TrainingError": Fault(DIVERGED),
    "SaveError": Fault(FAILED),
    "LockLostError": Fault(FAILED),
    "LateError": Fault(TIMED_OUT),
    # one node's network or disk may be the cause
    "LaunchError": Fault(FAILED, Reporter.EACH_NODE),
    # one rank may meet these alone
    "EnvironmentValueError": Fault(REFUSED, Reporter.EACH_RANK),
    "BlockCompileError": Fault(REFUSED, Reporter.EACH_RANK),
    "CaptureError": Fault(REFUSED, Reporter.EACH_RANK),
    "StartMemoryError": Fault(REFUSED, Reporter.EACH_RANK),
    "DeviceMemoryError": Fault(FAILED, Reporter.EACH_RANK),
    "DataError": Fault(FAILED, Reporter.EACH_RANK),
    "ReplicaError": Fault(FAILED, Reporter.EACH_RANK),
}
"""Faults by the name of the error's class or of its nearest base: a name needs no import of the heavy libraries."""

BEFORE_TRAINING = {"DataError": Fault(REFUSED, Reporter.EACH_NODE)}  # a dataset that one node does not see, say
"""What counts instead while nothing has been trained."""


def fault_of(error: Exception, has_started: bool) -> Fault | None:
    """Return what follows from an error; None if nobody foresaw it.

    Args:
        has_started: whether training had started when it was raised.
    """
    tables = [FAULTS] if has_started else [BEFORE_TRAINING, FAULTS]
    names = (kind.__name__ for kind in type(error).__mro__)
    return next((table[name] for name in names for table in tables if name in table), None)


def explained(error: Exception, run_dir: str) -> tuple[Exception, Fault] | None:
    """Return a clear message and what follows for an error of the system or of a communication library; else None.

    gloo and NCCL have no error class of their own, so their errors are known by their text.
    """
    if isinstance(error, OSError):  # of the run's own files: a full disk, a folder that is gone
        text = f"{error.filename or run_dir}: {error.strerror or error}; make room or fix it, then start again"
        return OSError(text), Fault(FAILED, Reporter.EACH_RANK)
    if isinstance(error, RuntimeError) and any(n in str(error) for n in ("gloo", "NCCL", "Connection", "Timed out")):
        text = f"lost touch with another rank ({first_line(error)}); its own message says why"
        return RuntimeError(text), Fault(FAILED, Reporter.EACH_RANK)
    return None


def report(error: Exception, fault: Fault) -> int:
    """Print an error message, one line per fault in it, if this process is to report it; return the exit status."""
    if is_rank_zero() or fault.reporter is Reporter.EACH_RANK or (fault.reporter is Reporter.EACH_NODE and _leads()):
        who = "" if is_rank_zero() else f"rank {os.environ['RANK']}: "
        for line in message_lines(error):
            print(f"error: {who}{line}", file=sys.stderr, flush=True)
    return fault.status


def is_rank_zero() -> bool:
    """Return whether this process is rank 0."""
    return os.environ.get("RANK", "0") == "0"


def _leads() -> bool:
    """Whether this is the first rank of its node."""
    return os.environ.get("LOCAL_RANK", "0") == "0"
