"""What pages name exists: linked pages and headings, files, modules that are run."""

import ast
import importlib.util
import re
from pathlib import Path

import pytest

from tests.docs.pages import ROOT, anchors, pages, prose

PACKAGES = "model|parallel|data|train|slurm|configs|tests|docs"
ids = [str(page.relative_to(ROOT)) for page in pages()]


@pytest.mark.parametrize("page", pages(), ids=ids)
def test_links_lead_to_a_page_and_a_heading(page: Path) -> None:
    dead = []
    for target in re.findall(r"\]\(([^)\s]+)\)", prose(page)):
        if re.match(r"https?://|mailto:", target):
            continue
        address, _, anchor = target.partition("#")
        file = (page.parent / address).resolve() if address else page
        if not file.exists() or (anchor and anchor not in anchors(file)):
            dead.append(target)
    assert not dead


@pytest.mark.parametrize("page", pages(), ids=ids)
def test_files_named_in_a_page_exist(page: Path) -> None:
    named = re.findall(rf"`((?:{PACKAGES})/[\w./-]*)`", page.read_text())
    assert [name for name in named if not (ROOT / name).exists()] == []


@pytest.mark.parametrize("page", pages(), ids=ids)
def test_modules_run_in_a_page_exist(page: Path) -> None:
    modules = set(re.findall(r"python -m ((?:model|parallel|data|train)[\w.]*\w)", page.read_text()))
    assert [module for module in modules if importlib.util.find_spec(module) is None] == []


def test_the_readme_fits_a_page() -> None:
    assert len((ROOT / "README.md").read_text().splitlines()) < 150


@pytest.mark.parametrize("page", pages(), ids=ids)
def test_functions_named_in_a_page_exist(page: Path) -> None:
    named = re.findall(rf"`((?:{PACKAGES})/[\w/]*\.py):([\w.]+)`", page.read_text())
    assert [f"{file}:{symbol}" for file, symbol in named if not defines(ROOT / file, symbol)] == []


def test_the_picture_of_rooms_is_drawn_from_the_imports_of_today() -> None:
    spec = importlib.util.spec_from_file_location("draw_imports", ROOT / "docs/draw_imports.py")
    assert spec is not None and spec.loader is not None
    drawing = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(drawing)
    today, kept = drawing.drawn(drawing.imports()), drawing.drawn(drawing.kept_edges())
    assert today == kept, "run: python docs/draw_imports.py"


def defines(file: Path, symbol: str) -> bool:
    """Return whether a file defines a class, function or method, given as Class.method."""
    body: list[ast.stmt] = ast.parse(file.read_text()).body if file.exists() else []
    for name in symbol.split("."):
        found = [node for node in body if isinstance(node, ast.ClassDef | ast.FunctionDef) and node.name == name]
        if not found:
            return False
        body = found[0].body
    return True
