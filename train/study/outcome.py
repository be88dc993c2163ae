"""What a report needs of one result, in a few kilobytes: read from a run's folder, or from a file of finished results.

Reports are made from outcomes alone. So a study whose folders are gone, but for such a file, gives the same report.
"""

import dataclasses
from dataclasses import dataclass, field
from typing import Any

from data.errors import printable
from data.files.strict_json import Shape, check_shape, shown

Tree = dict[str, Any]
NUMBER = (float, type(None))
"""null stands for what is not finite."""
FINAL = ("done", "diverged")


@dataclass(frozen=True)
class Outcome:
    """One result.

    Attributes:
        run: its folder below the suite's, say "EReg/seed1".
        word: done or diverged; new, running, partial or failed while it is read from a folder.
        step: last step with a row.
        loss: over the whole validation split at the end, in nats a token; None if it did not get there.
        halves: the same over the first and the second half of the split; None if they were not measured.
        detail: one line about a run that diverged or failed.
        lost_layer: first layer with a NaN head, or that had collapsed, when it diverged.
        config: the sections that a suite compares, and training.train_steps.
        fingerprint: of the dataset.
        vocab_size: 0 if it is unknown.
        bytes_per_token: of the validation split's text; None if the dataset does not say.
        commit: of the code that trained.
        machine: device, torch, date.
        training: how smoothly it trained: steps, last_loss, rise_nats, rise_step, largest_norm, lost_steps,
            tokens_per_second.
        curve: step, loss and grad_norm of some sixty intervals, [S] each: their last step, mean loss, largest norm.
        validation: tokens and loss of each evaluation, [E].
        layers: step [S] and entropy_nats [S][L], of some twenty logging steps.
        heads: step, entropy_nats [L][N] and threshold [L][N] or None, of the last logging step.
    """

    run: str
    word: str
    step: int
    loss: float | None = None
    halves: list[float] | None = None
    detail: str = ""
    lost_layer: int | None = None
    config: Tree = field(default_factory=dict)
    fingerprint: str | None = None
    vocab_size: int = 0
    bytes_per_token: float | None = None
    commit: str | None = None
    machine: Tree = field(default_factory=dict)
    training: Tree | None = None
    curve: Tree | None = None
    validation: Tree | None = None
    layers: Tree | None = None
    heads: Tree | None = None

    def as_row(self) -> Tree:
        """Return it as JSON holds it."""
        return {each.name: getattr(self, each.name) for each in dataclasses.fields(self)}


TRAINING: Shape = {
    **{"steps": int, "rise_nats": float, "rise_step": int, "lost_steps": int},
    **{"last_loss": NUMBER, "largest_norm": NUMBER, "tokens_per_second": NUMBER},
}
SHAPE: Shape = {
    "run": str,
    "word": str,
    "step": int,
    "loss": NUMBER,
    "halves": (list, type(None)),
    "detail": str,
    "lost_layer": (int, type(None)),
    "config": {"model": dict, "regularizer": dict, "optimizer": dict, "training": {"train_steps": int}},
    "fingerprint": (str, type(None)),
    "vocab_size": int,
    "bytes_per_token": NUMBER,
    "commit": (str, type(None)),
    "machine": {"device?": str, "torch?": str, "date?": str},
    **dict.fromkeys(("training", "curve", "validation", "layers", "heads"), (dict, type(None))),
}
PARTS: dict[str, Shape] = {
    "halves": [float],
    "training": TRAINING,
    "curve": {"step": [int], "loss": [NUMBER], "grad_norm": [NUMBER]},
    "validation": {"tokens": [float], "loss": [NUMBER]},
    "layers": {"step": [int], "entropy_nats": [[NUMBER]]},
    "heads": {"step": int, "entropy_nats": [[NUMBER]], "threshold": (list, type(None))},
}


def outcome_from(row: Any) -> Outcome:
    """Check a row of a file and return the finished result that it holds; keys that it has besides are left out.

    Raises:
        ValueError: names the first key that does not fit.
    """
    check_shape(row, SHAPE)
    for key, shape in PARTS.items():
        if row[key] is not None:
            check_shape(row[key], shape, key)
    if row["word"] not in FINAL or (row["word"] == "done") != (row["loss"] is not None):
        found = f"word is {shown(row['word'])} and loss {shown(row['loss'])}"
        raise ValueError(f"{found}, expected done with a loss or diverged without")
    if row["halves"] is not None and len(row["halves"]) != 2:
        raise ValueError(f"halves has {len(row['halves'])} numbers, expected 2")
    for key in ("step", "vocab_size"):
        if not 0 <= row[key] < 2**48:
            raise ValueError(f"{key} is {row[key]}, expected a whole number from 0")
    for key in ("curve", "validation", "layers"):
        if row[key] is not None and len(lengths := {len(row[key][name]) for name in PARTS[key]}) != 1:
            raise ValueError(f"{key} has lists of {' and '.join(map(str, sorted(lengths)))}, expected equal lengths")
        if row[key] is not None and lengths == {0}:
            raise ValueError(f"{key} has empty lists; write null instead")
    for key, name in (("layers", "entropy_nats"), ("heads", "entropy_nats"), ("heads", "threshold")):
        if row[key] is not None and row[key][name] is not None:
            check_shape(row[key][name], [[NUMBER]], f"{key}.{name}")
            if len(lengths := {len(line) for line in row[key][name]}) != 1 or lengths == {0}:
                raise ValueError(f"{key}.{name} has lines of several lengths, or none")
    fields = {each.name: row[each.name] for each in dataclasses.fields(Outcome)}
    return Outcome(**{**fields, "detail": printable(row["detail"])})
