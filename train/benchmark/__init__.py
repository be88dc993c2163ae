"""Benchmarks of the attention kernel, the training step and learning."""
