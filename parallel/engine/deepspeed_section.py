"""Check the user's `deepspeed` section, so that a wrong key or value gives one clear error line.

DeepSpeed ignores unknown top-level keys, and reports unknown nested keys with pydantic's errors.
"""

import contextlib
import copy
import json
from collections.abc import Iterator
from typing import Any

import pydantic


class DeepSpeedSectionError(ValueError):
    """DeepSpeed does not accept the section `deepspeed` of a configuration; one line a fault."""


class _WatchedDict(dict[str, Any]):
    """Records which of its keys were read, also through its copies."""

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
        return self  # so that `key in config.keys()`, as DeepSpeed asks, is recorded

    def __deepcopy__(self, memo: Any) -> "_WatchedDict":
        return _WatchedDict({key: copy.deepcopy(value, memo) for key, value in self.items()}, self.asked)


@contextlib.contextmanager
def handed_over(config: dict[str, Any], own: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """Yield the configuration for DeepSpeed to read, and check that it reads every key of the user's.

    Args:
        config: the whole configuration.
        own: the user's part of it.

    Raises:
        DeepSpeedSectionError: at the start, if DeepSpeed refuses a value; at the end, if it has not read one of the
            user's keys.
    """
    _check_values(config, own)
    watched = _WatchedDict(config, set())
    yield watched
    unknown = sorted(own.keys() - watched.asked)
    if unknown:
        raise DeepSpeedSectionError(
            "\n".join(
                f"deepspeed.{key} = {own[key]!r} is no key that DeepSpeed reads; fix its spelling or remove it"
                for key in unknown
            )
        )


def _check_values(config: dict[str, Any], own: dict[str, Any]) -> None:
    """Let DeepSpeed parse the configuration, and check types that it accepts here but fails on later."""
    if not own:
        return
    from deepspeed.runtime.config import DeepSpeedConfig

    try:
        read = DeepSpeedConfig(copy.deepcopy(config))
    except pydantic.ValidationError as error:
        raise DeepSpeedSectionError("\n".join(_line(error.title, fault) for fault in error.errors())) from None
    except Exception as error:
        text = f"deepspeed: of {json.dumps(own)} DeepSpeed says '{error}'; fix or remove what it names"
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
    return f"deepspeed: {place} = {fault['input']!r} of {model}: {fault['msg']}; fix it or remove it"
