"""What TensorBoard reads back from the event files of a run."""

import json
import threading
from pathlib import Path

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from train.config import Config, config_from_dict
from train.loop.tensorboard import TensorBoardLog, _leave_to_flush, flat_hyperparameters

LAYERS, HEADS = 3, 2
SIZES = {"num_layers": LAYERS, "hidden_size": 8, "num_attention_heads": HEADS, "seq_length": 16}


def configuration(**model: object) -> Config:
    return config_from_dict({"model": {**SIZES, **model}, "training": {"train_steps": 10}})


def head_row(step: int, tempered: bool = True) -> dict:
    per_head = [[0.1 * layer + 0.01 * head for head in range(HEADS)] for layer in range(LAYERS)]
    learned = per_head if tempered else None
    per_layer = [1.0] * LAYERS if tempered else None
    return {
        "step": step,
        "entropy_nats": per_head,
        "threshold": learned,
        "temperature": learned,
        "alpha": per_layer,
        "beta": per_layer,
    }


def step_row(step: int) -> dict:
    keys = ("loss", "ce_loss", "entropy_loss", "learning_rate", "grad_norm", "step_time_s", "tokens_per_second")
    return {"step": step, **{key: float(step) for key in keys}}


def write(folder: Path, config: Config, steps: range, first_step: int = 0, tempered: bool = True) -> None:
    log = TensorBoardLog(folder, config, first_step)
    for step in steps:
        log.step(step_row(step))
        log.heads(head_row(step, tempered))
        log.images(head_row(step, tempered), 16)
        log.evaluation({"step": step, "validation_loss": 2.0, "validation_perplexity": 7.4})
    log.close()


def read(folder: Path) -> EventAccumulator:
    return EventAccumulator(str(folder), size_guidance={"images": 0, "scalars": 0, "histograms": 0}).Reload()


def test_scalars_images_histograms_and_hyperparameters_of_a_run(tmp_path: Path) -> None:
    write(tmp_path, configuration(), range(1, 4))
    events = read(tmp_path)
    tags = events.Tags()
    assert {tag.partition("/")[0] for tag in tags["scalars"]} == {
        "loss", "optimizer", "speed", "validation", "layer_entropy_nats", "threshold", "temperature", "alpha", "beta",
    }  # fmt: skip
    assert set(tags["images"]) == {"head_maps/entropy_nats", "head_maps/threshold"}
    assert set(tags["histograms"]) == {"heads/entropy_nats", "heads/threshold", "heads/temperature"}
    kinds = [set(tags[kind]) for kind in ("scalars", "images", "histograms")]
    assert sum(map(len, kinds)) == len(set.union(*kinds)), "TensorBoard shows one of two kinds under the same tag"
    assert [event.step for event in events.Images("head_maps/threshold")] == [1, 2, 3]
    assert events.Histograms("heads/temperature")[0].histogram_value.num == LAYERS * HEADS
    assert [round(e.value, 6) for e in events.Scalars("layer_entropy_nats/layer_01")] == [0.105] * 3
    assert {"_hparams_/experiment", "_hparams_/session_start_info"} <= set(events.summary_metadata)


def test_a_resumed_run_has_no_step_twice_and_a_plain_model_no_empty_charts(tmp_path: Path) -> None:
    config = configuration(architecture="SM+LN+G")
    write(tmp_path, config, range(1, 6), tempered=False)
    write(tmp_path, config, range(4, 8), first_step=3, tempered=False)
    events = read(tmp_path)
    assert [event.step for event in events.Scalars("loss/loss")] == list(range(1, 8))
    assert set(events.Tags()["images"]) == {"head_maps/entropy_nats"}
    assert not any(tag.startswith(("threshold", "temperature", "alpha")) for tag in events.Tags()["scalars"])


def test_hyperparameters_are_flat_and_of_types_tensorboard_takes() -> None:
    flat = flat_hyperparameters(configuration())
    assert flat["model.hidden_size"] == 8 and flat["optimizer.learning_rate"] == 1e-3
    assert all(isinstance(value, bool | int | float | str) for value in flat.values())
    json.dumps(flat)


@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), ValueError("a fault of the program")])
def test_a_disk_error_of_the_writers_thread_is_left_to_flush(
    error: Exception, capsys: pytest.CaptureFixture[str]
) -> None:
    class Writer(threading.Thread):
        __module__ = "tensorboard.summary.writer.event_file_writer"

    _leave_to_flush(threading.ExceptHookArgs((type(error), error, None, Writer())))
    assert bool(capsys.readouterr().err) == isinstance(error, ValueError)
