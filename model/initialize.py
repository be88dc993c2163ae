"""Initial weights that depend on the seed and a parameter's global name alone, never on how the model is laid out.

Every parameter is drawn whole from a generator of its own, keyed by (seed, name), and then cut to the shard at hand:
two layouts of one model start from the same numbers to the last bit, and a stage never draws what it does not hold.

Without norms the residual is multiplied, not added to: at the start a block's FFN multiplies its mean square by 1 + D
std^2 / alpha^2, and attention by up to 1 + (D std^2)^2 once positions resemble each other. At the paper's 12 layers
of width 768 that is 1.31 a block and 30 in all; at width 2560 it would be 2 to 4 a block, and attention collapses.
One step of Adam then moves a block's output by about rate * D / alpha of its input, and the blocks of a network
compound. So 'scaled' initialization draws the blocks' matrices with std ~ 1/sqrt(D) beyond the paper's width, which
keeps D std^2, and beyond its depth divides what a block adds by L / 12: alpha starts there, and matrices that end a
sub-block without an alpha start smaller. A tied head reads the input token back with a logit of about D std times its
share of the residual, 17 nats at width 2560: so embeddings start with std ~ 1/D beyond the paper's width. The largest
stable rate still falls about as 1 / (D sqrt(L)); see docs/study/stability.md.
"""

import hashlib
import math
from collections.abc import Callable, Iterator

import torch
from torch import Tensor, nn

from model.config import ModelConfig
from model.normalized_weights import update_spectral_norms
from model.transformer import Transformer

Cut = Callable[[str, Tensor], Tensor]
"""(global name, whole tensor) -> the part held here."""

PAPER_WIDTH, PAPER_DEPTH = 768, 12
POWER_ITERATIONS_AT_START = 30
TIED_HEAD_SOURCE = "embedding.word.weight"
"""The parameter that a tied head repeats where a stage holds the head without the embedding."""


def _whole(name: str, tensor: Tensor) -> Tensor:
    return tensor


def generator(seed: int, name: str) -> torch.Generator:
    """A CPU generator for one parameter, independent between names and seeds."""
    digest = hashlib.sha256(f"{seed}/{name}".encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "little") >> 1)


def global_shapes(config: ModelConfig, vocab_size: int) -> dict[str, torch.Size]:
    """The shape of every parameter of the whole, unpadded model by global name; allocates nothing."""
    with torch.device("meta"):
        return {name: parameter.shape for name, parameter in named_parameters(Transformer(config, vocab_size))}


def named_parameters(model: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
    """`model.named_parameters()` under the names this project uses: a reparametrized weight keeps its plain name."""
    for name, parameter in model.named_parameters():
        yield plain_name(name), parameter


def plain_name(name: str) -> str:
    """'ffn.up.parametrizations.weight.original' -> 'ffn.up.weight'; '...weight.0.gain' -> 'ffn.up.gain'."""
    return name.replace("parametrizations.weight.original", "weight").replace("parametrizations.weight.0.gain", "gain")


def initial_value(name: str, shape: torch.Size, config: ModelConfig, seed: int) -> Tensor:
    """The whole initial tensor of the parameter `name` in float32."""
    kind = name.rsplit(".", 1)[-1]
    if kind == "gain":  # g = ||V|| so that W = V at the start
        weight_name = name.removesuffix("gain") + "weight"
        return initial_value(weight_name, torch.Size((shape[0], _columns(weight_name, config))), config, seed).norm(
            dim=1
        )
    if kind == "temperature_parameter":
        return torch.full(shape, 0.0 if config.temperature_form == "exp" else config.temperature_init)
    if kind == "threshold":
        return torch.full(shape, config.threshold_init)
    if kind == "alpha":
        return torch.full(shape, depth_factor(config))
    if kind == "beta":
        return torch.ones(shape)
    if kind.endswith("bias"):
        return torch.zeros(shape)
    if len(shape) == 1:  # a LayerNorm's weight
        return torch.ones(shape)
    return torch.empty(shape).normal_(0.0, standard_deviation(name, config), generator=generator(seed, name))


def depth_factor(config: ModelConfig) -> float:
    """By how much less each block adds to the residual than one of the paper's 12 layers; 1 where norms bound it."""
    scaled = config.initialization == "scaled" and config.norm == "none"
    return max(1.0, config.num_layers / PAPER_DEPTH) if scaled else 1.0


def standard_deviation(name: str, config: ModelConfig) -> float:
    """Of the normal distribution that the matrix `name` is drawn from."""
    if config.initialization == "paper" or config.norm != "none":
        return config.init_std
    if not name.startswith("layers."):
        return config.init_std * min(1.0, PAPER_WIDTH / config.hidden_size) if config.tied_head else config.init_std
    deviation = config.init_std * math.sqrt(min(1.0, PAPER_WIDTH / config.hidden_size))
    ends_sub_block = name.endswith(("attention.output.weight", "ffn.down.weight", "ffn.fused.weight"))
    divided_by_alpha = config.scaled_ffn and ".ffn." in name
    return deviation / depth_factor(config) if ends_sub_block and not divided_by_alpha else deviation


@torch.no_grad()
def initialize(model: nn.Module, config: ModelConfig, vocab_size: int, seed: int, cut: Cut = _whole) -> None:
    """Fills every parameter and power-iteration vector of `model`, which may be a shard of the whole.

    Rows of a padded vocabulary beyond `vocab_size` are zero; they are masked in the loss and stay so.
    """
    shapes = global_shapes(config, vocab_size)
    for name, parameter in named_parameters(model):
        source = TIED_HEAD_SOURCE if name == "head.weight" and config.tied_head else name
        value = cut(name, initial_value(source, shapes[source], config, seed))
        parameter.zero_()
        parameter[tuple(slice(size) for size in value.shape)].copy_(value)
    for name, buffer in model.named_buffers():
        if name.endswith(".left"):  # u of a spectral norm: any start with a component along the first singular vector
            buffer.fill_(1.0)
    update_spectral_norms(model, POWER_ITERATIONS_AT_START)


def _columns(weight_name: str, config: ModelConfig) -> int:
    return (
        (config.ffn_hidden_size or 4 * config.hidden_size)
        if weight_name.endswith("ffn.down.weight")
        else config.hidden_size
    )
