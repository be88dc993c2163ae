"""Check the architecture: which package imports which, that no imports form a circle, and that no folder is crowded.

Imports inside functions and under TYPE_CHECKING count. So does a string that is a module's full name, since a worker
process may import it later.
"""

import ast
from collections.abc import Iterator
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
MAY_IMPORT = {"model": set(), "data": set(), "parallel": {"model"}, "train": {"model", "data", "parallel"}}
DOORS = {"parallel.compare": {"data", "train"}}
"""What a single module may import besides."""
MAX_FILES = 15


def imports(root: Path) -> dict[str, set[str]]:
    """Return the modules of the four packages that each of them imports, by full name."""
    paths = [path for package in MAY_IMPORT for path in (root / package).rglob("*.py")]
    files = {".".join(path.relative_to(root).with_suffix("").parts).removesuffix(".__init__"): path for path in paths}
    return {
        module: {name if name in files else name.rpartition(".")[0] for name in names(path)} & files.keys() - {module}
        for module, path in files.items()
    }


def names(path: Path) -> Iterator[str]:
    """Yield the full name of everything that a file imports, be it a module or something in one."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}:{node.lineno}: relative imports hide what is imported"
            yield from (f"{node.module}.{alias.name}" for alias in node.names)
        elif isinstance(node, ast.Constant) and isinstance(node.value, str) and "." in node.value:
            yield node.value


def forbidden(graph: dict[str, set[str]]) -> list[str]:
    """Return the imports that cross packages against MAY_IMPORT."""
    return [
        f"{module} imports {name}"
        for module, imported in graph.items()
        for name in sorted(imported)
        if package(name) not in {package(module)} | MAY_IMPORT[package(module)] | DOORS.get(module, set())
    ]


def package(module: str) -> str:
    return module.partition(".")[0]


def room(module: str) -> str:
    """Return the folder directly under a package, or the module itself if it lies outside such a folder."""
    return ".".join(module.split(".")[:2])


def by_room(graph: dict[str, set[str]]) -> dict[str, set[str]]:
    """Return the rooms that each room imports."""
    rooms: dict[str, set[str]] = {room(module): set() for module in graph}
    for module, imported in graph.items():
        rooms[room(module)] |= {room(name) for name in imported} - {room(module)}
    return rooms


def circle(graph: dict[str, set[str]]) -> list[str]:
    """Return a circle of imports; empty if there is none."""
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        return error.args[1]
    return []


def crowded(root: Path) -> list[str]:
    """Return the folders with more than MAX_FILES Python files."""
    folders = [folder for top in (*MAY_IMPORT, "tests") for folder in [root / top, *(root / top).rglob("*/")]]
    counts = {folder: len(list(folder.glob("*.py"))) for folder in folders}
    return [f"{folder.relative_to(root)}: {count} files" for folder, count in counts.items() if count > MAX_FILES]


def test_packages_import_only_what_they_may() -> None:
    assert forbidden(imports(ROOT)) == []


def test_files_form_no_circle() -> None:
    assert circle(imports(ROOT)) == []


def test_rooms_form_no_circle() -> None:
    assert circle(by_room(imports(ROOT))) == []


def test_no_folder_is_crowded() -> None:
    assert crowded(ROOT) == []


def plant(root: Path, files: dict[str, str]) -> dict[str, set[str]]:
    """Write a tree of modules under `root` and return its imports."""
    for name, source in {"model.m": "", "data.d": "", "parallel.p": "", "train.t": "", **files}.items():
        path = (root / name.replace(".", "/")).with_suffix(".py")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(source)
    return imports(root)


@pytest.mark.parametrize(
    ("module", "source", "is_allowed"),
    [
        ("model.a", "import data.d", False),
        ("model.a", "from parallel import p", False),
        ("data.a", "from model.m import x", False),
        ("data.room.a", "import train.t as t", False),
        ("parallel.a", "from data.d import x", False),
        ("parallel.a", "def f():\n    from train import t", False),
        ("parallel.a", "if TYPE_CHECKING:\n    from train.t import T", False),
        ("parallel.a", "PRELOADED = 'train.t'", False),
        ("parallel.compare", "import data.d, train.t", True),
        ("parallel.a", "import model.m", True),
        ("train.a", "import data.d, model.m, parallel.p", True),
        ("model.a", "import torch.distributed", True),  # none of ours; test_independence.py forbids it
    ],
)
def test_the_check_sees_imports(tmp_path: Path, module: str, source: str, is_allowed: bool) -> None:
    assert (forbidden(plant(tmp_path, {module: source})) == []) == is_allowed


@pytest.mark.parametrize(
    ("files", "file_circle", "room_circle"),
    [
        ({"train.a": "import train.b", "train.b": "def f():\n    import train.a"}, True, True),
        ({"train.a.x": "import train.a.y", "train.a.y": "from train.a.x import T"}, True, False),
        (
            {"train.a.x": "import train.b.x", "train.b.y": "import train.a.y", "train.b.x": "", "train.a.y": ""},
            False,
            True,
        ),
        ({"train.a.__init__": "from train.a.x import X", "train.a.x": "from train.a import X"}, True, False),
        ({"train.a.x": "import train.b", "train.b": "import train.c.x", "train.c.x": "import data.d"}, False, False),
    ],
)
def test_the_check_sees_circles(tmp_path: Path, files: dict[str, str], file_circle: bool, room_circle: bool) -> None:
    graph = plant(tmp_path, files)
    assert bool(circle(graph)) == file_circle
    assert bool(circle(by_room(graph))) == room_circle


def test_the_check_sees_a_crowded_folder(tmp_path: Path) -> None:
    plant(tmp_path, {f"train.a.m{i}": "" for i in range(MAX_FILES)})
    assert crowded(tmp_path) == []
    plant(tmp_path, {"train.a.one_more": ""})
    assert crowded(tmp_path) == ["train/a: 16 files"]
