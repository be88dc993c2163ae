"""The application: configuration, the training loop, evaluation, pictures."""

import os
import sys

# `python -m train.plan` looks in the working directory first, and so does a worker ("-c"). If this package lies
# elsewhere, so do its neighbours: a folder of the user's named `data` or `model` must not hide them.
if sys.argv[:1] in (["-m"], ["-c"]) and sys.path[0] in ("", os.getcwd()) and not os.path.exists("train/__init__.py"):
    sys.path.append(sys.path.pop(0))
