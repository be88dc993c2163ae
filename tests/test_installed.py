"""Check that commands run from any folder, whatever it holds, and that an installation holds every package."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from setuptools import find_packages

from tests.versions import ROOT, pyproject

QUICKSTART = "configs/quickstart.json"


def run(folder: Path, *command: str) -> subprocess.CompletedProcess[str]:
    """Run Python in `folder`, with this project found on the path, as an editable install puts it there."""
    env = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    return subprocess.run(
        [sys.executable, *command], cwd=folder, env=env, capture_output=True, text=True, timeout=300, check=False
    )


@pytest.mark.parametrize(
    "command",
    [
        (str(ROOT / "train/main.py"), "--config", QUICKSTART, "--dry-run"),
        ("-m", "train.main", "--config", QUICKSTART, "--dry-run"),
        ("-m", "train.describe"),
        ("-m", "parallel.compare", "--help"),
    ],
)
def test_a_users_own_packages_hide_none_of_ours(tmp_path: Path, command: tuple[str, ...]) -> None:
    for name in ("data", "model"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "__init__.py").touch()
    result = run(tmp_path, *command)
    assert result.returncode == 0, result.stderr


@pytest.mark.parametrize("package", ["train", "parallel"])
def test_a_worker_finds_ours(tmp_path: Path, package: str) -> None:
    """A fork server starts as `python -c`."""
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "__init__.py").touch()
    result = run(tmp_path, "-c", f"import {package}, data; print(data.__file__)")
    assert result.stdout.strip() == str(ROOT / "data/__init__.py"), result.stderr


def test_a_users_folder_without_python_hides_nothing(tmp_path: Path) -> None:
    (tmp_path / "train").mkdir()
    result = run(tmp_path, "-m", "train.main", "--config", QUICKSTART, "--dry-run")
    assert result.returncode == 0, result.stderr


def test_a_users_own_configuration_goes_first(tmp_path: Path) -> None:
    (tmp_path / "configs").mkdir()
    (tmp_path / QUICKSTART).write_text("{")
    result = run(tmp_path, "-m", "train.main", "--config", QUICKSTART, "--dry-run")
    assert result.returncode == 2 and "not JSON" in result.stderr


def test_a_wheel_holds_every_package_and_configuration() -> None:
    settings = pyproject()["tool"]["setuptools"]
    packages = find_packages(str(ROOT), include=settings["packages"]["find"]["include"])
    tops = ("model", "parallel", "data", "train")
    folders = {path.parent.relative_to(ROOT).as_posix() for top in tops for path in (ROOT / top).rglob("*.py")}
    assert {package.replace(".", "/") for package in packages} == folders
    shipped = {path.parent.relative_to(ROOT).as_posix() for path in (ROOT / "configs").rglob("*.json")}
    assert {pattern.removesuffix("/*.json") for (pattern,) in settings["data-files"].values()} == shipped
