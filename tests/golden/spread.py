"""Measure how far the golden losses move on this machine, over configurations, threads and instruction sets:

    python -m tests.golden.spread

The tolerance in `tests/golden/losses.py` comes from what this prints under each tested version of torch.
"""

import itertools
import os
import subprocess
import sys

import torch

from parallel.local_ranks import run_ranks
from tests.golden.losses import Losses, distance, first_losses, read_sections, torch_release
from tests.golden.small import SHIPPED

INSTRUCTION_SETS = "default", "avx2", "avx512"
"""Values of ATEN_CPU_CAPABILITY, which torch reads when it starts; a CPU without one falls back to another."""
THREADS = 1, 2


def main() -> None:
    if sys.argv[1:] == ["--here"]:
        print(line())
        return
    for chosen in INSTRUCTION_SETS:
        environment = {**os.environ, "ATEN_CPU_CAPABILITY": chosen}
        subprocess.run([sys.executable, "-m", "tests.golden.spread", "--here"], env=environment, check=True)


def line() -> str:
    """Measure with the instruction set of this process; return the version, the set and the distances."""
    capability = torch.backends.cpu.get_cpu_capability()
    moved = {}
    for name, threads in itertools.product(SHIPPED, THREADS):
        (losses,) = run_ranks(losses_with, 1, name, threads)
        moved[name] = max(moved.get(name, 0.0), distance(losses, read_sections(name)[torch_release()]))
    return f"torch {torch_release()}, {capability}: " + ", ".join(f"{name} {d:.1e}" for name, d in moved.items())


def losses_with(name: str, threads: int) -> Losses:
    return first_losses(name, threads=threads)


if __name__ == "__main__":
    main()
