"""Record in journal.jsonl what happens to a run: one JSON object an event, never cut back.

    {"time": "2026-01-31T12:00:00+00:00", "event": "skipped step", "step": 1234, "reason": "...", ...}

Events: started, fast start, raw temperatures, resumed, first step done, compiled blocks verified, saved, save failed,
damaged checkpoint, damaged file, side log failed, skipped step, collapse, rolled back, asked to stop, time limit,
stopped, finished.
"""

import threading
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from data.errors import redacted
from data.files.strict_json import to_json
from train.run import names
from train.run.reader import Row, RunReader, step_of
from train.run.rows import AppendedFile, Damage, Prefix

DAMAGED_FILE = "damaged file"


class Journal:
    """Appends events. Rank 0 holds one; the thread that saves a checkpoint may write while training does.

    Args:
        folder: of the run.
        recorded: the journal's prefix as the checkpoint has recorded it; None if it has not.

    Attributes:
        damage: what is wrong with the events of earlier processes; None if nothing is, or if an event tells of it.
            Damaged lines stay where they are.
    """

    def __init__(self, folder: Path, recorded: Prefix | None = None) -> None:
        self._file, self._lock = _JournalFile(folder / names.JOURNAL), threading.Lock()
        self.damage = self._file.take_all(recorded)

    def write(self, event: str, **fields: Any) -> None:
        """Append an event with its time; fields that are not finite become null."""
        now = datetime.now(UTC).isoformat(timespec="milliseconds")
        content = redacted(to_json({"time": now, "event": event, **fields})).encode() + b"\n"
        with self._lock:
            self._file.append(content)

    def tell(self, damage: Damage, step: int) -> None:
        """Append an event about a damaged file; `step` is the one that the run resumes after, or has reached."""
        about = {"file": damage.file.name, "fault": damage.fault, "kept_as": damage.kept_as}
        self.write(DAMAGED_FILE, step=step, **about, **damage.fields)

    def mended(self, file: str, step: int) -> Iterator[Prefix]:
        """Yield the prefix that the newest event about a damaged file gives it at a step, if there is such an event."""
        rows = [row for row in self.rows() if row.get("event") == DAMAGED_FILE and row.get("file") == file]
        yield from (row for row in rows[-1:] if step_of(row) == step and is_prefix(row))

    def prefix(self) -> Prefix:
        """Return size and sha256 of all events so far; they are on the disk when this returns."""
        with self._lock:
            return self._file.prefix()

    def restore(self) -> Damage | None:
        """As `AppendedFile.restore`."""
        with self._lock:
            return self._file.restore()

    def rows(self) -> list[Row]:
        """Return all events so far; a line that a crash cut off is left out."""
        return RunReader(self._file.path.parent).journal()

    def close(self) -> None:
        self._file.close()


class _JournalFile(AppendedFile):
    def take_all(self, recorded: Prefix | None) -> Damage | None:
        """Count what is there, whatever it is; return what is wrong with it and has not been told."""
        fault = self._fault_of_prefix(recorded) if recorded is not None else None
        if fault is not None:
            self._forget()
        wanted = recorded["sha256"] if recorded is not None and fault is not None else None
        damaged, told, ends_well = [], [], True
        for line in self._lines():
            if line.row is None:
                damaged.append(self._bytes)
            elif line.row.get("event") == DAMAGED_FILE and line.row.get("file") == self.path.name:
                told += [*_list(line.row.get("at_bytes")), line.row.get("recorded_sha256")]
            self._take(line.content)
            ends_well = line.is_whole
        if not ends_well:
            self.append(b"\n")
        damaged = [at for at in damaged if at not in told]
        if fault is None or wanted in told:
            fault = f"{len(damaged)} damaged lines, the first at byte {damaged[0]}" if damaged else None
        return None if fault is None else self._damage(fault, at_bytes=damaged, recorded_sha256=wanted)


def is_prefix(value: Any) -> bool:
    """Return whether a value, which may come from outside, is a prefix."""
    return isinstance(value, dict) and type(value.get("bytes")) is int and isinstance(value.get("sha256"), str)


def _list(value: Any) -> list[Any]:
    return value if isinstance(value, list) else []
