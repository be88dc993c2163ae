"""Parallelism, applied to a model from outside: which rank holds what, and how the shards train as one model."""

import os
import sys

# `python -m parallel.compare` searches the working directory first, and so does a worker ("-c"). If this package lies
# elsewhere, so do its neighbours, and a user's folder named `data` or `model` must not hide them.
if sys.argv[:1] in (["-m"], ["-c"]) and sys.path[0] in ("", os.getcwd()) and not os.path.exists("parallel/__init__.py"):
    sys.path.append(sys.path.pop(0))
