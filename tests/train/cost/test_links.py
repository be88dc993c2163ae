"""Test how long exchanges take by the topology of a cluster, and that measured links take the place of assumed ones."""

import json
from pathlib import Path
from typing import Any

import pytest

from train.cost.links import Links, LinksError, measured_links
from train.cost.step_time import GPUS, Assumptions

GB = 1e9
LINKS = Links(node=200 * GB, nic=40 * GB)


@pytest.mark.parametrize(
    ("ranks", "stride", "bandwidth"),
    [
        (8, 1, 200 * GB),  # one node
        (2, 4, 200 * GB),
        (16, 1, 200 * GB),  # eight NICs a node are faster than NVLink
        (16, 2, 160 * GB),  # four ranks a node, so four NICs
        (4, 8, 40 * GB),  # one rank a node
        (4, 16, 40 * GB),
    ],
)
def test_a_ring_leaves_a_node_through_the_nic_of_every_rank_there(ranks: int, stride: int, bandwidth: float) -> None:
    assert LINKS.axis(ranks, stride).bandwidth == bandwidth


def test_every_hop_of_a_ring_takes_time() -> None:
    assert LINKS.axis(256, 1).latency_s == pytest.approx(8.4e-6 + 224 * 3.4e-6 + 31 * 9.6e-6)
    assert LINKS.axis(2, 1).ring(200 * GB, 10) == pytest.approx(1 + 10 * 11.8e-6)
    assert LINKS.axis(1, 1).ring(0, 10) == LINKS.axis(1, 1).all_to_all(0, 10) == 0


def test_an_all_to_all_leaves_a_node_through_the_senders_nic() -> None:
    within, across = LINKS.axis(8, 1).all_to_all(7 * GB, 0), LINKS.axis(16, 1).all_to_all(15 * GB, 0)
    assert within == pytest.approx(7 / 200) and across == pytest.approx(8 / 40)


def test_bandwidths_between_nodes_are_those_published() -> None:
    """All-reduce on 2 to 32 nodes of 8 H100s: 216 to 340 GB/s (NVIDIA/nccl 2409 and 1218); ours is the low end."""
    bandwidth = Assumptions().links(GPUS["h100"]).axis(256, 1).bandwidth
    assert 0.95 * 216 * GB < bandwidth < 340 * GB


def row(**changes: Any) -> str:
    link = {"axis": "data", "ranks": 8, "nodes": 1, "sizes_bytes": [1, 2], "gb_per_s": [90.0, 300.0]}
    return json.dumps({"check": "all-reduce data", "link": {**link, "latency_s": 40e-6, **changes}})


def test_measured_links_take_the_place_of_assumed_ones(tmp_path: Path) -> None:
    lines = ['{"check": "matmul"}', row(), row(ranks=2, gb_per_s=[250.0]), row(ranks=16, nodes=2, gb_per_s=[160.0])]
    (tmp_path / "doctor.jsonl").write_text("\n".join(lines))
    links = measured_links(tmp_path / "doctor.jsonl", LINKS)
    assert (links.node, links.nic) == (250 * GB, 20 * GB), "the slowest group of a kind; eight NICs"
    assert links.axis(2, 1).latency_s == pytest.approx(40e-6)


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (None, "cannot be read (No such file or directory)"),
        ("no JSON", "holds no measured links; write it with train.doctor --json on at least two ranks"),
        ('{"check": "matmul", "link": null}', "holds no measured links"),
        (row(ranks="two"), "link.ranks is"),
        (row(gb_per_s=[0.0]), "cannot be"),
        (row(nodes=9), "cannot be"),
        (row(latency_s=10**400), "cannot be"),
    ],
)
def test_a_file_that_holds_no_links_is_refused(tmp_path: Path, content: str | None, words: str) -> None:
    file = tmp_path / "doctor.jsonl"
    if content is not None:
        file.write_text(content)
    with pytest.raises(LinksError) as caught:
        measured_links(file, LINKS)
    assert str(caught.value).startswith(f"--links {file}: ") and words in str(caught.value)
