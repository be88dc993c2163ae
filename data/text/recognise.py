"""Recognise by a file's first bytes how its text is encoded, or what it is instead of text."""

import codecs
from typing import NamedTuple

HEAD_BYTES = 4096
_MARKS = (  # UTF-32 first, since its little-endian mark begins with that of UTF-16
    (codecs.BOM_UTF32_LE, "utf-32-le"),
    (codecs.BOM_UTF32_BE, "utf-32-be"),
    (codecs.BOM_UTF8, "utf-8"),
    (codecs.BOM_UTF16_LE, "utf-16-le"),
    (codecs.BOM_UTF16_BE, "utf-16-be"),
)
_UNPACK = "unpack it and name what is inside"
_CONVERT = "convert it to .jsonl, with one document a line"
_EXTRACT = "extract the text first"
_KINDS = (  # (first bytes, what it is, what would work)
    (b"PK\x03\x04", "a ZIP archive (.zip, .docx, .epub)", _UNPACK),
    (b"\x1f\x8b", "gzip", "give it a name that ends in .gz"),
    (b"\x28\xb5\x2f\xfd", "Zstandard", "give it a name that ends in .zst"),
    (b"BZh", "bzip2", "unpack it, or compress it as .gz or .zst"),
    (b"\xfd7zXZ\0", "xz", "unpack it, or compress it as .gz or .zst"),
    (b"7z\xbc\xaf\x27\x1c", "a 7z archive", _UNPACK),
    (b"Rar!\x1a\x07", "a RAR archive", _UNPACK),
    (b"PAR1", "Parquet", _CONVERT),
    (b"ARROW1", "an Arrow file", _CONVERT),
    (b"SQLite format 3\0", "an SQLite database", _CONVERT),
    (b"\x89HDF\r\n", "HDF5", _CONVERT),
    (b"\x93NUMPY", "a NumPy array", _CONVERT),
    (b"\xd0\xcf\x11\xe0", "an old Office document", _EXTRACT),
    (b"\x89PNG", "a PNG picture", "leave it out with --exclude"),
    (b"\xff\xd8\xff", "a JPEG picture", "leave it out with --exclude"),
    (b"GIF8", "a GIF picture", "leave it out with --exclude"),
    (b"RIFF", "a RIFF file (.wav, .webp)", "leave it out with --exclude"),
    (b"\x7fELF", "a program", "leave it out with --exclude"),
)
_CONTROLS = bytes({*range(32), 127} - {*b"\t\n\v\f\r\b\x1b"})


class Encoding(NamedTuple):
    """The encoding of a text and the length of the byte-order mark before it."""

    name: str
    mark_bytes: int


class NotText(Exception):
    """What a file is instead of text that can be read (`kind`), and what would work (`remedy`)."""

    def __init__(self, kind: str, remedy: str) -> None:
        super().__init__(f"{kind}; {remedy}")
        self.kind, self.remedy = kind, remedy


def marked_encoding(head: bytes) -> Encoding:
    """Return the encoding that a byte-order mark names, UTF-8 if there is none."""
    return next((Encoding(name, len(mark)) for mark, name in _MARKS if head.startswith(mark)), Encoding("utf-8", 0))


def recognise(head: bytes) -> Encoding:
    """Return how the text of a file is encoded.

    Args:
        head: the first HEAD_BYTES of the file, less if it is shorter.

    Raises:
        NotText: the file is not text, or text in UTF-16 or UTF-32 without a byte-order mark.
    """
    encoding = marked_encoding(head)
    if encoding.mark_bytes:
        return encoding
    if head.startswith(b"%PDF-"):
        raise NotText("a PDF", _EXTRACT)
    if head[257:262] == b"ustar":
        raise NotText("a tar archive", "unpack it, or use it as it is with data.index")
    wide = _wide_encoding(head)
    if wide:
        raise NotText(
            f"{wide} without a byte-order mark", f"convert it: iconv -f {wide} -t UTF-8, or write the mark before it"
        )
    controls = len(head) - len(head.translate(None, _CONTROLS))
    if controls or not _is_utf8(head):
        for magic, kind, remedy in _KINDS:
            if head.startswith(magic):
                raise NotText(kind, remedy)
    if controls * 10 > len(head):
        raise NotText("binary data", "leave it out with --exclude, or extract its text first")
    return encoding


def _wide_encoding(head: bytes) -> str | None:
    """Return UTF-16 or UTF-32 if the zero bytes lie as in text of one of them that is mostly of the Latin alphabet."""
    units = len(head) // 4
    if not units:
        return None
    zeros = [head[place : 4 * units : 4].count(0) / units for place in range(4)]
    often = [share > 0.7 for share in zeros]
    seldom = [share < 0.05 for share in zeros]
    if all(often[1:]) and seldom[0]:
        return "UTF-32LE"
    if all(often[:3]) and seldom[3]:
        return "UTF-32BE"
    if often[1] and often[3] and seldom[0] and seldom[2]:
        return "UTF-16LE"
    if often[0] and often[2] and seldom[1] and seldom[3]:
        return "UTF-16BE"
    return None


def _is_utf8(head: bytes) -> bool:
    try:
        codecs.getincrementaldecoder("utf-8")().decode(head)  # a character may be cut at the end
    except UnicodeDecodeError:
        return False
    return True
