"""Imported once by the fork server of `tests.ranks`, so that each rank starts with everything loaded."""

from parallel.launch import choose_accelerator

choose_accelerator()

import parallel.engine  # noqa: E402,F401
