"""Fuzzers of every parser of files that come from outside: any bytes give a result or one clear message."""
