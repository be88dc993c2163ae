"""Several datasets read as one, in fixed proportions that may change with the tokens seen.

A mixture is a JSON file of the user's own:

    {"datasets": [{"path": "datasets/code", "weight": 3}, {"path": "https://host/prose", "weight": 1}]}

    {"datasets": [{"path": "datasets/code"}, {"path": "datasets/prose"}],
     "stages": [{"from_tokens": 0, "weights": [3, 1]}, {"from_tokens": 1e9, "weights": [1, 1]}]}

Relative paths start from the file's folder. {"path": INDEX, "shards": ADDRESS} names where text shards are
(data/index.py).

Worked example: weights 3 and 1 and blocks of 8 (really 4,096). Of every 8 positions 6 go to dataset 0 and 2 to dataset
1, scattered by a keyed permutation j of the block's places. Position 19 is place 3 of block 2; if j = 7, it is the
second of dataset 1's two (6 <= 7 < 8), hence that dataset's own position 2 * 2 + 1 = 5. So every position of the run is
found in O(1), and each dataset is read in its own order (data/stream/order.py) without gap or repetition. Validation
reads the datasets' validation splits one after the other.
"""

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from data.errors import DataError
from data.fetch.sources import ReadOptions
from data.shards.manifest import SPLITS, Manifest, ShardInfo, Stage, load_manifest
from data.stream.order import permute
from data.stream.samples import SampleReader

BLOCK = 4096
_MOST_TOKENS = 1 << 60


@dataclass(frozen=True)
class Mixture(Manifest):
    """A mixture seen as one dataset: sizes are sums, source and tokenizer are the first dataset's."""

    mixed: tuple[Manifest, ...]
    mixed_stages: tuple[Stage, ...]

    @property
    def datasets(self) -> tuple[Manifest, ...]:
        return self.mixed

    @property
    def stages(self) -> tuple[Stage, ...]:
        return self.mixed_stages


def load_mixture(path: Path, options: ReadOptions) -> Mixture:
    """Read a mixture and the manifests of its datasets; raises DataError if they cannot be read as one."""
    try:
        fields = json.loads(path.read_bytes())
        addresses, stages = _addresses(fields, path.parent), _stages(fields)
    except OSError as error:
        raise DataError(
            f"{path}: cannot be read ({error.strerror}); name a dataset folder or a mixture file"
        ) from error
    except (ValueError, KeyError, TypeError, OverflowError, RecursionError) as error:
        example = '{"datasets": [{"path": DIR, "weight": 1}, ...]}'
        raise DataError(f"{path}: no mixture ({type(error).__name__}: {error}); expected {example}") from error
    datasets = tuple(load_manifest(address, options, shards) for address, shards in addresses)
    _check(path, datasets, stages)
    first = datasets[0]
    identity = json.dumps([[dataset.fingerprint for dataset in datasets], [vars(stage) for stage in stages]])
    return Mixture(
        **{
            **vars(first),
            "shards": {split: tuple(shard for each in datasets for shard in each.shards[split]) for split in SPLITS},
            "fingerprint": hashlib.sha256(identity.encode()).hexdigest(),
        },
        mixed=datasets,
        mixed_stages=stages,
    )


class MixtureOrder:
    """Which dataset a position of the run is read from, and which position of that dataset's own order."""

    def __init__(self, stages: Sequence[Stage], seq_length: int, seed: int) -> None:
        self._seed = seed
        self._first_blocks = np.array([-(-stage.from_tokens // (seq_length * BLOCK)) for stage in stages])
        self._quotas = np.array([_quotas(stage.weights) for stage in stages])
        self._quota_ends = np.cumsum(self._quotas, axis=1)
        past = np.diff(self._first_blocks)[:, None] * self._quotas[:-1]
        self._read_before = np.concatenate([np.zeros_like(self._quotas[:1]), np.cumsum(past, axis=0)])

    def split(self, positions: NDArray[np.int64]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """(dataset, position in its own order) for each position of the run."""
        dataset, own = np.empty_like(positions), np.empty_like(positions)
        blocks, places = np.divmod(positions, BLOCK)
        for block in np.unique(blocks):
            here = blocks == block
            stage = int(np.searchsorted(self._first_blocks, block, side="right")) - 1
            place = permute(places[here], BLOCK, f"{self._seed}/mixture/{block}")
            chosen = np.searchsorted(self._quota_ends[stage], place, side="right")
            quota = self._quotas[stage, chosen]
            whole_blocks = (block - self._first_blocks[stage]) * quota
            within = place - (self._quota_ends[stage, chosen] - quota)
            dataset[here], own[here] = chosen, self._read_before[stage, chosen] + whole_blocks + within
        return dataset, own


class ConcatenatedOrder:
    """One dataset after the other, each once; for validation."""

    def __init__(self, sizes: Sequence[int]) -> None:
        self._ends = np.cumsum(sizes)

    def split(self, positions: NDArray[np.int64]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        dataset = np.searchsorted(self._ends, positions, side="right")
        return dataset, positions - np.append(0, self._ends)[dataset]


class MixtureReader:
    """Reads samples of several datasets by their position in the run."""

    def __init__(self, order: MixtureOrder | ConcatenatedOrder, readers: Sequence[SampleReader]) -> None:
        self._order, self._readers = order, readers

    def read(self, positions: NDArray[np.int64]) -> NDArray:
        """The samples at `positions` of the run: an array [len(positions), seq_length + 1] of the shards' type."""
        dataset, own = self._order.split(positions)
        parts = [(dataset == number, number) for number in np.unique(dataset)]
        read = [(here, self._readers[number].read(own[here])) for here, number in parts]
        samples = np.empty((len(positions), read[0][1].shape[1]), dtype=read[0][1].dtype)
        for here, rows in read:
            samples[here] = rows
        return samples

    def locate(self, position: int) -> tuple[Manifest, ShardInfo, int]:
        """The dataset, shard and sample number that `position` is read from."""
        dataset, own = self._order.split(np.array([position]))
        return self._readers[int(dataset[0])].locate(int(own[0]))

    def close(self) -> None:
        for reader in self._readers:
            reader.close()


def _addresses(fields: Any, folder: Path) -> list[tuple[str | Path, str | None]]:
    """Where each dataset and its shards are; raises KeyError, TypeError or ValueError where that is not said."""
    _require_keys(fields, {"datasets", "stages"})
    for entry in fields["datasets"]:
        _require_keys(entry, {"path", "shards", *(() if "stages" in fields else ("weight",))})
        for key in ("path", "shards"):
            if not isinstance(entry.get(key, "-"), str) or not entry.get(key, "-"):
                raise TypeError(f"{key} is {entry[key]!r}, not an address")
        if entry["path"].endswith(".json"):
            raise ValueError(f"{entry['path']} is a mixture itself; list its datasets instead")
    return [(_resolved(entry["path"], folder), entry.get("shards")) for entry in fields["datasets"]]


def _require_keys(fields: Any, known: set[str]) -> None:
    if not isinstance(fields, dict):
        raise TypeError(f"{fields!r:.80} has no keys")
    if unknown := sorted(set(fields) - known):
        raise ValueError(f"key {unknown[0]!r} is not one of {', '.join(sorted(known))}")


def _resolved(address: str, folder: Path) -> str | Path:
    is_remote = address.startswith("pipe:") or "://" in address
    return address if is_remote else folder / address


def _stages(fields: dict[str, Any]) -> tuple[Stage, ...]:
    if "stages" not in fields:
        return (Stage(0, tuple(float(entry.get("weight", 1)) for entry in fields["datasets"])),)
    for stage in fields["stages"]:
        _require_keys(stage, {"from_tokens", "weights"})
        if not 0 <= stage["from_tokens"] < _MOST_TOKENS or stage["from_tokens"] != int(stage["from_tokens"]):
            raise ValueError(f"from_tokens is {stage['from_tokens']!r}, expected a whole number below {_MOST_TOKENS}")
    return tuple(Stage(int(stage["from_tokens"]), tuple(map(float, stage["weights"]))) for stage in fields["stages"])


def _check(path: Path, datasets: Sequence[Manifest], stages: Sequence[Stage]) -> None:
    if not datasets:
        raise DataError(f"{path}: names no dataset; add one to its list")
    for dataset in datasets[1:]:
        if dataset.tokenizer_sha256 != datasets[0].tokenizer_sha256:
            raise DataError(
                f"{path}: dataset {dataset.source.describe('')} has tokenizer {dataset.tokenizer_sha256[:12]}, "
                f"the first has {datasets[0].tokenizer_sha256[:12]}; prepare it with --tokenizer of the first"
            )
        for name in ("vocab_size", "end_of_document", "token_dtype"):
            own, first = getattr(dataset, name), getattr(datasets[0], name)
            if own != first:
                raise DataError(
                    f"{path}: dataset {dataset.source.describe('')} has {name} {own}, the first has {first}, though "
                    "their tokenizer is one; prepare it again"
                )
    starts = [stage.from_tokens for stage in stages]
    if not starts or starts[0] != 0 or sorted(set(starts)) != starts:
        raise DataError(f"{path}: stages begin at {starts} tokens; expected 0 first, then rising numbers")
    for stage in stages:
        if len(stage.weights) != len(datasets):
            raise DataError(f"{path}: {len(stage.weights)} weights for {len(datasets)} datasets")
        if not np.isfinite(sum(stage.weights)) or min(stage.weights) < 0 or not sum(stage.weights):
            raise DataError(f"{path}: weights {stage.weights} must be at least 0, not all 0, and their sum finite")
        for weight, quota in zip(stage.weights, _quotas(stage.weights), strict=True):
            if weight and not quota:
                raise DataError(f"{path}: weight {weight} is less than 1/{2 * BLOCK} of the whole; raise it or drop it")


def _quotas(weights: Sequence[float]) -> NDArray[np.int64]:
    """Positions of a block that each dataset gets: proportional, whole, BLOCK in all (largest remainders)."""
    exact = np.array(weights) / sum(weights) * BLOCK
    quotas = np.floor(exact).astype(np.int64)
    largest = np.argsort(-(exact - quotas), kind="stable")[: BLOCK - quotas.sum()]
    quotas[largest] += 1
    return quotas
