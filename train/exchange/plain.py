"""Resolve the parametrizations of training: the same network as plain numbers.

Training holds a temperature as a logarithm, a normalized weight as direction and gain, an FFN as W, alpha and beta.
`PlainWeights` reads each parameter when it is asked for, so a large model needs the memory of one matrix. Its names are
those of model/transformer.py, with these differences:

    layers.0.attention.temperature   [N] or [N, T]   what the logits are divided by
    layers.0.ffn.matrix.weight       [D, D]          beta I + W / alpha, if the FFN and its residual are one matrix
    layers.0.ffn.fused.weight        [D, D]          W / alpha, if a norm stands before it
    layers.0.ffn.down.weight         [D, F]          W_down / alpha
    layers.0.ffn.beta                [1]             1 where the residual is not scaled

A tapered norm whose gate has closed is y = s w (x - mean(x)) + b. It becomes part of the matrices that read y:

    W y + c = W diag(s w) C x + (W b + c),  where C subtracts the mean

So the model then has no norms within blocks, and all biases.
"""

import dataclasses
from collections.abc import Callable, Container
from typing import Literal

import torch
from torch import Tensor

from model.config import ModelConfig
from model.initialize import initial_temperature
from model.normalized_weights import ITERATIONS_AT_START, SpectralNormalization, WeightNormalization
from model.transformer import normalized_linears, scaled_matrix

FfnKind = Literal["none", "matrix", "fused", "two matrices"]
"""What follows a layer's attention, in the words of train/exchange/modeling.py."""
Read = Callable[[str], Tensor]
"""Returns the tensor of that name."""


class PlainWeights:
    """Reads the plain parameters of a model.

    Args:
        model: resolved. If its norms taper, they have become fixed affine maps.
        read: returns a parameter of training by its global name, a scale of a tapered norm by "buffer.NAME", or a
            buffer of one process by "buffer.tp0of1.NAME".
        saved: names of the buffers that `read` has.

    Attributes:
        model: the plain one, which has no tapered norms.
        temperature: "none", "per_head" or "per_position".
        is_tied: whether the head is the word embedding.
        ffn_kinds: what follows the attention of each layer.
    """

    def __init__(self, model: ModelConfig, read: Read, saved: Container[str] = ()) -> None:
        self._tapers, self._has_biases = model.norm == "taper", model.biases == "all"
        self.model = dataclasses.replace(model, norm="none", biases="all") if self._tapers else model
        self._saved, self._read = saved, read
        self.temperature, self.is_tied = model.temperature or "none", model.tied_head
        kind: FfnKind = "matrix" if model.ffn_holds_residual else "fused" if model.fused_ffn else "two matrices"
        self.ffn_kinds = [kind] * model.num_layers
        self._placement = (model.weight_norm if model.weight_norm != "none" else model.spectral_norm) or "none"

    def read(self, name: str) -> Tensor:
        """Return one plain parameter."""
        return self._without_norm(name) if self._tapers and name.startswith("layers.") else self._resolved(name)

    def _without_norm(self, name: str) -> Tensor:
        """Return a parameter of a layer whose norms are part of the matrices that read them."""
        _, layer, kind = name.split(".", 2)
        here = f"layers.{layer}"
        if kind in ("attention.query_key_value.weight", "ffn.up.weight", "ffn.fused.weight"):
            norm = f"{here}.attention_norm" if kind.startswith("attention") else f"{here}.ffn_norm"
            weight = self._resolved(name)
            gain = self._read(f"buffer.{norm}.scale").to(weight) * self._read(f"{norm}.weight")
            return without_mean(weight * gain)
        if not kind.endswith("bias"):
            return self._resolved(name)
        own = self._read(name) if self._has_biases or kind in ("attention.query_bias", "attention.key_bias") else None
        if kind.startswith("attention."):
            stacked = self._resolved(f"{here}.attention.query_key_value.weight")
            constant = stacked @ self._read(f"{here}.attention_norm.bias")
            query, key, value = constant.unflatten(0, (self.model.num_attention_heads, 3, -1)).unbind(1)
            if kind == "attention.output_bias":
                added = self._resolved(f"{here}.attention.output.weight") @ value.flatten()
            else:
                added = query if kind == "attention.query_bias" else key
        elif kind == "ffn.bias" and not self.model.fused_ffn:
            added = torch.zeros_like(self._read(f"{here}.ffn_norm.bias"))
        else:
            first = "fused" if self.model.fused_ffn else "up"
            added = self._resolved(f"{here}.ffn.{first}.weight") @ self._read(f"{here}.ffn_norm.bias")
        return added if own is None else own + added

    def _resolved(self, name: str) -> Tensor:
        layer, _, kind = name.partition(".attention.") if ".attention." in name else name.partition(".ffn.")
        if kind == "temperature":
            return self._temperature(layer)
        if kind == "beta":
            return self._scale(layer, "beta", otherwise=1.0)
        if kind == "matrix.weight":
            beta = self._scale(layer, "beta", otherwise=1.0)
            return scaled_matrix(self._weight(f"{layer}.ffn.fused"), self._scale(layer, "alpha"), beta)
        if kind in ("fused.weight", "down.weight"):
            return scaled_matrix(self._weight(name.removesuffix(".weight")), self._scale(layer, "alpha"), None)
        return self._weight(name.removesuffix(".weight")) if kind.endswith(".weight") else self._read(name)

    def ffn_product(self, layer: int) -> Tensor:
        """Return a linear FFN with its residual as one matrix [D, D] in float64."""
        here = f"layers.{layer}.ffn"
        if self.model.fused_ffn:
            product = self.read(f"{here}.fused.weight").double()
        else:
            product = self.read(f"{here}.down.weight").double() @ self.read(f"{here}.up.weight").double()
        return product + self.read(f"{here}.beta").double() * torch.eye(len(product), dtype=torch.float64)

    def ffn_constant(self, layer: int) -> Tensor:
        """Return what a linear FFN adds to every position, [D] in float64, of a model with all biases."""
        here = f"layers.{layer}.ffn"
        bias = self.read(f"{here}.bias").double()
        if self.model.fused_ffn:
            return bias
        return bias + self.read(f"{here}.down.weight").double() @ self.read(f"{here}.up_bias").double()

    def _scale(self, layer: str, name: str, otherwise: float = 1.0) -> Tensor:
        return self._read(f"{layer}.ffn.{name}") if self.model.scaled_ffn else torch.full((1,), otherwise)

    def _temperature(self, layer: str) -> Tensor:
        parameter = self._read(f"{layer}.attention.temperature_parameter")
        if self.model.temperature_form == "raw":
            return parameter
        return initial_temperature(f"{layer}.attention", self.model) * parameter.exp()

    def _weight(self, linear: str) -> Tensor:
        """Return the weight of a linear layer, normalized if it is a normalized one."""
        weight = self._read(f"{linear}.weight")
        within = linear.split(".", 2)[-1]  # 'layers.3.ffn.up' -> 'ffn.up'
        arguments = normalized_linears(self.model, self._placement).get(within)
        if arguments is None:
            return weight
        rows, columns = weight.shape
        if self.model.weight_norm != "none":
            by_row = WeightNormalization(rows, **arguments)
            by_row.gain.data.copy_(self._read(f"{linear}.gain"))
            return by_row(weight).detach()
        spectral = SpectralNormalization(rows, columns, **arguments, has_gain=self.model.spectral_gain)
        if spectral.gamma is not None:
            spectral.gamma.data.copy_(self._read(f"{linear}.gamma"))
        buffers = {side: f"buffer.tp0of1.{linear}.parametrizations.weight.0.{side}" for side in ("left", "right")}
        if all(name in self._saved for name in buffers.values()):
            spectral.left.copy_(self._read(buffers["left"]))
            spectral.right.copy_(self._read(buffers["right"]))
        else:  # another tensor-parallel size saved them
            spectral.left.fill_(1.0)
            spectral.update(weight, ITERATIONS_AT_START)
        return spectral(weight).detach()


def without_mean(weight: Tensor) -> Tensor:
    """Return W C, where C = I - 1 1^T / D subtracts the mean over features: [rows, D] -> [rows, D]."""
    return weight - weight.mean(dim=1, keepdim=True)
