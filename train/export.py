"""Export a checkpoint of a run for the transformers library, whatever layout trained it:

    python -m train.export --run runs/first --output exported
    python -m train.export --run runs/first --output exported --fold

The folder holds weights (safetensors), configuration, tokenizer and a model card. Unless the model is a stock GPT-2, it
also holds one Python file with the network. --fold leaves softmax attention alone in each layer: FFNs without an
activation become part of the matrices around them.
"""

import argparse
import os
import secrets
import shutil
from pathlib import Path

from data.command_line import (
    add_allow_commands,
    path_argument,
    print_faults,
    print_warning,
    real_number,
    run_command,
    whole_number,
)
from data.errors import DataError
from parallel.launch import LaunchError, choose_accelerator
from parallel.processes.place import forget_launcher
from train.config import ConfigError
from train.run.reader import RunError

FORMATS = ("hf", "gpt2")
DTYPES = ("float32", "bfloat16")


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m train.export", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--run", required=True, type=path_argument, metavar="DIR", help="folder of the run")
    parser.add_argument(
        "--output", required=True, type=path_argument, metavar="DIR", help="folder to write; it must not exist"
    )
    parser.add_argument(
        "--format", choices=FORMATS, default="hf",
        help="hf: any architecture, loaded with trust_remote_code. gpt2: a stock GPT-2, for SM+LN+G, SM+LN+R and "
        "SM+LN (default: hf)",
    )  # fmt: skip
    parser.add_argument("--dtype", choices=DTYPES, default="float32", help="of the weights (default: float32)")
    parser.add_argument(
        "--step", type=whole_number(0), metavar="N", help="step of the checkpoint (default: the newest)"
    )
    parser.add_argument("--fold", action="store_true", help="fold linear FFNs and temperatures per head away")
    parser.add_argument(
        "--largest-condition", type=real_number(1), metavar="X",
        help="with --fold: keep a matrix in a layer where the condition number of a basis would exceed X "
        "(default: 1000; 100 in bfloat16)",
    )  # fmt: skip
    parser.add_argument(
        "--tokenizer", type=path_argument, metavar="FILE", help="tokenizer.model (default: that of the run's dataset)"
    )
    add_allow_commands(parser)
    options = parser.parse_args(arguments)
    if options.largest_condition is not None and not options.fold:
        parser.error("--largest-condition needs --fold")
    forget_launcher()
    choose_accelerator()
    from train.checkpoint.root import CheckpointError

    try:
        export(options)
    except (ConfigError, DataError, RunError, CheckpointError, LaunchError) as error:
        print_faults(error)
        return 2
    return 0


def export(options: argparse.Namespace) -> None:
    """Write the folder that a command line asks for; it is there as a whole or not at all.

    Raises:
        ConfigError, DataError, RunError, CheckpointError, LaunchError: the run cannot be exported like this.
        OSError: the folder cannot be written.
    """
    from train.exchange.folder import Form, write_folder
    from train.exchange.source import open_trained

    check_output(options.output)
    form = Form(options.format, options.dtype, options.fold, options.largest_condition)
    trained = open_trained(options.run, options.step, options.allow_commands)
    form.check(trained.config.model)
    tokenizer = trained.tokenizer(options.tokenizer)
    if trained.saved.step < trained.config.train_steps:
        print_warning(f"{options.run}: at step {trained.saved.step} of {trained.config.train_steps}")
    temporary = options.output.with_name(f".{options.output.name}.{secrets.token_hex(4)}.tmp")
    temporary.mkdir()
    try:
        lines = write_folder(temporary, trained, tokenizer, form)
        os.replace(temporary, options.output)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise
    print("\n".join([*lines, f"written: {options.output}"]))


def check_output(folder: Path) -> None:
    """Raise RunError unless a folder of this name can be made, or is there and empty."""
    if folder.is_symlink() or (folder.exists() and (not folder.is_dir() or any(folder.iterdir()))):
        raise RunError(f"{folder}: exists; choose a new --output, or remove it")
    if not folder.parent.is_dir() or not os.access(folder.parent, os.W_OK):
        raise RunError(f"{folder}: expected a name in a folder that exists and can be written")


if __name__ == "__main__":
    run_command(main)
