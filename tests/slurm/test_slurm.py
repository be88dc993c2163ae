"""Run the job scripts on a real Slurm. Time limits, crashed nodes and killed ranks must not change the curve.

pytest -m slurm       needs the packages that tests/slurm/cluster.py names
"""

import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.slurm.cluster import Cluster, may_make_namespaces, missing_programs
from tests.train.runs import journal, rows, run_main, without_times

pytestmark = [
    pytest.mark.slurm,
    pytest.mark.timeout(900),
    pytest.mark.skipif(bool(missing_programs()), reason=f"not installed: {', '.join(missing_programs())}"),
]
ROOT = Path(__file__).parents[2]
CONFIG = {
    "model": {"num_layers": 2, "hidden_size": 32, "num_attention_heads": 4, "seq_length": 32},
    "parallel": {"tensor_parallel_size": 2},
    "training": {
        "micro_batch_size": 4,
        "global_batch_size": 8,
        "train_steps": 400,
        "evaluation_interval": 0,
    },
    "optimizer": {
        "schedule": "wsd",
        "decay_fraction": 0,
        "warmup_steps": 1,
    },  # the curve does not depend on train_steps
    "checkpoint": {"interval": 20},
    "logging": {"interval": 10, "tensorboard": False},
}
TWO_NODES = ["--nodes=2", "--ntasks-per-node=1", "--gpus-per-node=1", "--cpus-per-task=1", "--mem=100"]


@pytest.fixture(scope="module")
def cluster() -> Iterator[Cluster]:
    if not may_make_namespaces():
        pytest.skip("namespaces may not be made here")
    folder = Path(tempfile.mkdtemp(prefix="slurm", dir="/tmp"))
    folder.chmod(0o755)
    with Cluster(folder, 6) as running:
        yield running
    shutil.rmtree(folder)


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory, dataset: Path) -> Path:
    file = tmp_path_factory.mktemp("slurm") / "small.json"
    file.write_text(json.dumps({**CONFIG, "data": {"path": str(dataset)}}))
    return file


@pytest.fixture(scope="module")
def uninterrupted(config: Path) -> list[dict]:
    """Return the rows of the same run on two local ranks, without any interruption."""
    run = config.parent / "uninterrupted"
    answer = run_main(2, config, f"run_dir={run}")
    assert answer.statuses == [0, 0], answer.stderr
    return without_times(run)


class Job:
    """Submit a run and watch it."""

    def __init__(
        self,
        cluster: Cluster,
        config: Path,
        name: str,
        *overrides: str,
        options: list[str] | None = None,
        python: str = sys.executable,
    ) -> None:
        self.cluster, self.run, self.log = cluster, config.parent / name, config.parent / f"{name}.log"
        environment = {"CONFIG": str(config), "PYTHON": python, "OMP_NUM_THREADS": "1"}
        arguments = [f"run_dir={self.run}", *overrides]
        choices = [*TWO_NODES, f"--output={self.log}", *(options or [])]
        self.number = cluster.submit("slurm/train_1b.sh", *arguments, options=choices, env=environment, cwd=ROOT)

    def wait_for_step(self, step: int) -> None:
        self._wait(lambda: any(row["event"] == "saved" and row["step"] >= step for row in journal(self.run)))

    def wait_for_event(self, event: str) -> None:
        self._wait(lambda: any(row["event"] == event for row in journal(self.run)))

    def wait_for_end(self) -> str:
        state = self.cluster.wait_for_end(self.number, 500)
        print(self.text())
        return state

    def text(self) -> str:
        return self.log.read_text() if self.log.exists() else ""

    def _wait(self, condition: Callable[[], bool]) -> None:
        end = time.monotonic() + 180
        while not (self.run / "journal.jsonl").exists() or not condition():
            assert time.monotonic() < end, self.text()
            time.sleep(0.3)


def test_a_crashed_node_and_a_killed_rank_leave_one_curve(
    cluster: Cluster, config: Path, uninterrupted: list[dict]
) -> None:
    crashed = Job(cluster, config, "crashed")
    crashed.wait_for_step(60)
    lost = cluster.job_nodes(crashed.number)[-1]
    cluster.crash(lost)
    killed = Job(cluster, config, "killed", options=[f"--exclude={lost}"])
    killed.wait_for_step(60)
    assert cluster.kill(f"{killed.run}/code/train/main.py") >= 1
    for job in (killed, crashed):
        assert job.wait_for_end() == "COMPLETED", job.text()
        assert without_times(job.run) == uninterrupted, f"{job.run.name}: another curve"
        starts = [row for row in journal(job.run) if row["event"] in ("started", "resumed")]
        assert len(starts) == 2 and starts[0]["event"] == "started" and starts[1]["step"] >= 60
        assert len(set(re.findall(r"job (\d+), start", job.text()))) == 1, "one log, of one job"
        assert (job.run / "code/train/main.py").exists() and (job.run / "resolved.json").exists()


def test_the_time_limit_saves_requeues_and_goes_on_with_the_same_curve(cluster: Cluster, config: Path) -> None:
    """Lower the limit once the run is under way, and raise it again while the job is pending.

    A fixed limit would not do: how long a start takes depends on the machine.
    """
    job = Job(cluster, config, "limited", "training.train_steps=100000", options=["--time=10", "--signal=B:USR1@60"])
    job.wait_for_step(20)
    cluster.run("scontrol", "update", f"JobId={job.number}", "TimeLimit=1")
    job.wait_for_event("asked to stop")
    while cluster.state(job.number) != "PENDING":
        time.sleep(0.1)
    cluster.run("scontrol", "update", f"JobId={job.number}", "TimeLimit=10")
    stopped = next(row["step"] for row in journal(job.run) if row["event"] == "asked to stop")
    job.wait_for_step(stopped + 40)
    cluster.run("scancel", str(job.number))
    assert job.wait_for_end() == "CANCELLED"
    assert "time is nearly up: saving" in job.text()
    assert [row["step"] for row in journal(job.run) if row["event"] == "resumed"] == [stopped], "nothing was lost"
    straight, last = config.parent / "straight", stopped + 40
    assert run_main(2, config, f"run_dir={straight}", f"training.train_steps={last}").statuses == [0, 0]
    found, expected = ([row for row in without_times(run) if row.get("loss")] for run in (job.run, straight))
    assert found[:last] == expected, "another curve"


def test_a_job_that_makes_no_progress_stops_after_the_bound(cluster: Cluster, config: Path) -> None:
    job = Job(cluster, config, "stuck", "health.step_limit_s=0.001", "checkpoint.interval=1000")
    slow = config.parent / "slow_second_rank"
    slow.write_text(f'#!/bin/bash\n[ "$SLURM_PROCID" = 1 ] && sleep 5\nexec {sys.executable} "$@"\n')
    slow.chmod(0o755)
    refused = Job(cluster, config, "refused", "training.micro_batch_size=3", python=str(slow))
    assert job.wait_for_end() == "FAILED"
    assert "not requeued: 3 starts in a row saved nothing beyond step -1" in job.text()
    assert len((job.run / "starts.txt").read_text().splitlines()) == 3
    assert "Current thread" in (job.run / "stacks/rank_00000.txt").read_text()
    assert refused.wait_for_end() == "FAILED", "what cannot start as asked is not tried again"
    assert "error: training.global_batch_size" in refused.text() and "start 2]" not in refused.text()


def test_requeue_from_outside_saves_first(cluster: Cluster, config: Path, uninterrupted: list[dict]) -> None:
    job = Job(cluster, config, "requeued")
    job.wait_for_step(40)
    cluster.run("scontrol", "requeue", str(job.number))
    assert job.wait_for_end() == "COMPLETED"
    asked = next(row for row in journal(job.run) if row["event"] == "asked to stop")
    resumed = next(row for row in journal(job.run) if row["event"] == "resumed")
    assert resumed["step"] == asked["step"], "nothing was lost"
    assert without_times(job.run) == uninterrupted


def test_sweep_and_doctor(cluster: Cluster, config: Path) -> None:
    environment = {"PYTHON": sys.executable, "OMP_NUM_THREADS": "1", "CONFIG": str(config)}
    other = config.parent / "other.json"
    other.write_text(json.dumps({**json.loads(config.read_text()), "run_dir": str(config.parent / "swept_1")}))
    first = config.parent / "first.json"
    first.write_text(json.dumps({**json.loads(config.read_text()), "run_dir": str(config.parent / "swept_0")}))
    options = [*TWO_NODES, "--array=0-1", f"--output={config.parent}/sweep_%a.log"]
    sweep = cluster.submit(
        "slurm/sweep.sh",
        str(first),
        str(other),
        options=options,
        env={**environment, "OVERRIDES": "training.train_steps=7\n'training.train_steps=5'"},
        cwd=ROOT,
    )
    submitted = cluster.run(
        "slurm/submit.sh",
        str(config),
        f"run_dir={config.parent}/submitted",
        "training.train_steps=3",
        cwd=ROOT,
        env={
            **environment,
            "GPUS_PER_NODE": "1",
            "SBATCH_OPTIONS": f"--cpus-per-task=1 --mem=100 --output={config.parent}/submitted.log",
        },
    )
    log = config.parent / "doctor.log"
    doctor = cluster.submit("slurm/doctor.sh", options=[*TWO_NODES, f"--output={log}"], env=environment, cwd=ROOT)
    assert cluster.wait_for_end(sweep, 300) == "COMPLETED"
    for number in range(2):
        assert [row["step"] for row in rows(config.parent / f"swept_{number}") if "loss" in row] == [1, 2, 3, 4, 5]
    assert cluster.wait_for_end(int(submitted.split()[-1]), 300) == "COMPLETED"
    assert "2 ranks; newest" in (config.parent / "submitted.log").read_text(), "two GPUs for tensor_parallel_size 2"
    cluster.wait_for_end(doctor, 300)
    assert "all-reduce tensor" in log.read_text() and "2 ranks on 2 hosts" in log.read_text()


def test_the_shipped_script_asks_for_what_its_configuration_needs() -> None:
    from train.config import load_config, world_faults

    text = (ROOT / "slurm/train_1b.sh").read_text()
    nodes, tasks, gpus = (
        int(re.search(rf"^#SBATCH --{key}=(\d+)", text, re.MULTILINE).group(1))  # type: ignore[union-attr]
        for key in ("nodes", "ntasks-per-node", "gpus-per-node")
    )
    assert tasks == gpus, "one task a GPU"
    assert world_faults(load_config(ROOT / "configs/ereg_1b.json"), nodes * tasks) == []


def test_scripts_are_clean() -> None:
    shellcheck = shutil.which("shellcheck")
    if shellcheck is None:
        pytest.skip("not installed: shellcheck")
    scripts = sorted(str(path) for path in (ROOT / "slurm").glob("*.sh"))
    done = subprocess.run([shellcheck, "--external-sources", *scripts], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stdout
    assert all(os.access(script, os.R_OK) for script in scripts)
