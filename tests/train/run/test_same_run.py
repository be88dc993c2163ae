"""Whether it is the same run: for each use of a run, which changed key rules it out and which is only reported."""

from pathlib import Path
from typing import Any

import pytest

from train.config import config_from_dict
from train.run.reader import RunError
from train.run.same_run import REFUSED, Use, changed_settings, same_run, same_run_in

DATASET = {"vocab_size": 400, "tokenizer_sha256": "ab", "fingerprint": "cd"}
OTHER = {
    "model.num_layers": 3,
    "dataset.vocab_size": 401,
    "dataset.tokenizer_sha256": "xx",
    "dataset.fingerprint": "xx",
    "regularizer.coefficient": 0.5,
    "optimizer.learning_rate": 0.5,
    "training.seed": 77,
    "training.global_batch_size": 1024,
    "training.micro_batch_size": 1,
    "training.train_steps": 7,
    "logging.interval": 3,
    "parallel.tensor_parallel_size": 2,
    "data.path": "elsewhere",
}


def run_tree() -> dict[str, Any]:
    return {**config_from_dict({"training": {"train_steps": 5}}).as_dict(), "dataset": dict(DATASET)}


@pytest.mark.parametrize(
    ("use", "refused"),
    [
        (Use.FOLDER, ["model.num_layers", "training.seed"]),
        (Use.WEIGHTS, ["model.num_layers", "dataset.vocab_size", "dataset.tokenizer_sha256"]),
        (Use.RESUME, ["model.num_layers", "dataset.vocab_size", "dataset.tokenizer_sha256", "dataset.fingerprint",
                      "training.global_batch_size"]),
        (Use.RESULT, ["model.num_layers", "dataset.fingerprint", "regularizer.coefficient", "optimizer.learning_rate",
                      "training.seed", "training.global_batch_size", "training.micro_batch_size"]),
    ],
)  # fmt: skip
def test_each_use_refuses_its_own_changes(use: Use, refused: list[str]) -> None:
    there, here = run_tree(), run_tree()
    assert same_run(there, here, use) == []
    for key, value in OTHER.items():
        section, _, name = key.partition(".")
        here[section][name] = value
    found = same_run(there, here, use)
    assert [each.key for each in found] == refused
    assert (found[0].there, found[0].here) == (there["model"]["num_layers"], 3)


def test_every_changed_setting_is_reported_but_the_folder() -> None:
    there, here = run_tree(), run_tree()
    there["logging"].pop("image_interval")  # an earlier version had no such key
    there["deepspeed"], here["deepspeed"] = {}, {"comms_logger": {"enabled": True}}
    here["run_dir"] = "moved"
    here["training"]["train_steps"], here["optimizer"]["learning_rate"] = 7, 0.5
    assert changed_settings(there, here) == {
        "deepspeed.comms_logger": [None, {"enabled": True}],
        "optimizer.learning_rate": [there["optimizer"]["learning_rate"], 0.5],
        "training.train_steps": [5, 7],
    }


def test_a_key_that_an_earlier_version_did_not_record_is_no_other_result() -> None:
    there = run_tree()
    del there["model"]["num_layers"]
    assert same_run(there, run_tree(), Use.RESULT) == []
    assert [each.key for each in same_run(there, run_tree(), Use.FOLDER)] == ["model.num_layers"]


def test_a_damaged_section_is_named(tmp_path: Path) -> None:
    assert same_run_in(tmp_path, run_tree(), Use.FOLDER) == []
    (tmp_path / "config.json").write_text('{"config": {"model": 3}}')
    for use in (Use.FOLDER, Use.RESULT):
        with pytest.raises(RunError, match=r"config.json: damaged, config.model is 3, expected an object"):
            same_run_in(tmp_path, run_tree(), use)


def test_the_table_names_keys_that_there_are() -> None:
    tree = run_tree()
    for pattern in REFUSED:
        section, _, name = pattern.partition(".")
        assert (name == "*" and tree[section]) or name in tree[section], pattern
