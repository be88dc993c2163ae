"""A small model leaves as a GPT-2, comes in again, is converted and trained on two ranks, and leaves once more."""

from pathlib import Path

import pytest

from tests.train.exchange.test_export import in_one_process, strangers_losses
from tests.train.runs import rows, run_main


def last_validation(run: Path) -> float:
    return float(next(row["validation_loss"] for row in reversed(rows(run)) if "validation_loss" in row))


@pytest.mark.slow
def test_in_converted_trained_and_out_again(tiny_config: Path, dataset: Path, tmp_path: Path) -> None:
    pytest.importorskip("transformers")
    pytest.importorskip("safetensors")
    gpt2, softmax_only, folder = tmp_path / "gpt2", tmp_path / "softmax_only", tmp_path / "folder"
    plain = ["model.architecture=SM+LN+G", "model.activation=gelu_tanh", "model.biases=all"]
    quick = ["training.train_steps=60", "optimizer.learning_rate=3e-3", "checkpoint.interval=0"]
    assert run_main(1, tiny_config, *plain, *quick).statuses == [0]
    pretrained = last_validation(tmp_path / "run")
    left = in_one_process(["--run", str(tmp_path / "run"), "--output", str(gpt2), "--format", "gpt2"])
    assert left[0][0] == 0, left

    start = [f"checkpoint.init_from={gpt2}", "model.biases=all", f"run_dir={softmax_only}"]
    answer = run_main(2, tiny_config, *start, *quick, "training.train_steps=20", "parallel.tensor_parallel_size=2")
    assert answer.statuses == [0, 0], answer.stderr
    first = next(row["ce_loss"] for row in rows(softmax_only) if "ce_loss" in row)
    assert first < pretrained + 0.5 * (6.0 - pretrained), "the maps keep most of what was learned; ln 400 = 6.0"
    assert last_validation(softmax_only) < first

    left = in_one_process(["--run", str(softmax_only), "--output", str(folder), "--fold"])
    assert left[0][0] == 0, left
    losses = strangers_losses([gpt2, folder], dataset)
    assert losses == pytest.approx([pretrained, last_validation(softmax_only)], rel=1e-4)
