"""Addresses as users write them: a folder or file of this machine, a store, a command.

    runs/first  ~/runs/first  file:///scratch/runs/first      this machine: `local_path` returns the path
    s3://bucket/dataset  https://host/dataset                 a store: passed on as it is
    pipe:ssh host cat /data/{}                                a command

Whoever takes an address or a path from a user, a file or the environment turns it into a path here, and nowhere else.
So a "~" means the same folder everywhere.
"""

import os
from pathlib import Path

from data.errors import DataError, redacted

_MOST_CHARACTERS = 4096


def is_remote(address: str | Path) -> bool:
    """Return whether an address names anything but a file or folder of this machine."""
    text = str(address)
    return isinstance(address, str) and (is_command(text) or ("://" in text and not text.startswith("file://")))


def is_command(address: str | Path) -> bool:
    """Return whether reading an address can run code: a shell command, or a chain of fsspec's (a::b, reference://).

    Such an address must not be used unless the user has allowed it on the command line.
    """
    text = str(address)
    return text.startswith(("pipe:", "reference://")) or ("::" in text and "://" in text)


def local_path(address: str | Path) -> Path:
    """Return the path that an address of this machine names; it need not exist.

    A leading "~" or "~user" is that user's home, and "file://" is left out. Usable as an argparse type.

    Raises:
        DataError: the address is remote, or no path can look like this.
    """
    text = str(address)
    if is_remote(text):
        raise DataError(f"{redacted(text)}: expected a file or folder of this machine, not the address of a store")
    text = text.removeprefix("file://")
    if not text or "\0" in text or len(text) > _MOST_CHARACTERS:
        raise DataError(f"{text[:100]!r}: expected a path of 1 to {_MOST_CHARACTERS} characters without a null byte")
    try:
        text.encode("utf-8", "surrogateescape")
    except UnicodeEncodeError:
        raise DataError(f"{text!r}: expected a path; it contains characters that no file name can have") from None
    expanded = os.path.expanduser(text)  # not Path.expanduser, to which "./~" is the home too
    if text.startswith("~") and expanded == text:
        raise DataError(f"{text}: the home folder of {text.partition('/')[0]} is unknown; write the whole path")
    path = Path(expanded)
    return Path.cwd() / path if str(path).startswith("~") else path  # so that the path stays itself from now on


def user_cache_folder() -> Path:
    """Return the folder of what this project keeps for the user between runs; it need not exist.

    Raises:
        DataError: the user has no home folder.
    """
    base = os.environ.get("XDG_CACHE_HOME", "")
    if not os.path.isabs(base):  # which its specification tells to ignore
        base = os.path.expanduser("~/.cache")
    if not os.path.isabs(base):
        raise DataError(
            f"HOME is not set and user {os.getuid()} has no home folder, so there is no cache; set data.cache_dir, or "
            "HOME or XDG_CACHE_HOME in the environment"
        )
    return Path(base) / "entropy-guided-transformer"


def resolved_address(address: str) -> str:
    """Return a path as `local_path` does, and a remote address without a slash at its end."""
    return address if is_command(address) else address.rstrip("/") if is_remote(address) else str(local_path(address))
