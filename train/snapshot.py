"""Copy the code and the resolved configuration into a run's folder, and print that folder.

    python -m train.snapshot --config configs/ereg_1b.json --world-size 16 [section.key=value ...]

A job that is requeued for weeks then runs the code that it was submitted with, even if the checkout changes. An
existing snapshot is kept if this user took it, or if it is the code of this checkout; delete run_dir/code to take a new
one. Anybody else's would run as this user. A configuration that cannot start on that many processes is refused first,
with exit status 2.
"""

import argparse
import contextlib
import hashlib
import os
import secrets
import shutil
from pathlib import Path

from data.command_line import print_faults, run_command
from data.errors import DataError
from data.files.address import user_cache_folder
from data.files.own import write_atomically
from data.files.strict_json import to_json
from train.config import ConfigError, load_config
from train.run.directory import check_is_of_a_run, check_links
from train.run.names import CODE, RESOLVED
from train.run.provenance import COMMIT, git_commit
from train.run.reader import RunError
from train.start.preflight import preflight

ROOT = Path(__file__).resolve().parents[1]
REMEDY = "delete it to take a new one of this checkout"
PACKAGES = ("model", "parallel", "data", "train", "configs", "slurm")


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m train.snapshot", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--config", required=True, metavar="FILE", help="JSON configuration")
    parser.add_argument("overrides", nargs="*", metavar="section.key=value", help="override single configuration keys")
    parser.add_argument(
        "--world-size", type=int, required=True, metavar="N", help="number of processes that will train"
    )
    options = parser.parse_intermixed_args(arguments)
    try:
        config = load_config(options.config, options.overrides)
        preflight(config, options.world_size)
        run_dir = Path(config.run_dir)
        check_links(run_dir)
        if run_dir.exists():
            check_is_of_a_run(run_dir)
        take(run_dir)
        resolved = {**config.as_dict(), "run_dir": str(run_dir.resolve())}
        write_atomically(run_dir / RESOLVED, to_json(resolved, indent=2) + "\n", mode=config.file_mode)
    except (ConfigError, RunError) as error:
        print_faults(error)
        return 2
    except OSError as error:
        print_faults(OSError(f"run_dir {config.run_dir}: cannot be written ({error}); choose another run_dir"))
        return 2
    print(run_dir.resolve())
    return 0


def take(run_dir: Path) -> None:
    """Copy the packages to run_dir/code unless that exists. An interrupted copy does not count as one.

    Raises:
        RunError: there is a snapshot that neither this user nor this checkout made.
    """
    code = run_dir / CODE
    if code.exists():
        _check_own(code)
        return
    partial = run_dir / f"{CODE}.{secrets.token_hex(4)}.tmp"
    for package in PACKAGES:
        if (ROOT / package).exists():
            shutil.copytree(ROOT / package, partial / package, ignore=shutil.ignore_patterns("__pycache__"))
    (partial / COMMIT).write_text(f"{git_commit() or 'unknown'}\n")  # not that of a repository it may lie in
    with contextlib.suppress(DataError, OSError):  # without a home, only this checkout's code is known as the user's
        record = _record(digest_of(partial))
        record.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        record.touch()
    os.replace(partial, code)


def digest_of(root: Path) -> str:
    """Return a sha256 of the names and contents of all files in the packages of a copy of the project.

    Raises:
        RunError: one of them is a link, which can lead anywhere.
    """
    digest = hashlib.sha256()
    for path in sorted(path for package in PACKAGES for path in (root / package).rglob("*")):
        if path.is_symlink():
            raise RunError(f"{path}: is a link in a copy of the code; {REMEDY}")
        if path.is_file() and "__pycache__" not in path.parts:
            content = hashlib.sha256(path.read_bytes()).hexdigest()
            digest.update(f"{path.relative_to(root).as_posix()}\0{content}\n".encode())
    return digest.hexdigest()


def _check_own(code: Path) -> None:
    """Check that a snapshot is the user's, and delete bytecode in it, which would run in the place of its source."""
    if others := sorted({path.name for path in code.iterdir()} - {*PACKAGES, COMMIT}):
        raise RunError(f"{code}: holds {others[0]!r:.60}, which no snapshot of the code has; {REMEDY}")
    digest, is_recorded = digest_of(code), False
    with contextlib.suppress(DataError, OSError):
        is_recorded = _record(digest).exists()
    if not is_recorded and digest != digest_of(ROOT):
        raise RunError(f"{code}: is a copy of the code that you have not taken, and a job would run it; {REMEDY}")
    for bytecode in list(code.rglob("__pycache__")):
        shutil.rmtree(bytecode)


def _record(digest: str) -> Path:
    """Return the file that says that this user has taken the snapshot of a digest."""
    return user_cache_folder() / "snapshots" / digest


if __name__ == "__main__":
    run_command(main)
