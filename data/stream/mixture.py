"""Read several datasets as one, in fixed proportions that may change with the number of tokens seen.

A mixture is a JSON file that the user writes:

    {"datasets": [{"path": "datasets/code", "weight": 3}, {"path": "https://host/prose", "weight": 1}]}

    {"datasets": [{"path": "datasets/code"}, {"path": "datasets/prose"}],
     "stages": [{"from_tokens": 0, "weights": [3, 1]}, {"from_tokens": 1e9, "weights": [1, 1]}]}

Relative paths start from the file's folder. For text shards that lie elsewhere (data/index.py), an entry reads
{"path": INDEX, "shards": ADDRESS}.

Worked example: weights 3 and 1, blocks of 8 positions (really 4,096). Of every 8 positions, 6 go to dataset 0 and 2 to
dataset 1. A keyed permutation scatters them over the block.

    position 19   place 3 of block 2
    permuted      place 3 -> 7, say; 6 <= 7 < 8, so this is the second of dataset 1's two places
    sample        position 5 of dataset 1: 2 places in each of the 2 blocks before, plus 1 in this block

So every position of the run is found in O(1). Each dataset is read in its own order (data/stream/order.py), without gap
or repetition. Validation reads the datasets' validation splits one after the other.
"""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from data.errors import DataError
from data.fetch.sources import ReadOptions
from data.files.address import is_remote, local_path
from data.files.strict_json import read_json, to_json
from data.shards.manifest import SPLITS, Manifest, ShardInfo, Stage, load_manifest
from data.stream.order import permute
from data.stream.samples import SampleReader

BLOCK = 4096
_MOST_TOKENS = 1 << 60


@dataclass(frozen=True)
class Mixture(Manifest):
    """A mixture as one dataset. Sizes are sums; source and tokenizer are those of the first dataset."""

    mixed: tuple[Manifest, ...]
    mixed_stages: tuple[Stage, ...]

    @property
    def datasets(self) -> tuple[Manifest, ...]:
        return self.mixed

    @property
    def stages(self) -> tuple[Stage, ...]:
        return self.mixed_stages


def load_mixture(path: Path, options: ReadOptions) -> Mixture:
    """Read a mixture file and the manifests of its datasets.

    Raises:
        DataError: A file cannot be read, or the datasets do not fit together (another tokenizer, wrong weights).
    """
    try:
        fields = read_json(path)
        addresses, stages = _addresses(fields, path.parent), _stages(fields)
    except OSError as error:
        raise DataError(
            f"{path}: cannot be read ({error.strerror}); name a dataset folder or a mixture file"
        ) from error
    except DataError:
        raise
    except (ValueError, KeyError, TypeError, OverflowError, RecursionError) as error:
        example = '{"datasets": [{"path": DIR, "weight": 1}, ...]}'
        raise DataError(f"{path}: not a mixture ({type(error).__name__}: {error}); expected {example}") from error
    datasets = tuple(load_manifest(address, options, shards) for address, shards in addresses)
    _check(path, datasets, stages)
    first = datasets[0]
    identity = to_json([[dataset.fingerprint for dataset in datasets], [vars(stage) for stage in stages]])
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
    """Map each position of the run to a dataset and a position in that dataset's own order."""

    def __init__(self, stages: Sequence[Stage], seq_length: int, seed: int) -> None:
        self._seed = seed
        self._first_blocks = np.array([-(-stage.from_tokens // (seq_length * BLOCK)) for stage in stages])
        self._quotas = np.array([_quotas(stage.weights) for stage in stages])
        self._quota_ends = np.cumsum(self._quotas, axis=1)
        past = np.diff(self._first_blocks)[:, None] * self._quotas[:-1]
        self._read_before = np.concatenate([np.zeros_like(self._quotas[:1]), np.cumsum(past, axis=0)])

    def split(self, positions: NDArray[np.int64]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Return (dataset, position in its own order) for each position of the run; all arrays are [N]."""
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
    """Map positions to datasets that are read one after the other, each once; for validation."""

    def __init__(self, sizes: Sequence[int]) -> None:
        self._ends = np.cumsum(sizes)

    def split(self, positions: NDArray[np.int64]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Return (dataset, position in its own order) for each position of the run; all arrays are [N]."""
        dataset = np.searchsorted(self._ends, positions, side="right")
        return dataset, positions - np.append(0, self._ends)[dataset]


class MixtureReader:
    """Read samples of several datasets by their position in the run."""

    def __init__(self, order: MixtureOrder | ConcatenatedOrder, readers: Sequence[SampleReader]) -> None:
        self._order, self._readers = order, readers

    def read(self, positions: NDArray[np.int64]) -> NDArray:
        """Return the samples at `positions` of the run, [len(positions), seq_length + 1], in the shards' dtype."""
        dataset, own = self._order.split(positions)
        parts = [(dataset == number, number) for number in np.unique(dataset)]
        read = [(here, self._readers[number].read(own[here])) for here, number in parts]
        samples = np.empty((len(positions), read[0][1].shape[1]), dtype=read[0][1].dtype)
        for here, rows in read:
            samples[here] = rows
        return samples

    def locate(self, position: int) -> tuple[Manifest, ShardInfo, int]:
        """Return the dataset, shard and sample number that `position` is read from."""
        dataset, own = self._order.split(np.array([position]))
        return self._readers[int(dataset[0])].locate(int(own[0]))

    def close(self) -> None:
        """Close the readers of all datasets."""
        for reader in self._readers:
            reader.close()


def _addresses(fields: Any, folder: Path) -> list[tuple[str | Path, str | None]]:
    """Return the addresses of each dataset and its shards; raise KeyError, TypeError or ValueError on a fault."""
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
        raise TypeError(f"{fields!r:.80} is not an object")
    if unknown := sorted(set(fields) - known):
        raise ValueError(f"key {unknown[0]!r} is not one of {', '.join(sorted(known))}")


def _resolved(address: str, folder: Path) -> str | Path:
    return address if is_remote(address) else folder / local_path(address)


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
                    "both have the same tokenizer; prepare it again"
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
    """Return how many of a block's positions each dataset gets: whole numbers of sum BLOCK, by largest remainder."""
    exact = np.array(weights) / sum(weights) * BLOCK
    quotas = np.floor(exact).astype(np.int64)
    largest = np.argsort(-(exact - quotas), kind="stable")[: BLOCK - quotas.sum()]
    quotas[largest] += 1
    return quotas
