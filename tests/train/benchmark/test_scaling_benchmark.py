"""Layouts are timed beside PyTorch's own parallelism: what is planned, computed, reduced and written."""

import json
from pathlib import Path

import pytest
import torch
from torch import Tensor

from parallel.local_ranks import run_ranks
from parallel.micro_batch import micro_batch
from train.benchmark.contender import as_architecture
from train.benchmark.exposed import Kernel, Overlap, overlap
from train.benchmark.measure import Figures, over_ranks
from train.benchmark.peer import Peer
from train.benchmark.scaling import PEERS, default_layouts, efficiency, main, parse, planned, reason
from train.config import load_config

RANKS = 2


def test_communication_is_exposed_where_nothing_else_runs() -> None:
    """Two steps of 10 ms: products 0-4 and 6-8, sums 3-6 and 7-9, and nothing from 9 to 10."""
    step = [("gemm", 0, 4), ("ncclDevKernel_AllReduce", 3, 6), ("gemm", 6, 8), ("ncclDevKernel_SendRecv", 7, 9)]
    kernels = [Kernel(name, start + at, end + at) for at in (0.0, 10.0) for name, start, end in step]
    assert overlap(kernels, steps=2) == Overlap(communication_ms=5.0, exposed_ms=3.0, idle_ms=0.5)
    two_streams = [Kernel("nccl_1", 0.0, 2.0), Kernel("nccl_2", 1.0, 3.0), Kernel("Memcpy DtoD", 2.5, 4.0)]
    assert overlap(two_streams, steps=1) == Overlap(communication_ms=3.0, exposed_ms=2.5, idle_ms=0.0)
    copied = [Kernel("gemm", 0.0, 2.0), Kernel("Memcpy PtoP (Device -> Device)", 1.0, 4.0)]
    assert overlap(copied, steps=1) == Overlap(communication_ms=3.0, exposed_ms=2.0, idle_ms=0.0)
    assert overlap([], steps=1) is None


def test_a_step_takes_as_long_as_on_its_slowest_rank() -> None:
    ranks = [
        Figures([5.0], [1.0, 4.0], peak_memory_gib=2.0, overlap=Overlap(3.0, 1.0, 0.0)),
        Figures([5.0], [2.0, 3.0], peak_memory_gib=3.0, overlap=Overlap(3.0, 2.0, 0.5)),
    ]
    both = over_ranks(ranks)
    assert both.step_times_s == [2.0, 4.0] and both.peak_memory_gib == 3.0 and both.losses == [5.0]
    assert both.overlap == Overlap(3.0, 2.0, 0.5) and both.host_time_s is None


def test_every_gpu_has_the_same_work_unless_scaling_is_strong(tiny_config: Path) -> None:
    config = load_config(tiny_config)  # 8 sequences a step, micro-batches of 4
    options = parse(["--config", "any", "--layouts", "dp=2", "tp=2:sp=1", "pp=2:acc=8"])
    weak, options.strong = planned(config, RANKS, options), True
    strong = planned(config, RANKS, options)

    def batches(runs: list) -> list[tuple[str, int, int]]:
        return [(run.form, run.config.training.global_batch_size, run.config.training.micro_batch_size) for run in runs]

    peers = [(form, 16, 2) for form in PEERS]
    assert batches(weak)[:4] == [("one", 8, 4), ("dp=2", 16, 4), ("tp=2:sp=1", 16, 4), ("pp=2:acc=8", 16, 2)]
    assert batches(weak)[4:] == [("one", 8, 2), *peers]
    assert {batch for _, batch, _ in batches(strong)} == {8}
    assert weak[2].config.parallel.sequence_parallel and weak[3].config.parallel.pipeline_parallel_size == 2


def test_default_layouts_that_do_not_fit_are_left_out(tiny_config: Path, capsys: pytest.CaptureFixture[str]) -> None:
    options = parse(["--config", "any", "--peers"])
    runs = planned(load_config(tiny_config, ["model.num_attention_heads=1"]), RANKS, options)
    left = [line for line in capsys.readouterr().out.splitlines() if line.startswith("left out: layout ")]
    assert [run.form for run in runs] == ["one", "dp=2", "dp=2:zero=2", "dp=2:zero=3", "pp=2:acc=8"]
    assert len(runs) + len(left) == 1 + len(default_layouts(RANKS)) and "num_attention_heads = 1" in left[0]


def test_a_row_that_fails_says_why() -> None:
    oom = "rank 0: Traceback (most recent call last):\n  File x\nRuntimeError: gloo\n\nrank 1: Traceback\n  File y\n"
    assert reason(oom) == "RuntimeError: gloo"
    assert (
        reason(oom + "torch.OutOfMemoryError: CUDA out of memory.\n") == "torch.OutOfMemoryError: CUDA out of memory."
    )
    assert reason("ranks [1] of 2 gave no answer") == "ranks [1] of 2 gave no answer"


def test_nothing_is_compared_with_a_row_that_failed() -> None:
    one, two = ({"program": "ours", "ranks": ranks, "tokens_per_second_per_gpu": 10.0 / ranks} for ranks in (1, 2))
    assert efficiency(one, []) == 1 and efficiency(two, [{**one, "program": "GPT-2"}, one]) == 0.5
    assert efficiency(two, [{**one, "failed": "out of memory"}]) is None


def test_layouts_and_a_peer_are_timed(tiny_config: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["--config", str(tiny_config), "data.path=/nowhere", "--layouts", "dp=2:zero=2", "tp=2"]
    assert main([*arguments, "--peers", "DDP", "--steps", "2", "--output", str(tmp_path / "out")]) == 0
    report = json.loads((tmp_path / "out/scaling.json").read_text())
    rows = {(row["program"], row["form"]): row for row in report["rows"]}
    assert list(rows) == [
        ("ours", "one"),
        ("ours", "dp=2:zero=2"),
        ("ours", "tp=2"),
        ("GPT-2", "one"),
        ("GPT-2", "DDP"),
    ]
    one, dp, tp = (rows["ours", form] for form in ("one", "dp=2:zero=2", "tp=2"))
    assert one["efficiency"] == 1 and dp["tokens_per_second"] * dp["step_time_s"] == pytest.approx(16 * 32)
    assert dp["losses"] == pytest.approx(tp["losses"], rel=1e-6)  # the same tokens
    assert dp["efficiency"] == pytest.approx(dp["tokens_per_second_per_gpu"] / one["tokens_per_second_per_gpu"])
    assert {"weights", "optimizer", "first_step"} <= one["start_by_phase_s"].keys() and len(one["losses"]) == 3
    assert "| ours | tp=2 | 2 | 16 (4) |" in capsys.readouterr().out
    assert (tmp_path / "out/scaling.png").exists() and (tmp_path / "out/scaling.md").exists()


def test_peers_compute_what_one_process_does(tiny_config: Path) -> None:
    """Loss and every gradient of a step of two micro-batches a rank."""
    loss, gradients = run_ranks(peer_gradients, 1, str(tiny_config), ["one"])[0]["one"]
    for form, (found, theirs) in run_ranks(peer_gradients, RANKS, str(tiny_config), list(PEERS))[1].items():
        assert found == pytest.approx(loss, abs=1e-5), form
        for name, expected in gradients.items():
            torch.testing.assert_close(theirs[name], expected, rtol=1e-4, atol=1e-7, msg=f"{form} {name}")


def peer_gradients(config_file: str, forms: list[str]) -> dict[str, tuple[float, dict[str, Tensor]]]:
    from parallel.launch import initialize_distributed, rank, world_size

    initialize_distributed()
    config = as_architecture(load_config(config_file), "SM+LN+G")
    rows_BT = torch.randint(400, (8, 33), generator=torch.Generator().manual_seed(1))
    found = {}
    for form in forms:
        held_BT = rows_BT if form == "TP" else rows_BT.chunk(world_size())[rank()]
        peer = Peer(config, 400, torch.device("cpu"), form, micro_batches=2)
        peer.clipping = float("inf")
        gradients: dict[str, Tensor] = {}

        def keep(peer: Peer = peer, gradients: dict[str, Tensor] = gradients, **_: bool) -> None:
            for name, parameter in peer.model.named_parameters():
                gradient = parameter.grad
                assert gradient is not None
                gradients[name] = getattr(gradient, "full_tensor", gradient.clone)()

        peer.optimizer.zero_grad = keep  # type: ignore[method-assign,assignment]
        report = peer.train_step(micro_batch(part_BT, range(32)) for part_BT in held_BT.chunk(2))
        found[form] = (report.wait().cross_entropy, gradients)
    return found
