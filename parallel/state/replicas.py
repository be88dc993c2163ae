"""Check that copies of a parameter on several ranks stay bit-identical.

Each rank reduces its copy to two 64-bit sums over its bits, one of them weighted by position. The sums are gathered
over each group that shares the parameter, and compared. A copy that drifted (a faulty device, a lost reduction) is
found by name within `parallel.replica_check_interval` steps.

    over replicas         every parameter, unless ZeRO-3 has partitioned it
    over tensor ranks     parameters that are not split
    over pipeline ends    a tied embedding
"""

from collections import Counter
from collections.abc import Mapping

import torch
import torch.distributed as dist
from torch import Tensor, nn

from model.initialize import named_parameters
from parallel.deepspeed_internals import is_partitioned, partition
from parallel.sharding.megatron import Groups
from parallel.sharding.stage import Stage

INTEGERS = {2: torch.int16, 4: torch.int32, 8: torch.int64}
CHUNK = 1 << 20  # elements summed at once, about 24 bytes each, since memory may be nearly full during training


class ReplicaError(RuntimeError):
    """Copies of a parameter differ; one line that names it, or refers to the rank that does."""


def check_replicas(stage: Stage, groups: Groups) -> None:
    """Compare every copied parameter over its groups; all ranks call.

    Raises:
        ReplicaError: on every rank, if any rank found copies that differ.
    """
    parameters = dict(named_parameters(stage.transformer))
    whole = {name: p for name, p in parameters.items() if not is_partitioned(p)}
    not_split = {name: local_values(p, groups) for name, p in parameters.items() if p.partition_dim is None}
    found = [
        *_differing(whole, groups.data, "replica (data- and context-parallel)"),
        *_differing(not_split, groups.tensor, "tensor-parallel"),
    ]
    tied = stage.tied_weight
    if tied is not None and groups.embedding_ends is not None:
        found += _differing({"embedding.word.weight (tied to the head)": tied}, groups.embedding_ends, "pipeline-end")
    total = torch.tensor([len(found)], device=next(stage.parameters()).device)
    dist.all_reduce(total)
    if found:
        raise ReplicaError(
            f"{found[0]}{f' ({len(found)} such parameters)' if len(found) > 1 else ''}; training stops, since results "
            "are no longer those of one model: restart from the last checkpoint, and suspect the device of the odd rank"
        )
    if int(total):
        raise ReplicaError("another rank found copies of a parameter that differ; its message names them")


def local_values(parameter: nn.Parameter, groups: Groups) -> Tensor:
    """Return the parameter, or this replica's part of it, without padding, if ZeRO-3 has partitioned it."""
    if not is_partitioned(parameter):
        return parameter
    held = partition(parameter)
    return held.values.flatten()[: min(held.size, max(0, held.whole - groups.grid.replica * held.size))]


def _differing(parameters: Mapping[str, Tensor], group: dist.ProcessGroup, kind: str) -> list[str]:
    """Return a sentence for each parameter whose copies differ over the group."""
    if group.size() == 1 or not parameters:
        return []
    own = torch.stack([fingerprint(parameter) for parameter in parameters.values()])
    gathered = own.new_empty((group.size(), *own.shape))
    dist.all_gather_into_tensor(gathered.flatten(0, 1), own, group=group)
    same = (gathered == gathered[0]).all(dim=2).all(dim=0)
    ranks = dist.get_process_group_ranks(group)
    sentences = []
    for index, name in enumerate(parameters):
        if not bool(same[index]):
            sums = [tuple(row) for row in gathered[:, index].tolist()]
            usual, _ = Counter(sums).most_common(1)[0]
            odd = [rank for rank, value in zip(ranks, sums, strict=True) if value != usual]
            rest = [rank for rank in ranks if rank not in odd]
            sentences.append(f"{name} differs over {kind} ranks: rank {_listed(odd)} against {_listed(rest)}")
    return sentences


@torch.no_grad()
def fingerprint(values: Tensor, chunk: int = CHUNK) -> Tensor:
    """Return two sums over a tensor's bits, [2] int64; different bits almost certainly give different sums.

    Sums wrap around at 64 bits, so they do not depend on the chunk size.

    Args:
        values: of 2, 4 or 8 bytes an element.
        chunk: elements summed at once.
    """
    bits = values.detach().contiguous().view(INTEGERS[values.element_size()]).flatten()
    sums = torch.zeros(2, dtype=torch.int64, device=bits.device)
    for start in range(0, bits.numel(), chunk):
        part = bits[start : start + chunk].to(torch.int64)
        positions = torch.arange(start + 1, start + 1 + part.numel(), device=bits.device, dtype=torch.int64)
        sums[0] += part.sum()
        sums[1] += positions.mul_(part).sum()
    return sums


def _listed(ranks: list[int]) -> str:
    return ", ".join(map(str, ranks))
