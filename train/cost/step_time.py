"""Predicts the time of a training step from counted work and assumed rates."""

from dataclasses import dataclass

from parallel.counting.footprint import ELEMENT_BYTES, GRADIENT_BYTES, Workload, held_elements
from parallel.counting.volume import Volume, volume
from train.cost.flops import DEVICE_PEAK_TFLOPS


@dataclass(frozen=True)
class Gpu:
    """A device and its links, from data sheets."""

    name: str  # a key of DEVICE_PEAK_TFLOPS
    memory_gib: float
    memory_tb_per_s: float
    node_gb_per_s: float  # to GPUs of the same node, each direction
    network_gb_per_s: float  # to other nodes, each direction
    gpus_per_node: int = 8

    @property
    def peak_flops(self) -> float:
        return DEVICE_PEAK_TFLOPS[self.name] * 1e12


GPUS = {
    "a100": Gpu("NVIDIA A100-SXM4-80GB", 79.2, 2.04, 300, 25),
    "h100": Gpu("NVIDIA H100 80GB HBM3", 79.2, 3.35, 450, 50),
    "h200": Gpu("NVIDIA H200", 139.8, 4.8, 450, 50),
    "b200": Gpu("NVIDIA B200", 178.0, 8.0, 900, 50),
}


@dataclass(frozen=True)
class Assumptions:
    """Achieved rates as fractions of data-sheet rates, fitted to steps measured on one H100."""

    products: float = 0.71  # of the bf16 peak, large matrix products
    attention: float = 0.31  # of the bf16 peak, fused attention on long sequences
    memory: float = 0.80  # of the memory bandwidth
    links: float = 0.75  # of the link bandwidth
    block_widths: float = 15  # model widths per token that a block reads and writes outside products and attention
    residual_widths: float = 8  # those of the FFN's residual: 3 forward, 3 + 2 (gradient of beta) backward
    attention_widths: float = 25  # model widths per token inside attention
    logits_passes: float = 3  # times that logits are read or written
    update_bytes: float = 55  # bytes per parameter that the optimizer reads and writes
    micro_batch_s: float = 1e-3  # engine overhead per micro-batch
    block_s: float = 3e-3  # least time per block and micro-batch: a fast host launches no faster
    replayed_block_s: float = 1e-4  # the same under CUDA graphs (pure data parallelism)
    data_hidden: float = 0.0  # fraction of the data-parallel traffic that overlaps with compute

    def lines(self) -> list[str]:
        """Describe the assumptions, one printed line each."""
        return [
            f"rates: matrix products {self.products:.0%} of the bf16 peak, attention {self.attention:.0%} or limited "
            f"by memory; memory {self.memory:.0%} and links {self.links:.0%} of the data sheet",
            f"memory traffic outside products: {self.block_widths:g} model widths per token and block "
            f"({self.residual_widths:g} less if the FFN includes the residual), attention "
            f"{self.attention_widths:g}; logits {self.logits_passes:g} times; optimizer "
            f"{self.update_bytes:g} bytes per parameter",
            f"host: at least {1e3 * self.block_s:g} ms per block and micro-batch, {1e3 * self.replayed_block_s:g} ms "
            f"with CUDA graphs (pure data parallelism); {1e3 * self.micro_batch_s:g} ms per micro-batch for the engine",
            f"overlap: none for tensor- and context-parallel traffic, {self.data_hidden:.0%} of data-parallel traffic; "
            "pipeline stages idle (pp - 1) / (micro-batches + pp - 1) of the step",
        ]


@dataclass(frozen=True)
class StepTime:
    """Seconds of the slowest stage, by cause."""

    products: float
    attention: float
    memory: float
    tensor: float
    context: float
    pipeline: float
    data: float
    update: float
    launches: float
    bubble: float

    @property
    def total(self) -> float:
        return sum(vars(self).values())


def step_time(work: Workload, gpu: Gpu, assumed: Assumptions) -> StepTime:
    """Predict the step of a rank of the grid's pipeline stage."""
    model, grid, micro_batches = work.model, work.grid, work.num_micro_batches
    tokens = work.tokens * micro_batches
    layers = len(work.layers)
    passes = 4 if work.recompute == "full" else 3  # the backward pass costs two forward passes
    memory_rate = assumed.memory * gpu.memory_tb_per_s * 1e12
    width_bytes = tokens * model.hidden_size * ELEMENT_BYTES / grid.tp
    head = model.hidden_size * work.padded_vocab_size / grid.tp if grid.is_last_stage else 0
    products = 2 * tokens * (passes * layers * block_products(work) + 3 * head)
    scores = 2 * tokens * model.seq_length * model.hidden_size / grid.tp  # forward, per layer, under the causal mask
    runs = 3.5 if work.recompute == "none" else 4.5  # in forward passes of attention; its backward pass costs 2.5
    attention = max(
        scores / (assumed.attention * gpu.peak_flops), assumed.attention_widths / 3.5 * width_bytes / memory_rate
    )
    widths = assumed.block_widths + 10 * (model.norm == "layernorm") + 3 * ffn_share(work)
    widths -= assumed.residual_widths * model.ffn_holds_residual
    memory = layers * widths * width_bytes * passes / 3
    memory += assumed.logits_passes * head / model.hidden_size * tokens * ELEMENT_BYTES
    parameters = held_elements(work)
    sent = volume(work, ELEMENT_BYTES, GRADIENT_BYTES)
    busy = {
        "products": products / (assumed.products * gpu.peak_flops),
        "attention": layers * runs * attention,
        "memory": memory / memory_rate,
        **_communication(work, gpu, assumed, sent),
    }
    replayed = work.cuda_graphs and work.parallel.passes_stay_local(grid.dp, work.per_head)
    at_least = layers * micro_batches * (assumed.replayed_block_s if replayed else assumed.block_s)
    busy["launches"] = micro_batches * assumed.micro_batch_s + max(0.0, at_least - sum(busy.values()))
    return StepTime(
        **busy,
        data=(1 - assumed.data_hidden) * sent.data / link_rate(work, gpu, assumed, grid.replicas, grid.tp),
        update=assumed.update_bytes * parameters / grid.replicas / memory_rate,
        bubble=sum(busy.values()) * (grid.pp - 1) / micro_batches,
    )


def _communication(work: Workload, gpu: Gpu, assumed: Assumptions, sent: Volume) -> dict[str, float]:
    grid = work.grid
    return {
        "tensor": sent.tensor / link_rate(work, gpu, assumed, grid.tp, 1),
        "context": sent.context / link_rate(work, gpu, assumed, grid.cp, grid.tp),
        "pipeline": sent.pipeline / link_rate(work, gpu, assumed, grid.pp, grid.tp * grid.replicas),
    }


def link_rate(work: Workload, gpu: Gpu, assumed: Assumptions, ranks: int, stride: int) -> float:
    """Return bytes per second between neighbours of an axis whose ranks are `stride` apart, within or between nodes."""
    within = ranks * stride <= gpu.gpus_per_node
    return assumed.links * (gpu.node_gb_per_s if within else gpu.network_gb_per_s) * 1e9


def block_products(work: Workload) -> float:
    """Count the elements of one block's matrices that multiply a token's activations on a rank."""
    # A fused FFN may be replicated under sequence parallelism, but then each rank multiplies 1/tp of the tokens.
    return work.model.block_matrix_elements / work.grid.tp


def ffn_share(work: Workload) -> float:
    """Return the features between the FFN matrices, read and written, in model widths."""
    return 0.0 if work.model.fused_ffn else 2 * work.model.ffn_width / work.model.hidden_size
