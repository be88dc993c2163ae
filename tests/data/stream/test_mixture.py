"""Test mixtures by counting: exact proportions, no gap, no repetition, and the same order from any position."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data.errors import DataError
from data.inspect import main as inspect
from data.shards.manifest import _fingerprint
from data.stream.dataset import open_dataset
from data.stream.mixture import BLOCK, MixtureOrder, Stage
from data.stream.token_stream import TokenStream
from tests.data.made import SEQ_LENGTH, make_dataset


@given(
    weights=st.lists(st.integers(0, 9), min_size=1, max_size=4).filter(any),
    later=st.integers(1, 9),
    start=st.integers(0, 5 * BLOCK),
)
@settings(max_examples=30, deadline=None)
def test_each_dataset_is_read_in_its_own_order_without_gap(weights: list[int], later: int, start: int) -> None:
    stages = [Stage(0, tuple(weights)), Stage(3 * BLOCK * 8, (later, *weights[1:]))]
    order = MixtureOrder(stages, seq_length=8, seed=1)
    dataset, own = order.split(np.arange(6 * BLOCK))
    for number in range(len(weights)):
        assert sorted(own[dataset == number]) == list(range((dataset == number).sum()))
    for stage, part in ((stages[0], dataset[: 3 * BLOCK]), (stages[1], dataset[3 * BLOCK :])):
        shares = np.bincount(part, minlength=len(weights)) / len(part)
        assert np.abs(shares - np.array(stage.weights) / sum(stage.weights)).max() < 1 / BLOCK
    for left, right in zip(order.split(np.arange(start, start + 50)), (dataset, own), strict=True):
        assert np.array_equal(left, right[start : start + 50])


def test_datasets_alternate_rather_than_follow_each_other() -> None:
    dataset, _ = MixtureOrder([Stage(0, (1.0, 1.0))], 8, 1).split(np.arange(BLOCK))
    assert 0.4 < (np.diff(dataset) != 0).mean() < 0.6


@pytest.fixture
def mixed(tmp_path: Path) -> Path:
    make_dataset(tmp_path / "a", [30, 30], validation=[3])
    make_dataset(tmp_path / "b", [500], validation=[2, 2])
    return write(tmp_path, {"datasets": [{"path": "a", "weight": 1}, {"path": "b", "weight": 3}]})


def write(folder: Path, fields: Any) -> Path:
    (folder / "mixture.json").write_text(json.dumps(fields))
    return folder / "mixture.json"


def test_a_mixture_is_streamed_resumed_and_seen_as_one_dataset(mixed: Path) -> None:
    manifest = open_dataset(mixed)
    assert manifest.num_samples("train", SEQ_LENGTH) == 560
    assert manifest.num_tokens("validation") == 13 + 9 + 9
    stream = TokenStream(mixed, "train", SEQ_LENGTH, 8)
    whole = np.concatenate([next(stream) for _ in range(40)])
    stream.close()
    resumed = TokenStream(mixed, "train", SEQ_LENGTH, 2, 1, 2)
    resumed.load_state_dict({**stream.state_dict(), "samples_consumed": 100})
    assert np.array_equal(next(resumed), whole[102:104])
    resumed.close()


def test_validation_reads_every_dataset_once(mixed: Path) -> None:
    stream = TokenStream(mixed, "validation", SEQ_LENGTH, 2)
    rows = [int(row[0]) - 1_000_000 for batch in stream for row in batch[: stream.valid_rows]]
    assert rows == [0, 4, 8, 0, 4, 9, 13]


def test_weights_and_members_change_the_fingerprint(mixed: Path) -> None:
    before = open_dataset(mixed).fingerprint
    write(mixed.parent, {"datasets": [{"path": "a", "weight": 1}, {"path": "b", "weight": 2}]})
    assert open_dataset(mixed).fingerprint != before


def test_inspect_shows_a_mixture_and_finds_its_samples(mixed: Path, capsys: pytest.CaptureFixture[str]) -> None:
    inspect([str(mixed), "--verify"])
    printed = capsys.readouterr().out
    assert "weights 1.0, 3.0" in printed and "verified: 6 shards" in printed


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ([], "not a mixture"),
        ({"datasets": []}, "names no dataset"),
        ({"datasets": ["a"]}, "not a mixture"),
        ({"datasets": [{"path": "absent"}]}, "absent"),
        ({"datasets": [{"path": "a", "weight": -1}]}, "weights"),
        ({"datasets": [{"path": "a", "weight": 0}]}, "weights"),
        ({"datasets": [{"path": "a", "weight": "x"}]}, "not a mixture"),
        ({"datasets": [{"path": "a", "weight": 1e-9}, {"path": "b"}]}, "raise it"),
        ({"datasets": [{"path": "a"}, {"path": "c"}]}, "tokenizer"),
        ({"datasets": [{"path": "a"}], "stages": [{"from_tokens": 5, "weights": [1]}]}, "0 first"),
        ({"datasets": [{"path": "a"}], "stages": [{"from_tokens": 0, "weights": [1, 2]}]}, "2 weights for 1"),
        (
            {"datasets": [{"path": "a"}], "stages": [{"from_tokens": float("inf"), "weights": [1]}]},
            "Infinity is not JSON",
        ),
        ({"datasets": [{"path": "a"}], "stages": [{"from_tokens": 0.5, "weights": [1]}]}, "from_tokens is 0.5"),
        ({"datasets": [{"path": "a"}], "stages": [{"from_tokens": 1e30, "weights": [1]}]}, "from_tokens is 1e"),
        ({"datasets": [{"path": "a", "weight": 2}], "stages": [{"from_tokens": 0, "weights": [1]}]}, "key 'weight'"),
        ({"datasets": [{"path": "a", "wieght": 2}]}, "key 'wieght' is not one of path, shards, weight"),
        ({"datasets": [{"path": "a"}], "seed": 1}, "key 'seed' is not one of datasets, stages"),
        ({"datasets": [{"path": "a", "weight": 1e308}, {"path": "b", "weight": 1e308}]}, "their sum finite"),
        ({"datasets": [{"path": "a", "weight": float("nan")}, {"path": "b"}]}, "NaN is not JSON"),
        ({"datasets": [{"path": "a", "weight": 10**400}]}, "not a mixture"),
        ({"datasets": [{"path": "mixture.json"}]}, "is a mixture itself"),
        ({"datasets": [{"path": "a", "shards": 5}]}, "shards is 5, not an address"),
        ({"datasets": [{"path": "a\0b"}]}, r"a\\x00b.*: expected a path"),
        ({"datasets": [{"path": "\ud800"}]}, r"\\ud800.*: expected a path"),
    ],
)
def test_a_bad_mixture_is_one_clear_line(
    mixed: Path, monkeypatch: pytest.MonkeyPatch, fields: Any, message: str
) -> None:
    monkeypatch.setattr("tests.data.made.TOKENIZER", b"another")
    make_dataset(mixed.parent / "c", [3])
    with pytest.raises(DataError, match=message) as caught:
        open_dataset(write(mixed.parent, fields))
    assert "\n" not in str(caught.value)


def test_nesting_without_end_is_one_clear_line(mixed: Path) -> None:
    mixed.write_text("[" * 200_000)
    with pytest.raises(DataError, match="not a mixture"):
        open_dataset(mixed)


def test_datasets_of_different_vocabularies_are_refused_though_they_name_one_tokenizer(mixed: Path) -> None:
    file = mixed.parent / "b" / "manifest.json"
    manifest = json.loads(file.read_text())
    manifest["vocab_size"] = 99
    file.write_text(json.dumps({**manifest, "fingerprint": _fingerprint(manifest)}))
    with pytest.raises(DataError, match="b has vocab_size 99, the first has 2147483648"):
        open_dataset(mixed)
