"""Damage between runs: a flipped byte, a cut, a missing or replaced file, in a run's folder or its dataset."""

import contextlib
import os
import shutil
from collections.abc import Callable
from pathlib import Path

from tests.torture.attack import Lost, Outcome, Trial, attack
from tests.torture.judge import errors, is_object, judged, same_weights
from tests.torture.processes import Ended
from tests.torture.stand import ONE

CURVES = ("metrics.jsonl", "entropy.jsonl", "ranks.jsonl", "journal.jsonl")
"""Files that hold what cannot be computed again: their damage has to be told, and the original kept."""


def files_of(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*") if path.is_file() and not path.is_symlink())


def some_file(trial: Trial, run: Path, dataset: Path) -> Path:
    """Choose a file: of the run's own folder, of its checkpoints or of the dataset, each a third of the time."""
    kind = trial.random.choice(["run", "checkpoints", "dataset"])
    if kind == "dataset":
        return trial.random.choice(files_of(dataset))
    inside = [path for path in files_of(run) if ("checkpoints" in path.parts) == (kind == "checkpoints")]
    return trial.random.choice(inside)


def resumed_after(trial: Trial, harm: Callable[[Trial, Path], None]) -> Outcome:
    """Do harm to one file of a killed run or its dataset, start it again, and judge.

    A refused start is not enough: with the file as it was, the run has to end as if nothing had happened.
    """
    run = trial.half_done()
    dataset = shutil.copytree(trial.stand.dataset, trial.folder / "dataset")
    file = some_file(trial, run, dataset)
    name, sound = str(file.relative_to(trial.folder)), file.read_bytes()
    harm(trial, file)
    harmed = file.read_bytes() if file.is_file() else None
    ended = trial.train(run, ONE, f"data.path={dataset}")
    try:
        outcome = judged(run, trial, ended)
        if outcome is Outcome.SURVIVED and file.name == "journal.jsonl" and harmed is not None:
            journal_kept(run, ended, sound, harmed)
        return outcome if outcome is Outcome.SURVIVED else restored(trial, run, dataset, file, sound)
    except Lost as error:
        if file.name in CURVES and told_and_kept(trial, run, ended, file.name, harmed):
            return Outcome.NAMED
        raise Lost(f"{name}: {error}") from None


def restored(trial: Trial, run: Path, dataset: Path, file: Path, sound: bytes) -> Outcome:
    """Put the sound file back after a refused start; then nothing may have been lost."""
    with contextlib.suppress(OSError):
        shutil.rmtree(file) if file.is_dir() and not file.is_symlink() else file.unlink()
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_bytes(sound)
    again = trial.train(run, ONE, f"data.path={dataset}")
    if judged(run, trial, again) is not Outcome.SURVIVED:
        raise Lost(f"refused even with the sound file: {errors(again)[0][:300]}")
    return Outcome.NAMED


def told_and_kept(trial: Trial, run: Path, ended: Ended, name: str, harmed: bytes | None) -> bool:
    """Whether a damaged curve was told of, in the terminal and the journal, and what was left of it is kept."""
    if set(ended.statuses) != {0}:
        return False
    same_weights(trial.stand.straight(), run, exact=True)
    warned = any(line.startswith("warning:") and name in line for line in ended.text.splitlines())
    journaled = name in (run / "journal.jsonl").read_text(errors="replace") or name == "journal.jsonl"
    kept = [path for path in run.iterdir() if path.is_file() and path.name.startswith(name) and path.name != name]
    return warned and journaled and (harmed is None or any(path.read_bytes() == harmed for path in kept))


def journal_kept(run: Path, ended: Ended, sound: bytes, harmed: bytes) -> None:
    """Raise Lost unless every event of the harmed journal is still there, and the loss of a sound one was told.

    The last event may be missing without a word: a crash, too, cuts the line that is being written.
    """
    text = (run / "journal.jsonl").read_text(errors="replace")
    lines = harmed.decode(errors="replace").splitlines()
    if gone := [line for line in lines[:-1] if line not in text]:
        raise Lost(f"a line of the journal was removed: {gone[0][:200]}")
    readable = sum(map(is_object, lines))
    warned = any(line.startswith("warning:") and "journal" in line for line in ended.text.splitlines())
    if readable < len(sound.splitlines()) - 1 and not warned:
        raise Lost(f"of {len(sound.splitlines())} events of the journal {readable} are left, without a word")


@attack("flips")
def flip_a_byte(trial: Trial) -> Outcome:
    """One byte of any file of a killed run or of its dataset becomes another; then the run is started again."""

    def flip(trial: Trial, file: Path) -> None:
        content = bytearray(file.read_bytes() or b" ")
        place, value = trial.random.randrange(len(content)), trial.random.randrange(1, 256)
        content[place] ^= value
        file.write_bytes(content)
        trial.did(f"{file.relative_to(trial.folder)}: byte {place} of {len(content)} ^ {value:#x}")

    return resumed_after(trial, flip)


@attack("flips")
def change_a_digit(trial: Trial) -> Outcome:
    """One digit in a text file of a killed run becomes another, so that it still parses."""

    def change(trial: Trial, file: Path) -> None:
        content = bytearray(file.read_bytes())
        places = [place for place, byte in enumerate(content) if chr(byte).isdigit()] or [0]
        place = trial.random.choice(places)
        content[place] = ord("0") + (content[place] - ord("0") + trial.random.randint(1, 9)) % 10
        file.write_bytes(content)
        trial.did(f"{file.relative_to(trial.folder)}: the digit at {place} of {len(content)}")

    return resumed_after(trial, change)


@attack("cuts")
def cut_a_file(trial: Trial) -> Outcome:
    """Any file of a killed run or of its dataset ends early, or has something appended."""

    def cut(trial: Trial, file: Path) -> None:
        size = file.stat().st_size
        length = trial.random.choice([0, size // 2, max(size - 1, 0), trial.random.randrange(size + 1)])
        os.truncate(file, length)
        extra = trial.random.choice([b"", b"", b"\0" * 4096, trial.random.randbytes(50), b'{"step": 3}\n', b"\n\n"])
        with file.open("ab") as opened:
            opened.write(extra)
        trial.did(f"{file.relative_to(trial.folder)}: {length} of {size} bytes left, then {len(extra)} others")

    return resumed_after(trial, cut)


@attack("deletions")
def delete_a_file(trial: Trial) -> Outcome:
    """Any file of a killed run or of its dataset is missing at the next start."""

    def delete(trial: Trial, file: Path) -> None:
        file.unlink()
        trial.did(f"{file.relative_to(trial.folder)} deleted")

    return resumed_after(trial, delete)


@attack("deletions")
def put_something_else_in_place_of_a_file(trial: Trial) -> Outcome:
    """A folder, a pipe, a device or a link lies where a file of a killed run or its dataset was."""

    def replace(trial: Trial, file: Path) -> None:
        kind = trial.random.choice(["folder", "full folder", "pipe", "zeros", "full", "loop", "nowhere"])
        file.unlink()
        if kind.endswith("folder"):
            file.mkdir()
            if kind == "full folder":
                (file / "notes.txt").write_text("mine")
        elif kind == "pipe":
            os.mkfifo(file)
        else:
            targets = {"zeros": "/dev/zero", "full": "/dev/full", "loop": file.name, "nowhere": "/no/such/file"}
            file.symlink_to(targets[kind])
        trial.did(f"{file.relative_to(trial.folder)} is now: {kind}")

    return resumed_after(trial, replace)
