"""Test that the first step with a falling gate measures the scales of tapered norms over all ranks, once."""

import pytest
import torch
import torch.nn.functional as F

from model.taper import set_gate, taper_norms
from parallel.layout import parse_layout
from parallel.local_ranks import run_ranks
from tests.parallel.tiny import plain_model, tiny_config, training_with
from train.compare.layouts import apply_layout, global_batches, reference_layout
from train.compare.measurement import _micro_batches, tell_apart
from train.config import Config
from train.parts import add_optimizer, build_stage

COMPILED = "tp=1:acc=4"
LAYOUTS = ["tp=2:sp=1:dp=2", "pp=2:cp=2:acc=2", "dp=2:zero=3", pytest.param(COMPILED, marks=pytest.mark.slow)]
Scales = dict[str, float]


def _config() -> Config:
    return tiny_config(architecture="SM+TN", temperature="per_head", temperature_init=1.0)


def _fitted(config: Config) -> tuple[Scales, float]:
    """Fit each norm's scale by least squares over all tokens of the first batch, in one process and float64.

    Returns:
        The scales, and the cross-entropy in nats per token of the batch at half-open gates with these scales.
    """
    vocab_size, batches = global_batches(config, 1)
    model, rows_BT = plain_model(config, vocab_size), batches[0]
    scales: Scales = {}
    norms = {name: module for name, module in model.named_modules() if module in taper_norms(model)}
    for name, norm in norms.items():

        def fit(_: object, inputs: tuple[torch.Tensor], name: str = name) -> None:
            x = inputs[0]
            centered, normed = x - x.mean(-1, keepdim=True), F.layer_norm(x, x.shape[-1:])
            scales[name] = torch.linalg.lstsq(centered.reshape(-1, 1), normed.reshape(-1, 1)).solution.item()

        norm.register_forward_pre_hook(fit)
    set_gate(norms.values(), 1.0)
    with torch.no_grad():
        model(rows_BT[:, :-1].t())
        wanted = dict(scales)
        for name, norm in norms.items():
            norm.scale.fill_(wanted[name])
        set_gate(norms.values(), 0.5)
        loss = model(rows_BT[:, :-1].t(), rows_BT[:, 1:].t())[0].item() / rows_BT[:, 1:].numel()
    return wanted, loss


def _calibrated(config: Config, vocab_size: int, batch: torch.Tensor) -> tuple[list[Scales], list[float]]:
    """Return this rank's scales and losses after a step at each gate; only the second is to change the scales."""
    stage, groups = build_stage(config, vocab_size)
    tell_apart(stage, groups, vocab_size, config.training.seed)
    for norm in taper_norms(stage.transformer):
        norm.scale.zero_()  # as before training
    engine = add_optimizer(stage, groups, config)
    scales, losses = [], []
    for rate, gate in ((0.0, 1.0), (0.1, 0.5), (0.0, 0.25)):
        report = engine.train_step(_micro_batches(config, groups.grid, batch), rate, norm_gate=gate)[0]
        losses.append(report.wait().cross_entropy)
        named = engine.stage.transformer.named_buffers()
        scales.append({name.removesuffix(".scale"): buffer.item() for name, buffer in named})
    return scales, losses


@pytest.mark.parametrize("text", LAYOUTS)
def test_scales_are_fitted_to_the_whole_batch_of_one_step(text: str) -> None:
    config, layout = _config(), parse_layout(text)
    expected, loss = _fitted(config)
    applied = apply_layout(config, layout, reference_layout(config, [layout]))
    if text == COMPILED:
        applied = training_with(applied, compile="on")
    vocab_size, batches = global_batches(config, 1)
    ranks = run_ranks(_calibrated, layout.world_size, applied, vocab_size, batches[0])
    seen: Scales = {}
    for (before, found, after), losses in ranks:
        assert set(before.values()) == {0.0}
        assert after == found
        assert losses[1] == pytest.approx(loss, rel=1e-5)
        assert all(seen.get(name, scale) == scale for name, scale in found.items()), "ranks differ"
        seen |= found
    assert seen == pytest.approx(expected, rel=1e-5)
    assert len(set(seen.values())) == 2 * config.model.num_layers
