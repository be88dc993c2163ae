"""Trains a model:

    deepspeed train/main.py --config configs/ereg.json [section.key=value ...]
    python train/main.py --config configs/ereg.json --dry-run

The same command on a run_dir that holds a run continues it. Exit status: 0 done, 1 failed while running, 2 cannot start
as asked.
"""

import argparse
import os
import sys
from pathlib import Path

sys.path[0] = str(Path(__file__).resolve().parents[1])  # the packages lie beside train/, installed or not

from data.errors import DataError  # noqa: E402
from train.config import Config, ConfigError, dataset_faults, load_config, world_faults  # noqa: E402
from train.run_dir import RunError  # noqa: E402


def main(arguments: list[str] | None = None) -> int:
    options = parse(arguments)
    try:
        config = load_config(options.config, options.overrides)
        if options.dry_run:
            from train.dry_run import print_plan

            print_plan(config, options.world_size)
            return 0
        return train(config)
    except (ConfigError, DataError, RunError) as error:
        return report(error, 2)


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


def train(config: Config) -> int:
    """Checks what needs no device, then trains."""
    from data.manifest import load_manifest
    from parallel.launch import LaunchError, choose_accelerator, world_size

    manifest = load_manifest(config.data.path, config.data.read_options())
    faults = world_faults(config, world_size()) + dataset_faults(config, manifest)
    if faults:
        raise ConfigError(faults)
    choose_accelerator()
    from parallel.replicas import ReplicaError
    from train.checkpoint import CheckpointError
    from train.trainer import TrainingError, run

    try:
        result = run(config, manifest)
    except CheckpointError as error:
        return report(error, 2)
    except (LaunchError, TrainingError) as error:
        return report(error, 1)
    except (DataError, ReplicaError) as error:  # met by some ranks only, which tell it
        return report(error, 1, from_any_rank=True)
    finally:
        leave()
    if is_rank_zero():
        if result is None:
            print(f"{config.run_dir} is complete at step {config.train_steps}; raise training.train_steps to go on")
        else:
            print(
                f"done: validation perplexity {result.perplexity:.3f} ({result.loss:.4f} nats a token); see "
                f"{config.run_dir}"
            )
    return 0


def report(error: Exception, status: int, from_any_rank: bool = False) -> int:
    """Prints one line a fault from rank 0 or, where only some ranks know of it, from each of those."""
    if is_rank_zero() or from_any_rank:
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
    sys.exit(main())
