"""The section `data` of a configuration, honoured by whole runs: addresses from afar, mixtures, damage, documents."""

import json
from pathlib import Path

import numpy as np
import pytest

from data.inspect import main as inspect
from data.shards.manifest import SPLITS, manifest_json
from data.shards.writer import write_shard
from parallel.local_ranks import run_ranks
from tests.train.test_run import _evaluate, rows, run_main
from train.config import ConfigError, load_config
from train.plan import print_dry_run

SHORT = (
    "training.train_steps=3",
    "training.evaluation_interval=0",
    "checkpoint.interval=0",
    "logging.interval=1",
    "model.init_std=0.3",
)


def short_documents(folder: Path) -> Path:
    """Random tokens of which every sixth ends a document."""
    folder.mkdir()
    tokens = np.random.default_rng(1).integers(2, 101, 20_000)
    tokens[np.random.default_rng(2).random(20_000) < 1 / 6] = 1
    shards = {split: [write_shard(folder / f"{split}-000000.tar", tokens, "uint16")] for split in SPLITS}
    (folder / "tokenizer.model").write_bytes(b"none")
    (folder / "manifest.json").write_text(manifest_json("tokens", 1, 101, b"none", "uint16", shards))
    return folder


def losses(run: Path) -> list[float]:
    """Of every step, then of the last evaluation."""
    return [row.get("ce_loss", row.get("validation_loss")) for row in rows(run)]


def test_attention_within_documents_is_the_same_under_another_layout(tiny_config: Path, tmp_path: Path) -> None:
    path = short_documents(tmp_path / "set")
    found = {}
    for name, ranks, settings in (
        ("without", 1, ()),
        ("one", 1, ("data.attention_within_documents=true",)),
        (
            "split",
            2,
            (
                "data.attention_within_documents=true",
                "parallel.tensor_parallel_size=2",
                "parallel.sequence_parallel=true",
                "training.activation_recompute=full",
            ),
        ),
        ("stages", 2, ("data.attention_within_documents=true", "parallel.pipeline_parallel_size=2")),
        ("context", 2, ("data.attention_within_documents=true", "parallel.context_parallel_size=2")),
    ):
        answer = run_main(ranks, tiny_config, *SHORT, *settings, f"data.path={path}", f"run_dir={tmp_path / name}")
        assert answer.statuses == [0] * ranks, answer.stderr
        found[name] = losses(tmp_path / name)
    assert found["split"] == pytest.approx(found["one"], rel=1e-5)
    assert found["stages"] == pytest.approx(found["one"], rel=1e-5)
    assert found["context"] == pytest.approx(found["one"], rel=1e-5)
    assert found["without"] != pytest.approx(found["one"], rel=1e-3)


def test_a_mixture_from_afar_is_trained_evaluated_and_traced(
    tiny_config: Path, dataset: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    mixture = tmp_path / "mixture.json"
    mixture.write_text(json.dumps({"datasets": [{"path": f"pipe:cat {dataset}/{{}}"}, {"path": str(dataset)}]}))
    settings = [*SHORT, f"data.path={mixture}", f"data.cache_dir={tmp_path / 'cache'}", "data.prefetch_micro_batches=2"]
    assert run_main(1, tiny_config, *settings).statuses == [2], "commands need the user's word"
    settings.append("data.allow_commands=true")
    answer = run_main(1, tiny_config, *settings, "data.cache_gigabytes=1e-9")
    assert answer.statuses == [2] and "cache_gigabytes is 1e-09" in answer.stderr
    answer = run_main(1, tiny_config, *settings, "data.cache_gigabytes=1")
    assert answer.statuses == [0], answer.stderr
    assert list((tmp_path / "cache").glob("??/*"))
    capsys.readouterr()
    inspect(["--run", str(tmp_path / "run"), "--step", "2", "--allow-commands"])
    traced = capsys.readouterr().out.splitlines()
    assert [line.split(":")[0] for line in traced] == [f"sample {position}" for position in range(8, 16)]
    assert any(": pipe:cat" in line for line in traced) and all(".py" in line for line in traced)
    assert run_ranks(_evaluate, 1, str(tmp_path / "run"), "--allow-commands") == [0]
    print_dry_run(load_config(tiny_config, settings), None)
    assert "epochs" in capsys.readouterr().out


def test_damage_where_a_dataset_comes_from_stops_the_run(tiny_config: Path, dataset: Path, tmp_path: Path) -> None:
    changed = f"pipe:case {{}} in *.tar) tr a b < {dataset}/{{}};; *) cat {dataset}/{{}};; esac"
    cache = f"data.cache_dir={tmp_path / 'cache'}"  # the user's cache may hold the sound shards
    answer = run_main(1, tiny_config, *SHORT, f"data.path={changed}", cache, "data.fetch_attempts=1")
    assert answer.statuses == [1] and "damaged at the source" in answer.stderr
    assert answer.stderr.count("\n") == 1 and "sha256" in answer.stderr


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("data.shuffle_window_shards=0", "data.shuffle_window_shards = 0 must be at least 1"),
        ("data.prefetch_micro_batches=0", "data.prefetch_micro_batches = 0 must be at least 1"),
        ("data.fetch_attempts=0", "data.fetch_attempts = 0 must be positive"),
        ("data.cache_gigabytes=0", "data.cache_gigabytes = 0.0 must be positive"),
        ("data.fetch_time_limit_s=-1", "data.fetch_time_limit_s = -1.0 must be positive"),
        ("data.on_damage=ignore", "one of"),
    ],
)
def test_impossible_settings_are_refused(tiny_config: Path, override: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        load_config(tiny_config, [override])
