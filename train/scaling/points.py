"""Read measured points (N, D, loss) of one or several architectures from anyone's CSV file."""

import csv
import math
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]
Row = dict[str, str]
NATS = "nats a token"


class PointsError(ValueError):
    """The points cannot be read; the message is one line."""


@dataclass(frozen=True)
class Points:
    """P runs of one architecture.

    Attributes:
        parameters: N, [P].
        tokens: D, [P].
        losses: [P].
        flops: training FLOPs C, [P].
        remarks: what the reader noticed, a sentence without a full stop each.
        unit: of the losses.
    """

    name: str
    parameters: Array
    tokens: Array
    losses: Array
    flops: Array
    remarks: tuple[str, ...] = ()
    unit: str = NATS

    def __len__(self) -> int:
        return len(self.losses)

    def where(self, kept: NDArray[np.bool_]) -> "Points":
        """Return only the points for which `kept` [P] is true."""
        n, d, losses, c = (values[kept] for values in (self.parameters, self.tokens, self.losses, self.flops))
        return Points(self.name, n, d, losses, c, self.remarks, self.unit)


# Column names as people write them, in lower case, without spaces, punctuation and a unit in brackets.
ALIASES = {
    "N": ("n", "params", "parameters", "numparams", "numparameters", "parametercount", "modelsize", "modelparams",
          "nparams"),
    "D": ("d", "tokens", "trainingtokens", "traintokens", "numtokens", "ntokens", "totaltokens", "datasize", "data"),
    "C": ("c", "flops", "flop", "trainingflop", "trainingflops", "trainflops", "compute", "budget"),
    "loss": ("loss", "l", "validationloss", "valloss", "finalloss", "testloss", "evalloss", "crossentropy"),
    "architecture": ("architecture", "arch", "series", "family", "experiment", "dataset", "model", "name"),
}  # fmt: skip
PERPLEXITY = re.compile(r"perplex|ppl", re.IGNORECASE)
LOGARITHM = re.compile(r"log|ln", re.IGNORECASE)
SUFFIXES = {"k": 1e3, "m": 1e6, "b": 1e9, "g": 1e9, "t": 1e12}
UNIT = re.compile(r"[(\[](k|m|b|g|t|thousand|million|billion|trillion)s?[)\]]\s*$", re.IGNORECASE)  # "params (M)"
THOUSANDS = re.compile(r"\d{1,3}(,\d{3})+(\.\d*)?")
MISSING = {"", "-", "nan", "na", "n/a", "none", "null", "inf"}
FEWEST = 1000  # parameters or tokens; smaller numbers are counts of millions or billions
MOST = 1e20
LARGEST_LOSS = 1e4
DELIMITERS = ",;\t"


def read_csv(path: Path, columns: dict[str, str] | None = None) -> list[Points]:
    """Read the points of each architecture from a file with a header line.

    A missing D is C / (6 N), a missing C is 6 N D. Numbers may end in K, M, B or T, and a header in (M) or (billions).
    Rows without a value are left out, and a remark says so.

    A column that ALIASES takes for the architecture must have a value with several sizes. Otherwise it names runs or
    sizes, and is ignored. Losses are in nats a token if ALIASES knows their column, else in the unit that it names.

    Args:
        path: of the file.
        columns: N, D, C, loss or architecture -> header, say {"N": "Model Size"}; the others are found by ALIASES.

    Raises:
        PointsError: no such file or column, or a value that is no positive number; names line and column.
    """
    rows = _rows(path)
    found = _columns(path, list(rows[0][1]), columns or {})
    points = {line: _values(path, line, row, found) for line, row in rows}
    complete = [(row, values) for line, row in rows if (values := points[line]) is not None]
    if not complete:
        raise PointsError(f"{path}: not one row has a value in all of {', '.join(map(repr, found.values()))}")
    names = [(row[found["architecture"]] or "").strip() if "architecture" in found else "" for row, _ in complete]
    if "architecture" not in (columns or {}) and not _tells_apart(names, [values[0] for _, values in complete]):
        names = [""] * len(complete)
    remarks = _missing([line for line, _ in rows if points[line] is None])
    series: dict[str, list[list[float]]] = {}
    for name, (_, values) in zip(names, complete, strict=True):
        series.setdefault(name or path.stem, []).append(values)
    unit = NATS if _plain(found["loss"]) in ALIASES["loss"] else found["loss"]
    return [points_of(name, members, remarks + _repeats(members), unit) for name, members in series.items()]


def _rows(path: Path) -> list[tuple[int, Row]]:
    """Return (line number, header -> text) of each row."""
    try:
        with path.open(newline="", encoding="utf-8-sig") as file:
            first = file.readline()
            file.seek(0)
            reader = csv.reader(file, delimiter=max(DELIMITERS, key=first.count))
            header, *lines = [(reader.line_num, cells) for cells in reader if cells] or [(1, [])]
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise PointsError(f"{path}: cannot be read as CSV ({error})") from None
    names = header[1]
    if repeated := next((name for name in names if name and names.count(name) > 1), None):
        raise PointsError(f"{path}: {names.count(repeated)} columns are called {repeated!r}; rename all but one")
    if not lines:
        raise PointsError(f"{path}: holds no rows under its header; expected columns N, D and loss")
    for line, cells in lines:
        while len(cells) > len(names) and not cells[-1].strip():
            cells.pop()
        if len(cells) != len(names):
            raise PointsError(
                f"{path}: line {line} has {len(cells)} cells and the header {len(names)}; write decimals with a point, "
                "quote cells that hold the delimiter, and leave empty cells for missing values"
            )
    return [(line, dict(zip(names, cells, strict=True))) for line, cells in lines]


def _values(path: Path, line: int, row: Row, found: dict[str, str]) -> list[float] | None:
    """Return N, D, loss, C of a row; None if one is missing and does not follow from the others."""
    n, d, c, loss = (_number(path, line, row, found[key]) if key in found else None for key in ("N", "D", "C", "loss"))
    if n is None or loss is None or (d is None and c is None):
        return None
    if d is None:
        assert c is not None
        d = c / (6 * n)
    for count, column in ((n, found["N"]), (d, found.get("D", found.get("C")))):
        if not FEWEST <= count <= MOST:
            raise PointsError(
                f"{path}: line {line}, column {column}: comes to {count:g} parameters or tokens; counts from "
                f"{FEWEST:,} to {MOST:g} are wanted, say 70M or 7e7, or a header such as 'params (M)'"
            )
    c = c if c is not None else 6 * n * d
    if not FEWEST <= c <= 6 * MOST**2:
        raise PointsError(f"{path}: line {line}, column {found['C']}: {c:g} is no count of training FLOPs; "
                          "correct it, or name other columns with --columns")  # fmt: skip
    if loss > LARGEST_LOSS:
        raise PointsError(f"{path}: line {line}, column {found['loss']}: {loss:g} is no loss of a model; correct it, "
                          "or leave it empty if that run diverged")  # fmt: skip
    return [n, d, loss, c]


def _tells_apart(names: Sequence[str], sizes: Sequence[float]) -> bool:
    """Whether a column's values are architectures, not runs or sizes."""
    pairs = set(zip(names, sizes, strict=True))
    return len(pairs) > len(set(names))


def _missing(lines: Sequence[int]) -> tuple[str, ...]:
    shown = ", ".join(str(line) for line in lines[:5]) + (", ..." if len(lines) > 5 else "")
    return (f"{len(lines)} rows without a value left out (lines {shown})",) if lines else ()


def _repeats(points: Sequence[Sequence[float]]) -> tuple[str, ...]:
    count = len(points) - len({tuple(point) for point in points})
    return (f"{count} points repeat another to the last digit; each counts",) if count else ()


def points_of(name: str, rows: Sequence[Sequence[float]], remarks: tuple[str, ...] = (), unit: str = NATS) -> Points:
    """Make points from rows (N, D, loss, C)."""
    n, d, loss, c = np.array(rows, dtype=float).T
    return Points(name, n, d, loss, c, remarks, unit)


def write_csv(path: Path, series: Iterable[Points]) -> None:
    """Write a file that `read_csv` reads."""
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(["architecture", "N", "D", "loss", "C"])
        for points in series:
            for n, d, loss, c in zip(points.parameters, points.tokens, points.losses, points.flops, strict=True):
                writer.writerow([points.name, f"{n:.0f}", f"{d:.0f}", f"{loss:.6f}", f"{c:.6g}"])


def _columns(path: Path, header: list[str], chosen: dict[str, str]) -> dict[str, str]:
    """Return N, D, C, loss, architecture -> the file's header for it."""
    known = [word for word in header if word]
    plain = {_plain(word): word for word in known}
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
            "say --columns N='Model Size' (losses are the logarithm of perplexities)"
        )
    if PERPLEXITY.search(found["loss"]) and not LOGARITHM.search(found["loss"]):
        raise PointsError(f"{path}: column {found['loss']!r} holds perplexities; the law is of their logarithms, the "
                          "losses: add a column of those, and name it with --columns loss=")  # fmt: skip
    return found


def _plain(word: str) -> str:
    """Write a header as in ALIASES."""
    return re.sub(r"[^a-z0-9]", "", UNIT.sub("", word).lower())


def _number(path: Path, line: int, row: Row, column: str) -> float | None:
    """Parse a positive number; return None if the cell is empty."""
    text = (row.get(column) or "").strip().replace("_", "")
    if text.lower() in MISSING:
        return None
    unit = UNIT.search(column)
    scale = SUFFIXES[unit[1][0].lower()] if unit else 1.0
    if text[-1].lower() in SUFFIXES:
        text, scale = text[:-1], scale * SUFFIXES[text[-1].lower()]
    if THOUSANDS.fullmatch(text):
        text = text.replace(",", "")
    try:
        value = float(text) * scale
    except ValueError:
        value = math.nan
    if not (math.isfinite(value) and value > 0):
        raise PointsError(
            f"{path}: line {line}, column {column}: {row.get(column)!r} is not a positive number; correct it, or leave "
            "it empty if that run diverged"
        )
    return value
