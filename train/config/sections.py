"""The sections of a configuration: every key with its default, its meaning, and what it must fulfil by itself."""

from dataclasses import dataclass
from typing import Literal

from data.fetch.sources import ReadOptions
from model.config import explained

RECENT_STEPS = 20
"""Over so many steps refused ones are counted."""
LARGEST_VOCABULARY = 10**9


@dataclass(frozen=True)
class DataConfig:
    """Where the tokens come from."""

    path: str = explained(
        "datasets/quickstart",
        "A prepared dataset (python -m data.prepare): a folder, https://..., s3://... or 'pipe:COMMAND {}'; or a "
        "mixture of some, a .json file as data/stream/mixture.py explains. Its tokenizer fixes the vocabulary.",
    )
    planned_vocab_size: int | None = explained(
        None,
        "Tokens that --dry-run assumes where the dataset is not prepared yet; training takes the dataset's own number.",
    )
    attention_within_documents: bool = explained(
        False,
        "Whether a token attends to its own document only, rather than to all that a packed sequence holds before it. "
        "Positions and per-position temperatures stay those of the packed sequence.",
    )
    shuffle_window_shards: int = explained(
        8, "Shards whose samples are shuffled together; as many are in use at a time, and as many again fetched ahead."
    )
    prefetch_micro_batches: int = explained(8, "Micro-batches that a thread reads ahead of training.")
    on_damage: Literal["stop", "skip"] = explained(
        "stop", "A shard that is not what was prepared stops the run, or is left out whole and others take its place."
    )
    cache_dir: str | None = explained(
        None,
        "Where files from afar are kept, shared by a node's ranks; null means ~/.cache/entropy-guided-transformer.",
    )
    cache_gigabytes: float = explained(100.0, "Size that the cache keeps to, in GB; what was used longest ago goes.")
    fetch_attempts: int = explained(5, "How often a file from afar is tried to be fetched before the run stops.")
    fetch_time_limit_s: float = explained(60.0, "Longest wait for the next MiB of a file from afar, in seconds.")

    def faults(self) -> list[str]:
        faults = []
        if self.planned_vocab_size is not None and not 1 <= self.planned_vocab_size <= LARGEST_VOCABULARY:
            faults.append(
                f"data.planned_vocab_size = {self.planned_vocab_size} must be at least 1 and at most "
                f"{LARGEST_VOCABULARY:,} (tokens), or null"
            )
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

    learning_rate: float = explained(1e-3, "Peak learning rate; the paper's CodeParrot runs use 1e-3, Languini 6e-4.")
    min_learning_rate: float = explained(0.0, "Learning rate at the end of the decay.")
    schedule: Literal["linear", "cosine", "wsd"] = explained(
        "linear",
        "Decay after warm-up: linear or cosine to the end, or 'wsd': constant, then linear over the last "
        "decay_fraction.",
    )
    warmup_fraction: float = explained(
        0.05, "Share of train_steps in which the rate rises linearly from 0; the paper uses 0.05."
    )
    warmup_steps: int | None = explained(None, "Warm-up in steps; overrides warmup_fraction where set.")
    decay_fraction: float = explained(0.2, "Share of train_steps over which 'wsd' decays.")
    weight_decay: float = explained(
        0.1, "Decoupled decay of matrices; norms, biases, alpha, beta, temperatures, thresholds have none."
    )
    beta1: float = explained(0.9, "Adam's decay of the first moment.")
    beta2: float = explained(
        0.999, "Adam's decay of the second moment; the paper uses 0.999 on CodeParrot, 0.95 on Languini."
    )
    epsilon: float = explained(1e-8, "Adam's denominator offset.")
    gradient_clipping: float = explained(
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

    micro_batch_size: int = explained(8, "Sequences one data-parallel rank holds at a time; bounds activation memory.")
    global_batch_size: int = explained(512, "Sequences an optimizer step sees over all ranks and micro-batches.")
    train_steps: int | None = explained(None, "Optimizer steps of the run; set this or train_tokens.")
    train_tokens: int | None = explained(None, "Tokens of the run, rounded up to whole steps; set this or train_steps.")
    seed: int = explained(1, "Seed of the initial weights and of the order of samples.")
    precision: Literal["auto", "bf16", "fp32"] = explained(
        "auto",
        "Arithmetic of the forward and backward pass; 'auto' is bf16 on a GPU and fp32 on a CPU. Master weights are "
        "fp32.",
    )
    activation_recompute: Literal["none", "selective", "full"] = explained(
        "none",
        "What the backward pass computes again to save memory: 'full' whole blocks, of which only the input is kept (a "
        "third more compute); 'selective' attention's inside and the FFN's activation, which are cheap for their size.",
    )
    compile: Literal["auto", "on", "off"] = explained(
        "auto", "torch.compile of every block; 'auto' is on for GPUs and off for CPUs."
    )
    cuda_graphs: Literal["auto", "off"] = explained(
        "auto",
        "'auto' replays the training pass as CUDA graphs where it can, so that launching kernels costs the host next "
        "to nothing: on a GPU in bf16 with ZeRO 1 and data parallelism alone, but not for a per_head regularizer over "
        "several data-parallel ranks.",
    )
    evaluation_interval: int = explained(
        500, "Steps between evaluations on the validation split; 0 evaluates only at the end."
    )
    evaluation_samples: int = explained(
        2048,
        "Validation sequences an evaluation during training reads (the first ones, always the same); the last one "
        "reads all.",
    )

    def resolved_precision(self, on_gpu: bool) -> str:
        """'bf16' or 'fp32', where 'auto' depends on the device."""
        return ("bf16" if on_gpu else "fp32") if self.precision == "auto" else self.precision

    def compiles(self, on_gpu: bool) -> bool:
        """Whether blocks are compiled, where 'auto' depends on the device."""
        return self.compile == "on" or (self.compile == "auto" and on_gpu)

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

    interval: int = explained(500, "Steps between checkpoints; 0 saves only at the end and when asked to stop.")
    path: str | None = explained(
        None, "Folder or fsspec address (s3://bucket/run) of the checkpoints; null is run_dir/checkpoints."
    )
    keep: int = explained(2, "Newest checkpoints kept; older ones are deleted after a newer one is complete.")
    keep_every: int = explained(0, "Steps whose multiples are kept for good, beyond the newest; 0 for none.")
    keep_best: bool = explained(True, "Also keep the checkpoint with the lowest validation loss of those evaluated.")

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

    spike_factor: float = explained(
        8.0,
        "A step is skipped if its loss or the logarithm of its gradient norm lies this many robust standard "
        "deviations above the median of recent steps; 0 skips only what is not finite.",
    )
    window: int = explained(128, "Recent steps that spikes are judged by; with fewer than a quarter nothing is one.")
    skip_limit: int = explained(
        5,
        f"Skipped steps of the last {RECENT_STEPS} at which the run goes back to its last good checkpoint, past those "
        "samples.",
    )
    rollback_limit: int = explained(2, "Times a run goes back for one trouble before it stops.")
    verify_first_step: bool = explained(
        True,
        "Where blocks are compiled, compare the gradients of each in its first pass with the same block uncompiled; "
        "about one micro-batch's time at start, and the memory of one block.",
    )
    start_limit_s: float = explained(
        1800.0, "Seconds from start to the first finished step (loading, compiling); then stacks are dumped, exit 4."
    )
    step_limit_s: float = explained(600.0, "Seconds a step may take, waiting for other ranks and for data included.")
    save_limit_s: float = explained(1800.0, "Seconds to wait for a checkpoint to be written.")
    evaluation_limit_s: float = explained(3600.0, "Seconds an evaluation may take.")

    def faults(self) -> list[str]:
        faults = []
        if self.spike_factor < 0:
            faults.append(f"health.spike_factor = {self.spike_factor} must not be negative; 0 turns it off")
        for name in ("window", "skip_limit"):
            if getattr(self, name) < 1:
                faults.append(f"health.{name} = {getattr(self, name)} must be at least 1 (steps)")
        if self.skip_limit > RECENT_STEPS:
            faults.append(
                f"health.skip_limit = {self.skip_limit} must be at most {RECENT_STEPS}: it counts refused "
                f"steps among the last {RECENT_STEPS}"
            )
        if self.rollback_limit < 0:
            faults.append(f"health.rollback_limit = {self.rollback_limit} must not be negative; 0 stops at once")
        for name in ("start_limit_s", "step_limit_s", "save_limit_s", "evaluation_limit_s"):
            if getattr(self, name) <= 0:
                faults.append(f"health.{name} = {getattr(self, name)} must be positive (seconds)")
        return faults


@dataclass(frozen=True)
class LoggingConfig:
    """What a run writes while it trains."""

    interval: int = explained(10, "Steps between fetches of metrics from the device; every step still has its row.")
    tensorboard: bool = explained(True, "Write scalars and head maps for TensorBoard.")
    image_interval: int = explained(
        100, "Steps between head maps in TensorBoard (multiples of logging.interval); 0 for none."
    )

    def faults(self) -> list[str]:
        faults = []
        if self.interval < 1:
            faults.append(f"logging.interval = {self.interval} must be at least 1 (steps)")
        if self.image_interval < 0:
            faults.append(f"logging.image_interval = {self.image_interval} must not be negative; 0 writes no images")
        return faults
