"""Numbers that go wrong, and side logs that cannot be written: neither ends a run in silence."""

import json

import numpy as np
import torch

from tests.torture.attack import Lost, Outcome, Trial, attack
from tests.torture.judge import check_ending, errors, judged, rows, weights
from tests.torture.processes import Tamper
from tests.torture.stand import LAYOUTS, ONE, STEPS


def poisoned_after_step(number: int, value: float) -> Tamper:
    """The update of a process's step `number` sets one weight to `value`."""

    def tamper(rank: int) -> None:
        from parallel.engine.engine import Engine

        step, calls = Engine.train_step, 0

        def poisoned(self: Engine, *args: object) -> object:
            nonlocal calls
            calls += 1
            result = step(self, *args)  # type: ignore[arg-type]
            if calls == number:
                with torch.no_grad():
                    next(iter(self.stage.parameters())).view(-1)[0] = value
            return result

        Engine.train_step = poisoned  # type: ignore[method-assign,assignment]

    return tamper


@attack("numbers")
def an_update_makes_nan(trial: Trial) -> Outcome:
    """An update, the last one included, makes a weight NaN or infinite: the run does not end as if it were done."""
    layout = trial.random.choice(LAYOUTS[:2])
    number = trial.random.choice([STEPS, STEPS, trial.random.randint(1, STEPS - 1)])
    value = trial.random.choice([float("nan"), float("inf"), -float("inf")])
    trial.did(f"{layout.name}: a weight is {value} after step {number}")
    run = trial.folder / "run"
    ended = trial.train(run, layout, tamper=poisoned_after_step(number, value))
    check_ending(ended)
    for name in ("metrics.jsonl", "entropy.jsonl", "ranks.jsonl", "journal.jsonl"):
        if (run / name).exists():
            rows(run / name)  # strict JSON
    if set(ended.statuses) == {0}:
        last = rows(run / "metrics.jsonl")[-1].get("validation_loss")
        if not isinstance(last, float) or not all(np.isfinite(each).all() for each in weights(run).values()):
            raise Lost(f"ended with status 0: {ended.text[-200:]}")
        return Outcome.SURVIVED  # it went back to a checkpoint
    if not errors(ended):
        raise Lost(f"no message: {ended.text[-300:]}")
    looked = trial.command("train.evaluate", "--run", str(run))
    check_ending(looked)
    if (run / "evaluation.json").exists():
        json.loads((run / "evaluation.json").read_text(), parse_constant=_no_constant)
    return Outcome.NAMED


def _no_constant(name: str) -> None:
    raise Lost(f"evaluation.json holds {name}, which is no JSON")


@attack("numbers")
def evaluation_of_a_model_with_nan(trial: Trial) -> Outcome:
    """train.evaluate of a model with a NaN or infinite weight writes strict JSON, or refuses."""
    run = trial.half_done()
    value = trial.random.choice([float("nan"), float("inf")])
    trial.did(f"a weight is {value}")

    def tamper(rank: int) -> None:
        from parallel.state import training_state

        load = training_state.load_weights

        def poisoned(stage: torch.nn.Module, *args: object) -> None:
            load(stage, *args)  # type: ignore[arg-type]
            with torch.no_grad():
                next(iter(stage.parameters())).view(-1)[0] = value

        training_state.load_weights = poisoned  # type: ignore[assignment]

    ended = trial.command("train.evaluate", "--run", str(run), tamper=tamper)
    check_ending(ended)
    if (run / "evaluation.json").exists():
        json.loads((run / "evaluation.json").read_text(), parse_constant=_no_constant)
        drawn = trial.command("train.figures", "--run", str(run))
        check_ending(drawn)
    return Outcome.SURVIVED if ended.statuses == [0] else Outcome.NAMED


@attack("running")
def side_log_cannot_be_written(trial: Trial) -> Outcome:
    """TensorBoard's folder cannot be written from the start or from some step on: a warning, and the run goes on."""
    run = trial.folder / "run"
    how = trial.random.choice(["a file is there", "a link to nowhere", "the disk below it is full"])
    trial.did(how)
    run.mkdir()
    tamper = None
    if how == "a file is there":
        (run / "tensorboard").write_text("")
    elif how == "a link to nowhere":
        (run / "tensorboard").symlink_to("/proc/nowhere")
    else:
        import errno

        from tests.torture.disks import BadDisk

        after = trial.random.randrange(2000)

        def tamper(rank: int) -> None:
            BadDisk(run / "tensorboard", errno.ENOSPC, after, 10**9, "write").install(rank)

    ended = trial.train(run, ONE, "logging.tensorboard=true", tamper=tamper)
    check_ending(ended)
    if ended.statuses == [2] and how != "the disk below it is full":
        return Outcome.NAMED  # refused before anything was trained
    if judged(run, trial, ended) is not Outcome.SURVIVED:
        raise Lost(f"a side log ended the run: {errors(ended)[0][:300]}")
    if "warning:" not in ended.text:
        raise Lost("no warning")
    return Outcome.SURVIVED
