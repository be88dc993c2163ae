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
import re
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path, PurePosixPath
from typing import Any, BinaryIO

import fsspec
from fsspec.implementations.local import LocalFileSystem

from data.files.address import is_remote, local_path
from data.files.own import open_to_read, read_within
from data.files.strict_json import check_shape
from train.run.names import MARKER, step_of

TENSORS = "tensors.json"
FORMAT = 3
SHAPE = {
    "format": int,
    "step": int,
    "adam_step": float,
    "data_state": dict,
    "config": dict,
    "dataset": dict,
    "files": dict,
}
"""What a marker must hold."""
MOST_BYTES = 1 << 30
"""Of a marker or a table of tensors: far more than any layout of any model needs."""
UNFINISHED = ".tmp"
PIECE_BYTES = 1 << 24
_OURS = re.compile(r"rank_[0-9]{5,}_[0-9]{3,}\.bin|\.(rank_[0-9_]+\.bin|\w+\.json)\.[0-9a-f]{8}\.tmp")


def is_file_of_ours(name: str) -> bool:
    """Return whether a checkpoint has a file of exactly this name, finished or not."""
    return name in (TENSORS, MARKER, MARKER + UNFINISHED) or _OURS.fullmatch(name) is not None


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
    """A folder of files, on a disk or in a store. Every failure is an OSError, whatever the store.

    On a disk, a new file is never written through a link, nor over another file.
    """

    def __init__(self, address: str) -> None:
        self.address = address.rstrip("/")
        with _errors_as_os_errors():  # some stores connect here
            if is_remote(self.address):
                self.fs, self.path = fsspec.core.url_to_fs(self.address)
            else:
                self.fs, self.path = LocalFileSystem(), os.path.abspath(local_path(self.address))

    @property
    def local_path(self) -> Path | None:
        """The folder on a disk of this machine; None in a store."""
        return Path(self.path) if isinstance(self.fs, LocalFileSystem) else None

    def child(self, name: str) -> "Folder":
        return Folder(f"{self.address}/{name}")

    def describe(self, name: str) -> str:
        return f"{self.address}/{name}"

    def names(self) -> list[str]:
        """Return the names of what lies in it; empty if there is no such folder."""
        return sorted(self.entries())

    @_errors_as_os_errors()
    def entries(self) -> dict[str, bool]:
        """Return the names of what lies in it, and whether each is a file, not a folder or link."""
        self.fs.invalidate_cache()
        try:
            found = self.fs.ls(self.path, detail=True)
        except FileNotFoundError:
            return {}
        return {
            PurePosixPath(entry["name"]).name: entry["type"] == "file" and not entry.get("islink", False)
            for entry in found
        }

    @contextmanager
    def reading(self, name: str) -> Iterator[BinaryIO]:
        """Open a file; on a disk, only a regular one, or a link to one."""
        with _errors_as_os_errors(), self._open_to_read(name) as file:
            yield file

    def read(self, name: str, most_bytes: int = MOST_BYTES) -> bytes:
        """Return what a file holds.

        Raises:
            FileNotFoundError: there is none.
            OSError: it cannot be read.
            ValueError: it is larger than `most_bytes`.
        """
        with self.reading(name) as file:
            return read_within(file, most_bytes)

    @contextmanager
    def writing(self, name: str) -> Iterator["HashedFile"]:
        """Open a new file; on a disk it is flushed to the disk when this returns."""
        mode = "wb" if self.local_path is None else "xb"
        with _errors_as_os_errors(), self.fs.open(f"{self.path}/{name}", mode) as file:
            hashed = HashedFile(file)
            yield hashed
            file.flush()
            with suppress(AttributeError, io.UnsupportedOperation):  # stores have no file descriptors
                os.fsync(file.fileno())

    def create(self, name: str, content: bytes) -> None:
        """Write a small file; raise FileExistsError if there is one, as far as the store can tell."""
        if self.local_path is not None:
            try:
                with self.writing(name) as file:
                    file.write(content)
            except FileExistsError:
                raise
            except OSError:  # a full disk
                with suppress(OSError):
                    self.remove_file(name)
                raise
            return
        with _errors_as_os_errors():
            self.fs.invalidate_cache()
            self.fs.pipe_file(f"{self.path}/{name}", content, mode="create")

    def write_last(self, name: str, content: bytes) -> None:
        """Write a file that is there as a whole or not at all."""
        with self.writing(name + UNFINISHED) as file:
            file.write(content)
        with _errors_as_os_errors():
            self.fs.mv(f"{self.path}/{name}{UNFINISHED}", f"{self.path}/{name}")

    @_errors_as_os_errors()
    def make(self) -> None:
        self.fs.makedirs(self.path, exist_ok=True)

    @_errors_as_os_errors()
    def remove_file(self, name: str) -> None:
        self.fs.rm_file(f"{self.path}/{name}")

    def remove_if_empty(self) -> None:
        """Remove the folder if nothing lies in it; a store has no folders of their own."""
        with suppress(Exception):
            self.fs.rmdir(self.path)

    def free_bytes(self) -> int | None:
        """Return the free space of a local disk; None for a store."""
        path = self.local_path
        if path is None:
            return None
        status = os.statvfs(next(each for each in (path, *path.parents) if each.exists()))
        return status.f_bavail * status.f_frsize

    def _open_to_read(self, name: str) -> BinaryIO:
        path = self.local_path
        return self.fs.open(f"{self.path}/{name}", "rb") if path is None else open_to_read(path / name)


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
        DamagedFileError: the marker is missing, cannot be read, is damaged or of another format.
    """
    try:
        return parse_marker(folder, folder.read(MARKER))
    except (OSError, ValueError) as error:
        raise DamagedFileError(f"{folder.describe(MARKER)}: damaged ({error})") from None


def parse_marker(folder: Folder, content: bytes) -> dict[str, Any]:
    """Return what `write_marker` was given; `content` is that of the marker in `folder`.

    Raises:
        DamagedFileError: it is damaged, of another format, or of another step than the folder.
    """
    try:
        marker = json.loads(content)
        check_shape(marker, {"sha256": str, "checkpoint": SHAPE})
        description = marker["checkpoint"]
        text = json.dumps(description, sort_keys=True)
        if marker["sha256"] != hashlib.sha256(text.encode()).hexdigest():
            raise ValueError("its contents do not have the sha256 it states")
        if description["format"] != FORMAT:
            raise ValueError(f"of format {description['format']}, not {FORMAT}")
        for name, digest in description["files"].items():
            if not is_file_of_ours(name):
                raise ValueError(f"{name!r:.60} is no name of a file of a checkpoint")
            check_shape(digest, {"bytes": int, "sha256": str}, f"files.{name}")
    except (ValueError, RecursionError) as error:
        raise DamagedFileError(f"{folder.describe(MARKER)}: damaged ({error})") from None
    if (step := step_of(PurePosixPath(folder.path).name)) not in (None, description["step"]):
        raise DamagedFileError(f"{folder.describe(MARKER)}: is of step {description['step']}, not of step {step}")
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
