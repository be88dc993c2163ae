"""Check that one function turns what users write into paths, by the words that would go around it."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
FORBIDDEN = {
    r"\.expanduser\(": {"data/files/address.py"},
    r"type=(pathlib\.)?Path\b": set[str](),
    r"Path\((options|args|arguments)\.": set[str](),
    r"url_to_fs\(": {"train/checkpoint/folder.py"},
    r"urlopen\(": set[str](),  # it follows redirects to any scheme
}
"""Words that only these files may hold."""


@pytest.mark.parametrize("words", FORBIDDEN)
def test_no_second_rule(words: str) -> None:
    files = [file for package in ("model", "data", "parallel", "train") for file in (ROOT / package).rglob("*.py")]
    found = {str(file.relative_to(ROOT)) for file in files if re.search(words, file.read_text(encoding="utf-8"))}
    assert found == FORBIDDEN[words]
