"""Tokenize text with a byte-pair model that restores it exactly.

Byte fallback and identity normalisation make SentencePiece exact, with one exception. It writes a space as U+2581, so
a U+2581 in the text would be decoded as a space. Such a character is encoded as its three byte tokens instead.

No piece contains a line feed. So text is encoded line by line, which is faster and gives the same tokens.
"""

import hashlib
import io
from collections.abc import Iterable, Iterator
from pathlib import Path

import sentencepiece

from data.errors import DataError
from data.shards.manifest import MAX_TOKENIZER_BYTES

END_OF_DOCUMENT = "<|end_of_document|>"
_SPACE_SYMBOL = "\u2581"
_UNKNOWN_SYMBOL = "\u2585"
"""SentencePiece's own sign for an unknown character; it leaves out lines that hold it."""
_LONGEST_LINE_BYTES = 1 << 16
_PROBES = ("a", " a", "a ", "  \t b\r\n\n c", "\ufb01 \u00e9 \u0301", "\U0001d11e", "\ufeff\x00", f"{_SPACE_SYMBOL}x")


class Tokenizer:
    """A SentencePiece model read from `path`. Loading raises DataError if it does not restore every text exactly.

    Attributes:
        source: the path, for messages.
        serialized: content of the file.
        sha256: of the file.
        vocab_size: number of tokens.
        end_of_document: id of the token that ends a document.
    """

    def __init__(self, path: str | Path) -> None:
        self.source = str(path)
        self.serialized = _read_model(Path(path))
        self.sha256 = hashlib.sha256(self.serialized).hexdigest()
        self._processor = sentencepiece.SentencePieceProcessor()
        try:
            self._processor.LoadFromSerializedProto(self.serialized)
        except RuntimeError as error:
            raise DataError(f"{path}: not a SentencePiece model; give a file that data.prepare wrote") from error
        self.vocab_size: int = self._processor.vocab_size()
        self.end_of_document: int = self._processor.eos_id()
        self._newline = self._processor.piece_to_id("<0x0A>")
        self._space_symbol_ids = [self._processor.piece_to_id(f"<0x{byte:02X}>") for byte in _SPACE_SYMBOL.encode()]
        self._require_lossless()

    def encode(self, text: str) -> list[int]:
        """Return the token ids of `text`, without an end-of-document token."""
        ids: list[int] = []
        for i, line in enumerate(text.split("\n")):
            if i:
                ids.append(self._newline)
            if _SPACE_SYMBOL not in line:
                ids += self._processor.encode(line)
                continue
            for j, part in enumerate(line.split(_SPACE_SYMBOL)):
                ids += (self._space_symbol_ids if j else []) + self._processor.encode(part)
        return ids

    def decode(self, ids: Iterable[int]) -> str:
        """Return the text of `ids`. End-of-document tokens give nothing; bytes that are not UTF-8 give U+FFFD."""
        return self._processor.decode([int(i) for i in ids])

    def piece(self, token: int) -> str:
        """Return the name that the model gives to a token."""
        return str(self._processor.id_to_piece(token))

    def _require_lossless(self) -> None:
        unknown = self._processor.unk_id()
        byte_ids = [self._processor.piece_to_id(f"<0x{byte:02X}>") for byte in range(256)]
        if self.end_of_document < 0:
            raise DataError(f"{self.source}: the model has no end-of-sentence piece to end documents with")
        losses = _losses(self.serialized)
        if unknown in byte_ids:
            losses.append("bytes are missing from its vocabulary")
        if not losses and not all(self.decode(self.encode(text)) == text for text in _PROBES):
            losses.append("it changes one of our probes")
        if losses:
            raise DataError(
                f"{self.source}: the model does not restore text exactly: {', '.join(losses)}; it needs byte fallback, "
                "identity normalisation and no dummy prefix (train one with data.prepare --vocab-size)"
            )


def train_tokenizer(lines: Iterable[str], vocab_size: int) -> bytes:
    """Train a byte-pair model and return it serialized. The same lines give the same bytes.

    Pieces never cross a space, but runs of spaces are pieces of their own, for indentation. SentencePiece silently
    leaves out some lines; `learnable` cuts them into lines that it takes.

    Raises:
        DataError: No vocabulary of this size can be learned from these lines.
    """
    buffer = io.BytesIO()
    try:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(lines),
            model_writer=buffer,
            model_type="bpe",
            vocab_size=vocab_size,
            byte_fallback=True,
            normalization_rule_name="identity",
            add_dummy_prefix=False,
            remove_extra_whitespaces=False,
            allow_whitespace_only_pieces=True,
            character_coverage=0.9995,
            max_sentence_length=_LONGEST_LINE_BYTES,
            unk_id=0,
            eos_id=1,
            bos_id=-1,
            pad_id=-1,
            eos_piece=END_OF_DOCUMENT,
            num_threads=1,  # it is stored in the model, whose bytes must not depend on the machine
            minloglevel=2,
        )
    except RuntimeError as error:
        reason = str(error).strip().splitlines()[-1].rpartition("] ")[2]
        remedy = "choose a larger one" if "smaller than" in reason else "choose a smaller one or give more text"
        raise DataError(
            f"--vocab-size {vocab_size}: no vocabulary of this size can be learned from this text ({reason}); {remedy}"
        ) from error
    return buffer.getvalue()


def learnable(line: str) -> Iterator[str]:
    """Yield a line in pieces that SentencePiece learns from: short enough, and without its sign for unknown characters.

    A piece ends before a space if there is one in its last half, so that no word is cut. Most lines are one piece.
    """
    for part in line.split(_UNKNOWN_SYMBOL) if _UNKNOWN_SYMBOL in line else [line]:
        begin = 0
        while begin < len(part):
            piece = part[begin : begin + _LONGEST_LINE_BYTES]
            if 4 * len(piece) > _LONGEST_LINE_BYTES:
                piece = piece.encode()[:_LONGEST_LINE_BYTES].decode(errors="ignore")
            if begin + len(piece) < len(part):
                space = piece.rfind(" ", len(piece) // 2)
                piece = piece if space < 0 else piece[:space]
            yield piece
            begin += len(piece)


def _fields(message: bytes) -> Iterator[tuple[int, int | bytes]]:
    """Yield (number, value) for each field of a protocol-buffer message.

    The few fields needed are not worth the protobuf package's classes: transformers registers its own of the same name.
    """
    at = 0

    def varint() -> int:
        nonlocal at
        value = shift = 0
        while True:
            byte = message[at]
            value |= (byte & 127) << shift
            at, shift = at + 1, shift + 7
            if byte < 128:
                return value

    while at < len(message):
        key = varint()
        if key & 7 == 0:
            yield key >> 3, varint()
        else:
            size = varint() if key & 7 == 2 else 8 if key & 7 == 1 else 4
            yield key >> 3, message[at : at + size]
            at += size


def _losses(model: bytes) -> list[str]:
    """Return what a SentencePiece model does that loses text, going by its own description of itself.

    The numbers of the fields are those of sentencepiece_model.proto.
    """
    parts = {number: value for number, value in _fields(model) if number in (2, 3, 5)}
    trainer, normalizer, denormalizer = (
        dict(_fields(part)) if isinstance(part := parts.get(number, b""), bytes) else {} for number in (2, 3, 5)
    )
    found = []
    if normalizer.get(2) or denormalizer.get(2):
        name = normalizer.get(1, b"")
        found.append(
            f"it normalises text ({name.decode(errors='replace') if isinstance(name, bytes) and name else '?'})"
        )
    if normalizer.get(3, 1):
        found.append("it adds a dummy prefix")
    if normalizer.get(4, 1):
        found.append("it removes extra whitespace")
    if not normalizer.get(5, 1):
        found.append("it does not escape spaces")
    if not trainer.get(35, 0):
        found.append("it has no byte fallback")
    return found


def _read_model(path: Path) -> bytes:
    try:
        if path.stat().st_size > MAX_TOKENIZER_BYTES:
            raise DataError(f"{path}: larger than {MAX_TOKENIZER_BYTES} bytes, so not a tokenizer of ours")
        return path.read_bytes()
    except OSError as error:
        raise DataError(f"{path}: cannot read the tokenizer ({error.strerror}); name a tokenizer.model") from error
