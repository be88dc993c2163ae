"""SIGTERM and SIGUSR1 ask a run to save and stop at the next step; a second one ends the process at once."""

import signal
from types import FrameType

from parallel.processes.lifetime import SignalWatch

SIGNALS = (signal.SIGTERM, signal.SIGUSR1)


class StopRequest:
    """Records whether this rank was asked to stop; the other ranks learn of it through the step's report.

    Signal handlers stay installed until `close`. A second signal ends the process with status 128 + signal, as the
    first would without handlers.
    """

    def __init__(self) -> None:
        self.received: str | None = None
        self._watch = SignalWatch(dict.fromkeys(SIGNALS, self._handle))

    def close(self) -> None:
        self._watch.close()

    def _handle(self, number: int, frame: FrameType | None) -> None:
        self.received = self.received or signal.Signals(number).name
