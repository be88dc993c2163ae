"""How error messages and tables show parameter names."""

import re
from collections import Counter, defaultdict
from collections.abc import Iterable

MOST_NAMES = 12


def listed(names: list[str]) -> str:
    """Join names, with a parameter's layers together: 'layers.{0,1,2}.ffn.alpha, head.weight and 2 kinds more'."""
    layers: dict[str, list[str]] = defaultdict(list)
    for name in names:
        match = re.fullmatch(r"layers\.(\d+)\.(.*)", name)
        layers[f"layers.{{}}.{match[2]}" if match else name] += [match[1]] if match else []
    joined = [
        kind.replace("{}", numbers[0] if len(numbers) == 1 else "{" + ",".join(numbers) + "}")
        for kind, numbers in layers.items()
    ]
    more = len(joined) - MOST_NAMES
    return ", ".join(joined[:MOST_NAMES]) + (f" and {more} kinds more" if more > 0 else "")


def by_layer(name: str) -> tuple[str, str, int]:
    """Return a key that sorts by kind, then layer; parameters outside layers come first."""
    match = re.fullmatch(r"layers\.(\d+)\.(.*)", name)
    return ("layers", match[2], int(match[1])) if match else ("", name, 0)


def kind_of(name: str) -> str:
    """Return a parameter's name without its layer: 'layers.3.ffn.alpha' -> 'layers.*.ffn.alpha'."""
    return ".".join("*" if part.isdecimal() else part for part in name.split("."))


def zero_by_chance(zero: Iterable[str], singles: Iterable[str]) -> set[str]:
    """Return the single numbers whose gradient may be exactly zero in one step without being lost.

    The few terms of such a gradient (of alpha or beta) may cancel in bf16, but hardly in every layer at once.

    Args:
        zero: names of single numbers with a gradient of zero.
        singles: names of all single numbers.
    """
    zero = list(zero)
    layers, zeros = Counter(map(kind_of, singles)), Counter(map(kind_of, zero))
    return {name for name in zero if zeros[kind_of(name)] < layers[kind_of(name)] or zeros[kind_of(name)] == 1}
