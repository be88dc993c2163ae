"""Numbers on the command line: types for argparse that refuse what is out of range, not a number or infinite."""

import argparse
import contextlib
from collections.abc import Callable
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


def _bounded(text: str, kind: Callable[[str], N], name: str, least: N, most: N) -> N:
    with contextlib.suppress(ValueError):
        if least <= (value := kind(text)) <= most:
            return value
    raise argparse.ArgumentTypeError(f"{text!r}: expected {name} from {_text(least)} to {_text(most)}")


def _text(bound: float) -> str:
    return f"{bound:,}" if isinstance(bound, int) else f"{bound:g}"
