"""Benchmarks run end to end on what is here and leave the figures that they promise."""

import importlib.util
import json
import math
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from data.errors import DataError
from parallel.micro_batch import MicroBatch
from tests.parallel import tiny
from train.benchmark import __main__ as benchmark
from train.benchmark import attention as benchmark_attention
from train.benchmark import contender
from train.benchmark import step as benchmark_step
from train.benchmark.measure import Figures
from train.benchmark.peer import Peer, PeerReport
from train.config import load_config


def test_a_step_beside_its_peer(tiny_config: Path, tmp_path: Path) -> None:
    command = [sys.executable, "-m", "train.benchmark", "step", "--config", str(tiny_config), "--steps", "1"]
    command += ["--rounds", "1", "--contenders", "ours", "GPT-2", "--output", str(tmp_path)]
    run = subprocess.run(command, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr[-2000:]
    report = json.loads((tmp_path / "step.json").read_text())
    assert [result["name"] for result in report["results"]] == ["ours", "GPT-2"]
    for result in report["results"]:
        assert result["tokens_per_second"] * result["step_time_s"] == pytest.approx(4 * 32)
    assert report["results"][1]["flops_per_token"] > report["results"][0]["flops_per_token"]  # two matrices, not one
    assert (tmp_path / "step.png").exists() and "| ours | 32 |" in run.stdout


def test_generation_beside_its_peer(tiny_config: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    command = ["generate", "--config", str(tiny_config), "--batch-sizes", "2", "--prompt-tokens", "5", "--new-tokens"]
    assert benchmark.main([*command, "7", "--rounds", "1", "--output", str(tmp_path)]) == 0
    report, printed = json.loads((tmp_path / "generate.json").read_text()), capsys.readouterr().out
    has_peer = importlib.util.find_spec("transformers") is not None
    names = ["ours", "SM+LN+G"] + (["GPT-2 of transformers"] if has_peer else [])
    assert [result["name"] for result in report["results"]] == names
    assert ("is not timed: install it" in printed) != has_peer
    for result in report["results"]:
        assert result["tokens_per_second"] * result["seconds"] == pytest.approx(2 * 7)
    assert (tmp_path / "generate.png").exists()
    assert benchmark.main([*command, "28", "--output", str(tmp_path)]) == 2
    assert "--prompt-tokens 5 and --new-tokens 28 are more than model.seq_length = 32" in capsys.readouterr().err


@pytest.mark.slow
def test_a_step_of_two_ranks_in_the_configured_layout(tiny_config: Path, tmp_path: Path) -> None:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", "-m"]
    command += ["train.benchmark", "step", "--config", str(tiny_config), "parallel.tensor_parallel_size=2"]
    command += ["--contenders", "ours", "GPT-2", "--steps", "1", "--rounds", "1", "--output", str(tmp_path)]
    run = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
    assert run.returncode == 0, run.stderr[-2000:]
    report = json.loads((tmp_path / "step.json").read_text())
    ours, peer = report["results"]
    assert report["ranks"] == 2 and run.stdout.count("| ours | 32 |") == 1
    assert ours["global_batch_size"] == 4 and peer["global_batch_size"] == 8  # the peer's ranks are replicas
    assert ours["tokens_per_second_per_gpu"] * ours["step_time_s"] == pytest.approx(4 * 32 / 2)


NO_GPU = pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without a GPU")


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["step", "model.num_layrs=2"], "did you mean model.num_layers?"),
        (["step", "parallel.tensor_parallel_size=2"], "the world size 1 is not a multiple of tensor_parallel_size(2)"),
        (["step", "model.seq_length=1000000"], "the train split holds"),
        (["step", "--contenders", "GPT-2", "--recompute", "full"], "nothing to time"),
        (["step", "--output", "/proc/nowhere"], "--output /proc/nowhere: cannot be written"),
        (["scaling", "model.num_layrs=2"], "did you mean model.num_layers?"),
        (["scaling", "--layouts", "tp=3"], "layout tp=3 needs 3 GPUs, and there are 2"),
        (["scaling", "--layouts", "tpp=2"], "'tpp=2' is no key=value of a layout"),
        (["scaling", "--layouts", "pp=2:zero=3"], "parallel.zero_stage = 3 needs parallel.pipeline_parallel_size = 1"),
        (["scaling", "--peer-micro-batch-size", "3"], "peer one: training.global_batch_size = 8 is not a multiple"),
        (["step", "--micro-batch-sizes", "0"], "--micro-batch-sizes: '0': expected a whole number"),
        (["step", "--steps", "0"], "--steps: '0': expected a whole number"),
        (["step", "--rounds", "0"], "--rounds: '0': expected a whole number"),
        pytest.param(["step", "--profile"], "--profile needs a GPU", marks=NO_GPU),
        (["attention", "--rounds", "0"], "--rounds: '0': expected a whole number"),
        (["attention", "--shapes", "0,1,1,1"], "expected four whole numbers"),
        (["attention", "--output", "/proc/nowhere"], "--output /proc/nowhere: cannot be written"),
        (["learning", "model.num_layrs=2"], "did you mean model.num_layers?"),
        (["learning", "data.path=/nowhere"], "/nowhere"),
    ],
)
def test_what_cannot_be_timed_is_told_in_a_line_before_anything_is(
    tiny_config: Path, capfd: pytest.CaptureFixture[str], arguments: list[str], words: str
) -> None:
    name, *options = arguments
    config = [] if name == "attention" else ["--config", str(tiny_config)]
    with pytest.raises((SystemExit, DataError)) as caught:
        sys.exit(benchmark.main([name, *config, *options]))
    if caught.type is SystemExit:
        assert caught.value.code == 2
    said = capfd.readouterr().err + str(caught.value)
    assert said.count(words) == 1 and "Traceback" not in said


def test_random_tokens_are_told(tiny_config: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert contender.dataset(load_config(tiny_config)) is not None
    assert capsys.readouterr().out == ""
    assert contender.dataset(load_config(tiny_config, ["data.path=/nowhere"])) is None
    assert "random tokens: no dataset at data.path = /nowhere" in capsys.readouterr().out


def test_times_of_refused_steps_are_not_told(tiny_config: Path) -> None:
    """A step that changes no weights is spared the optimizer's work."""

    def measure(loss: float) -> Figures:
        options = benchmark_step.parse(["--config", "any", "--steps", "2", "--rounds", "1"])
        one = contender.Contender("ours", load_config(tiny_config), 10, lambda: PeerReport(torch.tensor(loss)))
        return benchmark_step.measure(iter([(one, 0)]), options)[0][1]

    assert len(measure(loss=2.0).step_times_s) == 2
    with pytest.raises(SystemExit, match="ours: loss or gradients are not finite"):
        measure(loss=math.nan)


class Refusing:
    """An engine whose gradients are not finite."""

    def train_step(self, batches: Any, learning_rate: float) -> tuple[Any, None]:
        self.learning_rate = learning_rate
        return SimpleNamespace(accepted=torch.tensor(False)), None


def test_contenders_are_timed_at_a_rate_of_zero(tiny_config: Path) -> None:
    """At any other they may diverge, and the optimizer's work would be missing from their times."""
    engine = Refusing()
    assert not contender.engine_step(engine, iter([]))().accepted and engine.learning_rate == 0
    peer = Peer(load_config(tiny_config), 128, torch.device("cpu"))
    before = [parameter.clone() for parameter in peer.model.parameters()]
    tokens_TB = torch.randint(100, (33, 4))
    assert contender.peer_step(peer, iter([MicroBatch(tokens_TB[:-1], tokens_TB[1:])]))().accepted
    assert all(torch.equal(*pair) for pair in zip(before, peer.model.parameters(), strict=True))
    assert all(state["exp_avg"].any() for state in peer.optimizer.state.values())


def test_attention_beside_its_peers(tmp_path: Path) -> None:
    arguments = ["--shapes", "24,1,2,8", "--rounds", "1", "--only", "ours", "materialized", "SDPA cuDNN (no entropy)"]
    benchmark_attention.main([*arguments, "--device", "cpu", "--output", str(tmp_path)])
    report = json.loads((tmp_path / "attention.json").read_text())
    found = {result["name"]: result for result in report["results"]}
    assert found["ours"]["forward_backward_ms"] > 0 and found["ours"]["forward_ms"] > 0
    assert "not_run" in found["SDPA cuDNN (no entropy)"]  # a peer that cannot run here says why


@pytest.mark.parametrize("within_documents", [False, True])
@pytest.mark.parametrize("architecture", [tiny.EREG, "SM+G", "SM+ScFFN"])
def test_the_reference_that_learning_is_compared_with_computes_alike(
    monkeypatch: pytest.MonkeyPatch, architecture: str, within_documents: bool
) -> None:
    from model import transformer
    from train.benchmark.learning import use_reference

    config = tiny.tiny_config(architecture=architecture).model
    whole = transformer.Transformer(config, tiny.VOCAB_SIZE).double()
    with torch.no_grad():
        for parameter in whole.parameters():
            parameter.uniform_(0.1, 0.3)
    tokens_TB = torch.randint(tiny.VOCAB_SIZE, (config.seq_length, 3))
    start = torch.arange(tokens_TB.shape[0]).div(5, rounding_mode="floor").mul(5).expand(3, -1)
    results = []
    for place, name in ((transformer, "joint_entropy_attention"), (transformer.FeedForward, "forward")):
        monkeypatch.setattr(place, name, getattr(place, name))  # put back after
    for _ in range(2):
        logits, entropies = whole(tokens_TB, document_start_BT=start if within_documents else None)
        gradients = torch.autograd.grad(logits.square().sum(), [*whole.layers["0"].ffn.parameters()])
        results.append([logits, *entropies, *gradients])
        use_reference()
    for ours, reference in zip(*results, strict=True):
        torch.testing.assert_close(ours, reference)
    assert not all(map(torch.equal, *results))  # rounded elsewhere
