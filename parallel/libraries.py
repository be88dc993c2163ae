"""Check what this project relies on in other libraries, and replace functions of theirs in one way only.

Only parallel/deepspeed_internals.py names private parts of DeepSpeed, and only parallel/sharding/megatron.py uses
megatron-core. Each checks its names against the installed version before anything is built.
"""

import dis
import importlib.metadata
import inspect
from collections.abc import Callable
from typing import Any

SUPPORTED = {"deepspeed": ">=0.19.8,<0.20", "megatron-core": ">=0.16.1,<0.17"}
"""Versions that are tested; pyproject.toml states the same."""


class LibraryChangedError(RuntimeError):
    """The installed version of a library lacks something that this project relies on.

    Args:
        library: a key of SUPPORTED.
        what: the sentence after the library's name and version: "has no bf16_optimizer.BF16_Optimizer".
    """

    def __init__(self, library: str, what: str) -> None:
        super().__init__(
            f"{library} {_version(library)} {what}, on which this project relies; "
            f"install a supported version: pip install '{library}{SUPPORTED[library]}'"
        )


def require(library: str, owner: Any, name: str, parameters: str | None = None) -> None:
    """Check that a module, class or object has an attribute, and that its parameters are the expected ones.

    Args:
        library: a key of SUPPORTED.
        owner: a module, a class or an object.
        name: of the attribute.
        parameters: names as in a signature, without `self`: "grads, elements_per_buffer"; None skips the check.

    Raises:
        LibraryChangedError: it has not.
    """
    if not hasattr(owner, name):
        raise LibraryChangedError(library, f"has no {_named(owner)}.{name}")
    if parameters is not None and (found := _parameters(getattr(owner, name))) != parameters:
        raise LibraryChangedError(library, f"has {_named(owner)}.{name}({found}), not {name}({parameters})")


def require_arguments(library: str, owner: Any, name: str, positional: str = "", keywords: str = "") -> None:
    """Check that a function or class can be called the way this project calls it; it may take more.

    Args:
        library: a key of SUPPORTED.
        owner: a module or class.
        name: of the function or class.
        positional: names of the parameters that are passed by position: "input_size, output_size".
        keywords: names of those that are passed by keyword.

    Raises:
        LibraryChangedError: there is nothing of that name, or it takes other parameters.
    """
    require(library, owner, name)
    found = _parameters(getattr(owner, name))
    by_position, by_keyword = ([each for each in names.split(", ") if each] for names in (positional, keywords))
    if found.split(", ")[: len(by_position)] != by_position or not {*by_keyword} <= {*found.split(", ")}:
        wanted = ", ".join([*by_position, *by_keyword])
        raise LibraryChangedError(library, f"has {_named(owner)}.{name}({found}), not ({wanted})")


def require_assigned(library: str, owner: type, *names: str) -> None:
    """Check that a class sets attributes on its instances: one of its own methods assigns each to an attribute.

    Raises:
        LibraryChangedError: it does not.
    """
    methods = [inspect.unwrap(member).__code__ for member in vars(owner).values() if inspect.isfunction(member)]
    known = [code for code in methods if not set(names).isdisjoint(code.co_names)]
    stored = {each.argval for code in known for each in dis.get_instructions(code) if each.opname == "STORE_ATTR"}
    for name in names:
        if name not in stored:
            raise LibraryChangedError(library, f"sets no attribute {name} in {_named(owner)}")


def replace(library: str, owner: Any, name: str, function: Callable[..., Any]) -> None:
    """Put a function of ours in the place of a library's; both must take the same parameters.

    Raises:
        LibraryChangedError: there is nothing of that name, or it takes other parameters.
    """
    require(library, owner, name, _parameters(function))
    setattr(owner, name, function)


def _parameters(function: Callable[..., Any]) -> str:
    return ", ".join(name for name in inspect.signature(function).parameters if name != "self")


def _named(owner: Any) -> str:
    return str(getattr(owner, "__qualname__", None) or getattr(owner, "__name__", None) or type(owner).__qualname__)


def _version(library: str) -> str:
    try:
        return importlib.metadata.version(library)
    except importlib.metadata.PackageNotFoundError:
        return "(unknown version)"
