"""Imported once by the fork server of `parallel.local_ranks`, so that each rank starts with everything loaded."""

from parallel.launch import choose_accelerator

choose_accelerator()

import parallel.engine.engine  # noqa: E402,F401
import train.parts  # noqa: E402,F401
