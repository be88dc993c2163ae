"""The configuration handed to DeepSpeed, which ignores top-level keys that it does not know and raises pydantic's
errors for those below: both become one line here.
"""

import contextlib
import copy
import json
from collections.abc import Iterator
from typing import Any

import pydantic


class DeepSpeedSectionError(ValueError):
    """The section `deepspeed` of a configuration is not what DeepSpeed takes; a line for each fault."""


class _WatchedDict(dict[str, Any]):
    """Remembers which of its keys anybody asked for; so do its copies."""

    def __init__(self, items: dict[str, Any], asked: set[Any]) -> None:
        super().__init__(items)
        self.asked = asked

    def __getitem__(self, key: Any) -> Any:
        self.asked.add(key)
        return super().__getitem__(key)

    def __contains__(self, key: Any) -> bool:
        self.asked.add(key)
        return super().__contains__(key)

    def get(self, key: Any, default: Any = None) -> Any:
        self.asked.add(key)
        return super().get(key, default)

    def keys(self) -> Any:
        return self  # DeepSpeed asks `key in config.keys()`

    def __deepcopy__(self, memo: Any) -> "_WatchedDict":
        return _WatchedDict({key: copy.deepcopy(value, memo) for key, value in self.items()}, self.asked)


@contextlib.contextmanager
def handed_over(config: dict[str, Any], own: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """DeepSpeed's configuration while it is read.

    Args:
        own: the user's part of it.

    Raises:
        DeepSpeedSectionError: at the start, if DeepSpeed refuses something; at the end, if it has not asked for some of
            the user's keys.
    """
    _check_values(config, own)
    watched = _WatchedDict(config, set())
    yield watched
    unknown = sorted(own.keys() - watched.asked)
    if unknown:
        raise DeepSpeedSectionError(
            "\n".join(
                f"deepspeed.{key} = {own[key]!r} is no key that DeepSpeed reads; mend its spelling or remove it"
                for key in unknown
            )
        )


def _check_values(config: dict[str, Any], own: dict[str, Any]) -> None:
    """Has DeepSpeed read the configuration; it takes some values of the wrong type, which its engine fails on later."""
    if not own:
        return
    from deepspeed.runtime.config import DeepSpeedConfig

    try:
        read = DeepSpeedConfig(copy.deepcopy(config))
    except pydantic.ValidationError as error:
        raise DeepSpeedSectionError("\n".join(_line(error.title, fault) for fault in error.errors())) from None
    except Exception as error:
        text = f"deepspeed: of {json.dumps(own)} DeepSpeed says '{error}'; mend or remove what it names"
        raise DeepSpeedSectionError(text) from None
    defaults = DeepSpeedConfig({key: value for key, value in config.items() if key not in own})
    switches = [key for key in own if isinstance(getattr(defaults, key, None), bool)]
    faults = [(key, "true or false") for key in switches if not isinstance(getattr(read, key), bool)]
    often = read.steps_per_print
    if often is not None and (not isinstance(often, int) or often < 1):
        faults.append(("steps_per_print", "a whole number from 1, or null"))
    if faults:
        lines = (f"deepspeed.{key} = {json.dumps(own[key])} must be {wanted}" for key, wanted in faults)
        raise DeepSpeedSectionError("\n".join(lines))


def _line(model: str, fault: Any) -> str:
    place = ".".join(map(str, fault["loc"]))
    return f"deepspeed: {place} = {fault['input']!r} of {model}: {fault['msg']}; mend it or remove it"
