"""Account for the inputs of a preparation: each file named ends in one outcome, and each byte read in one count.

    read        documents, and blank lines, empty documents and byte-order marks
    left out    as --include, --exclude or --max-megabytes ask, or because another name of the file is read
    skipped     what was named and not read, by reason: damaged, not UTF-8, a name that no pattern takes
    not text    by kind: a PDF, a ZIP archive

A file that gives documents is read, even if lines of it are skipped. Those lines and their bytes have a count of their
own. Whoever counts a position in a file also covers it, so a byte that nobody counted is noticed.
"""

from dataclasses import asdict, dataclass, field
from typing import Any

from data.errors import DataError, safe_text

READ, LEFT_OUT, SKIPPED, NOT_TEXT = OUTCOMES = ("read", "left out", "skipped", "not text")
DOCUMENTS, BLANK = "documents", "without text"
LOST = (SKIPPED, NOT_TEXT)
"""The outcomes that --strict refuses."""
_MOST_EXAMPLES = 3


@dataclass
class Count:
    """Whole files, pieces of other files (documents, lines), their size in bytes, and the first few of them."""

    files: int = 0
    pieces: int = 0
    num_bytes: int = 0
    examples: list[str] = field(default_factory=list)


class Account:
    """Counts by outcome and reason.

    Attributes:
        named: number of files that the inputs name, counted where they are found.
        counts: a Count for each (outcome, reason).
    """

    def __init__(self) -> None:
        self.named = 0
        self.counts: dict[tuple[str, str], Count] = {}

    def add(
        self, outcome: str, reason: str, *, files: int = 0, pieces: int = 0, num_bytes: int = 0, example: str = ""
    ) -> None:
        """Add to the count of an outcome and reason."""
        count = self.counts.setdefault((outcome, reason), Count())
        count.files += files
        count.pieces += pieces
        count.num_bytes += num_bytes
        if example and len(count.examples) < _MOST_EXAMPLES:
            count.examples.append(safe_text(example))

    def merge(self, other: "Account") -> None:
        """Add all counts of another account."""
        self.named += other.named
        for (outcome, reason), count in other.counts.items():
            self.add(outcome, reason, files=count.files, pieces=count.pieces, num_bytes=count.num_bytes)
            examples = self.counts[outcome, reason].examples
            examples += count.examples[: _MOST_EXAMPLES - len(examples)]

    def total(self, *outcomes: str) -> Count:
        """Return the sum of the counts with one of the outcomes, of all counts if none is given."""
        chosen = [count for (outcome, _), count in self.counts.items() if not outcomes or outcome in outcomes]
        return Count(
            sum(count.files for count in chosen),
            sum(count.pieces for count in chosen),
            sum(count.num_bytes for count in chosen),
            [example for count in chosen for example in count.examples],
        )

    def to_json(self) -> dict[str, Any]:
        """Return the account as a JSON object, in an order that the inputs alone decide."""
        rows = sorted(self.counts.items(), key=lambda item: (OUTCOMES.index(item[0][0]), item[0][1]))
        return {
            "named": self.named,
            "counts": [{"outcome": outcome, "reason": reason, **asdict(count)} for (outcome, reason), count in rows],
        }

    @classmethod
    def from_json(cls, value: dict[str, Any]) -> "Account":
        """Return the account that `to_json` gave."""
        account = cls()
        account.named = value["named"]
        for row in value["counts"]:
            count = {name: row[name] for name in ("files", "pieces", "num_bytes", "examples")}
            account.counts[row["outcome"], row["reason"]] = Count(**count)
        return account

    def check(self) -> None:
        """Raise DataError unless every file named has exactly one outcome."""
        if self.total().files != self.named:
            raise DataError(
                f"the inputs do not add up: {self.named} files named, {self.total().files} accounted for; the input "
                "changed meanwhile, so start over with --overwrite"
            )

    def lines(self) -> list[str]:
        """Return the account as lines for the terminal; what was not read comes after the first."""
        first = ", ".join(
            f"{count.files} {outcome}"
            for outcome in OUTCOMES
            if (count := self.total(outcome)).files or outcome == READ
        )
        found = [f"inputs: {self.named} files named: {first}; {_size(self.total(READ).num_bytes)} read"]
        for (outcome, reason), count in self.counts.items():
            if outcome != READ:
                parts = [(count.files, "file"), (count.pieces, "piece")]
                amounts = ", ".join(f"{number} {name}{'s' * (number > 1)}" for number, name in parts if number)
                size = _size(count.num_bytes) if count.num_bytes else "of unknown size"
                example = f"; the first: {count.examples[0]}" if count.examples else ""
                found.append(f"  {outcome}: {amounts}, {size}: {reason}{example}")
        return found


class FileAccount:
    """What became of one file, or of adjoining slices of it, while it is read.

    Args:
        path: the file.
        start, end: the bytes of it that are to be read, as planned.
        skip: count what cannot be read and go on, instead of raising DataError.
    """

    def __init__(self, path: str, start: int, end: int, skip: bool = False) -> None:
        self.path, self.start, self.end, self.skip = path, start, end, skip
        self.first = self.last = start
        self.account = Account()

    def begin(self, position: int) -> None:
        """Note where reading begins: the first byte that the slice before does not read."""
        self.first = self.last = position

    def add(self, outcome: str, reason: str, num_bytes: int, pieces: int = 1, example: str = "") -> None:
        """Count the next bytes of the file."""
        self.account.add(outcome, reason, pieces=pieces, num_bytes=num_bytes, example=example)

    def lose(self, outcome: str, reason: str, num_bytes: int, message: str) -> None:
        """Count bytes that cannot be read; raise DataError with the message unless they may be skipped."""
        if not self.skip:
            raise DataError(message)
        self.add(outcome, reason, num_bytes, example=message)

    def cover(self, position: int) -> None:
        """Note that reading has passed `position`."""
        self.last = position

    def check(self, is_plain: bool) -> None:
        """Raise DataError unless every byte read was counted once, and all bytes of the slice were read.

        Args:
            is_plain: the positions are those of the file itself. They are not if it is compressed or transcoded.
        """
        counted = self.account.total().num_bytes
        if counted != self.last - self.first or (is_plain and self.last < self.end):
            raise DataError(
                f"{self.path}: of the bytes {self.first} to {max(self.last, self.end)}, {counted} are accounted for; "
                "the file changed while it was read, so start over with --overwrite"
            )

    def join(self, later: "FileAccount") -> None:
        """Add a later slice of the file; raise DataError if the two adjoin, yet bytes between them were not read."""
        if self.end == later.start and self.last != later.first:
            raise DataError(
                f"{self.path}: bytes {self.last} to {later.first} were not read once; the file changed while it was "
                "read, so start over with --overwrite"
            )
        self.end, self.last = later.end, later.last
        self.account.merge(later.account)

    def close(self) -> Account:
        """Return the account with the file in one outcome: read, unless it gave no documents and something was lost."""
        if (READ, DOCUMENTS) in self.account.counts or not self.account.total(*LOST).pieces:
            documents = (READ, DOCUMENTS) in self.account.counts
            self.account.add(READ, DOCUMENTS if documents else BLANK, files=1)
            return self.account
        lost = {key: count for key, count in self.account.counts.items() if key[0] in LOST}
        outcome, reason = max(lost, key=lambda key: lost[key].num_bytes)
        if len(lost) == 1 and lost[outcome, reason].pieces == 1:
            lost[outcome, reason].pieces = 0  # the file itself
        self.account.add(outcome, reason, files=1)
        return self.account

    def to_json(self) -> dict[str, Any]:
        """Return what `from_json` takes."""
        return {
            **{key: value for key, value in vars(self).items() if key != "account"},
            "account": self.account.to_json(),
        }

    @classmethod
    def from_json(cls, value: dict[str, Any]) -> "FileAccount":
        """Return the account of a file that `to_json` gave."""
        one = cls(value["path"], value["start"], value["end"], value["skip"])
        one.first, one.last, one.account = value["first"], value["last"], Account.from_json(value["account"])
        return one


def _size(num_bytes: int) -> str:
    return f"{num_bytes / 1e6:.1f} MB" if num_bytes >= 100_000 else f"{num_bytes} bytes"
