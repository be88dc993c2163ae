"""Chooses the runs of the layout test, turns each into a command, and prepares their dataset."""

import argparse
import subprocess
import sys
import sysconfig
from pathlib import Path

from parallel.layout import Layout, parse_layout
from train.config import ConfigError, load_config, world_faults
from train.layout_test.cases import Case, cases, with_references
from train.layout_test.launch import Job
from train.run.names import LOG

VOCAB_SIZE = 4096


def choose(options: argparse.Namespace) -> list[Case]:
    """Return the runs that the command line asks for.

    Raises:
        ValueError: a layout cannot be parsed, or does not fit the devices.
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
    """Return the run as a command of train/main.py.

    Raises:
        ConfigError: the configuration does not allow it.
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
    """Prepare a dataset from Python's standard library."""
    command = [sys.executable, "-m", "data.prepare", "--output", str(work / "dataset"), "--vocab-size", str(VOCAB_SIZE)]
    command += ["--max-megabytes", "6", "--include", "*.py", "--exclude", "site-packages", "--skip-bad-text"]
    command += ["--input", sysconfig.get_path("stdlib")]
    print("preparing text of Python's standard library", flush=True)
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
