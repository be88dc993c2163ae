"""Check the machines of a job before it starts. Runs on every rank, as training does, also on CPUs.

    deepspeed --num_gpus 8 train/doctor.py --config configs/ereg_1b.json
    python -m train.doctor --config configs/quickstart.json
    sbatch --nodes=16 slurm/doctor.sh

Checks devices (speed, results, memory), the interconnect along each axis, checkpoint and disk speed, the dataset and
its hashes, free space, clocks and versions. Prints a table; --json also writes one JSON line per check, with the
bandwidths and latencies that `train.plan --links` takes.

Exit status: 0 all is well, 1 there is trouble, 2 cannot start as asked.
"""

import argparse
import os
import platform
import statistics
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

if not __package__:  # run as a file: the packages lie beside train/, installed or not
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from data.command_line import can_write, path_argument, print_faults, run_command
from data.errors import DataError
from data.files.strict_json import to_json
from parallel.launch import LaunchError, choose_accelerator, world_size
from parallel.processes.lifetime import end_with_launcher
from parallel.processes.place import is_launched
from train.config import Config, ConfigError, load_config, world_faults
from train.start.facts import config_facts
from train.start.preflight import checkpoint_faults
from train.start.same_start import DifferenceError, LateError, compare_ranks

OUTLIER = 0.8
"""A rank whose speed is below this fraction of the median is reported."""
MAX_CLOCK_SKEW_S = 1.0
SPEEDS = ("matmul", "all-reduce", "checkpoint")


@dataclass
class Row:
    """One check on all ranks; `link` is what the slowest of them measured of an axis."""

    check: str
    unit: str
    values: list[float | None]
    faults: list[str]
    link: dict[str, Any] | None = None

    @property
    def known(self) -> list[float]:
        return [value for value in self.values if value is not None]

    def judge(self, hosts: list[str]) -> None:
        """Add faults that only a comparison of ranks shows: slow ranks, clocks that differ."""
        if not self.known:
            return
        usual = statistics.median(self.known)
        for rank, value in enumerate(self.values):
            if value is None:
                continue
            if self.check.startswith(SPEEDS) and value < OUTLIER * usual:
                self.faults.append(
                    f"rank {rank} on {hosts[rank]}: {value:.4g} {self.unit}, the median is {usual:.4g}; it would hold "
                    "the others up"
                )
            if self.check == "clock skew" and value > MAX_CLOCK_SKEW_S:
                self.faults.append(f"rank {rank} on {hosts[rank]}: its clock is {value:.1f} s off; set it (NTP)")

    def line(self) -> str:
        """Format the check as a line of the table."""
        known = self.known
        numbers = [min(known), statistics.median(known), max(known)] if known else []
        columns = "".join(f"{value:>10.4g}" for value in numbers).rjust(30)
        return f"{self.check:<22}{columns}  {self.unit:<8} {'ok' if not self.faults else 'TROUBLE'}"


def main(arguments: list[str] | None = None) -> int:
    options = parse(arguments)
    is_first = os.environ.get("RANK", "0") == "0"
    try:
        if options.json is not None and is_first and not can_write(options.json):
            raise ConfigError([f"--json {options.json}: cannot be written; name a file in a folder that exists"])
        config = load_config(options.config, options.overrides)
        agree(config)
        rows, hosts = examine(config, options.all_shards)
    except DifferenceError as error:  # the same text on every rank
        if is_first:
            print_faults(error)
        return 2
    except (ConfigError, DataError, LateError, LaunchError) as error:
        print_faults(error)
        return 2
    if is_first:
        print_table(rows, hosts)
        if options.json is not None:
            options.json.write_text("".join(to_json(vars(row)) + "\n" for row in rows))
    return 1 if any(row.faults for row in rows) else 0


def agree(config: Config) -> None:
    """Check sizes and compare configurations before the ranks wait for each other; versions are a row of the table.

    Raises:
        ConfigError, DifferenceError, LateError, LaunchError: as in `train.start.same_start.start_together`.
    """
    faults = world_faults(config, world_size()) + checkpoint_faults(config)
    fault = ConfigError(faults) if faults else None
    if world_size() > 1:
        choose_accelerator()
        compare_ranks(config_facts(config), fault, config.health.start_limit_s)
    if fault is not None:
        raise fault


def parse(arguments: list[str] | None) -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(
        prog="python -m train.doctor", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--config", required=True, metavar="FILE", help="configuration of the job")
    parser.add_argument("overrides", nargs="*", metavar="section.key=value", help="override single configuration keys")
    parser.add_argument("--all-shards", action="store_true", help="hash every shard of the dataset, not only a sample")
    parser.add_argument("--json", type=path_argument, metavar="FILE", help="also write the table as JSON lines")
    parser.add_argument("--local_rank", type=int, help=argparse.SUPPRESS)  # passed by DeepSpeed's launcher
    return parser.parse_intermixed_args(arguments)


def examine(config: Config, all_shards: bool) -> tuple[list[Row], list[str]]:
    """Run every check on every rank. Return all rows and the host of each rank, on all ranks."""
    from data.stream.dataset import open_dataset
    from parallel.launch import initialize_distributed

    manifest_vocab = open_dataset(config.data.path, config.data.read_options()).vocab_size
    choose_accelerator()
    import torch.distributed as dist

    from train.parts import build_groups
    from train.start import checks

    absent = checks.absent_folders(config)  # before any rank makes them
    initialize_distributed()
    groups = build_groups(config)
    findings = [
        checks.matmul(),
        checks.memory(),
        *(checks.bandwidth(axis, group) for axis, group in checks.axes(groups).items()),
        *checks.disk(config),
        checks.free_space(config, manifest_vocab),
        checks.temporary_space(),
        checks.data(config, all_shards),
        checks.clock(),
    ]
    mine = (findings, checks.version_table(config), platform.node())
    everyone: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(everyone, mine)
    checks.remove_empty(absent)
    dist.destroy_process_group()
    hosts = [host for _, _, host in everyone]
    rows = [_row([found[number] for found, _, _ in everyone]) for number in range(len(findings))]
    for row in rows:
        row.judge(hosts)
    return [*rows, _versions([table for _, table, _ in everyone], hosts)], hosts


def print_table(rows: list[Row], hosts: list[str]) -> None:
    """Print the checks and what they found wrong."""
    print(f"{len(hosts)} ranks on {len(set(hosts))} hosts\n")
    print(f"{'check':<22}{'least':>10}{'median':>10}{'most':>10}")
    for row in rows:
        print(row.line())
    faults = [fault for row in rows for fault in row.faults]
    print("\nall is well" if not faults else "\n" + "\n".join(f"trouble: {fault}" for fault in faults))


def _row(of_ranks: list[Any]) -> Row:
    faults = list(dict.fromkeys(fault for finding in of_ranks for fault in finding.faults))
    links = [finding.link for finding in of_ranks if finding.link is not None]
    slowest = min(links, key=lambda link: link["gb_per_s"][-1], default=None)
    return Row(of_ranks[0].check, of_ranks[0].unit, [finding.value for finding in of_ranks], faults, slowest)


def _versions(tables: list[dict[str, str]], hosts: list[str]) -> Row:
    faults = [
        f"rank {rank} on {hosts[rank]}: {name} is {table.get(name)!r}, on rank 0 it is {tables[0].get(name)!r}"
        for rank, table in enumerate(tables)
        for name in sorted(tables[0].keys() | table.keys())
        if table.get(name) != tables[0].get(name)
    ]
    return Row("versions", "", [None] * len(tables), faults)


if __name__ == "__main__":
    if is_launched():
        end_with_launcher()
    run_command(main)
