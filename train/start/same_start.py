"""All ranks run the same thing, or none starts: compared before any device is touched.

Every rank puts a digest of its facts into the store through which the ranks find each other. Rank 0 compares them and
gives its verdict. Only on a difference does one rank of each side send the facts themselves.
"""

import contextlib
import hashlib
import time
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING

from data.errors import DataError
from data.files.strict_json import parse_json, to_json
from data.shards.manifest import Manifest
from train.config import Config, ConfigError, load_config
from train.config.sections import HealthConfig
from train.run.provenance import git_commit
from train.start.compiled_code import keep_compiled_code_private
from train.start.differences import Side, describe_differences, name_ranks
from train.start.facts import Facts, config_facts, dataset_facts, environment_facts, source_facts
from train.start.preflight import preflight
from train.start.timeline import describe, phase

if TYPE_CHECKING:
    from torch.distributed import Store

REFUSAL_LIMIT_S = 60.0
"""How long a rank that refuses to start waits for the others, to tell them."""
VERDICT_LIMIT_S = 60.0
"""How long the ranks wait for each other once all have arrived."""
POLL_INTERVAL_S = 2.0
"""How often rank 0 looks which ranks are missing."""
MAX_SIDES = 16
"""Of so many sides the facts are compared."""


class DifferenceError(ValueError):
    """The ranks do not run the same thing; a line for each difference, the same text on every rank."""


class LateError(RuntimeError):
    """A rank has not arrived within the time limit; one clear line."""


def start_together(path: str | Path, overrides: list[str]) -> tuple[Config, Manifest]:
    """Load and check a configuration and its dataset, once all ranks have found the same.

    Raises:
        ConfigError, DataError: every rank refuses to start, for the same reason; or this one does, and the others
            cannot be told.
        DifferenceError: ranks differ.
        LateError: a rank has not arrived within health.start_limit_s.
        LaunchError: the ranks cannot find each other.
    """
    from parallel.launch import choose_accelerator, world_size

    size, facts, fault = world_size(), Facts(), None
    limit_s = HealthConfig().start_limit_s
    try:
        with phase("check"):
            keep_compiled_code_private()
            config = load_config(path, overrides)
            facts |= config_facts(config)
            limit_s = config.health.start_limit_s
            manifest = preflight(config, size)
            facts |= dataset_facts(manifest)
    except (ConfigError, DataError) as error:
        fault = error
    if size > 1:
        choose_accelerator()
        with phase("ranks"):
            compare_ranks({**facts, **environment_facts(), **source_facts()}, fault, limit_s)
    if fault is not None:
        raise fault
    return config, manifest


def compare_ranks(facts: Facts, fault: Exception | None, limit_s: float) -> None:
    """Return once all ranks have been found to have the same facts and the same fault.

    Args:
        facts: this rank's.
        fault: why this rank refuses to start, or None.
        limit_s: seconds to wait for the other ranks.

    Raises:
        DifferenceError, LateError, LaunchError: as in `start_together`.
    """
    from parallel.launch import LaunchError, meet, rank, world_size

    if fault is not None:
        limit_s = min(limit_s, REFUSAL_LIMIT_S)
    mine = Side([rank()], facts, str(fault or ""))
    began = time.monotonic()
    try:
        store = meet(limit_s)
        verdict = exchange(store, mine, world_size(), limit_s, time.monotonic() - began)
    except (LaunchError, LateError):
        if fault is not None:
            raise fault from None
        raise
    if verdict:
        raise DifferenceError("\n".join(verdict))


def exchange(store: "Store", mine: Side, world_size: int, limit_s: float, waited_s: float = 0.0) -> list[str]:
    """Compare this rank's side with the others'; return the differences, or no lines where there are none.

    Every rank does the same few operations on the store, whatever the world size. Of `limit_s` seconds for all to
    arrive, `waited_s` have passed.
    """
    from torch.distributed import PrefixStore

    store, here = PrefixStore("same_start", store), mine.ranks[0]
    store.set(f"digest/{here}", digest(mine))
    if here != 0:
        return _follow(store, mine, limit_s)
    names = [f"digest/{rank}" for rank in range(world_size)]
    if not _wait_for_all(store, names, max(limit_s - waited_s, 1.0)):
        raise LateError(_tell_late(store, world_size, limit_s))
    ranks = defaultdict(list)
    for rank, each in enumerate(store.multi_get(names)):
        ranks[each].append(rank)
    if len(ranks) == 1:
        store.set("asked", "[]")
        if mine.fault:  # with which all ranks end now, and the store with this one
            _wait_until_read(store, range(world_size))
        return []
    return _judge(store, mine, list(ranks.values()), world_size)


def _wait_for_all(store: "Store", names: list[str], limit_s: float) -> bool:
    """On rank 0: return whether every rank sets its key within the limit; meanwhile show which have not.

    Args:
        names: of the keys, in the order of ranks.
    """
    ends_at = time.monotonic() + limit_s
    while (left_s := ends_at - time.monotonic()) > 0:
        try:
            store.wait(names, timedelta(seconds=min(POLL_INTERVAL_S, left_s)))
            return True
        except RuntimeError:
            absent = [rank for rank, name in enumerate(names) if not store.check([name])]
            describe(f"{name_ranks(absent)} of {len(names)}")
    return False


def digest(side: Side) -> str:
    """Identify what a rank runs, and why it refuses to."""
    return hashlib.sha256(to_json([side.facts, side.fault], sort_keys=True).encode()).hexdigest()


def _judge(store: "Store", mine: Side, groups: list[list[int]], world_size: int) -> list[str]:
    """On rank 0: ask one rank of each group for its facts, tell all what differs, and wait until they have read it."""
    asked = [ranks[0] for ranks in groups[1:MAX_SIDES]]
    store.set("asked", to_json(asked))
    sides = [Side(groups[0], mine.facts, mine.fault, git_commit() or "")]
    with _limited(lambda: f"{name_ranks(asked)} left while the ranks were being compared"):
        store.wait([f"facts/{rank}" for rank in asked], timedelta(seconds=VERDICT_LIMIT_S))
    for ranks in groups[1:MAX_SIDES]:
        sides.append(Side(ranks, *parse_json(store.get(f"facts/{ranks[0]}"))))
    lines = describe_differences(sides)
    if left := [rank for ranks in groups[MAX_SIDES:] for rank in ranks]:
        lines.append(f"{name_ranks(left)} differ too, each in its own way")
    store.set("verdict", to_json(lines))
    _wait_until_read(store, range(world_size))
    return lines


def _follow(store: "Store", mine: Side, limit_s: float) -> list[str]:
    """On the other ranks: wait for rank 0, send it the facts if it asks for them, and return its verdict."""
    here = mine.ranks[0]
    with _limited(lambda: f"rank {here} got no answer from rank 0; its own message says why"):
        store.wait(["asked"], timedelta(seconds=limit_s + VERDICT_LIMIT_S))
        asked = parse_json(store.get("asked"))
        if not asked:
            store.set(f"read/{here}", "")
            return []
        if "late" in asked:
            store.set(f"read/{here}", "")
            raise LateError(asked["late"])
        if here in asked:
            store.set(f"facts/{here}", to_json([mine.facts, mine.fault, git_commit() or ""]))
        store.wait(["verdict"], timedelta(seconds=2 * VERDICT_LIMIT_S))
        lines = parse_json(store.get("verdict"))
        store.set(f"read/{here}", "")
    return list(lines)


@contextlib.contextmanager
def _limited(message: Callable[[], str]) -> Iterator[None]:
    """Turn the store's error, which names keys and sockets, into one that says what was awaited."""
    try:
        yield
    except LateError:
        raise
    except RuntimeError:
        raise LateError(message()) from None


def _tell_late(store: "Store", world_size: int, limit_s: float) -> str:
    """On rank 0: tell the ranks that have arrived which have not, and return the message."""
    here = [rank for rank in range(world_size) if store.check([f"digest/{rank}"])]
    absent = set(range(world_size)).difference(here)
    text = (
        f"{name_ranks(absent)} of {world_size} did not arrive within {limit_s:g} seconds (health.start_limit_s); look "
        "at what the launcher says of them"
    )
    store.set("asked", to_json({"late": text}))
    _wait_until_read(store, here)
    return text


def _wait_until_read(store: "Store", ranks: Iterable[int]) -> None:
    """Wait until ranks have read the verdict: the store ends with rank 0's process. A rank that has gone needs none."""
    with contextlib.suppress(RuntimeError):
        store.wait([f"read/{rank}" for rank in ranks if rank != 0], timedelta(seconds=VERDICT_LIMIT_S))
