"""Tests of Triton kernels: on a CUDA device where there is one, else under Triton's interpreter.

Triton decides on its interpreter when it is first imported, so without a device a test of each such file runs the file
again, in a process of its own.
"""

import os
import subprocess
import sys

import pytest
import torch

from model.entropy_attention import HAS_TRITON

HAS_CUDA = torch.cuda.is_available()
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
DEVICE = "cuda" if HAS_CUDA and not INTERPRETED else "cpu"

needs_kernels = pytest.mark.skipif(not (HAS_CUDA or INTERPRETED), reason="runs below, under the interpreter")
starts_the_interpreter = pytest.mark.skipif(
    HAS_CUDA or INTERPRETED or not HAS_TRITON, reason="the kernels' tests run directly, or Triton is missing"
)


def run_interpreted(file: str, *options: str) -> None:
    """Runs a test file with pytest's `options` under the interpreter, and asserts that its tests passed."""
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", file, *options]
    run = subprocess.run(command, env=os.environ | {"TRITON_INTERPRET": "1"}, capture_output=True, text=True)
    assert run.returncode == 0, run.stdout[-4000:]
    assert "passed" in run.stdout
