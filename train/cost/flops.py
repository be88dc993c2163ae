"""Counts the FLOPs of training and the operations of private inference, and holds the peak FLOP/s of devices.

Symbols as in the paper: L layers, H heads, T context, d model width, f FFN width (4 d unless set), V vocabulary.
"""

from dataclasses import dataclass
from decimal import ROUND_HALF_UP, Decimal

from model.config import ModelConfig

# Dense bf16 peaks in TFLOP/s from data sheets, which often print twice that, with sparsity. Names are those of
# torch.cuda.get_device_name and must match exactly: a MIG slice or a laptop GPU of a similar name is another device.
DEVICE_PEAK_TFLOPS: dict[str, float] = {
    "NVIDIA A100-SXM4-40GB": 312,
    "NVIDIA A100-SXM4-80GB": 312,
    "NVIDIA A100-PCIE-40GB": 312,
    "NVIDIA A100 80GB PCIe": 312,
    "NVIDIA H100 80GB HBM3": 989.5,
    "NVIDIA H100 PCIe": 756,
    "NVIDIA H100 NVL": 835.5,
    "NVIDIA H200": 989.5,
    "NVIDIA H200 NVL": 835.5,
    "NVIDIA GH200 480GB": 989.5,
    "NVIDIA B200": 2250,
    "NVIDIA GB200": 2500,
    "NVIDIA L4": 121,
    "NVIDIA L40S": 362,
    "NVIDIA A10": 125,
    "NVIDIA A40": 149.7,
    "NVIDIA RTX A6000": 154.8,
    "NVIDIA GeForce RTX 3090": 71,
    "NVIDIA GeForce RTX 4090": 165.2,
}


@dataclass(frozen=True)
class ForwardFlops:
    """FLOPs of a forward pass over T tokens. A multiply-add counts as two; embedding and head do not count."""

    attention: int
    ffn: int

    @property
    def total(self) -> int:
        return self.attention + self.ffn


@dataclass(frozen=True)
class NonlinearOperation:
    """A nonlinear operation of private inference: how often a forward pass has it, and on which shape."""

    count: int
    rows: int
    columns: int

    @property
    def elements(self) -> int:
        return self.count * self.rows * self.columns


def forward_flops(model: ModelConfig) -> ForwardFlops:
    """Count FLOPs as the private-inference tables of arXiv 2501.03489 do.

        attention = L (8 T d^2 + 3 T^2 d)    FFN = 4 L T d f    fused FFN = 2 L T d^2

    8 T d^2 are the four projections. 3 T^2 d is the paper's count of scores and mixing, which in full are 4 T^2 d.

    Args:
        model: resolved.
    """
    layers, tokens, width = model.num_layers, model.seq_length, model.hidden_size
    return ForwardFlops(
        attention=layers * (8 * tokens * width**2 + 3 * tokens**2 * width),
        ffn=2 * layers * tokens * model.ffn_matrix_elements,
    )


def printed_gflops(model: ModelConfig) -> tuple[str, str]:
    """Return GFLOPs of FFN and attention as the paper's tables print them, with one decimal.

    The paper's figure for a fused FFN is an eighth of its rounded figure for two matrices: 58.0 / 8 is printed as 7.3,
    while the count itself, 7.248, rounds to 7.2.
    """
    flops = forward_flops(model)
    if not model.fused_ffn:
        return _one_decimal(flops.ffn / 1e9), _one_decimal(flops.attention / 1e9)
    return _one_decimal(float(_one_decimal(8 * flops.ffn / 1e9)) / 8), _one_decimal(flops.attention / 1e9)


def _one_decimal(value: float) -> str:
    """Format with one decimal, rounding half up."""
    return str(Decimal(repr(value)).quantize(Decimal("0.1"), rounding=ROUND_HALF_UP))


def nonlinear_operations(model: ModelConfig) -> dict[str, NonlinearOperation]:
    """Count the nonlinear operations of a forward pass over one sequence, by kind.

    As in arXiv 2501.03489: softmax L*H of T x T, layernorm 2 L of T x d, the activation L of T x f. The norm after the
    last block is an entry of its own, since the paper's tables leave it out. Kinds that the model lacks are absent.
    Tapered norms are affine maps in the trained network, which fold into its matrices.
    """
    layers, tokens, width = model.num_layers, model.seq_length, model.hidden_size
    operations = {"softmax": NonlinearOperation(layers * model.num_attention_heads, tokens, tokens)}
    if model.norm == "layernorm":
        operations["layernorm"] = NonlinearOperation(2 * layers, tokens, width)
    if model.final_norm:
        operations["final_layernorm"] = NonlinearOperation(1, tokens, width)
    if model.activation not in (None, "identity"):
        operations[model.activation] = NonlinearOperation(layers, tokens, model.ffn_width)
    return operations


def training_flops_per_token(model: ModelConfig, vocab_size: int) -> int:
    """Count the FLOPs of training on one token, forward and backward, as MFU counts them.

        6 N + 6 L T d,   N = L (4 d^2 + FFN matrices) + d V

    N counts the parameters that multiply activations. An embedding lookup is no product, so V counts once, for the
    head. Each parameter costs 2 FLOPs forward and 4 backward. Scores and mixing of attention cost 4 T d per layer
    forward, half of that under the causal mask, and three times that with the backward pass. Recomputed activations do
    not count.

    Args:
        model: resolved.
        vocab_size: V, unpadded.
    """
    width = model.hidden_size
    matrices = model.num_layers * model.block_matrix_elements + width * vocab_size
    return 6 * matrices + 6 * model.num_layers * model.seq_length * width


def device_peak_tflops(device_name: str) -> float | None:
    """Return a device's dense bf16 peak in TFLOP/s; None if the table lacks it."""
    return DEVICE_PEAK_TFLOPS.get(device_name)


def mfu(tokens_per_second: float, flops_per_token: int, device_name: str, num_devices: int) -> float | None:
    """Return the model FLOPs utilization, a fraction of the devices' dense bf16 peak; None for an unknown device.

    Args:
        tokens_per_second: of all devices together.
        flops_per_token: from `training_flops_per_token`.
    """
    peak = device_peak_tflops(device_name)
    return None if peak is None else tokens_per_second * flops_per_token / (num_devices * peak * 1e12)


def mfu_statement(tokens_per_second: float, flops_per_token: int, device_name: str, num_devices: int) -> str:
    """Return one line with the MFU and the numbers behind it, or the reason why there is none."""
    share = mfu(tokens_per_second, flops_per_token, device_name, num_devices)
    if share is None:
        return f"MFU unknown: train/cost/flops.py has no dense bf16 peak for {device_name!r}"
    return (
        f"MFU {share:.1%} = {tokens_per_second:,.0f} tokens/s * {flops_per_token / 1e9:.3g} GFLOP/token / "
        f"({num_devices} * {DEVICE_PEAK_TFLOPS[device_name]:g} TFLOP/s, dense bf16 of {device_name})"
    )
