"""Load a whole model from a run in one process, whatever layout trained it; needs neither ranks nor their libraries."""

import argparse
from os import PathLike, fspath
from pathlib import Path

import torch
from torch import Tensor
from torch.distributed import ProcessGroup

from data.command_line import add_allow_commands, print_warning, whole_number
from data.errors import DataError
from data.files.address import is_command, local_path
from data.shards.manifest import Manifest
from data.shards.tokenizer import Tokenizer
from data.stream.dataset import open_dataset
from model.initialize import calibrate, named_parameters
from model.normalized_weights import start_spectral_norms
from model.taper import set_gate, share_gate, taper_norms
from model.transformer import Transformer
from parallel.state.chunks import is_of_shard, whole_chunk
from train.checkpoint import load as checkpoint
from train.checkpoint.folder import Folder
from train.config import Config, config_from_dict
from train.config.schedule import norm_gate
from train.run.directory import recorded_run_id
from train.run.names import CONFIG
from train.run.reader import RunError, RunReader
from train.run.same_run import Use

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float64": torch.float64}


def add_model_arguments(parser: argparse.ArgumentParser) -> None:
    """Add --step, --data, --allow-commands, --device and --dtype: which weights of a run, and how they are held."""
    parser.add_argument(
        "--step", type=whole_number(0), metavar="N", help="checkpoint to load (default: the newest intact one)"
    )
    parser.add_argument("--data", metavar="DIR", help="another prepared dataset with the same tokenizer")
    add_allow_commands(parser)
    parser.add_argument("--device", metavar="NAME", help="cpu, cuda or cuda:N (default: the GPU if there is one)")
    parser.add_argument(
        "--dtype", choices=list(DTYPES), default="float32", help="of the weights (default: %(default)s)"
    )


def load_run(
    run: str | PathLike[str],
    *,
    step: int | None,
    device: str | torch.device | None,
    dtype: torch.dtype | None,
    data: str | None,
    allow_commands: bool,
) -> tuple[Transformer, Tokenizer]:
    """Load a model and its tokenizer: what `train.load` does."""
    place = chosen_device(device)
    config, manifest, tokenizer = open_run(local_path(fspath(run)), data, allow_commands)
    saved = find_checkpoint(config, manifest, step)
    return load_whole(saved, config, place, dtype or torch.float32), tokenizer


def chosen_device(name: str | torch.device | None) -> torch.device:
    """Return a device by its name, and the GPU if there is one, else the CPU, for None.

    Raises:
        DataError: there is no such device here.
    """
    there = ["cpu", *(f"cuda:{index}" for index in range(torch.cuda.device_count()))]
    if name is None:
        return torch.device(there[1] if len(there) > 1 else "cpu")
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError, ImportError):  # torch raises any of these, depending on its build
        raise DataError(f"device {name}: cannot be used here; this machine has {', '.join(there)}") from None
    return device


def open_run(run: Path, data: str | None, allow_commands: bool) -> tuple[Config, Manifest, Tokenizer]:
    """Return a run's configuration, dataset and tokenizer; arguments as for `run_config`. No weights are read.

    Raises:
        RunError, ConfigError, DataError: one of them cannot be read.
    """
    config = run_config(run, data, allow_commands)
    manifest = open_dataset(config.data.path, config.data.read_options())
    return config, manifest, Tokenizer(manifest.tokenizer_path)


def run_config(run: Path, data: str | None = None, allow_commands: bool = False) -> Config:
    """Read a run's configuration, to use its weights.

    Args:
        run: its folder, which may have been moved.
        data: another prepared dataset with the same tokenizer; None takes the run's own.
        allow_commands: whether the run's own dataset may be read by a command. `data` may always.

    Raises:
        RunError, ConfigError: there is no run, or its configuration is damaged.
    """
    tree = RunReader(run).config()
    if tree is None:
        raise RunError(f"{run}: holds no run (no {CONFIG})")
    tree.pop("health", None)  # not used here; earlier versions took values that are refused now
    tree["run_dir"] = str(run)
    if data is not None:
        tree["data"] = {**tree.get("data", {}), "path": data}
    return config_from_dict(tree, allow_commands or is_command(data or ""))


def find_checkpoint(
    config: Config, manifest: Manifest | None, step: int | None = None, group: ProcessGroup | None = None
) -> checkpoint.SavedCheckpoint:
    """Find a run's checkpoint and check its files.

    Args:
        manifest: of the dataset that is used; None if none is, and the checkpoint alone counts.
        step: of the checkpoint; None takes the newest that is intact, and warns of newer ones that are not.
        group: from `checkpoint_group`; None in a process that has joined no group.

    Raises:
        RunError, CheckpointError: there is none, it is damaged, or it does not fit the configuration.
    """
    root, run_id = Folder(config.checkpoint_folder), recorded_run_id(Path(config.run_dir))
    if step is None:
        saved, faults = checkpoint.newest_sound(root, group, run_id)
        for fault in faults:
            print_warning(f"{fault}; the one before is taken")
        if saved is None:
            raise RunError(f"{config.run_dir}: has no complete checkpoint yet; wait for one (checkpoint.interval)")
    else:
        saved = checkpoint.sound_at(root, group, run_id, step)
    dataset = saved.marker["dataset"] if manifest is None else checkpoint.dataset_identity(manifest)
    checkpoint.check_fits(saved, config, dataset, Use.WEIGHTS)
    return saved


def load_whole(
    saved: checkpoint.SavedCheckpoint, config: Config, device: torch.device, dtype: torch.dtype
) -> Transformer:
    """Build the whole model with a checkpoint's weights, ready to evaluate.

    Raises:
        CheckpointError: a tensor is missing or has another shape.
    """
    with torch.device("meta"):
        model = Transformer(config.model, saved.marker["dataset"]["vocab_size"])
    model.to(dtype).to_empty(device=device)
    model.tie_head()
    calibrate(model, model.config)
    share_gate(taper_norms(model), device)
    set_gate(taper_norms(model), norm_gate(config, saved.step))
    tensors: dict[str, Tensor] = {f"model.{name}": parameter.detach() for name, parameter in named_parameters(model)}
    buffers = dict(model.named_buffers())
    of_shards = {f"buffer.tp0of1.{name}": buffers.pop(name) for name in list(buffers) if is_of_shard(name)}
    tensors.update({f"buffer.{name}": buffer for name, buffer in buffers.items()})
    if of_shards.keys() <= saved.names:
        tensors.update(of_shards)
    saved.read([whole_chunk(name, tensor) for name, tensor in tensors.items()])
    if not of_shards.keys() <= saved.names:  # another tensor-parallel size saved it
        start_spectral_norms(model)
    return model.eval()
