"""Measure how far rounding moves the golden losses, over configurations, threads and instruction sets:

    python -m tests.golden.spread

The tolerance in `tests/golden/losses.py` comes from its output under each tested version of torch.
"""

import itertools
import os
import subprocess
import sys

from parallel.local_ranks import run_ranks
from tests.golden.losses import Losses, distance, first_losses, read_sections, torch_release
from tests.golden.small import SHIPPED

INSTRUCTION_SETS = {
    "portable": {"ATEN_CPU_CAPABILITY": "default", "MKL_CBWR": "COMPATIBLE", "ONEDNN_MAX_CPU_ISA": "SSE41"},
    "AVX2": {"ATEN_CPU_CAPABILITY": "avx2", "MKL_CBWR": "AVX2", "ONEDNN_MAX_CPU_ISA": "AVX2"},
    "all": {},
}
"""Variables that torch, MKL and oneDNN read at start; with them one CPU computes as others do."""
THREADS = 1, 2


def main() -> None:
    if len(sys.argv) > 1:
        print(moved(sys.argv[1]))
        return
    for name, variables in INSTRUCTION_SETS.items():
        command = [sys.executable, "-m", "tests.golden.spread", name]
        subprocess.run(command, env={**os.environ, **variables}, check=True)


def moved(instruction_set: str) -> str:
    """Measure in this environment; return a line with the largest distance of each configuration."""
    distances = dict.fromkeys(SHIPPED, 0.0)
    for name, threads in itertools.product(SHIPPED, THREADS):
        (losses,) = run_ranks(losses_with, 1, name, threads)
        distances[name] = max(distances[name], distance(losses, read_sections(name)[torch_release()]))
    numbers = ", ".join(f"{name} {value:.1e}" for name, value in distances.items())
    return f"torch {torch_release()}, {instruction_set} instructions: {numbers}"


def losses_with(name: str, threads: int) -> Losses:
    return first_losses(name, threads=threads)


if __name__ == "__main__":
    main()
