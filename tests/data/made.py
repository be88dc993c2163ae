"""Make small datasets whose token values tell where they come from, without data.prepare."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from data.shards.manifest import manifest_json
from data.shards.writer import write_shard

SEQ_LENGTH = 4
TOKENIZER = b"none"


def make_dataset(
    folder: Path, train: Sequence[int], validation: Sequence[int] = (SEQ_LENGTH + 1,), seq_length: int = SEQ_LENGTH
) -> Path:
    """Write shards with the given numbers of samples. Tokens count from 0 in train and from 10^6 in validation."""
    folder.mkdir(parents=True, exist_ok=True)
    shards: dict[str, list] = {"train": [], "validation": []}
    for split, sizes, first in (("train", train, 0), ("validation", validation, 1_000_000)):
        for number, size in enumerate(sizes):
            count = size * seq_length + 1
            tokens = np.arange(first, first + count, dtype=np.uint32)
            shards[split].append(write_shard(folder / f"{split}-{number:06d}.tar", tokens, "uint32"))
            first += count
    (folder / "tokenizer.model").write_bytes(TOKENIZER)
    (folder / "manifest.json").write_text(manifest_json("tokens", 1, 1 << 31, TOKENIZER, "uint32", shards))
    return folder


def first_tokens(train: Sequence[int], seq_length: int = SEQ_LENGTH) -> set[int]:
    """Return the first token of each sample that `make_dataset` writes into shards of these sizes."""
    starts = np.cumsum([0, *(size * seq_length + 1 for size in train)])
    return {int(start) + i * seq_length for start, size in zip(starts, train, strict=False) for i in range(size)}
