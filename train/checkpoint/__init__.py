"""Saving and loading checkpoints that any layout can read."""
