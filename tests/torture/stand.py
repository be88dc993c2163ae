"""What all trials share: a tiny dataset, the uninterrupted run of each layout, and a copy of it killed half-way."""

import json
import os
import shutil
import signal
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from tests.torture.processes import Ended, Ranks, Tamper, start

STEPS, HALF_WAY = 20, 14
"""Steps of a run, and the step in which the half-way copy was killed."""
HANG_LIMIT_S = 90.0
"""Far beyond the time limits of the configuration, which are to end what hangs."""
CONFIG = {
    "model": {"num_layers": 2, "hidden_size": 32, "num_attention_heads": 4, "seq_length": 32},
    "regularizer": {"margin": 0.05},
    "training": {
        "micro_batch_size": 2,
        "global_batch_size": 4,
        "train_steps": STEPS,
        "evaluation_interval": 5,
        "evaluation_samples": 8,
    },
    "checkpoint": {"interval": 4},
    "logging": {"interval": 3, "tensorboard": False},
    "health": {"start_limit_s": 40, "step_limit_s": 30, "save_limit_s": 30, "evaluation_limit_s": 30},
}


@dataclass(frozen=True)
class Layout:
    """A number of ranks and how the model lies on them."""

    name: str
    world_size: int = 1
    overrides: tuple[str, ...] = ()


ONE = Layout("one")
TP2 = Layout("tp2", 2, ("parallel.tensor_parallel_size=2",))
LAYOUTS = [
    ONE,
    TP2,
    Layout("pp2", 2, ("parallel.pipeline_parallel_size=2",)),
    Layout("dp2", 2, ("parallel.zero_stage=2",)),
    Layout("cp2", 2, ("parallel.context_parallel_size=2",)),
]


class Stand:
    """The shared things, made when they are first needed.

    Args:
        folder: where everything lies; it must be empty.
    """

    def __init__(self, folder: Path) -> None:
        self.folder, self.dataset, self.config = folder, folder / "dataset", folder / "config.json"
        text = folder / "text"
        text.mkdir(parents=True)
        for number in range(40):
            words = [f"{(number * 31 + i * i) % 97:b}".translate(str.maketrans("01", "ab")) for i in range(100)]
            (text / f"{number:02d}.txt").write_text(" ".join(words))
        made = start(
            ["data.prepare", "--input", str(text), "--output", str(self.dataset), "--vocab-size", "270"]
            + ["--validation-fraction", "0.2", "--workers", "1", "--shard-megabytes", "1"],
            folder,
        ).wait(HANG_LIMIT_S)
        assert made.statuses == [0], made.text
        self.config.write_text(json.dumps({**CONFIG, "data": {"path": str(self.dataset)}}))

    def straight(self, layout: Layout = ONE) -> Path:
        """Return the folder of the uninterrupted run."""
        return self._made(f"straight-{layout.name}", layout, None, [0] * layout.world_size)

    def half_done(self, layout: Layout = ONE) -> Path:
        """Return the folder of a run that was killed in step HALF_WAY, after checkpoints at 4, 8 and 12."""
        return self._made(
            f"half-{layout.name}", layout, killed_in_step(HALF_WAY), [-signal.SIGKILL] * layout.world_size
        )

    def start(
        self,
        run: Path | str,
        layout: Layout,
        folder: Path,
        *overrides: str,
        environment: dict[str, str | None] | None = None,
        cwd: Path | None = None,
        tamper: Tamper | None = None,
    ) -> Ranks:
        """Start the training of a run."""
        command = ["train.main", "--config", str(self.config), f"run_dir={run}", *layout.overrides, *overrides]
        return start(command, folder, layout.world_size, environment, cwd, tamper)

    def _made(self, name: str, layout: Layout, tamper: Tamper | None, expected: list[int]) -> Path:
        folder = self.folder / name
        if not folder.exists():
            folder.mkdir()
            ended: Ended = self.start(folder / "run", layout, folder, tamper=tamper).wait(HANG_LIMIT_S)
            if ended.statuses != expected:
                shutil.rmtree(folder)
                raise RuntimeError(f"{name} ended with {ended.statuses}:\n{ended.text}")
        return folder / "run"


def in_step(number: int, act: Callable[[], None], on_rank: int | None = None) -> Tamper:
    """Do something at the start of a process's training step `number`, on one rank or on all."""

    def tamper(rank: int) -> None:
        from parallel.engine.engine import Engine

        step, calls = Engine.train_step, 0

        def counted(self: Engine, *args: object) -> object:
            nonlocal calls
            calls += 1
            if calls == number and on_rank in (None, rank):
                act()
            return step(self, *args)  # type: ignore[arg-type]

        Engine.train_step = counted  # type: ignore[method-assign,assignment]

    return tamper


def kill_myself() -> None:
    time.sleep(0.3)  # until the other ranks have come this far, and the save in the background is done
    os.kill(os.getpid(), signal.SIGKILL)


def killed_in_step(number: int, on_rank: int | None = None) -> Tamper:
    """kill -9 by itself at the start of step `number` of the process."""
    return in_step(number, kill_myself, on_rank)
