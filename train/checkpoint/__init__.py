"""Save and load checkpoints that any layout can read."""
