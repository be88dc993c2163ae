"""A folder that holds one checkpoint, and the marker that makes it complete. No file is ever unpickled.

    rank_00000_000.bin ...   tensor values (train/checkpoint/tensors.py)
    tensors.json             where each tensor lies in those files
    checkpoint.json          the marker: step, configuration, dataset; size and sha256 of every other file, and a sha256
                             of itself. A checkpoint is complete once it has one

A folder is local, or any address that fsspec knows (s3://, gs://, memory://) if fsspec's package for that store is
installed. The marker is moved into place last. So a crash while saving leaves a folder without one.
"""

import hashlib
import io
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path, PurePosixPath
from typing import Any, BinaryIO

import fsspec

from train.run.names import MARKER

TENSORS = "tensors.json"
FORMAT = 3
NEEDED = {"format", "step", "adam_step", "data_state", "config", "dataset", "files"}
PIECE_BYTES = 1 << 24


class DamagedFileError(RuntimeError):
    """A file of a checkpoint is missing or not what was written; the message names it."""


@contextmanager
def _errors_as_os_errors() -> Iterator[None]:
    """Turn the errors of a store's library, which may derive from Exception itself, into OSError."""
    try:
        yield
    except (OSError, RuntimeError, ValueError, LookupError, TypeError):
        raise
    except Exception as error:
        raise OSError(f"{type(error).__name__}: {error}") from error


class Folder:
    """A folder of files, on a disk or in a store. Every failure is an OSError, whatever the store."""

    def __init__(self, address: str) -> None:
        self.address = address.rstrip("/")
        self.fs, self.path = fsspec.core.url_to_fs(self.address)

    def child(self, name: str) -> "Folder":
        return Folder(f"{self.address}/{name}")

    def describe(self, name: str) -> str:
        return f"{self.address}/{name}"

    @_errors_as_os_errors()
    def names(self) -> list[str]:
        """Return the names of what lies in it; empty if there is no such folder."""
        self.fs.invalidate_cache()
        try:
            return sorted(PurePosixPath(path).name for path in self.fs.ls(self.path, detail=False))
        except FileNotFoundError:
            return []

    @_errors_as_os_errors()
    def exists(self, name: str) -> bool:
        return bool(self.fs.exists(f"{self.path}/{name}"))

    @contextmanager
    def reading(self, name: str) -> Iterator[BinaryIO]:
        with _errors_as_os_errors(), self.fs.open(f"{self.path}/{name}", "rb") as file:
            yield file

    @contextmanager
    def writing(self, name: str) -> Iterator["HashedFile"]:
        """Open a new file; on a disk it is flushed to the disk when this returns."""
        with _errors_as_os_errors(), self.fs.open(f"{self.path}/{name}", "wb") as file:
            hashed = HashedFile(file)
            yield hashed
            file.flush()
            with suppress(AttributeError, io.UnsupportedOperation):  # stores have no file descriptors
                os.fsync(file.fileno())

    def write_last(self, name: str, content: bytes) -> None:
        """Write a file that is there as a whole or not at all."""
        with self.writing(name + ".tmp") as file:
            file.write(content)
        with _errors_as_os_errors():
            self.fs.mv(f"{self.path}/{name}.tmp", f"{self.path}/{name}")

    @_errors_as_os_errors()
    def make(self) -> None:
        self.fs.makedirs(self.path, exist_ok=True)

    @_errors_as_os_errors()
    def remove(self) -> None:
        """Delete the folder, its marker first, so that no half-deleted checkpoint looks complete."""
        if self.exists(MARKER):
            self.fs.rm_file(f"{self.path}/{MARKER}")
        if self.fs.exists(self.path):
            self.fs.rm(self.path, recursive=True)

    def free_bytes(self) -> int | None:
        """Return the free space of a local disk; None for a store."""
        if self.fs.protocol not in ("file", ("file", "local")):
            return None
        existing = next(path for path in (Path(self.path), *Path(self.path).parents) if path.exists())
        status = os.statvfs(existing)
        return status.f_bavail * status.f_frsize


class HashedFile:
    """Counts and hashes the bytes that are written through it."""

    def __init__(self, file: Any) -> None:
        self._file, self._hash, self.num_bytes = file, hashlib.sha256(), 0

    def write(self, content: Any) -> None:
        view = memoryview(content)
        for start in range(0, len(view), PIECE_BYTES):
            piece = view[start : start + PIECE_BYTES]
            self._file.write(piece)
            self._hash.update(piece)
        self.num_bytes += len(view)

    @property
    def digest(self) -> dict[str, Any]:
        return {"bytes": self.num_bytes, "sha256": self._hash.hexdigest()}


def write_marker(folder: Folder, description: dict[str, Any]) -> None:
    """Write the marker, which makes the checkpoint complete."""
    text = json.dumps(description, sort_keys=True)
    marker = {"sha256": hashlib.sha256(text.encode()).hexdigest(), "checkpoint": description}
    folder.write_last(MARKER, (json.dumps(marker, indent=1, sort_keys=True) + "\n").encode())


def read_marker(folder: Folder) -> dict[str, Any]:
    """Read what `write_marker` was given.

    Raises:
        DamagedFileError: the marker is missing, damaged or of another format.
    """
    try:
        with folder.reading(MARKER) as file:
            marker = json.loads(file.read())
        description = marker["checkpoint"]
        text = json.dumps(description, sort_keys=True)
        intact = marker["sha256"] == hashlib.sha256(text.encode()).hexdigest()
        missing = NEEDED - description.keys()
        if missing or description["format"] != FORMAT or any("/" in name for name in description["files"]):
            raise ValueError(f"not of format {FORMAT}, or without {', '.join(sorted(missing)) or 'plain file names'}")
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise DamagedFileError(f"{folder.describe(MARKER)}: damaged ({error})") from None
    if not intact:
        raise DamagedFileError(f"{folder.describe(MARKER)}: damaged (its contents do not have the sha256 it states)")
    return dict(description)


def verify_file(folder: Folder, name: str, expected: dict[str, Any]) -> None:
    """Raise DamagedFileError unless the file has its size and sha256."""
    digest, found = hashlib.sha256(), 0
    try:
        with folder.reading(name) as file:
            while piece := file.read(PIECE_BYTES):
                digest.update(piece)
                found += len(piece)
    except OSError as error:
        raise DamagedFileError(f"{folder.describe(name)}: cannot be read ({error.strerror or error})") from None
    if found != expected["bytes"]:
        raise DamagedFileError(f"{folder.describe(name)}: has {found} bytes, expected {expected['bytes']}")
    if digest.hexdigest() != expected["sha256"]:
        raise DamagedFileError(
            f"{folder.describe(name)}: damaged (its sha256 is not the one recorded when it was saved)"
        )
