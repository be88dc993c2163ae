"""Types for argparse: numbers within a range, neither nan nor infinite, and files that can be written."""

import argparse
import contextlib
import os
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

N = TypeVar("N", int, float)
_LARGEST_WHOLE_NUMBER = 10**15
_LARGEST_NUMBER = 1e15


def whole_number(least: int, most: int = _LARGEST_WHOLE_NUMBER) -> Callable[[str], int]:
    """An argparse type: a whole number from `least` to `most`."""
    return lambda text: _bounded(text, int, "a whole number", least, most)


def real_number(least: float, most: float = _LARGEST_NUMBER) -> Callable[[str], float]:
    """An argparse type: a number from `least` to `most`, hence neither nan nor infinite."""
    return lambda text: _bounded(text, float, "a number", least, most)


def output_file(text: str) -> Path:
    """An argparse type: a file to be written at the end, refused before the work where it could not be."""
    if not can_write(Path(text)):
        raise argparse.ArgumentTypeError(f"{text!r}: expected a file in a folder that exists and can be written")
    return Path(text)


def can_write(file: Path) -> bool:
    return file.parent.is_dir() and os.access(file.parent, os.W_OK) and not file.is_dir()


def _bounded(text: str, kind: Callable[[str], N], name: str, least: N, most: N) -> N:
    with contextlib.suppress(ValueError):
        if least <= (value := kind(text)) <= most:
            return value
    raise argparse.ArgumentTypeError(f"{text!r}: expected {name} from {_text(least)} to {_text(most)}")


def _text(bound: float) -> str:
    return f"{bound:,}" if isinstance(bound, int) else f"{bound:g}"
