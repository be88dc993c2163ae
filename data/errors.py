"""The one error that reading or preparing data raises for its users."""

import sys
from collections.abc import Callable


class DataError(ValueError):
    """A fault in the user's data or settings, told in one line: what was found, what was expected, the remedy."""


class DamagedShardError(DataError):
    """A shard is not what its manifest says."""


def run_command(main: Callable[[], None]) -> None:
    """Run a command-line main; a `DataError` becomes one line on stderr and exit status 2.

    What the operating system refuses meanwhile (a full disk) is exit status 1.
    """
    try:
        main()
    except DataError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    except OSError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(1)
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        sys.exit(130)
