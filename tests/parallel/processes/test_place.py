"""The launcher's variables are read by one rule: all or none, numbers, a rank within the world."""

import subprocess
import sys
from pathlib import Path

import pytest

from parallel.processes.place import EnvironmentValueError, Place, forget_launcher, is_launched, place

ROOT = Path(__file__).parents[3]
ALL = {"RANK": "3", "WORLD_SIZE": "8", "LOCAL_RANK": "1", "MASTER_ADDR": "node1", "MASTER_PORT": "29500"}


@pytest.fixture(autouse=True)
def _no_launcher(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in (*ALL, "LOCAL_SIZE", "TORCHELASTIC_USE_AGENT_STORE"):
        monkeypatch.delenv(name, raising=False)


def set_all(monkeypatch: pytest.MonkeyPatch, variables: dict[str, str]) -> None:
    for name, value in variables.items():
        monkeypatch.setenv(name, value)


def test_without_a_rank_the_process_is_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    set_all(monkeypatch, {"MASTER_ADDR": "node1", "MASTER_PORT": "29500"})  # a site may set these for everybody
    assert place() == Place() and not is_launched()


def test_a_launchers_variables_are_read(monkeypatch: pytest.MonkeyPatch) -> None:
    set_all(monkeypatch, ALL)
    assert place() == Place(3, 8, 1, "node1", 29500) and is_launched()
    forget_launcher()
    assert place() == Place() and not is_launched()


@pytest.mark.parametrize("missing", list(ALL))
def test_what_is_missing_is_named(monkeypatch: pytest.MonkeyPatch, missing: str) -> None:
    set_all(monkeypatch, {name: value for name, value in ALL.items() if name != missing})
    with pytest.raises(EnvironmentValueError, match=f"but not {missing}: start the ranks with a launcher"):
        place()


@pytest.mark.parametrize("only", ["RANK", "WORLD_SIZE", "LOCAL_RANK"])
def test_one_variable_alone_is_refused(monkeypatch: pytest.MonkeyPatch, only: str) -> None:
    monkeypatch.setenv(only, "1")
    with pytest.raises(EnvironmentValueError, match=f"{only}='1', but not"):
        place()


@pytest.mark.parametrize(
    ("name", "value"),
    [("RANK", "8"), ("RANK", "-1"), ("RANK", "1.0"), ("WORLD_SIZE", "0"), ("WORLD_SIZE", "٣"), ("LOCAL_RANK", "8")]
    + [("WORLD_SIZE", "1" * 400), ("MASTER_PORT", "0"), ("MASTER_PORT", "65536"), ("MASTER_PORT", "http")],
)
def test_a_value_out_of_bounds_is_named(monkeypatch: pytest.MonkeyPatch, name: str, value: str) -> None:
    set_all(monkeypatch, {**ALL, name: value})
    with pytest.raises(EnvironmentValueError, match=f"{name} = '{value}' in the environment: expected a whole number"):
        place()


@pytest.mark.parametrize(
    ("variables", "expected"),
    [
        ({}, False),
        ({"MASTER_ADDR": "127.0.0.1"}, True),
        ({"MASTER_ADDR": "localhost"}, True),
        ({"MASTER_ADDR": "::1"}, True),
        ({"LOCAL_SIZE": "8"}, True),
        ({"LOCAL_SIZE": "4"}, False),
    ],
)
def test_one_machine_is_known_as_such(
    monkeypatch: pytest.MonkeyPatch, variables: dict[str, str], expected: bool
) -> None:
    set_all(monkeypatch, {**ALL, **variables})
    assert place().is_on_one_machine == expected


@pytest.mark.parametrize("size", ["1", "2"])
def test_training_with_half_of_the_variables_is_refused_in_a_line(tiny_config: Path, size: str) -> None:
    command = [sys.executable, "train/main.py", "--config", str(tiny_config)]
    done = subprocess.run(
        [*command, f"parallel.tensor_parallel_size={size}"],
        env={"PATH": "/usr/bin", "WORLD_SIZE": size},
        capture_output=True,
        text=True,
        cwd=ROOT,
        timeout=60,
    )
    assert done.returncode == 2 and done.stderr.count("\n") == 1, done.stderr
    assert done.stderr.startswith(f"error: the environment has WORLD_SIZE='{size}', but not RANK, LOCAL_RANK")
