"""Writes what rank 0 records while training: JSON lines, the journal, TensorBoard, the terminal."""

import itertools
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from data.command_line import print_warning
from parallel.engine.compiled import BlockError, CompiledBlock
from parallel.engine.telemetry import HeadSnapshot
from parallel.launch import world_size
from train.config import Config
from train.config.schedule import start_warnings
from train.loop.goodput import Goodput
from train.loop.progress import ProgressDisplay
from train.loop.rank_times import slow_words
from train.loop.side_logs import SideLogs
from train.loop.tensorboard import TensorBoardLog
from train.loop.trouble import TroubleReport
from train.loop.validation import Validation
from train.run import names
from train.run.entropy_words import describe, fallen_layers
from train.run.journal import Journal, is_prefix
from train.run.reader import read_rows_from_the_end
from train.run.rows import Damage, JsonLines, Prefix

SLOW_IN_A_ROW = 3


class RunLog:
    """The logs of a run that starts, or resumes after `first_step`; rows of later steps are cut off.

    Args:
        faults: what is wrong with checkpoints newer than the one resumed from.
        changed: [old, new] of each setting that differs from those the checkpoint was trained with.
        recorded: what the checkpoint has recorded of each file (`prefixes`); empty if it has recorded nothing.
    """

    def __init__(
        self,
        folder: Path,
        config: Config,
        first_step: int,
        faults: list[str],
        changed: dict[str, list[Any]],
        recorded: dict[str, Any],
    ) -> None:
        self.folder, self.config = folder, config
        known = recorded.get(names.JOURNAL)
        self.journal = Journal(self.folder, known if is_prefix(known) else None)
        self.side, self._step = SideLogs(self._side_log_failed), first_step
        self.display = ProgressDisplay(config.train_steps, first_step)
        self._collapsed: list[int] = []
        self._slow: list[int] = []
        for fault in faults:
            self.warn("damaged checkpoint", f"{fault}; the one before is used", fault=fault)
        if first_step:
            words = "".join(f", {key} = {new!r} (was {old!r})" for key, (old, new) in changed.items())
            said = f"resumed {self.folder} at step {first_step}{words}"
            self.event("resumed", said, step=first_step, world_size=world_size(), changed=changed)
        else:
            self.event("started", step=first_step, world_size=world_size())
            for event, text in start_warnings(config):
                self.warn(event, text)
        self.damaged(self.journal.damage, first_step)
        self._open(first_step, recorded)

    def steps(
        self, rows: list[dict[str, Any]], heads: HeadSnapshot, rank_times: dict[str, Any], goodput: Goodput
    ) -> None:
        """Write the rows since the last logging step, and the heads and ranks as of the last of them."""
        rows[-1].update(
            goodput=goodput.share,
            slowest_rank=rank_times["slowest_rank"],
            slowest_over_median=rank_times["slowest_over_median"],
        )
        with self.side.writing(names.GOODPUT):
            goodput.write()
        self.rows(rows)
        place = {"step": rows[-1]["step"], "tokens": rows[-1]["tokens"]}
        head_row = {**place, **heads.as_row()}
        self.heads.write(head_row)
        self.ranks.write({**place, **rank_times})
        self._tell_collapse(head_row)
        self._tell_slow(rank_times)
        self.display.show_step(rows[-1])
        if self.board is not None:
            with self.side.writing(names.TENSORBOARD):
                self.board.heads(head_row)
                interval = self.config.logging.image_interval
                if interval and (head_row["step"] % interval == 0 or head_row["step"] == self.config.train_steps):
                    self.board.images(head_row, self.config.model.seq_length)

    def rows(self, rows: list[dict[str, Any]]) -> None:
        """Write rows of steps; they are in their files when this returns."""
        self._step = rows[-1]["step"] if rows else self._step
        self._restore_files()
        for row in rows:
            self.metrics.write(row)
        if self.board is not None:
            with self.side.writing(names.TENSORBOARD):
                self.board.reopen_if_removed()
            with self.side.writing(names.TENSORBOARD):
                for row in rows:
                    self.board.step(row)
                self.board.flush()

    def prefixes(self) -> dict[str, Prefix]:
        """Return size and sha256 of what the run's files hold, for a checkpoint; it is on the disk then."""
        return {
            names.METRICS: self.metrics.prefix(),
            names.ENTROPY: self.heads.prefix(),
            names.RANKS: self.ranks.prefix(),
            names.JOURNAL: self.journal.prefix(),
        }

    def evaluation(self, step: int, tokens: int, validation: Validation) -> None:
        row = {
            "step": step,
            "tokens": tokens,
            "validation_loss": validation.loss,
            "validation_loss_halves": validation.halves,
            "validation_perplexity": validation.perplexity,
            "validation_tokens": validation.tokens,
        }
        self.metrics.write(row)
        self.display.say(f"step {step}  validation loss {validation.loss:.4f}  perplexity {validation.perplexity:.2f}")
        if self.board is not None:
            with self.side.writing(names.TENSORBOARD):
                self.board.evaluation(row)

    def tasks(self, step: int, tokens: int, accuracies: dict[str, float]) -> None:
        """Write a row of accuracies by 'downstream_NAME'."""
        self.metrics.write({"step": step, "tokens": tokens, **accuracies})
        self.display.say(f"step {step}  " + "  ".join(f"{name} {value:.3f}" for name, value in accuracies.items()))
        if self.board is not None:
            with self.side.writing(names.TENSORBOARD):
                self.board.tasks(step, accuracies)

    def verified(self, worst: BlockError, blocks: list[CompiledBlock]) -> None:
        """Record how close compiled blocks are to themselves uncompiled, and how long the latter took."""
        seconds = sum(block.uncompiled_s for block in blocks)
        self.event(
            "compiled blocks verified",
            blocks=len(blocks),
            largest_error=worst.relative,
            of=worst.name,
            allowed=worst.allowed,
            uncompiled_s=round(seconds, 3),
        )

    def refused(self, step: int, reason: str, report: TroubleReport, row: dict[str, Any]) -> None:
        """Warn of a step that did not change the weights."""
        self.warn(
            "skipped step", f"step {step} skipped: {reason}; {report.words}", reason=reason, **row, **report.fields
        )

    def went_back(
        self, from_step: int, to_step: int, first_refused: int, next_sample: int, recorded: dict[str, Any]
    ) -> None:
        """Cut off rows and curves after the step that the run went back to; the journal keeps everything."""
        text = (
            f"went back from step {from_step} to the checkpoint of step {to_step}, going on with sample {next_sample}"
        )
        fields = {"from_step": from_step, "first_refused": first_refused, "next_sample": next_sample}
        self.warn("rolled back", text, step=to_step, **fields)
        self._close_curves()
        self._open(to_step, recorded)

    def end(self, step: int, signal: str | None, error: BaseException | None, goodput: Goodput, mfu_words: str) -> None:
        """Record how the run ended and where its time went."""
        self._restore_files()
        with self.side.writing(names.GOODPUT):
            goodput.write()
        fields: dict[str, Any] = {"step": step, "goodput": goodput.share, "seconds": goodput.seconds}
        if self.side.failures:
            fields["side_log_failures"] = self.side.failures
        if error is not None:
            self.event("stopped", reason=str(error) or type(error).__name__, **fields)
        elif step < self.config.train_steps:
            self.event(
                "asked to stop", f"saved at step {step}; the same command goes on there", signal=signal, **fields
            )
        else:
            self.event("finished", "\n".join(filter(None, [mfu_words, str(goodput)])), **fields)

    def event(self, event: str, say: str | None = None, **fields: Any) -> None:
        """Write a line to the journal and, if `say` is given, to the terminal."""
        self.journal.write(event, **fields)
        if say is not None:
            self.display.say(say)

    def warn(self, event: str, text: str, **fields: Any) -> None:
        """Write an event that a person should look at to the journal and to standard error."""
        self.journal.write(event, **fields)
        print_warning(text)

    def damaged(self, damage: Damage | None, step: int) -> None:
        """Warn of a file that was damaged or cut, removed or replaced; of none if `damage` is None."""
        if damage is not None:
            self.journal.tell(damage, step)
            print_warning(str(damage))

    def saving(self, event: str, **fields: Any) -> None:
        """Record how a save ended; called on the thread that wrote it."""
        if event == "save failed":
            self.warn(event, f"{fields['reason']}; trying again at the next save", **fields)
        else:
            self.journal.write(event, **fields)

    def close(self) -> None:
        self._close_curves()
        self.journal.close()
        self.display.close()

    def _tell_collapse(self, heads: dict[str, Any]) -> None:
        """Warn of newly collapsed layers, once for each."""
        entropies, seq_length = heads["entropy_nats"], self.config.model.seq_length
        fallen = fallen_layers(entropies, seq_length)
        if set(fallen) - set(self._collapsed):
            words = describe(entropies, seq_length)
            self.warn("collapse", f"step {heads['step']}: {words}", step=heads["step"], layers=fallen, words=words)
        self._collapsed = fallen

    def _tell_slow(self, times: dict[str, Any]) -> None:
        """Name a rank once it has been slow at three logging steps in a row."""
        words = slow_words(times)
        if words is None or self._slow[-1:] != [times["slowest_rank"]]:
            self._slow = []
        if words is not None:
            self._slow.append(times["slowest_rank"])
            if len(self._slow) == SLOW_IN_A_ROW:
                self.display.say(words)

    def _restore_files(self) -> None:
        """Put back what somebody removed or replaced while the run wrote to it."""
        for file in (self.journal, self.metrics, self.heads, self.ranks):
            self.damaged(file.restore(), self._step)

    def _side_log_failed(self, name: str, fault: str) -> None:
        text = f"{self.folder / name}: cannot be written ({fault}); the run goes on without it"
        self.warn("side log failed", text, file=name, fault=fault, step=self._step)

    def _open(self, step: int, recorded: dict[str, Any]) -> None:
        self._step = step
        self.metrics = self._rows_of(names.METRICS, step, recorded)
        self.heads = self._rows_of(names.ENTROPY, step, recorded)
        self.ranks = self._rows_of(names.RANKS, step, recorded)
        self.board = None
        if self.config.logging.tensorboard:
            with self.side.writing(names.TENSORBOARD):
                self.board = TensorBoardLog(self.folder / names.TENSORBOARD, self.config, step)

    def _rows_of(self, name: str, step: int, recorded: dict[str, Any]) -> JsonLines:
        """Open a file of rows and cut it back to a step; warn of what is wrong with it."""
        file = JsonLines(self.folder / name, step, self._prefixes_at(name, step, recorded))
        self.damaged(file.damage, step)
        return file

    def _prefixes_at(self, name: str, step: int, recorded: dict[str, Any]) -> Iterator[Prefix]:
        """Yield what a file may begin with at a step: what its checkpoint recorded, or what was left since."""
        if is_prefix(recorded.get(name)):
            yield recorded[name]
            yield from self.journal.mended(name, step)

    def _close_curves(self) -> None:
        for file in (self.metrics, self.heads, self.ranks):
            file.close()
        if self.board is not None:
            with self.side.writing(names.TENSORBOARD):
                self.board.close()


def seconds_after(folder: Path, step: int) -> float:
    """Add up the seconds of logged steps after `step`, which have to be done again."""
    later = itertools.takewhile(lambda row: row["step"] > step, read_rows_from_the_end(folder / names.METRICS))
    return sum(_number(row.get("step_time_s")) or 0.0 for row in later)


def is_validated(folder: Path, step: int, tokens: int) -> bool:
    """Whether a validation over at least `tokens` tokens was logged at `step`, and its loss is finite."""
    rows = itertools.takewhile(lambda row: row["step"] >= step, read_rows_from_the_end(folder / names.METRICS))
    return any(
        row["step"] == step
        and (_number(row.get("validation_tokens")) or 0) >= tokens
        and _number(row.get("validation_loss")) is not None
        for row in rows
    )


def _number(value: Any) -> float | None:
    """Return a finite number that is not below 0, or None: a damaged row may hold anything."""
    return value if type(value) in (int, float) and 0 <= value < math.inf else None
