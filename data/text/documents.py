"""Read the documents of input files.

A document is a line of a .jsonl file, or a whole text file. A .txt file of more than 256 KiB is taken for a collection.
It is cut at line ends into documents of about 64 KiB. Any other text file is cut only above 16 MiB.

Reading takes memory for one document, whatever the size of the file.
"""

import gzip
import io
import json
import zlib
from collections.abc import Iterator
from typing import BinaryIO, NamedTuple

import zstandard

from data.errors import DataError
from data.text.input_files import Slice, is_compressed, kind_of, largest_whole_bytes

PIECE_BYTES = 64 << 10
LARGEST_LINE_BYTES = 64 << 20


class Document(NamedTuple):
    """A text and its source: "path", or "path@offset" with the offset in bytes of the uncompressed file."""

    text: str
    source: str


def read_documents(piece: Slice, text_key: str) -> Iterator[Document]:
    """Yield the documents that begin in `piece`, in order. Empty documents are left out.

    Args:
        piece: A file, or a range of bytes of it.
        text_key: Key of the text in the lines of .jsonl files.

    Raises:
        DataError: Text is not UTF-8, an archive is broken, or a line is not a JSON object with a string under
            `text_key`. The message names file and place.
    """
    try:
        with _open(piece.path) as file:
            if kind_of(piece.path) == ".jsonl":
                yield from _read_lines(file, piece, text_key)
            else:
                yield from _read_text(file, piece)
    except (EOFError, zlib.error, gzip.BadGzipFile, zstandard.ZstdError) as error:
        raise DataError(f"{piece.path}: the archive is damaged or cut short ({error}); copy it again") from error
    except OSError as error:
        raise DataError(
            f"{piece.path}: cannot be read ({error.strerror}); check the file and its permissions"
        ) from error


def _open(path: str) -> BinaryIO:
    if path.endswith(".gz"):
        return io.BufferedReader(gzip.open(path))  # type: ignore[arg-type]
    if path.endswith(".zst"):
        return io.BufferedReader(_ZstdFile(path), 1 << 16)
    return open(path, "rb")


class _ZstdFile(io.RawIOBase):
    """A .zst file that raises EOFError if it is cut short. It decompresses a little at a time to bound the memory."""

    _FEED_BYTES = 2048

    def __init__(self, path: str) -> None:
        self._file = open(path, "rb")  # noqa: SIM115 (closed by close)
        self._decompressor = zstandard.ZstdDecompressor().decompressobj()
        self._fresh = True
        self._output = b""

    def readable(self) -> bool:
        return True

    def readinto(self, buffer) -> int:  # type: ignore[no-untyped-def,override]
        while not self._output and self._fill():
            pass
        count = min(len(buffer), len(self._output))
        buffer[:count], self._output = self._output[:count], self._output[count:]
        return count

    def _fill(self) -> bool:
        if self._decompressor.eof:
            rest = self._decompressor.unused_data
            self._decompressor = zstandard.ZstdDecompressor().decompressobj()
            self._fresh = True
        else:
            rest = b""
        feed = rest or self._file.read(self._FEED_BYTES)
        if not feed:
            if not self._fresh:
                raise EOFError("unexpected end of file")
            return False
        self._fresh = False
        self._output = self._decompressor.decompress(feed)
        return True

    def close(self) -> None:
        self._file.close()
        super().close()


def _read_lines(file: BinaryIO, piece: Slice, text_key: str) -> Iterator[Document]:
    for offset, line in _lines_of(file, piece):
        source = f"{piece.path}@{offset}"
        if not line.strip():
            continue
        try:
            text = json.loads(line)[text_key]
        except (ValueError, KeyError, TypeError, RecursionError) as error:
            raise DataError(
                f'{source}: the line is not a JSON object with a string under "{text_key}"; see --text-key'
            ) from error
        if not isinstance(text, str):
            raise DataError(f'{source}: "{text_key}" holds {type(text).__name__}, expected a string; see --text-key')
        if _has_lone_surrogate(text):
            raise DataError(f'{source}: "{text_key}" holds half a surrogate pair, which is not text; correct the line')
        if text:
            yield Document(text, source)


def _lines_of(file: BinaryIO, piece: Slice) -> Iterator[tuple[int, bytes]]:
    """Yield (offset, line) for each line that begins in the slice. A compressed file is one slice."""
    position = piece.start
    if position:  # a line that began earlier belongs to the slice before
        file.seek(position - 1)
        position += len(_read_line(file, piece.path, position)) - 1
    while is_compressed(piece.path) or position < piece.end:
        line = _read_line(file, piece.path, position)
        if not line:
            return
        yield position, line
        position += len(line)


def _read_line(file: BinaryIO, path: str, offset: int) -> bytes:
    line = file.readline(LARGEST_LINE_BYTES + 1)
    if len(line) > LARGEST_LINE_BYTES:
        raise DataError(f"{path}@{offset}: a line of more than {LARGEST_LINE_BYTES} bytes; is this a .jsonl file?")
    return line


def _read_text(file: BinaryIO, piece: Slice) -> Iterator[Document]:
    if not piece.start:
        head = file.read(largest_whole_bytes(piece.path) + 1)
        if len(head) <= largest_whole_bytes(piece.path):
            if head:
                yield Document(_decode(head, piece.path, 0), piece.path)
            return
        file = _Rejoined(head, file)  # type: ignore[assignment]
    yield from _cut_text(file, piece)


class _Rejoined:
    """A file whose first bytes were read already: those bytes, then the rest of the file."""

    def __init__(self, head: bytes, rest: BinaryIO) -> None:
        self._head, self._rest = io.BytesIO(head), rest

    def readline(self, limit: int) -> bytes:
        line = self._head.readline(limit)
        if line.endswith(b"\n") or len(line) == limit:
            return line
        return line + self._rest.readline(limit - len(line))


def _cut_text(file: BinaryIO, piece: Slice) -> Iterator[Document]:
    """Yield documents of about PIECE_BYTES, cut at line ends, or between characters of a line longer than that."""
    position = piece.start
    if position:
        file.seek(position - 1)
        position -= 1
        while True:
            skipped = file.readline(PIECE_BYTES)
            position += len(skipped)
            if not skipped or skipped.endswith(b"\n"):
                break
    held, begin, in_line = b"", position, False
    while is_compressed(piece.path) or position < piece.end or in_line:
        line = file.readline(PIECE_BYTES)
        in_line = not line.endswith(b"\n")
        if not line:
            break
        held += line
        position += len(line)
        if len(held) >= PIECE_BYTES:
            kept = held if held.endswith(b"\n") else _whole_characters(held)
            yield Document(_decode(kept, piece.path, begin), f"{piece.path}@{begin}")
            held, begin = held[len(kept) :], begin + len(kept)
    if held:
        yield Document(_decode(held, piece.path, begin), f"{piece.path}@{begin}")


def _whole_characters(raw: bytes) -> bytes:
    """Return `raw` without an incomplete character at its end."""
    for back in range(1, 4):
        if raw[-back] & 0xC0 != 0x80:  # not a continuation byte, so a character starts here
            needs = 1 + sum(raw[-back] >= lead for lead in (0xC0, 0xE0, 0xF0))
            return raw[:-back] if needs > back else raw
    return raw


def _decode(raw: bytes, path: str, offset: int) -> str:
    try:
        return raw.decode("utf-8")
    except UnicodeDecodeError as error:
        raise DataError(
            f"{path}: not UTF-8 at byte {offset + error.start} ({raw[error.start]:#04x}); convert the file, "
            "or leave such files out with --skip-bad-text"
        ) from error


def _has_lone_surrogate(text: str) -> bool:
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        return True
    return False
