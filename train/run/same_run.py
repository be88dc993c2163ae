"""Is this the same run? Says for every key who refuses to go on when it has changed.

A key that nobody refuses may change: a resumed run reports it and goes on with the new value. Its schedule, layout,
logging and limits are such keys.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from enum import Flag, auto
from pathlib import Path
from typing import Any

from train.run import names
from train.run.reader import RunError, RunReader

Tree = dict[str, Any]
"""Sections of keys as in config.json, and `dataset` (train.checkpoint.load.dataset_identity) where it is known."""


class Use(Flag):
    """What somebody wants to do with the run that is there."""

    FOLDER = auto()
    """Train in its folder: only a run of the same model and seed may."""
    WEIGHTS = auto()
    """Load a checkpoint's weights, say to evaluate them."""
    RESUME = auto()
    """Go on from a checkpoint: steps must stay as large as before, since tokens and rates are counted in them."""
    RESULT = auto()
    """Take its losses for those of a configuration, as a study does."""


REFUSED: dict[str, Use] = {
    "model.*": Use.FOLDER | Use.WEIGHTS | Use.RESUME | Use.RESULT,
    "dataset.vocab_size": Use.WEIGHTS | Use.RESUME,
    "dataset.tokenizer_sha256": Use.WEIGHTS | Use.RESUME,
    "dataset.fingerprint": Use.RESUME | Use.RESULT,
    "regularizer.*": Use.RESULT,
    "optimizer.*": Use.RESULT,
    "checkpoint.init_from": Use.RESULT,
    "distillation.*": Use.RESULT,
    "training.seed": Use.FOLDER | Use.RESULT,
    "training.global_batch_size": Use.RESUME | Use.RESULT,
    "training.micro_batch_size": Use.RESULT,
}
"""Keys ('section.*' is every key of a section) and the uses that another value rules out, in the order of reporting.

When a run resumes, the data stream itself also refuses another seed or another data.shuffle_window_shards.
"""

IGNORED = {"run_dir"}
"""Keys whose change is not even reported: a run's folder may be moved."""


@dataclass(frozen=True)
class Difference:
    """A key with its value in the run that is there and in the configuration here."""

    key: str
    there: Any
    here: Any


def same_run(there: Tree, here: Tree, use: Use) -> list[Difference]:
    """Compare a run with a configuration.

    A key that the run did not record differs, except from a result: earlier versions recorded fewer keys, and their
    studies go on.

    Args:
        there: of the run.
        here: of the configuration; keys that only `there` has do not count.
        use: what is to be done with the run.

    Returns:
        The differences that rule the use out, in the order of `REFUSED`; none if it is the same run.

    Raises:
        RunError: a section of `there` is not an object.
    """
    found = []
    for pattern, uses in REFUSED.items():
        section, _, name = pattern.partition(".")
        if use not in uses or section not in here:
            continue
        theirs, ours = there.get(section, {}), here[section]
        if not isinstance(theirs, dict):
            raise RunError(f"{section} is {theirs!r}, expected an object; restore the file")
        for key in ours if name == "*" else {name} & ours.keys():
            if (key in theirs or use is not Use.RESULT) and theirs.get(key) != ours[key]:
                found.append(Difference(f"{section}.{key}", theirs.get(key), ours[key]))
    return found


def same_run_in(folder: Path, here: Tree, use: Use) -> list[Difference]:
    """Compare the run in a folder with a configuration as `same_run` does; no differences where there is no run.

    Raises:
        RunError: config.json is damaged.
    """
    there = RunReader(folder).config()
    try:
        return [] if there is None else same_run(there, here, use)
    except RunError as error:
        raise RunError(f"{folder / names.CONFIG}: {error}") from None


def changed_settings(there: Tree, here: Tree) -> dict[str, list[Any]]:
    """Return [old, new] of each setting that differs from the run's, for a resumed run to report.

    Keys that only one side has are left out, since versions differ in them, but for those of the deepspeed section,
    which are DeepSpeed's own.
    """
    old, new = dict(_flat(there)), dict(_flat(here))
    known = sorted(key for key in new if key not in IGNORED and (key in old or key.startswith("deepspeed.")))
    return {key: [old.get(key), new[key]] for key in known if old.get(key) != new[key]}


def _flat(tree: Tree) -> Iterator[tuple[str, Any]]:
    """Yield 'section.key' and its value; what is in no section under its own name."""
    for name, value in tree.items():
        if isinstance(value, dict):
            yield from ((f"{name}.{key}", inner) for key, inner in value.items())
        else:
            yield name, value
