"""Check the values in the user's `deepspeed` section, so that a wrong one gives one clear error line.

DeepSpeed reports some with pydantic's errors, and fails on others only later. Its keys are checked where the
configuration is (train/config/config.py).
"""

import copy
import json
from typing import Any

import pydantic


class DeepSpeedSectionError(ValueError):
    """DeepSpeed does not accept the section `deepspeed` of a configuration; one line a fault."""


def check_values(config: dict[str, Any], own: dict[str, Any]) -> None:
    """Let DeepSpeed parse the configuration, and check types that it accepts here but fails on later.

    Args:
        config: the whole configuration.
        own: the user's part of it.

    Raises:
        DeepSpeedSectionError: DeepSpeed refuses a value.
    """
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
