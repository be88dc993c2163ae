"""Figures: curves, maps of heads, and their common style."""
