"""The method in plain PyTorch, written down once more from the paper (arXiv 2501.03489): what `model/` is held against.

Functional and slow on purpose. Nothing of `model/` is imported; the two share only the names of parameters, so that one
dictionary of tensors feeds both. Attention matrices are materialized a row and a head at a time, and causality is the
length of a row rather than a mask.

Tensor names carry their shape, batch first:
    B sequences    T tokens    D model width    N heads    H head width    F FFN width    V vocabulary
"""

import itertools
import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

Parameters = Mapping[str, Tensor]


@dataclass(frozen=True)
class Recipe:
    """The ingredients of a network, in the words of the paper's tables."""

    layer_norm: bool = False
    taper: tuple[float, float] | None = None
    """Gate and scale of norms that taper."""
    activation: str = "identity"
    fused: bool = False
    scaled: bool = False
    temperature: str = "none"
    regularized: bool = False
    raw_temperature: bool = False
    temperature_init: float = 0.01
    weight_normalized: str = ""
    spectrally_normalized: str = ""
    spectral_gain: bool = False
    final_norm: bool = True
    tied: bool = True
    rotary: bool = False
    all_biases: bool = False


PLACEMENTS = ("QK", "FFN", "QK+FFN", "QKV+FFN", "QKVO+FFN")

RECIPES = {
    "SM+LN+G": Recipe(layer_norm=True, activation="gelu"),
    "SM+LN+R": Recipe(layer_norm=True, activation="relu"),
    "SM+LN": Recipe(layer_norm=True),
    "SM+TN": Recipe(layer_norm=True, taper=(0.625, 1.7)),
    "SM+G": Recipe(activation="gelu"),
    "SM+R": Recipe(activation="relu"),
    "SM": Recipe(),
    "SM+WN": Recipe(weight_normalized="FFN"),
    "SM+SN": Recipe(spectrally_normalized="FFN"),
    "SM+ScFFN": Recipe(scaled=True),
    "SM+ScFuFFN": Recipe(scaled=True, fused=True),
    "SM(t)+ScFuFFN": Recipe(scaled=True, fused=True, temperature="per_position"),
    "EReg(SM(t)+ScFuFFN)": Recipe(scaled=True, fused=True, temperature="per_position", regularized=True),
    "EReg(SM(t)+R)": Recipe(activation="relu", temperature="per_head", regularized=True),
}


@dataclass(frozen=True)
class Sizes:
    """Sizes of a test network; `context` is the T that positions and temperatures are made for."""

    layers: int = 3
    width: int = 16
    heads: int = 4
    context: int = 12
    ffn_width: int = 64
    vocabulary: int = 29
    padded_vocabulary: int = 29

    @property
    def head_width(self) -> int:
        return self.width // self.heads


def expected_shapes(recipe: Recipe, sizes: Sizes) -> dict[str, tuple[int, ...]]:
    """Name and shape of every parameter that the recipe has, and of no other."""
    width = sizes.width
    shapes: dict[str, tuple[int, ...]] = {"embedding.word.weight": (sizes.padded_vocabulary, width)}
    if not recipe.rotary:
        shapes["embedding.position.weight"] = (sizes.context, width)
    for layer in range(sizes.layers):
        shapes |= {f"layers.{layer}.{name}": shape for name, shape in _layer_shapes(recipe, sizes).items()}
    if recipe.final_norm:
        shapes |= {"head.norm.weight": (width,), "head.norm.bias": (width,)}
    if not recipe.tied:
        shapes["head.weight"] = (sizes.padded_vocabulary, width)
    return shapes


def _layer_shapes(recipe: Recipe, sizes: Sizes) -> dict[str, tuple[int, ...]]:
    width, heads = sizes.width, sizes.heads
    shapes: dict[str, tuple[int, ...]] = {
        "attention.query_key_value.weight": (3 * width, width),
        "attention.query_bias": (heads, sizes.head_width),
        "attention.key_bias": (heads, sizes.head_width),
        "attention.output.weight": (width, width),
    }
    if recipe.temperature == "per_head":
        shapes["attention.temperature_parameter"] = (heads,)
    if recipe.temperature == "per_position":
        shapes["attention.temperature_parameter"] = (heads, sizes.context)
    if recipe.regularized:
        shapes["attention.threshold"] = (heads,)
    if recipe.all_biases:
        shapes |= {"attention.output_bias": (width,), "ffn.bias": (width,)}
        shapes |= {} if recipe.fused else {"ffn.up_bias": (sizes.ffn_width,)}
    if recipe.layer_norm:
        for norm in ("attention_norm", "ffn_norm"):
            shapes |= {f"{norm}.weight": (width,), f"{norm}.bias": (width,)}
    if recipe.fused:
        shapes["ffn.fused.weight"] = (width, width)
    else:
        shapes |= {"ffn.up.weight": (sizes.ffn_width, width), "ffn.down.weight": (width, sizes.ffn_width)}
    if recipe.scaled:
        shapes |= {"ffn.alpha": (1,), "ffn.beta": (1,)}
    if recipe.spectral_gain:
        letters = recipe.spectrally_normalized.removesuffix("FFN").rstrip("+")
        for name in _normalized(recipe.spectrally_normalized, recipe.fused):
            shapes[f"{name}.gamma"] = (len(letters.rstrip("O")) if name.endswith("query_key_value") else 1,)
    gains = [f"{name}.gain" for name in _normalized(recipe.weight_normalized, recipe.fused)]
    return shapes | {gain: shapes[gain.replace("gain", "weight")][:1] for gain in gains}


def _normalized(placement: str, fused: bool) -> list[str]:
    """The stored matrices of a layer that a placement such as 'QK+FFN' touches."""
    letters = placement.removesuffix("FFN").rstrip("+")
    touched = ["attention.query_key_value"] if letters else []
    if "O" in letters:
        touched.append("attention.output")
    if placement.endswith("FFN"):
        touched += ["ffn.fused"] if fused else ["ffn.up", "ffn.down"]
    return touched


@dataclass
class Output:
    """Logits [B, T, V] and each layer's attention matrices [B, N, T, T]."""

    logits_BTV: Tensor
    attentions_BNTT: list[Tensor]

    @property
    def entropies_BNT(self) -> list[Tensor]:
        return [row_entropies(a_BNTT) for a_BNTT in self.attentions_BNTT]


def transformer(parameters: Parameters, tokens_BT: Tensor, recipe: Recipe, sizes: Sizes) -> Output:
    """The whole network (paper Eq. 1-4, 8)."""
    x_BTD = torch.stack([parameters["embedding.word.weight"][row] for row in tokens_BT])
    if not recipe.rotary:
        x_BTD = x_BTD + parameters["embedding.position.weight"][: tokens_BT.shape[1]]
    attentions_BNTT = []
    for layer in range(sizes.layers):
        own = _under(parameters, f"layers.{layer}.")
        x_BTD, a_BNTT = _block(own, x_BTD, recipe, sizes)
        attentions_BNTT.append(a_BNTT)
    if recipe.final_norm:
        x_BTD = layer_norm(x_BTD, parameters["head.norm.weight"], parameters["head.norm.bias"])
    head_VD = parameters["embedding.word.weight" if recipe.tied else "head.weight"][: sizes.vocabulary]
    return Output(x_BTD @ head_VD.T, attentions_BNTT)


def _under(parameters: Parameters, prefix: str) -> dict[str, Tensor]:
    return {name.removeprefix(prefix): value for name, value in parameters.items() if name.startswith(prefix)}


def _block(own: Parameters, x_BTD: Tensor, recipe: Recipe, sizes: Sizes) -> tuple[Tensor, Tensor]:
    normed_BTD = x_BTD
    if recipe.layer_norm:
        normed_BTD = layer_norm(x_BTD, own["attention_norm.weight"], own["attention_norm.bias"], recipe.taper)
    attended_BTD, a_BNTT = _attention(own, normed_BTD, recipe, sizes)
    x_BTD = x_BTD + attended_BTD + (own["attention.output_bias"] if recipe.all_biases else 0)
    normed_BTD = x_BTD
    if recipe.layer_norm:
        normed_BTD = layer_norm(x_BTD, own["ffn_norm.weight"], own["ffn_norm.bias"], recipe.taper)
    ffn_BTD = _feed_forward(own, normed_BTD, recipe)
    bias_D = own["ffn.bias"] if recipe.all_biases else 0
    if recipe.scaled:
        return own["ffn.beta"] * x_BTD + (1 / own["ffn.alpha"]) * ffn_BTD + bias_D, a_BNTT
    return x_BTD + ffn_BTD + bias_D, a_BNTT


def _attention(own: Parameters, x_BTD: Tensor, recipe: Recipe, sizes: Sizes) -> tuple[Tensor, Tensor]:
    query_ND_H, key_ND_H, value_ND_H = _projections(own, recipe, sizes)
    outputs, attentions = [], []
    for head in range(sizes.heads):
        q_BTH = x_BTD @ query_ND_H[head] + own["attention.query_bias"][head]
        k_BTH = x_BTD @ key_ND_H[head] + own["attention.key_bias"][head]
        if recipe.rotary:
            q_BTH, k_BTH = rotary(q_BTH), rotary(k_BTH)
        a_BTT = attention_matrix(q_BTH, k_BTH, _temperature(own, recipe, head, x_BTD.shape[1]))
        attentions.append(a_BTT)
        outputs.append(a_BTT @ (x_BTD @ value_ND_H[head]))
    out_DD = own["attention.output.weight"]
    if "O" in recipe.weight_normalized:
        out_DD = weight_normalized(out_DD, own["attention.output.gain"])
    if "O" in recipe.spectrally_normalized:
        out_DD = own.get("attention.output.gamma", 1) * spectrally_normalized(out_DD)
    return torch.cat(outputs, dim=-1) @ out_DD.T, torch.stack(attentions, dim=1)


def _projections(own: Parameters, recipe: Recipe, sizes: Sizes) -> list[list[Tensor]]:
    """For query, key and value: each head's matrix [D, H], normalized where the placement says so."""
    stacked = own["attention.query_key_value.weight"].unflatten(0, (sizes.heads, 3, sizes.head_width))
    projections = []
    for slot, letter in enumerate("QKV"):
        weight_DD = torch.cat([stacked[head, slot] for head in range(sizes.heads)])
        if letter in recipe.weight_normalized:
            gains = own["attention.query_key_value.gain"].unflatten(0, (sizes.heads, 3, sizes.head_width))
            weight_DD = weight_normalized(weight_DD, torch.cat([gains[head, slot] for head in range(sizes.heads)]))
        if letter in recipe.spectrally_normalized:
            weight_DD = spectrally_normalized(weight_DD)
            if recipe.spectral_gain:
                weight_DD = own["attention.query_key_value.gamma"][slot] * weight_DD
        projections.append([rows_HD.T for rows_HD in weight_DD.split(sizes.head_width)])
    return projections


def _temperature(own: Parameters, recipe: Recipe, head: int, tokens: int) -> list[Tensor | float]:
    """t of every query position of one head."""
    if recipe.temperature == "none":
        return [1.0] * tokens
    stored = own["attention.temperature_parameter"][head]
    t = stored if recipe.raw_temperature else recipe.temperature_init * stored.exp()
    return [t if recipe.temperature == "per_head" else t[position] for position in range(tokens)]


def attention_matrix(q_BTH: Tensor, k_BTH: Tensor, temperature: list[Tensor | float]) -> Tensor:
    """a_ij = softmax over j <= i of q_i . k_j / (t_i sqrt(H)), [B, T, T]; each row as long as it sees, then zeros."""
    tokens, width = q_BTH.shape[1:]
    rows = []
    for i in range(tokens):
        scores = (k_BTH[:, : i + 1] * q_BTH[:, i : i + 1]).sum(-1) / (temperature[i] * math.sqrt(width))
        weights = (scores - scores.amax(-1, keepdim=True).detach()).exp()
        row = weights / weights.sum(-1, keepdim=True)
        rows.append(torch.cat([row, row.new_zeros(row.shape[0], tokens - i - 1)], dim=-1))
    return torch.stack(rows, dim=1)


def row_entropies(a_BNTT: Tensor) -> Tensor:
    """-sum_j a_ij ln a_ij in nats, [B, N, T]; entries above the diagonal are no terms of the sum."""
    rows = []
    for i in range(a_BNTT.shape[-1]):
        visible = a_BNTT[:, :, i, : i + 1]
        rows.append(-(visible * visible.log()).sum(-1))
    return torch.stack(rows, dim=-1)


def _feed_forward(own: Parameters, x_BTD: Tensor, recipe: Recipe) -> Tensor:
    def weight(name: str) -> Tensor:
        value = own[f"{name}.weight"]
        if recipe.weight_normalized.endswith("FFN"):
            value = weight_normalized(value, own[f"{name}.gain"])
        if recipe.spectrally_normalized.endswith("FFN"):
            value = own.get(f"{name}.gamma", 1) * spectrally_normalized(value)
        return value

    if recipe.fused:
        return x_BTD @ weight("ffn.fused").T
    hidden_BTF = x_BTD @ weight("ffn.up").T + (own["ffn.up_bias"] if recipe.all_biases else 0)
    return activation(hidden_BTF, recipe.activation) @ weight("ffn.down").T


def activation(x: Tensor, name: str) -> Tensor:
    if name == "gelu":
        return x * (1 + torch.erf(x / math.sqrt(2))) / 2
    if name == "gelu_tanh":
        return x * (1 + torch.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3))) / 2
    return x * (x > 0) if name == "relu" else x


def layer_norm(x: Tensor, gain: Tensor, bias: Tensor, taper: tuple[float, float] | None = None) -> Tensor:
    """With (gate, scale) the sum of gate parts of the norm and 1 - gate parts of a matrix that acts on each token."""
    centred = x - x.mean(-1, keepdim=True)
    normed = centred / (centred.pow(2).mean(-1, keepdim=True) + 1e-5).sqrt() * gain + bias
    if taper is None:
        return normed
    (gate, scale), size = taper, x.shape[-1]
    matrix = torch.diag(scale * gain) @ (torch.eye(size, dtype=x.dtype) - 1 / size)
    return gate * normed + (1 - gate) * (x @ matrix.T + bias)


def weight_normalized(weight: Tensor, gain: Tensor) -> Tensor:
    """g V / ||V||, one norm for each output row."""
    return torch.diag(gain / torch.linalg.vector_norm(weight, dim=1)) @ weight


def spectrally_normalized(weight: Tensor) -> Tensor:
    return weight / torch.linalg.svdvals(weight)[0]


def rotary(x_BTH: Tensor) -> Tensor:
    """Turns the complex number x_h + i x_(h + H/2) of position t by the angle t / 10000^(2h / H)."""
    tokens, width = x_BTH.shape[1:]
    turned = torch.complex(x_BTH[..., : width // 2], x_BTH[..., width // 2 :])
    angles = torch.tensor(
        [[t / 10_000 ** (2 * h / width) for h in range(width // 2)] for t in range(tokens)], dtype=torch.float64
    )
    turned = turned * torch.exp(1j * angles.to(turned.dtype))
    return torch.cat([turned.real, turned.imag], dim=-1)


def cross_entropy(logits_BTV: Tensor, labels_BT: Tensor) -> Tensor:
    """Mean over all tokens of -ln softmax(logits)[label], in nats."""
    terms = []
    for logits_V, label in zip(logits_BTV.flatten(0, 1), labels_BT.flatten(), strict=True):
        terms.append(logits_V.exp().sum().log() - logits_V[label])
    return torch.stack(terms).mean()


def published_penalty(
    attentions_BNTT: list[Tensor], thresholds_N: list[Tensor], margin: float, max_entropy_nats: float
) -> Tensor:
    """The published code's penalty, before its lambda: squared a query, averaged over heads and layers, else summed.

    Its lambda therefore grows with the micro-batch: lambda times this equals lambda * B * T times a mean over queries.
    """
    layers = []
    for a_BNTT, threshold_N in zip(attentions_BNTT, thresholds_N, strict=True):
        delta_BNT = row_entropies(a_BNTT) - (threshold_N * max_entropy_nats)[:, None]
        outside = (delta_BNT > margin * max_entropy_nats) | (delta_BNT < -margin * max_entropy_nats)
        layers.append((outside * delta_BNT**2).mean(dim=1))
    return (sum(layers) / len(layers)).sum()


def algorithm_1(
    attentions_BNTT: list[Tensor], thresholds_N: list[Tensor], margin: float, max_entropy_nats: float
) -> Tensor:
    """Algorithm 1 of the paper, before its lambda: one delta for each layer and head."""
    total = torch.zeros((), dtype=torch.float64)
    for a_BNTT, threshold_N in zip(attentions_BNTT, thresholds_N, strict=True):
        in_layer = torch.zeros((), dtype=torch.float64)
        for head in range(a_BNTT.shape[1]):
            entropy = row_entropies(a_BNTT)[:, head].mean()
            delta = entropy - threshold_N[head] * max_entropy_nats
            if abs(delta) > margin * max_entropy_nats:
                in_layer = in_layer + delta**2
        total = total + in_layer / a_BNTT.shape[1]
    return total / len(attentions_BNTT)


def penalty_by_rows(
    entropies_BNT: list[Tensor],
    thresholds_N: list[Tensor],
    margin: float,
    shape: str,
    target: str,
    starts_BT: Tensor | None,
) -> Tensor:
    """Mean over layers, sequences, heads and rows of the penalty's variants, a row at a time."""
    terms = []
    for entropy_BNT, threshold_N in zip(entropies_BNT, thresholds_N, strict=True):
        sequences, heads, tokens = entropy_BNT.shape
        for b, n, i in itertools.product(range(sequences), range(heads), range(tokens)):
            seen = tokens
            if target == "causal":
                seen = i + 1 - (0 if starts_BT is None else int(starts_BT[b, i]))
            above = entropy_BNT[b, n, i] - threshold_N[n] * math.log(seen)
            free = margin * math.log(seen)
            if -free <= above <= free or (shape == "floor" and above > 0):
                terms.append(0 * above)
            elif shape == "square":
                terms.append(above**2)
            else:
                terms.append((above - free) ** 2 if above > 0 else (above + free) ** 2)
    return torch.stack(terms).mean()
