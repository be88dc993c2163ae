"""Train every layout that fits this machine, through train/main.py as users do, and compare it with one process.

    python -m train.layout_test                                        # all devices of this machine; make test-gpu
    python -m train.layout_test --only cp=2,dp=2:zero=3 --steps 1 --config configs/ereg_1b.json data.path=datasets/mine

Each layout trains in bf16, compiled, with CUDA graphs where they apply. Two things are compared with one process in
float32: the gradient of every parameter in the first step, as the optimizer received it, and the loss of every step.
One process in bf16 shows how large rounding errors are (train/layout_test/results.py has the rule). Without GPUs,
layouts run as CPU processes, slowly.

The results are a table and a JSON file.

Exit status: 0 all layouts passed, 1 some did not, 2 cannot run as asked.
"""

import argparse
import os
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

from data.command_line import path_argument, print_faults, run_command, whole_number
from parallel.processes.place import forget_launcher
from train.layout_test.cases import ARITHMETICS, FAMILIES, Case
from train.layout_test.jobs import choose, job, prepare
from train.layout_test.launch import Job, run_all
from train.layout_test.report import row, table, write
from train.layout_test.results import Trained, read_run

SMALL = [
    "model.num_layers=4",
    "model.hidden_size=512",
    "model.num_attention_heads=8",
    "training.micro_batch_size=32",
    "training.global_batch_size=64",
    "optimizer.warmup_steps=100",
]
"""Overrides of configs/ereg.json, if no other configuration is named."""


def main(arguments: list[str] | None = None) -> int:
    options = parse(arguments)
    forget_launcher()
    with tempfile.TemporaryDirectory(prefix="layout_test_") as scratch:
        work = options.work or Path(scratch)
        try:
            chosen = choose(options)
            jobs = {case: job(case, options, work) for case in chosen}
        except ValueError as error:
            print_faults(error)
            return 2
        if options.dataset is None:
            prepare(work)
        rows = run(jobs, options, work)
    write(options, rows)
    print(table(rows))
    failed = sum(not row["passed"] for row in rows)
    print(f"\n{len(rows) - failed} of {len(rows)} layouts train as one process does")
    return 1 if failed else 0


def parse(arguments: list[str] | None) -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(
        prog="python -m train.layout_test", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--config", metavar="FILE", help="configuration (default: configs/ereg.json, made smaller)")
    parser.add_argument(
        "--devices", type=whole_number(1), metavar="N", help="devices to use (default: all GPUs, or 2 CPU processes)"
    )
    parser.add_argument("--only", metavar="LIST", help="only these layouts, written as for parallel.compare")
    parser.add_argument(
        "--family", choices=list(FAMILIES), default="EReg", help="with --only: which model (default: EReg)"
    )
    parser.add_argument(
        "--steps", type=whole_number(1), default=20, metavar="N", help="steps of each run (default: 20)"
    )
    parser.add_argument(
        "--at-once", type=whole_number(1), default=4, metavar="N", help="runs that may share a device (default: 4)"
    )
    parser.add_argument(
        "--time-limit",
        type=whole_number(1),
        default=300,
        metavar="S",
        help="seconds that a run may take (default: 300)",
    )
    parser.add_argument(
        "--dataset", metavar="DIR", help="prepared dataset (default: prepare Python's standard library)"
    )
    parser.add_argument(
        "--work", type=path_argument, metavar="DIR", help="folder that keeps runs and logs (default: a temporary one)"
    )
    parser.add_argument(
        "--json",
        type=path_argument,
        metavar="FILE",
        help="file of results (default: docs/benchmarks/layouts_CARD_xN.json on GPUs, else none)",
    )
    parser.add_argument("overrides", nargs="*", metavar="section.key=value", help="override single configuration keys")
    options = parser.parse_intermixed_args(arguments)
    options.devices = options.devices or torch.cuda.device_count() or 2
    if options.config is None:
        options.config, options.overrides = "configs/ereg.json", SMALL + options.overrides
    return options


def run(jobs: dict[Case, Job], options: argparse.Namespace, work: Path) -> list[dict[str, Any]]:
    """Run all jobs. Return a row for each layout; the JSON file is rewritten as they end."""
    if not torch.cuda.is_available():
        os.environ["DS_ACCELERATOR"] = "cpu"
    by_name = {job.name: case for case, job in jobs.items()}
    references: dict[tuple[str, str], Trained | None] = {}
    layouts: list[tuple[Case, Job, Trained | None]] = []
    rows: list[dict[str, Any]] = []
    began = time.monotonic()
    for done, ended in enumerate(run_all(list(jobs.values()), options.devices, options.at_once, options.time_limit), 1):
        case, trained = by_name[ended.name], read_run(ended.log.parent) if ended.status == 0 else None
        if case.is_reference:
            references[case.family, case.arithmetic] = trained
        else:
            layouts.append((case, ended, trained))
        ready = [each for each in layouts if {(each[0].reference_family, a) for a in ARITHMETICS} <= references.keys()]
        rows = [row(*each, references) for each in ready]
        write(options, rows)
        left = (time.monotonic() - began) / done * (len(jobs) - done)
        said = "trained" if trained is not None else f"failed: {ended.last_words}"
        print(f"{done}/{len(jobs)}  {case.name}: {said}  ({ended.seconds:.0f} s, {left:.0f} s left)", flush=True)
    return rows


if __name__ == "__main__":
    run_command(main)
