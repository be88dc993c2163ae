"""Write a SentencePiece model as a tokenizer.json of the tokenizers library, which gives the same tokens.

SentencePiece writes a space as U+2581. Here pieces hold spaces themselves, so no normalizer is needed, and a U+2581 in
a text falls back to its three bytes, as in data/shards/tokenizer.py.

SentencePiece joins the two neighbours whose union has the best score, the leftmost such pair first. The tokenizers
library joins by a list of pairs, the first listed and then the leftmost first. So the list holds every way to cut a
piece in two, best score first.

A byte below 0x80 that is no piece of its own stands as its character ("\\n", not "<0x0A>"). The library's decoder gives
up a whole run of byte tokens if any of them is not UTF-8, and a line feed must not be lost that way.
"""

from typing import Any

from data.errors import DataError
from data.shards.tokenizer import Tokenizer

_SPACE_SYMBOL = "\u2581"
_NORMAL, _UNKNOWN, _CONTROL, _BYTE = 1, 2, 3, 6  # types of a piece in sentencepiece_model.proto
_BPE = 2
_UNKNOWN_TEXT = " \u2047 "
"""What SentencePiece decodes the unknown token to."""


def tokenizer_json(tokenizer: Tokenizer) -> dict[str, Any]:
    """Return the content of tokenizer.json.

    Raises:
        DataError: the tokenizers library cannot give the same tokens.
    """
    from sentencepiece.sentencepiece_model_pb2 import ModelProto  # type: ignore[attr-defined]

    parsed = ModelProto.FromString(tokenizer.serialized)
    pieces = [(piece.piece, piece.score, piece.type) for piece in parsed.pieces]
    normal = {text.replace(_SPACE_SYMBOL, " "): score for text, score, kind in pieces if kind == _NORMAL}
    if fault := _fault(parsed.trainer_spec.model_type, pieces, normal):
        raise DataError(
            f"{tokenizer.source}: {fault}; only a byte-pair model as data.prepare trains it can be exported"
        )
    vocabulary = {_text(text, kind, normal): token for token, (text, _, kind) in enumerate(pieces)}
    special = [
        {"id": token, "content": text, "single_word": False, "lstrip": False, "rstrip": False, "normalized": False,
         "special": True}
        for token, (text, _, kind) in enumerate(pieces) if kind == _CONTROL
    ]  # fmt: skip
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": special,
        "normalizer": None,
        "pre_tokenizer": None,
        "post_processor": None,
        "decoder": {"type": "Sequence", "decoders": [{"type": "ByteFallback"}, {"type": "Fuse"}]},
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": None,
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            "fuse_unk": False,
            "byte_fallback": True,
            "ignore_merges": False,
            "vocab": vocabulary,
            "merges": [cut for piece in sorted(normal, key=lambda text: -normal[text]) for cut in _cuts(piece, normal)],
        },
    }


def tokenizer_config(tokenizer: Tokenizer, seq_length: int) -> dict[str, Any]:
    """Return tokenizer_config.json. A text that spells the special token is text, as everywhere in this project."""
    special = tokenizer.piece(tokenizer.end_of_document)
    return {
        "tokenizer_class": "PreTrainedTokenizerFast",
        **dict.fromkeys(("bos_token", "eos_token", "pad_token"), special),
        "model_max_length": seq_length,
        "padding_side": "left",
        "clean_up_tokenization_spaces": False,
        "split_special_tokens": True,
    }


def _text(text: str, kind: int, normal: dict[str, float]) -> str:
    """Return the name of a piece in tokenizer.json."""
    if kind == _UNKNOWN:
        return _UNKNOWN_TEXT
    if kind == _BYTE:
        character = chr(int(text[3:5], 16))
        return character if character.isascii() and character not in normal else text
    return text.replace(_SPACE_SYMBOL, " ") if kind == _NORMAL else text


def _cuts(piece: str, normal: dict[str, float]) -> list[list[str]]:
    """Return the ways to cut a piece into two pieces."""
    cuts = ((piece[:at], piece[at:]) for at in range(1, len(piece)))
    return [[left, right] for left, right in cuts if left in normal and right in normal]


def _fault(model_type: int, pieces: list[tuple[str, float, int]], normal: dict[str, float]) -> str | None:
    """Return why the tokenizers library would give other tokens, or None."""
    if model_type != _BPE:
        return "not a byte-pair model"
    others = [text for text, _, kind in pieces if kind not in (_NORMAL, _UNKNOWN, _CONTROL, _BYTE)]
    if others:
        return f"the piece {others[0]!r} is user-defined or unused"
    long = [piece for piece in normal if len(piece) > 1]
    if len({normal[piece] for piece in long}) < len(long):
        return "two pieces have the same score"
    missing = next((character for piece in long for character in piece if character not in normal), None)
    return None if missing is None else f"the character {missing!r} is in a piece, but is no piece itself"
