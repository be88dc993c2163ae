"""Record in journal.jsonl what happens to a run: one JSON object an event, never cut back.

    {"time": "2026-01-31T12:00:00+00:00", "event": "skipped step", "step": 1234, "reason": "...", ...}

Events: started, fast start, resumed, compiled blocks verified, saved, save failed, damaged checkpoint, skipped step,
collapse, rolled back, asked to stop, time limit, stopped, finished.
"""

import json
import threading
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from data.files.strict_json import finite_or_none
from train.run import names
from train.run.reader import RunReader


class Journal:
    """Appends events. Rank 0 holds one; the thread that saves a checkpoint may write while training does."""

    def __init__(self, folder: Path) -> None:
        self._path, self._lock = folder / names.JOURNAL, threading.Lock()
        if self._path.exists() and not (b"\n" + self._path.read_bytes()).endswith(b"\n"):
            with self._path.open("a") as file:  # after a line that a crash cut off
                file.write("\n")

    def write(self, event: str, **fields: Any) -> None:
        """Append an event with its time; fields that are not finite become null."""
        now = datetime.now(UTC).isoformat(timespec="milliseconds")
        row = {"time": now, "event": event, **{key: _plain(value) for key, value in fields.items()}}
        with self._lock, self._path.open("a") as file:
            file.write(json.dumps(row) + "\n")

    def rows(self) -> list[dict[str, Any]]:
        """Return all events so far; a line that a crash cut off is left out."""
        return RunReader(self._path.parent).journal()


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    return finite_or_none(value)
