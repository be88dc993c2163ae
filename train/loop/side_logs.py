"""Write what a run can do without: a log that cannot be written is told of once, counted, and never ends the run."""

import contextlib
from collections.abc import Callable, Iterator

from data.errors import first_line, printable


class SideLogs:
    """Guards the writing of side logs.

    Args:
        warn: called with the name of a log and what is wrong, the first time that it cannot be written.

    Attributes:
        failures: how often each log could not be written, by its name.
    """

    def __init__(self, warn: Callable[[str, str], None]) -> None:
        self._warn = warn
        self.failures: dict[str, int] = {}

    @contextlib.contextmanager
    def writing(self, name: str) -> Iterator[None]:
        """Write the log in the body, which is left where an error is raised."""
        try:
            yield
        except Exception as error:  # libraries that draw and encode raise errors of every kind
            self.failures[name] = self.failures.get(name, 0) + 1
            if self.failures[name] == 1:
                self._warn(name, printable(first_line(error)))
