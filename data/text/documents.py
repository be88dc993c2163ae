"""Read the documents of input files.

A document is a line of a .jsonl file, or a whole text file. A .txt file of more than 256 KiB is taken for a collection.
It is cut at line ends into documents of about 64 KiB. Any other text file is cut only above 16 MiB.

Reading takes memory for one document, whatever the size of the file.
"""

import codecs
import gzip
import io
import json
import re
import zlib
from collections.abc import Iterator
from typing import BinaryIO, NamedTuple, cast

import zstandard

from data.text.account import BLANK, DOCUMENTS, NOT_TEXT, READ, SKIPPED, FileAccount
from data.text.input_files import Slice, is_compressed, kind_of, largest_whole_bytes
from data.text.recognise import HEAD_BYTES, Encoding, NotText, recognise

PIECE_BYTES = 64 << 10
LARGEST_LINE_BYTES = 64 << 20
LARGEST_WINDOW_BYTES = 1 << 31
"""Of a .zst file: what zstd --long=31 asks for."""
MOST_VALUES = 1 << 20
"""Of a line of JSON: lists, objects and keys beside the text. Each takes some 20 times its size in memory."""
_JSON_STRING = re.compile(rb'"[^"\\]*+(?:\\.[^"\\]*+)*+"?', re.DOTALL)
_REMEDY = "skip such text with --skip-bad-text"
_STOP_READING = (EOFError, zlib.error, gzip.BadGzipFile, zstandard.ZstdError, UnicodeDecodeError, OSError)


class Document(NamedTuple):
    """A text and its source: "path", or "path@offset" with the offset in bytes of the uncompressed file.

    The offset in a file of UTF-16 or UTF-32 counts bytes of its text as UTF-8.
    """

    text: str
    source: str


class _BadText(Exception):
    """Why a line or a piece of a file cannot be read: a reason to count it under, and the message for the user."""

    def __init__(self, reason: str, message: str) -> None:
        super().__init__(message)
        self.reason = reason


def read_documents(piece: Slice, text_key: str, account: FileAccount | None = None) -> Iterator[Document]:
    """Yield the documents that begin in `piece`, in order. Empty documents are left out.

    Args:
        piece: A file, or a range of bytes of it.
        text_key: Key of the text in the lines of .jsonl files.
        account: Where each byte is counted as read or not. It decides whether what cannot be read is skipped.

    Raises:
        DataError: Something cannot be read, and the account allows no skips: a file that is not text, text that is not
            UTF-8, a broken archive, or a line that is no JSON object with a string under `text_key`. The message names
            file and place.
    """
    account = account or FileAccount(*piece)
    is_plain = not is_compressed(piece.path)
    try:
        with _open(piece.path) as file:
            encoding = recognise(file.peek(HEAD_BYTES)[:HEAD_BYTES])
            reader: BinaryIO = cast(BinaryIO, file)
            if encoding.name != "utf-8":
                file.read(encoding.mark_bytes)
                reader, is_plain = cast(BinaryIO, io.BufferedReader(_AsUtf8(file, encoding.name))), False
            yield from _Reader(reader, piece, text_key, account, encoding, is_plain).documents()
    except NotText as error:
        message = f"{piece.path}: is {error.kind}, not text that can be read; {error.remedy}"
        account.lose(NOT_TEXT, error.kind, piece.end - piece.start, message)
        account.cover(piece.end)
    except _STOP_READING as error:
        account.lose(SKIPPED, *_why_it_stopped(piece.path, error))
        is_plain = False  # the rest of the file is lost, however long it is
    account.check(is_plain)


def _why_it_stopped(path: str, error: Exception) -> tuple[str, int, str]:
    """Return the reason, the bytes to count as lost, and the message. The bytes are 0: how many are left is unknown."""
    if isinstance(error, zstandard.ZstdError) and "memory" in str(error):
        limit = f"its window is larger than {LARGEST_WINDOW_BYTES >> 30} GiB"
        return limit, 0, f"{path}: {limit}, which is our limit; compress it again with zstd --long=31 or less"
    if isinstance(error, UnicodeDecodeError):
        why = f"{path}: ends within a character, or holds what no character is ({error.reason}); convert it to UTF-8"
        return "damaged UTF-16 or UTF-32", 0, why
    if isinstance(error, OSError) and not isinstance(error, gzip.BadGzipFile):
        return "cannot be read", 0, f"{path}: cannot be read ({error.strerror}); check the file and its permissions"
    why = f"{path}: the archive is damaged or cut short ({error}); copy it again"
    return "the rest of a damaged archive", 0, why


def _open(path: str) -> io.BufferedReader:
    if path.lower().endswith(".gz"):
        return io.BufferedReader(gzip.open(path))  # type: ignore[arg-type]
    if path.lower().endswith(".zst"):
        return io.BufferedReader(_ZstdFile(path), 1 << 16)
    return open(path, "rb")


class _AsUtf8(io.RawIOBase):
    """The text of a file in another encoding, as UTF-8. Lone surrogates stay, and are found where they are decoded."""

    def __init__(self, file: io.BufferedReader, encoding: str) -> None:
        self._file = file
        self._decoder = codecs.getincrementaldecoder(encoding)("surrogatepass")
        self._output = memoryview(b"")

    def readable(self) -> bool:
        return True

    def readinto(self, buffer) -> int:  # type: ignore[no-untyped-def,override]
        while not self._output:
            raw = self._file.read(1 << 16)
            self._output = memoryview(self._decoder.decode(raw, final=not raw).encode("utf-8", "surrogatepass"))
            if not raw:
                break
        count = min(len(buffer), len(self._output))
        buffer[:count], self._output = self._output[:count], self._output[count:]
        return count


class _ZstdFile(io.RawIOBase):
    """A .zst file that raises EOFError if it is cut short. It decompresses a little at a time to bound the memory."""

    _FEED_BYTES = 2048

    def __init__(self, path: str) -> None:
        self._file = open(path, "rb")  # noqa: SIM115 (closed by close)
        self._decompressor = self._new_frame()
        self._fresh = True
        self._output = memoryview(b"")

    @staticmethod
    def _new_frame() -> "zstandard.ZstdDecompressionObj":
        return zstandard.ZstdDecompressor(max_window_size=LARGEST_WINDOW_BYTES).decompressobj()

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
            self._decompressor = self._new_frame()
            self._fresh = True
        else:
            rest = b""
        feed = rest or self._file.read(self._FEED_BYTES)
        if not feed:
            if not self._fresh:
                raise EOFError("unexpected end of file")
            return False
        self._fresh = False
        self._output = memoryview(self._decompressor.decompress(feed))
        return True

    def close(self) -> None:
        self._file.close()
        super().close()


class _Reader:
    """Read one slice of an open file and count each of its bytes."""

    def __init__(
        self, file: BinaryIO, piece: Slice, text_key: str, account: FileAccount, encoding: Encoding, is_plain: bool
    ) -> None:
        self._file, self._piece, self._text_key, self._account = file, piece, text_key, account
        self._path = piece.path
        self._until_end = not is_plain  # such a file is one slice, whose end counts other bytes
        self._mark_bytes = encoding.mark_bytes if encoding.name == "utf-8" else 0

    def documents(self) -> Iterator[Document]:
        """Yield the documents of the slice."""
        if not self._piece.start and self._mark_bytes:
            self._count(READ, BLANK, self._file.read(self._mark_bytes))
        return self._lines() if kind_of(self._path) == ".jsonl" else self._texts()

    def _count(self, outcome: str, reason: str, raw: bytes) -> None:
        self._account.add(outcome, reason, len(raw))
        self._account.cover(self._account.last + len(raw))

    def _lose(self, error: _BadText, raw: bytes) -> None:
        self._account.lose(SKIPPED, error.reason, len(raw), str(error))
        self._account.cover(self._account.last + len(raw))

    def _goes_on(self) -> bool:
        return self._until_end or self._account.last < self._piece.end

    def _lines(self) -> Iterator[Document]:
        """Yield a document for each line that begins in the slice."""
        if self._piece.start:
            self._skip_line_of_the_slice_before()
        while self._goes_on() and (line := self._file.readline(LARGEST_LINE_BYTES + 1)):
            source = f"{self._path}@{self._account.last}"
            try:
                if len(line) > LARGEST_LINE_BYTES:
                    what = f"a line of more than {LARGEST_LINE_BYTES} bytes"
                    raise _BadText(what, f"{source}: {what}, our limit; is this a .jsonl file?")
                text = _text_of_line(line, source, self._text_key) if line.strip() else ""
            except _BadText as error:
                self._lose(error, line)
                self._lose_rest_of_line(error, line)
                continue
            self._count(READ, DOCUMENTS if text else BLANK, line)
            if text:
                yield Document(text, source)

    def _lose_rest_of_line(self, error: _BadText, line: bytes) -> None:
        while line and not line.endswith(b"\n"):
            line = self._file.readline(PIECE_BYTES)
            self._account.add(SKIPPED, error.reason, len(line), pieces=0)
            self._account.cover(self._account.last + len(line))

    def _skip_line_of_the_slice_before(self) -> None:
        self._file.seek(self._piece.start - 1)
        position = self._piece.start - 1
        while skipped := self._file.readline(PIECE_BYTES):
            position += len(skipped)
            if skipped.endswith(b"\n"):
                break
        self._account.begin(position)

    def _texts(self) -> Iterator[Document]:
        """Yield the file as one document, or the documents of about PIECE_BYTES that it is cut into."""
        if self._piece.start:
            self._skip_line_of_the_slice_before()
        else:
            most = largest_whole_bytes(self._path) - self._account.last  # a mark counts
            head = self._file.read(most + 1)
            if len(head) <= most:
                yield from self._document(head, self._path)
                return
            self._file = cast(BinaryIO, _Rejoined(head, self._file))
        held, position, in_line = bytearray(), self._account.last, False
        while self._until_end or position < self._piece.end or in_line:
            line = self._file.readline(PIECE_BYTES)
            in_line = not line.endswith(b"\n")
            if not line:
                break
            held += line
            position += len(line)
            if len(held) >= PIECE_BYTES:
                kept = bytes(held) if held.endswith(b"\n") else _whole_characters(bytes(held))
                yield from self._document(kept, f"{self._path}@{self._account.last}")
                del held[: len(kept)]
        yield from self._document(bytes(held), f"{self._path}@{self._account.last}")

    def _document(self, raw: bytes, source: str) -> Iterator[Document]:
        if not raw:
            return
        try:
            text = _decode(raw, self._path, self._account.last)
        except _BadText as error:
            self._lose(error, raw)
            return
        self._count(READ, DOCUMENTS, raw)
        yield Document(text, source)


def _text_of_line(line: bytes, source: str, text_key: str) -> str:
    _check_values(line, source)
    try:
        text = json.loads(line.decode("utf-8-sig"))[text_key]
    except UnicodeDecodeError as error:
        byte = f"byte {error.start} of the line ({line[error.start]:#04x})"
        raise _BadText("not UTF-8", f"{source}: not UTF-8 at {byte}; {_REMEDY}") from error
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        what = f'the line is not a JSON object with a string under "{text_key}"'
        raise _BadText("not a JSON object with text", f"{source}: {what}; see --text-key, {_REMEDY}") from error
    if not isinstance(text, str):
        what = f'"{text_key}" holds {type(text).__name__}, expected a string'
        raise _BadText("not a JSON object with text", f"{source}: {what}; see --text-key")
    if _has_lone_surrogate(text):
        what = f'"{text_key}" holds half a surrogate pair, which is not text'
        raise _BadText("half a surrogate pair", f"{source}: {what}; correct the line, or {_REMEDY}")
    return text


def _check_values(line: bytes, source: str) -> None:
    """Refuse a line whose values beside the text would take far more memory than the line."""
    if _count_values(line) > MOST_VALUES and _count_values(_JSON_STRING.sub(b"", line)) > MOST_VALUES:
        what = f"a line with more than {MOST_VALUES} lists, objects and keys"
        raise _BadText(what, f"{source}: {what}, our limit; leave out of it what is not text")


def _count_values(line: bytes) -> int:
    return line.count(b"[") + line.count(b"{") + line.count(b":")


class _Rejoined:
    """A file whose first bytes were read already: those bytes, then the rest of the file."""

    def __init__(self, head: bytes, rest: BinaryIO) -> None:
        self._head, self._rest = io.BytesIO(head), rest

    def readline(self, limit: int) -> bytes:
        line = self._head.readline(limit)
        if line.endswith(b"\n") or len(line) == limit:
            return line
        return line + self._rest.readline(limit - len(line))


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
        where = f"byte {offset + error.start} ({raw[error.start]:#04x})"
        raise _BadText("not UTF-8", f"{path}: not UTF-8 at {where}; convert the file, or {_REMEDY}") from error


def _has_lone_surrogate(text: str) -> bool:
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        return True
    return False
