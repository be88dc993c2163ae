"""Write and read the tokens of one part of the input and one split, and where each document begins in them."""

import itertools
import json
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from data.shards.tar_layout import token_dtype_for
from data.shards.tokenizer import Tokenizer


class EncodedPart:
    """Write `path`.tokens and `path`.documents.

    `path`.documents holds a line [first token in this part, source] for each document.
    """

    def __init__(self, path: Path, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._dtype = token_dtype_for(tokenizer.vocab_size)
        self._tokens = path.with_name(f"{path.name}.tokens").open("wb")
        self._documents = path.with_name(f"{path.name}.documents").open("w")
        self._counts = {"tokens": 0, "documents": 0, "text_bytes": 0, "characters": 0}

    def add(self, text: str, text_bytes: int, source: str) -> None:
        """Encode a document and append it."""
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
        """Close the files and return the number of tokens, documents, bytes and characters."""
        self._tokens.close()
        self._documents.close()
        return self._counts


def document_starts_in(path: Path, part_start: int, first: int, last: int) -> Iterator[tuple[int, str]]:
    """Yield (first token in the shard, source) for each document of a part that has tokens in the shard.

    The first token is negative if the document began in the shard before.

    Args:
        path: The part's .documents file.
        part_start: The part's first token, counted in the split.
        first: The shard's first token, counted in the split.
        last: One past the shard's last token.
    """
    with path.open() as lines:
        entries = ((part_start + token - first, source) for token, source in map(json.loads, lines))
        for (start, source), (end, _) in itertools.pairwise(itertools.chain(entries, [(last, "")])):
            if start >= last - first:
                return
            if end > 0:
                yield start, source
