"""Scaling laws of an architecture: plan a ladder of runs, fit a law to their losses, predict from it."""
