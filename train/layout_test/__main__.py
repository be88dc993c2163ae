"""Trains every layout that fits this machine through train/main.py, as users do, and compares it with one process.

    python -m train.layout_test                                        # all devices of this machine; make test-gpu
    python -m train.layout_test --only cp=2,dp=2:zero=3 --steps 1 --config configs/ereg_1b.json data.path=datasets/mine

Each layout trains in bf16, compiled, with CUDA graphs where they apply. The gradient of every parameter in the first
step, as the optimizer took it, and the loss of every step are compared with one process in float32. One process in bf16
shows what rounding does; train/layout_test/results.py has the rule. Without GPUs layouts run as CPU processes, slowly.

Prints a table, and writes JSON. Exit status: 0 all layouts passed, 1 some did not, 2 cannot run as asked.
"""

import argparse
import dataclasses
import json
import os
import subprocess
import sys
import sysconfig
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

from data.arguments import whole_number
from data.errors import print_faults, run_command
from parallel.layout import Layout, parse_layout
from train.benchmark.report import machine
from train.config import ConfigError, load_config, world_faults
from train.layout_test.cases import ARITHMETICS, FAMILIES, Case, cases, with_references
from train.layout_test.launch import Job, run_all
from train.layout_test.results import Trained, judge, read_run
from train.run.names import LOG

SMALL = [
    "model.num_layers=4",
    "model.hidden_size=512",
    "model.num_attention_heads=8",
    "training.micro_batch_size=32",
    "training.global_batch_size=64",
    "optimizer.warmup_steps=100",
]
"""Over configs/ereg.json, unless another configuration is named."""
VOCAB_SIZE = 4096


def main(arguments: list[str] | None = None) -> int:
    options = parse(arguments)
    with tempfile.TemporaryDirectory(prefix="layout_test_") as scratch:
        work = Path(options.work or scratch)
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
    parser = argparse.ArgumentParser(
        prog="python -m train.layout_test", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--config", metavar="FILE", help="configuration (default: a small configs/ereg.json)")
    parser.add_argument("--devices", type=whole_number(1), metavar="N", help="devices to use (default: all GPUs, or 2)")
    parser.add_argument("--only", metavar="LIST", help="these layouts alone, as parallel.compare takes them")
    parser.add_argument(
        "--family", choices=list(FAMILIES), default="EReg", help="with --only: which model (default EReg)"
    )
    parser.add_argument("--steps", type=whole_number(1), default=20, metavar="N", help="steps of each run (default 20)")
    parser.add_argument(
        "--at-once", type=whole_number(1), default=4, metavar="N", help="runs that share a device (default 4)"
    )
    parser.add_argument("--time-limit", type=whole_number(1), default=300, metavar="S", help="of a run (default 300 s)")
    parser.add_argument("--dataset", metavar="DIR", help="a prepared dataset (default: Python's standard library)")
    parser.add_argument("--work", metavar="DIR", help="keep runs and logs there (default: a temporary folder)")
    parser.add_argument(
        "--json", metavar="FILE", help="default: docs/benchmarks/layouts_CARD_xN.json where there are GPUs"
    )
    parser.add_argument("overrides", nargs="*", metavar="section.key=value", help="overrides of single keys")
    options = parser.parse_intermixed_args(arguments)
    options.devices = options.devices or torch.cuda.device_count() or 2
    if options.config is None:
        options.config, options.overrides = "configs/ereg.json", SMALL + options.overrides
    return options


def choose(options: argparse.Namespace) -> list[Case]:
    """The runs that were asked for.

    Raises:
        ValueError: a layout does not read as one, or does not fit the devices.
    """
    if options.only is None:
        return cases(options.devices)
    layouts = [parse_layout(text) for text in options.only.split(",")]
    too_large = [
        f"layout {layout} needs {layout.world_size} devices"
        for layout in layouts
        if layout.world_size > options.devices
    ]
    if too_large:
        raise ConfigError([f"{fault}, and --devices is {options.devices}" for fault in too_large])
    return with_references([Case(options.family, layout, "trained") for layout in layouts if layout != Layout()])


def job(case: Case, options: argparse.Namespace, work: Path) -> Job:
    """The run as a command.

    Raises:
        ConfigError: it cannot be trained so.
    """
    folder = work / case.name.replace(" ", "_").replace("=", "").replace(":", "_")
    overrides = [
        "training.train_tokens=null",
        f"training.train_steps={options.steps}",
        "training.evaluation_interval=0",
        "checkpoint.interval=1",
        f"checkpoint.keep={options.steps}",
        "checkpoint.keep_best=false",
        "logging.interval=1",
        "logging.tensorboard=false",
        f"data.path={options.dataset or work / 'dataset'}",
        *options.overrides,
        f"run_dir={folder}",
    ]
    micro_batch_size = load_config(options.config, overrides).training.micro_batch_size
    overrides += case.overrides(micro_batch_size)
    faults = world_faults(load_config(options.config, overrides), case.layout.world_size)
    if faults:
        raise ConfigError([f"{case.name}: {fault}" for fault in faults])
    folder.mkdir(parents=True, exist_ok=True)
    return Job(case.name, case.layout.world_size, ["--config", options.config, *overrides], folder / LOG)


def prepare(work: Path) -> None:
    """Makes a dataset of Python's standard library."""
    command = [sys.executable, "-m", "data.prepare", "--output", str(work / "dataset"), "--vocab-size", str(VOCAB_SIZE)]
    command += ["--max-megabytes", "6", "--include", "*.py", "--exclude", "site-packages", "--skip-bad-text"]
    command += ["--input", sysconfig.get_path("stdlib")]
    print("preparing text of Python's standard library", flush=True)
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)


def run(jobs: dict[Case, Job], options: argparse.Namespace, work: Path) -> list[dict[str, Any]]:
    """Runs everything; a row for each layout, written as they come."""
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


def row(
    case: Case, job: Job, trained: Trained | None, references: dict[tuple[str, str], Trained | None]
) -> dict[str, Any]:
    """A line of the table, as JSON takes it."""
    named = {
        "family": case.family,
        "layout": str(case.layout),
        "devices": case.layout.world_size,
        "seconds": job.seconds,
    }
    truth, baseline = (references.get((case.reference_family, each)) for each in ARITHMETICS)
    if trained is None:
        return {**named, "passed": False, "verdict": f"FAILED {job.last_words}"}
    if truth is None or baseline is None:
        return {**named, "passed": False, "verdict": "FAILED its reference did not train"}
    verdict = judge(trained, truth, baseline)
    return {**named, "verdict": verdict.words, **dataclasses.asdict(verdict)}


def write(options: argparse.Namespace, rows: list[dict[str, Any]]) -> None:
    file = options.json
    if file is None and torch.cuda.is_available():
        card = torch.cuda.get_device_name().removeprefix("NVIDIA ").split()[0].lower()
        file = f"docs/benchmarks/layouts_{card}_x{options.devices}.json"
    if file is not None:
        about = {
            **machine(),
            "command": "python -m train.layout_test " + " ".join(sys.argv[1:]),
            "steps": options.steps,
        }
        Path(file).parent.mkdir(parents=True, exist_ok=True)
        Path(file).write_text(json.dumps({"machine": about, "layouts": rows}, indent=1) + "\n")


def table(rows: list[dict[str, Any]]) -> str:
    """Fixed columns, a line for each layout."""
    width = max(len(f"{row['family']} {row['layout']}") for row in rows)
    lines = [f"{'layout':<{width}}  devices  gradient (limit)     loss, nats (limit)   norm    worst parameter"]
    for each in rows:
        name = f"{each['family']} {each['layout']}"
        if "gradient_error" not in each:
            lines.append(f"{name:<{width}}  {each['devices']:7d}  {each['verdict']}")
            continue
        lines.append(
            f"{name:<{width}}  {each['devices']:7d}  {each['gradient_error']:.1e} ({each['gradient_limit']:.1e})    "
            f"{each['loss_error_nats']:.1e} ({each['loss_limit_nats']:.1e})    {each['gradient_norm']:.4f}  "
            f"{each['worst_parameter']}  {'' if each['passed'] else each['verdict']}".rstrip()
        )
    return "\n".join(lines)


if __name__ == "__main__":
    run_command(main)
