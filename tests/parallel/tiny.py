"""Tiny models under any layout, and their results by plain mathematics in one process."""

import dataclasses
import itertools
from types import SimpleNamespace
from typing import Any

import torch

from model.config import ModelConfig
from model.initialize import generator, named_parameters
from model.normalized_weights import update_spectral_norms
from model.regularizer import RegularizerConfig, entropy_penalty
from model.taper import set_gate, taper_norms
from model.transformer import Transformer
from parallel.config import ParallelConfig
from parallel.layout import Layout
from train.compare.comparison import TOLERANCE, compare
from train.compare.layouts import apply_layout, global_batches, reference_layout
from train.compare.measurement import END_OF_DOCUMENT, HALF_TAPERED, Measured, measure
from train.config import Config
from train.config.sections import DataConfig, TrainingConfig

EREG = "EReg(SM(t)+ScFuFFN)"
VOCAB_SIZE = 301
"""A size that exercises vocabulary padding: shards are multiples of 128 rows, so of four ranks two are full, one holds
45 tokens and padding, and one holds padding alone.
"""
BATCHES = 2
SIZES: dict[str, Any] = {"num_layers": 4, "hidden_size": 32, "num_attention_heads": 8, "seq_length": 16}
LIVELY: dict[str, Any] = {"init_std": 0.1, "temperature_init": 0.02}
"""Makes logits of order one. With the usual initial values all attention rows are uniform and all entropies equal."""


def tiny_config(
    *,
    granularity: str = "per_query",
    shape: str = "square",
    target: str = "constant",
    margin: float | list[float] = 0.05,
    global_batch_size: int = 8,
    vocab_size: int = VOCAB_SIZE,
    within_documents: bool = False,
    fused_ffn: str = "auto",
    **model: Any,
) -> Config:
    """Return a configuration whose regularizer acts strongly; `model` changes sizes and ingredients."""
    return Config(
        model=ModelConfig(**{**SIZES, **LIVELY, **model}).resolved(),
        regularizer=RegularizerConfig(1.0, margin, granularity, shape, target),  # type: ignore[arg-type]
        data=DataConfig(path="no/dataset", planned_vocab_size=vocab_size, attention_within_documents=within_documents),
        parallel=ParallelConfig(fused_ffn=fused_ffn),  # type: ignore[arg-type]
        training=TrainingConfig(micro_batch_size=4, global_batch_size=global_batch_size, train_steps=2),
    )


def training_with(config: Config, **changes: Any) -> Config:
    """Return the configuration with some keys of its section `training` changed."""
    return dataclasses.replace(config, training=dataclasses.replace(config.training, **changes))


def measured(config: Config, layout: Layout, dtype: str) -> Measured:
    """Measure one step of a layout for each global batch, in processes of its own; 'bf16' trains through the engine."""
    reference = reference_layout(config, [layout])
    vocab_size, batches = global_batches(config, BATCHES)
    applied = apply_layout(config, layout, reference)
    if dtype == "bf16":
        applied = training_with(applied, precision="bf16")
        dtype = "float32"
    return measure(applied, layout.world_size, vocab_size, batches, dtype)


def plain(config: Config, num_micro_batches: int) -> Measured:
    """Return the result of `_plain`, cached by configuration."""
    key = (repr(config), num_micro_batches)
    if key not in _found:
        _found[key] = _plain(config, num_micro_batches)
    return _found[key]


_found: dict[tuple[str, int], Measured] = {}


def _plain(config: Config, num_micro_batches: int) -> Measured:
    """Compute the same step by autograd on the whole model in one process: no engine, stage or sharded regularizer.

    `num_micro_batches` matters only to the penalty of per_head, which averages over a micro-batch before it squares.
    """
    vocab_size, batches = global_batches(config, BATCHES)
    losses, gradients, entropies = [], [], []
    model = plain_model(config, vocab_size)
    for batch_BT in batches:
        model.zero_grad()
        update_spectral_norms(model)
        whole = torch.zeros(2, dtype=torch.float64)
        entropy_LN = torch.zeros(config.model.num_layers, config.model.num_attention_heads, dtype=torch.float64)
        for rows_BT in batch_BT.chunk(num_micro_batches):
            starts_BT = _document_starts(rows_BT[:, :-1]) if config.data.attention_within_documents else None
            cross_entropy, entropies_BNT = model(rows_BT[:, :-1].t(), rows_BT[:, 1:].t(), starts_BT)
            parts = torch.zeros(2, dtype=torch.float64)
            parts[0] = cross_entropy / rows_BT[:, 1:].numel()
            if config.model.regularized:
                thresholds = [block.attention.threshold for block in model.layers.values()]
                length = config.model.seq_length
                penalty = entropy_penalty(entropies_BNT, thresholds, config.regularizer, length, starts_BT)
                parts[1] = config.regularizer.coefficient * penalty
            (parts.sum() / num_micro_batches).backward()
            whole += parts.detach() / num_micro_batches
            entropy_LN += torch.stack([e.detach().mean(dim=(0, 2)) for e in entropies_BNT]) / num_micro_batches
        held = {name: parameter.grad.clone() for name, parameter in named_parameters(model)}
        norm = torch.stack([gradient.norm() for gradient in held.values()]).norm()
        losses.append(torch.cat([whole, norm.reshape(1)]))
        gradients.append(held)
        entropies.append(entropy_LN)
    return Measured(torch.stack(losses), gradients, entropies, {})


def plain_model(config: Config, vocab_size: int) -> Transformer:
    """Return the whole model in float64, with the weights that `train.compare.measurement` uses."""
    model = Transformer(config.model, vocab_size).double()
    model.initialize(config.training.seed)
    for name, parameter in named_parameters(model):  # heads and layers start equal, and must differ here
        if not (parameter.dim() == 2 and name.endswith("weight")):
            noise = torch.randn(parameter.shape, generator=generator(config.training.seed, f"apart/{name}"))
            parameter.data += 0.1 * torch.where(parameter == 0, 1.0, parameter.abs()) * noise
    for name, buffer in model.named_buffers():
        if name.endswith(".scale"):
            buffer.copy_(1 + torch.rand(buffer.shape, generator=generator(config.training.seed, f"apart/{name}")))
    set_gate(taper_norms(model), HALF_TAPERED)
    return model


def _document_starts(tokens_BT: torch.Tensor) -> torch.Tensor:
    """Compute document starts by their definition, one position after the other."""
    starts_BT = torch.zeros_like(tokens_BT)
    for row, position in itertools.product(range(tokens_BT.shape[0]), range(1, tokens_BT.shape[1])):
        new = tokens_BT[row, position - 1] == END_OF_DOCUMENT
        starts_BT[row, position] = position if new else starts_BT[row, position - 1]
    return starts_BT


def assert_layout(layout: Layout, dtype: str, **config: Any) -> None:
    """Assert that a layout equals the plain model to 1e-5 in float32 or 1e-10 in float64, with an acting penalty."""
    whole = tiny_config(**config)
    expected = plain(whole, reference_layout(whole, [layout]).acc or 1)
    if whole.model.regularized:
        assert float(expected.losses[:, 1].min()) > 0.05, "the regularizer must act, or the comparison shows nothing"
    result = compare(measured(whole, layout, dtype), expected)
    assert result.within(TOLERANCE[dtype]), result


def at_the_wait(name: str) -> Any:
    """Return a collective that runs when it is waited for: the latest moment, at which a forgotten wait shows."""
    collective = getattr(torch.distributed, name)

    def begin(*tensors: torch.Tensor, group: Any, async_op: bool) -> Any:
        return SimpleNamespace(wait=torch.no_grad()(lambda: collective(*tensors, group=group)))

    return begin
