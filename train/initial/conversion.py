"""Maps the weights of one architecture to another's: exactly where a map exists, else the best linear one on data.

    change                      map
    a norm is removed           LN(x) = diag(g) C x / s(x) + b, where C subtracts the mean over features. Its s(x)
                                becomes the measured s, and W LN(x) becomes (W diag(g) C / s) x + W b
    an activation is removed    W_down act(W_up x + ..) becomes M x + c, fitted by least squares on the FFN's inputs
    the FFN is fused            W = M, or W_down W_up if the FFN was linear already: exact
    the FFN is kept in two      W_up stays, and W_down = M (W_up)^+, so that the product is M
    the FFN is scaled           alpha and beta start at their initial values, and W is multiplied by alpha: exact
    a temperature is added      t = 1: exact. If the norm goes too, queries and keys keep their size, and t = s^2
    a value's constant          W_v b adds W_o W_v b to every position: a bias of the output

Constants go into biases; `model.biases = 'all'` has a place for each. Without it they are dropped, which is reported.
The maps compose: several changes at once are the maps one after the other, each fitted on the source model. The fixed s
is that of arXiv 2409.13710, where a GPT-2 goes on without LayerNorms after fine-tuning.
"""

from collections.abc import Iterator
from dataclasses import dataclass, field

import torch
from torch import Tensor

from model.config import ModelConfig
from model.initialize import initial_temperature, initial_value
from model.transformer import global_shapes
from train.exchange.plain import without_mean
from train.initial.source import Source, Weights

SIZES = ("num_layers", "hidden_size", "num_attention_heads")
REPORTED = ("norm", "activation", "fused_ffn", "scaled_ffn", "temperature", "biases", "regularized", "final_norm",
            "tied_head", "positions")  # fmt: skip
MOST_PADDING = 128
"""Rows of a vocabulary that may be padding: sizes are rounded up to multiples of 128 at most."""
QKV, QUERY_BIAS, KEY_BIAS = (f"attention.{name}" for name in ("query_key_value.weight", "query_bias", "key_bias"))
OUTPUT, OUTPUT_BIAS = "attention.output.weight", "attention.output_bias"
TEMPERATURE = "attention.temperature_parameter"


@dataclass(frozen=True)
class LayerMeasure:
    """What a pass over data measured of one layer of the source.

    Attributes:
        attention_scale, ffn_scale: s of each norm, 1 over the mean of 1 / s(x) over tokens.
        ffn_matrix: M [D, D] of the best linear map from the FFN's input to its output, float64.
        ffn_constant: c [D] of that map.
    """

    attention_scale: float = 1.0
    ffn_scale: float = 1.0
    ffn_matrix: Tensor | None = None
    ffn_constant: Tensor | None = None


@dataclass(frozen=True)
class Converted:
    """A model's initial weights, made from another's.

    Attributes:
        weights: by global name, in the shapes of the target.
        changes: what differs between the architectures, one line each.
        anew: names of parameters of the target that have no source, without their layers.
        left_out: names of parameters of the source, or of constants, that have no place, without their layers.
    """

    weights: Weights = field(repr=False)
    changes: tuple[str, ...]
    anew: tuple[str, ...]
    left_out: tuple[str, ...]


def faults_between(source: Source, target: ModelConfig, vocab_size: int) -> list[str]:
    """Return why a source cannot become a target, one line each: the key, what was found and the remedy.

    Args:
        target: resolved.
        vocab_size: of the dataset, without padding.
    """
    here, faults = source.model, []
    for name in SIZES:
        if getattr(here, name) != getattr(target, name):
            found = getattr(here, name)
            faults.append(f"model.{name} is {found} there and {getattr(target, name)} here; set model.{name}={found}")
    if not here.fused_ffn and not target.fused_ffn and here.ffn_width != target.ffn_width:
        remedy = f"set model.ffn_hidden_size={here.ffn_width}"
        faults.append(f"model.ffn_hidden_size is {here.ffn_width} there and {target.ffn_width} here; {remedy}")
    if here.fused_ffn and not target.fused_ffn:
        faults.append(
            "model.fused_ffn is true there and false here, and one matrix is not two; set model.fused_ffn=true"
        )
    if here.seq_length < target.seq_length:
        remedy = f"set model.seq_length to at most {here.seq_length}"
        faults.append(f"model.seq_length is {here.seq_length} there and {target.seq_length} here; {remedy}")
    if not 0 <= source.vocab_size - vocab_size < MOST_PADDING:
        faults.append(
            f"the vocabulary has {source.vocab_size:,} tokens there, and the dataset's tokenizer has {vocab_size:,}; "
            "prepare the dataset with the tokenizer that the model was trained with"
        )
    if here.norm == "none" and target.norm != "none":
        faults.append(
            f"model.norm is 'none' there and {target.norm!r} here, and no map adds a norm; set model.norm=none"
        )
    normalized = {"weight_norm", "spectral_norm"}
    for name in ("spectral_gain", *sorted(normalized)):
        if getattr(here, name) != getattr(target, name):
            found = getattr(here, name)
            faults.append(f"model.{name} is {found!r} there and {getattr(target, name)!r} here; keep {found!r}")
    if any(getattr(here, name) != "none" for name in normalized) and (_folds(here, target) or _refits(here, target)):
        faults.append("a model with normalized weights keeps its norms and its FFN; set them as they are there")
    return faults


def needs_data(source: ModelConfig, target: ModelConfig) -> bool:
    """Return whether the conversion needs measurements: a norm or an activation is removed."""
    return _folds(source, target) or _loses_activation(source, target)


@torch.no_grad()
def convert(source: Source, target: ModelConfig, vocab_size: int, seed: int, measured: list[LayerMeasure]) -> Converted:
    """Return a model's initial weights.

    Args:
        source: without `faults_between`.
        target: resolved.
        vocab_size: of the dataset, without padding.
        seed: of the run, for alpha and beta.
        measured: of each layer; used only if `needs_data`.
    """
    here, left_out = source.model, set(source.left_out)
    made: Weights = {}
    for layer in range(here.num_layers):
        prefix = f"layers.{layer}."
        own = {name.removeprefix(prefix): w.double() for name, w in source.weights.items() if name.startswith(prefix)}
        own = _Layer(own, here, target, layer, measured[layer] if measured else LayerMeasure(), left_out).converted()
        made |= {prefix + name: tensor.float() for name, tensor in own.items()}
    made |= {name: tensor for name, tensor in source.weights.items() if not name.startswith("layers.")}
    if here.tied_head and not target.tied_head:
        made["head.weight"] = made["embedding.word.weight"]
    shapes = global_shapes(target, vocab_size)
    weights = {}
    for name, shape in shapes.items():
        if name in made:
            is_table = "embedding." in name or name == "head.weight"  # whose last rows may be left out
            weights[name] = made[name][: shape[0]] if is_table else made[name]
            assert weights[name].shape == shape, (name, weights[name].shape, shape)
        elif name.endswith((".ffn.alpha", ".ffn.beta")):
            weights[name] = initial_value(name, shape, target, seed)
    left_out |= {_kind(name) for name in made.keys() - shapes.keys()}
    changes = tuple(
        f"model.{name}: {getattr(here, name)} -> {getattr(target, name)}"
        for name in (*REPORTED, "seq_length")
        if getattr(here, name) != getattr(target, name)
    )
    anew = {_kind(name) for name in shapes.keys() - weights.keys()}
    return Converted(weights, changes, tuple(sorted(anew)), tuple(sorted(left_out)))


class _Layer:
    """The weights of one layer on their way from source to target, by name within the layer, in float64."""

    def __init__(
        self,
        own: Weights,
        here: ModelConfig,
        target: ModelConfig,
        layer: int,
        measured: LayerMeasure,
        left_out: set[str],
    ) -> None:
        self.own, self.here, self.target, self.layer = own, here, target, layer
        self.measured, self.left_out = measured, left_out

    def converted(self) -> Weights:
        self._temperature()
        if _refits(self.here, self.target):
            self._refit_ffn()
        self._rescale_ffn()
        if _folds(self.here, self.target):
            self._fold_attention_norm()
            self._fold_ffn_norm()
        self._drop_constants()
        return self.own

    def _temperature(self) -> None:
        """Give the temperature the target's shape, and turn it into the plain divisor for what follows."""
        self.t: Tensor | None = None
        wanted, heads = self.target.temperature, self.here.num_attention_heads
        stored = self.own.pop(TEMPERATURE, None)
        if wanted == "none":
            if stored is not None:
                self.left_out.add(TEMPERATURE)
            return
        t = torch.ones(heads, dtype=torch.float64)
        if stored is not None:
            t = stored if self.here.temperature_form == "raw" else self._start(self.here) * stored.exp()
        if wanted == "per_position":
            t = (t if t.dim() == 2 else t.unsqueeze(1).expand(heads, self.target.seq_length)).clone()
            t = t[:, : self.target.seq_length]
        elif t.dim() == 2:
            t = t.abs().log().mean(dim=1).exp()
        self._store(t)

    def _store(self, t: Tensor) -> None:
        self.t = t
        is_raw = self.target.temperature_form == "raw"
        self.own[TEMPERATURE] = t if is_raw else (t / self._start(self.target)).log()

    def _start(self, config: ModelConfig) -> float:
        return initial_temperature(f"layers.{self.layer}.{TEMPERATURE}", config)

    def _refit_ffn(self) -> None:
        """Replace the FFN by a linear one, in the target's form."""
        matrix, constant, own = self.measured.ffn_matrix, self.measured.ffn_constant, self.own
        up = own.pop("ffn.up.weight")
        up_bias, down = own.pop("ffn.up_bias", None), own.pop("ffn.down.weight")
        if matrix is None or constant is None or not _loses_activation(self.here, self.target):
            matrix = down @ up
            constant = matrix.new_zeros(len(down)) if up_bias is None else down @ up_bias
        elif self.here.scaled_ffn:  # alpha has divided what was measured
            matrix, constant = matrix * own["ffn.alpha"], constant * own["ffn.alpha"]
        self._add("ffn.bias", constant / own.get("ffn.alpha", 1.0))
        if self.target.fused_ffn:
            own["ffn.fused.weight"] = matrix
        else:
            own["ffn.up.weight"], own["ffn.down.weight"] = up, matrix @ torch.linalg.pinv(up)
            own["ffn.up_bias"] = up.new_zeros(len(up))  # its part of the map is in the FFN's bias

    def _rescale_ffn(self) -> None:
        """Scale the FFN's last matrix to alpha's initial value where the target gains an alpha, or by one it loses."""
        last = next(name for name in ("ffn.fused.weight", "ffn.down.weight") if name in self.own)
        if self.target.scaled_ffn and not self.here.scaled_ffn:
            self.own[last] = self.own[last] * self._alpha()
        elif self.here.scaled_ffn and not self.target.scaled_ffn:
            self.own[last] = self.own[last] / self.own.pop("ffn.alpha")

    def _fold_attention_norm(self) -> None:
        own, s = self.own, self.measured.attention_scale
        weight, constant = _folded(own[QKV], own.pop("attention_norm.weight"), own.pop("attention_norm.bias"))
        stacked_NSHD = weight.unflatten(0, (self.here.num_attention_heads, 3, -1))
        query_NH, key_NH, value_NH = constant.unflatten(0, (self.here.num_attention_heads, 3, -1)).unbind(1)
        own[QUERY_BIAS], own[KEY_BIAS] = own[QUERY_BIAS] + query_NH, own[KEY_BIAS] + key_NH
        self._add(OUTPUT_BIAS, own[OUTPUT] @ value_NH.flatten())
        if self.t is None:
            stacked_NSHD = stacked_NSHD / s
        else:  # queries and keys keep their size, and so their relative learning rate
            stacked_NSHD[:, 2] /= s
            own[QUERY_BIAS], own[KEY_BIAS] = own[QUERY_BIAS] * s, own[KEY_BIAS] * s
            self._store(self.t * s**2)
        own[QKV] = stacked_NSHD.flatten(0, 2)

    def _fold_ffn_norm(self) -> None:
        own = self.own
        first = "ffn.fused.weight" if "ffn.fused.weight" in own else "ffn.up.weight"
        weight, constant = _folded(own[first], own.pop("ffn_norm.weight"), own.pop("ffn_norm.bias"))
        own[first] = weight / self.measured.ffn_scale
        if first == "ffn.up.weight":
            self._add("ffn.up_bias", constant)
        else:
            self._add("ffn.bias", constant / self._alpha())

    def _alpha(self) -> Tensor:
        """Return the alpha that the converted layer has; 1 without one."""
        initial = initial_value(f"layers.{self.layer}.ffn.alpha", torch.Size([1]), self.target, 0).double()
        return self.own.get("ffn.alpha", initial) if self.target.scaled_ffn else torch.ones_like(initial)

    def _add(self, name: str, constant: Tensor) -> None:
        self.own[name] = self.own[name] + constant if name in self.own else constant

    def _drop_constants(self) -> None:
        """Remove biases that the target has no place for; those that are all zero are not worth a report."""
        if self.target.biases != "all":
            for name in (OUTPUT_BIAS, "ffn.bias", "ffn.up_bias"):
                bias = self.own.pop(name, None)
                if bias is not None and bias.any():
                    self.left_out.add(name)


def _folded(weight: Tensor, gain: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
    """Return W diag(g) C, where C = I - 1 1^T / D subtracts the mean, and W b."""
    return without_mean(weight * gain), weight @ bias


def _folds(source: ModelConfig, target: ModelConfig) -> bool:
    """Whether the norms within blocks are removed."""
    return source.norm != "none" and target.norm == "none"


def _loses_activation(source: ModelConfig, target: ModelConfig) -> bool:
    return source.activation != "identity" and target.activation == "identity"


def _refits(source: ModelConfig, target: ModelConfig) -> bool:
    """Whether the FFN gets other matrices."""
    return not source.fused_ffn and (bool(target.fused_ffn) or _loses_activation(source, target))


def _kind(name: str) -> str:
    """Return a parameter's name without its layer."""
    return name.split(".", 2)[2] if name.startswith("layers.") else name


def described(converted: Converted) -> Iterator[str]:
    """Yield what a user should know of a conversion, a clause each."""
    if converted.changes:
        yield "changed: " + ", ".join(converted.changes)
    if converted.anew:
        yield "initialized anew: " + ", ".join(converted.anew)
    if converted.left_out:
        yield "without a place here, and left out: " + ", ".join(converted.left_out)
