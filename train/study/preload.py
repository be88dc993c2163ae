"""Imported once by the server that forks the trainings of a study, so that each starts with the libraries loaded.

Nothing here may touch a GPU: a process that has done so cannot be forked.
"""

import signal

at_interrupt = signal.signal(signal.SIGINT, signal.SIG_IGN)  # the study, not this server, says what Ctrl-C does

from parallel.launch import choose_accelerator  # noqa: E402

choose_accelerator()

import train.loop.trainer  # noqa: E402,F401

signal.signal(signal.SIGINT, at_interrupt)
