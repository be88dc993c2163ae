"""The initial weights of a run with `checkpoint.init_from`: rank 0 reads and converts them, the others receive them.

Only rank 0 needs to see the folder. What it meets, every rank raises. So no rank waits for another that has failed.
"""

import itertools
from collections.abc import Container, Iterator
from typing import Any

import torch
from torch import Tensor
from torch.distributed import ProcessGroup

from data.shards.manifest import Manifest
from data.stream.dataset import open_dataset_once
from data.stream.token_stream import TokenStream
from parallel.agreement import on_rank_zero
from parallel.launch import local_device
from parallel.state.chunks import Chunk
from train.checkpoint.folder import Folder
from train.checkpoint.root import CheckpointError
from train.config import Config
from train.initial.calibration import measure, tokens_wanted
from train.initial.conversion import Converted, convert, described, faults_between, needs_data
from train.initial.gpt2_folder import is_gpt2_folder, read_gpt2_folder
from train.initial.own_checkpoint import find_checkpoint, read_checkpoint
from train.initial.sending import Shapes, sent_from_rank_zero, shapes_of
from train.initial.source import Source, Weights


class InitialWeights:
    """The whole model's initial weights: a `SavedState` that every layout loads from.

    Attributes:
        record: where they come from, for config.json and the journal.
        words: the same for the user, one line.
        names: of the tensors; parameters that are not among them keep the values drawn from the seed.
    """

    adam_step = 0.0

    def __init__(self, config: Config, manifest: Manifest, group: ProcessGroup) -> None:
        """Read and convert the source; all ranks call.

        Args:
            config: with `checkpoint.init_from`.
            manifest: of the dataset.
            group: of all ranks, with gloo: train.checkpoint.load.checkpoint_group.

        Raises:
            CheckpointError: the source cannot be read or cannot become this model.
        """
        self._group = group
        self._held: Weights = {}

        def read_and_convert() -> tuple[dict[str, Any], str, Shapes]:
            source, converted = read_converted(config, manifest)
            self._held = {f"model.{name}": tensor for name, tensor in converted.weights.items()}
            return record_of(source, converted), words_of(source, converted), shapes_of(self._held)

        self.record, self.words, self._shapes = on_rank_zero(read_and_convert, group)
        self.names: Container[str] = {name for name, _ in self._shapes}

    def read(self, chunks: list[Chunk]) -> None:
        """Fill the chunks that have a source; all ranks call. The weights are kept no longer."""
        wanted: dict[str, list[Chunk]] = {}
        for chunk in chunks:
            wanted.setdefault(chunk.name, []).append(chunk)
        for name, whole in sent_from_rank_zero(self._held, self._shapes, self._group):
            for chunk in wanted.get(name, []):
                place = zip(chunk.offsets, chunk.tensor.shape, strict=True)
                chunk.tensor.copy_(whole[tuple(slice(start, start + size) for start, size in place)])


def read_converted(config: Config, manifest: Manifest) -> tuple[Source, Converted]:
    """Read the source and convert it, in this process.

    Raises:
        CheckpointError: it cannot be read or cannot become this model.
    """
    source = read_source(str(config.checkpoint.init_from))
    check(source, config, manifest)
    measured = []
    if needs_data(source.model, config.model):
        measured = measure(source, calibration_batches(config, source), local_device())
    return source, convert(source, config.model, manifest.vocab_size, config.training.seed, measured)


def read_source(address: str, key: str = "checkpoint.init_from") -> Source:
    """Read a GPT-2's folder, a run, or a checkpoint.

    Args:
        address: of a folder.
        key: of the configuration, for error messages.

    Raises:
        CheckpointError: it is none of these, or cannot be read.
    """
    try:
        folder = Folder(address)
        path = folder.local_path
        if path is not None and is_gpt2_folder(path):
            return read_gpt2_folder(path)
        found = find_checkpoint(folder)
        if found is not None:
            return read_checkpoint(found)
    except (OSError, ValueError, ImportError) as error:
        raise CheckpointError(f"{key} = {address}: cannot be read ({error})") from None
    raise CheckpointError(
        f"{key} = {address}: holds neither a GPT-2 (config.json and model.safetensors) nor a complete "
        "checkpoint; name such a folder, a run's or a checkpoint's"
    )


def check(source: Source, config: Config, manifest: Manifest) -> None:
    """Raise CheckpointError unless the source can become the configured model; a line for each fault."""
    faults = faults_between(source, config.model, manifest.vocab_size) or tokenizer_faults(source, config, manifest)
    if faults:
        raise CheckpointError("\n".join(f"checkpoint.init_from = {source.address}: {fault}" for fault in faults))


def tokenizer_faults(source: Source, config: Config, manifest: Manifest) -> list[str]:
    """Return a fault if a source is known to have been trained with another tokenizer than the dataset's."""
    if source.tokenizer_sha256 in (None, manifest.tokenizer_sha256):
        return []
    return [
        f"was trained with a tokenizer of sha256 {str(source.tokenizer_sha256)[:12]}..., and {config.data.path} has "
        f"{manifest.tokenizer_sha256[:12]}...; prepare the dataset with the model's (data.prepare --tokenizer)"
    ]


def calibration_batches(config: Config, source: Source) -> Iterator[Tensor]:
    """Yield the first training sequences as tokens [T, B], as many as the conversion measures on."""
    data, length, size = config.data, config.model.seq_length, config.training.micro_batch_size
    stream = TokenStream(
        open_dataset_once(data.path, data.read_options()),
        "train",
        seq_length=length,
        micro_batch_size=size,
        data_parallel_rank=0,
        data_parallel_size=1,
        seed=config.training.seed,
        window_shards=data.shuffle_window_shards,
        prefetch=data.prefetch_micro_batches,
        options=data.read_options(),
    )
    try:
        for rows_BT in itertools.islice(stream, -(-tokens_wanted(source.model) // (length * size))):
            yield torch.from_numpy(rows_BT)[:, :-1].t().to(torch.int64)
    finally:
        stream.close()


def record_of(source: Source, converted: Converted) -> dict[str, Any]:
    """Return what a run records of its source."""
    return {
        "address": source.address,
        "kind": source.kind,
        "sha256": source.sha256,
        "changes": list(converted.changes),
        "anew": list(converted.anew),
        "left_out": list(converted.left_out),
    }


def words_of(source: Source, converted: Converted) -> str:
    """Return what a run prints of its source."""
    return "; ".join(
        [f"weights from {source.address} ({source.kind}, sha256 {source.sha256[:12]})", *described(converted)]
    )
