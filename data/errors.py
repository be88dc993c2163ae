"""The one error that reading or preparing data raises for its users, and how every command-line tool ends."""

import io
import os
import select
import signal
import sys
from collections.abc import Callable
from typing import NoReturn


class DataError(ValueError):
    """A fault in the user's data or settings, told in one line: what was found, what was expected, the remedy.

    What a file or server has put into the message can neither break the line nor steer a terminal.
    """

    def __init__(self, message: str) -> None:
        super().__init__(printable(message))


class DamagedShardError(DataError):
    """A shard is not what its manifest says."""


class DamagedShardFileError(DamagedShardError):
    """A shard's file is not what its manifest says: the original, or a copy in a cache that can be fetched again."""


def printable(text: str, keep: str = "") -> str:
    """`text` with its control characters, but for those in `keep`, spelled as Python does."""
    return "".join(char if char.isprintable() or char in keep else repr(char)[1:-1] for char in text)


def first_line(error: BaseException) -> str:
    """What an error says first, or of what kind it is where it says nothing."""
    return (str(error) or type(error).__name__).splitlines()[0]


def print_faults(error: Exception) -> None:
    """A line on stderr for each fault that an error holds, a line of its text each."""
    for line in str(error).splitlines():
        print(f"error: {line}", file=sys.stderr)


def run_command(main: Callable[[], int | None]) -> NoReturn:
    """Run a command-line main and exit with its status; a `DataError` becomes one line on stderr and exit status 2.

    What the operating system refuses meanwhile (a full disk) is exit status 1. Where whoever reads the output has seen
    enough (`| head`), the command ends as quietly as one that SIGPIPE ends, with the status that a shell gives that.
    What the terminal's encoding lacks (a file name that is no text) is spelled with backslashes.
    """
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")
    try:
        status = main() or 0
        sys.stdout.flush()
    except DataError as error:
        print(f"error: {error}", file=sys.stderr)
        status = 2
    except OSError as error:
        if isinstance(error, BrokenPipeError) and _reader_is_gone():
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # for what Python writes at its exit
            status = 128 + signal.SIGPIPE
        else:
            print(f"error: {error}", file=sys.stderr)
            status = 1
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        status = 130
    sys.exit(status)


def _reader_is_gone() -> bool:
    """Whether the broken pipe is that of the output, not one to another process."""
    poll = select.poll()
    poll.register(sys.stdout.fileno(), 0)
    return any(event & select.POLLERR for _, event in poll.poll(0))
