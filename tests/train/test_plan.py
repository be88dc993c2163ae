"""Planning on paper: memory against measured peaks, what is printed, and which layouts fit."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest

from parallel.counting.footprint import footprint
from train.config import load_config
from train.cost.layouts import Plan, make_plan, workload
from train.cost.step_time import GPUS, Assumptions, StepTime, pipelined
from train.plan import main

ROOT = Path(__file__).parents[2]
ONE_BATCH = ["training.global_batch_size=8", "training.micro_batch_size=8"]

# torch.cuda.max_memory_allocated of training steps on one H200 at vocabulary 32,000, in GiB
MEASURED_GIB = [
    ("ereg.json", [], 9.80),
    ("baseline.json", [], 21.80),
    ("ereg_1b.json", ONE_BATCH, 32.5),
    ("ereg_1b.json", [*ONE_BATCH, "training.activation_recompute=selective"], 30.2),
    ("ereg_1b.json", [*ONE_BATCH, "training.activation_recompute=full"], 21.1),
    ("ereg_1b.json", ["training.global_batch_size=16", "training.micro_batch_size=16"], 46.0),
]


@pytest.mark.parametrize(("name", "overrides", "measured_gib"), MEASURED_GIB)
def test_peak_memory_is_within_two_percent_of_the_measured(
    name: str, overrides: list[str], measured_gib: float
) -> None:
    config = load_config(ROOT / "configs" / name, overrides)
    predicted_gib = footprint(workload(config, 1, 0, 32_000)).peak / 2**30
    assert predicted_gib == pytest.approx(measured_gib, rel=0.02)


NOTHING_HIDDEN = Assumptions(gradients_hidden=0.0, weights_hidden=0.0, tensor_hidden=0.0, context_hidden=0.0)
# tokens/s a GPU of EReg 28 x 2560 on two H200s (docs/benchmarks/scaling_1b_h200_x2.json)
MEASURED_TOKENS_PER_SECOND = [
    (1, ["training.global_batch_size=32"], 76_996),
    (2, [], 76_006),
    (2, ["parallel.zero_stage=2"], 74_660),
    (2, ["parallel.zero_stage=3"], 69_910),
    (2, ["parallel.context_parallel_size=2"], 71_256),
    (2, ["parallel.tensor_parallel_size=2", "parallel.sequence_parallel=true"], 68_326),
    (2, ["parallel.tensor_parallel_size=2"], 60_681),
    (2, ["parallel.pipeline_parallel_size=2", "training.micro_batch_size=8"], 67_805),
]


@pytest.mark.parametrize(("gpus", "overrides", "measured"), MEASURED_TOKENS_PER_SECOND)
def test_step_time_is_within_five_percent_of_the_measured(gpus: int, overrides: list[str], measured: float) -> None:
    sizes = ["training.micro_batch_size=16", "training.global_batch_size=64"]
    config, gpu, assumed = load_config(ROOT / "configs/ereg_1b.json", [*sizes, *overrides]), GPUS["h200"], Assumptions()
    plan = make_plan(config, gpus, 32_000, gpu, assumed.links(gpu), assumed)
    assert plan.tokens_per_second / gpus == pytest.approx(measured, rel=0.05)


def plan_of(gpus: int, *overrides: str, assumed: Assumptions | None = None) -> Plan:
    """Return the plan of the 1B model on H100s."""
    gpu, assumed = GPUS["h100"], assumed or Assumptions()
    config = load_config(ROOT / "configs/ereg_1b.json", list(overrides))
    return make_plan(config, gpus, 50_000, gpu, assumed.links(gpu), assumed)


def test_the_slowest_stage_waits_for_one_micro_batch_of_each_other() -> None:
    nothing = dict.fromkeys((field.name for field in dataclasses.fields(StepTime)), 0.0)
    slow, fast = (StepTime(**{**nothing, "products": seconds, "update": 1.0}) for seconds in (8.0, 4.0))
    time = pipelined([(fast, 3), (slow, 1)], num_micro_batches=4)
    assert (time.products, time.bubble, time.total) == (8.0, 3 * 4.0 / 4, 8.0 + 1.0 + 3.0)


@pytest.mark.parametrize("zero_stage", [1, 2, 3])
def test_an_exchange_is_hidden_behind_the_passes_beside_it_and_no_longer(zero_stage: int) -> None:
    sizes = [f"parallel.zero_stage={zero_stage}", "training.micro_batch_size=8"]
    shown, hidden = (plan_of(8, *sizes, assumed=each).time for each in (NOTHING_HIDDEN, Assumptions()))
    first_layers = (1 if zero_stage == 3 else 2) * 5 * 2560**2  # of a bucket of at least 40 million
    late = ((50_048 + 2048) * 2560 + first_layers) / 1.052e9
    assert hidden.data == pytest.approx(late * shown.data, rel=0.01)
    assert hidden.contention == pytest.approx(Assumptions().contention * (shown.data - hidden.data))
    slow = (dataclasses.replace(each, node_links=1e-3) for each in (NOTHING_HIDDEN, Assumptions()))
    shown, hidden = (plan_of(8, *sizes, assumed=each).time for each in slow)
    assert hidden.data > 0.8 * shown.data


def test_stages_on_two_nodes_send_through_a_nic() -> None:
    across, within = (plan_of(gpus, "parallel.pipeline_parallel_size=2").time.pipeline for gpus in (16, 8))
    sizes = 1 / 2  # twice the replicas share the sequences
    assert across / (sizes * within) == pytest.approx(0.47 * 450 / 47, rel=0.02)


def test_passes_with_exchanges_between_hosts_are_not_replayed() -> None:
    sizes = ["parallel.context_parallel_size=2", "training.micro_batch_size=1", "training.global_batch_size=1"]
    config, assumed = load_config(ROOT / "configs/ereg_1b.json", sizes), Assumptions()
    for gpus_per_node, is_replayed in ((2, True), (1, False)):
        gpu = dataclasses.replace(GPUS["h100"], gpus_per_node=gpus_per_node)
        time = make_plan(config, 2, 50_000, gpu, assumed.links(gpu), assumed).time
        assert (time.launches == assumed.micro_batch_s) == is_replayed


def planned(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, dict[str, Any]]:
    status = main([*arguments, "--json"])
    return status, json.loads(capsys.readouterr().out)


def test_splitting_divides_what_is_split(capsys: pytest.CaptureFixture[str]) -> None:
    common = ["--config", str(ROOT / "configs/ereg_1b.json"), "--gpus", "8", "--gpu", "h100"]
    _, whole = planned(capsys, *common)
    _, halves = planned(capsys, *common, "parallel.tensor_parallel_size=2", "parallel.sequence_parallel=true")
    one, two = whole["plan"]["stages_bytes"][0], halves["plan"]["stages_bytes"][0]
    # a replicated FFN is not divided, nor what is kept of it
    assert two["activations"] == pytest.approx(one["activations"] / 2, rel=0.04)
    assert one["parameters"] / 2 < two["parameters"] < one["parameters"]
    _, staged = planned(capsys, *common, "parallel.pipeline_parallel_size=4")
    stages = staged["plan"]["stages_bytes"]
    assert len(stages) == 3 and staged["plan"]["step_time_s"]["bubble"] > 0
    assert stages[0]["activations"] > stages[1]["activations"] > stages[2]["activations"]  # micro-batches in flight
    assert all(layout["fits"] for layout in whole["layouts"]) and len(whole["layouts"]) > 10


@pytest.mark.parametrize("seq_length", [128, 2048], ids=["attention by memory", "attention by arithmetic"])
def test_attention_that_is_computed_again_costs_time(capsys: pytest.CaptureFixture[str], seq_length: int) -> None:
    arguments = ["--config", str(ROOT / "configs/ereg.json"), "--gpus", "1", "--gpu", "h100"]
    arguments += [f"model.seq_length={seq_length}", f"training.micro_batch_size={65_536 // seq_length}"]
    times = {}
    for how in ("none", "selective", "full"):
        _, printed = planned(capsys, *arguments, f"training.activation_recompute={how}")
        times[how] = printed["plan"]["step_time_s"]
    again = times["none"]["attention"] / 3.5  # one forward pass more
    assert times["selective"]["attention"] == times["full"]["attention"]
    assert times["selective"]["total"] - times["none"]["total"] == pytest.approx(again)
    assert times["full"]["total"] > times["selective"]["total"]


def test_a_job_that_does_not_fit_says_so(capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["--config", str(ROOT / "configs/ereg_1b.json"), "--gpus", "1", "--gpu", "a100"]
    status = main([*arguments, "training.micro_batch_size=64"])
    text = capsys.readouterr().out
    assert status == 1 and "does NOT fit in 79.2 GiB" in text and "Fastest of" in text and "Assumed:" in text
    assert main([*arguments, "training.micro_batch_size=8"]) == 0


def test_measured_links_are_used_and_a_file_without_is_refused(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    common = ["--config", str(ROOT / "configs/ereg_1b.json"), "--gpus", "8", "--links", str(tmp_path / "doctor.jsonl")]
    link = {"axis": "data", "ranks": 8, "nodes": 1, "sizes_bytes": [1], "gb_per_s": [123.0], "latency_s": 1e-4}
    (tmp_path / "doctor.jsonl").write_text(json.dumps({"check": "all-reduce data", "link": link}))
    assert main(common) == 0
    assert "links: 123 GB/s a GPU within a node of 8, 47 through each GPU's NIC; 76.2 us" in capsys.readouterr().out
    (tmp_path / "doctor.jsonl").write_text("{}")
    assert main(common) == 2
    assert "holds no measured links" in capsys.readouterr().err


def test_what_cannot_be_planned_is_said(capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["--config", str(ROOT / "configs/ereg_1b.json"), "--gpus", "3"]
    assert main([*arguments, "parallel.tensor_parallel_size=2"]) == 2
    assert "world size 3 is not a multiple of tensor_parallel_size(2)" in capsys.readouterr().err
