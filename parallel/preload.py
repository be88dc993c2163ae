"""Load the engine once in the fork server of `parallel.local_ranks`, so that each rank starts with it loaded."""

from parallel.launch import choose_accelerator

choose_accelerator()

import parallel.engine.engine  # noqa: E402,F401
