"""Predict the communication (GB) and latency (minutes) of private inference, for any architecture and size.

    python -m train.private_inference                              the calibrated costs and their error
    python -m train.private_inference --config configs/ereg.json   the cost of that model

The prediction is a sum over operations, each with its own cost. The costs are fitted to the 16 inferences that
arXiv 2501.03489 and 2410.13060 measured (two parties, 32 cores each, SecretFlow), by least squares of relative errors
without negative costs. The measured latencies include the network of those measurements. The papers state 100 Mbps, but
145 GB in 30.7 minutes are 630 Mbps, so latencies on other networks cannot be extrapolated.
"""

import argparse
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache

import numpy as np
from numpy.typing import NDArray

from data.command_line import run_command, whole_number
from model.config import ModelConfig
from train.config import ConfigError, load_config
from train.cost.flops import nonlinear_operations
from train.paper import MEASUREMENTS, Measurement

Array = NDArray[np.float64]

OPERATIONS = (
    "softmax element",
    "LayerNorm or ReLU element",
    "GELU element",
    "output of a linear layer",
    "logit",
    "layer",
)
PER = (1e6, 1e6, 1e6, 1e6, 1e6, 1.0)  # costs are stated for so many


@dataclass(frozen=True)
class PrivateInferenceCost:
    """Predicted cost of one forward pass over one sequence."""

    communication_gb: float
    latency_min: float


def operation_counts(model: ModelConfig, vocab_size: int, kept_matrices: int | None = None) -> Array:
    """Count each of OPERATIONS in a forward pass over one sequence, in units of PER: [6].

    LayerNorm and ReLU are one kind. Every measured model has both or neither, in the ratio 1 to 2, so only the cost of
    their sum is known; an element of either is charged the same. An activation that was never measured is charged as
    GELU. Each layer has a cost of its own, because every step of a protocol waits for the network. The norm after the
    last block does not count, as in the paper's tables.

    Args:
        kept_matrices: D x D matrices in place of the FFNs, if those were folded (train/exchange/fold.py); None if not.
    """
    operations = nonlinear_operations(model)
    elements = {kind: operation.elements for kind, operation in operations.items()}
    width, ffn = model.hidden_size, 1 if model.fused_ffn else 1 + model.ffn_width / model.hidden_size
    matrices = model.num_layers * ffn if kept_matrices is None else kept_matrices
    counts = [
        elements["softmax"],
        elements.get("layernorm", 0) + elements.get("relu", 0),
        0 if model.activation in (None, "relu", "identity") else elements[model.activation],
        model.seq_length * width * (4 * model.num_layers + matrices),
        model.seq_length * vocab_size,
        model.num_layers,
    ]
    return np.array(counts, dtype=float) / np.array(PER)


def private_inference_cost(
    model: ModelConfig, vocab_size: int, kept_matrices: int | None = None
) -> PrivateInferenceCost:
    """Predict the cost of a resolved model; arguments as of `operation_counts`.

    `leave_one_out` measures how good such predictions are.
    """
    return _cost(operation_counts(model, vocab_size, kept_matrices), costs_per_operation())


@cache
def costs_per_operation() -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Return GB and minutes of each of OPERATIONS, per PER of them."""
    return calibrate(MEASUREMENTS)


def calibrate(measurements: Sequence[Measurement]) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Fit non-negative costs that minimize the squared relative errors over the measurements."""
    from scipy.optimize import nnls

    counts = np.array([_counts(measurement) for measurement in measurements])
    costs = []
    for measured in _measured(measurements).T:
        solution, _ = nnls(counts / measured[:, None], np.ones(len(measured)))
        costs.append(tuple(float(cost) for cost in solution))
    return costs[0], costs[1]


def leave_one_out(measurements: Sequence[Measurement] = MEASUREMENTS) -> Array:
    """Return the relative errors of predicting each measurement from all others: [measurements, 2], GB and minutes."""
    predictions = []
    for index, left_out in enumerate(measurements):
        others = [*measurements[:index], *measurements[index + 1 :]]
        cost = _cost(_counts(left_out), calibrate(others))
        predictions.append((cost.communication_gb, cost.latency_min))
    return np.array(predictions) / _measured(measurements) - 1


def _cost(counts: Array, costs: tuple[tuple[float, ...], tuple[float, ...]]) -> PrivateInferenceCost:
    gigabytes, minutes = (float(counts @ np.array(cost)) for cost in costs)
    return PrivateInferenceCost(gigabytes, minutes)


def _counts(measurement: Measurement) -> Array:
    config = measurement.config()
    assert config.data.planned_vocab_size is not None, "every setting of the paper states its vocabulary"
    return operation_counts(config.model, config.data.planned_vocab_size)


def _measured(measurements: Sequence[Measurement]) -> Array:
    return np.array([(item.communication_gb, item.latency_min) for item in measurements])


def calibration_table() -> str:
    """Format the fitted costs, and for each measurement the error of predicting it from the others."""
    lines = ["cost of                        GB         min"]
    for operation, per, gigabytes, minutes in zip(OPERATIONS, PER, *costs_per_operation(), strict=True):
        unit = f"{per:,.0f} {operation}s" if per > 1 else f"a {operation}"
        lines.append(f"{unit:36} {gigabytes:8.4f} {minutes:8.4f}")
    lines += ["", f"{'measurement':44} {'GB':>7} {'min':>6}   error if left out"]
    errors = leave_one_out()
    for item, (gigabytes, minutes) in zip(MEASUREMENTS, errors, strict=True):
        measured = f"{item.communication_gb:7.2f} {item.latency_min:6.2f}"
        lines.append(f"{item.setting + ' ' + item.architecture:44} {measured}   {gigabytes:+7.2%}  {minutes:+7.2%}")
    mean, worst = np.abs(errors).mean(axis=0), np.abs(errors).max(axis=0)
    lines.append(
        f"leave-one-out error: communication {mean[0]:.2%} on average, {worst[0]:.2%} at most; "
        f"latency {mean[1]:.2%} on average, {worst[1]:.2%} at most"
    )
    return "\n".join(lines)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m train.private_inference",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--config", metavar="FILE", help="predict the cost of this configuration's model")
    parser.add_argument(
        "--vocab-size", type=whole_number(1), metavar="N", help="vocabulary size (default: data.planned_vocab_size)"
    )
    parser.add_argument("overrides", nargs="*", metavar="section.key=value", help="override single configuration keys")
    options = parser.parse_intermixed_args(arguments)
    if options.config is None and (options.overrides or options.vocab_size is not None):
        parser.error("overrides and --vocab-size need --config")
    if options.config is None:
        print(calibration_table())
        return 0
    try:
        config = load_config(options.config, options.overrides)
    except ConfigError as error:
        for fault in error.faults:
            print(f"error: {fault}", file=sys.stderr)
        return 2
    vocab_size = options.vocab_size or config.data.planned_vocab_size
    if vocab_size is None:
        print("error: the vocabulary is unknown; give --vocab-size or data.planned_vocab_size", file=sys.stderr)
        return 2
    cost = private_inference_cost(config.model, vocab_size)
    length = config.model.seq_length
    print(f"{cost.communication_gb:.2f} GB and {cost.latency_min:.2f} min for one sequence of {length} tokens")
    return 0


if __name__ == "__main__":
    run_command(main)
