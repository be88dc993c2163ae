"""Collects what a rank runs, as a flat table that is compared with those of other ranks.

Some things may differ between nodes and are left out. `PLACES` are where a node finds or keeps files; the dataset
itself is compared. The commit is left out because a copy of the code has none, and that of a modified checkout says too
little; the source files themselves are compared.
"""

import hashlib
import importlib.metadata
import os
import platform
from pathlib import Path
from typing import Any

from data.files.strict_json import to_json
from data.shards.manifest import Manifest
from parallel.processes.place import place
from train.config import Config

Facts = dict[str, str]

PLACES = {
    "data.cache_dir",  # a node's own disk
    "data.cache_gigabytes",  # the room on it
    "data.path",  # may be a node's own copy: its fingerprint is compared instead
}
SOURCES = ("model", "parallel", "data", "train")
PACKAGES = ("torch", "deepspeed", "megatron-core", "triton", "numpy")
VARIABLES = (
    "CUBLAS_WORKSPACE_CONFIG",
    "NCCL_ALGO",
    "NCCL_PROTO",
    "NVIDIA_TF32_OVERRIDE",
    "TORCHDYNAMO_DISABLE",
    "TORCH_ALLOW_TF32_CUBLAS_OVERRIDE",
    "TORCH_COMPILE_DISABLE",
    "TRITON_INTERPRET",
)
"""Environment variables that change results, or that NCCL needs to be the same on every rank."""


def config_facts(config: Config) -> Facts:
    """Flatten the resolved configuration to dotted keys with JSON values."""
    flat: Facts = {}
    _flatten("", config.as_dict(), flat)
    return {key: value for key, value in flat.items() if key not in PLACES}


def dataset_facts(manifest: Manifest) -> Facts:
    """Identify the dataset's content, wherever it lies."""
    return {
        "dataset vocab_size": str(manifest.vocab_size),
        "dataset tokenizer_sha256": manifest.tokenizer_sha256,
        "dataset fingerprint": manifest.fingerprint,
    }


def source_facts(root: Path | None = None) -> Facts:
    """Return a digest of each of the project's own Python files below `root` (default: where this file lies)."""
    root = root or Path(__file__).resolve().parents[2]
    files = sorted(file for package in SOURCES for file in (root / package).rglob("*.py"))
    return {f"source {file.relative_to(root)}": hashlib.sha256(file.read_bytes()).hexdigest()[:12] for file in files}


def environment_facts() -> Facts:
    """Return the kind of accelerator, versions, and environment variables; creates no CUDA context."""
    import torch

    facts = {
        "WORLD_SIZE": str(place().world_size),
        "accelerator": "cuda" if torch.cuda.is_available() else "cpu",
        "version python": platform.python_version(),
        "version cuda": str(torch.version.cuda),
        "version nccl": _nccl_version(),
    }
    facts.update((f"version {package}", _version(package)) for package in PACKAGES)
    facts.update((f"variable {name}", os.environ.get(name, "unset")) for name in VARIABLES)
    return facts


def _nccl_version() -> str:
    import torch

    if torch.version.cuda is None:
        return "none"
    return ".".join(map(str, torch.cuda.nccl.version()))


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def _flatten(prefix: str, value: Any, flat: Facts) -> None:
    if isinstance(value, dict) and value:
        for key, inner in value.items():
            _flatten(f"{prefix}.{key}" if prefix else str(key), inner, flat)
    else:
        flat[prefix] = to_json(value)
