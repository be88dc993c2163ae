"""The table of attacks, a trial of one, and how a trial can end."""

import random
import shutil
from collections.abc import Callable
from dataclasses import dataclass, field
from enum import Enum
from pathlib import Path

from tests.torture.processes import Ended, Ranks, Tamper, start
from tests.torture.stand import HANG_LIMIT_S, ONE, Layout, Stand

FAST_END_S = 3.0
"""After which a launcher kills the other ranks of a failed one."""


class Outcome(Enum):
    """How a trial ended."""

    SURVIVED = "survived"
    """The run ended bit for bit as an uninterrupted one, or the command did its work."""
    NAMED = "named"
    """It ended with one clear message and a documented status, and nothing was lost."""


class Lost(Exception):
    """Something was lost, wrong without a word, let in, or ended badly; the message says what."""


@dataclass
class Trial:
    """One attack with its own random numbers and its own folder.

    Attributes:
        name: attack:seed:number, which repeats the trial.
        folder: empty at the start, deleted at the end unless something was lost.
        remarks: what was done, for the report.
    """

    name: str
    stand: Stand
    folder: Path
    random: random.Random
    remarks: list[str] = field(default_factory=list)

    def did(self, remark: str) -> None:
        self.remarks.append(remark)

    def half_done(self, layout: Layout = ONE) -> Path:
        """Return this trial's own copy of a run that was killed half-way."""
        return shutil.copytree(self.stand.half_done(layout), self.folder / "run", symlinks=True)

    def start(
        self,
        run: Path | str,
        layout: Layout = ONE,
        *overrides: str,
        environment: dict[str, str | None] | None = None,
        tamper: Tamper | None = None,
    ) -> Ranks:
        """Start the training of a run."""
        return self.stand.start(run, layout, self.folder, *overrides, environment=environment, tamper=tamper)

    def train(
        self,
        run: Path | str,
        layout: Layout = ONE,
        *overrides: str,
        environment: dict[str, str | None] | None = None,
        tamper: Tamper | None = None,
    ) -> Ended:
        """Train a run until its processes end."""
        ranks = self.start(run, layout, *overrides, environment=environment, tamper=tamper)
        return ranks.wait(HANG_LIMIT_S, FAST_END_S)

    def command(
        self,
        *command: str,
        environment: dict[str, str | None] | None = None,
        tamper: Tamper | None = None,
    ) -> Ended:
        """Run another command, say "train.evaluate", until it ends."""
        return start(list(command), self.folder, 1, environment, None, tamper).wait(HANG_LIMIT_S)


Function = Callable[[Trial], Outcome]


@dataclass(frozen=True)
class Attack:
    """A way to harm a run.

    Attributes:
        group: by which --only chooses it.
        every: it takes part in every so many rounds, since it takes long.
    """

    name: str
    group: str
    function: Function
    every: int = 1

    @property
    def description(self) -> str:
        return (self.function.__doc__ or "").strip().splitlines()[0]


ATTACKS: dict[str, Attack] = {}
"""All attacks by name, in the order of registration."""


def attack(group: str, every: int = 1) -> Callable[[Function], Function]:
    """Register a function as an attack. It does its harm, and returns how that ended or raises Lost."""

    def register(function: Function) -> Function:
        ATTACKS[function.__name__] = Attack(function.__name__, group, function, every)
        return function

    return register
