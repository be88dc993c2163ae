"""How ranks that do not run the same thing are told apart in words."""

import re
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass

from train.start.facts import Facts

MAX_KEYS = 12
MAX_VALUES = 4
MAX_RANGES = 6
ABSENT = "absent"
COMMIT = "commit"
REMEDIES = {
    "config": "start every rank with the same command and configuration file",
    "dataset ": "give every node the same prepared dataset (rsync -c it from one node to the others)",
    "source ": "run the same checkout on every node (rsync -c it from one node to the others)",
    "version ": "install the same environment on every node",
    "variable ": "export the same environment variables on every node",
    "accelerator": "give every rank the same kind of device",
    "WORLD_SIZE": "start every rank by the same launcher",
}


@dataclass(frozen=True)
class Side:
    """Ranks that run the same thing.

    Attributes:
        ranks: ascending.
        facts: what they run; without the configuration or the dataset where those could not be read.
        fault: why they refuse to start; empty if they do not.
        commit: of their code.
    """

    ranks: list[int]
    facts: Facts
    fault: str = ""
    commit: str = ""


def describe_differences(sides: list[Side]) -> list[str]:
    """Write a line for each fault and each key that differs, at most `MAX_KEYS` of these, and one with the remedies.

    Args:
        sides: two or more; the order of `facts` is the order of the lines.
    """
    lines = [
        f"{name_ranks(side.ranks)} cannot start: {fault}"
        for fault in dict.fromkeys(side.fault for side in sides if side.fault)
        for side in [_merged(sides, fault)]
    ]
    lines = [line for text in lines for line in text.splitlines()]
    keys = differing_keys(sides)
    lines += [_line(key, sides) for key in keys[:MAX_KEYS]]
    if len(keys) > MAX_KEYS:
        lines.append(f"and {len(keys) - MAX_KEYS} more keys differ")
    remedies = dict.fromkeys(_remedy(key) for key in keys)
    if any(key.startswith("source ") for key in keys):
        lines.append(_line(COMMIT, [Side(side.ranks, {COMMIT: side.commit or "unknown"}) for side in sides]))
    if not remedies:
        return [*lines, "the other ranks could start; make the nodes alike, then start again"]
    return ["the ranks do not run the same thing", *lines, f"{'; '.join(remedies)}; then start again"]


def differing_keys(sides: list[Side]) -> list[str]:
    """Return the keys whose values differ, leaving out what a rank could not read because it refuses to start."""
    every = dict.fromkeys(key for side in sides for key in side.facts)
    return [key for key in every if len(_values(key, sides)) > 1]


def name_ranks(ranks: Iterable[int]) -> str:
    """Write ranks as ranges: 'rank 1', 'ranks 0, 2-5'; what is beyond `MAX_RANGES` ranges is counted."""
    ranges: list[list[int]] = []
    for rank in sorted(ranks):
        if ranges and rank == ranges[-1][1] + 1:
            ranges[-1][1] = rank
        else:
            ranges.append([rank, rank])
    shown = [str(first) if first == last else f"{first}-{last}" for first, last in ranges[:MAX_RANGES]]
    left = sum(last - first + 1 for first, last in ranges[MAX_RANGES:])
    is_one = len(ranges) == 1 and ranges[0][0] == ranges[0][1]
    return ("rank " if is_one else "ranks ") + ", ".join(shown) + (f" and {left} more" if left else "")


def _merged(sides: list[Side], fault: str) -> Side:
    return Side(sorted(rank for side in sides if side.fault == fault for rank in side.ranks), {}, fault)


def _values(key: str, sides: list[Side]) -> dict[str, list[int]]:
    """The ranks that have each value, the value of the lowest rank first."""
    values: dict[str, list[int]] = defaultdict(list)
    for side in sorted(sides, key=lambda side: side.ranks[0]):
        if key in side.facts or not side.fault:
            values[side.facts.get(key, ABSENT)] += side.ranks
    return values


def _line(key: str, sides: list[Side]) -> str:
    values = _values(key, sides)
    shown = [f"{value} on {name_ranks(ranks)}" for value, ranks in list(values.items())[:MAX_VALUES]]
    left = [rank for ranks in list(values.values())[MAX_VALUES:] for rank in ranks]
    return f"{key} is {'; '.join(shown)}" + (f"; others on {name_ranks(left)}" if left else "")


def _remedy(key: str) -> str:
    kind = re.match(r"dataset |source |version |variable |accelerator|WORLD_SIZE", key)
    return REMEDIES[kind.group() if kind else "config"]
