"""Runs a `Transformer` and the plain reference on the same random parameters and compares all that training uses."""

import dataclasses
import math
from dataclasses import dataclass

import torch
from torch import Tensor

from model.config import ModelConfig
from model.initialize import named_parameters
from model.normalized_weights import update_spectral_norms
from model.regularizer import RegularizerConfig, entropy_penalty
from model.taper import set_gate, taper_norms
from model.transformer import Transformer
from tests.model import reference
from tests.model.reference import Recipe, Sizes

SEQUENCES = 3
POWER_ITERATIONS = 5000
REGULARIZER = RegularizerConfig(coefficient=0.7, margin=0.15)


@dataclass
class Result:
    """What one of the two networks computed, batch first, in float64."""

    loss: Tensor
    cross_entropy: Tensor
    logits_BTV: Tensor
    entropy_LBNT: Tensor
    gradients: dict[str, Tensor]


def build(config: ModelConfig, sizes: Sizes, seed: int = 0) -> Transformer:
    """A float64 model of random parameters, none of them at a value (0, 1, all equal) that could hide a mistake."""
    config = dataclasses.replace(
        config,
        num_layers=sizes.layers,
        hidden_size=sizes.width,
        num_attention_heads=sizes.heads,
        seq_length=sizes.context,
        ffn_hidden_size=sizes.ffn_width,
    )
    assert not config.faults(), config.faults()
    model = Transformer(config.resolved(), sizes.vocabulary, padded_vocab_size=sizes.padded_vocabulary).double()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in named_parameters(model):
            parameter.copy_(random_value(name, parameter.shape, config, generator))
        for name, buffer in model.named_buffers():
            if name.endswith(".left"):
                buffer.fill_(1.0)
    update_spectral_norms(model, POWER_ITERATIONS)
    return model


def random_value(name: str, shape: torch.Size, config: ModelConfig, generator: torch.Generator) -> Tensor:
    noise = torch.randn(shape, generator=generator, dtype=torch.float64)
    kind = name.rsplit(".", 1)[-1]
    if kind == "temperature_parameter" and config.temperature_form == "raw":
        return torch.where(noise > -1.5, 0.5 + noise.abs(), -0.5 + noise)  # of either sign, as the paper leaves it
    if kind == "temperature_parameter":
        return 0.2 * noise - math.log(config.temperature_init)  # t about 1
    if kind == "threshold":
        return 0.5 + 0.2 * noise
    if kind in ("alpha", "beta", "gain", "gamma") or name.endswith("norm.weight"):
        return 1.0 + 0.15 * noise
    return noise * (0.25 if len(shape) == 2 else 0.2)


def random_batch(sizes: Sizes, tokens: int, seed: int = 1) -> tuple[Tensor, Tensor]:
    """Tokens and labels [B, T]."""
    generator = torch.Generator().manual_seed(seed)
    pair = torch.randint(sizes.vocabulary, (2, SEQUENCES, tokens), generator=generator)
    return pair[0], pair[1]


def run_model(model: Transformer, tokens_BT: Tensor, labels_BT: Tensor, regularizer: RegularizerConfig) -> Result:
    """Mean cross-entropy plus penalty, through the model's own functions."""
    total, entropies_BNT = model(tokens_BT.T, labels_BT.T)
    cross_entropy = loss = total / labels_BT.numel()
    if model.config.regularized:
        thresholds_N = [layer.attention.threshold for layer in model.layers.values()]
        penalty = entropy_penalty(entropies_BNT, thresholds_N, regularizer, model.config.seq_length)
        loss = cross_entropy + regularizer.coefficient * penalty
    model.zero_grad()
    loss.backward()
    gradients = {name: parameter.grad for name, parameter in named_parameters(model)}
    with torch.no_grad():
        logits_TBV, _ = model(tokens_BT.T)
    return Result(
        loss.detach(),
        cross_entropy.detach(),
        logits_TBV.transpose(0, 1),
        torch.stack(entropies_BNT).detach(),
        gradients,
    )


def run_reference(
    model: Transformer, recipe: Recipe, sizes: Sizes, tokens_BT: Tensor, labels_BT: Tensor, config: RegularizerConfig
) -> Result:
    """The same from the reference, on copies of the model's parameters."""
    leaves = {name: p.detach().clone().requires_grad_() for name, p in named_parameters(model)}
    output = reference.transformer(leaves, tokens_BT, recipe, sizes)
    cross_entropy = loss = reference.cross_entropy(output.logits_BTV, labels_BT)
    if recipe.regularized:
        loss = cross_entropy + config.coefficient * reference_penalty(leaves, output, sizes, labels_BT.numel(), config)
    loss.backward()
    return Result(
        loss.detach(),
        cross_entropy.detach(),
        output.logits_BTV.detach(),
        torch.stack(output.entropies_BNT).detach(),
        {name: torch.zeros_like(leaf) if leaf.grad is None else leaf.grad for name, leaf in leaves.items()},
    )


def reference_penalty(
    leaves: dict[str, Tensor], output: reference.Output, sizes: Sizes, queries: int, config: RegularizerConfig
) -> Tensor:
    """What coefficient multiplies: Algorithm 1 as it is; the published code's sum divided by its number of queries."""
    thresholds_N = [leaves[f"layers.{layer}.attention.threshold"] for layer in range(sizes.layers)]
    max_entropy = torch.tensor(sizes.context, dtype=torch.float64).log().item()
    if config.granularity == "per_head":
        return reference.algorithm_1(output.attentions_BNTT, thresholds_N, config.margin, max_entropy)
    return reference.published_penalty(output.attentions_BNTT, thresholds_N, config.margin, max_entropy) / queries


def assert_same(actual: Result, expected: Result) -> None:
    """Agreement to 1e-10 relative; what is zero by symmetry may differ by 1e-12 of the largest gradient."""
    for name in ("loss", "cross_entropy", "logits_BTV", "entropy_LBNT"):
        torch.testing.assert_close(
            getattr(actual, name),
            getattr(expected, name),
            rtol=1e-10,
            atol=1e-12,
            msg=lambda m, name=name: f"{name}: {m}",
        )
    assert actual.gradients.keys() == expected.gradients.keys()
    largest = max(float(gradient.abs().max()) for gradient in expected.gradients.values())
    for name, gradient in expected.gradients.items():
        assert actual.gradients[name] is not None, f"{name} received no gradient"
        torch.testing.assert_close(
            actual.gradients[name], gradient, rtol=1e-10, atol=1e-12 * largest, msg=lambda m, name=name: f"{name}: {m}"
        )


def compare(
    config: ModelConfig,
    recipe: Recipe,
    sizes: Sizes | None = None,
    *,
    regularizer: RegularizerConfig = REGULARIZER,
    tokens: int | None = None,
) -> Result:
    """Builds, runs and compares both; the reference's result for further looks."""
    sizes = sizes or Sizes()
    model = build(config, sizes)
    if recipe.taper is not None:
        gate, scale = recipe.taper
        norms = taper_norms(model)
        assert len(norms) == 2 * sizes.layers
        set_gate(norms, gate)
        for norm in norms:
            norm.scale.fill_(scale)
    shapes = {name: tuple(parameter.shape) for name, parameter in named_parameters(model)}
    assert shapes == reference.expected_shapes(recipe, sizes)
    tokens_BT, labels_BT = random_batch(sizes, tokens or sizes.context)
    expected = run_reference(model, recipe, sizes, tokens_BT, labels_BT, regularizer)
    assert_same(run_model(model, tokens_BT, labels_BT, regularizer), expected)
    return expected
