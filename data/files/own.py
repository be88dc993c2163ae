"""Read files without waiting on a pipe, and write files that are ours without following what somebody planted there.

A folder that others may write to can hold a symbolic link, a named pipe or a device under any name. Reading through a
link is what people want who keep their data elsewhere. Writing through one would overwrite a file that is not ours.
"""

import contextlib
import errno
import itertools
import os
import secrets
import shutil
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

_AT_ONCE = os.O_NONBLOCK | os.O_CLOEXEC
"""Opening a named pipe would wait for its other end."""


def open_to_read(path: str | os.PathLike[str]) -> BinaryIO:
    """Open a regular file, or a link to one, for reading bytes.

    Raises:
        OSError: it cannot be opened, or is no regular file.
    """
    return os.fdopen(_regular(os.open(path, os.O_RDONLY | _AT_ONCE), path), "rb")


def read_within(file: BinaryIO, most_bytes: int) -> bytes:
    """Return the rest of a file, read piece by piece: asking for `most_bytes` at once would reserve that much memory.

    Raises:
        ValueError: it is larger than `most_bytes`.
    """
    pieces, found = [], 0
    while piece := file.read(1 << 20):
        pieces.append(piece)
        found += len(piece)
        if found > most_bytes:
            raise ValueError(f"has more than {most_bytes:,} bytes")
    return b"".join(pieces)


def open_to_append(path: str | os.PathLike[str], mode: int = 0o666) -> BinaryIO:
    """Open a regular file for appending bytes without a buffer, and create it if it is missing. Links are refused.

    The file can also be read and truncated. A write is in the file when it returns.

    Args:
        mode: permissions of a new file, before the process's umask.

    Raises:
        OSError: it cannot be opened, or is no regular file.
    """
    flags = os.O_RDWR | os.O_APPEND | os.O_CREAT | os.O_NOFOLLOW | _AT_ONCE
    try:
        return os.fdopen(_regular(os.open(path, flags, mode), path), "a+b", buffering=0)
    except OSError as error:
        if error.errno == errno.ELOOP:
            raise OSError(errno.ELOOP, "is a link, which would be written through; remove it", str(path)) from None
        raise


def write_atomically(path: Path, content: str | bytes | bytearray, mode: int = 0o666, durable: bool = True) -> None:
    """Write a file so that a reader sees the old content or the new, never a part, even if the machine stops.

    The content is written beside it under a new random name, which then replaces the old file. A link of this name is
    replaced, not followed.

    Args:
        content: text is written as UTF-8.
        mode: permissions of the file, before the process's umask.
        durable: whether to wait until the disk has it.

    Raises:
        OSError: it cannot be written; nothing is left beside it.
    """
    with replacing(path) as temporary:
        file = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC, mode)
        with os.fdopen(file, "wb") as output:
            output.write(content.encode() if isinstance(content, str) else content)
            output.flush()
            if durable:
                os.fsync(file)


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Yield an unused name beside `path`. The file that is written there replaces `path`, unless an error is raised.

    Raises:
        OSError: `path` cannot be replaced; nothing is left beside it.
    """
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}.tmp")
    try:
        yield temporary
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def set_aside(path: Path, leave: bool = False) -> Path:
    """Keep what lies at a path under a name of its own, and return that: NAME.damaged, or NAME.damaged.2 and so on.

    Nothing is ever overwritten. It may be anything: a file, a folder, a link, a pipe.

    Args:
        leave: whether a file also stays where it is, for the caller to replace.

    Raises:
        OSError: it cannot be kept; it is still where it was.
    """
    for number in itertools.count(1):
        aside = path.with_name(f"{path.name}.damaged" + (f".{number}" if number > 1 else ""))
        try:
            _keep_as(path, aside, leave)
            return aside
        except FileExistsError:
            continue
    raise AssertionError


def _keep_as(path: Path, aside: Path, leave: bool) -> None:
    """Give what lies at `path` another name; raise FileExistsError if that name is taken."""
    if stat.S_ISDIR(path.lstat().st_mode):
        aside.mkdir()  # takes the name; an empty folder may be renamed over
        path.rename(aside)
        return
    try:
        os.link(path, aside, follow_symlinks=False)
    except FileExistsError:
        raise
    except OSError:  # a file system without hard links, or a file of somebody else
        taken = os.open(aside, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC, 0o666)
        with os.fdopen(taken, "wb") as copy:
            if leave:
                with open_to_read(path) as file:
                    shutil.copyfileobj(file, copy)
        if not leave:
            os.replace(path, aside)
        return
    if not leave:
        path.unlink()


def _regular(file: int, path: str | os.PathLike[str]) -> int:
    """Return the open file if it is a regular one; else close it and raise OSError."""
    status = os.fstat(file)
    if stat.S_ISREG(status.st_mode):
        return file
    os.close(file)
    if stat.S_ISDIR(status.st_mode):
        raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), str(path))
    raise OSError(errno.EINVAL, "is no regular file (a pipe, a socket or a device)", str(path))
