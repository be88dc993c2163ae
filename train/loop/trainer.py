"""The training loop: a step, then whatever is due after it."""

import contextlib
import math
from collections import deque
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

import torch

from data.errors import DataError, printable
from data.shards.manifest import Manifest
from parallel.agreement import on_rank_zero
from parallel.engine.compiled import compiled_blocks
from parallel.engine.first_step import FirstStepCheck
from parallel.engine.telemetry import PendingReport, StepLimits, head_snapshot
from parallel.launch import initialize_distributed, local_device, rank
from parallel.sharding.stage import StageStatistics
from parallel.state.replicas import check_replicas
from train.checkpoint import load as checkpoint
from train.checkpoint.folder import Folder
from train.checkpoint.load import SavedCheckpoint
from train.checkpoint.places import Places
from train.checkpoint.root import CheckpointError
from train.checkpoint.saver import CheckpointSaver, Progress
from train.config import Config
from train.config.schedule import learning_rate, norm_gate, penalty_strength
from train.downstream.tasks import accuracy, load_tasks
from train.initial.teacher import read_teacher
from train.initial.weights import InitialWeights
from train.loop.clock import Clock
from train.loop.health import Health
from train.loop.log import RunLog, is_validated, seconds_after
from train.loop.metrics import StepMetrics
from train.loop.rank_times import RankTimes
from train.loop.signals import StopRequest
from train.loop.time_limits import GRACE_S
from train.loop.trouble import TroubleReporter
from train.loop.validation import Validation, validate, validation_tokens
from train.parts import build_engine, layout_of, micro_batches, open_stream
from train.start import timeline
from train.start.timeline import phase

CURE = "lower optimizer.learning_rate, warm up longer or choose a more stable architecture"


class TrainingError(RuntimeError):
    """Training cannot go on: the numbers went wrong, and going back to a checkpoint did not help."""


class DeviceMemoryError(RuntimeError):
    """The device's memory is too small."""

    def __init__(self, config: Config, error: torch.OutOfMemoryError) -> None:
        cause = ". ".join(str(error).split(". ")[:2])  # how much was requested, and how much there is
        super().__init__(
            f"the device's memory does not hold training.micro_batch_size = {config.training.micro_batch_size} "
            f"({cause}); lower that, set training.activation_recompute to 'selective' or 'full', or split the model "
            "over more devices (python -m train.plan counts what each holds)"
        )


class StartMemoryError(DeviceMemoryError):
    """The device's memory is too small for the first step, so that starting again would not help."""


@dataclass(frozen=True)
class RunResult:
    """Where a run ended.

    Attributes:
        step: the last step trained.
        validation: over the whole split; None if this process did not train to the last step.
    """

    step: int
    validation: Validation | None


@dataclass(frozen=True)
class StepInFlight:
    """A step that was launched on the device and whose results have not been read yet.

    Attributes:
        samples: the first sample it read, and the first that it did not read any more.
    """

    step: int
    samples: tuple[int, int]
    learning_rate: float
    limits: StepLimits
    report: PendingReport
    statistics: StageStatistics
    data_wait_s: float


class Trainer:
    """A run from its first or its resumed step to its last.

    The device works on one step while the host reads the results of the step before. So a refused step is answered one
    step late. Only where something is due after a step (a log, an evaluation, a checkpoint) does the host wait for it.

    Args:
        config: resolved.
        manifest: of the dataset at `config.data.path`.
        clock: limits and counts each section.
        stop: asks for an early end.
        places: where the run writes, open.
    """

    def __init__(self, config: Config, manifest: Manifest, clock: Clock, stop: StopRequest, places: Places) -> None:
        self.config, self.manifest, self.clock, self.stop, self.places = config, manifest, clock, stop, places
        self.folder, self.root = Path(config.run_dir), Folder(config.checkpoint_folder)
        self.left_alone: set[str] = set()
        self.tasks = load_tasks(config, manifest)
        dataset = checkpoint.dataset_identity(manifest)
        self.group = checkpoint.checkpoint_group(config.health.save_limit_s)
        with phase("find_checkpoint"):
            saved, faults = checkpoint.newest_to_resume(self.root, self.group, places.run_id, config, dataset)
        self.step = 0 if saved is None else saved.step
        in_the_way = places.in_the_way(self.step, lambda step: self._due(config.checkpoint.interval, step))
        initial, self.initialized_from = None, None if saved is None else saved.marker.get("initialized_from")
        if saved is None and config.checkpoint.init_from is not None:
            with phase("initial_weights"):
                initial = InitialWeights(config, manifest, self.group)
                self.initialized_from = initial.record
        teacher, teacher_record = None, None
        if config.distillation.teacher is not None:
            with phase("teacher"):
                teacher, teacher_record = read_teacher(config, manifest, self.group)
        self.engine = build_engine(config, manifest.vocab_size, initial=initial, distillation=teacher)
        with phase("data"):
            self.stream = open_stream(config, self.engine.groups.grid, "train")
        self.health = Health(config.health)
        if saved is not None:
            with phase("load_checkpoint"):
                self._restore(saved)
            try:
                self.stream.load_state_dict(saved.marker["data_state"])
            except DataError as error:
                raise CheckpointError(f"{saved.folder.address}: {error}") from None
            if "health_state" in saved.marker:  # earlier versions did not save it
                self.health.load_state_dict(saved.marker["health_state"])
        self.batches = micro_batches(self.stream, self.engine.groups.grid, local_device())
        changed = checkpoint.changed_settings(saved, config) if saved is not None else {}
        self.log: RunLog | None = None
        if rank() == 0:
            damage = clock.keep_goodput(self.folder, seconds_after(self.folder, self.step))
            self.log = RunLog(self.folder, config, self.step, faults, changed, recorded_logs(saved))
            self.log.damaged(damage, self.step)
            if teacher_record is not None:
                said = f"teacher {teacher_record['address']} (sha256 {teacher_record['sha256'][:12]})"
                self.log.event("teacher", said, **teacher_record)
            if initial is not None:
                self.log.event("initial weights", initial.words, **initial.record)
            elif config.checkpoint.init_from is not None:
                ignored = f"checkpoint.init_from is ignored: the run goes on from its checkpoint of step {self.step}"
                self.log.event("initial weights ignored", ignored, address=config.checkpoint.init_from)
        self._warn_of_places(in_the_way)
        told = None if self.log is None else self._tell_save
        self.saver = CheckpointSaver(
            config,
            self.engine,
            manifest.vocab_size,
            {"run_id": places.run_id, "dataset": dataset, **self.origin},
            self.group,
            places.owned,
            told,
        )
        self.metrics = StepMetrics(config, manifest.vocab_size, clock.steps)
        options = config.data.read_options()
        self.trouble = TroubleReporter(self.engine, self.stream, config.model.seq_length, options)
        self.rank_times = RankTimes(self.engine.engine.module)
        layout = layout_of(config, self.engine.groups.grid)
        compiles = config.training.compiles(on_gpu=local_device().type == "cuda")
        self.first_step = FirstStepCheck(self.engine, self.step == 0, f"layout {layout}", compiles)
        self.in_flight: deque[StepInFlight] = deque()
        self.is_first_step, self.is_stopping, self.save_is_due = True, False, False
        self.last_refusal = ""
        self.validated: tuple[int, float] | None = None

    @property
    def origin(self) -> dict[str, Any]:
        """What config.json and checkpoints record of where the weights come from; empty if from the seed."""
        return {} if self.initialized_from is None else {"initialized_from": self.initialized_from}

    def train(self) -> Validation | None:
        """Train to the last step.

        Returns:
            The validation over the whole split; None if the run was complete before, or was asked to stop early.

        Raises:
            TrainingError: the numbers went wrong, at the last step too.
        """
        end, samples = self.config.train_steps, self.config.training.evaluation_samples
        if self.step >= end:
            timeline.finish()  # no step is to come
        if self.step > end or (self.step == end and not self._lacks_validation(None)):
            return None
        if self._evaluation_is_due() and self._lacks_validation(samples):
            self._evaluate(samples)  # the earlier process was stopped before it
        self.clock.steps.mark()
        with self.clock.limits.section("step"):  # limits what has no section of its own
            while self.step < end and not self.is_stopping:
                self._train_step()
                if self.health.must_go_back:
                    self._go_back()
                    continue
                if self.is_stopping or self._due(self.config.logging.interval):
                    self._log()
                if every(self.config.parallel.replica_check_interval, self.step):
                    check_replicas(self.engine.stage, self.engine.groups)
                if self._evaluation_is_due() and not self.is_stopping:
                    self._evaluate(samples)
                if self.tasks and self._due(self.config.downstream.interval) and not self.is_stopping:
                    self._measure_tasks()
                self._save_if_due()
        self._finish_save()
        return self._evaluate_end() if self.step == end else None

    def close(self, error: BaseException | None) -> None:
        """Release everything; after an error, without waiting for another rank."""
        self.stream.close()
        if error is None:
            self.saver.close()
        self.clock.goodput.spent("other")
        if self.log is not None:
            with contextlib.nullcontext() if error is None else contextlib.suppress(OSError):  # a full disk, say
                self.log.end(self.step, self.stop.received, error, self.clock.goodput, self.metrics.mfu_words)
                self.log.close()

    def _lacks_validation(self, limit_samples: int | None) -> bool:
        """Whether this step has no logged validation over so many samples (None: all), since the run was stopped."""
        tokens = validation_tokens(self.manifest, self.config, limit_samples)
        return not on_rank_zero(lambda: is_validated(self.folder, self.step, tokens))

    def _due(self, interval: int, step: int | None = None) -> bool:
        """Whether a thing done every `interval` steps (0: only at the end) is due. At the end everything is.

        Args:
            step: after which; None is now.
        """
        step = self.step if step is None else step
        return step == self.config.train_steps or every(interval, step)

    def _evaluation_is_due(self) -> bool:
        """Whether a validation on part of the split is due; that on the whole split comes after the last step."""
        return 0 < self.step < self.config.train_steps and every(self.config.training.evaluation_interval, self.step)

    def _something_is_due(self) -> bool:
        """Whether anything else is due before the next step."""
        config = self.config
        evaluations = config.training.evaluation_interval, config.downstream.interval
        intervals = config.logging.interval, *evaluations, config.checkpoint.interval
        return self.is_stopping or self.save_is_due or any(map(self._due, intervals))

    def _train_step(self) -> None:
        """Launch a step, then read the results of the one before; of this one too if something is due after it."""
        rate = learning_rate(self.config.optimizer, self.step, self.config.train_steps)
        bounds = self.health.limits(self.step + 1)
        first_sample, waited_s = self.stream.samples_consumed, self.stream.wait_s
        self.engine.stop_requested = self.stop.received is not None
        with self.clock.section("first_step" if self.is_first_step else "step"):
            report, statistics = self._launch(rate, bounds)
            self.step += 1
            self.clock.steps.mark(ends_step=True)
            samples, waited_s = (first_sample, self.stream.samples_consumed), self.stream.wait_s - waited_s
            self.clock.waited_for_data(waited_s)
            self.in_flight.append(StepInFlight(self.step, samples, rate, bounds, report, statistics, waited_s))
            if self.first_step.is_due:
                self._check_first_step(statistics, report)
            self._settle(all_but=1)
            if self._something_is_due():
                self._settle()
        self.rank_times.step(waited_s)
        self.is_first_step = False

    def _launch(self, rate: float, bounds: StepLimits) -> tuple[PendingReport, StageStatistics]:
        """Launch a step; wait for the process's first one, which ends the start."""
        strength, gate = penalty_strength(self.config, rate), norm_gate(self.config, self.step + 1)
        if not self.is_first_step:
            return self.engine.train_step(self.batches, rate, bounds, strength, gate)
        with phase("first_step"), timeline.compiling() if self.first_step.compiles else contextlib.nullcontext():
            launched = self.engine.train_step(self.batches, rate, bounds, strength, gate)
            launched[0].wait()
        if (seconds := timeline.finish()) and self.log is not None:
            self.log.event("first step done", timeline.words(seconds), seconds=seconds)
        return launched

    def _check_first_step(self, statistics: StageStatistics, report: PendingReport) -> None:
        """Stop the run if the step did not give every parameter its gradient."""
        entropy_LN = statistics.entropy_LN / statistics.sequences
        worst = self.first_step.finish(report.wait(), entropy_LN)
        if self.log is not None and worst is not None:
            self.log.verified(worst, compiled_blocks(self.engine.stage.transformer))

    def _settle(self, all_but: int = 0) -> None:
        """Read what the steps in flight measured, except the last `all_but`, and journal refused ones."""
        while len(self.in_flight) > all_but:
            done = self.in_flight.popleft()
            report = done.report.wait()
            self.health.remember(done.step, report, done.limits)
            reason = self.health.reason
            self.is_stopping |= report.stop_requested
            self.metrics.record(done.step, done.samples[0], done.learning_rate, report, reason, done.data_wait_s)
            self.trouble.remember(done.step, done.samples, done.statistics)
            if reason is not None:
                trouble = self.trouble.report()
                self.last_refusal = f"step {done.step}: {reason}; {trouble.words}"
                if self.log is not None:
                    self.log.refused(done.step, reason, trouble, self.metrics.last_row)

    def _log(self) -> None:
        with self.clock.section("log"):
            rows = self.metrics.flush()
            heads = head_snapshot(self.engine.stage, self.trouble.last_statistics, self.engine.groups)
            ranks = self.rank_times.gather()
            self.places.check()
            if self.log is not None:
                self.log.steps(rows, heads, ranks, self.clock.goodput)

    def _warn_of_places(self, in_the_way: list[str]) -> None:
        if self.log is None:
            return
        for words in self.places.owned.words if self.places.owned is not None else []:
            self.log.warn("run identified", words, run_id=self.places.run_id)
        if in_the_way:
            self._tell_save("left alone", names=in_the_way)

    def _tell_save(self, event: str, **fields: Any) -> None:
        """Record what the saver reports; called on the thread that saves."""
        if self.log is not None and event == "left alone":
            names = [name for name in fields["names"] if name not in self.left_alone]
            self.left_alone.update(names)
            if names:
                shown = ", ".join(map(printable, names[:3])) + (", ..." if len(names) > 3 else "")
                words = f"{len(names)} things are named like a checkpoint or lie in one, and are not this run's"
                self.log.warn(event, f"{self.root.address}: {words}; they are left alone ({shown})", names=names)
        elif self.log is not None:
            self.log.saving(event, **fields)

    def _write_rows(self) -> None:
        rows = self.metrics.flush()
        if self.log is not None:
            self.log.rows(rows)

    def _evaluate(self, limit_samples: int | None) -> Validation:
        with self.clock.section("evaluation"):
            self._write_rows()  # of the steps before it
            stage, groups = self.engine.stage, self.engine.groups
            validation = validate(stage, groups, self.config, self.step, limit_samples, self.engine.evaluate)
            self.validated = (self.step, validation.loss)
            if self.log is not None:
                self.log.evaluation(self.step, self.step * self.config.tokens_per_step, validation)
        return validation

    def _measure_tasks(self) -> None:
        with self.clock.section("evaluation"):
            self._write_rows()  # of the steps before it
            groups, evaluate = self.engine.groups, self.engine.evaluate
            found = {
                f"downstream_{name}": accuracy(documents, groups, self.config, evaluate)
                for name, documents in self.tasks.items()
            }
            if self.log is not None:
                self.log.tasks(self.step, self.step * self.config.tokens_per_step, found)

    def _evaluate_end(self) -> Validation:
        """Evaluate over the whole split; raise TrainingError if the loss is not finite."""
        validation = self._evaluate(None)
        if not math.isfinite(validation.loss):
            raise TrainingError(
                f"step {self.step}: the validation loss after the last step is {validation.loss}; {CURE}"
            )
        return validation

    def _save_if_due(self) -> None:
        """Save at intervals, at the end and when asked to stop. After a refused step, wait for an accepted one.

        Raises:
            TrainingError: the last step has made weights that are not finite. Such weights of another step are not
                saved either: the next step is refused, and the run goes back.
        """
        is_last = self.is_stopping or self.step == self.config.train_steps
        self.save_is_due |= is_last or self._due(self.config.checkpoint.interval)
        if not self.save_is_due or (self.health.in_trouble and not is_last):
            return
        if not self.engine.weights_are_finite(self.manifest.vocab_size):
            if is_last:
                raise TrainingError(f"step {self.step}: its update has made weights that are not finite; {CURE}")
            return
        loss = self.validated[1] if self.validated is not None and self.validated[0] == self.step else None
        with self.clock.section("save"):
            self._write_rows()  # before the checkpoint, since a resumed run goes on after them
            logs = {} if self.log is None else self.log.prefixes()
            self.saver.save(Progress(self.step, self.stream.state_dict(), self.health.state_dict(), loss, logs))
        self.save_is_due = False

    def _finish_save(self) -> None:
        with self.clock.section("save"):
            self.saver.finish()

    def _go_back(self) -> None:
        """Restore a checkpoint from before the recent refused steps, and go on with samples not read yet.

        Raises:
            TrainingError: going back has not helped, or there is nothing to go back to.
        """
        self._settle()
        self._finish_save()
        first_refused, from_step = self.health.first_refused(self.step), self.step
        with self.clock.section("go_back"):
            saved, _ = checkpoint.newest_sound(self.root, self.group, self.places.run_id, first_refused)
            if not self.health.may_go_back(self.step) or saved is None:
                self._give_up(
                    "no checkpoint is older" if saved is None else "going back to a checkpoint has not helped"
                )
            lost_s = sum(row["step_time_s"] for row in self.metrics.flush() if row["step"] > saved.step)
            self._restore(saved)
            self.save_is_due = True  # soon, so that a crash does not lead to the refused samples again
            self.saver.forget_after(self.step)
            self.health.forget()
            if self.log is not None:
                self.clock.goodput.lose(lost_s + seconds_after(self.folder, self.step))
                next_sample = self.stream.samples_consumed
                self.log.went_back(from_step, self.step, first_refused, next_sample, recorded_logs(saved))

    def _give_up(self, why: str) -> NoReturn:
        self._log()
        raise TrainingError(f"{self.last_refusal}; {why}; see {self.folder}/journal.jsonl; {CURE}")

    def _restore(self, saved: SavedCheckpoint) -> None:
        self.engine.load_state(saved, self.manifest.vocab_size)
        self.step = saved.step


def recorded_logs(saved: SavedCheckpoint | None) -> dict[str, Any]:
    """Return what a checkpoint has recorded of the run's files; empty for one of an earlier version."""
    logs = {} if saved is None else saved.marker.get("logs")
    return logs if isinstance(logs, dict) else {}


def every(interval: int, step: int) -> bool:
    """Whether a thing done every `interval` steps (0: never) is due after `step`."""
    return interval > 0 and step % interval == 0


def run(config: Config, manifest: Manifest, stop: StopRequest) -> RunResult:
    """Run this process's rank from start to end, and release its resources in any case.

    Raises:
        TrainingError: the numbers went wrong, and going back did not help.
        DeviceMemoryError: the device's memory is too small.
        Exception: what else `train.faults.FAULTS` lists.
    """
    clock = Clock(config, rank())
    places = Places(config)
    trainer: Trainer | None = None
    error: BaseException | None = None
    try:
        with clock.section("start_up"):
            with phase("join"):
                initialize_distributed(clock.limits.longest_s + 2 * GRACE_S)
            places.open()
            trainer = Trainer(config, manifest, clock, stop, places)
            places.describe(checkpoint.dataset_identity(manifest), trainer.origin)
        return RunResult(validation=trainer.train(), step=trainer.step)
    except torch.OutOfMemoryError as raised:
        error = raised
        at_start = trainer is None or trainer.is_first_step
        raise (StartMemoryError if at_start else DeviceMemoryError)(config, raised) from None
    except BaseException as raised:
        error = raised
        raise
    finally:
        if trainer is not None:
            trainer.close(error)
        clock.close()
        places.close()
