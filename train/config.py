"""The configuration: one frozen dataclass a section, read from one JSON file, every fault reported at once.

Precedence: defaults < file < `section.key=value` on the command line. An example of the last:

    python train/main.py --config configs/ereg.json model.num_layers=6 training.train_steps=100 --dry-run
"""

import dataclasses
import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from data.errors import DataError
from data.manifest import SPLITS, Manifest
from data.sources import ReadOptions
from data.stream import open_reader
from model.config import ModelConfig
from model.regularizer import RegularizerConfig
from parallel.config import ParallelConfig
from parallel.grid import RankGrid
from train.config_tree import ConfigError, apply_override, build, read_json


def _explained(default: Any, text: str) -> Any:
    return field(default=default, metadata={"help": text})


@dataclass(frozen=True)
class DataConfig:
    """Where the tokens come from."""

    path: str = _explained(
        "datasets/quickstart",
        "A prepared dataset (python -m data.prepare): a folder, https://..., s3://... or 'pipe:COMMAND {}'; or a "
        "mixture of some, a .json file as data/mixture.py explains. Its tokenizer fixes the vocabulary.",
    )
    planned_vocab_size: int | None = _explained(
        None,
        "Tokens that --dry-run assumes where the dataset is not prepared yet; training takes the dataset's own number.",
    )
    attention_within_documents: bool = _explained(
        False,
        "Whether a token attends to its own document only, rather than to all that a packed sequence holds before it. "
        "Positions and per-position temperatures stay those of the packed sequence.",
    )
    shuffle_window_shards: int = _explained(
        8, "Shards whose samples are shuffled together; as many are in use at a time, and as many again fetched ahead."
    )
    prefetch_micro_batches: int = _explained(8, "Micro-batches that a thread reads ahead of training.")
    on_damage: Literal["stop", "skip"] = _explained(
        "stop", "A shard that is not what was prepared stops the run, or is left out whole and others take its place."
    )
    cache_dir: str | None = _explained(
        None,
        "Where files from afar are kept, shared by a node's ranks; null means ~/.cache/entropy-guided-transformer.",
    )
    cache_gigabytes: float = _explained(100.0, "Size that the cache keeps to, in GB; what was used longest ago goes.")
    fetch_attempts: int = _explained(5, "How often a file from afar is tried to be fetched before the run stops.")
    fetch_time_limit_s: float = _explained(60.0, "Longest wait for the next MiB of a file from afar, in seconds.")

    def faults(self) -> list[str]:
        faults = []
        if self.planned_vocab_size is not None and self.planned_vocab_size < 1:
            faults.append(f"data.planned_vocab_size = {self.planned_vocab_size} must be at least 1 (tokens), or null")
        for name in ("shuffle_window_shards", "prefetch_micro_batches", "fetch_attempts"):
            if getattr(self, name) < 1:
                faults.append(f"data.{name} = {getattr(self, name)} must be at least 1")
        for name in ("cache_gigabytes", "fetch_time_limit_s"):
            if getattr(self, name) <= 0:
                faults.append(f"data.{name} = {getattr(self, name)} must be positive")
        return faults

    def read_options(self) -> ReadOptions:
        """How the dataset is fetched and checked."""
        return ReadOptions.of(vars(self))


@dataclass(frozen=True)
class OptimizerConfig:
    """AdamW and its learning-rate schedule."""

    learning_rate: float = _explained(1e-3, "Peak learning rate; the paper's CodeParrot runs use 1e-3, Languini 6e-4.")
    min_learning_rate: float = _explained(0.0, "Learning rate at the end of the decay.")
    schedule: Literal["linear", "cosine", "wsd"] = _explained(
        "linear",
        "Decay after warm-up: linear or cosine to the end, or 'wsd': constant, then linear over the last "
        "decay_fraction.",
    )
    warmup_fraction: float = _explained(
        0.05, "Share of train_steps in which the rate rises linearly from 0; the paper uses 0.05."
    )
    warmup_steps: int | None = _explained(None, "Warm-up in steps; overrides warmup_fraction where set.")
    decay_fraction: float = _explained(0.2, "Share of train_steps over which 'wsd' decays.")
    weight_decay: float = _explained(
        0.1, "Decoupled decay of matrices; norms, biases, alpha, beta, temperatures, thresholds have none."
    )
    beta1: float = _explained(0.9, "Adam's decay of the first moment.")
    beta2: float = _explained(
        0.999, "Adam's decay of the second moment; the paper uses 0.999 on CodeParrot, 0.95 on Languini."
    )
    epsilon: float = _explained(1e-8, "Adam's denominator offset.")
    gradient_clipping: float = _explained(
        1.0, "Largest global gradient norm (L2, over all ranks); 0 turns clipping off."
    )

    def faults(self) -> list[str]:
        faults = []
        if self.learning_rate <= 0:
            faults.append(f"optimizer.learning_rate = {self.learning_rate} must be positive")
        elif not 0 <= self.min_learning_rate <= self.learning_rate:
            faults.append(
                f"optimizer.min_learning_rate = {self.min_learning_rate} must lie between 0 and learning_rate = "
                f"{self.learning_rate}"
            )
        for name in ("warmup_fraction", "decay_fraction"):
            if not 0 <= getattr(self, name) <= 1:
                faults.append(
                    f"optimizer.{name} = {getattr(self, name)} must lie in [0, 1]: it is a share of train_steps"
                )
        for name in ("beta1", "beta2"):
            if not 0 <= getattr(self, name) < 1:
                faults.append(f"optimizer.{name} = {getattr(self, name)} must lie in [0, 1)")
        for name in ("weight_decay", "gradient_clipping"):
            if getattr(self, name) < 0:
                faults.append(f"optimizer.{name} = {getattr(self, name)} must not be negative")
        if self.epsilon <= 0:
            faults.append(f"optimizer.epsilon = {self.epsilon} must be positive")
        if self.warmup_steps is not None and self.warmup_steps < 0:
            faults.append(f"optimizer.warmup_steps = {self.warmup_steps} must not be negative")
        return faults


@dataclass(frozen=True)
class TrainingConfig:
    """Batch sizes, length and precision of a run."""

    micro_batch_size: int = _explained(8, "Sequences one data-parallel rank holds at a time; bounds activation memory.")
    global_batch_size: int = _explained(512, "Sequences an optimizer step sees over all ranks and micro-batches.")
    train_steps: int | None = _explained(None, "Optimizer steps of the run; set this or train_tokens.")
    train_tokens: int | None = _explained(
        None, "Tokens of the run, rounded up to whole steps; set this or train_steps."
    )
    seed: int = _explained(1, "Seed of the initial weights and of the order of samples.")
    precision: Literal["auto", "bf16", "fp32"] = _explained(
        "auto",
        "Arithmetic of the forward and backward pass; 'auto' is bf16 on a GPU and fp32 on a CPU. Master weights are "
        "fp32.",
    )
    activation_recompute: Literal["none", "selective", "full"] = _explained(
        "none",
        "What the backward pass computes again to save memory: 'full' whole blocks, of which only the input is kept (a "
        "third more compute); 'selective' attention's inside and the FFN's activation, which are cheap for their size.",
    )
    compile: Literal["auto", "on", "off"] = _explained(
        "auto", "torch.compile of every block; 'auto' is on for GPUs and off for CPUs."
    )
    cuda_graphs: Literal["auto", "off"] = _explained(
        "auto",
        "'auto' replays the training pass as CUDA graphs where it can (a GPU in bf16, ZeRO 1, data parallelism alone), "
        "so that launching kernels costs the host next to nothing.",
    )
    evaluation_interval: int = _explained(
        500, "Steps between evaluations on the validation split; 0 evaluates only at the end."
    )
    evaluation_samples: int = _explained(
        2048,
        "Validation sequences an evaluation during training reads (the first ones, always the same); the last one "
        "reads all.",
    )

    def faults(self) -> list[str]:
        faults = []
        for name in ("micro_batch_size", "global_batch_size", "evaluation_samples"):
            if getattr(self, name) < 1:
                faults.append(f"training.{name} = {getattr(self, name)} must be at least 1 (sequences)")
        if (self.train_steps is None) == (self.train_tokens is None):
            faults.append(
                f"training.train_steps = {self.train_steps} and training.train_tokens = {self.train_tokens}: set "
                f"exactly one of them"
            )
        for name in ("train_steps", "train_tokens"):
            if getattr(self, name) is not None and getattr(self, name) < 1:
                faults.append(f"training.{name} = {getattr(self, name)} must be at least 1")
        if self.evaluation_interval < 0:
            faults.append(
                f"training.evaluation_interval = {self.evaluation_interval} must not be negative; 0 evaluates only "
                f"at the end"
            )
        if self.seed < 0:
            faults.append(f"training.seed = {self.seed} must not be negative")
        return faults


@dataclass(frozen=True)
class CheckpointConfig:
    """When a run is saved, where, and what is kept."""

    interval: int = _explained(500, "Steps between checkpoints; 0 saves only at the end and when asked to stop.")
    path: str | None = _explained(
        None, "Folder or fsspec address (s3://bucket/run) of the checkpoints; null is run_dir/checkpoints."
    )
    keep: int = _explained(2, "Newest checkpoints kept; older ones are deleted after a newer one is complete.")
    keep_every: int = _explained(0, "Steps whose multiples are kept for good, beyond the newest; 0 for none.")
    keep_best: bool = _explained(True, "Also keep the checkpoint with the lowest validation loss of those evaluated.")

    def faults(self) -> list[str]:
        faults = []
        if self.interval < 0:
            faults.append(f"checkpoint.interval = {self.interval} must not be negative; 0 saves only at the end")
        if self.keep < 1:
            faults.append(f"checkpoint.keep = {self.keep} must be at least 1")
        if self.keep_every < 0:
            faults.append(f"checkpoint.keep_every = {self.keep_every} must not be negative; 0 keeps none for good")
        if self.path == "":
            faults.append("checkpoint.path is empty; name a folder or an fsspec address, or null for run_dir")
        return faults


@dataclass(frozen=True)
class HealthConfig:
    """What is done about numbers that go wrong, and how long each part of a run may take."""

    spike_factor: float = _explained(
        8.0,
        "A step is skipped if its loss or the logarithm of its gradient norm lies this many robust standard "
        "deviations above the median of recent steps; 0 skips only what is not finite.",
    )
    window: int = _explained(128, "Recent steps that spikes are judged by; with fewer than a quarter nothing is one.")
    skip_limit: int = _explained(
        5, "Skipped steps of the last 20 at which the run goes back to its last good checkpoint, past those samples."
    )
    rollback_limit: int = _explained(2, "Times a run goes back for one trouble before it stops.")
    start_limit_s: float = _explained(
        1800.0, "Seconds from start to the first finished step (loading, compiling); then stacks are dumped, exit 4."
    )
    step_limit_s: float = _explained(600.0, "Seconds a step may take, waiting for other ranks and for data included.")
    save_limit_s: float = _explained(1800.0, "Seconds to wait for a checkpoint to be written.")
    evaluation_limit_s: float = _explained(3600.0, "Seconds an evaluation may take.")

    def faults(self) -> list[str]:
        faults = []
        if self.spike_factor < 0:
            faults.append(f"health.spike_factor = {self.spike_factor} must not be negative; 0 turns it off")
        for name in ("window", "skip_limit"):
            if getattr(self, name) < 1:
                faults.append(f"health.{name} = {getattr(self, name)} must be at least 1 (steps)")
        if self.rollback_limit < 0:
            faults.append(f"health.rollback_limit = {self.rollback_limit} must not be negative; 0 stops at once")
        for name in ("start_limit_s", "step_limit_s", "save_limit_s", "evaluation_limit_s"):
            if getattr(self, name) <= 0:
                faults.append(f"health.{name} = {getattr(self, name)} must be positive (seconds)")
        return faults


@dataclass(frozen=True)
class LoggingConfig:
    """What a run writes while it trains."""

    interval: int = _explained(10, "Steps between fetches of metrics from the device; every step still has its row.")
    tensorboard: bool = _explained(True, "Write scalars and head maps for TensorBoard.")
    image_interval: int = _explained(
        100, "Steps between head maps in TensorBoard (multiples of logging.interval); 0 for none."
    )

    def faults(self) -> list[str]:
        faults = []
        if self.interval < 1:
            faults.append(f"logging.interval = {self.interval} must be at least 1 (steps)")
        if self.image_interval < 0:
            faults.append(f"logging.image_interval = {self.image_interval} must not be negative; 0 writes no images")
        return faults


@dataclass(frozen=True)
class Config:
    """A run."""

    model: ModelConfig = ModelConfig()
    regularizer: RegularizerConfig = RegularizerConfig()
    parallel: ParallelConfig = ParallelConfig()
    data: DataConfig = DataConfig()
    optimizer: OptimizerConfig = OptimizerConfig()
    training: TrainingConfig = TrainingConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()
    health: HealthConfig = HealthConfig()
    logging: LoggingConfig = LoggingConfig()
    deepspeed: dict[str, Any] = field(
        default_factory=dict,
        metadata={
            "help": "Passed through to DeepSpeed's own configuration; keys that other sections derive are refused."
        },
    )
    run_dir: str = _explained(
        "runs/default", "Folder of this run: configuration, metrics, checkpoints, figures. A run found there continues."
    )

    def as_dict(self) -> dict[str, Any]:
        return dataclasses.asdict(self)

    @property
    def checkpoint_folder(self) -> str:
        """Folder or address of the run's checkpoints."""
        return self.checkpoint.path or f"{self.run_dir}/checkpoints"

    @property
    def train_steps(self) -> int:
        """Optimizer steps, from train_steps or, rounded up, from train_tokens."""
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
        """The place of one of `world_size` processes."""
        parallel = self.parallel
        return RankGrid(
            tp=parallel.tensor_parallel_size,
            pp=parallel.pipeline_parallel_size,
            dp=self.data_parallel_size(world_size),
            cp=parallel.context_parallel_size,
            rank=rank,
        )

    def num_micro_batches(self, world_size: int) -> int:
        return self.training.global_batch_size // (self.training.micro_batch_size * self.data_parallel_size(world_size))


def load_config(path: str | Path, overrides: list[str] | None = None) -> Config:
    """Reads, merges, types and checks a configuration; ingredients of the architecture are filled in.

    Raises:
        ConfigError: the file cannot be read, or any value is wrong; all faults at once, each with its remedy.
    """
    tree = read_json(Path(path))
    faults: list[str] = []
    for override in overrides or []:
        apply_override(tree, override, faults)
    _let_override_win(tree, overrides or [])
    config = build(Config, tree, "", faults)
    faults += section_faults(config)
    if faults:
        raise ConfigError(faults)
    return dataclasses.replace(config, model=config.model.resolved())


def config_from_dict(tree: dict[str, Any]) -> Config:
    """The inverse of `Config.as_dict`, with the same checks."""
    faults: list[str] = []
    config = build(Config, tree, "", faults)
    faults += section_faults(config)
    if faults:
        raise ConfigError(faults)
    return dataclasses.replace(config, model=config.model.resolved())


def section_faults(config: Config) -> list[str]:
    """Faults that need no knowledge of the world size or the dataset."""
    faults = config.model.faults()
    if not faults:
        faults += config.parallel.faults(config.model.resolved())
    sections = (
        config.regularizer,
        config.data,
        config.optimizer,
        config.training,
        config.checkpoint,
        config.health,
        config.logging,
    )
    for section in sections:
        faults += section.faults()
    if not config.run_dir:
        faults.append("run_dir is empty; name the folder of this run, say runs/first")
    return faults + derived_key_faults(config)


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
    "zero_optimization.stage": "parallel.zero_stage",
    "zero_allow_untested_optimizer": "the section optimizer",
}


def derived_key_faults(config: Config) -> list[str]:
    """Keys of the deepspeed section that would contradict what is derived from other sections."""
    faults = []
    zero = config.deepspeed.get("zero_optimization", {})
    if not isinstance(zero, dict):
        faults.append(f"deepspeed.zero_optimization = {json.dumps(zero)} must be a section (a JSON object)")
    for key, source in DERIVED_DEEPSPEED_KEYS.items():
        node: Any = config.deepspeed
        for part in key.split("."):
            node = node.get(part) if isinstance(node, dict) else None
        if node is not None:
            faults.append(
                f"deepspeed.{key} = {json.dumps(node)} is derived from {source}; remove it and set that instead"
            )
    return faults


def world_faults(config: Config, world_size: int) -> list[str]:
    """Faults of the sizes against the number of processes."""
    if world_size < 1:
        return [f"the world size {world_size} must be at least 1"]
    ranks = config.parallel.ranks_per_batch
    if world_size % ranks:
        names = ("tensor_parallel_size", "pipeline_parallel_size", "context_parallel_size")
        sizes = {name: getattr(config.parallel, name) for name in names}
        product = " * ".join(f"{name}({size})" for name, size in sizes.items() if size > 1)
        return [
            f"the world size {world_size} is not a multiple of {product} = {ranks}; launch a multiple of {ranks} "
            f"processes (deepspeed --num_gpus {ranks} ...) or change the sizes"
        ]
    dp = config.data_parallel_size(world_size)
    group = config.training.micro_batch_size * dp
    if config.training.global_batch_size % group:
        return [
            f"training.global_batch_size = {config.training.global_batch_size} is not a multiple of micro_batch_size("
            f"{config.training.micro_batch_size}) * data-parallel size({dp}) = {group}; change one of them"
        ]
    return []


def dataset_faults(config: Config, manifest: Manifest) -> list[str]:
    """Faults of the settings against the dataset: splits too short for a sample, a cache too small for its shards."""
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
    """A run's length on the command line replaces the file's, also where the file states it in the other unit."""
    named = {override.partition("=")[0] for override in overrides} & {"training.train_steps", "training.train_tokens"}
    if len(named) == 1 and isinstance(tree.get("training"), dict):
        other = {"training.train_steps": "train_tokens", "training.train_tokens": "train_steps"}[named.pop()]
        tree["training"].pop(other, None)
