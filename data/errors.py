"""The errors that reading or preparing data raises, and how their messages are made safe to print."""


class DataError(ValueError):
    """A fault in the user's data or settings. One line states what was found, what was expected, and the remedy.

    Control characters in the message are escaped, since file names and server replies may hold them.
    """

    def __init__(self, message: str) -> None:
        super().__init__(printable(message))


class DamagedShardError(DataError):
    """A shard does not match its manifest."""


class DamagedShardFileError(DamagedShardError):
    """A shard's file does not match its manifest. It is the original, or a cached copy that can be fetched again."""


def printable(text: str, keep: str = "") -> str:
    """Return `text` with control characters escaped as in a Python string, except those in `keep`."""
    return "".join(char if char.isprintable() or char in keep else repr(char)[1:-1] for char in text)


def first_line(error: BaseException) -> str:
    """Return the first line of an error's message, or the name of its class if it has none."""
    return (str(error) or type(error).__name__).splitlines()[0]
