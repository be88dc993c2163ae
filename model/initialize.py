"""Draws initial weights that depend only on the seed and a parameter's global name, never on the layout.

Every parameter is drawn whole from its own generator, keyed by (seed, name), and then cut to the local shard. Two
layouts of one model therefore start from the same bits, and a stage never draws what it does not hold.

Without norms, blocks multiply the residual. At the start, the FFN of a block multiplies its mean square by 1 + D std^2
/ alpha^2, and attention by up to 1 + (D std^2)^2 once positions resemble each other. At the paper's 12 layers of width
768 that is a factor of 1.31 per block and 30 in all. At width 2560 it would be 2 to 4 per block, and attention would
collapse. One step of Adam then moves a block's output by about rate * D / alpha of its input, and this compounds over
blocks.

Beyond the paper's sizes, 'scaled' initialization therefore does three things:

- Beyond its width, it draws the blocks' matrices with std ~ 1/sqrt(D), which keeps D std^2.
- Beyond its depth, it divides what a block adds by L / 12. Alpha starts there; matrices that end a sub-block without an
  alpha start smaller.
- Beyond its width, it draws embeddings with std ~ 1/D. A tied head reads the input token back with a logit of about
  D std times its share of the residual, which would be 17 nats at width 2560.

The largest stable learning rate still falls about as 1 / (D sqrt(L)); see docs/study/stability.md.
"""

import hashlib
import math
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor

import torch
from torch import Tensor, nn

from model.config import ModelConfig
from model.normalized_weights import start_spectral_norms
from model.taper import share_gate, taper_norms

Cut = Callable[[str, Tensor], Tensor]
"""(global name, whole tensor) -> the part held here."""

PAPER_WIDTH, PAPER_DEPTH = 768, 12
THREADS = 8
"""Threads that draw parameters: one draws 0.1 billion values a second."""
TIED_HEAD_SOURCE = "embedding.word.weight"
"""The parameter that a tied head copies if its stage does not hold the embedding."""


def whole(name: str, tensor: Tensor) -> Tensor:
    """Keep all of a tensor: the cut of a model that is not sharded."""
    return tensor


def generator(seed: int, name: str) -> torch.Generator:
    """Return a CPU generator for one parameter, independent between names and seeds."""
    digest = hashlib.sha256(f"{seed}/{name}".encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "little") >> 1)


def named_parameters(model: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
    """Yield `model.named_parameters()` under this project's names: a reparametrized weight keeps its plain name."""
    for name, parameter in model.named_parameters():
        yield plain_name(name), parameter


def plain_name(name: str) -> str:
    """'ffn.up.parametrizations.weight.original' -> 'ffn.up.weight'; '...weight.0.gain' -> 'ffn.up.gain'."""
    return name.replace("parametrizations.weight.original", "weight").replace("parametrizations.weight.0.", "")


def initial_value(name: str, shape: torch.Size, config: ModelConfig, seed: int) -> Tensor:
    """Return the whole initial tensor of the parameter `name`, in float32."""
    kind = name.rsplit(".", 1)[-1]
    if kind == "gain":  # g = ||V|| so that W = V at the start
        weight_name = name.removesuffix("gain") + "weight"
        return initial_value(weight_name, torch.Size((shape[0], _columns(weight_name, config))), config, seed).norm(
            dim=1
        )
    if kind == "temperature_parameter":
        return torch.full(shape, 0.0 if config.temperature_form == "exp" else initial_temperature(name, config))
    if kind == "threshold":
        return torch.full(shape, config.threshold_init)
    if kind == "alpha":
        return torch.full(shape, depth_factor(config))
    if kind in ("beta", "gamma"):
        return torch.ones(shape)
    if kind.endswith("bias"):
        return torch.zeros(shape)
    if len(shape) == 1:  # a LayerNorm's weight
        return torch.ones(shape)
    value = torch.empty(shape).normal_(0.0, standard_deviation(name, config), generator=generator(seed, name))
    if name.endswith("query_key_value.weight"):
        value.view(-1, 3, config.head_width, shape[1])[:, :2] *= config.query_key_init_scale
    return value


def depth_factor(config: ModelConfig) -> float:
    """Return the factor by which a block adds less to the residual than one of the paper's 12 layers; 1 with norms."""
    scaled = config.initialization == "scaled" and config.norm == "none"
    return max(1.0, config.num_layers / PAPER_DEPTH) if scaled else 1.0


def standard_deviation(name: str, config: ModelConfig) -> float:
    """Return the standard deviation of the normal distribution that the matrix `name` is drawn from."""
    if config.initialization == "paper" or config.norm != "none":
        return config.init_std
    if not name.startswith("layers."):
        return config.init_std * min(1.0, PAPER_WIDTH / config.hidden_size) if config.tied_head else config.init_std
    deviation = config.init_std * math.sqrt(min(1.0, PAPER_WIDTH / config.hidden_size))
    ends_sub_block = name.endswith(("attention.output.weight", "ffn.down.weight", "ffn.fused.weight"))
    divided_by_alpha = config.scaled_ffn and ".ffn." in name
    return deviation / depth_factor(config) if ends_sub_block and not divided_by_alpha else deviation


def initial_temperature(name: str, config: ModelConfig) -> float:
    """Return the temperature that a layer starts at: a number of the configuration, or the calibrated one.

    A logit is q . k / (t sqrt(H)). Let s be the standard deviation of the matrices' elements, and m the mean square of
    the layer's input. The logit's variance is then (D s^2)^2 m^2 / t^2. A LayerNorm makes m = 1. Without norms, t = m
    gives logits of the same variance.

    The matrices are independent and have mean 0. So the mean square of a sum is the sum of the mean squares:

        m_0     = s_E^2 + s_P^2                       word and position embeddings (no s_P with rotary positions)
        m_(l+1) = m_l (1 + g / alpha^2)               the residual (beta = 1), and the FFN's gain g
        g       = D s^2                               fused FFN
                  D s_up^2 * F s_down^2               two matrices; half of it with ReLU, as E relu(u)^2 = E u^2 / 2

        t_l = m_l = (s_E^2 + s_P^2) * (1 + g / alpha^2)^l

    Attention is left out. Near a uniform start it averages about i positions that have little in common, and adds the
    share (D s^2)^2 / (i + 1) at position i. It grows as positions come to resemble each other, and is larger in short
    contexts and with ReLU, whose outputs share a mean: m_l exceeds t_l by up to 9% in the paper's network of 12 layers,
    by 38% at T = 32, and by 45% with ReLU. `query_key_init_scale` is left out too: it is there to scale the logits.

    Args:
        name: of a parameter of the layer, or of the layer: 'layers.3...'.
    """
    if config.temperature_init != "calibrated":
        return config.temperature_init
    if config.norm != "none":
        return 1.0
    width, ffn = config.hidden_size, "layers.0.ffn"

    def variance(weight: str) -> float:
        return standard_deviation(f"{weight}.weight", config) ** 2

    if config.fused_ffn:
        gain = width * variance(f"{ffn}.fused")
    else:
        gain = width * variance(f"{ffn}.up") * config.ffn_width * variance(f"{ffn}.down")
        gain /= 2 if config.activation == "relu" else 1
    alpha = depth_factor(config) if config.scaled_ffn else 1.0
    embedded = variance("embedding.word") + (variance("embedding.position") if config.positions == "learned" else 0.0)
    return embedded * (1 + gain / alpha**2) ** int(name.split(".")[1])


@torch.no_grad()
def initialize(
    model: nn.Module, config: ModelConfig, shapes: Mapping[str, torch.Size], seed: int, cut: Cut = whole
) -> None:
    """Fill every parameter and buffer of `model`, which may be a shard of the whole.

    Padding rows of the vocabulary are zero. The loss masks them, so they stay zero.

    Args:
        shapes: of every parameter of the whole, unpadded model by global name.
    """

    @torch.no_grad()  # which holds for one thread
    def fill(named: tuple[str, nn.Parameter]) -> None:
        name, parameter = named
        source = TIED_HEAD_SOURCE if name == "head.weight" and config.tied_head else name
        value = cut(name, initial_value(source, shapes[source], config, seed))
        parameter.zero_()
        parameter[tuple(slice(size) for size in value.shape)].copy_(value)

    with ThreadPoolExecutor(THREADS, thread_name_prefix="initial weights") as threads:
        list(threads.map(fill, named_parameters(model)))
    calibrate(model, config)
    start_spectral_norms(model)
    norms = taper_norms(model)
    for norm in norms:
        norm.scale.zero_()
    share_gate(norms, next(model.parameters()).device)


def calibrate(model: nn.Module, config: ModelConfig) -> None:
    """Tell every attention the temperature that its parameters are relative to, if that is calibrated.

    It is no parameter and in no checkpoint, so a model that is loaded needs it too.
    """
    if config.temperature_init == "calibrated":
        for name, module in model.named_modules():
            if name.endswith(".attention"):
                init = torch.tensor(initial_temperature(name, config), device=module.query_bias.device)  # type: ignore
                module.temperature_init = init


def _columns(weight_name: str, config: ModelConfig) -> int:
    return (
        (config.ffn_hidden_size or 4 * config.hidden_size)
        if weight_name.endswith("ffn.down.weight")
        else config.hidden_size
    )
