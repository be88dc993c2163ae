"""Train a model:

    deepspeed train/main.py --config configs/ereg.json [section.key=value ...]
    python train/main.py --config configs/ereg.json --dry-run

The same command on a run_dir that holds a run continues it. Exit status (train/faults.py): 0 done, or saved and
stopped as asked; 1 failed while running; 2 cannot start as asked; 3 the numbers went wrong and going back did not
help; 4 a time limit passed.
"""

import argparse
import os
import signal
import sys
import traceback
from pathlib import Path
from typing import TYPE_CHECKING

sys.path[0] = str(Path(__file__).resolve().parents[1])  # the packages lie beside train/, installed or not

from data.command_line import print_warning, run_command  # noqa: E402
from data.errors import printable, redacted  # noqa: E402
from parallel.processes.lifetime import end_with_launcher  # noqa: E402
from parallel.processes.place import is_launched, place  # noqa: E402
from train.config import Config, load_config  # noqa: E402
from train.config.schedule import start_warnings  # noqa: E402
from train.faults import DONE, explained, fault_of, is_rank_zero, report  # noqa: E402
from train.loop.signals import StopRequest  # noqa: E402
from train.start import timeline  # noqa: E402
from train.start.same_start import start_together  # noqa: E402

if TYPE_CHECKING:
    from train.loop.validation import Validation


def main(arguments: list[str] | None = None) -> int:
    options = parse(arguments)
    has_started, run_dir = False, "run_dir"
    try:
        if options.dry_run:
            return dry_run(options)
        stop = StopRequest()  # before the libraries, which take a while to load
        timeline.begin(show=place().rank == 0)  # a faulty launcher is the first thing to hear of
        config, manifest = start_together(options.config, options.overrides)
        run_dir = config.run_dir
        from parallel.launch import choose_accelerator, warm_device

        choose_accelerator()
        with timeline.phase("import"), warm_device():
            from train.loop.trainer import run

        has_started = True
        result = run(config, manifest, stop)
        leave()
    except Exception as error:
        timeline.finish()  # shows no more
        if fault := fault_of(error, has_started):
            return report(error, fault)
        if (known := explained(error, run_dir)) and has_started:
            return report(*known)
        raise
    if is_rank_zero():
        print(last_words(config, result.step, result.validation))
    stop.close()  # not after a fault: a signal that ends the ranks of a failed one must not hide this one's status
    return DONE


def dry_run(options: argparse.Namespace) -> int:
    """Print what would run."""
    from train.plan import print_dry_run

    config = load_config(options.config, options.overrides)
    print_dry_run(config, options.world_size)
    for _, text in start_warnings(config):
        print_warning(text)
    return DONE


def parse(arguments: list[str] | None) -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(
        prog="train/main.py",
        description="Train an entropy-guided softmax-only transformer, or any architecture of its paper.",
        epilog="Every key with its meaning and default: python -m train.describe",
    )
    parser.add_argument(
        "--config", required=True, metavar="FILE", help="JSON configuration, for instance configs/ereg.json"
    )
    parser.add_argument(
        "overrides", nargs="*", metavar="section.key=value", help="overrides of single keys, applied over the file"
    )
    parser.add_argument(
        "--dry-run", action="store_true", help="print what would run (configuration, parameters, steps, ranks) and exit"
    )
    parser.add_argument(
        "--world-size",
        type=int,
        metavar="N",
        help="with --dry-run: number of processes (default: the smallest that fits)",
    )
    parser.add_argument("--local_rank", type=int, help=argparse.SUPPRESS)  # passed by DeepSpeed's launcher
    return parser.parse_intermixed_args(arguments)


def last_words(config: Config, step: int, validation: "Validation | None") -> str:
    """Return the line that a training process prints at its end."""
    if validation is not None:
        return (
            f"done: validation perplexity {validation.perplexity:.3f} ({validation.loss:.4f} nats a token); see "
            f"{printable(config.run_dir)}"
        )
    if step < config.train_steps:
        return f"stopped as asked at step {step} of {config.train_steps}; the same command goes on"
    return f"{printable(config.run_dir)} is complete at step {step}; raise training.train_steps to go on"


def leave() -> None:
    """Leave the process group, if this process has joined one."""

    import torch.distributed as dist

    if dist.is_initialized():
        dist.destroy_process_group()


if __name__ == "__main__":
    if parse(None).dry_run:  # whose output may be cut off (`| head`), and which has no other ranks to think of
        run_command(main)
    if is_launched():
        end_with_launcher()
    try:
        status = main()
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        status = 128 + signal.SIGINT
    except Exception:  # whose cause nobody foresaw
        print(redacted(traceback.format_exc()), file=sys.stderr)
        status = 1
    sys.stdout.flush()
    sys.stderr.flush()
    if status:
        os._exit(status)  # an orderly end would wait for ranks that may be gone
