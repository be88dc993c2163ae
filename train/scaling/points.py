"""Measured points (N, D, loss) of one or several architectures, from a CSV file of anyone's."""

import csv
import math
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]


class PointsError(ValueError):
    """The points cannot be read; one clear line."""


@dataclass(frozen=True)
class Points:
    """Runs of one architecture: parameters N, tokens D, training FLOPs C, and the loss in nats a token; each [P]."""

    name: str
    parameters: Array
    tokens: Array
    losses: Array
    flops: Array

    def __len__(self) -> int:
        return len(self.losses)

    def where(self, kept: NDArray[np.bool_]) -> "Points":
        return Points(self.name, self.parameters[kept], self.tokens[kept], self.losses[kept], self.flops[kept])


# Column names as people write them, lower case without spaces and marks.
ALIASES = {
    "N": ("n", "params", "parameters", "numparams", "numparameters", "modelsize", "modelparams", "nparams"),
    "D": ("d", "tokens", "trainingtokens", "traintokens", "numtokens", "ntokens", "datasize", "data"),
    "C": ("c", "flops", "flop", "trainingflop", "trainingflops", "trainflops", "compute"),
    "loss": ("loss", "l", "validationloss", "valloss", "finalloss", "testloss", "evalloss", "crossentropy"),
    "architecture": ("architecture", "arch", "model", "name", "series"),
}
SUFFIXES = {"k": 1e3, "m": 1e6, "b": 1e9, "g": 1e9, "t": 1e12}


def read_csv(path: Path, columns: dict[str, str] | None = None) -> list[Points]:
    """Reads points of each architecture in a file with a header line.

    Columns are found by name (see ALIASES) unless `columns` says which is which, say {"N": "Model Size"}. Where D is
    absent it is C / (6 N), where C is absent it is 6 N D. Numbers may end in K, M, B, T.

    Raises:
        PointsError: no such file or column, or a value that is no positive number; names line and column.
    """
    try:
        with path.open(newline="", encoding="utf-8-sig") as file:
            rows = list(csv.DictReader(file))
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise PointsError(f"{path}: cannot be read as CSV ({error})") from None
    if not rows:
        raise PointsError(f"{path}: holds no rows under its header; expected columns N, D and loss")
    found = _columns(path, list(rows[0]), columns or {})
    series: dict[str, list[list[float]]] = {}
    for line, row in enumerate(rows, start=2):
        n = _number(path, line, row, found["N"])
        c = _number(path, line, row, found["C"]) if "C" in found else None
        d = _number(path, line, row, found["D"]) if "D" in found else None
        if d is None:
            assert c is not None, "_columns asks for D or C"
            d = c / (6 * n)
        loss = _number(path, line, row, found["loss"])
        name = (row[found["architecture"]] or "").strip() if "architecture" in found else ""
        series.setdefault(name or path.stem, []).append([n, d, loss, c if c is not None else 6 * n * d])
    return [points_of(name, values) for name, values in series.items()]


def points_of(name: str, rows: Sequence[Sequence[float]]) -> Points:
    """Points from rows (N, D, loss, C)."""
    n, d, loss, c = np.array(rows, dtype=float).T
    return Points(name, n, d, loss, c)


def write_csv(path: Path, series: Iterable[Points]) -> None:
    """A file that `read_csv` reads."""
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(["architecture", "N", "D", "loss", "C"])
        for points in series:
            for n, d, loss, c in zip(points.parameters, points.tokens, points.losses, points.flops, strict=True):
                writer.writerow([points.name, f"{n:.0f}", f"{d:.0f}", f"{loss:.6f}", f"{c:.6g}"])


def _columns(path: Path, header: list[str], chosen: dict[str, str]) -> dict[str, str]:
    """N, D, C, loss, architecture -> the header's own word for it."""
    known = [word for word in header if word]
    plain = {re.sub(r"[^a-z0-9]", "", word.lower()): word for word in known}
    found = {key: next((plain[word] for word in words if word in plain), "") for key, words in ALIASES.items()}
    for key, word in chosen.items():
        if word not in known:
            raise PointsError(f"{path}: has no column {word!r} for {key}; its columns are {', '.join(known)}")
        found[key] = word
    found = {key: word for key, word in found.items() if word}
    missing = [key for key in ("N", "loss") if key not in found] + ([] if {"D", "C"} & set(found) else ["D"])
    if missing:
        raise PointsError(
            f"{path}: no column for {', '.join(missing)} among {', '.join(known)}; name it with --columns, "
            "say --columns N='Model Size'"
        )
    return found


def _number(path: Path, line: int, row: dict[str, str], column: str) -> float:
    text = (row.get(column) or "").strip().replace(",", "").replace("_", "")
    suffix = SUFFIXES.get(text[-1:].lower())
    try:
        value = float(text[:-1]) * suffix if suffix else float(text)
    except ValueError:
        value = math.nan
    if not (math.isfinite(value) and value > 0):
        raise PointsError(
            f"{path}: line {line}, column {column}: {row.get(column)!r} is not a positive number; correct it, or leave "
            "the row out if that run diverged"
        )
    return value
