"""Measures the scales of tapered norms (model/taper.py) over all ranks, by one forward pass.

A rank adds up what its tokens contribute. Replicas have other sequences or positions, and so have tensor-parallel ranks
under sequence parallelism. Without it they repeat each other's sums, and the ratio of two sums stays as it is.
"""

from collections.abc import Callable
from functools import partial

import torch
import torch.distributed as dist
from torch import Tensor

from model.taper import TaperNorm
from parallel.sharding.megatron import Groups


@torch.no_grad()
def calibrate(norms: list[TaperNorm], groups: Groups, run: Callable[[], object]) -> None:
    """Set the scale of a stage's norms; all ranks call.

    Args:
        norms: of this stage.
        run: passes micro-batches through the stage, calling its modules one by one: compiled blocks have no hooks.
    """
    sums = torch.zeros(len(norms), 2, dtype=torch.float64, device=norms[0].scale.device)

    def measure(own: Tensor, norm: TaperNorm, inputs: tuple[Tensor]) -> None:
        own += norm.moments(inputs[0])

    hooks = [norm.register_forward_pre_hook(partial(measure, own)) for norm, own in zip(norms, sums, strict=True)]
    run()
    for hook in hooks:
        hook.remove()
    for group in (groups.data, groups.tensor):
        dist.all_reduce(sums, group=group)
    for norm, (inverses, whole) in zip(norms, sums, strict=True):
        norm.scale.copy_(inverses / whole)
