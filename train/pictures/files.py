"""Write a picture to a file."""

import io
from pathlib import Path
from typing import TYPE_CHECKING

from data.files.own import write_atomically

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def write_picture(figure: "Figure", file: Path, dpi: float) -> None:
    """Write a figure in the format that the file's name ends in; a link of that name is replaced, not followed.

    Raises:
        OSError: it cannot be written.
    """
    content = io.BytesIO()
    figure.savefig(content, format=file.suffix.removeprefix("."), dpi=dpi)
    write_atomically(file, content.getvalue(), durable=False)
