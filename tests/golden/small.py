"""Shrink the shipped configurations to train on one CPU core in seconds, and draw tokens that can be learned."""

from pathlib import Path

import torch
from torch import Tensor

from train.config import Config, load_config

CONFIGS = Path(__file__).parents[2] / "configs"
SHIPPED = sorted(path.stem for path in CONFIGS.glob("*.json"))

STEPS = 20
VOCAB_SIZE = 256

ALWAYS = [
    f"data.planned_vocab_size={VOCAB_SIZE}",
    f"training.train_steps={2 * STEPS}",  # so the first STEPS cover the warm-up, the peak and half of the decay
    "training.precision=fp32",
    "training.compile=off",
    "parallel.tensor_parallel_size=1",
]
"""Overrides of every configuration besides its sizes; everything else is as in the file."""

SIZES = {
    "baseline": {
        "model.num_layers": 3,
        "model.hidden_size": 48,
        "model.num_attention_heads": 3,
        "model.seq_length": 32,
        "training.micro_batch_size": 8,
        "training.global_batch_size": 8,
    },
    "ereg": {
        "model.num_layers": 3,
        "model.hidden_size": 64,
        "model.num_attention_heads": 4,
        "model.seq_length": 32,
        "training.micro_batch_size": 8,
        "training.global_batch_size": 8,
    },
    "ereg_1b": {
        "model.num_layers": 14,  # more than 12, so initialization depends on the depth
        "model.hidden_size": 80,
        "model.num_attention_heads": 5,
        "model.seq_length": 64,
        "training.micro_batch_size": 4,
        "training.global_batch_size": 8,
        "optimizer.warmup_steps": 4,  # a tenth of the steps, as in the file
    },
    "quickstart": {
        "model.num_layers": 4,
        "model.hidden_size": 64,
        "model.num_attention_heads": 4,
        "model.seq_length": 32,
        "training.micro_batch_size": 4,
        "training.global_batch_size": 8,
    },
}
"""Small sizes by the name of the file. Heads have width 16. A configuration that accumulates micro-batches still does.

The widths give gradient norms around 1, so clipping acts on some steps and not on others.
"""


def small_config(name: str, *overrides: str) -> Config:
    """Load a shipped configuration at its small size.

    Args:
        name: name of the file without `.json`.
        overrides: further changes, `section.key=value`.
    """
    assert name in SIZES, f"configs/{name}.json has no small sizes; add them to SIZES in tests/golden/small.py"
    sizes = [f"{key}={value}" for key, value in SIZES[name].items()]
    return load_config(CONFIGS / f"{name}.json", [*ALWAYS, *sizes, *overrides])


def learnable_tokens(config: Config) -> Tensor:
    """Draw a global batch for each step: [STEPS, global batch, T + 1].

    Three of four tokens are determined by the previous one. The others are random; small numbers are more frequent.
    """
    generator = torch.Generator().manual_seed(20)
    shape = STEPS, config.training.global_batch_size, config.model.seq_length + 1
    tokens = (VOCAB_SIZE * torch.rand(shape, generator=generator, dtype=torch.float64) ** 3).long()
    follows = torch.rand(shape, generator=generator, dtype=torch.float64) < 0.75
    for position in range(1, shape[-1]):
        successor = (5 * tokens[..., position - 1] + 17) % VOCAB_SIZE
        tokens[..., position] = torch.where(follows[..., position], successor, tokens[..., position])
    return tokens
