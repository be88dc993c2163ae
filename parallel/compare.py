"""The door of `python -m parallel.compare`; the comparison itself needs configurations and lies in train/compare/.

This is the only file of `parallel/` that imports anything of `train/`.
"""

from data.command_line import run_command
from train.compare.command import main

__all__ = ["main"]

if __name__ == "__main__":
    run_command(main)
