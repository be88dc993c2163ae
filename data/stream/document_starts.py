"""Find where in a packed sequence the document of each token begins."""

import numpy as np
from numpy.typing import NDArray


def document_starts(tokens_BT: NDArray[np.int64], end_of_document: int) -> NDArray[np.int32]:
    """Return the position of the first token of each token's document.

    An end-of-document token belongs to the document that it ends. With end_of_document=0:

        tokens   5 7 0 8 8 0 0 9
        starts   0 0 0 3 3 3 6 7

    Args:
        tokens_BT: Token ids, [B, T].
        end_of_document: The id of the token that ends a document.

    Returns:
        Positions within the sequence, [B, T]; 0 for a document that began before the sequence.
    """
    starts_BT = np.zeros(tokens_BT.shape, dtype=np.int32)
    ends_here_BT = tokens_BT[:, :-1] == end_of_document
    starts_BT[:, 1:] = ends_here_BT * np.arange(1, tokens_BT.shape[1], dtype=np.int32)
    return np.maximum.accumulate(starts_BT, axis=1)
