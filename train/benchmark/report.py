"""Describes the machine and writes the result files of benchmarks."""

import platform
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

from data.files.strict_json import to_json
from train.config import ConfigError
from train.run.provenance import git_commit


def machine() -> dict[str, str]:
    """Return device, versions, date, commit and command."""
    has_gpu = torch.cuda.is_available()
    described = {
        "device": torch.cuda.get_device_name() if has_gpu else platform.processor() or platform.machine(),
        "torch": torch.__version__,
        "date": time.strftime("%Y-%m-%d"),
        "commit": git_commit() or "unknown",
        "command": "python -m train.benchmark " + " ".join(sys.argv[1:]),
    }
    if has_gpu:
        import triton

        described["triton"] = triton.__version__
    return described


def make_folder(folder: Path) -> None:
    """Create the output folder. Raise ConfigError if it cannot be written, before anything is timed."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=folder).close()
    except OSError as error:
        raise ConfigError([f"--output {folder}: cannot be written ({error.strerror}); choose another folder"]) from None


def write(folder: Path, name: str, report: dict[str, Any], table: str) -> None:
    """Write NAME.json and NAME.md to `folder`, and print the table."""
    (folder / f"{name}.json").write_text(to_json(report, indent=1))
    (folder / f"{name}.md").write_text(table)
    print(table)
