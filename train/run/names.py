"""Names of what lies in a run's folder. No other file of the project spells them.

config.json         resolved configuration, identity of the dataset, versions, git commit
metrics.jsonl       a row for every step and every evaluation
entropy.jsonl       a row for every logging step: entropies, thresholds, temperatures, alpha, beta
ranks.jsonl         a row for every logging step: how long each rank took
journal.jsonl       an event a line, never cut back
goodput.json        where the wall time went
evaluation.json     written by train.evaluate
evaluation_tasks.json  written by train.evaluate --tasks
checkpoints/        step_00000500/ and so on, unless checkpoint.path names another place
tensorboard/  figures/
run.lock            locked by the process that trains
run.json            the run's identity, which its checkpoints bear too (train/run/identity.py)
stacks/             where every rank stood when a time limit passed
code/  resolved.json  starts.txt      written by train.snapshot and the job script before a Slurm job starts
stage.json  log.txt  failure.txt      written by train.study around a training
"""

import re

CONFIG = "config.json"
METRICS = "metrics.jsonl"
ENTROPY = "entropy.jsonl"
RANKS = "ranks.jsonl"
JOURNAL = "journal.jsonl"
GOODPUT = "goodput.json"
EVALUATION = "evaluation.json"
TASKS = "evaluation_tasks.json"
CHECKPOINTS = "checkpoints"
TENSORBOARD = "tensorboard"
FIGURES = "figures"
STACKS = "stacks"
LOCK = "run.lock"
IDENTITY = "run.json"
CODE = "code"
RESOLVED = "resolved.json"
STARTS = "starts.txt"
STAGE = "stage.json"
LOG = "log.txt"
FAILURE = "failure.txt"

MARKER = "checkpoint.json"
"""In a checkpoint's folder: makes it complete (train/checkpoint/folder.py)."""


TRAINED = (CONFIG, IDENTITY, METRICS, ENTROPY, RANKS, JOURNAL, GOODPUT)
"""A training writes these."""

_AROUND = (JOURNAL, EVALUATION, TASKS, CHECKPOINTS, TENSORBOARD, FIGURES, STACKS, LOCK, CODE, RESOLVED, STARTS, STAGE,
           LOG, FAILURE)  # fmt: skip
"""Not the curves: other programs, too, write a metrics.jsonl, and a run that begins would cut its rows off."""
_JOB = re.compile(r".*\.(log|out|err)|code\..*\.tmp|\..*\.[0-9a-f]{8}\.tmp|\.nfs.*|\.gitignore|\.gitkeep|lost\+found")
"""Output of jobs and shells, what interrupted writes leave, and what file systems and git put into an empty folder."""


def may_precede_a_run(name: str) -> bool:
    """Return whether a file or folder of this name may lie in a run's folder before the run has an identity."""
    return name in _AROUND or _JOB.fullmatch(name) is not None


def checkpoint_name(step: int) -> str:
    """Return the name of a checkpoint's folder: step_00000500."""
    return f"step_{step:08d}"


def step_of(name: str) -> int | None:
    """Return the step of a checkpoint's folder, or None if the name is any other: step_7, step_00000007.bak."""
    digits = name.removeprefix("step_")
    is_number = digits.isascii() and digits.isdecimal() and len(digits) <= 18
    return step if is_number and name == checkpoint_name(step := int(digits)) else None
