"""Where a dataset's files come from."""

from dataclasses import dataclass
from pathlib import Path

from data.errors import DataError

MANIFEST_NAME = "manifest.json"


@dataclass(frozen=True)
class Source:
    """The files of one dataset in a local folder."""

    root: Path

    def describe(self, name: str) -> str:
        """How an error message calls the file `name`."""
        return str(self.root / name)

    def fetch(self, name: str, sha256: str, num_bytes: int | None = None) -> Path:
        """`name` as a local file. A local dataset is read in place; its reader checks what it reads."""
        return self.root / name

    def read(self, name: str, max_bytes: int) -> bytes:
        """The whole of a small file."""
        path = self.root / name
        try:
            if path.stat().st_size > max_bytes:
                raise DataError(f"{path}: larger than the {max_bytes} bytes that such a file may have")
            return path.read_bytes()
        except OSError as error:
            raise DataError(
                f"{path}: cannot be read ({error.strerror}); expected a dataset made by data.prepare"
            ) from error


def open_source(path: str | Path) -> Source:
    return Source(Path(path))
