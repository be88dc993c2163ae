"""Judge how an attacked run ended: as an uninterrupted one, with one clear message, or with a loss."""

import contextlib
import hashlib
import json
import math
import os
import re
import stat
from pathlib import Path
from typing import Any

import numpy as np

from tests.torture.attack import Lost, Outcome, Trial
from tests.torture.processes import ROOT, Ended
from tests.torture.stand import ONE, STEPS, Layout
from tests.train.runs import TIMES

STATUSES = {0, 1, 2, 3, 4}
"""Those that docs/reference/exit-statuses.md lists; commands add 130 and 141."""
MAX_LINE = 2000
"""Characters of the longest line that still is a message."""
LOSS_TOLERANCE, WEIGHT_TOLERANCE = 1e-4, 1e-3
"""Relative, between two layouts."""

Snapshot = dict[str, str]


def check_ending(ended: Ended) -> None:
    """Raise Lost for a hang, a traceback, an unknown status or a message that is none."""
    if ended.hung:
        raise Lost(f"hangs: {_last_words(ended)}")
    if "Traceback (most recent call last)" in ended.text:
        raise Lost(f"traceback: {_last_words(ended)}")
    for status, output in zip(ended.statuses, ended.outputs, strict=True):
        if status not in STATUSES and status not in (-9, -15):
            raise Lost(f"status {status}: {_last_words(ended)}")
        if status in (1, 2, 3) and len(ended.statuses) == 1 and not errors(ended):
            raise Lost(f"status {status} without a message: {output[-300:]!r}")
    for line in ended.text.splitlines():
        bad = [char for char in line if not char.isprintable() and char not in "\t\r"]
        if bad:
            raise Lost(f"control characters in the output: {line[:300]!r}")
        if len(line) > MAX_LINE:
            raise Lost(f"a line of {len(line)} characters: {line[:300]!r}")


def errors(ended: Ended) -> list[str]:
    """Return the error messages, those of argparse included."""
    return [line for line in ended.text.splitlines() if line.startswith("error:") or ": error: " in line]


def survived(run: Path, trial: Trial, layout: Layout = ONE, like: Layout | None = None) -> None:
    """Raise Lost unless a run ended as the uninterrupted one.

    Args:
        layout: the layout it ended with.
        like: the uninterrupted run's, bit for bit if it is the same; else equal within rounding.
    """
    straight = trial.stand.straight(like or layout)
    exact = like in (None, layout)
    _same_rows(rows(straight / "metrics.jsonl"), rows(run / "metrics.jsonl"), "metrics.jsonl", exact)
    journal = [
        json.loads(line) for line in (run / "journal.jsonl").read_text(errors="replace").splitlines() if is_object(line)
    ]
    stops = {row.get("step") for row in journal if row.get("event") == "asked to stop"}
    for name in ("entropy.jsonl", "ranks.jsonl"):  # a run that is asked to stop logs once more
        expected = rows(straight / name)
        extra = stops - {row["step"] for row in expected}
        found = [row for row in rows(run / name) if row["step"] not in extra]
        if name == "ranks.jsonl":  # which holds times
            expected, found = ([{"step": row["step"]} for row in each] for each in (expected, found))
        _same_rows(expected, found, name, exact)
    same_weights(straight, run, exact)
    check_goodput(run)


def judged(
    run: Path, trial: Trial, ended: Ended, layout: Layout = ONE, like: Layout | None = None, naming: str = ""
) -> Outcome:
    """Judge a run after its last start: SURVIVED if that ended well; NAMED if it was refused with a clear message.

    The caller undoes the harm of a refused start, and then asks again whether the run survives.

    Args:
        naming: what a message has to name.
    """
    check_ending(ended)
    if set(ended.statuses) == {0}:
        survived(run, trial, layout, like)
        return Outcome.SURVIVED
    messages = errors(ended)
    if not messages:
        raise Lost(f"ended with {ended.statuses} without a message: {_last_words(ended)}")
    if naming and not any(naming in line for line in messages):
        raise Lost(f"the message does not name {naming}: {messages[0][:300]}")
    return Outcome.NAMED


def rows(file: Path) -> list[dict[str, Any]]:
    """Return the rows of a file of JSON lines, without times."""
    found = []
    if not file.is_file():
        raise Lost(f"{file.name} is gone")
    for number, line in enumerate(file.read_text(errors="replace").splitlines(), start=1):
        try:
            row = json.loads(line, parse_constant=_no_constant)
        except ValueError:
            raise Lost(f"{file.name}:{number}: not JSON: {line[:200]!r}") from None
        if not isinstance(row, dict):
            raise Lost(f"{file.name}:{number}: not an object: {line[:200]!r}")
        found.append({key: value for key, value in row.items() if key not in TIMES})
    return found


def is_object(line: str) -> bool:
    """Return whether a line of JSON lines holds an object."""
    with contextlib.suppress(ValueError):
        return isinstance(json.loads(line), dict)
    return False


def _no_constant(name: str) -> None:
    raise ValueError(f"{name} is no JSON")


def snapshot(*roots: Path, leave_out: tuple[str, ...] = ()) -> Snapshot:
    """Return what lies below folders: kind, mode and content of each file, by path."""
    found = {}
    for root in roots:
        for path in sorted([root, *root.rglob("*")]):
            if path.name in leave_out:
                continue
            kind = os.lstat(path)
            content = os.readlink(path) if path.is_symlink() else ""
            if stat.S_ISREG(kind.st_mode):
                content = hashlib.sha256(path.read_bytes()).hexdigest()
            found[str(path)] = f"{stat.filemode(kind.st_mode)} {content}"
    return found


def check_untouched(before: Snapshot, *roots: Path, leave_out: tuple[str, ...] = ()) -> None:
    """Raise Lost if something that was there is gone or not as it was."""
    after = snapshot(*(root for root in roots if os.path.lexists(root)), leave_out=leave_out)
    gone = sorted(before.keys() - after.keys())
    changed = sorted(path for path in before.keys() & after.keys() if before[path] != after[path])
    if gone or changed:
        raise Lost(f"someone else's files: gone {_names(gone)}, changed {_names(changed)}")


def check_goodput(run: Path) -> None:
    """Raise Lost unless goodput.json is plausible: no category negative or longer than the torture could run."""
    try:
        kept = json.loads((run / "goodput.json").read_text())
        values = [*kept["seconds"].values(), kept["goodput"]]
        if not all(isinstance(value, int | float) and math.isfinite(value) and value >= 0 for value in values):
            raise Lost(f"goodput.json holds {kept}")
        if kept["goodput"] > 1 or max(values) > 1e5:
            raise Lost(f"goodput.json is absurd: {kept}")
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise Lost(f"goodput.json is not as documented: {error!r}") from None


def weights(run: Path) -> dict[str, np.ndarray]:
    """Return the tensors of a run's last checkpoint, whole."""
    folder = run / "checkpoints" / f"step_{STEPS:08d}"
    try:
        table = json.loads((folder / "tensors.json").read_text())
    except OSError:
        raise Lost(f"no checkpoint of step {STEPS}") from None
    found = {}
    for name, entry in table.items():
        kind = {"float32": np.dtype("<f4"), "bfloat16": np.dtype("<u2")}[entry["dtype"]]
        whole = np.zeros(entry["shape"], kind)
        for chunk in entry["chunks"]:
            size = math.prod(chunk["sizes"])
            values = np.fromfile(folder / chunk["file"], kind, size, offset=chunk["offset"])
            place = tuple(slice(o, o + s) for o, s in zip(chunk["offsets"], chunk["sizes"], strict=True))
            whole[place] = values.reshape(chunk["sizes"])
        found[name] = whole
    return found


def same_weights(straight: Path, run: Path, exact: bool) -> None:
    """Raise Lost unless the last checkpoints hold the same values."""
    expected, found = weights(straight), weights(run)
    if expected.keys() != found.keys():
        raise Lost(f"tensors differ: {sorted(expected.keys() ^ found.keys())[:3]}")
    for name, values in expected.items():
        if exact and values.tobytes() != found[name].tobytes():
            raise Lost(f"the weights of {name} differ")
        scale = float(np.linalg.norm(values)) or 1.0
        distance = float(np.linalg.norm(values - found[name])) / scale
        if not exact and not (distance < WEIGHT_TOLERANCE or "exp_avg" in name):
            raise Lost(f"the weights of {name} differ by a relative {distance:.1e}")


def _same_rows(expected: list[dict[str, Any]], found: list[dict[str, Any]], name: str, exact: bool) -> None:
    if len(expected) != len(found):
        places = [[row["step"] for row in each] for each in (found, expected)]
        raise Lost(f"{name}: {len(found)} rows, expected {len(expected)}: steps {places[0]}, expected {places[1]}")
    for one, other in zip(expected, found, strict=True):
        if exact and one != other:
            keys = [key for key in one.keys() | other.keys() if one.get(key) != other.get(key)]
            raise Lost(f"{name}: step {one['step']} differs in {keys}: {[other.get(key) for key in keys]!r:.200}")
        if not exact and not _close(one, other):
            raise Lost(f"{name}: step {one['step']} differs beyond rounding: {other!r:.200}, expected {one!r:.200}")


def _close(one: Any, other: Any) -> bool:
    if isinstance(one, dict) and isinstance(other, dict):
        return one.keys() == other.keys() and all(_close(one[key], other[key]) for key in one)
    if isinstance(one, list) and isinstance(other, list):
        return len(one) == len(other) and all(map(_close, one, other))
    if isinstance(one, float) and isinstance(other, float):
        return math.isclose(one, other, rel_tol=LOSS_TOLERANCE, abs_tol=LOSS_TOLERANCE)
    return bool(one == other)


def _names(paths: list[str]) -> list[str]:
    return ["/".join(Path(path).parts[-2:]) for path in paths[:5]]


def _last_words(ended: Ended) -> str:
    if "(most recent call first)" in ended.text:  # what faulthandler prints of a process that hung
        calls = re.findall(r'File "([^"]+)", line (\d+) in (\w+)', ended.text.rpartition("Current thread")[2])
        ours = [f"{Path(file).name}:{line} {name}" for file, line, name in calls if str(ROOT) in file]
        return "in " + ", called by ".join(ours[:3])
    lines = [line for line in ended.text.splitlines() if line.strip() and not line.startswith(("  File", "    "))]
    return " | ".join(lines[-3:])[-400:]
