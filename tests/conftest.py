"""Fixtures that several test modules share."""

import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING
from unittest import mock

import pytest

if TYPE_CHECKING:
    from parallel.sharding.megatron import Groups

TINY = {
    "model": {"num_layers": 2, "hidden_size": 32, "num_attention_heads": 4, "seq_length": 32},
    "regularizer": {"margin": 0.05},
    "training": {
        "micro_batch_size": 4,
        "global_batch_size": 8,
        "train_steps": 12,
        "evaluation_interval": 6,
        "evaluation_samples": 8,
    },
    "checkpoint": {"interval": 6},
    "logging": {"interval": 4, "tensorboard": False},
}


@pytest.fixture(scope="session")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Prepare a dataset from this project's own sources, with a vocabulary of 400."""
    return prepare_sources(tmp_path_factory.mktemp("dataset"), 400)


def prepare_sources(folder: Path, vocab_size: int) -> Path:
    from data.prepare import main

    sources = Path(__file__).parents[1] / "model"
    main(["--input", str(sources), "--output", str(folder), "--vocab-size", str(vocab_size)])
    return folder


@pytest.fixture
def tiny_config(tmp_path: Path, dataset: Path) -> Path:
    """Write a configuration that trains in a second; its run_dir is below tmp_path."""
    file = tmp_path / "tiny.json"
    file.write_text(json.dumps({**TINY, "data": {"path": str(dataset)}, "run_dir": str(tmp_path / "run")}))
    return file


@pytest.fixture(scope="module")
def one_process() -> "Iterator[Groups]":
    """Build the groups of one rank, for stages and engines in the process of the tests."""
    import torch.distributed as dist
    from megatron.core import parallel_state

    from tests.parallel.tiny import tiny_config as config
    from train.parts import build_groups

    with mock.patch.dict(os.environ):  # processes that later tests start must not inherit RANK and the like
        yield build_groups(config())
        parallel_state.destroy_model_parallel()
        dist.destroy_process_group()
