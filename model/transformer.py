"""The decoder: embedding, blocks, head. Every architecture of arXiv 2501.03489 is one setting of `ModelConfig`.

Tensor names carry their shape:
    T tokens of a sequence    B sequences    D model width    N attention heads    H head width    F FFN width
    V vocabulary (padded)
The sequence comes first, [T, B, D], as in Megatron: a slice of positions is then contiguous in memory.

A `Transformer` may hold a range of the layers only, with or without the two ends; parameter names are those of the
whole model in either case, so that `layers.7.attention.threshold` means the same parameter under every layout.
"""

from collections.abc import Callable, Iterable
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrize

from model.config import ModelConfig
from model.cross_entropy import linear_cross_entropy
from model.entropy_attention import joint_entropy_attention
from model.initialize import Cut, initialize, named_parameters, whole
from model.normalized_weights import SpectralNormalization, WeightNormalization
from model.rotary import rotate
from model.taper import TaperNorm

NORMS = {"layernorm": nn.LayerNorm, "taper": TaperNorm}
ACTIVATIONS = {
    "gelu": F.gelu,
    "gelu_tanh": partial(F.gelu, approximate="tanh"),
    "relu": F.relu,
    "identity": lambda x: x,
}


def scaled_matrix(
    weight: Tensor, divisor: Tensor | None, diagonal: Tensor | float | None, first_column: int = 0
) -> Tensor:
    """Return W / divisor + diagonal * I. `weight` may hold a range of W's columns only, from `first_column` on.

    Scaling the matrix costs operations per element of the matrix; scaling the product would cost operations per element
    of the activations. The gradients of divisor and diagonal are sums over the matrix, not over tokens, so no product
    needs to be kept.

    The result is computed in float32 or wider and rounded once. In bf16, next to a diagonal near 1, W's own diagonal
    keeps a resolution of 2^-8 (below 1) or 2^-7. A bf16 parameter near 1 has the same.
    """
    exact = torch.promote_types(weight.dtype, torch.float32)
    matrix = weight if divisor is None else weight / divisor.to(exact)
    if diagonal is not None:
        row, column = (torch.arange(size, device=weight.device) for size in weight.shape)
        matrix = matrix + torch.where(row.unsqueeze(1) == first_column + column, diagonal, 0.0)
    return matrix.to(weight.dtype)


def _product(x: Tensor, matrix: Tensor, bias: Tensor | None) -> Tensor:
    return F.linear(x, matrix, bias)  # looked up at each call, since DeepSpeed replaces it under ZeRO-3


class Linear(nn.Linear):
    """Linear layer, x (W / divisor + diagonal * I)^T + bias.

    The layer owns only W, since the other arguments belong to heads or to a sub-block. A bias is added within the
    product.

    Attributes:
        product: (x, matrix, bias) -> x matrix^T + bias.
    """

    def __init__(self, in_features: int, out_features: int) -> None:
        super().__init__(in_features, out_features, bias=False)
        self.product: Callable[..., Tensor] = _product

    def forward(
        self,
        x: Tensor,
        bias: Tensor | None = None,
        divisor: Tensor | None = None,
        diagonal: Tensor | float | None = None,
    ) -> Tensor:
        return self.product(x, scaled_matrix(self.weight, divisor, diagonal), bias)


class Embedding(nn.Module):
    """Word embedding, plus position embedding if positions are learned.

    Attributes:
        first_position: of the tokens, if `forward` is not told their positions; 0 by default.
    """

    def __init__(self, config: ModelConfig, padded_vocab_size: int) -> None:
        super().__init__()
        self.first_position = 0
        self.word = _table(padded_vocab_size, config.hidden_size)
        self.position = _table(config.seq_length, config.hidden_size) if config.positions == "learned" else None

    def forward(self, tokens_TB: Tensor, position_TB: Tensor | None = None) -> Tensor:
        """Tokens [T, B], at consecutive positions unless `position_TB` gives each its own, -> [T, B, D]."""
        x_TBD = self.word(tokens_TB)
        if self.position is not None and position_TB is None:
            positions = slice(self.first_position, self.first_position + tokens_TB.shape[0])
            x_TBD = x_TBD + self.position.weight[positions].unsqueeze(1)
        elif self.position is not None:
            x_TBD = x_TBD + self.position(position_TB)
        return x_TBD


def _table(rows: int, columns: int) -> nn.Embedding:
    """Return an embedding without initial values, which `initialize` gives.

    Drawing normal numbers on the meta device would import torch's compiler, which takes seconds.
    """
    return nn.Embedding.from_pretrained(torch.empty(rows, columns), freeze=False)


class CoreAttention(nn.Module):
    """The part of attention between its projections: rotary positions, if chosen, and the softmax. No parameters."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.rotary = config.positions == "rotary"

    def forward(
        self, qkv_TBN3H: Tensor, temperature: Tensor | None, document_start_BT: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """Query, key and value of each head -> output [T, B, N, H] and entropy in nats [B, N, T].

        The temperature is [N] or [N, at least T].
        """
        if self.rotary:
            q_TBNH, k_TBNH, v_TBNH = qkv_TBN3H.unbind(3)
            qkv_TBN3H = torch.stack([rotate(q_TBNH), rotate(k_TBNH), v_TBNH], dim=3)
        if temperature is not None and temperature.dim() == 2:
            temperature = temperature[:, : qkv_TBN3H.shape[0]]
        return joint_entropy_attention(qkv_TBN3H, temperature=temperature, document_start=document_start_BT)


class _GradientOfBiases(torch.autograd.Function):
    """The identity on products [T, B, N 3 H] that already contain the biases of query and key, [N, H].

    The backward pass computes the gradients of the biases. A key bias b adds q_i . b to all scores of row i, and the
    softmax does not change. Its gradient is therefore 0, unless positions rotate the keys. Summing it over tokens would
    give rounding noise, on which Adam takes steps as large as on any other gradient. It would also read two thirds of
    the products' gradients for nothing.
    """

    @staticmethod
    def forward(ctx: Any, qkv: Tensor, query_bias: Tensor, key_bias: Tensor, key_bias_acts: bool) -> Tensor:
        ctx.shape, ctx.key_bias_acts = query_bias.shape, key_bias_acts
        return qkv.view_as(qkv)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        heads, width = ctx.shape
        grad_TBN3H = grads[0].unflatten(-1, (heads, 3, width))
        query_NH, key_NH = grad_TBN3H[..., 0, :].sum((0, 1)), grads[0].new_zeros(ctx.shape)
        if ctx.key_bias_acts:
            key_NH = grad_TBN3H[..., 1, :].sum((0, 1))
        return grads[0], query_NH, key_NH, None


class Attention(nn.Module):
    """Causal softmax attention, softmax_j(q_i . k_j / (t_i sqrt(H))), with the entropy of every row.

    Query and key have a bias, and the output has one if the model has all biases. A value's bias would add the same to
    every position, since a row's weights sum to 1. The key's bias acts, and learns, only if positions rotate the keys.
    Query, key and value are one matrix, stacked head by head, so a range of heads is a range of its rows.

    Attributes:
        heads: whose queries, keys and values `query_key_value` returns, all of them by default.
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        heads, width = config.num_attention_heads, config.head_width
        self.head_width = width
        self.query_key_value = Linear(config.hidden_size, 3 * heads * width)
        self.query_bias = nn.Parameter(torch.empty(heads, width))
        self.key_bias = nn.Parameter(torch.empty(heads, width))
        self.key_bias_acts = config.positions == "rotary"
        self.heads = slice(None)
        self.output = Linear(heads * width, config.hidden_size)
        self.output_bias = nn.Parameter(torch.empty(config.hidden_size)) if config.biases == "all" else None
        self.core = CoreAttention(config)
        self.temperature_form = config.temperature_form
        # A calibrated one is a tensor, and `initialize` sets it. With numbers, layers would not share compiled code.
        self.temperature_init: float | Tensor | None = (
            None if config.temperature_init == "calibrated" else config.temperature_init
        )
        shape = {"none": None, "per_head": (heads,), "per_position": (heads, config.seq_length)}[
            config.temperature or "none"
        ]
        self.temperature_parameter = nn.Parameter(torch.empty(shape)) if shape else None
        self.threshold = nn.Parameter(torch.empty(heads)) if config.regularized else None

    def temperature(self) -> Tensor | None:
        """Return the positive divisor of the logits, [N] or [N, T]; None without a temperature."""
        if self.temperature_parameter is None:
            return None
        if self.temperature_form == "exp":
            assert self.temperature_init is not None, "`initialize` sets a calibrated temperature"
            exact = torch.promote_types(self.temperature_parameter.dtype, torch.float32)
            return self.temperature_init * self.temperature_parameter.to(exact).exp()
        return self.temperature_parameter

    def may_lack_gradient(self, is_one_hot: bool) -> set[str]:
        """Return the names of parameters whose gradient may be exactly zero in a correct step.

        A threshold has no gradient while its head's entropy is within the regularizer's margin. A key bias has none
        unless positions rotate the keys. If each token attends to one position, parameters that only move attention
        between positions have none.

        Args:
            is_one_hot: whether a head's mean entropy is zero, as with saturated scores or sequences of one token.
        """
        names = {"threshold"}
        if not self.key_bias_acts:
            names.add("key_bias")
        if is_one_hot:
            names |= {"query_bias", "key_bias", "temperature_parameter", "query_key_value.gamma"}
        return names

    def forward(self, x_TBD: Tensor, document_start_BT: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """[T, B, D] -> output [T, B, D] and entropy in nats [B, N, T]."""
        return self.attend(self.project(x_TBD), document_start_BT)

    def project(self, x_TBD: Tensor) -> Tensor:
        """[T, B, D] -> queries, keys and values of each head, stacked, [T, B, N 3 H]."""
        bias_N3H = torch.stack([self.query_bias, self.key_bias, torch.zeros_like(self.key_bias)], dim=1)
        qkv = self.query_key_value(x_TBD, bias=bias_N3H.detach().flatten())
        return _GradientOfBiases.apply(qkv, self.query_bias[self.heads], self.key_bias[self.heads], self.key_bias_acts)

    def attend(self, qkv: Tensor, document_start_BT: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Queries, keys and values of each head, stacked, [T, B, N 3 H] -> output [T, B, D] and entropy."""
        qkv_TBN3H = qkv.view(*qkv.shape[:2], -1, 3, self.head_width)
        temperature = self.temperature()
        own = None if temperature is None else temperature[self.heads]
        out_TBNH, entropy_BNT = self.core(qkv_TBN3H, own, document_start_BT)
        return self.merge(out_TBNH), entropy_BNT

    def merge(self, out_TBNH: Tensor) -> Tensor:
        """Outputs of the heads [T, B, N, H] -> [T, B, D]."""
        out_TBD = self.output(out_TBNH.flatten(2))
        return out_TBD if self.output_bias is None else out_TBD + self.output_bias


class FeedForward(nn.Module):
    """FFN sub-block with its residual: beta * x + (1 / alpha) * FFN(x) if scaled (paper Eq. 8), else x + FFN(x).

    FFN is one D x D matrix W if fused, else W_down act(W_up x). A fused FFN without a norm before it makes the
    sub-block linear. It is then computed as one product: (beta * I + W / alpha) x. If the model has all biases, W_up x
    has one [F], and one [D] is added to the result, which alpha does not divide.
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        width, ffn_width = config.hidden_size, config.ffn_width
        self.fused = Linear(width, width) if config.fused_ffn else None
        self.up = None if config.fused_ffn else Linear(width, ffn_width)
        self.down = None if config.fused_ffn else Linear(ffn_width, width)
        self.activation = ACTIVATIONS[config.activation or "identity"]
        self.holds_residual = config.ffn_holds_residual
        self.alpha = nn.Parameter(torch.empty(1)) if config.scaled_ffn else None
        self.beta = nn.Parameter(torch.empty(1)) if config.scaled_ffn else None
        has_all = config.biases == "all"
        self.up_bias = nn.Parameter(torch.empty(ffn_width)) if has_all and self.up is not None else None
        self.bias = nn.Parameter(torch.empty(width)) if has_all else None

    def forward(self, x_TBD: Tensor, residual_TBD: Tensor) -> Tensor:
        """Add the FFN of x to the residual: both [T, B, D] -> [T, B, D]. Without a norm both are the same tensor."""
        sum_TBD = self._without_bias(x_TBD, residual_TBD)
        return sum_TBD if self.bias is None else sum_TBD + self.bias

    def _without_bias(self, x_TBD: Tensor, residual_TBD: Tensor) -> Tensor:
        if self.holds_residual:
            assert self.fused is not None
            return self.fused(x_TBD, divisor=self.alpha, diagonal=1.0 if self.beta is None else self.beta)
        if self.beta is not None:
            residual_TBD = self.beta * residual_TBD
        if self.fused is not None:
            return residual_TBD + self.fused(x_TBD, divisor=self.alpha)
        assert self.up is not None
        x_TBF = self.up(x_TBD)
        return residual_TBD + self.contract(x_TBF if self.up_bias is None else x_TBF + self.up_bias)

    def contract(self, x_TBF: Tensor) -> Tensor:
        """Compute the second half of an FFN of two matrices: [T, B, F] -> [T, B, D]."""
        assert self.down is not None
        return self.down(self.activation(x_TBF), divisor=self.alpha)


class Block(nn.Module):
    """Pre-norm block (paper Eq. 1-4): Xs = X + MHA(LN1(X)); Xout = Xs + FFN(LN2(Xs)), the norms absent where 'none'."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        norm = nn.Identity if config.norm in (None, "none") else NORMS[config.norm]
        self.attention_norm = norm(config.hidden_size)
        self.attention = Attention(config)
        self.ffn_norm = norm(config.hidden_size)
        self.ffn = FeedForward(config)
        normalize_weights(self, config)

    def forward(self, x_TBD: Tensor, document_start_BT: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """[T, B, D] -> [T, B, D] and entropy in nats [B, N, T]."""
        attended_TBD, entropy_BNT = self.attention(self.attention_norm(x_TBD), document_start_BT)
        x_TBD = x_TBD + attended_TBD
        return self.ffn(self.ffn_norm(x_TBD), x_TBD), entropy_BNT


class Head(nn.Module):
    """Final norm and vocabulary projection. Rows of the weight beyond `vocab_size` are padding with probability 0."""

    def __init__(self, config: ModelConfig, vocab_size: int, padded_vocab_size: int) -> None:
        super().__init__()
        self.vocab_size = vocab_size
        self.norm = nn.LayerNorm(config.hidden_size) if config.final_norm else nn.Identity()
        self.weight = nn.Parameter(torch.empty(padded_vocab_size, config.hidden_size))

    def forward(self, x_TBD: Tensor, labels_TB: Tensor | None = None) -> Tensor:
        """Return logits [T, B, vocab_size]; with labels, the cross-entropy in nats summed over tokens, float32."""
        x_TBD = self.norm(x_TBD)
        if labels_TB is None:
            return F.linear(x_TBD, self.weight[: self.vocab_size])
        return linear_cross_entropy(x_TBD, self.weight, labels_TB, vocab_size=self.vocab_size)


class Transformer(nn.Module):
    """The whole model, or the part of it that one pipeline stage holds, with its initial weights.

    On the meta device it has shapes only, and whoever gives it memory calls `initialize` or loads weights.

    Args:
        config: sizes and ingredients; what is null is resolved.
        vocab_size: tokens of the dataset's tokenizer.
        padded_vocab_size: rows of the embedding, at least vocab_size (matrix products want multiples of 128).
        layers: which blocks are held; all by default.
        first, last: whether the embedding and the head are held. If both are and the head is tied, they share one
            parameter.
        seed: of the initial weights.

    Raises:
        ValueError: the configuration has faults; one line each.
    """

    def __init__(
        self,
        config: ModelConfig,
        vocab_size: int,
        *,
        padded_vocab_size: int | None = None,
        layers: Iterable[int] | None = None,
        first: bool = True,
        last: bool = True,
        seed: int = 1,
    ) -> None:
        super().__init__()
        if faults := config.faults():
            raise ValueError("\n".join(faults))
        config = config.resolved()
        padded_vocab_size = padded_vocab_size or vocab_size
        self.config, self.vocab_size = config, vocab_size
        self.embedding = Embedding(config, padded_vocab_size) if first else None
        held = range(config.num_layers) if layers is None else layers
        self.layers = nn.ModuleDict({str(layer): Block(config) for layer in held})
        self.head = Head(config, vocab_size, padded_vocab_size) if last else None
        self.tie_head()
        if not any(parameter.is_meta for parameter in self.parameters()):
            self.initialize(seed)

    def initialize(self, seed: int, cut: Cut = whole) -> None:
        """Give every parameter its initial value, which depends on the seed and its name alone.

        Args:
            seed: of the run.
            cut: returns the part of a whole tensor that is held here.
        """
        initialize(self, self.config, global_shapes(self.config, self.vocab_size), seed, cut)

    def tie_head(self) -> None:
        """Make embedding and head one parameter, if both are held and the head is tied."""
        if self.embedding is not None and self.head is not None and self.config.tied_head:
            self.head.weight = self.embedding.word.weight

    def hidden_states(
        self, x: Tensor, document_start_BT: Tensor | None = None, states_TBD: list[Tensor] | None = None
    ) -> tuple[Tensor, list[Tensor]]:
        """Run the embedding and the layers that are held.

        Args:
            x: tokens [T, B] if the embedding is held, else hidden states [T, B, D].
            document_start_BT: for sequences packed from several documents, the first position that each token may
                attend to (integers). Positions and per-position temperatures stay those of the packed sequence.
            states_TBD: a list to which each layer's output is appended, if it is wanted.

        Returns:
            Hidden states [T, B, D] and the entropy in nats of each layer held, [B, N, T].
        """
        x = self.embedding(x) if self.embedding is not None else x
        entropies_BNT = []
        for layer in self.layers.values():
            x, entropy_BNT = layer(x, document_start_BT)
            entropies_BNT.append(entropy_BNT)
            if states_TBD is not None:
                states_TBD.append(x)
        return x, entropies_BNT

    def forward(
        self, tokens_TB: Tensor, labels_TB: Tensor | None = None, document_start_BT: Tensor | None = None
    ) -> tuple[Tensor, list[Tensor]]:
        """Run the whole model.

        Returns:
            Logits [T, B, V], or with labels the summed cross-entropy in nats; and the entropies of every layer.
        """
        assert self.head is not None, "only a model that holds its head has an output"
        x_TBD, entropies_BNT = self.hidden_states(tokens_TB, document_start_BT)
        return self.head(x_TBD, labels_TB), entropies_BNT


def global_shapes(config: ModelConfig, vocab_size: int) -> dict[str, torch.Size]:
    """Return the shape of every parameter of the whole, unpadded model by global name. Allocates nothing."""
    with torch.device("meta"):
        return {name: parameter.shape for name, parameter in named_parameters(Transformer(config, vocab_size))}


def normalize_weights(block: Block, config: ModelConfig) -> None:
    """Register weight or spectral normalization on the linear layers that the configuration names."""
    for normalization, placement in (
        (WeightNormalization, config.weight_norm),
        (SpectralNormalization, config.spectral_norm),
    ):
        for name, arguments in normalized_linears(config, placement or "none").items():
            linear = block.get_submodule(name)
            rows, columns = linear.weight.shape
            if normalization is WeightNormalization:
                added: nn.Module = WeightNormalization(rows, **arguments)
            else:
                added = SpectralNormalization(rows, columns, **arguments, has_gain=config.spectral_gain)
            parametrize.register_parametrization(linear, "weight", added, unsafe=True)


def normalized_linears(config: ModelConfig, placement: str) -> dict[str, dict[str, Any]]:
    """Return the linear layers that `placement` (say 'QK+FFN') normalizes, and which stacked matrices of each."""
    attention, _, ffn = placement.partition("+") if placement.startswith("Q") else ("", "", placement)
    linears: dict[str, dict[str, Any]] = {}
    if attention:
        count = {"QK": 2, "QKV": 3, "QKVO": 3}[attention]
        linears["attention.query_key_value"] = {"slots": 3, "normalized": count, "head_width": config.head_width}
    if attention == "QKVO":
        linears["attention.output"] = {}
    if ffn == "FFN":
        linears.update({"ffn.fused": {}} if config.fused_ffn else {"ffn.up": {}, "ffn.down": {}})
    return linears
