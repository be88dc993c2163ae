"""What a parser has to do with any file: return a result, or raise its documented error with a clear message.

    @fuzz(json_like({"name": "x"}))
    def test_a_parser(content: bytes, folder: Path) -> None:
        holds(lambda: parse(folder, content), ParserError)

Each fuzzer runs a few fixed examples in the default tests, and many random ones with -m slow.
"""

import contextlib
import io
import json
import resource
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from data.command_line import print_faults

T = TypeVar("T")
FEW, MANY = 12, 1000
"""Examples in the default and in the slow tests."""
LONGEST_LINE = 2000
"""Characters of one line of a message."""
MOST_LINES = 100
"""Of a message that collects faults."""
MOST_BYTES = 256 << 20
"""Of memory that a parser may touch beyond what this process ever has, for files of a few hundred kilobytes."""

DEEP = "[" * 20_000 + "]" * 20_000
TEXTS = [
    *("null", "true", "-1", "0", "1", "1e400", "-1e400", "NaN", "Infinity", "1" * 5000, "1e-400", "0.5", "1e18"),
    *("18446744073709551616", '""', '"x"', '"\\u0000"', '"\\ud800"', '"\\u001b[31m"', '"../../etc/passwd"', '"a\\nb"'),
    *("[]", "{}", "[[]]", '[null, "x"]', '{"": 1}', '{"a": 1, "a": 2}', '"/dev/zero"', '"~"', '"pipe:false {}"'),
    *(DEEP, '"' + "x" * 50_000 + '"', "[" + "0," * 20_000 + "0]", '{"' + "k" * 5000 + '": 1}'),
]
"""JSON texts that stand where something else belongs."""
WORDS = st.text(st.sampled_from("ab.é_0 \x1b\n\0\u202e\ud800\U0001f600"), max_size=12)
"""Not of all characters: hypothesis takes ten seconds to make their table."""
_PLACE = "\0place\0"


def holds(parse: Callable[[], T], *documented: type[Exception]) -> T | None:
    """Return what a parser returns, or None where it raises a documented error with a message as messages should be.

    Raises:
        AssertionError: the message is empty, too long or holds control characters, or the parser took too much memory.
        Exception: any other error of the parser.
    """
    before = _peak_bytes()
    try:
        return parse()
    except documented as error:
        check_message(error)
        return None
    finally:
        grown = _peak_bytes() - before
        assert grown < MOST_BYTES, f"{grown} bytes of memory"


def _peak_bytes() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss << 10


def check_message(error: Exception) -> None:
    """Check what the terminal shows of an error."""
    shown = io.StringIO()
    with contextlib.redirect_stderr(shown):
        print_faults(error)
    lines = shown.getvalue().split("\n")[:-1]
    assert lines and lines[0].strip() != "error:", f"no message: {error!r}"
    assert len(lines) <= MOST_LINES, f"{len(lines)} lines"
    for line in lines:
        assert line.startswith("error: "), f"a message that begins a line of its own: {line[:300]!r}"
        assert line.isprintable(), f"control characters: {line[:300]!r}"
        assert len(line) <= LONGEST_LINE, f"a line of {len(line)} characters: {line[:300]!r}"


def fuzz(content: st.SearchStrategy[T], few: int = FEW) -> Callable[[Callable[[T, Path], None]], Callable[..., None]]:
    """Make a test of a function that takes a drawn file and a folder."""

    def decorate(check: Callable[[T, Path], None]) -> Callable[..., None]:
        @pytest.mark.parametrize(
            "examples",
            [
                pytest.param(few, id="few"),
                pytest.param(MANY, id="many", marks=[pytest.mark.slow, pytest.mark.timeout(1800)]),
            ],
        )
        def test(examples: int, tmp_path: Path) -> None:
            numbers = iter(range(10**9))

            def one(drawn: T) -> None:
                folder = tmp_path / str(next(numbers))
                folder.mkdir()
                check(drawn, folder)

            fixed = examples == few
            settings(
                max_examples=examples,
                deadline=None,
                derandomize=fixed,
                database=None,
                print_blob=True,
                suppress_health_check=list(HealthCheck),
            )(given(content)(one))()

        test.__name__, test.__doc__, test.__module__ = check.__name__, check.__doc__, check.__module__
        return test

    return decorate


@st.composite
def edited(draw: Callable[..., Any], sound: bytes) -> bytes:
    """Draw the bytes of a sound file with some of them changed, cut, repeated or put in."""
    content = bytearray(sound)
    for _ in range(draw(st.integers(1, 4))):
        first, last = sorted(draw(st.tuples(*[st.integers(0, len(content))] * 2)))
        kind = draw(st.sampled_from(["change", "cut", "end", "repeat", "insert"]))
        if kind == "change":
            content[first : first + 1] = draw(st.binary(min_size=1, max_size=8))
        elif kind == "cut":
            del content[first:last]
        elif kind == "end":
            del content[first:]
        elif kind == "repeat":
            content[first:first] = content[first:last]
        else:
            content[first:first] = draw(st.binary(max_size=64))
    return bytes(content)


@st.composite
def edited_tree(draw: Callable[..., Any], tree: Any) -> bytes:
    """Draw the JSON of a sound value with some of its parts replaced, deleted, renamed or added."""
    tree = json.loads(json.dumps([tree]))
    texts: list[str] = []
    for _ in range(draw(st.integers(1, 3))):
        path = draw(st.sampled_from(list(_paths(tree))))
        node = tree
        for key in path[:-1]:
            node = node[key]
        kind = draw(st.sampled_from(["replace", "replace", "replace", "delete", "rename", "add"]))
        key = path[-1]
        if kind == "delete" and path != (0,):
            del node[key]
        elif kind == "rename" and isinstance(node, dict):
            node[draw(WORDS)] = node.pop(key)
        elif kind == "add" and isinstance(node[key], dict):
            node[key][draw(WORDS)] = draw(st.none() | st.integers() | WORDS)
        else:
            texts.append(draw(st.sampled_from(TEXTS) | st.integers().map(str) | st.floats().map(json.dumps)))
            node[key] = f"{_PLACE}{len(texts) - 1}"
    text = json.dumps(tree[0])
    for number, value in enumerate(texts):
        text = text.replace(json.dumps(f"{_PLACE}{number}"), value)
    return text.encode("utf-8", "surrogatepass")


def _paths(tree: Any, path: tuple[Any, ...] = ()) -> Any:
    if path:
        yield path
    children = tree.items() if isinstance(tree, dict) else enumerate(tree) if isinstance(tree, list) else ()
    for key, child in children:
        yield from _paths(child, (*path, key))


def json_like(sound: Any) -> st.SearchStrategy[bytes]:
    """Draw a file that should hold JSON: a sound value edited, its bytes edited, any value, any bytes."""
    return st.one_of(
        edited_tree(sound),
        edited_tree(sound),
        edited(json.dumps(sound, indent=1).encode()),
        st.sampled_from(TEXTS).map(str.encode),
        st.binary(max_size=200),
    )


def bytes_like(sound: bytes) -> st.SearchStrategy[bytes]:
    """Draw a file with a format of its own: sound bytes edited, or any bytes."""
    return st.one_of(edited(sound), edited(sound), st.binary(max_size=2000))
