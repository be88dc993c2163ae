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
from data.text.account import BLANK, LEFT_OUT, READ, SKIPPED, Account
from data.text.recognise import marked_encoding

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


def find_files(inputs: list[str], include: list[str], exclude: list[str], output: Path, account: Account) -> list[str]:
    """Return the files to read of those that `inputs` name, sorted, each once.

    Links to folders are followed. What has several names is read once. A folder that lies in an input keeps its own
    name, whatever links lead to it.

    Args:
        inputs: Files, folders and globs.
        include: Patterns of the file names wanted in folders.
        exclude: Patterns of paths to leave out (see `matches`).
        output: The dataset's folder. Files in it are no input, since a resumed preparation would find more of them.
        account: Where the files named are counted, and those that are not to be read.

    Raises:
        DataError: An input is missing, unreadable, empty or not a plain file, or a pattern matches nothing.
    """
    own = os.path.join(os.path.realpath(output), "")
    found: dict[str, str] = {}  # strings, since there may be millions and a Path takes several times the memory
    walked: set[str] = set()
    for file, in_folder in _candidates(inputs, walked):
        real = os.path.realpath(file)
        if real.startswith(own) or found.get(real) == file:
            continue
        account.named += 1
        why = _why_not(file, include if in_folder else None, exclude)
        if why is None and real in found:
            why = (LEFT_OUT, "another name of a file that is read")
        if why is None:
            found[real] = file
        else:
            size = os.stat(file).st_size if os.path.exists(file) else 0
            account.add(*why, files=1, num_bytes=size, example=file)
    if not found:
        raise DataError(f"--input {' '.join(inputs)}: no file matches {' '.join(include)}; see --include and --exclude")
    return sorted(found.values(), key=lambda file: file.replace("/", "\0"))  # folder by folder


def plan_parts(files: list[str], max_bytes: int | None, account: Account) -> list[list[Slice]]:
    """Divide the files into parts of similar size.

    Args:
        files: Paths, sorted.
        max_bytes: The most text to use, in bytes. An arbitrary but fixed choice of slices is taken. None takes all.
        account: Where what is not chosen is counted.

    Returns:
        The slices of each part.
    """
    sizes = [os.stat(file).st_size for file in files]
    part_bytes = min(max(sum(sizes) // _USUAL_PARTS, _MIN_PART_BYTES), _MAX_PART_BYTES)
    slices = [piece for file, size in zip(files, sizes, strict=True) for piece in _slices(file, size, part_bytes)]
    if max_bytes is not None:
        slices = _choose(slices, max_bytes, account)
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
    return path.lower().endswith((".gz", ".zst"))


def kind_of(path: str) -> str:
    """Return the suffix without .gz or .zst; .json counts as .jsonl, since CodeParrot names its files so."""
    suffix = Path(path.lower().removesuffix(".gz").removesuffix(".zst")).suffix
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


def _candidates(inputs: list[str], walked: set[str]) -> Iterator[tuple[str, bool]]:
    """Yield (path, whether it was found in a folder) for all that the inputs name, each folder once."""
    links: list[str] = []
    for given in inputs:
        for path in _expand(given):
            if path.is_dir():
                yield from ((file, True) for file in _files_in(str(path), walked, links))
            else:
                yield str(path), False
    while links:  # last, so that what lies in a folder itself keeps its own name
        later: list[str] = []
        for link in sorted(links):
            yield from ((file, True) for file in _files_in(link, walked, later))
        links = later


def _files_in(folder: str, walked: set[str], links: list[str]) -> Iterator[str]:
    """Yield all files below a folder, except in folders that were walked; collect links to folders in `links`."""
    for parent, folders, names in os.walk(folder, onerror=_cannot_list):
        real = os.path.realpath(parent)
        if real in walked:
            folders.clear()
            continue
        walked.add(real)
        links += (os.path.join(parent, name) for name in folders if os.path.islink(os.path.join(parent, name)))
        yield from (os.path.join(parent, name) for name in sorted(names))


def _why_not(file: str, include: list[str] | None, exclude: list[str]) -> tuple[str, str] | None:
    """Return why a file is not to be read, as (outcome, reason); None if it is."""
    if matches(Path(file), exclude):
        return LEFT_OUT, "--exclude"
    if include is not None and not any(fnmatch.fnmatch(os.path.basename(file), pattern) for pattern in include):
        if tuple(include) != DEFAULT_INCLUDE:
            return LEFT_OUT, "--include"
        return SKIPPED, "found in a folder, with a name that is no pattern of --include"
    if not os.path.exists(file):
        return SKIPPED, "a link to nothing"
    if not os.path.isfile(file):
        return SKIPPED, "not a plain file"
    return None if os.stat(file).st_size else (READ, BLANK)


def _cannot_list(error: OSError) -> None:
    raise DataError(f"{error.filename}: the folder cannot be listed ({error.strerror}); check its permissions")


def matches(path: Path, patterns: Iterable[str]) -> bool:
    """Return whether a component of a path, or the whole of it, matches one of the patterns."""
    return any(fnmatch.fnmatch(name, pattern) for pattern in patterns for name in (*path.parts, str(path)))


def _slices(path: str, size: int, part_bytes: int) -> Iterator[Slice]:
    divisible = not is_compressed(path) and (kind_of(path) == ".jsonl" or size > largest_whole_bytes(path))
    divisible = divisible and size > part_bytes and _is_utf8(path)
    step = part_bytes if divisible else max(size, 1)
    for start in range(0, size, step):
        yield Slice(path, start, min(start + step, size))


def _is_utf8(path: str) -> bool:
    """Return whether a file is not marked as UTF-16 or UTF-32, which cannot be cut at any byte."""
    with open(path, "rb") as file:
        return marked_encoding(file.read(4)).name == "utf-8"


def _choose(slices: list[Slice], max_bytes: int, account: Account) -> list[Slice]:
    chosen: set[Slice] = set()
    total = 0
    for piece in sorted(slices, key=lambda piece: hashlib.sha256(os.fsencode(f"{piece.path}@{piece.start}")).digest()):
        if total + piece.text_bytes <= max_bytes or not chosen:
            chosen.add(piece)
            total += piece.text_bytes
    begun = {piece.path for piece in chosen}
    for piece in slices:
        if piece not in chosen:
            is_file = piece.path not in begun and not piece.start
            in_part = piece.path in begun
            size, example = piece.end - piece.start, piece.path if is_file or in_part else ""
            account.add(LEFT_OUT, "--max-megabytes", files=is_file, pieces=in_part, num_bytes=size, example=example)
    return [piece for piece in slices if piece in chosen]
