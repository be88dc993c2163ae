"""Import once what the ranks of train.benchmark scaling need, in the server that forks them.

Nothing here may touch a GPU: a process that has done so cannot be forked.
"""

from parallel.launch import choose_accelerator

choose_accelerator()

import torch.distributed.fsdp  # noqa: E402
import torch.distributed.tensor.parallel  # noqa: E402,F401

import train.benchmark.measure  # noqa: E402
import train.benchmark.peer  # noqa: E402
import train.parts  # noqa: E402,F401
