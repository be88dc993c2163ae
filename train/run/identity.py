"""A run's identity: a random number in hexadecimal, drawn when the run begins and kept for as long as it goes on.

    {"run_id": "9f86d081884c7d65", "run_dir": "/scratch/runs/first"}

run.json holds it in the run's folder, in the folder or store of its checkpoints, and in each checkpoint. What lies
beside it belongs to that run: no other run resumes it, overwrites it or deletes it.
"""

import re
import secrets
from dataclasses import asdict, dataclass
from typing import Any

from data.files.strict_json import check_shape, parse_json, to_json

MOST_BYTES = 1 << 16


@dataclass(frozen=True)
class Identity:
    """Which run it is.

    Attributes:
        run_id: the same in every copy.
        run_dir: absolute path of its folder when this copy was written; only for messages, and '' if unknown.
    """

    run_id: str
    run_dir: str = ""

    def to_json(self) -> str:
        """Return the content of a file `run.json`."""
        return to_json(asdict(self)) + "\n"


def new_run_id() -> str:
    """Draw an identity that no other run has."""
    return secrets.token_hex(8)


def parse_identity(content: str | bytes) -> Identity | None:
    """Return the identity that a file holds; None if it holds none, say because it is damaged."""
    try:
        tree = parse_json(content)
        check_shape(tree, {"run_id": str})
    except ValueError:
        return None
    run_dir = tree.get("run_dir")
    return identity_or_none(tree["run_id"], run_dir if isinstance(run_dir, str) else "")


def identity_or_none(run_id: Any, run_dir: str = "") -> Identity | None:
    """Return the identity of this number; None if it cannot be one."""
    is_one = isinstance(run_id, str) and re.fullmatch(r"[0-9A-Za-z_.-]{1,64}", run_id)
    return Identity(run_id, run_dir) if is_one else None
