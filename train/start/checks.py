"""The checks of train.doctor. All ranks run them together, and each measures itself."""

import contextlib
import os
import platform
import secrets
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from fsspec.implementations.local import LocalFileSystem
from torch import Tensor
from torch.distributed import ProcessGroup

from data.errors import DataError
from data.shards.manifest import SPLITS
from data.stream.dataset import open_dataset
from data.stream.samples import open_shard
from parallel.launch import local_device
from parallel.sharding.megatron import Groups
from train.checkpoint.folder import Folder, verify_file
from train.config import Config
from train.cost.parameters import total_parameters
from train.run.provenance import description

ON_GPU = torch.cuda.is_available()
MATRIX = 8192 if ON_GPU else 512
COLLECTIVE_BYTES = (1 << 28) if ON_GPU else (1 << 22)
DISK_BYTES = (1 << 30) if ON_GPU else (1 << 25)
REPEATS = 5
SAMPLE_SHARDS = 4
BYTES_PER_PARAMETER = 12  # float32 master copy and two moments


@dataclass
class Finding:
    """The result of one check on one rank: a number to compare ranks by, error messages, and a measured link."""

    check: str
    unit: str = ""
    value: float | None = None
    faults: list[str] = field(default_factory=list)
    link: dict[str, Any] | None = None


def version_table(config: Config) -> dict[str, str]:
    """Return versions and device names, which must be the same on all ranks."""
    known = {**description(config)["versions"], "cuda": str(torch.version.cuda)}
    if ON_GPU:
        known["gpu"] = torch.cuda.get_device_name()
    return known


def matmul() -> Finding:
    """Measure the speed of a matrix product, and check its result.

    A product of matrices of small integers is exact. Its sum must equal the product of column sums and row sums, so no
    reference device is needed.
    """
    finding, device = Finding("matmul", "TFLOP/s" if ON_GPU else "GFLOP/s"), local_device()
    dtype = torch.bfloat16 if ON_GPU else torch.float32
    generator = torch.Generator().manual_seed(dist.get_rank())
    a, b = (torch.randint(-2, 3, (MATRIX, MATRIX), generator=generator).to(device, dtype) for _ in range(2))
    expected = a.double().sum(0) @ b.double().sum(1)
    if (_exact_sum(a, b) - expected).abs() > 0:
        finding.faults.append(f"{_here()}: a matrix product is wrong; take this device out")
    seconds = _usual_seconds(lambda: a @ b)
    finding.value = 2 * MATRIX**3 / seconds / (1e12 if ON_GPU else 1e9)
    return finding


def _exact_sum(a: Tensor, b: Tensor) -> Tensor:
    """Return the sum of all elements of A B, in float64, from blocks whose elements are exact in float32."""
    total = torch.zeros((), dtype=torch.float64, device=a.device)
    for start in range(0, len(a), 1024):
        total += (a[start : start + 1024].float() @ b.float()).double().sum()
    return total


def memory() -> Finding:
    """Write bit patterns to most of the free memory and read them back."""
    finding, device = Finding("memory", "GiB"), local_device()
    free = torch.cuda.mem_get_info()[0] if ON_GPU else 1 << 28
    size = int(free * 0.9) // 8
    block = torch.empty(size, dtype=torch.int64, device=device)
    for pattern in (0x5555555555555555, -0x5555555555555556, 0):
        block.fill_(pattern)
        wrong = int((block != pattern).sum())
        if wrong:
            finding.faults.append(f"{_here()}: {wrong} words of memory do not hold what was written; take it out")
    finding.value = size * 8 / 2**30
    return finding


def bandwidth(axis: str, group: ProcessGroup) -> Finding:
    """Measure the bus bandwidth of an all-reduce along one axis of the grid, check its result, and measure the link."""
    finding, ranks = Finding(f"all-reduce {axis}", "GB/s"), dist.get_world_size(group)
    if ranks == 1:
        return finding
    x = torch.ones(COLLECTIVE_BYTES // 4, device=local_device())
    seconds = _usual_seconds(lambda: dist.all_reduce(x.fill_(1.0), group=group))
    if not bool((x == ranks).all()):
        finding.faults.append(f"{_here()}: an all-reduce over the {axis} axis gives wrong sums")
    finding.value = 2 * (ranks - 1) / ranks * COLLECTIVE_BYTES / seconds / 1e9
    finding.link = link(axis, group)
    return finding


def link(axis: str, group: ProcessGroup) -> dict[str, Any]:
    """Measure all-gathers along one axis, which training mostly does, for `train.plan --links`.

    Returns:
        Ranks of the group, nodes that it spans, bus bandwidth at several sizes of the result, and the seconds of an
        all-gather of a few bytes. `train.cost.links` reads it.
    """
    ranks = dist.get_world_size(group)
    hosts: list[Any] = [None] * ranks
    dist.all_gather_object(hosts, platform.node(), group=group)

    def seconds(num_bytes: int) -> float:
        part = torch.zeros(max(1, num_bytes // 4 // ranks), device=local_device())
        whole = part.new_empty(ranks * len(part))
        return _usual_seconds(lambda: dist.all_gather_into_tensor(whole, part, group=group))

    sizes = [COLLECTIVE_BYTES >> shift for shift in (8, 4, 0)]
    return {
        "axis": axis,
        "ranks": ranks,
        "nodes": len(set(hosts)),
        "sizes_bytes": sizes,
        "gb_per_s": [(ranks - 1) / ranks * size / seconds(size) / 1e9 for size in sizes],
        "latency_s": seconds(0),
    }


def disk(config: Config) -> list[Finding]:
    """Measure the speed of writing and reading a file with hashes, as checkpoints are."""
    write, read = Finding("checkpoint write", "MB/s"), Finding("checkpoint read", "MB/s")
    folder = Folder(config.checkpoint_folder).child(f"doctor_{secrets.token_hex(8)}")
    content = os.urandom(1 << 20)
    try:
        folder.make()
        started = time.perf_counter()
        with folder.writing("probe.bin") as file:
            for _ in range(DISK_BYTES >> 20):
                file.write(content)
        write.value = DISK_BYTES / 1e6 / (time.perf_counter() - started)
        started = time.perf_counter()
        verify_file(folder, "probe.bin", file.digest)
        read.value = DISK_BYTES / 1e6 / (time.perf_counter() - started)
    except Exception as error:  # stores raise errors of their own
        write.faults.append(f"{_here()}: {folder.address} cannot be written and read back ({error})")
    finally:
        try:
            if folder.names():
                folder.remove_file("probe.bin")
            folder.remove_if_empty()
        except Exception as error:
            write.faults.append(f"{_here()}: {folder.address} cannot be deleted ({error})")
    return [write, read]


def absent_folders(config: Config) -> list[Path]:
    """Return the folders on local disks that `disk` will create, innermost first."""
    folder = Folder(config.checkpoint_folder)
    path = Path(folder.path)
    local = isinstance(folder.fs, LocalFileSystem)
    return [each for each in (path, *path.parents) if local and not os.path.exists(each)]


def remove_empty(folders: list[Path]) -> None:
    """Remove the folders that `disk` created, unless another rank was faster or they are in use by now."""
    with contextlib.suppress(OSError):
        for folder in folders:
            folder.rmdir()


def free_space(config: Config, vocab_size: int) -> Finding:
    """Check the space for all checkpoints that are kept at a time, and for one being written."""
    finding = Finding("free space", "GB")
    parameters = total_parameters(config.model, vocab_size)
    kept = config.checkpoint.keep + 1 + int(config.checkpoint.keep_best)
    if config.checkpoint.keep_every:
        kept += config.train_steps // config.checkpoint.keep_every
    needed = parameters * BYTES_PER_PARAMETER * kept
    folder = Folder(config.checkpoint_folder)
    free = folder.free_bytes()
    if free is not None:
        finding.value = free / 1e9
        if free < needed:
            finding.faults.append(
                f"{folder.address}: {free / 1e9:.1f} GB free, {kept} checkpoints of {parameters:,} parameters need "
                f"{needed / 1e9:.1f} GB; free some, or keep fewer (checkpoint.keep, keep_every)"
            )
    return finding


def data(config: Config, all_shards: bool) -> Finding:
    """Check that shards can be read and match the manifest. The ranks share the shards."""
    finding, started, num_bytes = Finding("data", "MB/s"), time.perf_counter(), 0
    try:
        manifest = open_dataset(config.data.path, config.data.read_options())
        shards = [(each, shard) for each in manifest.datasets for split in SPLITS for shard in each.shards[split]]
        step = 1 if all_shards else max(1, len(shards) // (SAMPLE_SHARDS * dist.get_world_size()))
        for dataset, shard in shards[::step][dist.get_rank() :: dist.get_world_size()]:
            opened = open_shard(dataset, shard)
            opened.verify_all()
            opened.close()
            num_bytes += shard.num_bytes
    except DataError as error:
        finding.faults.append(f"{_here()}: {error}")
    finding.value = num_bytes / 1e6 / (time.perf_counter() - started) if num_bytes else None
    return finding


def clock() -> Finding:
    """Measure how far this rank's clock is from rank 0's, as precisely as the network allows."""
    finding, best = Finding("clock skew", "s"), (float("inf"), 0.0)
    for _ in range(REPEATS):
        dist.barrier()
        before = time.time()
        sent = torch.tensor([time.time()], dtype=torch.float64, device=local_device())
        dist.broadcast(sent, src=0)
        after = time.time()
        best = min(best, (after - before, (before + after) / 2 - sent.item()))
    finding.value = abs(best[1])
    return finding


def axes(groups: Groups) -> dict[str, ProcessGroup]:
    """Return the process group of each axis by the axis' name."""
    return {
        "tensor": groups.tensor,
        "context": groups.context,
        "pipeline": groups.pipeline,
        "batch": groups.batch,
        "replicas": groups.data,
    }


def temporary_space() -> Finding:
    """Check the space for temporary files, which compilers need."""
    finding, folder = Finding("temporary space", "GB"), Path(tempfile.gettempdir())
    status = os.statvfs(folder)
    finding.value = status.f_bavail * status.f_frsize / 1e9
    if finding.value < 1:
        finding.faults.append(f"{_here()}: {finding.value:.2f} GB free in {folder}; compiling needs about 1 GB")
    return finding


def _usual_seconds(work: Callable[[], Any]) -> float:
    """Return the second fastest of several runs, so that other load on the device hardly counts."""
    times = []
    for _ in range(REPEATS + 1):
        _synchronize()
        started = time.perf_counter()
        work()
        _synchronize()
        times.append(time.perf_counter() - started)
    return sorted(times)[1]


def _synchronize() -> None:
    if ON_GPU:
        torch.cuda.synchronize()


def _here() -> str:
    return f"rank {dist.get_rank()} on {platform.node()}"
