"""What a model costs, by counting: operations of private inference, and training FLOPs against a device's peak.

Symbols as in the paper: L layers, H heads, T context, d model width, f FFN width (4 d unless set), V vocabulary.
"""

from dataclasses import dataclass
from decimal import ROUND_HALF_UP, Decimal

from model.config import ModelConfig
from train.cost.parameters import block_matrix_parameters, ffn_parameters, ffn_width

# Dense bf16 peaks in TFLOP/s from the makers' data sheets, which often print twice that, with sparsity. Names are those
# of torch.cuda.get_device_name, matched whole: a slice of a device or a laptop's namesake is another device.
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
    """FLOPs of a forward pass over T tokens, multiply and add counted apart; embedding and head are left out."""

    attention: int
    ffn: int

    @property
    def total(self) -> int:
        return self.attention + self.ffn


@dataclass(frozen=True)
class NonlinearOperation:
    """A nonlinear operation that private inference pays for: how often a forward pass has it, on what shape."""

    count: int
    rows: int
    columns: int

    @property
    def elements(self) -> int:
        return self.count * self.rows * self.columns


def forward_flops(model: ModelConfig) -> ForwardFlops:
    """FLOPs as arXiv 2501.03489 counts them in its tables of private inference.

    attention = L (8 T d^2 + 3 T^2 d): four projections, then scores and mixing, where both in full would be 4 T^2 d;
    FFN = 4 L T d f, which is 16 L T d^2 at f = 4 d; fused FFN = 2 L T d^2.

    Args:
        model: resolved, so that every ingredient is set.
    """
    layers, tokens, width = model.num_layers, model.seq_length, model.hidden_size
    return ForwardFlops(
        attention=layers * (8 * tokens * width**2 + 3 * tokens**2 * width),
        ffn=2 * layers * tokens * ffn_parameters(model),
    )


def printed_gflops(model: ModelConfig) -> tuple[str, str]:
    """FLOPs of (FFN, attention) in units of 1e9 as the paper's tables print them, with one decimal.

    The paper's column of fused FFNs is an eighth of its printed column of two matrices: 58.0 / 8 stands there as 7.3,
    where the count itself, 7.248, would round to 7.2.
    """
    flops = forward_flops(model)
    if not model.fused_ffn:
        return _one_decimal(flops.ffn / 1e9), _one_decimal(flops.attention / 1e9)
    return _one_decimal(float(_one_decimal(8 * flops.ffn / 1e9)) / 8), _one_decimal(flops.attention / 1e9)


def _one_decimal(value: float) -> str:
    """Rounded half up, as people do."""
    return str(Decimal(repr(value)).quantize(Decimal("0.1"), rounding=ROUND_HALF_UP))


def nonlinear_operations(model: ModelConfig) -> dict[str, NonlinearOperation]:
    """Nonlinear operations of a forward pass over one sequence, by kind; kinds that the model lacks are absent.

    softmax L*H of T x T, layernorm 2 L of T x d, the activation (gelu or relu) L of T x f, as in arXiv 2501.03489; the
    norm after the last block, which the paper's tables leave out, is listed by itself.
    """
    layers, tokens, width = model.num_layers, model.seq_length, model.hidden_size
    operations = {"softmax": NonlinearOperation(layers * model.num_attention_heads, tokens, tokens)}
    if model.norm == "layernorm":
        operations["layernorm"] = NonlinearOperation(2 * layers, tokens, width)
    if model.final_norm:
        operations["final_layernorm"] = NonlinearOperation(1, tokens, width)
    if model.activation in ("gelu", "relu"):
        operations[model.activation] = NonlinearOperation(layers, tokens, ffn_width(model))
    return operations


def training_flops_per_token(model: ModelConfig, vocab_size: int) -> int:
    """FLOPs that training a token needs, forward and backward, as MFU counts them.

        6 N + 6 L T d,   N = L (4 d^2 + FFN matrices) + d V

    N are the parameters that multiply activations (a lookup is no product, so only the head counts V); each costs 2
    FLOPs forward and 4 backward. Attention's scores and mixing cost 4 T d a layer forward, half of it under the causal
    mask, and three times that with the backward pass. Recomputed activations are not counted: they are no progress.

    Args:
        model: resolved.
        vocab_size: V, unpadded.
    """
    width = model.hidden_size
    matrices = model.num_layers * block_matrix_parameters(model) + width * vocab_size
    return 6 * matrices + 6 * model.num_layers * model.seq_length * width


def device_peak_tflops(device_name: str) -> float | None:
    """Dense bf16 peak of one device in TFLOP/s, or None for a device not in the table."""
    return DEVICE_PEAK_TFLOPS.get(device_name)


def mfu(tokens_per_second: float, flops_per_token: int, device_name: str, num_devices: int) -> float | None:
    """Model FLOPs utilization: the share of the devices' dense bf16 peak in use; None for an unknown device.

    Args:
        tokens_per_second: over all devices together.
        flops_per_token: from `training_flops_per_token`.
    """
    peak = device_peak_tflops(device_name)
    return None if peak is None else tokens_per_second * flops_per_token / (num_devices * peak * 1e12)


def mfu_statement(tokens_per_second: float, flops_per_token: int, device_name: str, num_devices: int) -> str:
    """MFU with the numbers it came from, or why there is none; one line."""
    share = mfu(tokens_per_second, flops_per_token, device_name, num_devices)
    if share is None:
        return f"MFU unknown: train/cost/flops.py has no dense bf16 peak for {device_name!r}"
    return (
        f"MFU {share:.1%} = {tokens_per_second:,.0f} tokens/s * {flops_per_token / 1e9:.3g} GFLOP/token / "
        f"({num_devices} * {DEVICE_PEAK_TFLOPS[device_name]:g} TFLOP/s, dense bf16 of {device_name})"
    )
