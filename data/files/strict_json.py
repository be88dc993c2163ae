"""JSON by the letter: without NaN, infinities, keys given twice or objects of unbounded size.

Python's own parser accepts the first three silently, and readers in other languages reject what it writes.
"""

import json
import math
from pathlib import Path
from typing import Any

from data.files.own import open_to_read, read_within

MOST_BYTES = 1 << 26
"""Of a JSON file from outside, unless its reader says otherwise: 64 MiB."""

Shape = Any
"""What a value must be: a type, a tuple of types, a dict of keys and their shapes, or a list of one shape.

A key of a dict that ends in "?" may be missing.
"""

_WORDS = {
    dict: "an object",
    list: "a list",
    str: "a string",
    int: "a whole number",
    float: "a number",
    bool: "true or false",
}


def read_json(path: Path, most_bytes: int = MOST_BYTES) -> Any:
    """Return the value in a JSON file.

    Raises:
        OSError: it cannot be read, or is no regular file.
        ValueError: it is too large or not JSON; the message says where, in one line.
    """
    with open_to_read(path) as file:
        return parse_json(read_within(file, most_bytes))


def parse_json(content: str | bytes) -> Any:
    """Return the value that a JSON text holds.

    Raises:
        ValueError: it is not JSON; the message says where, in one line.
    """
    try:
        text = content if isinstance(content, str) else content.decode("utf-8-sig")
        return json.loads(
            text, object_pairs_hook=_once_each, parse_constant=_not_json, parse_float=_finite, parse_int=_bounded
        )
    except UnicodeDecodeError as error:
        raise ValueError(f"byte {error.start} is not UTF-8") from None
    except json.JSONDecodeError as error:
        raise ValueError(f"line {error.lineno}, column {error.colno}: not JSON ({error.msg})") from None
    except RecursionError:
        raise ValueError("not JSON that can be read (brackets within brackets, too deep)") from None


def parse_row(line: bytes) -> dict[str, Any] | None:
    """Return the object that a line of a file of JSON lines holds, or None if it holds none.

    NaN and infinities, which other programs write, become None. It is twice as fast as `parse_json`, since it looks
    neither for a key given twice nor at how large numbers are.
    """
    try:
        value = json.loads(line.decode(), parse_constant=lambda _: None)
    except (ValueError, RecursionError):
        return None
    return value if isinstance(value, dict) else None


def to_json(value: Any, indent: int | None = None, sort_keys: bool = False) -> str:
    """Return a value as JSON, with null for NaN and infinities at any depth."""
    return json.dumps(finite_or_none(value), indent=indent, sort_keys=sort_keys, allow_nan=False)


def shown(value: Any, most_characters: int = 100) -> str:
    """Return a value as JSON for a message, cut off if it is long."""
    text = to_json(value)
    return text if len(text) <= most_characters else f"{text[: most_characters - 3]}..."


def finite_or_none(value: Any) -> Any:
    """Replace NaN and infinities by None at any depth, since JSON has neither; tuples become lists."""
    if isinstance(value, dict):
        return {key: finite_or_none(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [finite_or_none(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def check_shape(value: Any, shape: Shape, name: str = "") -> None:
    """Check that a JSON value has the keys of a shape, and that they have the right types; other keys may be anything.

    `float` accepts whole numbers too, and neither number accepts true or false.

    Raises:
        ValueError: names the first key that does not fit, what it is and what was expected.
    """
    wanted = dict if isinstance(shape, dict) else list if isinstance(shape, list) else shape
    kinds = wanted if isinstance(wanted, tuple) else (wanted,)
    if not any(_is_a(value, kind) for kind in kinds):
        expected = " or ".join(_WORDS.get(kind, "null") for kind in kinds)
        found = _WORDS[type(value)] if isinstance(value, dict | list) else shown(value, 60)
        raise ValueError(f"{name or 'the content'} is {found}, expected {expected}")
    if isinstance(shape, dict):
        for key, inner in shape.items():
            key, may_be_missing = key.removesuffix("?"), key.endswith("?")
            full = f"{name}.{key}" if name else key
            if key in value:
                check_shape(value[key], inner, full)
            elif not may_be_missing:
                raise ValueError(f"{full} is missing")
    elif isinstance(shape, list):
        for index, item in enumerate(value):
            check_shape(item, shape[0], f"{name}[{index}]")


def _is_a(value: Any, kind: type) -> bool:
    if isinstance(value, bool):
        return kind is bool
    return isinstance(value, (int, float) if kind is float else kind)


def _once_each(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Return a JSON object. Refuse a key that is given twice: the parser itself would silently take the last."""
    tree = dict(pairs)
    if len(tree) < len(pairs):
        keys = [key for key, _ in pairs]
        twice = next(key for key in keys if keys.count(key) > 1)
        raise ValueError(f"{twice} is given twice in one section; keep one")
    return tree


def _not_json(text: str) -> None:
    raise ValueError(f"{text} is not JSON; write a number or null")


def _finite(text: str) -> float:
    value = float(text)
    if not math.isfinite(value):
        raise ValueError(f"{text[:40]} is too large a number")
    return value


def _bounded(text: str) -> int:
    if len(text) > 40:
        raise ValueError(f"{text[:20]}... has {len(text)} digits, expected at most 40")
    return int(text)
