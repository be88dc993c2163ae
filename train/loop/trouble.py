"""Reports on a step that went wrong: its samples and shards, every head, and which layer collapsed first."""

from collections import deque
from dataclasses import dataclass
from typing import Any

import numpy as np

from data.fetch.sources import ReadOptions
from data.stream.token_stream import TokenStream, open_reader
from parallel.engine.engine import Engine
from parallel.engine.telemetry import head_snapshot
from parallel.sharding.stage import StageStatistics
from train.run.entropy_words import Fall, describe, first_fall, layer_means

REMEMBERED_STEPS = 8


@dataclass(frozen=True)
class TroubleReport:
    """A report for people (`words`) and for the journal (`fields`)."""

    words: str
    fall: Fall | None
    fields: dict[str, Any]


class TroubleReporter:
    """Keeps what the last steps measured; reads and reduces nothing until a report is requested."""

    def __init__(self, engine: Engine, stream: TokenStream, seq_length: int, options: ReadOptions) -> None:
        self._engine, self._stream, self._seq_length, self._options = engine, stream, seq_length, options
        self._steps: deque[tuple[int, int, int, StageStatistics]] = deque(maxlen=REMEMBERED_STEPS)

    def remember(self, step: int, samples: tuple[int, int], statistics: StageStatistics) -> None:
        """Keep a step that read samples `samples[0]` up to but not including `samples[1]`."""
        self._steps.append((step, *samples, statistics))

    @property
    def last_statistics(self) -> StageStatistics:
        return self._steps[-1][3]

    def report(self) -> TroubleReport:
        """Report on the last step kept, with the thresholds and temperatures of now; all ranks call."""
        snapshots = [
            (step, head_snapshot(self._engine.stage, statistics, self._engine.groups))
            for step, _, _, statistics in self._steps
        ]
        history = [(step, heads.entropy_nats) for step, heads in snapshots]
        fall = first_fall(history, self._seq_length)
        words = describe(history[-1][1], self._seq_length)
        _, first_sample, end_sample, _ = self._steps[-1]
        fields = {
            "samples": [first_sample, end_sample - 1],
            "shards": self._shards(first_sample, end_sample),
            "words": words,
            "first_fall": None if fall is None else str(fall),
            "layer_entropy_nats_by_step": {str(step): layer_means(entropies) for step, entropies in history},
            **snapshots[-1][1].as_row(),
        }
        return TroubleReport(words if fall is None else f"{fall}; {words}", fall, fields)

    def _shards(self, first: int, end: int) -> list[str]:
        """Name the shards that samples come from, with a reader of its own, since the stream's has read ahead."""
        state = self._stream.state_dict()
        shape = state["seq_length"], state["seed"], state["window_shards"]
        reader = open_reader(self._stream.manifest, "train", *shape, self._options)
        names = {reader.locate(int(position))[1].name for position in np.arange(first, end)}
        reader.close()
        return sorted(names)
