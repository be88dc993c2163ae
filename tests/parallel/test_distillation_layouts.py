"""A step with a teacher under data parallelism and ZeRO: the gradients of plain autograd on whole logits in float64."""

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from model.config import ModelConfig
from model.initialize import named_parameters
from model.transformer import Transformer
from parallel.distillation import Distillation
from parallel.layout import parse_layout
from parallel.local_ranks import run_ranks
from tests.parallel.tiny import LIVELY, SIZES, VOCAB_SIZE, plain_model, tiny_config
from train.compare.layouts import apply_layout, global_batches, reference_layout
from train.compare.measurement import EngineStep, _local_gradients, _micro_batches, assemble

WEIGHT, TAU, HIDDEN_WEIGHT = 0.7, 2.0, 0.3
TEACHER = ModelConfig(**{**SIZES, **LIVELY, "architecture": "SM+LN+G", "num_attention_heads": 4}).resolved()
STUDENT: dict[str, Any] = {"architecture": "SM(t)+ScFuFFN", "num_layers": 4}


def teacher(dtype: torch.dtype) -> Transformer:
    model = Transformer(TEACHER, VOCAB_SIZE, padded_vocab_size=VOCAB_SIZE + 3, seed=9)
    return model.to(dtype).requires_grad_(False).eval()


def step_with_teacher(config: Any, vocab_size: int, batch_BT: Tensor) -> dict[str, Any]:
    step = EngineStep(config, vocab_size)
    step.stage.distillation = Distillation(teacher(torch.float32), WEIGHT, TAU, HIDDEN_WEIGHT)
    statistics = step.run(_micro_batches(config, step.groups.grid, batch_BT))
    assert statistics.sums["distillation_loss"] > 0
    return {"gradients": _local_gradients(step), "means": step.report.means, "loss": step.report.loss}


@pytest.mark.parametrize("layout", ["tp=1", "dp=2:zero=1", "dp=2:zero=3"])
def test_gradients_of_every_parameter(layout: str) -> None:
    whole, parsed = tiny_config(**STUDENT), parse_layout(layout)
    vocab_size, batches = global_batches(whole, 1)
    config = apply_layout(whole, parsed, reference_layout(whole, [parsed]))
    ranks = run_ranks(step_with_teacher, parsed.world_size, config, vocab_size, batches[0])
    found = assemble([rank["gradients"] for rank in ranks], vocab_size)

    model, tokens_TB, labels_TB = plain_model(whole, vocab_size), batches[0][:, :-1].t(), batches[0][:, 1:].t()
    outputs: dict[str, list[Tensor]] = {"student": [], "teacher": []}
    other = teacher(torch.float64)
    for key, each in (("student", model), ("teacher", other)):
        for block in each.layers.values():
            block.register_forward_hook(lambda module, inputs, output, key=key: outputs[key].append(output[0]))
    logits, _ = model(tokens_TB)
    cross_entropy = F.cross_entropy(logits.flatten(0, 1), labels_TB.flatten())
    log_q, log_p = (F.log_softmax(each.flatten(0, 1) / TAU, dim=-1) for each in (logits, other(tokens_TB)[0]))
    kl = TAU**2 * F.kl_div(log_q, log_p, reduction="batchmean", log_target=True)
    apart = [
        ((s - t).norm(dim=-1) / t.norm(dim=-1)).square().mean()
        for s, t in zip(outputs["student"], outputs["teacher"], strict=True)
    ]
    taught = WEIGHT * kl + HIDDEN_WEIGHT * torch.stack(apart).mean()
    (cross_entropy + taught).backward()

    means = ranks[0]["means"]
    assert means["ce_loss"] == pytest.approx(float(cross_entropy), rel=1e-5)
    assert means["distillation_loss"] == pytest.approx(float(taught), rel=1e-5) and float(taught) > 0.1
    assert ranks[0]["loss"] == pytest.approx(float(cross_entropy + taught), rel=1e-5)
    for name, parameter in named_parameters(model):
        assert parameter.grad is not None
        error = (found[name].double() - parameter.grad).norm()
        assert error <= 1e-5 * parameter.grad.norm() + 1e-9, name
