"""How fast ranks exchange data: by the topology of a cluster, from data sheets or as `train.doctor` measured it.

A ring over n ranks takes

    base + (n - nodes) * node hop + (nodes - 1) * network hop + bytes sent / bandwidth

as in NCCL's own model (src/graph/tuning.cc). Rings leave a node through the NIC of every rank that they have in it. So
a group with m ranks a node sends between nodes at min(NVLink, m * NIC), as published bandwidths show: 340 GB/s for
all-reduce and 200 for all-gather on 32 nodes of 8 H100s (NVIDIA/nccl 1218), 216 to 231 on two (2409). All-to-all
cannot do that: what leaves a node goes through the sender's own NIC (NVIDIA/nccl-tests 267).
"""

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from data.files.own import open_to_read, read_within
from data.files.strict_json import MOST_BYTES, check_shape, parse_row, shown
from parallel.grid import RankGrid

MEASURED = {"axis": str, "ranks": int, "nodes": int, "sizes_bytes": [int], "gb_per_s": [float], "latency_s": float}
"""What `train.doctor --json` writes of an axis, under the key "link"."""


class LinksError(Exception):
    """A file of measured links cannot be used."""


@dataclass(frozen=True)
class Links:
    """Bandwidths of one rank, each direction, and latencies.

    Attributes:
        node: bytes per second to GPUs of the same node.
        nic: bytes per second through one NIC.
        base_s: of any exchange, before its first hop.
        node_hop_s: of a hop within a node.
        network_hop_s: of a hop between nodes.
        gpus_per_node: each with a NIC of its own.
    """

    node: float
    nic: float
    base_s: float = 8.4e-6  # these three: NCCL's rings of large messages, src/graph/tuning.cc
    node_hop_s: float = 3.4e-6
    network_hop_s: float = 9.6e-6
    gpus_per_node: int = 8

    def axis(self, ranks: int, stride: int) -> "Axis":
        """Return the links of a group of `ranks` ranks that are `stride` apart."""
        in_node = max(1, min(ranks, self.gpus_per_node // stride))
        return Axis(self, ranks, in_node, math.ceil(ranks / in_node))


@dataclass(frozen=True)
class Axis:
    """The links of one process group.

    Attributes:
        links: of the cluster.
        ranks: of the group.
        in_node: how many of them share a node.
        nodes: that the group spans.
    """

    links: Links
    ranks: int
    in_node: int
    nodes: int

    @property
    def bandwidth(self) -> float:
        """Bytes per second that a rank sends in a ring."""
        links = self.links
        return links.node if self.nodes == 1 else min(links.node, links.nic * self.in_node)

    @property
    def latency_s(self) -> float:
        """Seconds of a ring's hops."""
        links = self.links
        return links.base_s + (self.ranks - self.nodes) * links.node_hop_s + (self.nodes - 1) * links.network_hop_s

    def ring(self, sent: float, calls: float) -> float:
        """Return the seconds of `calls` reduce-scatters or all-gathers in which a rank sends `sent` bytes in all."""
        return sent / self.bandwidth + calls * self.latency_s if self.ranks > 1 else 0.0

    def all_to_all(self, sent: float, calls: float) -> float:
        """Return the seconds of `calls` all-to-alls in which a rank sends `sent` bytes in all, evenly to the others."""
        if self.ranks == 1:
            return 0.0
        leaving = (self.ranks - self.in_node) / (self.ranks - 1)
        return sent * max((1 - leaving) / self.links.node, leaving / self.links.nic) + calls * self.latency_s

    def neighbour(self, sent: float, calls: float) -> float:
        """Return the seconds of `calls` sends of `sent` bytes in all from one rank to the next of the axis."""
        if self.ranks == 1:
            return 0.0
        links = self.links
        bandwidth, hop = (links.node, links.node_hop_s) if self.in_node > 1 else (links.nic, links.network_hop_s)
        return sent / bandwidth + calls * (links.base_s + hop)


def axes(links: Links, grid: RankGrid) -> dict[str, Axis]:
    """Return the links of each axis of a rank grid."""
    return {
        "tensor": links.axis(grid.tp, 1),
        "context": links.axis(grid.cp, grid.tp),
        "data": links.axis(grid.replicas, grid.tp),
        "pipeline": links.axis(grid.pp, grid.tp * grid.replicas),
    }


def measured_links(path: Path, assumed: Links) -> Links:
    """Return the links that `train.doctor --json` measured; what it did not measure stays as assumed.

    If several axes were measured within or between nodes, the slowest counts.

    Raises:
        LinksError: the file cannot be read, or holds no measured axis.
    """
    try:
        with open_to_read(path) as file:
            rows = [parse_row(line) or {} for line in read_within(file, MOST_BYTES).splitlines()]
        found = [row["link"] for row in rows if row.get("link") is not None]
        for link in found:
            _check(link)
    except OSError as error:
        raise LinksError(f"--links {path}: cannot be read ({error.strerror}); name a file") from None
    except ValueError as error:
        raise LinksError(f"--links {path}: {error}; write it with train.doctor --json") from None
    if not found:
        raise LinksError(
            f"--links {path}: holds no measured links; write it with train.doctor --json on at least two ranks"
        )
    bandwidths: dict[bool, float] = {}
    for link in found:
        in_one_node = link["nodes"] == 1
        nics = 1 if in_one_node else link["ranks"] / link["nodes"]
        bandwidth = 1e9 * max(link["gb_per_s"]) / nics
        bandwidths[in_one_node] = min(bandwidth, bandwidths.get(in_one_node, bandwidth))
    node, nic = bandwidths.get(True, assumed.node), bandwidths.get(False, assumed.nic)
    known = Links(node, nic, 0.0, assumed.node_hop_s, assumed.network_hop_s, assumed.gpus_per_node)
    hops = [Axis(known, link["ranks"], link["ranks"] // link["nodes"], link["nodes"]).latency_s for link in found]
    base = max(0.0, *(link["latency_s"] - hop for link, hop in zip(found, hops, strict=True)))
    return Links(node, nic, base, assumed.node_hop_s, assumed.network_hop_s, assumed.gpus_per_node)


def _check(link: Any) -> None:
    """Raise ValueError if a measured axis is not what `train.doctor` writes."""
    check_shape(link, MEASURED, "link")
    possible = 1 <= link["nodes"] <= link["ranks"] <= 1e7 and link["ranks"] > 1 and 0 <= link["latency_s"] <= 3600
    if not (possible and link["gb_per_s"] and min(link["gb_per_s"]) > 0 and max(link["gb_per_s"]) < 1e6):
        raise ValueError(f"link {shown(link)} cannot be: nodes, ranks, bandwidth or latency is no such number")
