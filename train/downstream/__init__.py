"""Measures a model on tasks while it trains."""
