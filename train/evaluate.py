"""Evaluate a run's newest checkpoint on the whole validation split, in one process, whatever layout trained it:

    python -m train.evaluate --run runs/quickstart

Writes evaluation.json: validation loss (nats a token), perplexity, and the mean entropy in nats of every head.

    python -m train.evaluate --run runs/quickstart --tasks lambada_openai,piqa

runs tasks of lm-evaluation-harness instead and writes evaluation_tasks.json. It needs the extra 'eval'.
"""

import argparse
import dataclasses
import math
from functools import partial
from pathlib import Path
from typing import Any

from data.command_line import (
    add_allow_commands,
    can_write,
    path_argument,
    print_faults,
    print_warning,
    run_command,
    whole_number,
)
from data.errors import DataError
from data.files.own import write_atomically
from data.files.strict_json import to_json
from parallel.launch import LaunchError, choose_accelerator
from parallel.processes.place import forget_launcher
from train.config import Config, ConfigError
from train.run.names import EVALUATION, TASKS
from train.run.reader import RunError
from train.start.compiled_code import keep_compiled_code_private

DESCRIPTION = "Evaluate a run's newest checkpoint on the validation split, in one process, whatever layout trained it."


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m train.evaluate", description=DESCRIPTION)
    parser.add_argument(
        "--run", required=True, type=path_argument, metavar="DIR", help="folder of a run that has a checkpoint"
    )
    parser.add_argument("--data", metavar="DIR", help="evaluate on another prepared dataset with the same tokenizer")
    add_allow_commands(parser)
    parser.add_argument(
        "--samples",
        type=whole_number(1),
        metavar="N",
        help="evaluate only the first N validation sequences, or the first N documents of each task (default: all)",
    )
    parser.add_argument(
        "--tasks", metavar="A,B", help="run these tasks of lm-evaluation-harness instead of the validation split"
    )
    parser.add_argument("--task-files", type=path_argument, metavar="DIR", help="take tasks from files in this folder")
    options = parser.parse_args(arguments)
    if options.tasks is None and options.task_files is not None:
        parser.error("--task-files needs --tasks")
    if options.tasks is not None and options.data is not None:
        parser.error("--data names validation data, which --tasks does not use")
    forget_launcher()
    choose_accelerator()
    from train.checkpoint.root import CheckpointError

    try:
        if options.tasks is not None:
            return evaluate_tasks(options)
        keep_compiled_code_private()
        row = evaluate(options.run, options.data, options.samples, options.allow_commands)
    except (ConfigError, DataError, RunError, CheckpointError, LaunchError) as error:
        print_faults(error)
        return 2
    write_atomically(options.run / EVALUATION, to_json(row, indent=1) + "\n")
    if "reason" in row:
        print_warning(row["reason"])
    print(summary(row, options.run))
    return 0


def evaluate_tasks(options: argparse.Namespace) -> int:
    """Run tasks, print the result and write evaluation_tasks.json.

    Args:
        options: the parsed command line.

    Raises:
        RunError, ConfigError, DataError, CheckpointError, LaunchError: as `train.exchange.harness.run_tasks`.
    """
    from parallel.launch import local_device
    from train.exchange.harness import run_tasks

    file = options.run / TASKS
    if options.run.is_dir() and not can_write(file):
        raise RunError(f"{file}: cannot be written; remove what is in its place, or copy the run")
    names = [name.strip() for name in options.tasks.split(",") if name.strip()]
    row = run_tasks(
        options.run, names, options.task_files, options.samples, local_device().type, options.allow_commands
    )
    write_atomically(file, to_json(row, indent=1) + "\n")
    for task, metrics in row["tasks"].items():
        print(f"step {row['step']}: {task}: " + ", ".join(f"{name} {value:.4f}" for name, value in metrics.items()))
    print(f"written: {file}")
    return 0


def evaluate(run: Path, data: str | None, samples: int | None, allow_commands: bool = False) -> dict[str, Any]:
    """Evaluate a run's newest checkpoint.

    Args:
        run: its folder.
        data: another prepared dataset with the same tokenizer; None takes the run's own.
        samples: number of validation sequences; None takes all.
        allow_commands: whether the run's own dataset may be read by a command. `data` may always.

    Returns:
        What evaluation.json holds: losses in nats a token, entropies in nats.

    Raises:
        ConfigError, DataError, RunError, CheckpointError, LaunchError: the run cannot be evaluated.
    """
    from data.stream.dataset import open_dataset
    from parallel.engine.engine import evaluate_stage
    from parallel.launch import initialize_distributed
    from parallel.state.training_state import load_weights
    from train.checkpoint.load import checkpoint_group
    from train.checkpoint.whole import find_checkpoint, run_config
    from train.loop.validation import validate
    from train.parts import build_stage

    config = single_process(run_config(run, data, allow_commands))
    if not can_write(run / EVALUATION):
        raise RunError(f"{run / EVALUATION}: cannot be written; remove what is in its place, or copy the run")
    initialize_distributed()
    manifest = open_dataset(config.data.path, config.data.read_options())
    saved = find_checkpoint(config, manifest, group=checkpoint_group(config.health.save_limit_s))
    stage, groups = build_stage(config, manifest.vocab_size)
    load_weights(stage, groups, saved, manifest.vocab_size)
    result = validate(stage, groups, config, saved.step, samples, partial(evaluate_stage, stage))
    lost = not math.isfinite(result.loss)
    return {
        **(
            {"reason": f"the validation loss is {result.loss}: the weights are lost; null is not finite"}
            if lost
            else {}
        ),
        "step": saved.step,
        "tokens": saved.step * config.tokens_per_step,
        "validation_loss": result.loss,
        "validation_loss_halves": result.halves,
        "validation_perplexity": result.perplexity,
        "validation_tokens": result.tokens,
        "max_entropy_nats": math.log(config.model.seq_length),
        **result.heads.as_row(),
    }


def single_process(config: Config) -> Config:
    """Return the same model and data for one process."""
    return dataclasses.replace(config, parallel=type(config.parallel)())


def summary(row: dict[str, Any], run: Path) -> str:
    """Describe the result in three lines for the terminal."""
    means = [sum(layer) / len(layer) for layer in row["entropy_nats"]]
    lines = [
        f"step {row['step']}: validation perplexity {row['validation_perplexity']:.3f} "
        f"({row['validation_loss']:.4f} nats a token over {row['validation_tokens']:,} tokens)",
        f"mean entropy of the heads by layer, in nats (ln T = {row['max_entropy_nats']:.2f}): "
        + " ".join(f"{mean:.2f}" for mean in means),
        f"written: {run / EVALUATION}; pictures: python -m train.figures --run {run}; curves: tensorboard "
        f"--logdir {run}",
    ]
    return "\n".join(lines)


if __name__ == "__main__":
    run_command(main)
