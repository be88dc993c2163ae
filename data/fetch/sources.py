"""Find the files of a dataset by its address:

    some/folder, file:///some/folder  read in place
    http://host/dataset, https://...  fetched into the cache
    s3://bucket/dataset, gs://...     fetched into the cache through fsspec; needs fsspec's package for that store
    pipe:ssh host cat /data/{}        fetched into the cache: the output of a shell command; {} is the file's name

Commands run only if the user has allowed them on the command line (`ReadOptions.allow_commands`), since a
configuration, a mixture file or the folder of a run may come from somebody else. A manifest names plain files, so it
can neither run a command nor reach outside its dataset. The size of a fetch is bounded before it starts. A fetched file
is stored under its sha256.

To add an address scheme, write its `stream_...` function in data/fetch/transport.py and name it in `STREAMS`.
"""

import errno
import os
import stat
from collections.abc import Callable, Hashable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, Protocol, TypeVar

from data.errors import DataError
from data.fetch.cache import Cache
from data.fetch.transport import steady, stream_fsspec, stream_http, stream_pipe, with_retries
from data.files.address import is_command, is_remote, local_path, user_cache_folder

MANIFEST_NAME = "manifest.json"
MOST = 1_000_000  # of gigabytes, attempts or seconds; longer times are beyond what a socket can wait for
T = TypeVar("T")
Stream = Callable[[str, str, float], Iterator[bytes]]
"""Yields a file's content from (address, file name, time limit in seconds); raises FetchError if a retry may help."""
STREAMS: dict[str, Stream] = {"http": stream_http, "https": stream_http}
"""How each scheme SCHEME://... is read; fsspec reads the others."""


@dataclass(frozen=True)
class ReadOptions:
    """How data is fetched and checked.

    Attributes:
        on_damage: "stop" raises at the first damaged byte. "skip" logs the fault and leaves out the whole shard
            (data/stream/samples.py).
        cache_dir: Where fetched files are stored; None takes the user's cache folder.
        cache_gigabytes: How much they may take, in GB.
        fetch_attempts: How often a fetch is tried.
        fetch_time_limit_s: Longest wait for the next piece (1 MiB) of a file, in seconds.
        allow_commands: Whether addresses may be read that run code (`is_command`).
    """

    on_damage: str = "stop"
    cache_dir: Path | None = None
    cache_gigabytes: float = 100.0
    fetch_attempts: int = 5
    fetch_time_limit_s: float = 60.0
    allow_commands: bool = False

    def __post_init__(self) -> None:
        if self.on_damage not in ("stop", "skip"):
            raise DataError(f"on_damage is {self.on_damage!r}, expected 'stop' or 'skip'")
        for name in ("cache_gigabytes", "fetch_attempts", "fetch_time_limit_s"):
            if not 0 < getattr(self, name) <= MOST:  # false for nan
                raise DataError(f"{name} is {getattr(self, name)}, expected a positive number of at most {MOST:,}")

    @property
    def cache_folder(self) -> Path:
        """Where fetched files are stored; raise DataError if `cache_dir` is None and the user has no home folder."""
        return self.cache_dir or user_cache_folder()

    @classmethod
    def of(cls, settings: Mapping[str, Any]) -> "ReadOptions":
        """Read the options from a run's `data` section. Keys that are absent or null keep their defaults."""
        named = {name: settings[name] for name in cls.__dataclass_fields__ if settings.get(name) is not None}
        if "cache_dir" in named:
            named["cache_dir"] = local_path(named["cache_dir"])
        return cls(**named)


class Source(Hashable, Protocol):
    """The files of one dataset."""

    is_remote: bool

    def describe(self, name: str) -> str:
        """Return what an error message calls the file `name`."""

    def fetch(self, name: str, sha256: str, num_bytes: int) -> Path:
        """Return `name` as a local file of `num_bytes`; raise DataError if it cannot be fetched."""

    def copy(self, name: str, output: BinaryIO) -> None:
        """Write the whole of `name` to a file; raise DataError if it cannot be fetched."""

    def read(self, name: str, max_bytes: int) -> bytes:
        """Return the unchecked content of a small file; raise DataError if it is larger than `max_bytes`."""

    def forget(self, sha256: str) -> bool:
        """Drop the cached copy of a damaged file; return False if there is only the original."""


def open_source(address: str | Path, options: ReadOptions) -> Source:
    """Return the source that an address names. Nothing is fetched yet.

    Raises:
        DataError: The address cannot be used, or runs code and `options` does not allow that.
    """
    if not is_remote(address):
        return LocalSource(local_path(address))
    text = str(address)
    if is_command(text) and not options.allow_commands:
        raise DataError(
            f"{text}: runs a command; if you trust it, add data.allow_commands=true to the command line of a training "
            "or a study, --allow-commands to that of another tool"
        )
    if text.startswith("pipe:"):
        if "{}" not in text:
            raise DataError(f"{text}: the command needs {{}} where the name of the file goes")
        return RemoteSource(text, stream_pipe, options)
    return RemoteSource(text.rstrip("/"), STREAMS.get(text.partition("://")[0], stream_fsspec), options)


@dataclass(frozen=True)
class LocalSource:
    """A folder. Its files are read in place, and the reader checks every byte."""

    root: Path
    is_remote = False

    def describe(self, name: str) -> str:
        return str(self.root / name)

    def fetch(self, name: str, sha256: str, num_bytes: int) -> Path:
        return self.root / name

    def read(self, name: str, max_bytes: int) -> bytes:
        path = self.root / name
        try:
            with open(path, "rb", opener=_open_at_once) as file:
                content = file.read(max_bytes + 1)
        except (OSError, ValueError) as error:  # ValueError: a path that cannot exist
            raise DataError(
                f"{path}: cannot be read ({getattr(error, 'strerror', None) or error}); is this a dataset made by "
                "data.prepare?"
            ) from error
        return _bounded(content, max_bytes, str(path))

    def copy(self, name: str, output: BinaryIO) -> None:
        output.write((self.root / name).read_bytes())

    def forget(self, sha256: str) -> bool:
        return False


class RemoteSource:
    """Files that a function streams from a remote address into a cache, which the processes of a machine share."""

    is_remote = True

    def __init__(self, address: str, stream: Stream, options: ReadOptions) -> None:
        self._address, self._stream, self._options = address, stream, options
        self._cache = Cache(options.cache_folder, int(options.cache_gigabytes * 1e9))

    def describe(self, name: str) -> str:
        return self._address.replace("{}", name) if "{}" in self._address else f"{self._address}/{name}"

    def fetch(self, name: str, sha256: str, num_bytes: int) -> Path:
        def attempt() -> Path:
            return self._cache.fill(sha256, num_bytes, self._pieces(name), self.describe(name))

        return self._cache.find(sha256, num_bytes) or self._retried(name, attempt)

    def read(self, name: str, max_bytes: int) -> bytes:
        def attempt() -> bytes:
            content = bytearray()
            for piece in self._pieces(name):
                content += piece
                if len(content) > max_bytes:
                    break
            return bytes(content)

        return _bounded(self._retried(name, attempt), max_bytes, self.describe(name))

    def copy(self, name: str, output: BinaryIO) -> None:
        def attempt() -> None:
            output.seek(0)
            output.truncate()
            for piece in self._pieces(name):
                output.write(piece)

        self._retried(name, attempt)

    def forget(self, sha256: str) -> bool:
        return self._cache.forget(sha256)

    def _pieces(self, name: str) -> Iterator[bytes]:
        time_limit_s = self._options.fetch_time_limit_s
        return steady(self._stream(self._address, name, time_limit_s), time_limit_s)

    def _retried(self, name: str, attempt: Callable[[], T]) -> T:
        return with_retries(attempt, self._options.fetch_attempts, self.describe(name))


def _open_at_once(path: str, flags: int) -> int:
    """Open a file; raise OSError for a named pipe, on which a read could block forever."""
    file = os.open(path, flags | os.O_NONBLOCK)
    if stat.S_ISFIFO(os.fstat(file).st_mode):
        os.close(file)
        raise OSError(errno.EINVAL, "a named pipe", path)
    return file


def _bounded(content: bytes, max_bytes: int, where: str) -> bytes:
    if len(content) > max_bytes:
        raise DataError(f"{where}: larger than the limit of {max_bytes} bytes; copy or prepare it again")
    return content
