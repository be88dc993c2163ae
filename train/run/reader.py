"""Read the folder of a run, finished or still training. Whatever the project knows of a run comes through here.

    run = RunReader("runs/first")
    run.metrics()[-1]["loss"]
    run.config()["model"]["num_layers"]

Each call reads its file anew, since the run may still be writing. Methods that return rows leave out damaged lines: a
crash cuts a line in two, and a later start writes on. A reader that must not miss a row takes `read_lines` instead.

Whatever lies in the folder, reading is bounded: it never waits on a pipe, and takes no line or file of any size.
"""

import fcntl
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from data.errors import printable
from data.files.own import open_to_read
from data.files.strict_json import Shape, check_shape, parse_row, read_json
from train.run import names

Row = dict[str, Any]

MOST_LINE_BYTES = 1 << 24
"""A longer line is damaged: 16 MiB."""
MOST_FAILURE_BYTES = 1 << 16
PIECE_BYTES = 1 << 20
SECTIONS: Shape = {"model?": dict, "data?": dict, "training?": dict, "optimizer?": dict, "regularizer?": dict}
GOODPUT: Shape = {"updated": float, "seconds": dict}


class RunError(ValueError):
    """The run folder cannot be used; the message is one line."""


class RunReader:
    """Reads the files of one run.

    Args:
        folder: the run_dir; it need not exist.
    """

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)

    def description(self) -> Row | None:
        """Return all of config.json, or None if there is none.

        Raises:
            RunError: the file is damaged or cannot be read.
        """
        remedy = "restore it or choose another run_dir"
        return read_object(self.folder / names.CONFIG, remedy, {"config": SECTIONS, "dataset?": dict})

    def config(self) -> Row | None:
        """Return the resolved configuration (sections of keys), or None if there is no run.

        Raises:
            RunError: the file is damaged or cannot be read.
        """
        described = self.description()
        return None if described is None else dict(described["config"])

    def fingerprint(self) -> str | None:
        """Return the fingerprint of the run's dataset, or None if no file tells.

        Earlier versions recorded it in checkpoints only.
        """
        markers = (self.folder / names.CHECKPOINTS).glob(f"step_*/{names.MARKER}")
        for file in (self.folder / names.CONFIG, *markers):
            try:
                tree = read_object(file) or {}
                return str(tree.get("checkpoint", tree)["dataset"]["fingerprint"])
            except (RunError, KeyError, TypeError, AttributeError):
                continue
        return None

    def metrics(self) -> list[Row]:
        """Return a row for each step and each evaluation. A row of a step has `loss`."""
        return read_rows(self.folder / names.METRICS)

    def entropies(self) -> list[Row]:
        """Return a row for each logging step, with `entropy_nats` [L][N]."""
        return read_rows(self.folder / names.ENTROPY)

    def journal(self) -> list[Row]:
        """Return all events, oldest first."""
        return [line.row for line in read_lines(self.folder / names.JOURNAL) if line.row is not None]

    def goodput(self) -> Row | None:
        """Return the seconds by category and when they were written, or None if there is no file.

        Raises:
            RunError: the file is damaged or cannot be read.
        """
        return read_object(self.folder / names.GOODPUT, shape=GOODPUT)

    def evaluation(self) -> Row | None:
        """Return the last evaluation by train.evaluate, or None if there was none.

        Raises:
            RunError: the file is damaged or cannot be read.
        """
        return read_object(self.folder / names.EVALUATION, "restore it or run train.evaluate again")

    def checkpoint(self, step: int) -> Path:
        """Return the folder of a checkpoint in the run's folder, whether or not it exists."""
        return self.folder / names.CHECKPOINTS / names.checkpoint_name(step)

    def complete_steps(self) -> list[int]:
        """Return the steps of the complete checkpoints in the run's folder, oldest first."""
        markers = (self.folder / names.CHECKPOINTS).glob(f"*/{names.MARKER}")
        return sorted(step for marker in markers if (step := names.step_of(marker.parent.name)) is not None)

    def failure(self) -> str:
        """Return the last error message of a training that a study started; empty if it did not fail."""
        try:
            with open_to_read(self.folder / names.FAILURE) as file:
                return file.read(MOST_FAILURE_BYTES).decode(errors="replace").strip()
        except FileNotFoundError:
            return ""

    def is_training(self) -> bool:
        """Return whether a process trains there now."""
        try:
            with open_to_read(self.folder / names.LOCK) as lock:
                fcntl.flock(lock, fcntl.LOCK_SH | fcntl.LOCK_NB)  # shared: another reader is not taken for a training
        except FileNotFoundError:
            return False
        except BlockingIOError:
            return True
        return False


@dataclass(frozen=True)
class Line:
    """A line of a file of JSON lines.

    Attributes:
        number: from 1.
        content: with the end of the line; a part of a line that is longer than MOST_LINE_BYTES.
        row: the object that the line holds; None if it holds none.
    """

    number: int
    content: bytes
    row: Row | None

    @property
    def is_whole(self) -> bool:
        """Whether something ends the line. Otherwise it may still be being written, or a crash cut it off."""
        return self.content.endswith(b"\n")


def lines_of(file: BinaryIO) -> Iterator[Line]:
    """Parse an open file of one JSON object a line, from where it stands."""
    for number, content in enumerate(iter(lambda: file.readline(MOST_LINE_BYTES), b""), start=1):
        yield Line(number, content, parse_row(content))


def read_lines(path: Path) -> Iterator[Line]:
    """Parse a file of one JSON object a line; yield no line if there is no file.

    Raises:
        OSError: the file cannot be read.
    """
    try:
        file = open_to_read(path)
    except FileNotFoundError:
        return
    with file:
        yield from lines_of(file)


def read_rows(path: Path) -> list[Row]:
    """Return the rows that have a step, a whole number; damaged lines are left out."""
    rows = []
    for line in read_lines(path):
        if (step := step_of(line.row)) is not None and line.row is not None:
            rows.append({**line.row, "step": step})
    return rows


def read_rows_from_the_end(path: Path) -> Iterator[Row]:
    """Yield the rows that have a step, the last one first; damaged lines are left out.

    Raises:
        OSError: the file cannot be read.
    """
    try:
        file = open_to_read(path)
    except FileNotFoundError:
        return
    with file:
        for content in _lines_from_the_end(file):
            row = parse_row(content)
            if (step := step_of(row)) is not None and row is not None:
                yield {**row, "step": step}


def _lines_from_the_end(file: BinaryIO) -> Iterator[bytes]:
    """Yield the lines of an open file, the last one first, without their ends; leave out those that are too long."""
    start, parts = file.seek(0, 2), list[bytes]()
    while start > 0:
        end, start = start, max(0, start - PIECE_BYTES)
        file.seek(start)
        first, *lines = file.read(end - start).split(b"\n")
        if lines:
            lines[-1] += b"".join(reversed(parts))
            yield from reversed(lines)
            parts = []
        parts.append(first)
        if len(parts) * PIECE_BYTES > MOST_LINE_BYTES:
            parts = [b""]
    yield b"".join(reversed(parts))


def step_of(row: Row | None) -> int | None:
    """Return the step of a row; None if it has none that is a whole number."""
    try:
        return None if row is None else int(row["step"])
    except (KeyError, TypeError, ValueError, OverflowError):
        return None


def read_object(file: Path, remedy: str = "restore it", shape: Shape = dict) -> Row | None:
    """Return the JSON object in a file, or None if there is no file.

    Args:
        remedy: what to do about a damaged file; ends the message.
        shape: of the object (data.files.strict_json.Shape).

    Raises:
        RunError: the file cannot be read, is no strict JSON, or has another shape.
    """
    try:
        value = read_json(file)
        check_shape(value, shape)
    except FileNotFoundError:
        return None
    except OSError as error:
        raise RunError(f"{file}: cannot be read ({error.strerror}); {remedy}") from None
    except ValueError as error:
        raise RunError(f"{file}: damaged, {printable(str(error))}; {remedy}") from None
    return dict(value)
