"""Predicts the time of a training step from counted work and named rates."""

from dataclasses import dataclass

from parallel.counting.footprint import ELEMENT_BYTES, GRADIENT_BYTES, Workload, held_parameters
from parallel.counting.volume import Volume, volume
from train.cost.flops import DEVICE_PEAK_TFLOPS
from train.cost.parameters import block_matrix_parameters, ffn_width


@dataclass(frozen=True)
class Gpu:
    """A device and its links, from the makers' data sheets."""

    name: str  # as in train.cost.flops's table of peaks
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
    """Rates as shares of what data sheets promise; set so that one H100's measured steps are met."""

    products: float = 0.71  # of the bf16 peak, large matrix products
    attention: float = 0.31  # of the bf16 peak, fused attention on long sequences
    memory: float = 0.80  # of the memory bandwidth
    links: float = 0.75  # of the link bandwidth
    block_widths: float = 15  # widths of a token that a block reads and writes outside products and attention
    residual_widths: float = 8  # of those, the FFN's residual's: 3 forward, 3 + 2 (beta's gradient) backward
    attention_widths: float = 25  # the same inside attention
    logits_passes: float = 3  # times that logits cross the memory
    update_bytes: float = 55  # a parameter, of the optimizer
    micro_batch_s: float = 1e-3  # of the engine, for each micro-batch
    block_s: float = 3e-3  # of a fast host's launches, for each block and micro-batch, below which no block runs
    replayed_block_s: float = 1e-4  # the same where CUDA graphs replay them: data parallelism alone
    data_hidden: float = 0.0  # share of the replicas' exchange that runs behind compute

    def lines(self) -> list[str]:
        return [
            f"matrix products at {self.products:.0%} of the bf16 peak, attention at {self.attention:.0%} or by memory, "
            f"memory at {self.memory:.0%}, links at {self.links:.0%} of the data sheet",
            f"a block moves {self.block_widths:g} widths of a token through memory outside products, "
            f"{self.residual_widths:g} less where the FFN's matrix holds the residual, attention "
            f"{self.attention_widths:g}; logits cross it {self.logits_passes:g} times; the optimizer moves "
            f"{self.update_bytes:g} bytes a parameter",
            f"launches take at least {1e3 * self.block_s:g} ms a block and micro-batch, replayed by CUDA graphs (data "
            f"parallelism alone) {1e3 * self.replayed_block_s:g} ms; the engine {1e3 * self.micro_batch_s:g} ms a "
            "micro-batch",
            f"tensor- and context-parallel traffic is not hidden; of the replicas' {self.data_hidden:.0%} is; pipeline "
            "stages idle (pp - 1) / (micro-batches + pp - 1) of the step",
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
    """The step of a rank of the grid's stage."""
    model, grid, micro_batches = work.model, work.grid, work.num_micro_batches
    tokens = work.tokens * micro_batches
    layers = len(grid.layers(model.num_layers))
    passes = 4 if work.recompute == "full" else 3  # forward, and backward twice as dear
    memory_rate = assumed.memory * gpu.memory_tb_per_s * 1e12
    width_bytes = tokens * model.hidden_size * ELEMENT_BYTES / grid.tp
    head = model.hidden_size * work.padded_vocab_size / grid.tp if grid.is_last_stage else 0
    products = 2 * tokens * (passes * layers * block_products(work) + 3 * head)
    scores = 2 * tokens * model.seq_length * model.hidden_size / grid.tp  # of a layer forward, half under the mask
    runs = 3.5 if work.recompute == "none" else 4.5  # of attention, forward; its backward pass is worth 2.5
    attention = max(
        scores / (assumed.attention * gpu.peak_flops), assumed.attention_widths / 3.5 * width_bytes / memory_rate
    )
    widths = assumed.block_widths + 10 * (model.norm == "layernorm") + 3 * ffn_share(work)
    widths -= assumed.residual_widths * model.ffn_holds_residual
    memory = layers * widths * width_bytes * passes / 3
    memory += assumed.logits_passes * head / model.hidden_size * tokens * ELEMENT_BYTES
    parameters = sum(held_parameters(work).values())
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
    """Bytes a second between neighbours of an axis whose ranks are `stride` apart, in one node or over the network."""
    within = ranks * stride <= gpu.gpus_per_node
    return assumed.links * (gpu.node_gb_per_s if within else gpu.network_gb_per_s) * 1e9


def block_products(work: Workload) -> float:
    """Elements of one block's matrices that multiply a token's activations on a rank."""
    # A fused FFN may be replicated under sequence parallelism, but then each rank multiplies 1/tp of the tokens.
    return block_matrix_parameters(work.model) / work.grid.tp


def ffn_share(work: Workload) -> float:
    """Widths between the two matrices, in units of the model's; their activation is read and written."""
    return 0.0 if work.model.fused_ffn else 2 * ffn_width(work.model) / work.model.hidden_size
