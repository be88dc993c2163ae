"""Runs that start from another model's weights: a GPT-2, a run of ours, another architecture."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from data.shards.manifest import load_manifest
from model.initialize import named_parameters
from model.transformer import Transformer
from tests.train.initial.gpt2 import HEADS, INNER, LAYERS, WIDTH, write_gpt2
from tests.train.runs import journal, rows, run_main
from train.initial.weights import read_source

pytest.importorskip("safetensors")
T = 32
GPT2 = {
    "architecture": "SM+LN+G", "activation": "gelu_tanh", "biases": "all", "seq_length": T,
    "num_layers": LAYERS, "hidden_size": WIDTH, "num_attention_heads": HEADS, "ffn_hidden_size": INNER,
}  # fmt: skip
ONE_STEP = ["training.train_steps=1", "optimizer.learning_rate=1e-12", "training.evaluation_samples=64"]


def keys(model: dict[str, Any]) -> list[str]:
    return [f"model.{name}={value}" for name, value in model.items()]


def validation_loss(run: Path) -> float:
    return float(next(row["validation_loss"] for row in reversed(rows(run)) if "validation_loss" in row))


def expected_loss(folder: Path, dataset: Path, vocab_size: int) -> float:
    """Return the loss over the validation split of the source's own architecture, computed in one process."""
    from data.stream.token_stream import TokenStream

    source = read_source(str(folder))
    model = Transformer(source.model, vocab_size, padded_vocab_size=source.vocab_size)
    stream, total, count = TokenStream(dataset, "validation", T, 4), 0.0, 0
    with torch.no_grad():
        for name, parameter in named_parameters(model):
            parameter.copy_(source.weights[name])
        for rows_BT in stream:
            tokens_BT = torch.from_numpy(rows_BT)[: stream.valid_rows].long()
            total += float(model(tokens_BT[:, :-1].t(), tokens_BT[:, 1:].t())[0])
            count += tokens_BT[:, 1:].numel()
    return total / count


@pytest.mark.parametrize(
    ("world_size", "layout"),
    [
        (1, []),
        (2, ["parallel.tensor_parallel_size=2", "parallel.sequence_parallel=true"]),
        (4, ["parallel.pipeline_parallel_size=2", "parallel.context_parallel_size=2"]),
        (2, ["training.micro_batch_size=2", "parallel.zero_stage=3"]),
        (2, ["training.micro_batch_size=2", "training.precision=bf16"]),
    ],
)
def test_a_gpt2_under_every_layout(
    tiny_config: Path, tmp_path: Path, dataset: Path, world_size: int, layout: list[str]
) -> None:
    vocab_size = load_manifest(dataset).vocab_size
    write_gpt2(tmp_path / "gpt2", vocab_size + 3, positions=T + 4)
    start = [f"checkpoint.init_from={tmp_path / 'gpt2'}", *keys(GPT2), *ONE_STEP]
    answer = run_main(world_size, tiny_config, *start, *layout)
    assert answer.statuses == [0] * world_size, answer.stderr
    tolerance = 2e-2 if "training.precision=bf16" in layout else 1e-5
    expected = expected_loss(tmp_path / "gpt2", dataset, vocab_size)
    assert validation_loss(tmp_path / "run") == pytest.approx(expected, rel=tolerance)
    assert "weights from" in answer.stdout and "sha256" in answer.stdout
    described = json.loads((tmp_path / "run" / "config.json").read_text())
    assert described["initialized_from"]["sha256"] == read_source(str(tmp_path / "gpt2")).sha256


def test_a_run_of_ours_then_another_architecture_then_a_resumed_one(tiny_config: Path, tmp_path: Path) -> None:
    first, second = tmp_path / "run", tmp_path / "second"
    biased = ["model.architecture=SM+LN", "model.biases=all", "training.evaluation_samples=64"]
    assert run_main(1, tiny_config, *biased).statuses == [0]
    fused = ["model.architecture=SM+LN", "model.biases=all", "model.fused_ffn=true", "model.scaled_ffn=true",
             "model.temperature=per_head", "model.regularized=true"]  # fmt: skip
    start = [f"checkpoint.init_from={first}", f"run_dir={second}", *fused]
    answer = run_main(2, tiny_config, *start, *ONE_STEP, "parallel.tensor_parallel_size=2")
    assert answer.statuses == [0, 0], answer.stderr
    assert validation_loss(second) == pytest.approx(validation_loss(first), rel=1e-5), "these maps are exact"
    event = next(row for row in journal(second) if row["event"] == "initial weights")
    assert event["anew"] == ["attention.threshold"] and event["left_out"] == []
    assert "model.fused_ffn: False -> True" in event["changes"]

    longer = [*start, *ONE_STEP, "training.train_steps=2", f"checkpoint.init_from={tmp_path / 'gone'}"]
    answer = run_main(1, tiny_config, *longer)
    assert answer.statuses == [0], answer.stderr
    assert "checkpoint.init_from is ignored" in answer.stdout
    assert json.loads((second / "config.json").read_text())["initialized_from"]["kind"] == "checkpoint"


def test_what_does_not_fit_is_refused_on_every_rank(tiny_config: Path, tmp_path: Path, dataset: Path) -> None:
    write_gpt2(tmp_path / "gpt2", load_manifest(dataset).vocab_size, positions=T)
    start = [f"checkpoint.init_from={tmp_path / 'gpt2'}", *keys(GPT2), "model.num_layers=3", "model.seq_length=64"]
    answer = run_main(2, tiny_config, *start, "parallel.tensor_parallel_size=2")
    assert answer.statuses == [2, 2]
    assert "model.num_layers is 2 there and 3 here; set model.num_layers=2" in answer.stderr
    assert answer.stderr.count("error:") == 2 and "model.seq_length is 32 there and 64 here" in answer.stderr
    assert not (tmp_path / "run" / "config.json").exists()
    answer = run_main(1, tiny_config, *start, "--dry-run")
    assert answer.statuses == [2] and "model.num_layers is 2 there and 3 here" in answer.stderr


def test_a_teacher_is_learned_from_and_refused_where_layers_are_split(tiny_config: Path, tmp_path: Path) -> None:
    assert run_main(1, tiny_config, f"run_dir={tmp_path / 'teacher'}").statuses == [0]
    taught = [f"distillation.teacher={tmp_path / 'teacher'}", "distillation.hidden_weight=0.1", "training.seed=2"]
    answer = run_main(2, tiny_config, *taught)
    assert answer.statuses == [0, 0], answer.stderr
    steps = [row for row in rows(tmp_path / "run") if "loss" in row]
    assert steps[-1]["distillation_loss"] < steps[0]["distillation_loss"]
    assert all(row["loss"] > row["ce_loss"] + row["distillation_loss"] > row["ce_loss"] for row in steps)
    assert next(row for row in journal(tmp_path / "run") if row["event"] == "teacher")["kind"] == "checkpoint"

    answer = run_main(2, tiny_config, *taught, f"run_dir={tmp_path / 'split'}", "parallel.tensor_parallel_size=2")
    assert answer.statuses == [2, 2] and answer.stderr.count("error:") == 1
    assert "distillation.teacher is not possible with parallel.tensor_parallel_size = 2" in answer.stderr
    answer = run_main(1, tiny_config, *taught, f"run_dir={tmp_path / 'wide'}", "model.hidden_size=64")
    assert answer.statuses == [2] and "residuals cannot be compared" in answer.stderr
