"""Every public module, class and function has a docstring, and its Args name parameters that exist."""

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.docs.pages import ROOT

PACKAGES = ("model", "parallel", "data", "train")
Documented = ast.Module | ast.ClassDef | ast.FunctionDef


@pytest.mark.parametrize("package", PACKAGES)
def test_what_is_public_has_a_docstring(package: str) -> None:
    missing = []
    for file, tree in modules(package):
        public = [node for node in tree.body if isinstance(node, ast.ClassDef | ast.FunctionDef) and is_public(node)]
        missing += [f"{file}: {name_of(node)}" for node in [tree, *public] if not ast.get_docstring(node)]
    assert missing == []


@pytest.mark.parametrize("package", PACKAGES)
def test_args_of_a_docstring_are_parameters(package: str) -> None:
    unknown = []
    for file, tree in modules(package):
        for node, parameters in callables(tree):
            section = re.search(r"^Args:\n((?:[ ]+.*\n?|\n)+)", ast.get_docstring(node) or "", re.MULTILINE)
            groups = re.findall(r"^    (\*{0,2}\w+(?:, \*{0,2}\w+)*):", section[1], re.MULTILINE) if section else []
            names = [name.strip(" *") for group in groups for name in group.split(",")]
            unknown += [f"{file}: {name_of(node)}: {name}" for name in names if name not in parameters]
    assert unknown == []


def modules(package: str) -> list[tuple[Path, ast.Module]]:
    """Return every file of a package, parsed."""
    files = sorted((ROOT / package).rglob("*.py"))
    return [(file.relative_to(ROOT), ast.parse(file.read_text())) for file in files]


def is_public(node: ast.ClassDef | ast.FunctionDef) -> bool:
    """Return whether others may use it. A command's `main` is described by its module."""
    return not node.name.startswith("_") and node.name != "main"


def callables(tree: ast.Module) -> Iterator[tuple[Documented, set[str]]]:
    """Yield every function, and every class with the parameters of its constructor or its fields."""
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef):
            yield node, parameters_of(node)
        elif isinstance(node, ast.ClassDef):
            fields = {each.target.id for each in node.body if isinstance(each, ast.AnnAssign) and is_name(each.target)}
            constructors = [each for each in node.body if isinstance(each, ast.FunctionDef) and each.name == "__init__"]
            yield node, fields.union(*map(parameters_of, constructors))


def is_name(target: ast.expr) -> bool:
    """Return whether an assignment's target is a plain name."""
    return isinstance(target, ast.Name)


def parameters_of(function: ast.FunctionDef) -> set[str]:
    """Return the names of a function's parameters."""
    arguments = function.args
    named = [*arguments.posonlyargs, *arguments.args, *arguments.kwonlyargs]
    return {each.arg for each in [*named, arguments.vararg, arguments.kwarg] if each is not None}


def name_of(node: Documented) -> str:
    """Return the name to report."""
    return "module" if isinstance(node, ast.Module) else f"{node.name} (line {node.lineno})"
