"""Test that ZeRO-3 gathers weights once around each block, and that nothing keeps them until the backward pass."""

import dataclasses
import functools
from typing import Any
from unittest import mock

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from parallel.local_ranks import run_ranks
from tests.parallel.tiny import EREG, VOCAB_SIZE, tiny_config, training_with


def kept_on_rank(compile_blocks: str) -> tuple[list[str], int, bool]:
    """Return the weights of which autograd keeps views, how many were gathered, and whether F.linear is torch's own."""
    from train.parts import add_optimizer, build_stage

    config = training_with(tiny_config(architecture=EREG, num_layers=2), compile=compile_blocks)
    config = dataclasses.replace(
        config,
        parallel=dataclasses.replace(config.parallel, zero_stage=3),
        health=dataclasses.replace(config.health, verify_first_step=False),
        deepspeed={"zero_optimization": {"stage3_param_persistence_threshold": 0}},  # else small ones stay gathered
    )
    with_partitioner = functools.partial(torch.compile, backend="aot_eager_decomp_partition")
    linear = F.linear
    with mock.patch("torch.compile", with_partitioner):
        stage, groups = build_stage(config, VOCAB_SIZE)
    engine = add_optimizer(stage, groups, config).engine
    gathered: dict[int, str] = {}
    parameters = {id(parameter) for parameter in stage.parameters()}
    for layer, block in stage.transformer.layers.items():

        def watched(*inputs: Any, run: Any = block.forward, block: Any = block, layer: str = layer) -> Any:
            weights = {f"{layer}.{name}": p for name, p in block.named_parameters() if name.endswith("weight")}
            gathered.update({p.untyped_storage().data_ptr(): name for name, p in weights.items()})
            return run(*inputs)

        block.forward = watched
    views: list[str] = []

    def pack(saved: Tensor) -> Tensor:
        name = gathered.get(saved.untyped_storage().data_ptr())
        if name is not None and id(saved) not in parameters and type(saved) is Tensor:
            views.append(name)
        return saved

    tokens = torch.randint(VOCAB_SIZE, (config.model.seq_length + 1, 4))
    engine.train()
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda saved: saved):
        engine(tokens[:-1], tokens[1:])
    return sorted(set(views)), len(gathered), F.linear is linear


@pytest.mark.parametrize("compile_blocks", ["on", "off"])
def test_no_view_keeps_a_gathered_weight(compile_blocks: str) -> None:
    ((views, gathered, is_torch_s_own),) = run_ranks(kept_on_rank, 1, compile_blocks)
    assert views == [] and gathered > 0
    assert is_torch_s_own == (compile_blocks == "on"), "compiled, its replacement loses gradients under torch 2.11"
