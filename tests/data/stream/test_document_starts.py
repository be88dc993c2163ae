"""Compare document starts in packed sequences with a walk through the tokens."""

from pathlib import Path

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from data.stream.document_starts import document_starts
from data.stream.token_stream import TokenStream
from tests.data.made import SEQ_LENGTH, make_dataset


@given(st.lists(st.lists(st.integers(0, 3), min_size=6, max_size=6), min_size=1, max_size=4))
@settings(max_examples=80, deadline=None)
def test_starts_are_those_of_a_walk(rows: list[list[int]]) -> None:
    expected = []
    for row in rows:
        start, starts = 0, []
        for place, token in enumerate(row):
            starts.append(start)
            if token == 0:
                start = place + 1
        expected.append(starts)
    assert document_starts(np.array(rows), 0).tolist() == expected


def test_the_stream_gives_the_starts_of_its_last_batch(tmp_path: Path) -> None:
    """Tokens count from 0 and token 1 ends a document, so only the sample of tokens 0 to 4 has a second document."""
    path = make_dataset(tmp_path, [3])
    stream = TokenStream(path, "train", SEQ_LENGTH, 3, within_documents=True)
    batch = next(stream)
    stream.close()
    assert stream.document_starts is not None
    starts = {int(row[0]): each.tolist() for row, each in zip(batch, stream.document_starts, strict=True)}
    assert starts == {0: [0, 0, 2, 2], 4: [0] * 4, 8: [0] * 4}
    plain = TokenStream(path, "train", SEQ_LENGTH, 3)
    next(plain)
    plain.close()
    assert plain.document_starts is None
