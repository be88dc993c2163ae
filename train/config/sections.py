"""The sections of a configuration: every key with its default, its meaning and the values it allows."""

import re
from dataclasses import dataclass, field
from typing import Any, Literal

from data.fetch.sources import MOST, ReadOptions
from data.files.address import is_command
from data.files.strict_json import shown
from model.config import explained

RECENT_STEPS = 20
"""Number of steps over which `health.skip_limit` counts skipped ones."""
LARGEST_VOCABULARY = 10**9
LONGEST_LIMIT_S = 10**8
"""Of a time limit: three years."""


@dataclass(frozen=True)
class DataConfig:
    """Where the tokens come from."""

    path: str = explained(
        "datasets/quickstart",
        "Prepared dataset (python -m data.prepare): a folder, https://..., s3://... or 'pipe:COMMAND {}'. A .json "
        "file names a mixture of datasets (data/stream/mixture.py). The dataset's tokenizer fixes the vocabulary.",
    )
    planned_vocab_size: int | None = explained(
        None,
        "Vocabulary size that planning (--dry-run, train.plan) assumes while the dataset is not prepared. Training "
        "takes the size from the dataset.",
    )
    attention_within_documents: bool = explained(
        False,
        "Restrict attention to the token's own document. By default a token attends to everything before it in its "
        "packed sequence. Positions and per-position temperatures are those of the packed sequence either way.",
    )
    shuffle_window_shards: int = explained(
        8, "Shards whose samples are shuffled together. That many are open at a time, and as many again are prefetched."
    )
    prefetch_micro_batches: int = explained(8, "Micro-batches that a background thread reads ahead.")
    on_damage: Literal["stop", "skip"] = explained(
        "stop",
        "What to do if a shard does not match its checksums: 'stop' ends the run; 'skip' leaves the whole shard out "
        "and reads others in its place.",
    )
    cache_dir: str | None = explained(
        None,
        "Folder that keeps downloaded files, shared by all ranks of a node; null means "
        "~/.cache/entropy-guided-transformer.",
    )
    cache_gigabytes: float = explained(
        100.0, "Largest size of the download cache in GB. The least recently used files are deleted first."
    )
    fetch_attempts: int = explained(5, "Attempts to download a file before the run stops.")
    fetch_time_limit_s: float = explained(60.0, "Longest wait for the next MiB of a download, in seconds.")
    allow_commands: bool = explained(
        False,
        "Whether addresses may run commands ('pipe:COMMAND {}'), also those in a mixture file. It is your word, so it "
        "counts on the command line only, and no file of a run records it. An override data.path='pipe:...' "
        "implies it.",
    )

    def faults(self) -> list[str]:
        faults = []
        if self.planned_vocab_size is not None and not 1 <= self.planned_vocab_size <= LARGEST_VOCABULARY:
            faults.append(
                f"data.planned_vocab_size = {self.planned_vocab_size} must be at least 1 and at most "
                f"{LARGEST_VOCABULARY:,} (tokens), or null"
            )
        for name in ("shuffle_window_shards", "prefetch_micro_batches"):
            if getattr(self, name) < 1:
                faults.append(f"data.{name} = {getattr(self, name)} must be at least 1")
        for name in ("cache_gigabytes", "fetch_attempts", "fetch_time_limit_s"):
            if not 0 < getattr(self, name) <= MOST:
                faults.append(f"data.{name} = {getattr(self, name)} must be positive and at most {MOST:,}")
        return faults

    def read_options(self) -> ReadOptions:
        """Return how the dataset is fetched and checked."""
        return ReadOptions.of(vars(self))


@dataclass(frozen=True)
class OptimizerConfig:
    """AdamW, the learning-rate schedule, and the schedule of tapered norms."""

    learning_rate: float = explained(1e-3, "Peak learning rate. The paper uses 1e-3 on CodeParrot, 6e-4 on Languini.")
    min_learning_rate: float = explained(0.0, "Learning rate at the end of the decay.")
    schedule: Literal["linear", "cosine", "wsd"] = explained(
        "linear",
        "Decay after warm-up. 'linear' and 'cosine' decay until the end; 'wsd' stays constant, then decays linearly "
        "over the last decay_fraction of the run.",
    )
    warmup_fraction: float = explained(
        0.05, "Fraction of train_steps over which the rate rises linearly from 0. The paper uses 0.05."
    )
    warmup_steps: int | None = explained(None, "Warm-up in steps; if set, it replaces warmup_fraction.")
    decay_fraction: float = explained(0.2, "Fraction of train_steps over which 'wsd' decays.")
    weight_decay: float = explained(
        0.1, "Decoupled weight decay of matrices. Norms, biases, alpha, beta, temperatures and thresholds do not decay."
    )
    beta1: float = explained(0.9, "Adam's decay rate of the first moment.")
    beta2: float = explained(
        0.999, "Adam's decay rate of the second moment. The paper uses 0.999 on CodeParrot and 0.95 on Languini."
    )
    epsilon: float = explained(1e-8, "Adam's epsilon, added to the denominator.")
    threshold_rate: float = explained(
        1.0,
        "Factor of the learning rate of the regularizer's thresholds. 0 keeps them at model.threshold_init; their "
        "gradient still counts in the norm that is clipped.",
    )
    temperature_rate: float = explained(
        1.0, "Factor of the learning rate of the softmax temperatures. 0 keeps them at model.temperature_init."
    )
    taper_start: float = explained(
        0.1, "Share of train_steps after which norms begin to taper, if model.norm = 'taper': until then LayerNorms."
    )
    taper_end: float = explained(
        0.5,
        "Share of train_steps after which tapered norms are fixed affine maps. Their gate falls from 1 to 0 as half a "
        "cosine.",
    )
    gradient_clipping: float = explained(
        1.0, "Largest L2 norm of the whole gradient, over all ranks; 0 turns clipping off."
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
        for name in ("weight_decay", "threshold_rate", "temperature_rate", "gradient_clipping"):
            if getattr(self, name) < 0:
                faults.append(f"optimizer.{name} = {getattr(self, name)} must not be negative")
        if not 0 <= self.taper_start < self.taper_end <= 1:
            faults.append(
                f"optimizer.taper_start = {self.taper_start} must lie in [0, 1) and below optimizer.taper_end = "
                f"{self.taper_end}, which is at most 1: both are shares of train_steps"
            )
        if self.epsilon <= 0:
            faults.append(f"optimizer.epsilon = {self.epsilon} must be positive")
        if self.warmup_steps is not None and self.warmup_steps < 0:
            faults.append(f"optimizer.warmup_steps = {self.warmup_steps} must not be negative")
        return faults


@dataclass(frozen=True)
class TrainingConfig:
    """Batch sizes, length and precision of a run."""

    micro_batch_size: int = explained(
        8, "Sequences that a data-parallel rank processes at a time; bounds activation memory."
    )
    global_batch_size: int = explained(512, "Sequences per optimizer step, over all ranks and micro-batches.")
    train_steps: int | None = explained(None, "Length of the run in optimizer steps. Set this or train_tokens.")
    train_tokens: int | None = explained(
        None, "Length of the run in tokens, rounded up to whole steps. Set this or train_steps."
    )
    seed: int = explained(1, "Seed of the initial weights and the sample order.")
    precision: Literal["auto", "bf16", "fp32"] = explained(
        "auto",
        "Arithmetic of the forward and backward pass. 'auto' means bf16 on a GPU, fp32 on a CPU. Master weights are "
        "fp32.",
    )
    activation_recompute: Literal["none", "selective", "full"] = explained(
        "none",
        "What the backward pass recomputes to save memory. 'full' keeps only the input of each block and costs a "
        "third more compute. 'selective' recomputes the inside of attention and the FFN's activation, which take much "
        "memory and little time.",
    )
    compile: Literal["auto", "on", "off"] = explained(
        "auto", "Whether torch.compile compiles every block. 'auto' means on for GPUs, off for CPUs."
    )
    cuda_graphs: Literal["auto", "off"] = explained(
        "auto",
        "'auto' replays the forward and backward pass as CUDA graphs, which removes the cost of launching kernels. It "
        "applies on a GPU in bf16 with ZeRO-1, without tensor or pipeline parallelism, and with context parallelism "
        "within a host only. Where gradients are exchanged over replicas it applies to small blocks only, since a "
        "replay hides no exchange, and not to a per_head regularizer.",
    )
    evaluation_interval: int = explained(
        500, "Steps between evaluations on the validation split; 0 means only at the end."
    )
    evaluation_samples: int = explained(
        2048,
        "Validation sequences that an evaluation during training reads, always the first ones. The evaluation at the "
        "end of the run reads all.",
    )

    def resolved_precision(self, on_gpu: bool) -> str:
        """Return 'bf16' or 'fp32'; 'auto' depends on the device."""
        return ("bf16" if on_gpu else "fp32") if self.precision == "auto" else self.precision

    def compiles(self, on_gpu: bool) -> bool:
        """Return whether blocks are compiled; 'auto' depends on the device."""
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
    """When checkpoints are saved, where, and which are kept."""

    interval: int = explained(500, "Steps between checkpoints; 0 means only at the end and on a request to stop.")
    path: str | None = explained(
        None, "Folder or fsspec address (s3://bucket/run) of the checkpoints; null means run_dir/checkpoints."
    )
    init_from: str | None = explained(
        None,
        "Where a new run takes its weights from: a folder of a GPT-2 (config.json and model.safetensors), a run or a "
        "checkpoint. Weights of another architecture are converted (docs/guides/convert.md). null draws them from the "
        "seed. A run that resumes ignores it.",
    )
    keep: int = explained(
        2, "Number of newest checkpoints to keep. Older ones are deleted once a newer one is complete."
    )
    keep_every: int = explained(
        0, "Also keep the checkpoints of every multiple of this many steps for good; 0 means none."
    )
    keep_best: bool = explained(True, "Also keep the checkpoint with the lowest validation loss.")

    def faults(self) -> list[str]:
        faults = []
        if self.interval < 0:
            faults.append(f"checkpoint.interval = {self.interval} must not be negative; 0 saves only at the end")
        if self.keep < 1:
            faults.append(f"checkpoint.keep = {self.keep} must be at least 1")
        if self.keep_every < 0:
            faults.append(f"checkpoint.keep_every = {self.keep_every} must not be negative; 0 keeps none for good")
        if self.path and is_command(self.path):
            faults.append(f"checkpoint.path = {self.path!r} must be a folder or the address of one store")
        if self.init_from and is_command(self.init_from):
            faults.append(f"checkpoint.init_from = {self.init_from!r} must be a folder or the address of one store")
        if self.init_from == "":
            faults.append("checkpoint.init_from is empty; name a folder, or null to draw the weights from the seed")
        if self.path == "":
            faults.append("checkpoint.path is empty; name a folder or an fsspec address, or null for run_dir")
        return faults


@dataclass(frozen=True)
class DistillationConfig:
    """A teacher whose predictions the run learns to give besides the data's."""

    teacher: str | None = explained(
        None,
        "The teacher: a folder of a GPT-2, a run or a checkpoint, as checkpoint.init_from. It keeps its own "
        "architecture. Every rank holds it whole, so tensor, pipeline and context parallelism are not possible. null "
        "trains on the data alone.",
    )
    weight: float = explained(
        1.0,
        "Factor of temperature^2 KL(teacher || run) between the predictions, in nats a token, which is added to the "
        "loss.",
    )
    temperature: float = explained(2.0, "Divisor of both models' logits in that divergence.")
    hidden_weight: float = explained(
        0.0,
        "Factor of the relative squared distance between the residuals after each layer, a mean over tokens and "
        "layers. Needs a teacher with as many layers of the same width.",
    )

    def faults(self) -> list[str]:
        faults = []
        for name in ("weight", "hidden_weight"):
            if getattr(self, name) < 0:
                faults.append(
                    f"distillation.{name} = {getattr(self, name)} must not be negative; 0 leaves that part out"
                )
        if self.temperature <= 0:
            faults.append(f"distillation.temperature = {self.temperature} must be positive: it divides the logits")
        if self.teacher == "" or (self.teacher and is_command(self.teacher)):
            faults.append(
                f"distillation.teacher = {self.teacher!r} must be a folder or the address of one store, or null"
            )
        return faults


@dataclass(frozen=True)
class HealthConfig:
    """How a run reacts to loss spikes and lost gradients, and how long each part of it may take."""

    spike_factor: float = explained(
        8.0,
        "Skip a step if its loss, or the logarithm of its gradient norm, exceeds the median of recent steps by more "
        "than this many robust standard deviations. 0 skips only steps that are not finite.",
    )
    window: int = explained(
        128, "Number of recent steps that define a spike. Until a quarter of them has run, nothing counts as one."
    )
    skip_limit: int = explained(
        5,
        f"Go back to the last good checkpoint after this many skipped steps among the last {RECENT_STEPS}. The samples "
        "of those steps are not read again.",
    )
    rollback_limit: int = explained(2, "How often a run goes back because of the same trouble before it stops.")
    verify_first_step: bool = explained(
        True,
        "If blocks are compiled, compare each block's gradients in its first pass with those of the same block "
        "uncompiled. Costs the time of one micro-batch and the memory of one block, once.",
    )
    start_limit_s: float = explained(
        1800.0,
        "Time limit in seconds from start to the end of the first step, loading and compiling included. Beyond it, "
        "every rank prints its stack, and the run ends with status 4.",
    )
    step_limit_s: float = explained(600.0, "Time limit of a step in seconds, waits for data and other ranks included.")
    save_limit_s: float = explained(1800.0, "Time limit for writing a checkpoint, in seconds.")
    evaluation_limit_s: float = explained(3600.0, "Time limit of an evaluation in seconds.")

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
            if not 0 < getattr(self, name) <= LONGEST_LIMIT_S:
                faults.append(
                    f"health.{name} = {getattr(self, name)} must be positive and at most {LONGEST_LIMIT_S:,} (seconds)"
                )
        return faults


@dataclass(frozen=True)
class LoggingConfig:
    """What a run writes while it trains."""

    interval: int = explained(
        10, "Steps between copies of metrics from the device. metrics.jsonl has a row for every step all the same."
    )
    tensorboard: bool = explained(True, "Write scalars and entropy maps for TensorBoard.")
    image_interval: int = explained(
        100, "Steps between entropy maps in TensorBoard, a multiple of logging.interval; 0 means none."
    )

    def faults(self) -> list[str]:
        faults = []
        if self.interval < 1:
            faults.append(f"logging.interval = {self.interval} must be at least 1 (steps)")
        if self.image_interval < 0:
            faults.append(f"logging.image_interval = {self.image_interval} must not be negative; 0 writes no images")
        return faults


_TASK_NAME = re.compile(r"[a-z][a-z0-9_]{0,40}")


@dataclass(frozen=True)
class DownstreamConfig:
    """Tasks of multiple choice that are measured while the run trains."""

    interval: int = explained(0, "Steps between measurements, and one after the last step; 0 means none at all.")
    tasks: dict[str, Any] = field(
        default_factory=dict,
        metadata={
            "help": 'Name -> file of one JSON object a line: {"context": "The sky is", "choices": [" blue", " green"], '
            '"answer": 0}. metrics.jsonl gets the accuracy as downstream_NAME.'
        },
    )
    samples: int = explained(
        100, "Documents of each task, the first ones. Each choice costs a forward pass of a micro-batch."
    )

    def faults(self) -> list[str]:
        faults = []
        if self.interval < 0:
            faults.append(f"downstream.interval = {self.interval} must not be negative; 0 measures nothing")
        if self.interval > 0 and not self.tasks:
            faults.append(f"downstream.interval = {self.interval} measures nothing; name files in downstream.tasks")
        if self.samples < 1:
            faults.append(f"downstream.samples = {self.samples} must be at least 1 (documents)")
        for name, file in self.tasks.items():
            if not _TASK_NAME.fullmatch(name):
                faults.append(f"downstream.tasks: {name!r:.60} is no name; use small letters, digits and _")
            if not isinstance(file, str) or not file:
                faults.append(f"downstream.tasks.{name:.40} = {shown(file, 60)} must be the path of a file")
        return faults
