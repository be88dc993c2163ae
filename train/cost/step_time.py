"""Predicts the time of a training step from counted work, assumed rates, and what is exchanged behind what."""

import dataclasses
import math
from dataclasses import dataclass

from parallel.config import least_bucket_elements
from parallel.counting.footprint import ELEMENT_BYTES, Workload, held_elements, held_parameters
from parallel.counting.volume import Volume
from parallel.stages import block_flops
from train.cost.flops import DEVICE_PEAK_TFLOPS
from train.cost.links import Axis, Links, axes


@dataclass(frozen=True)
class Gpu:
    """A device and its links, from data sheets."""

    name: str  # a key of DEVICE_PEAK_TFLOPS
    memory_gib: float
    memory_tb_per_s: float
    node_gb_per_s: float  # to GPUs of the same node, each direction
    network_gb_per_s: float  # through its NIC, each direction
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
    """Achieved rates as fractions of data-sheet rates, and how much of each exchange is hidden.

    Rates of one GPU are fitted to steps measured on one H100 and one H200, what is hidden to steps on two H200s.
    An exchange is hidden by at most its fraction below, and by no more than the passes that it runs beside.
    """

    products: float = 0.69  # of the bf16 peak, large matrix products
    attention: float = 0.31  # of the bf16 peak, fused attention on long sequences
    memory: float = 0.80  # of the memory bandwidth
    node_links: float = 0.47  # of NVLink, in exchanges of a step: 200 to 215 GB/s on two H200s
    network_links: float = 0.94  # of a NIC: 46 to 48 of 50 GB/s (NVIDIA/nccl-tests 290)
    block_widths: float = 15  # model widths per token that a block reads and writes outside products and attention
    residual_widths: float = 8  # those of the FFN's residual: 3 forward, 3 + 2 (gradient of beta) backward
    attention_widths: float = 25  # model widths per token inside attention
    exchange_widths: float = 0.5  # model widths per token that laying out an all-to-all of one width reads and writes
    logits_passes: float = 3  # times that logits are read or written
    update_bytes: float = 55  # bytes per parameter that the optimizer reads and writes
    accumulation_bytes: float = 10  # bytes per parameter and micro-batch: a bf16 gradient added to a float32 sum
    partition_bytes: float = 90  # bytes per parameter and micro-batch that ZeRO-3 copies besides
    micro_batch_s: float = 1e-3  # engine overhead per micro-batch
    block_s: float = 3e-3  # least time per block and micro-batch: a fast host launches no faster
    replayed_block_s: float = 1e-4  # the same under CUDA graphs
    gradients_hidden: float = 1.0  # of the gradients' exchange behind backward passes, but the last buckets
    weights_hidden: float = 1.0  # of the weights' exchange behind forward passes, but the first buckets
    tensor_hidden: float = 0.48  # of tensor-parallel exchanges that have a product beside them
    context_hidden: float = 0.6  # of exchanges over context-parallel ranks
    pipeline_hidden: float = 0.0  # of what stages send each other
    contention: float = 0.7  # of a hidden exchange of replicas: NCCL's kernels take processors from products

    def links(self, gpu: Gpu) -> Links:
        """Return the links of a cluster of this GPU, by its data sheet."""
        node, nic = self.node_links * gpu.node_gb_per_s * 1e9, self.network_links * gpu.network_gb_per_s * 1e9
        return Links(node, nic, gpus_per_node=gpu.gpus_per_node)

    def lines(self, links: Links) -> list[str]:
        """Describe the assumptions, one printed line each."""
        return [
            f"rates: matrix products {self.products:.0%} of the bf16 peak, attention {self.attention:.0%} or limited "
            f"by memory; memory {self.memory:.0%} of the data sheet",
            f"links: {links.node / 1e9:.0f} GB/s a GPU within a node of {links.gpus_per_node}, {links.nic / 1e9:.0f} "
            f"through each GPU's NIC; {1e6 * links.base_s:.1f} us an exchange, {1e6 * links.node_hop_s:.1f} a hop, "
            f"{1e6 * links.network_hop_s:.1f} between nodes",
            f"memory traffic outside products: {self.block_widths:g} model widths per token and block "
            f"({self.residual_widths:g} less if the FFN includes the residual), attention "
            f"{self.attention_widths:g}, an all-to-all {self.exchange_widths:g}; logits {self.logits_passes:g} times",
            f"memory traffic per parameter: optimizer {self.update_bytes:g} bytes, accumulation "
            f"{self.accumulation_bytes:g} a micro-batch, ZeRO-3 {self.partition_bytes:g} more",
            f"host: at least {1e3 * self.block_s:g} ms per block and micro-batch, {1e3 * self.replayed_block_s:g} ms "
            "with CUDA graphs (ZeRO-1, no tensor or pipeline parallelism, and with replicas only short blocks); "
            f"{1e3 * self.micro_batch_s:g} ms per micro-batch for the engine",
            f"hidden: {self.gradients_hidden:.0%} of gradients behind the backward pass, except those complete last; "
            f"{self.weights_hidden:.0%} of weights behind the forward pass, except those used first",
            f"hidden: tensor {self.tensor_hidden:.0%}, context {self.context_hidden:.0%}, pipeline "
            f"{self.pipeline_hidden:.0%}; a hidden exchange costs {self.contention:.0%} of its time",
            "bubble: in each step a pipeline stage waits as long as every other stage takes for one micro-batch",
        ]


@dataclass(frozen=True)
class StepTime:
    """Seconds that a pipeline stage takes for one step, by cause. Of an exchange only what the stage waits for counts.

    Attributes:
        products, attention, memory: compute, by what limits it.
        tensor, context, pipeline: exchanges of activations.
        data: gradients, and weights after a step.
        tied_head: the sum of both copies' gradients.
        update: of the optimizer.
        launches: what the host adds.
        contention: what hidden exchanges take from compute.
        bubble: waiting for other stages.
    """

    products: float
    attention: float
    memory: float
    tensor: float
    context: float
    pipeline: float
    data: float
    tied_head: float
    update: float
    launches: float
    contention: float
    bubble: float = 0.0

    @property
    def total(self) -> float:
        return sum(vars(self).values())

    @property
    def once(self) -> float:
        """Seconds of what is done once a step, not once a micro-batch."""
        return self.data + self.tied_head + self.update

    @property
    def busy(self) -> float:
        """Seconds of all micro-batches."""
        return self.total - self.once - self.bubble


def pipelined(stages: list[tuple[StepTime, int]], num_micro_batches: int) -> StepTime:
    """Return the step of a pipeline: that of its slowest stage, which waits for a micro-batch of each other stage.

    Args:
        stages: the time of each kind of stage, and how many of the kind there are.
        num_micro_batches: of a step.
    """
    slowest = max((stage for stage, _ in stages), key=lambda stage: stage.total)
    of_all = sum(stage.busy * count for stage, count in stages)
    return dataclasses.replace(slowest, bubble=(of_all - slowest.busy) / num_micro_batches)


def step_time(work: Workload, sent: Volume, gpu: Gpu, links: Links, assumed: Assumptions) -> StepTime:
    """Predict the step of a rank of the grid's pipeline stage, without the bubble.

    Args:
        sent: bytes of the step.
        links: between the ranks.
    """
    grid, micro_batches, layers = work.grid, work.num_micro_batches, len(work.layers)
    memory_rate = assumed.memory * gpu.memory_tb_per_s * 1e12
    parameters, axis = held_elements(work), axes(links, grid)
    forward, backward = passes(work, gpu, assumed)
    compute = {name: forward[name] + backward[name] for name in forward}
    copied = assumed.accumulation_bytes + (assumed.partition_bytes if work.parallel.zero_stage == 3 else 0)
    compute["memory"] += micro_batches * copied * parameters / memory_rate
    blocks, neighbours = micro_batches * layers, (not grid.is_first_stage) + (not grid.is_last_stage)
    exchanges = {
        "tensor": axis["tensor"].ring(sent.tensor, blocks * tensor_calls(work)),
        "context": axis["context"].all_to_all(sent.context, blocks * 4),
        # A stage waits for what it receives as for what it sends.
        "pipeline": axis["pipeline"].neighbour(2 * sent.pipeline, 2 * neighbours * micro_batches),
    }
    hidden = {name: getattr(assumed, f"{name}_hidden") for name in exchanges}
    if not work.parallel.sequence_parallel:
        hidden["tensor"] *= 3 / 7  # sums travel beside a product, and results are then gathered beside none
    waits = {name: time * (1 - hidden[name]) for name, time in exchanges.items()}
    flops = block_flops(work.model, recompute="none") * work.tokens / grid.tp
    replayed = work.cuda_graphs and work.parallel.replays_passes(grid.dp, work.per_head, flops)
    replayed = replayed and axis["context"].nodes == 1  # exchanges between hosts use NCCL and are not captured
    data, data_waits = data_exchange(work, sent, axis["data"], forward, backward, assumed)
    data_waits = data if replayed else data_waits  # a replay hands over all gradients at its end
    busy = sum(compute.values()) + sum(waits.values())
    at_least = blocks * (assumed.replayed_block_s if replayed else assumed.block_s)
    ends = links.axis(2, (grid.pp - 1) * grid.tp * grid.replicas) if sent.embedding_ends else links.axis(1, 1)
    return StepTime(
        **compute,
        **waits,
        data=data_waits,
        tied_head=ends.ring(sent.embedding_ends, 1),
        update=assumed.update_bytes * parameters / grid.replicas / memory_rate,
        launches=micro_batches * assumed.micro_batch_s + max(0.0, at_least - busy),
        contention=assumed.contention * (data - data_waits),
    )


def passes(work: Workload, gpu: Gpu, assumed: Assumptions) -> tuple[dict[str, float], dict[str, float]]:
    """Return the seconds of all forward and of all backward passes of a step, by what limits them."""
    model, grid = work.model, work.grid
    tokens, layers = work.tokens * work.num_micro_batches, len(work.layers)
    memory_rate = assumed.memory * gpu.memory_tb_per_s * 1e12
    width_s = tokens * model.hidden_size * ELEMENT_BYTES / grid.tp / memory_rate  # reads or writes activations once
    rows = work.padded_vocab_size / grid.tp if grid.is_last_stage else 0
    # A fused FFN may be replicated under sequence parallelism, but then each rank multiplies 1/tp of the tokens.
    product_rate = assumed.products * gpu.peak_flops
    block_products = layers * 2 * tokens * model.block_matrix_elements / grid.tp / product_rate
    head_products = 2 * tokens * model.hidden_size * rows / product_rate
    scores = 2 * tokens * model.seq_length * model.hidden_size / grid.tp  # per layer, under the causal mask
    attention = layers * max(scores / (assumed.attention * gpu.peak_flops), assumed.attention_widths / 3.5 * width_s)
    widths = assumed.block_widths + 10 * (model.norm != "none")
    widths += 0 if model.fused_ffn else 6 * model.ffn_width / model.hidden_size
    widths -= assumed.residual_widths * model.ffn_holds_residual
    block_memory = layers * widths * width_s / 3
    logits = assumed.logits_passes * rows * tokens * ELEMENT_BYTES / memory_rate
    packing = layers * 4 * assumed.exchange_widths * width_s if grid.cp > 1 else 0.0  # of q, k, v and the output
    again = {"none": (0, 0), "selective": (0, 1), "full": (1, 1)}[work.recompute]  # block and attention
    forward = {
        "products": block_products + head_products,
        "attention": attention,
        "memory": block_memory + packing + logits / 3,
    }
    backward = {
        "products": (2 + again[0]) * block_products + 2 * head_products,
        "attention": (2.5 + again[1]) * attention,
        "memory": (2 + again[0]) * block_memory + (1 + again[1]) * packing + logits * 2 / 3,
    }
    return forward, backward


def tensor_calls(work: Workload) -> int:
    """Return the exchanges over tensor-parallel ranks of one block and micro-batch."""
    if not work.parallel.sequence_parallel:
        return 4
    return 5 + (5 if not work.model.fused_ffn else 0 if work.replicates_fused_ffn else 4)


def data_exchange(
    work: Workload,
    sent: Volume,
    axis: Axis,
    forward: dict[str, float],
    backward: dict[str, float],
    assumed: Assumptions,
) -> tuple[float, float]:
    """Return the seconds in which replicas exchange gradients and weights, and how many of them a step waits for.

    Gradients travel in buckets while the backward pass goes on: of the last micro-batch under ZeRO-1, of each under
    ZeRO 2 and 3. Weights travel while the next forward pass goes on; under ZeRO-3 in every pass. The first bucket of
    layers and the embedding are waited for: their gradients are complete last, and their weights are in use first.
    So is a tied head on the last stage of a pipeline, whose gradient is first summed with the embedding's.
    """
    grid, micro_batches, stage = work.grid, work.num_micro_batches, work.parallel.zero_stage
    if grid.replicas == 1:
        return 0.0, 0.0
    held = held_parameters(work)
    parameters = sum(each.elements for each in held.values())
    layer = sum(each.size for name, each in held.items() if name.startswith("layers."))
    late = sum(each.elements for name, each in held.items() if name.startswith("embedding"))
    late += held["head.weight"].elements if "head.weight" in held and work.model.tied_head else 0
    least = least_bucket_elements(grid.replicas)
    layers_a_bucket = 1 if stage == 3 else min(len(work.layers), math.ceil(least / layer))
    late += (len(work.layers) % layers_a_bucket or layers_a_bucket) * layer
    buckets = 2 + math.ceil(len(work.layers) / layers_a_bucket)  # one of what is small, one of the embedding
    times = [micro_batches if stage > 1 else 1, 2 * micro_batches if stage == 3 else 1]
    exchanges = [axis.ring(sent.gradients, times[0] * buckets), axis.ring(sent.weights, times[1] * buckets)]
    passing, returning = sum(forward.values()), sum(backward.values())
    beside = [
        returning if stage > 1 else returning / micro_batches,
        passing + returning if stage == 3 else passing / micro_batches,
    ]
    fractions = [assumed.gradients_hidden, assumed.weights_hidden]
    hidden = [
        min(fraction * time * (1 - late / parameters), room)
        for fraction, time, room in zip(fractions, exchanges, beside, strict=True)
    ]
    return sum(exchanges), sum(exchanges) - sum(hidden)
