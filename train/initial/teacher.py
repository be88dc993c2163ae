"""The teacher of a run with `distillation.teacher`: rank 0 reads it, every rank holds it whole."""

from typing import Any

import torch
from torch.distributed import ProcessGroup

from data.shards.manifest import Manifest
from model.transformer import Transformer
from parallel.agreement import on_rank_zero
from parallel.distillation import Distillation
from parallel.launch import local_device
from train.checkpoint.root import CheckpointError
from train.config import Config
from train.initial.conversion import MOST_PADDING
from train.initial.sending import sent_from_rank_zero, shapes_of
from train.initial.source import Source, Weights, fill
from train.initial.weights import check, read_source, tokenizer_faults


def read_teacher(config: Config, manifest: Manifest, group: ProcessGroup) -> tuple[Distillation, dict[str, Any]]:
    """Build the teacher on this rank's device, in the precision of training; all ranks call.

    Args:
        config: with `distillation.teacher`.
        manifest: of the dataset.
        group: of all ranks, with gloo.

    Returns:
        The teacher, and what the journal records of it.

    Raises:
        CheckpointError: it cannot be read, or cannot teach this run.
    """
    held: Weights = {}

    def read() -> tuple[Any, ...]:
        source = _read_fitting(config, manifest)
        held.update(source.weights)
        record = {"address": source.address, "kind": source.kind, "sha256": source.sha256}
        return source.model, source.vocab_size, record, shapes_of(held)

    model, padded, record, shapes = on_rank_zero(read, group)
    device = local_device()
    with torch.device(device):
        teacher = Transformer(model, manifest.vocab_size, padded_vocab_size=padded)
    fill(teacher, sent_from_rank_zero(held, shapes, group))
    is_bf16 = config.training.resolved_precision(on_gpu=device.type == "cuda") == "bf16"
    teacher.requires_grad_(False).eval().to(torch.bfloat16 if is_bf16 else torch.float32)
    settings = config.distillation
    return Distillation(teacher, settings.weight, settings.temperature, settings.hidden_weight), record


def check_sources(config: Config, manifest: Manifest) -> None:
    """Check, in one process, that the models that a new run would read are there and fit it.

    Raises:
        CheckpointError: one cannot be read or does not fit.
    """
    if config.checkpoint.init_from is not None:
        check(read_source(config.checkpoint.init_from), config, manifest)
    if config.distillation.teacher is not None:
        _read_fitting(config, manifest)


def _read_fitting(config: Config, manifest: Manifest) -> Source:
    source = read_source(str(config.distillation.teacher), "distillation.teacher")
    if faults := teacher_faults(source, config, manifest):
        raise CheckpointError("\n".join(f"distillation.teacher = {source.address}: {fault}" for fault in faults))
    return source


def teacher_faults(source: Source, config: Config, manifest: Manifest) -> list[str]:
    """Return why a model cannot teach a run, one line each."""
    there, here, faults = source.model, config.model, []
    if there.seq_length < here.seq_length:
        faults.append(
            f"reads {there.seq_length} tokens at a time, and this run {here.seq_length}; lower model.seq_length"
        )
    if not 0 <= source.vocab_size - manifest.vocab_size < MOST_PADDING:
        faults.append(
            f"predicts {source.vocab_size:,} tokens, and the dataset's tokenizer has {manifest.vocab_size:,}; prepare "
            "the dataset with the teacher's tokenizer"
        )
    if there.norm == "taper":
        faults.append("model.norm is 'taper' there, whose gate and scales are not read; choose another teacher")
    if config.distillation.hidden_weight:
        for name in ("num_layers", "hidden_size"):
            found, wanted = getattr(there, name), getattr(here, name)
            if found != wanted:
                faults.append(
                    f"model.{name} is {found} there and {wanted} here, so residuals cannot be compared; set "
                    "distillation.hidden_weight=0"
                )
    return faults or tokenizer_faults(source, config, manifest)
