"""train.describe lists every configuration key, as text and as Markdown."""

import re

import pytest

from train.config import Config
from train.describe import main


def all_keys() -> set[str]:
    keys = set()
    for section, value in Config().as_dict().items():
        keys |= {f"{section}.{key}" for key in value} if isinstance(value, dict) and value else {section}
    return keys


def test_text_lists_every_key(capsys: pytest.CaptureFixture[str]) -> None:
    main([])
    found = re.findall(r"^  (\S+) = ", capsys.readouterr().out, re.MULTILINE)
    assert set(found) == all_keys() and len(found) == len(set(found))


def test_markdown_has_one_row_of_four_cells_for_every_key(capsys: pytest.CaptureFixture[str]) -> None:
    main(["--format", "markdown"])
    text = capsys.readouterr().out
    rows = [line for line in text.splitlines() if line.startswith("| `")]
    assert {re.match(r"\| `([^`]+)`", row)[1] for row in rows} == all_keys()  # type: ignore[index]
    for row in rows:
        cells = re.split(r"(?<!\\)\|", row)[1:-1]
        assert len(cells) == 4 and all(cell.strip() for cell in cells), row
    assert text.startswith("## `model`\n") and "\n## Top level\n" in text
