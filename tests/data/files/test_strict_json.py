import json
import re
from pathlib import Path

import pytest

from data.files.strict_json import check_shape, parse_json, parse_row, read_json, to_json


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("NaN", "not JSON"),
        ('{"a": -Infinity}', "not JSON"),
        ("1e999", "too large"),
        ("1" * 400, "400 digits"),
        ('{"a": 1, "a": 2}', "a is given twice"),
        ("[" * 100_000, "too deep"),
        ('{"a": 1', "line 1"),
        ("", "line 1"),
        (b"\xff", "not UTF-8"),
    ],
)
def test_what_is_not_strict_json_is_one_line(text: str, words: str) -> None:
    with pytest.raises(ValueError, match=words) as error:
        parse_json(text)
    assert "\n" not in str(error.value)


def test_a_file_is_bounded(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("[1, 2]")
    assert read_json(tmp_path / "file", 6) == [1, 2]
    with pytest.raises(ValueError, match="more than 5 bytes"):
        read_json(tmp_path / "file", 5)


def test_written_json_is_strict() -> None:
    value = {"a": [float("nan"), (1.5, float("inf"))], "b": {"c": -float("inf")}}
    assert json.loads(to_json(value)) == {"a": [None, [1.5, None]], "b": {"c": None}}


SHAPE = {"step": int, "loss": (float, type(None)), "seconds": {"steps": float}, "files": [str]}


def test_a_value_of_the_right_shape_passes() -> None:
    check_shape({"step": 1, "loss": None, "seconds": {"steps": 1}, "files": ["a"], "more": {}}, SHAPE)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"step": True}, "step is true, expected a whole number"),
        ({"step": 1.5}, "step is 1.5"),
        ({"loss": "low"}, 'loss is "low", expected a number or null'),
        ({"seconds": []}, "seconds is a list, expected an object"),
        ({"seconds": {}}, "seconds.steps is missing"),
        ({"files": ["a", 2]}, r"files\[1\] is 2, expected a string"),
    ],
)
def test_a_wrong_shape_names_the_key(change: dict, words: str) -> None:
    value = {"step": 1, "loss": 1.0, "seconds": {"steps": 1.0}, "files": []}
    with pytest.raises(ValueError, match=words):
        check_shape(value | change, SHAPE)


ROOT = Path(__file__).parents[3]
MAY_USE_JSON = {
    "data/files/strict_json.py",
    # a text's document may hold anything beside the text
    "data/text/documents.py",
    "data/shards/text_shard.py",
    # a line or more for each document, between processes of one preparation
    "data/text/preparation.py",
    "data/text/encoded_part.py",
    "data/shards/document_list.py",
    # the plan of a preparation, written piece by piece
    "data/prepare.py",
    # the text whose sha256 a marker holds
    "train/checkpoint/folder.py",
    # imports nothing of data/
    "parallel/engine/deepspeed_section.py",
}


def test_nothing_else_parses_or_writes_json() -> None:
    packages = ("model", "data", "parallel", "train")
    files = [path for package in packages for path in (ROOT / package).rglob("*.py")]
    imports = re.compile(r"^\s*(import|from) json\b", re.MULTILINE)
    found = {str(path.relative_to(ROOT)) for path in files if imports.search(path.read_text())}
    assert found == MAY_USE_JSON


def test_a_row_is_an_object_or_nothing() -> None:
    assert parse_row(b'{"loss": NaN, "step": 1}\n') == {"loss": None, "step": 1}
    assert [parse_row(line) for line in (b"", b"[1]\n", b"\xff", b'{"a": 1', b"[" * 10**5, b"1" * 10**4)] == [None] * 6


def test_a_key_with_a_question_mark_may_be_missing() -> None:
    check_shape({}, {"step?": int})
    with pytest.raises(ValueError, match="step is null, expected a whole number"):
        check_shape({"step": None}, {"step?": int})
