"""Find the input files of a preparation and divide them into parts.

A part is a list of slices: a file, or a range of bytes of a large uncompressed file. Parts are the unit of parallel
work and of resuming. The division depends on the files alone, so the number of workers does not change the result.
"""

import fnmatch
import glob
import hashlib
import os
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

from data.errors import DataError
from data.files.address import local_path

DEFAULT_INCLUDE = tuple(f"*.{kind}{packed}" for kind in ("txt", "py", "jsonl") for packed in ("", ".gz", ".zst"))
COLLECTION_BYTES = 256 << 10
LARGEST_DOCUMENT_BYTES = 16 << 20
ASSUMED_COMPRESSION = 4
_MIN_PART_BYTES, _MAX_PART_BYTES, _USUAL_PARTS = 4 << 20, 256 << 20, 256


class Slice(NamedTuple):
    """Bytes [start, end) of a file. A compressed file is one slice: `start` is 0 and `end` its compressed size."""

    path: str
    start: int
    end: int

    @property
    def text_bytes(self) -> int:
        """Size of the text in bytes; an estimate for compressed files."""
        return (self.end - self.start) * (ASSUMED_COMPRESSION if is_compressed(self.path) else 1)


def find_files(inputs: list[str], include: list[str], exclude: list[str], output: Path) -> list[str]:
    """Return the files that `inputs` name, sorted, each once.

    Args:
        inputs: Files, folders and globs.
        include: Patterns of the file names wanted in folders.
        exclude: Patterns of paths to leave out (see `matches`).
        output: The dataset's folder. Files in it are left out, since a resumed preparation would find more of them.

    Raises:
        DataError: An input is missing, unreadable, empty or not a plain file, or a pattern matches nothing.
    """
    own = os.path.join(os.path.realpath(output), "")
    found: dict[str, str] = {}  # strings, since there may be millions and a Path takes several times the memory
    for given in inputs:
        for path in _expand(given):
            for file in _files_in(path, include) if path.is_dir() else [path]:
                real = os.path.realpath(file)
                if not matches(file, exclude) and not real.startswith(own):
                    found.setdefault(real, str(file))
    if not found:
        raise DataError(f"--input {' '.join(inputs)}: no file matches {' '.join(include)}; see --include and --exclude")
    return sorted(found.values(), key=lambda file: file.replace("/", "\0"))  # folder by folder


def plan_parts(files: list[str], max_bytes: int | None) -> list[list[Slice]]:
    """Divide the files into parts of similar size.

    Args:
        files: Paths, sorted.
        max_bytes: The most text to use, in bytes. An arbitrary but fixed choice of slices is taken. None takes all.

    Returns:
        The slices of each part.
    """
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


def is_compressed(path: str) -> bool:
    """Return whether a file is compressed, going by its name."""
    return path.endswith((".gz", ".zst"))


def kind_of(path: str) -> str:
    """Return the suffix without .gz or .zst; .json counts as .jsonl, since CodeParrot names its files so."""
    suffix = Path(path.removesuffix(".gz").removesuffix(".zst")).suffix
    return ".jsonl" if suffix == ".json" else suffix


def largest_whole_bytes(path: str) -> int:
    """Return the size in bytes up to which a text file is one document."""
    return COLLECTION_BYTES if kind_of(path) == ".txt" else LARGEST_DOCUMENT_BYTES


def _expand(given: str) -> list[Path]:
    if not given:
        raise DataError("--input '': names nothing (an unset variable?); name files, folders or globs")
    path = local_path(given)
    if path.exists():
        if not (path.is_file() or path.is_dir()):
            raise DataError(
                f"{given}: is not a plain file, and input is read more than once; write the text to a file first"
            )
        if path.is_file() and path.stat().st_size == 0:
            raise DataError(f"{given}: the file is empty; give a file with text")
        return [path]
    matches = [Path(match) for match in sorted(glob.glob(str(path), recursive=True))]
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


def matches(path: Path, patterns: Iterable[str]) -> bool:
    """Return whether a component of a path, or the whole of it, matches one of the patterns."""
    return any(fnmatch.fnmatch(name, pattern) for pattern in patterns for name in (*path.parts, str(path)))


def _slices(path: str, size: int, part_bytes: int) -> Iterator[Slice]:
    divisible = not is_compressed(path) and (kind_of(path) == ".jsonl" or size > largest_whole_bytes(path))
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
