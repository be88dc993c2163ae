"""Read the tested versions of torch from pyproject.toml; needs the standard library only.

The Makefile runs:

    python -m tests.versions others               # the tested versions without the one in constraints.txt
    python -m tests.versions tests                # the tests that run under each of them
    python -m tests.versions constraints 2.11.0   # constraints.txt for an environment with this torch
"""

import re
import sys
import tomllib
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
PINNED_BY_TORCH = {"torch", "triton", "setuptools"}
"""Packages whose version depends on the version of torch."""


def pyproject() -> dict[str, Any]:
    """Read pyproject.toml."""
    return tomllib.loads((ROOT / "pyproject.toml").read_text())


def settings() -> dict[str, Any]:
    """Read the table [tool.entropy-guided-transformer] of pyproject.toml."""
    return pyproject()["tool"]["entropy-guided-transformer"]


def torch_versions() -> list[str]:
    """Return the tested versions of torch, oldest first."""
    return settings()["tested-torch"]


def pins() -> dict[str, str]:
    """Return the lines of constraints.txt by name of the package."""
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    return {line.partition("==")[0]: line for line in lines if "==" in line}


def other_versions() -> list[str]:
    """Return the tested versions other than the one in constraints.txt."""
    return [version for version in torch_versions() if pins()["torch"] != f"torch=={version}"]


def constraints(version: str) -> list[str]:
    """Return the lines of constraints.txt for another version of torch."""
    needs = settings()["torch-needs"].get(version, [])
    own = PINNED_BY_TORCH | {re.split("[=<>~!]", need)[0] for need in needs}
    return [line for name, line in pins().items() if name not in own] + [f"torch=={version}", *needs]


if __name__ == "__main__":
    match sys.argv[1:]:
        case ["others"]:
            print(*other_versions())
        case ["tests"]:
            print(*settings()["torch-tests"])
        case ["constraints", version]:
            print(*constraints(version), sep="\n")
        case _:
            sys.exit(__doc__)
