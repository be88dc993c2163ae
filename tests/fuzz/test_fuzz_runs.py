"""Fuzz every file of a run's folder and of its checkpoints."""

import contextlib
import functools
import hashlib
import io
import json
from pathlib import Path
from typing import Any

import pytest

from data import inspect
from data.errors import DataError
from tests.fuzz.property import fuzz, holds, json_like
from tests.fuzz.test_fuzz_datasets import tokens_dataset
from tests.train.initial.gpt2 import write_gpt2
from train.checkpoint.folder import FORMAT, DamagedFileError, Folder, read_marker
from train.checkpoint.load import steps_saved
from train.checkpoint.root import CheckpointError
from train.checkpoint.tensors import Reader
from train.config import Config, config_from_dict
from train.config.tree import ConfigError
from train.initial.weights import read_source
from train.loop.goodput import CATEGORIES, Goodput
from train.pictures.run import FigureError, load_run
from train.run.directory import check_same_run
from train.run.journal import Journal
from train.run.reader import RunError, RunReader
from train.run.rows import JsonLines

HEADS = [[1.0, 2.0], [0.5, None]]
METRICS = [
    {"step": 1, "tokens": 8, "loss": 2.5, "ce_loss": 2.4, "grad_norm": 1.0, "step_time_s": 0.1, "learning_rate": 1e-3},
    {"step": 1, "tokens": 8, "validation_loss": 2.5, "validation_perplexity": 12.2, "validation_tokens": 100},
]
ENTROPY = [{"step": 1, "tokens": 8, "entropy_nats": HEADS, "threshold": HEADS, "temperature": HEADS}]
JOURNAL = [
    {"time": "2026-01-31T12:00:00+00:00", "event": "started", "step": 0},
    {"time": "2026-01-31T12:00:00+00:00", "event": "saved", "step": 1},
    {"time": "2026-01-31T12:00:00+00:00", "event": "rolled back", "step": 1, "next_sample": 24},
]
GOODPUT = {"updated": 1.8e9, "goodput": 0.5, "seconds": dict.fromkeys(CATEGORIES, 1.0)}
EVALUATION = {**METRICS[1], "max_entropy_nats": 3.0, **ENTROPY[0]}


@functools.cache
def description() -> dict[str, Any]:
    """Return what config.json holds."""
    tree = Config().as_dict()
    tree["data"]["path"], tree["model"]["num_layers"] = str(tokens_dataset()), 2
    dataset = {"vocab_size": 300, "tokenizer_sha256": "0" * 64, "fingerprint": "1" * 64}
    return {"vocab_size": 300, "dataset": dataset, "config": tree, "versions": {"python": "3.11"}, "git_commit": None}


def lines_like(rows: list[dict[str, Any]]) -> Any:
    """Draw a file of JSON lines of which some are drawn."""
    sound = [json.dumps(row).encode() for row in rows]
    return json_like(rows[-1]).map(lambda drawn: b"\n".join([*sound, drawn, sound[0]]))


GPT2 = {
    "model_type": "gpt2", "n_layer": 2, "n_embd": 32, "n_head": 4, "n_inner": 64, "n_positions": 8, "vocab_size": 9,
    "activation_function": "gelu_new", "tie_word_embeddings": True,
}  # fmt: skip


@fuzz(json_like(GPT2))
def test_the_description_of_a_gpt2(content: bytes, folder: Path) -> None:
    """checkpoint.init_from reads it before the weights."""
    pytest.importorskip("safetensors")
    if not (folder / "model.safetensors").exists():
        write_gpt2(folder, 9, 8)
    (folder / "config.json").write_bytes(content)
    holds(lambda: read_source(str(folder)), CheckpointError)


@fuzz(json_like({"metadata": {}, "weight_map": {"wte.weight": "model-00001-of-00002.safetensors"}}))
def test_the_index_of_a_gpt2(content: bytes, folder: Path) -> None:
    pytest.importorskip("safetensors")
    (folder / "config.json").write_text(json.dumps(GPT2))
    (folder / "model.safetensors.index.json").write_bytes(content)
    holds(lambda: read_source(str(folder)), CheckpointError)


@fuzz(json_like(description()))
def test_the_description_of_a_run(content: bytes, folder: Path) -> None:
    """config.json is read by a new start, by evaluations, by studies and by data.inspect."""
    (folder / "config.json").write_bytes(content)
    reader = RunReader(folder)
    config = holds(reader.config, RunError)
    holds(reader.fingerprint, RunError)
    holds(lambda: check_same_run(folder, Config()), RunError)
    if config is not None:
        holds(lambda: config_from_dict(config), ConfigError)
    with contextlib.redirect_stdout(io.StringIO()):
        holds(lambda: inspect.main(["--run", str(folder)]), DataError)


@fuzz(lines_like(METRICS))
def test_metrics(content: bytes, folder: Path) -> None:
    (folder / "config.json").write_text(json.dumps(description()))
    (folder / "metrics.jsonl").write_bytes(content)
    holds(RunReader(folder).metrics)
    holds(lambda: load_run(folder), RunError, FigureError)


@fuzz(lines_like(METRICS))
def test_metrics_at_a_resume(content: bytes, folder: Path) -> None:
    """What is not of the run, or later than the checkpoint, may go; a documented refusal is fine too."""
    (folder / "metrics.jsonl").write_bytes(content)
    holds(lambda: JsonLines(folder / "metrics.jsonl", 1).close(), RunError)


@fuzz(lines_like(ENTROPY))
def test_entropies(content: bytes, folder: Path) -> None:
    (folder / "config.json").write_text(json.dumps(description()))
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in METRICS))
    (folder / "entropy.jsonl").write_bytes(content)
    holds(RunReader(folder).entropies)
    holds(lambda: load_run(folder), RunError, FigureError)


@fuzz(lines_like(JOURNAL))
def test_a_journal(content: bytes, folder: Path) -> None:
    (folder / "config.json").write_text(json.dumps(description()))
    (folder / "journal.jsonl").write_bytes(content)
    holds(RunReader(folder).journal)
    holds(lambda: Journal(folder).write("resumed", step=1))
    assert RunReader(folder).journal()[-1]["event"] == "resumed"
    holds(lambda: inspect.first_sample_of(2, 8, folder), DataError)


@fuzz(json_like(GOODPUT))
def test_goodput(content: bytes, folder: Path) -> None:
    """A damaged side file never ends a run; what is written next is sound."""
    (folder / "goodput.json").write_bytes(content)

    def counted() -> None:
        goodput = Goodput(folder, lost_s=1.0)
        goodput.spent("steps")
        goodput.write()

    with contextlib.redirect_stderr(io.StringIO()):
        holds(counted)
    kept = json.loads((folder / "goodput.json").read_text(), parse_constant=lambda name: 1 / 0)
    assert all(0 <= kept["seconds"][key] < 1e12 for key in CATEGORIES) and 0 <= kept["goodput"] <= 1


@fuzz(json_like(EVALUATION))
def test_an_evaluation(content: bytes, folder: Path) -> None:
    (folder / "config.json").write_text(json.dumps(description()))
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in METRICS))
    (folder / "evaluation.json").write_bytes(content)
    holds(RunReader(folder).evaluation, RunError)
    holds(lambda: load_run(folder), RunError, FigureError)


TABLE = {
    "model.x": {
        "dtype": "float32",
        "shape": [2, 3],
        "chunks": [{"offsets": [0, 0], "sizes": [2, 3], "file": "rank_00000_000.bin", "offset": 0}],
    }
}


@functools.cache
def marker() -> dict[str, Any]:
    files = {"rank_00000_000.bin": {"bytes": 24, "sha256": hashlib.sha256(bytes(24)).hexdigest()}}
    state = {"format": FORMAT, "step": 1, "adam_step": 1.0, "data_state": {}, "health_state": {}, "files": files}
    return {"validation_loss": 2.5, **state, **description()}


def sealed(content: bytes) -> bytes:
    """Return a marker with the digest of its content, as a forger would."""
    try:
        tree = json.loads(content)
        text = json.dumps(tree["checkpoint"], sort_keys=True)
        return json.dumps({**tree, "sha256": hashlib.sha256(text.encode()).hexdigest()}).encode()
    except (ValueError, TypeError, LookupError, RecursionError, AttributeError):
        return content


@fuzz(json_like({"checkpoint": marker(), "sha256": ""}).map(sealed))
def test_the_marker_of_a_checkpoint(content: bytes, folder: Path) -> None:
    (folder / "step_00000001").mkdir()
    (folder / "step_00000001/checkpoint.json").write_bytes(content)
    found = holds(lambda: read_marker(Folder(f"{folder}/step_00000001")), DamagedFileError)
    holds(lambda: steps_saved(Folder(str(folder))))
    holds(RunReader(folder).fingerprint)
    if found is not None:  # what the loader takes for granted
        assert isinstance(found["step"], int) and isinstance(found["config"], dict)
        assert all(
            isinstance(each["bytes"], int) and isinstance(each["sha256"], str) for each in found["files"].values()
        )


@fuzz(json_like(TABLE))
def test_the_table_of_tensors(content: bytes, folder: Path) -> None:
    (folder / "tensors.json").write_bytes(content)
    (folder / "rank_00000_000.bin").write_bytes(bytes(24))
    holds(Reader(Folder(str(folder))).read_metadata, DamagedFileError)
