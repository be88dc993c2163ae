"""The configuration: one frozen dataclass per section, read from one JSON file. All faults are reported at once.

Precedence: defaults < file < `section.key=value` on the command line. An example of the last:

    python train/main.py --config configs/ereg.json model.num_layers=6 training.train_steps=100 --dry-run
"""

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from data.errors import HIDDEN, DataError, redacted
from data.files.address import is_command, local_path, resolved_address
from data.files.strict_json import shown, to_json
from data.shards.manifest import SPLITS, Manifest
from data.stream.token_stream import open_reader
from model.config import ModelConfig, explained
from model.regularizer import RegularizerConfig
from parallel.config import ParallelConfig
from parallel.grid import RankGrid
from train.config.sections import (
    CheckpointConfig,
    DataConfig,
    DistillationConfig,
    DownstreamConfig,
    HealthConfig,
    LoggingConfig,
    OptimizerConfig,
    TrainingConfig,
)
from train.config.tree import ConfigError, apply_override, build, close_to, read_json, shown_key


@dataclass(frozen=True)
class Config:
    """The whole configuration of a run."""

    model: ModelConfig = ModelConfig()
    regularizer: RegularizerConfig = RegularizerConfig()
    parallel: ParallelConfig = ParallelConfig()
    data: DataConfig = DataConfig()
    optimizer: OptimizerConfig = OptimizerConfig()
    training: TrainingConfig = TrainingConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()
    distillation: DistillationConfig = DistillationConfig()
    health: HealthConfig = HealthConfig()
    logging: LoggingConfig = LoggingConfig()
    downstream: DownstreamConfig = DownstreamConfig()
    deepspeed: dict[str, Any] = field(
        default_factory=dict,
        metadata={
            "help": "Passed on to DeepSpeed: its own reports and the sizes of its buckets. Keys that "
            "follow from other sections, or whose features this program does not support, are refused."
        },
    )
    run_dir: str = explained(
        "runs/default",
        "Folder of this run: configuration, metrics, checkpoints, figures. A run that is already there continues.",
    )

    def as_dict(self) -> dict[str, Any]:
        """Return all keys, for another process to train with; without the user's word that commands may run."""
        tree = dataclasses.asdict(self)
        tree["data"]["allow_commands"] = False
        return tree

    def record(self) -> dict[str, Any]:
        """Return all keys as the files of a run keep them and commands print them: without secrets of addresses."""
        return {key: _without_secrets(value) for key, value in self.as_dict().items()}

    @property
    def file_mode(self) -> int:
        """Permissions of a file that holds `as_dict`: the owner's alone if an address has a secret."""
        return 0o666 if self.record() == self.as_dict() else 0o600

    @property
    def checkpoint_folder(self) -> str:
        """Folder or address of the run's checkpoints."""
        return self.checkpoint.path or f"{self.run_dir}/checkpoints"

    @property
    def train_steps(self) -> int:
        """Return the optimizer steps of the run. If it is given in tokens, they are rounded up to whole steps."""
        if self.training.train_steps is not None:
            return self.training.train_steps
        assert self.training.train_tokens is not None
        return -(-self.training.train_tokens // self.tokens_per_step)

    @property
    def tokens_per_step(self) -> int:
        return self.training.global_batch_size * self.model.seq_length

    def data_parallel_size(self, world_size: int) -> int:
        return world_size // self.parallel.ranks_per_batch

    def grid(self, world_size: int, rank: int = 0) -> RankGrid:
        """Return the place of process `rank` among `world_size` processes."""
        return self.parallel.grid(world_size, rank)

    def num_micro_batches(self, world_size: int) -> int:
        return self.training.global_batch_size // (self.training.micro_batch_size * self.data_parallel_size(world_size))


def load_config(path: str | Path, overrides: list[str] | None = None) -> Config:
    """Read a configuration file, apply overrides, check everything, and fill in the architecture's ingredients.

    Args:
        overrides: `section.key=value`, applied over the file.

    Raises:
        ConfigError: the file cannot be read, or a value is wrong. It holds all faults, each with its remedy.
    """
    try:
        tree = read_json(local_path(path))
    except DataError as error:
        raise ConfigError([f"--config {error}"]) from None
    faults = allowed_in_file(tree)
    for override in overrides or []:
        apply_override(tree, override, faults)
    _let_override_win(tree, overrides or [])
    return _checked(tree, faults, allows_commands(overrides or []))


def config_from_dict(tree: dict[str, Any], allow_commands: bool = False) -> Config:
    """Build a configuration from a tree as `Config.as_dict` returns it, with the checks of `load_config`.

    Args:
        allow_commands: whether the user has allowed on the command line that addresses run commands.
    """
    return _checked(tree, allowed_in_file(tree), allow_commands)


def allows_commands(overrides: list[str]) -> bool:
    """Return whether overrides on the command line allow commands: they say so, or name a command as data.path."""
    values = dict(override.partition("=")[::2] for override in overrides)
    return values.get("data.allow_commands") == "true" or is_command(values.get("data.path", ""))


def allowed_in_file(tree: dict[str, Any]) -> list[str]:
    """Return a fault if a file allows commands, which only the command line may."""
    data = tree.get("data")
    if not isinstance(data, dict) or data.get("allow_commands", False) is False:
        return []
    return ["data.allow_commands: counts on the command line only; remove it from the file and add it there"]


def _checked(tree: dict[str, Any], faults: list[str], allow_commands: bool) -> Config:
    config = _with_paths(build(Config, tree, "", faults), faults)
    config = dataclasses.replace(config, data=dataclasses.replace(config.data, allow_commands=allow_commands))
    faults += section_faults(config)
    if faults:
        raise ConfigError(faults)
    return dataclasses.replace(config, model=config.model.resolved())


def _with_paths(config: Config, faults: list[str]) -> Config:
    """Turn the addresses of this machine into paths, so that all of the program finds the same files."""

    def path(key: str, address: str | None, resolve: Callable[[str], Any]) -> Any:
        if not address:
            return address
        try:
            if HIDDEN in address:
                raise DataError(f"{address}: was recorded without its secret; name the address on the command line")
            return str(resolve(address))
        except DataError as error:
            faults.append(f"{key} = {error}")
            return address

    data, checkpoint, distillation = config.data, config.checkpoint, config.distillation
    return dataclasses.replace(
        config,
        run_dir=path("run_dir", config.run_dir, local_path),
        data=dataclasses.replace(
            data,
            path=path("data.path", data.path, resolved_address),
            cache_dir=path("data.cache_dir", data.cache_dir, local_path),
        ),
        checkpoint=dataclasses.replace(
            checkpoint,
            path=path("checkpoint.path", checkpoint.path, resolved_address),
            init_from=path("checkpoint.init_from", checkpoint.init_from, resolved_address),
        ),
        distillation=dataclasses.replace(
            distillation, teacher=path("distillation.teacher", distillation.teacher, resolved_address)
        ),
    )


def _without_secrets(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _without_secrets(item) for key, item in value.items()}
    return redacted(value) if isinstance(value, str) else value


def section_faults(config: Config) -> list[str]:
    """Return the faults that can be found without knowing the world size or the dataset."""
    faults = config.model.faults()
    if not faults:
        faults += config.parallel.faults(config.model.resolved())
    faults += config.regularizer.faults(config.model.num_layers)
    sections = (
        config.data,
        config.optimizer,
        config.training,
        config.checkpoint,
        config.distillation,
        config.health,
        config.logging,
        config.downstream,
    )
    for section in sections:
        faults += section.faults()
    if not config.run_dir:
        faults.append("run_dir is empty; name the folder of this run, say runs/first")
    return faults + teacher_faults(config) + deepspeed_faults(config)


def teacher_faults(config: Config) -> list[str]:
    """Return a fault if a layout with a teacher splits layers, vocabulary or positions."""
    if config.distillation.teacher is None:
        return []
    sizes = ("tensor_parallel_size", "pipeline_parallel_size", "context_parallel_size")
    split = [
        f"parallel.{name} = {getattr(config.parallel, name)}" for name in sizes if getattr(config.parallel, name) > 1
    ]
    if not split:
        return []
    return [
        f"distillation.teacher is not possible with {', '.join(split)}: each rank compares all logits of whole "
        "sequences; set it to 1 and use data parallelism with parallel.zero_stage instead"
    ]


DERIVED_DEEPSPEED_KEYS = {
    "train_batch_size": "training.global_batch_size",
    "train_micro_batch_size_per_gpu": "training.micro_batch_size",
    "gradient_accumulation_steps": "training.global_batch_size and micro_batch_size",
    "gradient_clipping": "optimizer.gradient_clipping",
    "optimizer": "the section optimizer",
    "scheduler": "optimizer.schedule",
    "bf16": "training.precision",
    "fp16": "training.precision",
    "data_types": "training.precision",
    "pipeline": "the pipeline's correctness under sequence parallelism",
    "prescale_gradients": "how gradients are averaged (parallel/engine/sharded_adam.py)",
    "gradient_predivide_factor": "how gradients are averaged (parallel/engine/sharded_adam.py)",
    "zero_optimization.stage": "parallel.zero_stage",
    "zero_optimization.memory_efficient_linear": "how blocks are compiled (parallel/engine/engine.py)",
    "zero_allow_untested_optimizer": "the section optimizer",
}


PASSED_DEEPSPEED_KEYS = (
    "comms_logger",
    "csv_monitor",
    "dump_state",
    "memory_breakdown",
    "steps_per_print",
    "tensorboard",
)
"""Keys of DeepSpeed that this program passes on: reports of its own, which change no gradient."""
PASSED_ZERO_KEYS = (
    "allgather_bucket_size",
    "allgather_partitions",
    "contiguous_gradients",
    "overlap_comm",
    "reduce_bucket_size",
    "reduce_scatter",
    "stage3_gather_16bit_weights_on_model_save",
    "stage3_max_live_parameters",
    "stage3_max_reuse_distance",
    "stage3_model_persistence_threshold",
    "stage3_param_persistence_threshold",
    "stage3_prefetch_bucket_size",
    "sub_group_size",
)
"""Likewise of its section zero_optimization: sizes, and ways to the same sums. A slow test trains with all of them."""


def deepspeed_faults(config: Config) -> list[str]:
    """Return a fault for each key of the deepspeed section that is derived from other sections or not passed on."""
    faults = []
    zero = config.deepspeed.get("zero_optimization", {})
    if not isinstance(zero, dict):
        return [f"deepspeed.zero_optimization = {shown(zero)} must be a section (a JSON object)"]
    derived = {key.partition(".")[0] for key in DERIVED_DEEPSPEED_KEYS} - {"zero_optimization"}
    for prefix, keys, known in (
        ("deepspeed", config.deepspeed.keys() - derived - {"zero_optimization"}, PASSED_DEEPSPEED_KEYS),
        ("deepspeed.zero_optimization", zero.keys() - {"stage", "memory_efficient_linear"}, PASSED_ZERO_KEYS),
    ):
        faults += [
            f"{prefix}.{shown_key(key)} is not passed on to DeepSpeed; {close_to(key, known)}"
            for key in sorted(keys - set(known))
        ]
    for key, source in DERIVED_DEEPSPEED_KEYS.items():
        node: Any = config.deepspeed
        for part in key.split("."):
            node = node.get(part) if isinstance(node, dict) else None
        if node is not None:
            faults.append(f"deepspeed.{key} = {to_json(node)} is derived from {source}; remove it and set that instead")
    return faults


def world_faults(config: Config, world_size: int) -> list[str]:
    """Return the reasons why the sizes do not fit the number of processes."""
    if world_size < 1:
        return [f"the world size {world_size} must be at least 1"]
    if faults := config.parallel.world_faults(world_size):
        return faults
    dp = config.data_parallel_size(world_size)
    group = config.training.micro_batch_size * dp
    if config.training.global_batch_size % group:
        return [
            f"training.global_batch_size = {config.training.global_batch_size} is not a multiple of micro_batch_size("
            f"{config.training.micro_batch_size}) * data-parallel size({dp}) = {group}; change one of them"
        ]
    return []


def dataset_faults(config: Config, manifest: Manifest) -> list[str]:
    """Return the reasons why the dataset cannot be used: a split too short for a sample, a cache too small."""
    data, faults = config.data, []
    for split in SPLITS:
        try:
            open_reader(
                manifest,
                split,
                config.model.seq_length,
                config.training.seed,
                data.shuffle_window_shards,
                data.read_options(),
            )
        except DataError as error:
            faults.append(str(error))
    return faults


def _let_override_win(tree: dict[str, Any], overrides: list[str]) -> None:
    """Let a run's length on the command line replace the file's, even if the file gives it in the other unit."""
    named = {override.partition("=")[0] for override in overrides} & {"training.train_steps", "training.train_tokens"}
    if len(named) == 1 and isinstance(tree.get("training"), dict):
        other = {"training.train_steps": "train_tokens", "training.train_tokens": "train_steps"}[named.pop()]
        tree["training"].pop(other, None)
