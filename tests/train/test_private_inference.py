"""The cost model against the published measurements, and against counting by hand."""

import dataclasses

import numpy as np
import pytest

from model.config import ModelConfig
from train import private_inference
from train.paper import MEASUREMENTS
from train.private_inference import calibrate, leave_one_out, operation_counts, private_inference_cost

VOCAB_SIZE = 50_000


def model(architecture: str, **sizes: int) -> ModelConfig:
    return ModelConfig(architecture=architecture, **sizes).resolved()


def test_every_measurement_is_predicted_from_the_others() -> None:
    errors = np.abs(leave_one_out())
    assert len(errors) == 16
    assert errors[:, 0].mean() < 0.005 and errors[:, 0].max() < 0.01, "communication"
    assert errors[:, 1].mean() < 0.03 and errors[:, 1].max() < 0.07, "latency"


def test_costs_known_beforehand_are_found_again() -> None:
    known = np.array([2.0, 0.3, 4.0, 0.1, 0.2, 0.05])
    made = [
        dataclasses.replace(
            item,
            communication_gb=float(private_inference._counts(item) @ known),
            latency_min=float(private_inference._counts(item) @ known[::-1]),
        )
        for item in MEASUREMENTS
    ]
    gigabytes, minutes = calibrate(made)
    assert gigabytes == pytest.approx(known, rel=1e-6)
    assert minutes == pytest.approx(known[::-1], rel=1e-6)


def test_the_published_savings_follow() -> None:
    """Table 3: 3.94 times less communication and 1.72 times less time than SM+LN+G."""
    baseline = private_inference_cost(model("SM+LN+G"), VOCAB_SIZE)
    ereg = private_inference_cost(model("EReg(SM(t)+ScFuFFN)"), VOCAB_SIZE)
    assert baseline.communication_gb / ereg.communication_gb == pytest.approx(3.94, rel=0.02)
    assert baseline.latency_min / ereg.latency_min == pytest.approx(1.72, rel=0.06)
    assert private_inference_cost(model("SM+ScFuFFN"), VOCAB_SIZE) == ereg  # temperatures vanish at inference
    relu = [private_inference_cost(model(name), VOCAB_SIZE) for name in ("SM+R", "EReg(SM(t)+R)")]
    assert relu[0] == relu[1]
    tapered = [private_inference_cost(model(name), VOCAB_SIZE) for name in ("SM", "SM+TN", "SM+LN")]
    assert tapered[0] == tapered[1] != tapered[2]  # a fixed map costs nothing


def test_counts_by_hand() -> None:
    counts = operation_counts(model("SM+LN+R", num_layers=2, hidden_size=8, num_attention_heads=2, seq_length=4), 10)
    #          softmax 2*2*4*4, LN 4*4*8 + ReLU 2*4*32, GELU, outputs 2*4*(4*8 + 32 + 8), logits 4*10, layers
    assert counts * [1e6, 1e6, 1e6, 1e6, 1e6, 1] == pytest.approx([64, 384, 0, 576, 40, 2])


def test_folded_ffns_cost_the_matrices_that_stay() -> None:
    ereg = model("EReg(SM(t)+ScFuFFN)", num_layers=2, hidden_size=8, num_attention_heads=2, seq_length=4)
    whole, one_kept, none_kept = (operation_counts(ereg, 10, kept)[3] * 1e6 for kept in (None, 1, 0))
    assert (whole, one_kept, none_kept) == pytest.approx((4 * 8 * 10, 4 * 8 * 9, 4 * 8 * 8))


def test_command_line(capsys: pytest.CaptureFixture[str]) -> None:
    assert private_inference.main([]) == 0
    assert "leave-one-out error" in capsys.readouterr().out
    assert private_inference.main(["--config", "configs/ereg.json"]) == 0
    assert "6.4" in capsys.readouterr().out
    assert private_inference.main(["--config", "configs/nowhere.json"]) == 2
    assert private_inference.main(["--config", "configs/ereg.json", "training.seed=-1", "logging.interval=0"]) == 2
    assert capsys.readouterr().err.count("error: ") == 3
