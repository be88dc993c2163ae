"""Lock a file against other processes. The system ends the lock with the process, however that ends."""

import errno
import fcntl
import os
import time
from pathlib import Path
from typing import BinaryIO

from data.files.own import open_to_append

LOOK_S = 1.0
"""Longer than a reader who asks whether a folder is in use holds its lock."""
WITHOUT_LOCKS = {errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP}
"""What a file system that has no locks answers, for instance Lustre mounted without them."""


class HeldError(OSError):
    """Another process holds the lock."""


class LockLostError(RuntimeError):
    """A lock's file was removed or replaced while this process held it; the message is one line."""


class FileLock:
    """An exclusive lock on a file of ours, which is created if it is missing. A link in its place is refused.

    Args:
        path: of the file.
        required: whether a file system without locks is an error; if not, nothing is locked there.

    Raises:
        HeldError: another process holds it; `strerror` is what the file holds.
        OSError: the file cannot be opened or locked, or is a link.
    """

    def __init__(self, path: Path, required: bool = True) -> None:
        self.path = path
        ends_at = time.monotonic() + LOOK_S
        while True:
            self._file = open_to_append(path)
            if _taken(self._file, required):
                if self.is_held():
                    return
                self._file.close()  # removed between opening and locking
                if time.monotonic() > ends_at:
                    raise OSError(errno.ESTALE, "is another file each time it is looked at", str(path))
                continue
            content = self.read()
            self._file.close()
            if time.monotonic() > ends_at:
                raise HeldError(errno.EWOULDBLOCK, content, str(path))
            time.sleep(LOOK_S / 20)

    def is_held(self) -> bool:
        """Return whether the file of that name is still the one that is locked."""
        try:
            there = os.stat(self.path, follow_symlinks=False)
        except OSError:
            return False
        return os.path.samestat(there, os.fstat(self._file.fileno()))

    def check(self) -> None:
        """Raise LockLostError if the file was removed or replaced, so that another process may hold a new one."""
        if not self.is_held():
            raise LockLostError(
                f"{self.path}: was removed or replaced while this process held it as its lock, so another one may be "
                "writing there too; see that none is, then start again"
            )

    def read(self) -> str:
        """Return what the file holds."""
        self._file.seek(0)
        return self._file.read(1 << 16).decode(errors="replace")

    def write(self, content: str) -> None:
        """Replace what the file holds, in place."""
        self._file.truncate(0)
        self._file.write(content.encode())

    def close(self) -> None:
        """Release the lock; the file stays, so that whoever waits for it locks the same one."""
        self._file.close()


def _taken(file: BinaryIO, required: bool) -> bool:
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError as error:
        if required or error.errno not in WITHOUT_LOCKS:
            raise
    return True
