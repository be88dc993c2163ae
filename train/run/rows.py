"""Append lines to the files of a run, so that none is lost without a word.

A file is never rewritten: where a run resumes, what follows the checkpoint's rows is cut off. A checkpoint records how
many bytes of each file belong to it, and their sha256 (`AppendedFile.prefix`). If they are not there any more, the file
was damaged or cut. Then it is kept whole as NAME.damaged, and the run goes on with its sound rows.

A file that somebody removes or replaces while the run writes to it is still open here, so it is put back as it was.
"""

import hashlib
import os
import secrets
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from data.files.own import open_to_append, set_aside
from data.files.strict_json import to_json
from train.run.reader import PIECE_BYTES, Line, lines_of, step_of

Prefix = dict[str, Any]
"""`bytes` and `sha256` of the first part of a file."""


@dataclass(frozen=True)
class Damage:
    """What was wrong with a file.

    Attributes:
        fault: in words.
        kept_as: name of the file that keeps what was found; None if nothing had to be moved.
        fields: for the journal, besides the file's name and the above.
    """

    file: Path
    fault: str
    kept_as: str | None
    fields: dict[str, Any]

    def __str__(self) -> str:
        kept = "" if self.kept_as is None else f"; what was found is kept as {self.kept_as}"
        return f"{self.file}: {self.fault}{kept}"


class AppendedFile:
    """An open file that only this process appends to.

    Raises:
        OSError: it cannot be written, or is a link or no regular file; names the file.
    """

    def __init__(self, path: Path) -> None:
        self.path, self._is_new = path, not path.exists()
        self._file = open_to_append(path)
        self._forget()

    def append(self, content: bytes) -> None:
        """Append bytes; they are in the file when this returns.

        Raises:
            OSError: there is no room, say; none of them is in the file then.
        """
        try:
            _write(self._file, content)
        except OSError as error:
            self._cut()
            raise OSError(error.errno, error.strerror, str(self.path)) from None
        self._take(content)

    def prefix(self) -> Prefix:
        """Return size and sha256 of what has been appended so far; it is on the disk when this returns."""
        os.fdatasync(self._file.fileno())
        return {"bytes": self._bytes, "sha256": self._digest.hexdigest()}

    def restore(self) -> Damage | None:
        """Put the file back if it was removed or replaced, and find out whether somebody else wrote to it.

        Returns:
            What was wrong; None if nothing was.

        Raises:
            OSError: it cannot be put back.
        """
        ours = os.fstat(self._file.fileno())
        try:
            there = os.stat(self.path, follow_symlinks=False)
        except FileNotFoundError:
            return self._replaced_by(self._pieces(), "was removed while the run wrote to it; it is restored", False)
        except OSError:  # a file server that does not answer now: the next write says more
            return None
        if not os.path.samestat(ours, there):
            return self._replaced_by(self._pieces(), "was replaced while the run wrote to it; it is restored", True)
        if ours.st_size == self._bytes:
            return None
        fault = f"somebody else wrote to it: it has {ours.st_size} bytes, expected {self._bytes}"
        self._forget()
        for piece in self._pieces():
            self._take(piece)
        return self._damage(fault)

    def close(self) -> None:
        self._file.close()

    def _forget(self) -> None:
        self._digest, self._bytes = hashlib.sha256(), 0

    def _take(self, content: bytes) -> None:
        """Count bytes as part of the file."""
        self._digest.update(content)
        self._bytes += len(content)

    def _cut(self) -> None:
        """Cut off what has not been counted."""
        if os.fstat(self._file.fileno()).st_size > self._bytes:
            os.ftruncate(self._file.fileno(), self._bytes)

    def _pieces(self, end: int | None = None) -> Iterator[bytes]:
        """Read the first `end` bytes of the file that is open here (None: all)."""
        self._file.seek(0)
        left = os.fstat(self._file.fileno()).st_size if end is None else end
        while left and (piece := self._file.read(min(PIECE_BYTES, left))):
            left -= len(piece)
            yield piece

    def _lines(self) -> Iterator[Line]:
        """Parse the lines that have not been counted yet."""
        with os.fdopen(os.dup(self._file.fileno()), "rb", buffering=PIECE_BYTES) as file:
            file.seek(self._bytes)
            yield from lines_of(file)

    def _fault_of_prefix(self, recorded: Prefix) -> str | None:
        """Count the bytes that were recorded if they are still there; else say what is there."""
        size = os.fstat(self._file.fileno()).st_size
        if size < recorded["bytes"]:
            found = "is missing" if self._is_new else f"has {size} bytes"
            return f"{found}, but the checkpoint has recorded {recorded['bytes']} bytes of it"
        self._forget()
        for piece in self._pieces(recorded["bytes"]):
            self._take(piece)
        if self._digest.hexdigest() != recorded["sha256"]:
            return (
                f"damaged: its first {recorded['bytes']} bytes do not have the sha256 that the checkpoint has recorded"
            )
        return None

    def _replaced_by(self, pieces: Iterable[bytes], fault: str, is_there: bool) -> Damage:
        """Write pieces to a new file, put it in place, and go on appending to it; keep what was in its place."""
        temporary = self.path.with_name(f".{self.path.name}.{secrets.token_hex(4)}.tmp")
        new, kept_as = open_to_append(temporary), None
        try:
            self._forget()
            for piece in pieces:
                _write(new, piece)
                self._take(piece)
            os.fdatasync(new.fileno())
            if is_there:
                kept_as = set_aside(self.path, leave=True).name
            os.replace(temporary, self.path)
        except OSError as error:
            new.close()
            temporary.unlink(missing_ok=True)
            raise OSError(error.errno, f"{fault}: {error.strerror}", str(self.path)) from None
        self._file.close()
        self._file = new
        return self._damage(fault, kept_as)

    def _damage(self, fault: str, kept_as: str | None = None, **fields: Any) -> Damage:
        return Damage(self.path, fault, kept_as, {**self.prefix(), **fields})


class JsonLines(AppendedFile):
    """A file of one JSON object a line, each of some step.

    Args:
        path: of the file; rows of later steps than `last_step` are cut off, so that no step appears twice.
        last_step: the step that the run resumes after.
        recorded: what may be the file's prefix at that step; empty if the checkpoint has recorded none.

    Attributes:
        damage: what was wrong with the file; None if nothing was.
    """

    def __init__(self, path: Path, last_step: int, recorded: Iterable[Prefix] = ()) -> None:
        super().__init__(path)
        self.damage: Damage | None = None
        faults = []
        for prefix in recorded:
            fault = self._fault_of_prefix(prefix)
            if fault is None:
                self._take_rows_of(last_step)
                self._cut()
                return
            faults.append(fault)
        self._forget()
        fault = faults[0] if faults else self._fault_of_rows(last_step)
        if fault is None:
            self._cut()
        else:
            self.damage = self._replaced_by(self._sound_rows(last_step), fault, not self._is_new)

    def write(self, row: dict[str, Any]) -> None:
        """Append a row, with null for what is not finite; it is in the file when this returns."""
        self.append(to_json(row).encode() + b"\n")

    def _take_rows_of(self, step: int) -> None:
        """Count rows of this step: a run evaluates after its last checkpoint."""
        for line in self._lines():
            if not line.is_whole or step_of(line.row) != step:
                break
            self._take(line.content)

    def _fault_of_rows(self, last_step: int) -> str | None:
        """Count the rows up to a step, or say why no cut keeps them all and nothing else."""
        is_past = False
        for line in self._lines():
            if _is_sound(line, last_step):
                if is_past:
                    return f"line {line.number}: a row of step {step_of(line.row)} follows one of a later step"
                self._take(line.content)
            elif not is_past and line.is_whole and step_of(line.row) is None:
                return f"line {line.number} is damaged"
            else:
                is_past = True
        return None

    def _sound_rows(self, last_step: int) -> Iterator[bytes]:
        return (line.content for line in self._lines() if _is_sound(line, last_step))


def _is_sound(line: Line, last_step: int) -> bool:
    step = step_of(line.row)
    return line.is_whole and step is not None and step <= last_step


def _write(file: BinaryIO, content: bytes) -> None:
    """Write all bytes to a file without a buffer, which may take only a part of them at a time."""
    view = memoryview(content)
    while view:
        view = view[os.write(file.fileno(), view) :]
