"""Writes what rank 0 records while training: JSON lines, the journal, TensorBoard, the terminal."""

import sys
from pathlib import Path
from typing import Any

from parallel.engine.compiled import BlockError, CompiledBlock
from parallel.engine.telemetry import HeadSnapshot
from parallel.launch import world_size
from train.config import Config
from train.config.schedule import fast_start
from train.loop.goodput import Goodput
from train.loop.progress import ProgressDisplay
from train.loop.rank_times import slow_words
from train.loop.tensorboard import TensorBoardLog
from train.loop.trouble import TroubleReport
from train.loop.validation import Validation
from train.run import names
from train.run.entropy_words import describe, fallen_layers
from train.run.folder import JsonLines
from train.run.journal import Journal
from train.run.reader import RunReader

SLOW_IN_A_ROW = 3


class RunLog:
    """The logs of a run that starts, or resumes after `first_step`; rows of later steps are removed.

    Args:
        faults: what is wrong with checkpoints newer than the one resumed from.
        changed: [old, new] of each setting that differs from those the checkpoint was trained with.
    """

    def __init__(
        self, folder: Path, config: Config, first_step: int, faults: list[str], changed: dict[str, list[Any]]
    ) -> None:
        self.folder, self.config = folder, config
        self.journal = Journal(folder)
        self.display = ProgressDisplay(config.train_steps, first_step)
        self._collapsed: list[int] = []
        self._slow: list[int] = []
        for fault in faults:
            self.warn("damaged checkpoint", f"{fault}; the one before is used", fault=fault)
        if first_step:
            words = "".join(f", {key} = {new!r} (was {old!r})" for key, (old, new) in changed.items())
            said = f"resumed {folder} at step {first_step}{words}"
            self.event("resumed", said, step=first_step, world_size=world_size(), changed=changed)
        else:
            self.event("started", step=first_step, world_size=world_size())
            if text := fast_start(config):
                self.warn("fast start", text)
        self._open(first_step)

    def steps(
        self, rows: list[dict[str, Any]], heads: HeadSnapshot, rank_times: dict[str, Any], goodput: Goodput
    ) -> None:
        """Write the rows since the last logging step, and the heads and ranks as of the last of them."""
        rows[-1].update(
            goodput=goodput.share,
            slowest_rank=rank_times["slowest_rank"],
            slowest_over_median=rank_times["slowest_over_median"],
        )
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
            self.board.heads(head_row)
            interval = self.config.logging.image_interval
            if interval and (head_row["step"] % interval == 0 or head_row["step"] == self.config.train_steps):
                self.board.images(head_row, self.config.model.seq_length)

    def rows(self, rows: list[dict[str, Any]]) -> None:
        """Write rows of steps; they are in their files when this returns."""
        for row in rows:
            self.metrics.write(row)
            if self.board is not None:
                self.board.step(row)
        if self.board is not None:
            self.board.flush()

    def evaluation(self, step: int, tokens: int, validation: Validation) -> None:
        row = {
            "step": step,
            "tokens": tokens,
            "validation_loss": validation.loss,
            "validation_perplexity": validation.perplexity,
            "validation_tokens": validation.tokens,
        }
        self.metrics.write(row)
        self.display.say(f"step {step}  validation loss {validation.loss:.4f}  perplexity {validation.perplexity:.2f}")
        if self.board is not None:
            self.board.evaluation(row)

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

    def went_back(self, from_step: int, to_step: int, first_refused: int, next_sample: int) -> None:
        """Remove rows and curves after the step that the run went back to; the journal keeps everything."""
        text = (
            f"went back from step {from_step} to the checkpoint of step {to_step}, going on with sample {next_sample}"
        )
        fields = {"from_step": from_step, "first_refused": first_refused, "next_sample": next_sample}
        self.warn("rolled back", text, step=to_step, **fields)
        self._close_curves()
        self._open(to_step)

    def end(self, step: int, signal: str | None, error: BaseException | None, goodput: Goodput, mfu_words: str) -> None:
        """Record how the run ended and where its time went."""
        goodput.write()
        fields: dict[str, Any] = {"step": step, "goodput": goodput.share, "seconds": goodput.seconds}
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
        print(f"warning: {text}", file=sys.stderr, flush=True)

    def saving(self, event: str, **fields: Any) -> None:
        """Record how a save ended; called on the thread that wrote it."""
        if event == "save failed":
            self.warn(event, f"{fields['reason']}; trying again at the next save", **fields)
        else:
            self.journal.write(event, **fields)

    def close(self) -> None:
        self._close_curves()
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

    def _open(self, step: int) -> None:
        self.metrics = JsonLines(self.folder / names.METRICS, step)
        self.heads = JsonLines(self.folder / names.ENTROPY, step)
        self.ranks = JsonLines(self.folder / names.RANKS, step)
        wanted = self.config.logging.tensorboard
        self.board = TensorBoardLog(self.folder / names.TENSORBOARD, self.config, step) if wanted else None

    def _close_curves(self) -> None:
        for file in (self.metrics, self.heads, self.ranks):
            file.close()
        if self.board is not None:
            self.board.close()


def seconds_after(folder: Path, step: int) -> float:
    """Add up the seconds of logged steps after `step`, which have to be done again."""
    rows = RunReader(folder).metrics()
    return sum(row["step_time_s"] for row in rows if row["step"] > step and "step_time_s" in row)


def is_validated(folder: Path, step: int, tokens: int) -> bool:
    """Whether a validation over at least `tokens` tokens was logged at `step`."""
    rows = RunReader(folder).metrics()
    return any(row["step"] == step and row.get("validation_tokens", 0) >= tokens for row in rows)
