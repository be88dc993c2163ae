"""Imported once by the server that forks the trainings of a study, so that each starts with the libraries loaded.

Nothing here may touch a GPU: a process that has done so cannot be forked.
"""

from parallel.launch import choose_accelerator

choose_accelerator()

import train.trainer  # noqa: E402,F401
