"""Scaling laws of an architecture: a ladder of runs, fits of its losses, and what they predict."""
