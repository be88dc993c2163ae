"""Counts what a model costs: parameters, FLOPs, step time. The only place that does."""
