"""Measure the first losses of each shipped configuration and compare them with those kept in the repository.

`<configuration>.json` beside this file has a section for each tested version of torch. A section holds cross-entropy
and entropy loss in nats per token, and the gradient norm before clipping, for each of the first `STEPS` steps. One CPU
process trains through the engine in float32, uncompiled.

TOLERANCE is eight times the effect of rounding. `python -m tests.golden.spread` measures that effect: the largest
relative difference from the golden numbers over one and two threads. On an Intel Xeon with AVX-512 it printed, under
each version:

    instructions    baseline    ereg       ereg_1b    quickstart
    portable        1.8e-07     2.3e-07    1.7e-07    1.5e-07
    AVX2            1.8e-07     1.8e-07    1.3e-07    1.2e-07
    all             9.2e-08     9.1e-08    1.7e-07    9.3e-08

On one thread with all instructions the versions agree in every digit. Compiled blocks differ by 9.3e-08 (quickstart).
The penalty jumps at the edge of its margin, where rounding could be amplified. No entropy comes within 0.001 nats of an
edge in these steps.

Each mistake in `test_golden_losses.py` moves the numbers by 1.5e-05 or more. The tanh approximation of GELU goes
unnoticed: it moves them by 2.0e-06, since the activations of a new network are small.
"""

import json
import math
from collections.abc import Iterator
from pathlib import Path

import torch

from parallel.micro_batch import MicroBatch, micro_batch
from tests.golden.small import VOCAB_SIZE, learnable_tokens, small_config
from train.config import Config

FOLDER = Path(__file__).parent
TOLERANCE = 2e-6
DIGITS = 9  # enough to distinguish any two float32 numbers

Losses = dict[str, list[float]]
"""'cross_entropy', 'entropy_loss' and 'gradient_norm', each with one number per step."""


def first_losses(name: str, *overrides: str, threads: int = 1) -> Losses:
    """Train the small version of a configuration for `STEPS` steps; call it in its own process (`run_ranks`)."""
    from train.config.schedule import learning_rate
    from train.parts import build_engine

    torch.set_num_threads(threads)
    config = small_config(name, *overrides)
    engine = build_engine(config, VOCAB_SIZE)
    losses: Losses = {"cross_entropy": [], "entropy_loss": [], "gradient_norm": []}
    for step, batch_BT in enumerate(learnable_tokens(config)):
        rate = learning_rate(config.optimizer, step, config.train_steps)
        report, _ = engine.train_step(micro_batches(batch_BT, config), rate)
        for quantity, numbers in losses.items():
            numbers.append(float(f"{getattr(report.wait(), quantity):.{DIGITS}g}"))
    return losses


def micro_batches(batch_BT: torch.Tensor, config: Config) -> Iterator[MicroBatch]:
    """Cut a global batch [B, T + 1] into micro-batches of tokens and next tokens, each [T, B]."""
    for rows_BT in batch_BT.split(config.training.micro_batch_size):
        yield micro_batch(rows_BT, range(config.model.seq_length))


def distance(found: Losses, golden: Losses) -> float:
    """Return the largest relative difference of a number from its golden one; infinite if only the golden one is 0."""
    differences = [
        abs(a - b) / abs(b) if b else math.inf
        for quantity in golden
        for a, b in zip(found[quantity], golden[quantity], strict=True)
        if a != b
    ]
    return max(differences, default=0.0)


def torch_release() -> str:
    """Return the installed version of torch without its build: '2.11.0' for 2.11.0+cu130."""
    return torch.__version__.partition("+")[0]


def read_sections(name: str) -> dict[str, Losses]:
    """Read the golden losses of a configuration by version of torch; empty if there are none."""
    file = FOLDER / f"{name}.json"
    return json.loads(file.read_text()) if file.exists() else {}


def write_section(name: str, version: str, losses: Losses) -> None:
    """Replace the section of one version, with one line per quantity, so that a diff shows which of them moved."""
    sections = {**read_sections(name), version: losses}
    parts = []
    for release in sorted(sections, key=lambda text: [int(number) for number in text.split(".")]):
        lines = [f'    "{quantity}": {json.dumps(numbers)}' for quantity, numbers in sections[release].items()]
        parts.append(f'  "{release}": {{\n' + ",\n".join(lines) + "\n  }")
    (FOLDER / f"{name}.json").write_text("{\n" + ",\n".join(parts) + "\n}\n")
