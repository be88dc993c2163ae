"""The command `python -m parallel.compare`; the comparison needs configurations, so its code is in train/compare/.

No other file of `parallel/` imports anything of `train/`.
"""

from data.command_line import run_command
from train.compare.command import main

__all__ = ["main"]

if __name__ == "__main__":
    run_command(main)
