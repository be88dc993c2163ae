"""Test that the rectangles of a flat range hold exactly its elements, at their place in the whole."""

import torch
from hypothesis import given
from hypothesis import strategies as st

from parallel.state.chunks import chunks_of_range


@given(
    rows=st.integers(1, 6),
    columns=st.integers(1, 6),
    shards=st.integers(1, 3),
    dim=st.integers(0, 1),
    padding=st.integers(0, 4),
    data=st.data(),
)
def test_a_flat_range_of_a_shard_is_found_again_in_the_whole(
    rows: int, columns: int, shards: int, dim: int, padding: int, data: st.DataObject
) -> None:
    sizes = [rows, columns]
    sizes[dim] *= shards
    padding = min(padding, sizes[0] - 1) if dim == 0 else 0
    whole = (sizes[0] - padding, sizes[1])  # the last rows are vocabulary padding
    shard = data.draw(st.integers(0, shards - 1))
    start = data.draw(st.integers(0, rows * columns - 1))
    stop = data.draw(st.integers(start + 1, rows * columns))
    offsets = [0, 0]
    offsets[dim] = shard * (rows, columns)[dim]

    numbers = torch.arange(sizes[0] * sizes[1], dtype=torch.float32).view(sizes)  # each element is its own name
    local = numbers.narrow(dim, offsets[dim], (rows, columns)[dim]).flatten()
    chunks = list(chunks_of_range("w", whole, (rows, columns), offsets, start, local[start:stop]))

    assert len(chunks) <= 3
    found = []
    for chunk in chunks:
        place = tuple(slice(o, o + s) for o, s in zip(chunk.offsets, chunk.tensor.shape, strict=True))
        assert torch.equal(chunk.tensor, numbers[: whole[0]][place])
        found += chunk.tensor.flatten().tolist()
    expected = [value for value in local[start:stop].tolist() if value < whole[0] * whole[1]]
    assert sorted(found) == expected


def test_vectors_and_views() -> None:
    flat = torch.arange(3.0)
    (chunk,) = chunks_of_range("b", (10,), (5,), (5,), 1, flat)
    assert chunk.offsets == (6,) and chunk.tensor.tolist() == [0, 1, 2]
    chunk.tensor.zero_()
    assert flat.tolist() == [0, 0, 0], "chunks are views: loading fills them"
