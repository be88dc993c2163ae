"""What only a GPU can show of the engine."""

import dataclasses

import pytest
import torch

from tests.parallel.tiny import VOCAB_SIZE, tiny_config
from train.benchmark_timing import count_device_waits
from train.setup import build_engine

pytestmark = pytest.mark.gpu


def test_a_step_never_waits_for_the_device() -> None:
    config = tiny_config(hidden_size=256, num_attention_heads=4, seq_length=128)
    training = dataclasses.replace(config.training, precision="bf16", micro_batch_size=4, global_batch_size=8)
    engine = build_engine(dataclasses.replace(config, training=training), VOCAB_SIZE)
    tokens = torch.randint(VOCAB_SIZE, (2, 129, 4), device="cuda")
    batches = [(each[:-1], each[1:]) for each in tokens]
    for _ in range(3):
        report, _ = engine.train_step(iter(batches), 1e-3)
    assert report.wait().accepted
    assert count_device_waits(lambda: engine.train_step(iter(batches), 1e-3)) == 0
