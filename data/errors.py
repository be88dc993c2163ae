"""The errors that reading or preparing data raises, and how their messages are made safe to print."""

import re

_SECRETS = [
    # scheme://user:password@host
    re.compile(r"(://)[^/?#\s'\"]+(@)"),
    # user:password@host, as libraries print an address without its scheme
    re.compile(r"((?:^|[\s/('\"=]))[^\s/:@'\"()=]+:[^\s/@'\"]+(@)"),
    # ?token=... of an address
    re.compile(
        r"(?i)([?&;][\w.-]*(?:token|secret|passw|pwd|signature|credential|key|auth|jwt|sig|sas)[\w.-]*=)[^\s&;'\"#]+()"
    ),
    # Authorization: Bearer ...  X-Auth-Token: ...
    re.compile(
        r"(?i)\b((?:(?:proxy-)?authorization|cookie|[\w-]+-(?:token|key|secret))\s*:\s*(?:(?:bearer|basic|token)\s+)?)"
        r"[^\s'\"]+()"
    ),
    # API_KEY=...  password=...
    re.compile(r"\b([A-Z0-9_]*(?:TOKEN|SECRET|PASSWORD|KEY)[A-Z0-9_]*=)[^\s;&'\"]+()"),
    re.compile(r"(?i)\b((?:password|passwd|pwd|secret|access_?token|api_?key)=)[^\s;&'\"]+()"),
    # --token ...  -u user:password
    re.compile(r"(?i)(--?(?:token|password|passwd|secret|api-key|user|u)[= ])(?!-)[^\s'\"]+()"),
]
HIDDEN = "***"
MOST_LINES, MOST_CHARACTERS = 50, 1500
"""Of a message, and of each of its lines."""


class DataError(ValueError):
    """A fault in the user's data or settings. One line states what was found, what was expected, and the remedy.

    Control characters in the message are escaped, since file names and server replies may hold them. Secrets of
    addresses are hidden.
    """

    def __init__(self, message: str) -> None:
        super().__init__(safe_text(message))


class DamagedShardError(DataError):
    """A shard does not match its manifest."""


class DamagedShardFileError(DamagedShardError):
    """A shard's file does not match its manifest. It is the original, or a cached copy that can be fetched again."""


def printable(text: str, keep: str = "") -> str:
    """Return `text` with control characters escaped as in a Python string, except those in `keep`."""
    return "".join(char if char.isprintable() or char in keep else repr(char)[1:-1] for char in text)


def redacted(text: str) -> str:
    """Return a text with the secrets of the addresses and commands in it replaced by "***".

    A secret is the user and password before a host, or the value of a parameter, header or option with a name like
    "token" or "password". Host and path stay, since people need them to find a fault.
    """
    for secret in _SECRETS:
        text = secret.sub(rf"\g<1>{HIDDEN}\g<2>", text)
    return text


def safe_text(text: str, keep: str = "") -> str:
    """Return a text that is safe to print: its control characters are escaped and its secrets hidden."""
    return redacted(printable(text, keep))


def message_lines(error: BaseException) -> list[str]:
    """Return an error's message for the terminal: lines of `safe_text`, cut where they are too long or too many."""
    lines = [safe_text(line[:MOST_CHARACTERS]) for line in str(error).splitlines()]
    shown = [line if len(line) <= MOST_CHARACTERS else f"{line[: MOST_CHARACTERS - 3]}..." for line in lines]
    more = len(shown) - MOST_LINES
    return shown if more <= 0 else [*shown[: MOST_LINES - 1], f"and {more + 1} more"]


def first_line(error: BaseException) -> str:
    """Return the first line of an error's message, or the name of its class if it has none."""
    return (str(error) or type(error).__name__).splitlines()[0]
