"""Benchmarks run end to end on what is here and leave the figures that they promise."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from train import benchmark_attention


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


def test_attention_beside_its_peers(tmp_path: Path) -> None:
    arguments = ["--shapes", "24,1,2,8", "--rounds", "1", "--only", "ours", "materialized", "SDPA cuDNN (no entropy)"]
    benchmark_attention.main([*arguments, "--device", "cpu", "--output", str(tmp_path)])
    report = json.loads((tmp_path / "attention.json").read_text())
    found = {result["name"]: result for result in report["results"]}
    assert found["ours"]["forward_backward_ms"] > 0 and found["ours"]["forward_ms"] > 0
    assert "not_run" in found["SDPA cuDNN (no entropy)"]  # a peer that cannot run here says why
