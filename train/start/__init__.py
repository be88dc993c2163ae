"""Checks before any device is used: whether the run can start, and whether all ranks run the same thing."""
