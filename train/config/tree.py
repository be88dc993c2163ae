"""Builds typed dataclasses from JSON and `section.key=value`, and collects every fault."""

import dataclasses
import difflib
import sysconfig
import types
import typing
from collections.abc import Collection
from pathlib import Path
from typing import Any, Literal

from data.errors import printable
from data.files import strict_json
from data.files.strict_json import to_json

SHARED = "share/entropy-guided-transformer"
"""Folder of the environment in which a wheel installs configs/."""


LARGEST_WHOLE_NUMBER = 2**53
"""Up to here a float holds every whole number."""
LARGEST_NUMBER = 1e30
"""Of any setting: its square is still far from the largest number that float32 or float64 holds."""


class ConfigError(ValueError):
    """The configuration cannot be used. The message has one line per fault."""

    def __init__(self, faults: list[str]) -> None:
        super().__init__("\n".join(faults))
        self.faults = faults


def shipped(path: Path) -> Path:
    """Return the shipped file if `path` is `configs/...` and does not exist in the working directory; else `path`."""
    if path.parts[:1] == ("configs",) and not path.exists():
        for root in (Path(__file__).resolve().parents[2], Path(sysconfig.get_path("data"), SHARED)):
            if (root / path).exists():
                return root / path
    return path


def read_json(path: Path) -> dict[str, Any]:
    """Read a configuration file.

    Raises:
        ConfigError: the file is missing, is not JSON, is not an object, or has a key twice.
    """
    path = shipped(path)
    try:
        tree = strict_json.read_json(path)
    except FileNotFoundError:
        raise ConfigError([f"{path}: no such configuration file; shipped ones are in configs/"]) from None
    except OSError as error:
        raise ConfigError([f"{path}: cannot be read ({error.strerror}); name a JSON file"]) from None
    except ValueError as error:
        raise ConfigError([f"{path}: {error}"]) from None
    if not isinstance(tree, dict):
        raise ConfigError([f"{path}: expected a JSON object with sections, found {type(tree).__name__}"])
    return tree


def apply_override(tree: dict[str, Any], override: str, faults: list[str]) -> None:
    """Set one `section.key=value` in a configuration tree, or add a fault if the text does not have that form."""
    key, equals, text = override.partition("=")
    if not equals or not key:
        faults.append(f"'{shown_key(override)}' is not of the form section.key=value")
        return
    try:
        value = strict_json.parse_json(text)
    except ValueError:
        value = text
    *sections, last = key.split(".")
    for section in sections:
        tree = tree.setdefault(section, {})
        if not isinstance(tree, dict):
            faults.append(f"'{shown_key(override)}': '{shown_key(section)}' is a value, not a section")
            return
    tree[last] = value


def build(cls: Any, tree: dict[str, Any], prefix: str, faults: list[str]) -> Any:
    """Build a dataclass from a JSON object. Append to `faults`; keys with a fault keep their defaults."""
    types_by_name = typing.get_type_hints(cls)
    values = {}
    for key, value in tree.items():
        name = prefix + shown_key(key)
        if key not in types_by_name:
            faults.append(f"{name} is no known key; {close_to(key, types_by_name, prefix)}")
        elif dataclasses.is_dataclass(types_by_name[key]):
            if isinstance(value, dict):
                values[key] = build(types_by_name[key], value, f"{name}.", faults)
            else:
                faults.append(f"{name} = {strict_json.shown(value)} must be a section (a JSON object)")
        else:
            fitting = _fit(types_by_name[key], value)
            if fitting is None:
                bound = " (at most 2^53, and 1e30 with a fraction)" if _is_huge(value) else ""
                faults.append(f"{name} = {strict_json.shown(value)} must be {describe_type(types_by_name[key])}{bound}")
            else:
                values[key] = fitting[0]
    return cls(**values)


def shown_key(key: str) -> str:
    """Return a key as a message shows it: of one line, without control characters, and not long."""
    return printable(key if len(key) <= 60 else f"{key[:57]}...")


def close_to(key: str, known: Collection[str], prefix: str = "") -> str:
    """Return a hint for a key that is not among the known ones: the one that it resembles, or all."""
    near = difflib.get_close_matches(key, known, n=1, cutoff=0.5)
    return f"did you mean {prefix}{near[0]}?" if near else f"known keys: {', '.join(known)}"


def _fit(expected: Any, value: Any) -> tuple[Any] | None:
    """Return the value as the expected type, in a tuple; None if it does not fit."""
    origin = typing.get_origin(expected)
    if origin is Literal:
        matches = [choice for choice in typing.get_args(expected) if choice == value and type(choice) is type(value)]
        return (value,) if matches else None
    if origin in (typing.Union, types.UnionType):
        return next((fit for option in typing.get_args(expected) if (fit := _fit(option, value)) is not None), None)
    if origin is dict:
        return (value,) if isinstance(value, dict) else None
    if origin is list:
        items = [_fit(typing.get_args(expected)[0], item) for item in value] if isinstance(value, list) else [None]
        return None if None in items else ([fit[0] for fit in items if fit],)
    if expected is types.NoneType:
        return (None,) if value is None else None
    if isinstance(value, bool):
        return (value,) if expected is bool else None
    if expected is float and isinstance(value, int | float):
        return (float(value),) if abs(value) <= LARGEST_NUMBER else None
    if expected is int and isinstance(value, int | float):  # 1e9 is how people write token counts
        return (int(value),) if value == int(value) and abs(value) <= LARGEST_WHOLE_NUMBER else None
    return (value,) if isinstance(value, expected) else None


def describe_type(expected: Any) -> str:
    """Describe a type annotation for users: "a whole number or null"."""
    origin = typing.get_origin(expected)
    if origin is Literal:
        choices = [to_json(choice) for choice in typing.get_args(expected)]
        return choices[0] if len(choices) == 1 else "one of " + ", ".join(choices)
    if origin in (typing.Union, types.UnionType):
        return " or ".join(describe_type(option) for option in typing.get_args(expected))
    if origin is list:
        return f"a list of {describe_type(typing.get_args(expected)[0]).removeprefix('a ')}s"
    names = {int: "a whole number", float: "a number", bool: "true or false", str: "a string", types.NoneType: "null"}
    return names.get(expected, "an object")


def _is_huge(value: Any) -> bool:
    return isinstance(value, float | int) and abs(value) > LARGEST_WHOLE_NUMBER
