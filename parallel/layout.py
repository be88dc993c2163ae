"""A layout as one command-line argument: `tp=2:pp=2:sp=1:acc=4`."""

from dataclasses import dataclass
from typing import Any

RECOMPUTE = ("none", "selective", "full")
KEYS = {
    "tp": "tensor-parallel ranks",
    "pp": "pipeline stages",
    "dp": "data-parallel ranks",
    "cp": "context-parallel ranks",
    "sp": "sequence parallelism, 0 or 1",
    "zero": "ZeRO stage, 1, 2 or 3",
    "acc": "micro-batches in a step",
    "recompute": "activation recomputation, none, selective or full",
}


@dataclass(frozen=True)
class Layout:
    """Sizes of the axes and other settings that do not change the result; acc=None keeps the configuration's."""

    tp: int = 1
    pp: int = 1
    dp: int = 1
    cp: int = 1
    sp: int = 0
    zero: int = 1
    acc: int | None = None
    recompute: str = "none"

    @property
    def world_size(self) -> int:
        return self.tp * self.pp * self.dp * self.cp

    def __str__(self) -> str:
        default = Layout()
        named = [f"{key}={getattr(self, key)}" for key in KEYS if getattr(self, key) != getattr(default, key)]
        return ":".join(named) or "tp=1"


def parse_layout(text: str) -> Layout:
    """Parse a layout: 'tp=2:sp=1' -> Layout(tp=2, sp=1).

    Raises:
        ValueError: a key is unknown or repeated, or a value is not allowed; one line a fault.
    """
    values: dict[str, Any] = {}
    faults = []
    for part in text.split(":"):
        key, _, value = part.partition("=")
        if key not in KEYS:
            known = ", ".join(f"{name} ({meaning})" for name, meaning in KEYS.items())
            faults.append(f"layout {text!r}: {part!r} is no key=value of a layout; the keys are {known}")
        elif key in values:
            faults.append(f"layout {text!r}: {key} is given twice; give it once")
        elif (fault := _value_fault(key, value)) is not None:
            faults.append(f"layout {text!r}: {key}={value} must be {fault}")
        else:
            values[key] = value if key == "recompute" else int(value)
    if faults:
        raise ValueError("\n".join(faults))
    return Layout(**values)


def _value_fault(key: str, value: str) -> str | None:
    """Describe the values that are allowed; return None if this one is."""
    choices = {"recompute": RECOMPUTE, "sp": ("0", "1"), "zero": ("1", "2", "3")}
    if key in choices:
        return None if value in choices[key] else "one of " + ", ".join(choices[key])
    return None if value.isdecimal() and int(value) >= 1 else "a whole number of at least 1"
