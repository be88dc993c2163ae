"""An evaluation under any layout counts each sequence once, and never the rows that fill up the last micro-batch."""

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from parallel.compare import apply_layout, global_batches, reference_layout
from parallel.layout import parse_layout
from parallel.local_ranks import run_ranks
from tests.parallel.tiny import plain_model, tiny_config
from train.config import Config

SEQUENCES = 5  # of micro-batches of four sequences in all


@pytest.mark.parametrize("layout", ["acc=2", "tp=2:sp=1:acc=2", "pp=2:acc=2", "dp=2:acc=2", "cp=2:dp=2:acc=2"])
def test_the_last_batch_is_not_full(layout: str) -> None:
    config, parsed = tiny_config(), parse_layout(layout)
    vocab_size, (batch_BT,) = global_batches(config, 1)
    applied = apply_layout(config, parsed, reference_layout(config, [parsed]))
    found = run_ranks(_evaluate, parsed.world_size, applied, vocab_size, batch_BT)

    rows_TB = batch_BT[:SEQUENCES].t()
    with torch.no_grad():
        cross_entropy, entropies_BNT = plain_model(config, vocab_size)(rows_TB[:-1], rows_TB[1:])
    entropy_LN = torch.stack([entropy.mean(dim=(0, 2)) for entropy in entropies_BNT])
    for loss, heads in found:
        assert loss == pytest.approx(float(cross_entropy), rel=1e-6)
        torch.testing.assert_close(torch.tensor(heads, dtype=torch.float64), entropy_LN, rtol=1e-5, atol=1e-6)


def _evaluate(config: Config, vocab_size: int, batch_BT: Tensor) -> tuple[float, list[list[float]]]:
    """The cross-entropy summed over all tokens that count, and the mean entropy of every head."""
    from parallel.measurement import EngineStep, _micro_batches
    from parallel.telemetry import head_snapshot, loss_parts, sum_over_ranks
    from train.setup import IGNORED_LABEL

    step = EngineStep(config, vocab_size)
    grid, size = step.groups.grid, config.training.micro_batch_size
    starts = range(grid.dp_rank * size, len(batch_BT), grid.dp * size)
    valid_rows = [min(max(SEQUENCES - start, 0), size) for start in starts]

    def micro_batches() -> Iterator[tuple[Tensor, Tensor]]:
        for (tokens_TB, labels_TB), valid in zip(_micro_batches(config, grid, batch_BT), valid_rows, strict=True):
            labels_TB[:, valid:] = IGNORED_LABEL
            yield tokens_TB, labels_TB

    statistics = step.engine.evaluate(micro_batches(), valid_rows)
    mean = sum_over_ranks(loss_parts(statistics, step.groups))[0]
    loss = float(mean) * statistics.micro_batches * grid.replicas
    return loss, head_snapshot(step.stage, statistics, step.groups).entropy_nats
