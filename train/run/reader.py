"""Read the folder of a run, finished or still training. Whatever the project knows of a run comes through here.

    run = RunReader("runs/first")
    run.metrics()[-1]["loss"]
    run.config()["model"]["num_layers"]

Each call reads its file anew, since the run may still be writing. Methods that return rows leave out damaged lines: a
crash cuts a line in two, and a later start writes on. A reader that must not miss a row takes `read_lines` instead.
"""

import fcntl
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from train.run import names

Row = dict[str, Any]


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
        return read_object(self.folder / names.CONFIG, "restore it or choose another run_dir")

    def config(self) -> Row | None:
        """Return the resolved configuration (sections of keys), or None if there is no run.

        Raises:
            RunError: the file is damaged or cannot be read.
        """
        described = self.description()
        if described is None:
            return None
        config = described.get("config")
        if not isinstance(config, dict):
            file = self.folder / names.CONFIG
            raise RunError(f"{file}: damaged (config is {config!r:.40}); restore it or choose another run_dir")
        return config

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
        """Return the seconds by category and when they were written; None if the file is missing or damaged."""
        try:
            kept = read_object(self.folder / names.GOODPUT)
        except RunError:
            return None
        return kept if kept is not None and {"updated", "seconds"} <= kept.keys() else None

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
        file = self.folder / names.FAILURE
        return file.read_text(encoding="utf-8", errors="replace").strip() if file.exists() else ""

    def is_training(self) -> bool:
        """Return whether a process trains there now."""
        try:
            with (self.folder / names.LOCK).open("r+") as lock:
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
        row: the object that the line holds; None if it holds none.
        is_last: whether nothing ends the line, so that it may still be being written.
    """

    number: int
    text: str
    row: Row | None
    is_last: bool


def read_lines(file: Path, errors: str = "replace") -> list[Line]:
    """Parse a file of one JSON object a line; return no line if there is no file.

    Args:
        errors: what to do with bytes that are not UTF-8: 'replace' or 'strict', as for `open`.

    Raises:
        OSError: the file cannot be read.
        UnicodeDecodeError: it is not UTF-8 and `errors` is 'strict'.
    """
    if not file.exists():
        return []
    texts = file.read_text(encoding="utf-8", errors=errors).split("\n")
    return [Line(number, text, _object(text), number == len(texts)) for number, text in enumerate(texts, start=1)]


def read_rows(file: Path) -> list[Row]:
    """Return the rows that have a step, a whole number; damaged lines are left out."""
    rows = []
    for line in read_lines(file):
        row = line.row or {}
        try:
            rows.append({**row, "step": int(row["step"])})
        except (KeyError, TypeError, ValueError, OverflowError):
            continue
    return rows


def read_object(file: Path, remedy: str = "restore it") -> Row | None:
    """Return the JSON object in a file, or None if there is no file.

    Raises:
        RunError: the file cannot be read or holds something else; the message ends with `remedy`.
    """
    try:
        value = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    except UnicodeDecodeError as error:
        raise RunError(f"{file}: damaged, byte {error.start} is not UTF-8; {remedy}") from None
    except OSError as error:
        raise RunError(f"{file}: cannot be read ({error.strerror}); {remedy}") from None
    except (ValueError, RecursionError) as error:
        raise RunError(f"{file}: damaged, not JSON ({error}); {remedy}") from None
    if not isinstance(value, dict):
        raise RunError(f"{file}: damaged, expected a JSON object, found {type(value).__name__}; {remedy}")
    return value


def _object(text: str) -> Row | None:
    try:
        value = json.loads(text)
    except (ValueError, RecursionError):
        return None
    return value if isinstance(value, dict) else None
