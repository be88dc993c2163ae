"""Read the hypotheses of a suite file, which are written down before its runs.

    {"name": "H1", "kind": "equivalent", "arms": ["EReg", "SM(t)"], "at": {"optimizer.learning_rate": 1e-3},
     "margin_nats": 0.01, "claim": "At equal low rate the regularizer changes nothing."}

kind          claims that                                               further keys
equivalent    the arms' losses differ by less than the margin           margin_nats
better        the first arm's loss is below the second's
more_stable   fewer of the first arm's runs are lost                    factor, within_nats
gap_shrinks   the gap between the arms falls as tokens grow

`at` says which runs of an arm count: {"section.key": value}, or "own best" for the best value of its sweep. An arm that
sweeps nothing needs none. `more_stable` without `at` compares whole sweeps. `tokens` chooses a budget; without it the
largest counts.
"""

from dataclasses import dataclass
from typing import Any

from data.files.strict_json import shown

Tree = dict[str, Any]
RATE = "optimizer.learning_rate"
OWN_BEST = "own best"
KINDS = {
    "equivalent": {"margin_nats"},
    "better": set(),
    "more_stable": {"factor", "within_nats"},
    "gap_shrinks": set(),
}
COMMON = {"name", "kind", "arms", "at", "tokens", "claim"}


@dataclass(frozen=True)
class Hypothesis:
    """A claim about two arms of a suite.

    Attributes:
        name: short, say "H1".
        kind: one of KINDS.
        arms: the two arms, as `curve_of` names them; the claim favours the first.
        at: values of keys that choose the runs; OWN_BEST; or None.
        margin_nats: within which losses are equivalent.
        factor: how many times as large the first arm's largest stable value is to be.
        within_nats: runs that end this much above their arm's best mean loss are lost too; None counts divergences
            alone.
        tokens: the budget; None takes the largest.
        claim: in words.
    """

    name: str
    kind: str
    arms: tuple[str, str]
    at: Tree | str | None = None
    margin_nats: float = 0.0
    factor: float = 1.0
    within_nats: float | None = None
    tokens: int | None = None
    claim: str = ""


def curve_of(arm: str, swept: Tree) -> tuple[str, str | None, Any]:
    """Return which curve a run lies on, the key of its axis, and its place there.

    The axis is the learning rate if it is swept, else the only key that is. Values of other keys make curves of their
    own: `("EReg", {"model.num_layers": 6, "optimizer.learning_rate": 0.001})` lies on "EReg-num_layers6".
    """
    key = RATE if RATE in swept else next(iter(swept)) if len(swept) == 1 else None
    others = [f"{name.partition('.')[2]}{value}" for name, value in swept.items() if name != key]
    return "-".join([arm, *others]), key, None if key is None else swept[key]


def hypotheses_from(trees: list[Tree], curves: dict[str, int], faults: list[str]) -> tuple[Hypothesis, ...]:
    """Check and return the hypotheses of a suite file.

    Args:
        trees: as the file has them.
        curves: how many values each curve of the suite has.
        faults: receives a line for each fault.
    """
    found = []
    for number, tree in enumerate(trees):
        where = f"hypotheses[{number}]"
        mine = [f"{where}: {fault}" for fault in _faults(tree, curves)]
        faults += mine
        if not mine:
            found.append(Hypothesis(**{**tree, "arms": tuple(tree["arms"])}))
    names = [each.name for each in found]
    faults += [f"two hypotheses are called {name}" for name in sorted(set(names)) if names.count(name) > 1]
    return tuple(found)


def _faults(tree: Tree, curves: dict[str, int]) -> list[str]:
    kind = tree.get("kind")
    if not isinstance(kind, str) or kind not in KINDS:
        return [f"kind = {shown(kind)} must be one of {', '.join(KINDS)}"]
    known = COMMON | KINDS[kind]
    found = [f"{key!r} is no key of kind {kind}; known keys: {', '.join(sorted(known))}" for key in tree.keys() - known]
    for key in ("name", "claim") if "claim" in tree else ("name",):
        if not isinstance(tree.get(key), str) or not tree[key].strip() or not tree[key].isprintable():
            found.append(f"{key} = {shown(tree.get(key))} must be a line of text")
    for key in ("margin_nats", "factor", "within_nats", "tokens"):
        if key in tree and (type(tree[key]) not in (int, float) or not tree[key] > 0):
            found.append(f"{key} = {shown(tree[key])} must be a positive number")
    if kind == "equivalent" and "margin_nats" not in tree:
        found.append("margin_nats is missing; say within how many nats losses count as equivalent")
    if kind == "gap_shrinks" and "tokens" in tree:
        found.append("tokens does not fit, since gap_shrinks compares all budgets; leave it out")
    arms = tree.get("arms")
    if not isinstance(arms, list) or len(arms) != 2 or arms[0] == arms[1]:
        return found + [f"arms = {shown(arms)} must be two arms, the one that the claim favours first"]
    for arm in arms:
        if not isinstance(arm, str) or arm not in curves:
            found.append(f"arms: {shown(arm)} is no arm of the suite; its arms are {', '.join(curves)}")
        elif fault := _misplaced(tree, arm, curves[arm]):
            found.append(fault)
    return found


def _misplaced(tree: Tree, arm: str, values: int) -> str:
    """Return what is wrong with `at` for an arm; '' if nothing is."""
    at, kind = tree.get("at"), tree["kind"]
    if at is not None and at != OWN_BEST and not _is_place(at):
        return f'at = {shown(at)} must be "{OWN_BEST}" or values of keys, say {{"{RATE}": 1e-3}}'
    if at == OWN_BEST and (kind in ("more_stable", "gap_shrinks") or values < 2):
        why = f"{arm} sweeps nothing" if values < 2 else f"{kind} compares given runs"
        return f'at = "{OWN_BEST}" does not fit, since {why}; leave it out, or name a value'
    if at is None and values > 1 and kind != "more_stable":
        remedy = "name one" if kind == "gap_shrinks" else f'name one, or write "{OWN_BEST}"'
        return f"at is missing, and {arm} has {values} values; {remedy}"
    if "factor" in tree and (at is not None or values < 2):
        why = "at chooses given runs" if at is not None else f"{arm} sweeps nothing"
        return f"factor compares whole sweeps, and {why}; leave it out"
    return ""


def _is_place(at: Any) -> bool:
    return isinstance(at, dict) and at != {} and all(key.count(".") == 1 for key in at)


def is_at(config: Tree, at: Tree) -> bool:
    """Return whether a configuration (sections of keys) has the values that `at` names."""
    parts = {key: key.split(".") for key in at}
    return all(config.get(section, {}).get(name) == at[key] for key, (section, name) in parts.items())
