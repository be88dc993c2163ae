"""Names of what lies in a run's folder. No other file of the project spells them.

config.json         resolved configuration, identity of the dataset, versions, git commit
metrics.jsonl       a row for every step and every evaluation
entropy.jsonl       a row for every logging step: entropies, thresholds, temperatures, alpha, beta
ranks.jsonl         a row for every logging step: how long each rank took
journal.jsonl       an event a line, never cut back
goodput.json        where the wall time went
evaluation.json     written by train.evaluate
checkpoints/        step_00000500/ and so on, unless checkpoint.path names another place
tensorboard/  figures/
run.lock            locked by the process that trains
code/  resolved.json                  written by train.snapshot before a Slurm job starts
stage.json  log.txt  failure.txt      written by train.study around a training
"""

CONFIG = "config.json"
METRICS = "metrics.jsonl"
ENTROPY = "entropy.jsonl"
RANKS = "ranks.jsonl"
JOURNAL = "journal.jsonl"
GOODPUT = "goodput.json"
EVALUATION = "evaluation.json"
CHECKPOINTS = "checkpoints"
TENSORBOARD = "tensorboard"
FIGURES = "figures"
LOCK = "run.lock"
CODE = "code"
RESOLVED = "resolved.json"
STAGE = "stage.json"
LOG = "log.txt"
FAILURE = "failure.txt"

MARKER = "checkpoint.json"
"""In a checkpoint's folder: makes it complete (train/checkpoint/folder.py)."""


def checkpoint_name(step: int) -> str:
    """Return the name of a checkpoint's folder: step_00000500."""
    return f"step_{step:08d}"


def step_of(name: str) -> int | None:
    """Return the step of a checkpoint's folder, or None if the name is another (say of an unfinished copy)."""
    digits = name.removeprefix("step_")
    return int(digits) if digits != name and digits.isdecimal() else None
