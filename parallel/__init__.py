"""Parallelism applied from outside: which rank holds what, and how shards become one model again."""
