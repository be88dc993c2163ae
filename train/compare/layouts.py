"""Applies layouts to a configuration, and draws the global batches that they are compared on."""

import dataclasses

import torch
from torch import Tensor

from parallel.layout import Layout
from train.compare.measurement import END_OF_DOCUMENT
from train.config import Config, ConfigError, section_faults, world_faults
from train.config.vocabulary import dataset_if_there, vocabulary

DOCUMENTS_A_SEQUENCE = 4  # on average


def reference_layout(config: Config, layouts: list[Layout]) -> Layout:
    """Return the layout of the one process that `layouts` are compared with.

    Its micro-batches are of equal size, and no larger than configured. A `per_head` regularizer averages entropies over
    one micro-batch of all data-parallel ranks before it squares. Its value depends on micro_batch_size * dp, so layouts
    must then have the same number of micro-batches.

    Raises:
        ConfigError: the granularity is per_head and the layouts differ in their number of micro-batches.
    """
    batch, micro_batch = config.training.global_batch_size, config.training.micro_batch_size
    default = next(acc for acc in range(1, batch + 1) if batch % acc == 0 and batch // acc <= micro_batch)
    counts = sorted({layout.acc or default for layout in layouts})
    if not (config.model.regularized and config.regularizer.granularity == "per_head"):
        return Layout(acc=default)
    if len(counts) > 1:
        raise ConfigError(
            [
                f"regularizer.granularity = 'per_head' averages over micro_batch_size x dp sequences before squaring, "
                f"so layouts must agree in acc, not have {counts}; give all of them one acc, or compare per_query"
            ]
        )
    return Layout(acc=counts[0])


def apply_layout(config: Config, layout: Layout, reference: Layout, as_configured: bool = False) -> Config:
    """Return the configuration under a layout. The global batch stays; the micro-batch follows from acc and dp.

    Args:
        as_configured: keep precision and compiling, too. Otherwise use float32, not compiled.

    Raises:
        ConfigError: the sizes do not fit together; it holds every reason.
    """
    acc, batch = layout.acc or reference.acc or 1, config.training.global_batch_size
    if batch % (acc * layout.dp):
        raise ConfigError(
            [
                f"layout {layout}: training.global_batch_size = {batch} is not a multiple of acc({acc}) * "
                f"dp({layout.dp}) = {acc * layout.dp}; change one of them"
            ]
        )
    parallel = dataclasses.replace(
        config.parallel,
        tensor_parallel_size=layout.tp,
        pipeline_parallel_size=layout.pp,
        context_parallel_size=layout.cp,
        sequence_parallel=bool(layout.sp),
        zero_stage=layout.zero,  # type: ignore[arg-type]
        fused_ffn=config.parallel.fused_ffn if layout.sp else "auto",
    )
    training = dataclasses.replace(
        config.training,
        micro_batch_size=batch // (acc * layout.dp),
        activation_recompute=layout.recompute,  # type: ignore[arg-type]
        precision=config.training.precision if as_configured else "fp32",
        compile=config.training.compile if as_configured else "off",
    )
    applied = dataclasses.replace(config, parallel=parallel, training=training)
    faults = section_faults(applied) + world_faults(applied, layout.world_size)
    if faults:
        raise ConfigError([f"layout {layout}: {fault}" for fault in faults])
    return applied


def global_batches(config: Config, count: int) -> tuple[int, Tensor]:
    """Draw random global batches.

    With attention within documents, documents end at random positions.

    Returns:
        The vocabulary size, which is the dataset's or data.planned_vocab_size, and tokens [count, batch, T + 1], int64.
    """
    vocab_size, _ = vocabulary(config, dataset_if_there(config))
    shape = (count, config.training.global_batch_size, config.model.seq_length + 1)
    generator = torch.Generator().manual_seed(config.training.seed)
    tokens = torch.randint(0, vocab_size, shape, generator=generator)
    if config.data.attention_within_documents:
        ends = torch.rand(shape, generator=generator) < DOCUMENTS_A_SEQUENCE / config.model.seq_length
        tokens = torch.where(ends, END_OF_DOCUMENT, tokens)
    return vocab_size, tokens
