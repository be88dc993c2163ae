"""Check that everything which repeats or pins the tested versions of torch agrees with pyproject.toml."""

import re

import torch
from packaging.requirements import Requirement
from packaging.version import Version

from tests.versions import ROOT, constraints, other_versions, pyproject, settings, torch_versions


def torch_requirement() -> Requirement:
    requirements = map(Requirement, pyproject()["project"]["dependencies"])
    return next(requirement for requirement in requirements if requirement.name == "torch")


def test_the_bounds_are_the_oldest_and_the_newest_tested_version() -> None:
    versions = [Version(text) for text in torch_versions()]
    assert versions == sorted(versions) and len(set(versions)) == len(versions)
    oldest, newest = versions[0], versions[-1]
    bounds = {(clause.operator, clause.version) for clause in torch_requirement().specifier}
    assert bounds == {(">=", f"{oldest.major}.{oldest.minor}"), ("<", f"{newest.major}.{newest.minor + 1}")}


def test_the_pinned_version_is_tested() -> None:
    (pinned,) = re.findall(r"^torch==(.*)$", (ROOT / "constraints.txt").read_text(), re.MULTILINE)
    assert pinned in torch_versions()
    assert other_versions() == [version for version in torch_versions() if version != pinned]


def test_another_torch_keeps_all_pins_but_its_own() -> None:
    pinned = set((ROOT / "constraints.txt").read_text().splitlines()[1:])
    for version in other_versions():
        lines = constraints(version)
        names = [re.split("[=<>~!]", line)[0] for line in lines]
        assert len(names) == len(set(names)) and f"torch=={version}" in lines
        changed = {re.split("[=<>~!]", line)[0] for line in pinned - set(lines)}
        assert {"torch", "triton", "setuptools"} <= changed <= {"torch", "triton", "setuptools", "numpy"}


def test_the_page_of_versions_lists_them() -> None:
    rows = re.findall(r"^\| (\d+\.\d+\.\d+) \|", (ROOT / "docs/reference/versions.md").read_text(), re.MULTILINE)
    assert rows == torch_versions()


def test_the_readme_names_no_version_that_is_not_tested() -> None:
    named = set(re.findall(r"torch (\d+\.\d+\.\d+)", (ROOT / "README.md").read_text()))
    assert named <= set(torch_versions())


def test_this_environment_holds_a_supported_version() -> None:
    assert torch_requirement().specifier.contains(Version(torch.__version__).base_version)


def test_the_tests_of_every_version_exist() -> None:
    for path in settings()["torch-tests"]:
        assert (ROOT / path).exists(), path
