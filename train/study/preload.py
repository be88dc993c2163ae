"""Import the libraries once, in the server that forks the trainings of a study, so that each training starts at once.

Nothing here may touch a GPU: a process that has done so cannot be forked.
"""

import signal

at_interrupt = signal.signal(signal.SIGINT, signal.SIG_IGN)  # the study answers Ctrl-C, not this server

from parallel.launch import choose_accelerator  # noqa: E402

choose_accelerator()

import train.loop.trainer  # noqa: E402,F401

signal.signal(signal.SIGINT, at_interrupt)
