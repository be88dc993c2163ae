"""The tokens of one part of the input and one split, and which document begins where in them."""

import itertools
import json
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from data.shards.tar_layout import token_dtype_for
from data.shards.tokenizer import Tokenizer


class EncodedPart:
    """Writes `path`.tokens, and in `path`.documents a line for each document: [first token in this part, source]."""

    def __init__(self, path: Path, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._dtype = token_dtype_for(tokenizer.vocab_size)
        self._tokens = path.with_name(f"{path.name}.tokens").open("wb")
        self._documents = path.with_name(f"{path.name}.documents").open("w")
        self._counts = {"tokens": 0, "documents": 0, "text_bytes": 0, "characters": 0}

    def add(self, text: str, text_bytes: int, source: str) -> None:
        ids = self._tokenizer.encode(text)
        ids.append(self._tokenizer.end_of_document)
        np.array(ids, dtype=self._dtype).tofile(self._tokens)
        self._documents.write(json.dumps([self._counts["tokens"], source]) + "\n")
        for name, count in (
            ("tokens", len(ids)),
            ("documents", 1),
            ("text_bytes", text_bytes),
            ("characters", len(text)),
        ):
            self._counts[name] += count

    def close(self) -> dict[str, int]:
        self._tokens.close()
        self._documents.close()
        return self._counts


def document_starts_in(path: Path, part_start: int, first: int, last: int) -> Iterator[tuple[int, str]]:
    """Documents of a part that have tokens in a shard, [first, last) of the split: (token of the shard, source).

    `part_start` is the part's first token in the split. A document that began in the shard before starts below 0.
    """
    with path.open() as lines:
        entries = ((part_start + token - first, source) for token, source in map(json.loads, lines))
        for (start, source), (end, _) in itertools.pairwise(itertools.chain(entries, [(last, "")])):
            if start >= last - first:
                return
            if end > 0:
                yield start, source
