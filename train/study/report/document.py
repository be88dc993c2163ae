"""Write a report twice: as Markdown beside its pictures, and as one HTML file that contains them."""

import base64
import html
import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from data.files.own import write_atomically
from train.pictures.files import write_picture

if TYPE_CHECKING:
    from matplotlib.figure import Figure

STYLE = """
body { max-width: 75rem; margin: 2rem auto; padding: 0 1rem; font: 15px/1.5 system-ui, sans-serif; color: #222; }
table { border-collapse: collapse; margin: 1rem 0; } img { max-width: 100%; }
th, td { padding: .25rem .6rem; border-bottom: 1px solid #ddd; text-align: right; vertical-align: top; }
th:first-child, td:first-child { text-align: left; } th { border-bottom: 2px solid #888; }
code, pre { background: #f4f4f4; border-radius: 3px; } pre { padding: .6rem; overflow-x: auto; }
"""


LARGEST_PIXELS = (1500, 1800)  # width, height of a picture


class Document:
    """Collects headings, texts, tables and pictures, and writes both files.

    Args:
        folder: of the report; pictures go to its pictures/ folder.
        title: the first heading.
    """

    def __init__(self, folder: Path, title: str) -> None:
        self.folder, self.title = folder, title
        self._blocks: list[str] = []
        self._pictures: dict[str, Figure] = {}

    def heading(self, text: str) -> None:
        """Start a section."""
        self._blocks.append(f"## {text}")

    def text(self, text: str) -> None:
        """Add a paragraph of Markdown."""
        self._blocks.append(text)

    def table(self, header: Sequence[str], rows: Iterable[Sequence[str]]) -> None:
        """Add a table; its first column is aligned to the left, the others to the right."""
        lines = [header, ["---", *["--:"] * (len(header) - 1)], *rows]
        self._blocks.append(
            "\n".join("| " + " | ".join(cell.replace("|", "/") for cell in line) + " |" for line in lines)
        )

    def picture(self, stem: str, figure: "Figure", caption: str) -> None:
        """Add a picture, to be written to pictures/STEM.png."""
        self._pictures[stem] = figure
        self._blocks.append(f"![{caption}](pictures/{stem}.png)\n\n*{caption}*")

    def write(self) -> list[Path]:
        """Write report.md, report.html and the pictures; return the paths of the two reports."""
        import markdown

        pictures = self.folder / "pictures"
        pictures.mkdir(parents=True, exist_ok=True)
        for stem, figure in self._pictures.items():
            width_in, height_in = figure.get_size_inches()
            dpi = min(110, LARGEST_PIXELS[0] / width_in, LARGEST_PIXELS[1] / height_in)
            write_picture(figure, pictures / f"{stem}.png", dpi)
        text = "\n\n".join([f"# {self.title}", *self._blocks]) + "\n"
        body = markdown.markdown(text, extensions=["tables", "fenced_code"])
        page = (
            f'<!doctype html><html lang="en"><head><meta charset="utf-8"><title>{html.escape(self.title)}</title>'
            f"<style>{STYLE}</style></head><body>\n{self._inlined(body)}\n</body></html>\n"
        )
        files = [self.folder / "report.md", self.folder / "report.html"]
        for file, content in zip(files, (text, page), strict=True):
            write_atomically(file, content)
        return files

    def _inlined(self, body: str) -> str:
        """Replace the address of each picture by the picture itself, so that the file can be sent alone."""

        def data(match: re.Match[str]) -> str:
            picture = (self.folder / match[1]).read_bytes()
            return f'src="data:image/png;base64,{base64.b64encode(picture).decode()}"'

        return re.sub(r'src="(pictures/[^"]+)"', data, body)
