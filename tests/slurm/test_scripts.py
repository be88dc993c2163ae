"""The job scripts without Slurm: ports, and words that pass through shells."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
ODD = ["a b", "it's", "tab\there", "new\nline", "café", '$HOME `id` "\\', "", "*", "''", "-n", "#x"]
SHOW = f"#!/bin/sh\nexec {sys.executable} -c 'import json, sys; print(json.dumps(sys.argv[1:]))' \"$@\"\n"


def executable(file: Path, text: str) -> Path:
    file.parent.mkdir(exist_ok=True)
    file.write_text(text)
    file.chmod(0o755)
    return file


def bash(code: str, **environment: str) -> "subprocess.CompletedProcess[str]":
    """Run code after slurm/job.sh was read."""
    return subprocess.run(
        ["bash", "-c", f"source slurm/job.sh; {code}"],
        env={"PATH": os.environ["PATH"], "PYTHON": sys.executable, **environment},
        capture_output=True,
        text=True,
        cwd=ROOT,
        timeout=60,
    )


def test_ports_lie_below_those_of_connections_and_differ() -> None:
    loop = "for SLURM_JOB_ID in {4000000..4000019}; do for SLURM_RESTART_COUNT in {0..9}; do master_port; done; done"
    ports = [int(word) for word in bash(loop).stdout.split()]
    assert len(set(ports)) == len(ports) == 200
    assert min(ports) >= 15_000 and max(ports) < 32_000
    assert bash("SLURM_JOB_ID=7 master_port").stdout == f"{15_000 + 707}\n"


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", []),
        ("a.b=1\n\tc.d=2\n", ["a.b=1", "c.d=2"]),
        ("data.path='my own/sets' x=\"café\"", ["data.path=my own/sets", "x=café"]),
        ("x='[1, 2]' y=\\'", ["x=[1, 2]", "y='"]),
        ("x='new\nline' $HOME `id` * '' #no", ["x=new\nline", "$HOME", "`id`", "*", "", "#no"]),
    ],
)
def test_words_are_read_as_by_a_shell_that_expands_nothing(tmp_path: Path, text: str, words: list[str]) -> None:
    show = executable(tmp_path / "show", SHOW)
    done = bash(f'read_words found "$TEXT" && {show} "${{found[@]}}"', TEXT=text)
    assert json.loads(done.stdout) == words, done.stderr


def test_a_missing_quote_is_told() -> None:
    done = bash('read_words found "$TEXT"; echo goes on', TEXT="a='b")
    assert done.returncode == 2 and done.stdout == ""
    assert "cannot be split into words, is a quote missing? a='b" in done.stderr


def test_what_prepare_submits_reaches_data_prepare_through_any_shell(tmp_path: Path) -> None:
    """sbatch --wrap runs its text under /bin/sh, which knows no quotes of bash's own."""
    python = executable(tmp_path / "my python", SHOW)
    sbatch = 'for last in "$@"; do :; done; SLURM_ARRAY_TASK_ID=1 sh -c "$last" >> "$OUTPUT"; echo 7'
    executable(tmp_path / "bin/sbatch", f"#!/bin/sh\n{sbatch}\n")
    environment = {
        "PATH": f"{tmp_path}/bin:{os.environ['PATH']}",
        "PYTHON": str(python),
        "OUTPUT": str(tmp_path / "output"),
        "LC_ALL": "C",
    }
    command = ["bash", str(ROOT / "slurm/prepare.sh"), "3", "--partition=cpu", "--", *ODD]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    stages = [json.loads(line) for line in (tmp_path / "output").read_text().splitlines()]
    common = ["-m", "data.prepare", *ODD]
    tasks = {"scan": 3, "merge": 1, "encode": 3, "pack": 3, "finish": 1}
    expected = [[*common, "--stage", name, "--task", f"1/{count}", "--workers", "1"] for name, count in tasks.items()]
    assert stages == expected
