"""Draw the rooms of the project and the imports between them: python docs/draw_imports.py

A room is a folder of Python files. An arrow leads from the room that imports to the room that it imports. Arrows that
follow from others are left out. The picture is docs/pictures/rooms.svg. It holds the imports that it was drawn from, so
that a test can tell whether it is current.
"""

import ast
import json
import re
from collections import defaultdict
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PICTURE = ROOT / "docs/pictures/rooms.svg"
PACKAGES = ("train", "parallel", "data", "model")
COLOURS = {"train": "#7b6fb0", "parallel": "#3b8ea5", "data": "#c2803a", "model": "#4f9a62"}
WIDTH, ROW, BOX_HEIGHT, MARGIN, BAND_GAP = 1160, 82, 38, 22, 14

Edges = set[tuple[str, str]]


def sources() -> dict[str, Path]:
    """Return the file of every module of the project by its dotted name."""
    files = (file for package in PACKAGES for file in sorted((ROOT / package).rglob("*.py")))
    return {".".join(file.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"): file for file in files}


def module_imports() -> Edges:
    """Return the imports between modules, as (importing module, imported module)."""
    modules, edges = sources(), set()
    for module, file in modules.items():
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            names: list[str] = []
            if isinstance(node, ast.ImportFrom) and node.module and node.level == 0:
                below = [f"{node.module}.{alias.name}" for alias in node.names]
                names = [name if name in modules else node.module for name in below]
            elif isinstance(node, ast.Import):
                names = [alias.name for alias in node.names]
            edges |= {(module, name) for name in names if name in modules and name != module}
    return edges


def room_of(module: str, imported: set[str]) -> str:
    """Return the room of a module: train.loop.trainer -> train/loop, train.plan -> train/doors, model.x.y -> model.

    A file that lies directly in a package is one of its doors if no other file imports it. Otherwise it is shared: a
    room of its own in train/, and one of the package's base in parallel/ and data/.
    """
    package, *rest = module.split(".")
    if package == "model":
        return "model"
    if len(rest) > 1 or (rest and (ROOT / package / rest[0]).is_dir()):
        return f"{package}/{rest[0]}"
    if rest and module not in imported:
        return f"{package}/doors"
    return f"{package}/{rest[0]}.py" if rest and package == "train" else f"{package}/base"


def imports() -> Edges:
    """Return the imports between rooms, as (importing room, imported room)."""
    edges = module_imports()
    imported = {name for _, name in edges}
    rooms = {(room_of(importer, imported), room_of(name, imported)) for importer, name in edges}
    return {(importer, name) for importer, name in rooms if importer != name}


def reachable(edges: Edges, start: str) -> set[str]:
    """Return what a room imports, directly or through others."""
    found: set[str] = set()
    waiting = [start]
    while waiting:
        room = waiting.pop()
        new = {imported for importer, imported in edges if importer == room} - found
        found |= new
        waiting += new
    return found


def drawn(edges: Edges) -> Edges:
    """Return the edges that do not follow from others."""
    below = {room: reachable(edges, room) for edge in edges for room in edge}

    def follows(importer: str, imported: str) -> bool:
        between = {room for start, room in edges if start == importer} - {imported}
        return any(imported in below[room] and room not in below[imported] for room in between)

    return {edge for edge in edges if not follows(*edge)}


def levels(rooms: set[str], edges: Edges) -> dict[str, int]:
    """Return for each room the length of the longest chain of imports below it; doors stand on top."""

    def height(room: str, path: tuple[str, ...]) -> int:
        below = [imported for importer, imported in edges if importer == room and imported not in path]
        return max((height(imported, (*path, room)) + 1 for imported in below), default=0)

    found = {room: height(room, (room,)) for room in rooms}
    return {room: max(found.values()) if room.endswith("/doors") else level for room, level in found.items()}


def rows(edges: Edges, package: str) -> list[list[str]]:
    """Return the rooms of a package in rows: what imports stands above what it imports."""
    own = {room for edge in edges for room in edge if room.split("/")[0] == package}
    by_level: dict[int, list[str]] = defaultdict(list)
    for room, level in levels(own, {edge for edge in edges if set(edge) <= own}).items():
        by_level[level].append(room)
    return [sorted(by_level[level]) for level in sorted(by_level, reverse=True)]


def arranged(edges: Edges) -> tuple[dict[str, tuple[float, float]], dict[str, tuple[float, float, float, float]]]:
    """Return the middle of every room, and the band of every package as (x, y, width, height)."""
    grids = {package: rows(edges, package) for package in PACKAGES}
    middle_row = len(grids["train"])
    lowest_row = middle_row + max(len(grids["parallel"]), len(grids["data"]))
    spans = {
        "train": (0.0, WIDTH, 0),
        "data": (0.0, WIDTH * 0.36, lowest_row - len(grids["data"])),
        "parallel": (WIDTH * 0.38, WIDTH, lowest_row - len(grids["parallel"])),
        "model": (0.0, WIDTH, lowest_row),
    }
    rank = {room: (index + 0.5) / len(row) for grid in grids.values() for row in grid for index, room in enumerate(row)}
    links = drawn(edges)
    for _ in range(12):
        for package, grid in grids.items():
            start, end, _first = spans[package]
            for row in grid:
                near = {
                    room: [rank[other] for edge in links if room in edge for other in edge if other != room]
                    for room in row
                }
                row.sort(key=lambda room: (sum(near[room]) / len(near[room]) if near[room] else rank[room], room))
                step = (end - start) / len(row) / WIDTH
                rank |= {room: start / WIDTH + step * (index + 0.5) for index, room in enumerate(row)}
    place, bands = {}, {}
    for package, grid in grids.items():
        start, end, first = spans[package]
        top = {"train": 0, "data": BAND_GAP, "parallel": BAND_GAP, "model": 2 * BAND_GAP}[package]
        for index, row in enumerate(grid):
            for room in row:
                place[room] = (rank[room] * WIDTH, top + MARGIN + ROW * (first + index) + BOX_HEIGHT / 2)
        bands[package] = (start, top + ROW * first + 4, end - start, ROW * len(grid) - 8)
    return place, bands


def svg(edges: Edges) -> str:
    """Return the picture as SVG text."""
    place, bands = arranged(edges)
    height = max(y + tall for _, y, _, tall in bands.values()) + 4
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {height:.0f}" font-family="sans-serif" '
        'role="img" aria-label="Rooms of the project and the imports between them">',
        f"<metadata>{json.dumps(sorted(edges))}</metadata>",
        f'<rect width="{WIDTH}" height="{height:.0f}" fill="#ffffff"/>',
        '<defs><marker id="tip" viewBox="0 0 8 8" refX="7" refY="4" markerWidth="7" markerHeight="7" orient="auto">'
        '<path d="M0 0 L8 4 L0 8 z" fill="#777"/></marker></defs>',
    ]
    for package, (x, y, wide, tall) in bands.items():
        colour = COLOURS[package]
        parts.append(
            f'<rect x="{x + 2:.0f}" y="{y:.0f}" width="{wide - 4:.0f}" height="{tall:.0f}" rx="12" fill="{colour}" '
            f'fill-opacity="0.08"/><text x="{x + 16:.0f}" y="{y + 26:.0f}" fill="{colour}" font-size="18" '
            f'font-weight="bold">{package}/</text>'
        )
    for importer, imported in sorted(drawn(edges)):
        (x, y), (end_x, end_y) = place[importer], place[imported]
        down = 1 if end_y >= y else -1
        y, end_y = y + down * BOX_HEIGHT / 2, end_y - down * BOX_HEIGHT / 2
        bend = down * max(24.0, abs(end_y - y) * 0.45)
        colour = COLOURS[importer.split("/")[0]]
        parts.append(
            f'<path d="M{x:.0f} {y:.0f} C{x:.0f} {y + bend:.0f} {end_x:.0f} {end_y - bend:.0f} '
            f'{end_x:.0f} {end_y:.0f}" fill="none" stroke="{colour}" stroke-opacity="0.6" '
            'stroke-width="1.6" marker-end="url(#tip)"/>'
        )
    for room, (x, y) in sorted(place.items()):
        package, _, name = room.partition("/")
        label = {"doors": "commands", "base": "shared files", "": "all of model/"}.get(name, name)
        wide = max(96, 9 * len(label) + 24)
        parts.append(
            f'<rect x="{x - wide / 2:.0f}" y="{y - BOX_HEIGHT / 2:.0f}" width="{wide}" height="{BOX_HEIGHT}" rx="8" '
            f'fill="{COLOURS[package]}"/><text x="{x:.0f}" y="{y + 5:.0f}" fill="#fff" font-size="16" '
            f'text-anchor="middle">{label}</text>'
        )
    return "\n".join([*parts, "</svg>", ""])


def kept_edges(picture: Path = PICTURE) -> Edges:
    """Return the edges that a picture was drawn from."""
    found = re.search(r"<metadata>(.*?)</metadata>", picture.read_text(encoding="utf-8"))
    assert found is not None, f"{picture}: not drawn by docs/draw_imports.py"
    return {(importer, imported) for importer, imported in json.loads(found[1])}


if __name__ == "__main__":
    PICTURE.write_text(svg(imports()), encoding="utf-8")
    print(PICTURE)
