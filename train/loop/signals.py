"""SIGTERM and SIGUSR1 ask a run to save and stop at the next step; a second one ends the process at once."""

import os
import signal
import sys
from types import FrameType

SIGNALS = (signal.SIGTERM, signal.SIGUSR1)


class StopRequest:
    """Records whether this rank was asked to stop; the other ranks learn of it through the step's report.

    Signal handlers stay installed until `close`. A second signal ends the process with status 128 + signal, as the
    first would without handlers.
    """

    def __init__(self) -> None:
        self.received: str | None = None
        self._before = {number: signal.signal(number, self._handle) for number in SIGNALS}

    def close(self) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if self.received is not None:
            os.write(sys.stderr.fileno(), b"a second signal: this process ends at once\n")
            os._exit(128 + number)
        self.received = signal.Signals(number).name
