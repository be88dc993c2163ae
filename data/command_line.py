"""What every command-line tool of this project shares: argparse types, and how a command ends."""

import argparse
import contextlib
import io
import os
import select
import signal
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import NoReturn, TypeVar

from data.errors import DataError, message_lines, safe_text
from data.files.address import local_path
from data.files.own import open_to_read, read_within

N = TypeVar("N", int, float)
_LARGEST_WHOLE_NUMBER = 10**15
_LARGEST_NUMBER = 1e15


def whole_number(least: int, most: int = _LARGEST_WHOLE_NUMBER) -> Callable[[str], int]:
    """Return an argparse type that accepts a whole number from `least` to `most`."""
    return lambda text: _bounded(text, int, "a whole number", least, most)


def real_number(least: float, most: float = _LARGEST_NUMBER) -> Callable[[str], float]:
    """Return an argparse type that accepts a number from `least` to `most`; it rejects nan and infinity."""
    return lambda text: _bounded(text, float, "a number", least, most)


def path_argument(text: str) -> Path:
    """Parse a file or folder of this machine (an argparse type): "~" is the user's home, as in a configuration."""
    try:
        return local_path(text)
    except DataError as error:
        raise argparse.ArgumentTypeError(str(error)) from None


def output_file(text: str) -> Path:
    """Parse an output file (an argparse type); reject a path that cannot be written before any work is done."""
    path = path_argument(text)
    if not can_write(path):
        raise argparse.ArgumentTypeError(f"{text!r}: expected a file in a folder that exists and can be written")
    return path


def read_text(file: Path, most_bytes: int = 1 << 28) -> str:
    """Return the text that a user's file holds.

    Raises:
        DataError: it cannot be read, is larger than `most_bytes`, or is no UTF-8; names the file.
    """
    try:
        with open_to_read(file) as opened:
            return read_within(opened, most_bytes).decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise DataError(f"{file}: byte {error.start} is not UTF-8; convert the file") from None
    except OSError as error:
        raise DataError(f"{file}: cannot be read ({error.strerror})") from None
    except ValueError as error:
        raise DataError(f"{file}: {error}; give a smaller file") from None


def add_allow_commands(parser: argparse.ArgumentParser) -> None:
    """Add the option --allow-commands, the user's word that commands in files may run."""
    parser.add_argument(
        "--allow-commands",
        action="store_true",
        help="run 'pipe:' commands that the files of the run or the mixture name; only if you trust their author",
    )


def add_workers(parser: argparse.ArgumentParser) -> None:
    """Add the option --workers, the number of processes; the default is one for each core that this process may use."""
    parser.add_argument(
        "--workers",
        type=whole_number(1, 4096),
        default=len(os.sched_getaffinity(0)),
        metavar="N",
        help="number of processes (default: all cores)",
    )


def end_with_parent(parent: int) -> None:
    """End this worker process once its parent is gone, so that it does not go on writing; initializes a pool's worker.

    Args:
        parent: its process id.
    """

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(0.5)
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


def can_write(file: Path) -> bool:
    """Return whether `file` can be created or replaced; its folder must exist."""
    return file.parent.is_dir() and os.access(file.parent, os.W_OK) and not file.is_dir()


def print_faults(error: Exception) -> None:
    """Print each line of an error's message to stderr as an error of its own."""
    for line in message_lines(error):
        print(f"error: {line}", file=sys.stderr)


def print_warning(text: str) -> None:
    """Print a warning of one line to stderr."""
    print(f"warning: {safe_text(text)}", file=sys.stderr, flush=True)


def run_command(main: Callable[[], int | None]) -> NoReturn:
    """Run a command's `main` and exit with the status that it returns, or 0 for None.

    | what ends it         | exit status | on stderr                 |
    |----------------------|-------------|---------------------------|
    | DataError            | 2           | the message, in one line  |
    | OSError (full disk)  | 1           | the message               |
    | closed pipe (`head`) | 141         | nothing                   |
    | Ctrl-C               | 130         | "interrupted"             |

    141 is the status that a shell gives a command that SIGPIPE ended. Characters that the terminal's encoding lacks are
    printed with backslashes.
    """
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")
    try:
        status = main() or 0
        sys.stdout.flush()
    except DataError as error:
        print_faults(error)
        status = 2
    except OSError as error:
        if isinstance(error, BrokenPipeError) and _reader_is_gone():
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # Python flushes stdout again at exit
            status = 128 + signal.SIGPIPE
        else:
            print_faults(error)
            status = 1
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        status = 130
    sys.exit(status)


def _bounded(text: str, kind: Callable[[str], N], name: str, least: N, most: N) -> N:
    with contextlib.suppress(ValueError):
        if least <= (value := kind(text)) <= most:
            return value
    raise argparse.ArgumentTypeError(f"{text!r}: expected {name} from {_text(least)} to {_text(most)}")


def _text(bound: float) -> str:
    return f"{bound:,}" if isinstance(bound, int) else f"{bound:g}"


def _reader_is_gone() -> bool:
    """Return whether the broken pipe is stdout, not a pipe to another process."""
    poll = select.poll()
    poll.register(sys.stdout.fileno(), 0)
    return any(event & select.POLLERR for _, event in poll.poll(0))
