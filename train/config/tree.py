"""Builds typed dataclasses from JSON and `section.key=value`, and collects every fault."""

import dataclasses
import difflib
import json
import sys
import sysconfig
import types
import typing
from pathlib import Path
from typing import Any, Literal

SHARED = "share/entropy-guided-transformer"
"""Folder of the environment in which a wheel installs configs/."""


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
        tree = json.loads(path.read_text(encoding="utf-8"), object_pairs_hook=_once_each)
    except ConfigError as error:
        raise ConfigError([f"{path}: {fault}" for fault in error.faults]) from None
    except FileNotFoundError:
        raise ConfigError([f"{path}: no such configuration file; shipped ones are in configs/"]) from None
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError([f"{path}: cannot be read ({error})"]) from None
    except json.JSONDecodeError as error:
        raise ConfigError([f"{path}: line {error.lineno}, column {error.colno}: not JSON ({error.msg})"]) from None
    except (ValueError, RecursionError) as error:  # a number of thousands of digits, brackets within brackets
        raise ConfigError([f"{path}: expected a JSON object with sections ({error})"]) from None
    if not isinstance(tree, dict):
        raise ConfigError([f"{path}: expected a JSON object with sections, found {type(tree).__name__}"])
    return tree


def _once_each(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Return a JSON object. Refuse a key that is given twice: the parser itself would silently take the last."""
    found = [key for key, _ in pairs]
    twice = sorted({key for key in found if found.count(key) > 1})
    if twice:
        raise ConfigError([f"{key} is given twice in one section; keep one" for key in twice])
    return dict(pairs)


def apply_override(tree: dict[str, Any], override: str, faults: list[str]) -> None:
    """Set one `section.key=value` in a configuration tree, or add a fault if the text does not have that form."""
    key, equals, text = override.partition("=")
    if not equals or not key:
        faults.append(f"{override!r} is not of the form section.key=value")
        return
    try:
        value = json.loads(text)
    except (ValueError, RecursionError):
        value = text
    *sections, last = key.split(".")
    for section in sections:
        tree = tree.setdefault(section, {})
        if not isinstance(tree, dict):
            faults.append(f"{override!r}: {section!r} is a value, not a section")
            return
    tree[last] = value


def build(cls: Any, tree: dict[str, Any], prefix: str, faults: list[str]) -> Any:
    """Build a dataclass from a JSON object. Append to `faults`; keys with a fault keep their defaults."""
    types_by_name = typing.get_type_hints(cls)
    values = {}
    for key, value in tree.items():
        name = prefix + key
        if key not in types_by_name:
            near = difflib.get_close_matches(key, types_by_name, n=1, cutoff=0.5)
            hint = f"did you mean {prefix}{near[0]}?" if near else f"known keys: {', '.join(types_by_name)}"
            faults.append(f"{name} is no known key; {hint}")
        elif dataclasses.is_dataclass(types_by_name[key]):
            if isinstance(value, dict):
                values[key] = build(types_by_name[key], value, f"{name}.", faults)
            else:
                faults.append(f"{name} = {json.dumps(value)} must be a section (a JSON object)")
        else:
            fitting = _fit(types_by_name[key], value)
            if fitting is None:
                faults.append(f"{name} = {json.dumps(value)} must be {describe_type(types_by_name[key])}")
            else:
                values[key] = fitting[0]
    return cls(**values)


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
    if expected is types.NoneType:
        return (None,) if value is None else None
    if isinstance(value, bool):
        return (value,) if expected is bool else None
    if expected is float and isinstance(value, int | float):
        return (float(value),) if abs(value) <= sys.float_info.max else None
    if expected is int and isinstance(value, float) and value.is_integer():
        return (int(value),)  # 1e9 is how people write token counts
    return (value,) if isinstance(value, expected) else None


def describe_type(expected: Any) -> str:
    """Describe a type annotation for users: "a whole number or null"."""
    origin = typing.get_origin(expected)
    if origin is Literal:
        return "one of " + ", ".join(json.dumps(choice) for choice in typing.get_args(expected))
    if origin in (typing.Union, types.UnionType):
        return " or ".join(describe_type(option) for option in typing.get_args(expected))
    names = {int: "a whole number", float: "a number", bool: "true or false", str: "a string", types.NoneType: "null"}
    return names.get(expected, "an object")
