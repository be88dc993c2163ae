"""Copy the code and the resolved configuration into a run's folder, and print that folder.

    python -m train.snapshot --config configs/ereg_1b.json --world-size 16 [section.key=value ...]

A job that is requeued for weeks then runs the code that it was submitted with, even if the checkout changes. An
existing snapshot is kept; delete run_dir/code to take a new one. A configuration that cannot start on that many
processes is refused first, with exit status 2.
"""

import argparse
import os
import secrets
import shutil
from pathlib import Path

from data.command_line import print_faults, run_command
from data.files.own import write_atomically
from data.files.strict_json import to_json
from train.config import ConfigError, load_config
from train.run.directory import check_is_of_a_run, check_links
from train.run.names import CODE, RESOLVED
from train.run.provenance import COMMIT, git_commit
from train.run.reader import RunError
from train.start.preflight import preflight

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
    """Copy the packages to run_dir/code unless that exists. An interrupted copy does not count as one."""
    code, root = run_dir / CODE, Path(__file__).resolve().parents[1]
    if code.exists():
        return
    partial = run_dir / f"{CODE}.{secrets.token_hex(4)}.tmp"
    for package in PACKAGES:
        if (root / package).exists():
            shutil.copytree(root / package, partial / package, ignore=shutil.ignore_patterns("__pycache__"))
    (partial / COMMIT).write_text(f"{git_commit() or 'unknown'}\n")  # not that of a repository it may lie in
    os.replace(partial, code)


if __name__ == "__main__":
    run_command(main)
