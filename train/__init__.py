"""The application: configuration, the training loop, evaluation, pictures."""

import os
import sys

# `python -m train.plan` and worker processes ("-c") search the working directory first. If this package was
# found elsewhere, search it last, so that a user's own folder `data` or `model` hides none of ours.
if sys.argv[:1] in (["-m"], ["-c"]) and sys.path[0] in ("", os.getcwd()) and not os.path.exists("train/__init__.py"):
    sys.path.append(sys.path.pop(0))
