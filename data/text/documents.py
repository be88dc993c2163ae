"""From paths to documents: finding input files, dividing them into parts, and reading their text.

A document is a line of a .jsonl file, or a whole text file. A .txt file of more than 256 KiB is taken for a collection
and cut at line ends into documents of about 64 KiB; any other file is cut only above 16 MiB. Reading needs memory for
one document, whatever the size of the file.

A part is a list of slices (a file, or a range of bytes of a large uncompressed one) and the unit of parallel work and
of resuming. The division depends on the files alone, so results do not depend on the number of workers.
"""

import fnmatch
import glob
import gzip
import hashlib
import io
import json
import os
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO, NamedTuple

import zstandard

from data.errors import DataError

DEFAULT_INCLUDE = tuple(f"*.{kind}{packed}" for kind in ("txt", "py", "jsonl") for packed in ("", ".gz", ".zst"))
COLLECTION_BYTES = 256 << 10
LARGEST_DOCUMENT_BYTES = 16 << 20
PIECE_BYTES = 64 << 10
LARGEST_LINE_BYTES = 64 << 20
ASSUMED_COMPRESSION = 4
_MIN_PART_BYTES, _MAX_PART_BYTES, _USUAL_PARTS = 4 << 20, 256 << 20, 256


class Slice(NamedTuple):
    """Bytes [start, end) of a file; `end` of a compressed file is its compressed size and `start` is 0."""

    path: str
    start: int
    end: int

    @property
    def text_bytes(self) -> int:
        """Size of the text in bytes, an estimate for compressed files."""
        return (self.end - self.start) * (ASSUMED_COMPRESSION if _is_compressed(self.path) else 1)


class Document(NamedTuple):
    """A text and where it came from: "path", or "path@offset" with the offset in bytes of the uncompressed file."""

    text: str
    source: str


def find_files(inputs: list[str], include: list[str], exclude: list[str], output: Path) -> list[str]:
    """The files that `inputs` (files, folders, globs) name, sorted, each once.

    In folders only names matching `include` count. `exclude` patterns are matched with every component of a path and
    with the whole. What lies in `output` does not count, for it would be more when the work is resumed.

    Raises DataError for an input that is missing, unreadable, empty, no plain file or matches nothing.
    """
    own = os.path.join(os.path.realpath(output), "")
    found: dict[str, str] = {}  # texts, since there may be millions and a Path takes several times the memory
    for given in inputs:
        for path in _expand(given):
            for file in _files_in(path, include) if path.is_dir() else [path]:
                real = os.path.realpath(file)
                if not _excluded(file, exclude) and not real.startswith(own):
                    found.setdefault(real, str(file))
    if not found:
        raise DataError(f"--input {' '.join(inputs)}: no file matches {' '.join(include)}; see --include and --exclude")
    return sorted(found.values(), key=lambda file: file.replace("/", "\0"))  # folder by folder


def plan_parts(files: list[str], max_bytes: int | None) -> list[list[Slice]]:
    """Divide the files into parts of similar size; with `max_bytes`, of an arbitrary but fixed choice of slices."""
    sizes = [os.stat(file).st_size for file in files]
    part_bytes = min(max(sum(sizes) // _USUAL_PARTS, _MIN_PART_BYTES), _MAX_PART_BYTES)
    slices = [piece for file, size in zip(files, sizes, strict=True) for piece in _slices(file, size, part_bytes)]
    if max_bytes is not None:
        slices = _choose(slices, max_bytes)
    parts: list[list[Slice]] = [[]]
    filled = 0
    for piece in slices:
        if filled + piece.text_bytes > part_bytes and parts[-1]:
            parts.append([])
            filled = 0
        parts[-1].append(piece)
        filled += piece.text_bytes
    return parts


def read_documents(piece: Slice, text_key: str) -> Iterator[Document]:
    """The documents that begin in `piece`, in order, empty ones left out.

    Raises DataError naming file and place for text that is not UTF-8, a broken archive, or a line that is no JSON
    object with a text under `text_key`.
    """
    try:
        with _open(piece.path) as file:
            if _kind(piece.path) == ".jsonl":
                yield from _read_lines(file, piece, text_key)
            else:
                yield from _read_text(file, piece)
    except (EOFError, zlib.error, gzip.BadGzipFile, zstandard.ZstdError) as error:
        raise DataError(f"{piece.path}: the archive is damaged or cut short ({error}); copy it again") from error
    except OSError as error:
        raise DataError(
            f"{piece.path}: cannot be read ({error.strerror}); check the file and its permissions"
        ) from error


def _expand(given: str) -> list[Path]:
    path = Path(given)
    if not given:
        raise DataError("--input '': names nothing (an unset variable?); name files, folders or globs")
    if path.exists():
        if not (path.is_file() or path.is_dir()):
            raise DataError(f"{given}: is no plain file, and it is read more than once; write the text to a file first")
        if path.is_file() and path.stat().st_size == 0:
            raise DataError(f"{given}: the file is empty; give a file with text")
        return [path]
    matches = [Path(match) for match in sorted(glob.glob(given, recursive=True))]
    if not matches:
        raise DataError(f"{given}: no such file or folder, and as a pattern it matches nothing; check --input")
    return matches


def _files_in(folder: Path, include: list[str]) -> Iterator[Path]:
    for parent, _, names in os.walk(folder, onerror=_cannot_list):
        for name in names:
            path = Path(parent, name)
            if any(fnmatch.fnmatch(name, pattern) for pattern in include) and path.is_file():
                yield path


def _cannot_list(error: OSError) -> None:
    raise DataError(f"{error.filename}: the folder cannot be listed ({error.strerror}); check its permissions")


def _excluded(path: Path, exclude: list[str]) -> bool:
    return any(fnmatch.fnmatch(name, pattern) for pattern in exclude for name in (*path.parts, str(path)))


def _is_compressed(path: str) -> bool:
    return path.endswith((".gz", ".zst"))


def _kind(path: str) -> str:
    """The suffix before that of packing; lines of JSON are called .json too, as CodeParrot's files are."""
    suffix = Path(path.removesuffix(".gz").removesuffix(".zst")).suffix
    return ".jsonl" if suffix == ".json" else suffix


def _whole_bytes(path: str) -> int:
    """Up to this size a text file is one document."""
    return COLLECTION_BYTES if _kind(path) == ".txt" else LARGEST_DOCUMENT_BYTES


def _slices(path: str, size: int, part_bytes: int) -> Iterator[Slice]:
    divisible = not _is_compressed(path) and (_kind(path) == ".jsonl" or size > _whole_bytes(path))
    step = part_bytes if divisible else max(size, 1)
    for start in range(0, size, step):
        yield Slice(path, start, min(start + step, size))


def _choose(slices: list[Slice], max_bytes: int) -> list[Slice]:
    chosen: set[Slice] = set()
    total = 0
    for piece in sorted(slices, key=lambda piece: hashlib.sha256(os.fsencode(f"{piece.path}@{piece.start}")).digest()):
        if total + piece.text_bytes <= max_bytes or not chosen:
            chosen.add(piece)
            total += piece.text_bytes
    return [piece for piece in slices if piece in chosen]


def _open(path: str) -> BinaryIO:
    if path.endswith(".gz"):
        return io.BufferedReader(gzip.open(path))  # type: ignore[arg-type]
    if path.endswith(".zst"):
        return io.BufferedReader(_ZstdFile(path), 1 << 16)
    return open(path, "rb")


class _ZstdFile(io.RawIOBase):
    """A .zst file that raises EOFError where it is cut short, and feeds little at a time so that memory stays
    bounded."""

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
                f'{source}: the line is no JSON object with a text under "{text_key}"; see --text-key'
            ) from error
        if not isinstance(text, str):
            raise DataError(f'{source}: "{text_key}" holds {type(text).__name__}, expected a text; see --text-key')
        if _has_lone_surrogate(text):
            raise DataError(f'{source}: "{text_key}" holds half a surrogate pair, which is no text; correct the line')
        if text:
            yield Document(text, source)


def _lines_of(file: BinaryIO, piece: Slice) -> Iterator[tuple[int, bytes]]:
    """Lines that begin in the slice, with their offsets; a compressed file is one slice and is read to its end."""
    position = piece.start
    if position:  # the line that is under way belongs to the slice before
        file.seek(position - 1)
        position += len(_read_line(file, piece.path, position)) - 1
    while _is_compressed(piece.path) or position < piece.end:
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
        head = file.read(_whole_bytes(piece.path) + 1)
        if len(head) <= _whole_bytes(piece.path):
            if head:
                yield Document(_decode(head, piece.path, 0), piece.path)
            return
        file = _Rejoined(head, file)  # type: ignore[assignment]
    yield from _cut_text(file, piece)


class _Rejoined:
    """What was read of a file and the rest of it."""

    def __init__(self, head: bytes, rest: BinaryIO) -> None:
        self._head, self._rest = io.BytesIO(head), rest

    def readline(self, limit: int) -> bytes:
        line = self._head.readline(limit)
        if line.endswith(b"\n") or len(line) == limit:
            return line
        return line + self._rest.readline(limit - len(line))


def _cut_text(file: BinaryIO, piece: Slice) -> Iterator[Document]:
    """Documents of about PIECE_BYTES, cut at line ends, or between characters where a line is longer than that."""
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
    while _is_compressed(piece.path) or position < piece.end or in_line:
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
    """`raw` without the beginning of a character at its end."""
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
