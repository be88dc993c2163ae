"""Test evaluation under every layout: sequences count once, padding rows never, and each head is reported as it is."""

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from model.transformer import Transformer
from parallel.layout import parse_layout
from parallel.local_ranks import run_ranks
from tests.parallel.tiny import plain_model, tiny_config
from train.compare.layouts import apply_layout, global_batches, reference_layout
from train.config import Config

SEQUENCES = 5  # of micro-batches of four sequences in all


@pytest.mark.parametrize("layout", ["acc=2", "tp=2:sp=1:acc=2", "pp=2:acc=2", "dp=2:acc=2", "cp=2:dp=2:acc=2"])
def test_the_last_batch_is_not_full(layout: str) -> None:
    config, parsed = tiny_config(), parse_layout(layout)
    vocab_size, (batch_BT,) = global_batches(config, 1)
    applied = apply_layout(config, parsed, reference_layout(config, [parsed]))
    found = run_ranks(_evaluate, parsed.world_size, applied, vocab_size, batch_BT)

    model, rows_TB = plain_model(config, vocab_size), batch_BT[:SEQUENCES].t()
    with torch.no_grad():
        cross_entropy, entropies_BNT = model(rows_TB[:-1], rows_TB[1:])
    expected = {"entropy_nats": [entropy.mean(dim=(0, 2)) for entropy in entropies_BNT], **_parameters(model)}
    for loss, heads in found:
        assert loss == pytest.approx(float(cross_entropy), rel=1e-6)
        assert heads.keys() == expected.keys()
        for name, values in expected.items():
            here = torch.tensor(heads[name], dtype=torch.float64)
            torch.testing.assert_close(
                here, torch.stack(values), rtol=1e-5, atol=1e-6, msg=lambda m, n=name: f"{n}: {m}"
            )


def _parameters(model: Transformer) -> dict[str, list[Tensor]]:
    """Read each layer's thresholds, temperatures, alpha and beta from the model."""
    attention, ffn = ([getattr(block, name) for block in model.layers.values()] for name in ("attention", "ffn"))
    temperature_NT = [each.temperature().detach() for each in attention]
    return {
        "threshold": [each.threshold.detach() for each in attention],
        "temperature": [each.mean(dim=1) for each in temperature_NT],
        "temperature_min": [each.min() for each in temperature_NT],
        "temperature_max": [each.max() for each in temperature_NT],
        "alpha": [each.alpha.detach()[0] for each in ffn],
        "beta": [each.beta.detach()[0] for each in ffn],
    }


def _evaluate(config: Config, vocab_size: int, batch_BT: Tensor) -> tuple[float, dict[str, Any]]:
    """Return the cross-entropy summed over all tokens that count, and the report of every head and layer."""
    from parallel.engine.telemetry import head_snapshot, metric_means
    from parallel.micro_batch import IGNORED_LABEL
    from train.compare.measurement import EngineStep, _micro_batches

    step = EngineStep(config, vocab_size)
    grid, size = step.groups.grid, config.training.micro_batch_size
    starts = range(grid.dp_rank * size, len(batch_BT), grid.dp * size)
    valid_rows = [min(max(SEQUENCES - start, 0), size) for start in starts]

    def micro_batches() -> Iterator[Any]:
        for batch, valid in zip(_micro_batches(config, grid, batch_BT), valid_rows, strict=True):
            batch.labels_TB[:, valid:] = IGNORED_LABEL
            yield batch

    statistics = step.engine.evaluate(micro_batches(), valid_rows)
    loss = metric_means(statistics, step.groups)["ce_loss"] * statistics.micro_batches * grid.replicas
    return loss, head_snapshot(step.stage, statistics, step.groups).as_row()
