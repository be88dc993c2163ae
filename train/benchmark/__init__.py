"""Benchmarks of the attention kernel, the training step and the loss curve."""
