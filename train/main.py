"""Trains a model:

    deepspeed train/main.py --config configs/ereg.json [section.key=value ...]
    python train/main.py --config configs/ereg.json --dry-run

The same command on a run_dir that holds a run continues it. Exit status: 0 done, or saved
and stopped as asked; 1 failed while running; 2 cannot start as asked; 3 the numbers went wrong beyond what going back
mends, so that starting again would not help; 4 a time limit passed.
"""

import argparse
import os
import sys
import traceback
from pathlib import Path
from typing import TYPE_CHECKING

sys.path[0] = str(Path(__file__).resolve().parents[1])  # the packages lie beside train/, installed or not

from data.errors import DataError, first_line, run_command  # noqa: E402
from train.config import Config, ConfigError, load_config  # noqa: E402
from train.config.schedule import fast_start  # noqa: E402
from train.loop.signals import StopRequest  # noqa: E402
from train.run.folder import RunError  # noqa: E402
from train.start.same_start import DifferenceError, LateError, start_together  # noqa: E402

if TYPE_CHECKING:
    from train.loop.validation import Validation


def main(arguments: list[str] | None = None) -> int:
    options = parse(arguments)
    try:
        if options.dry_run:
            from train.cost.dry_run import print_plan

            config = load_config(options.config, options.overrides)
            print_plan(config, options.world_size)
            if text := fast_start(config):
                print(f"warning: {text}", file=sys.stderr)
            return 0
        stop = StopRequest()  # before the libraries, which take a while to load
        status = train(options.config, options.overrides, stop)
    except (ConfigError, DifferenceError, RunError) as error:
        return report(error, 2)
    except DataError as error:  # a dataset that one node does not see, say
        return report(error, 2, from_each_node=True)
    if status == 0:  # else a signal that ends the ranks of a failed one must not hide this one's status
        stop.close()
    return status


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="train/main.py",
        description="Trains an entropy-guided softmax-only transformer, or any architecture of its paper.",
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


def train(path: str, overrides: list[str], stop: StopRequest) -> int:
    """Checks what needs no device, and that all ranks run the same thing; then trains."""
    from parallel.launch import LaunchError, choose_accelerator

    try:
        config, manifest = start_together(path, overrides)
    except LateError as error:
        return report(error, 4)
    except LaunchError as error:
        return report(error, 1, from_each_node=True)
    choose_accelerator()
    from parallel.engine.compiled import BlockCompileError
    from parallel.engine.cuda_graph import CaptureError
    from parallel.engine.deepspeed_section import DeepSpeedSectionError
    from parallel.engine.first_step import GradientError
    from parallel.state.replicas import ReplicaError
    from train.checkpoint.load import CheckpointError
    from train.checkpoint.saver import SaveError
    from train.loop.trainer import DeviceMemoryError, TrainingError, run

    try:
        result = run(config, manifest, stop)
    except CheckpointError as error:
        return report(error, 2)
    except TrainingError as error:
        return report(error, 3)
    except (DeepSpeedSectionError, GradientError) as error:
        return report(error, 2)
    except (BlockCompileError, CaptureError) as error:
        return report(error, 2, from_any_rank=True)
    except DeviceMemoryError as error:
        return report(error, 2 if error.at_start else 1, from_any_rank=True)
    except LaunchError as error:
        return report(error, 1, from_each_node=True)
    except SaveError as error:
        return report(error, 1)
    except (DataError, ReplicaError) as error:  # met by some ranks only, which tell it
        return report(error, 1, from_any_rank=True)
    except OSError as error:  # of the run's own files: a full disk, a folder that is gone
        text = f"{error.filename or config.run_dir}: {error.strerror or error}; make room or mend it, then start again"
        return report(OSError(text), 1, from_any_rank=True)
    except RuntimeError as error:  # gloo and NCCL have no error class of their own
        if not any(name in str(error) for name in ("gloo", "NCCL", "Connection", "Timed out")):
            raise
        lost = RuntimeError(f"lost touch with another rank ({first_line(error)}); its own message says why")
        return report(lost, 1, from_any_rank=True)
    leave()
    if is_rank_zero():
        print(last_words(config, result.step, result.validation))
    return 0


def last_words(config: Config, step: int, validation: "Validation | None") -> str:
    if validation is not None:
        return (
            f"done: validation perplexity {validation.perplexity:.3f} ({validation.loss:.4f} nats a token); see "
            f"{config.run_dir}"
        )
    if step < config.train_steps:
        return f"stopped as asked at step {step} of {config.train_steps}; the same command goes on"
    return f"{config.run_dir} is complete at step {step}; raise training.train_steps to go on"


def report(error: Exception, status: int, from_any_rank: bool = False, from_each_node: bool = False) -> int:
    """Prints one line a fault from rank 0 or, where only some ranks or nodes know of it, from each of those."""
    if is_rank_zero() or from_any_rank or (from_each_node and os.environ.get("LOCAL_RANK", "0") == "0"):
        who = "" if is_rank_zero() else f"rank {os.environ['RANK']}: "
        for line in str(error).splitlines():
            print(f"error: {who}{line}", file=sys.stderr, flush=True)
    return status


def is_rank_zero() -> bool:
    return os.environ.get("RANK", "0") == "0"


def leave() -> None:
    import torch.distributed as dist

    if dist.is_initialized():
        dist.destroy_process_group()


if __name__ == "__main__":
    if parse(None).dry_run:  # whose output may be cut off (`| head`), and which has no other ranks to think of
        run_command(main)
    try:
        status = main()
    except Exception:  # whose cause nobody foresaw
        traceback.print_exc()
        status = 1
    sys.stdout.flush()
    sys.stderr.flush()
    if status:
        os._exit(status)  # an orderly end would wait for ranks that may be gone
