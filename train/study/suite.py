"""Load a suite file and plan its runs.

    {"name": "table2", "output": "runs/table2", "seeds": [1, 2, 3],
     "base": {"data": {"path": "datasets/mine"}, "training": {"train_tokens": 50e6}},
     "runs": [{"rows": "Table 2"},
              {"rows": "codeparrot-12L-T128.SM+G", "config": {"optimizer": {"learning_rate": 3e-4}}},
              {"name": "wide", "config": {"model": {"hidden_size": 1024}}, "budgets_tokens": [50e6, 100e6, 200e6]}]}

`rows` names a table, a figure or one row of the paper (python -m train.paper list), "all", or a list of such names. A
run's configuration is the row's, overridden by the suite's `base`, overridden by its own `config`.

An entry with `"sweep": {"optimizer.learning_rate": [5e-4, 1e-3]}` is an arm of the study. It makes one run for each
value, called `NAME-learning_rate0.0005` and so on; with several keys, one for each combination.

Top-level `hypotheses` states what the study claims, before it is run (train/study/statistics/hypotheses.py).

A run with `budgets_tokens` serves several budgets. Its trunk trains to the largest one at a constant rate (schedule
'wsd'). For each budget a branch leaves the trunk, and its rate decays to zero.

A run with `conversion` is a chain of trainings, each of which starts from the weights of the one before, converted to
its own architecture (docs/guides/convert.md). A stage keeps what the stage before it has set. The first starts from
`checkpoint.init_from`, or from the seed. The last stage's evaluation is the run's result.

    {"name": "from_gpt2", "config": {"checkpoint": {"init_from": "models/gpt2"}},
     "conversion": [{"name": "linear", "config": {"model": {"activation": "identity", "fused_ffn": true}}},
                    {"name": "no_norms", "config": {"model": {"norm": "none", "temperature": "per_head"}}}]}
"""

import dataclasses
import itertools
import re
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from data.files.address import local_path
from data.files.strict_json import shown
from train.config import Config, ConfigError, allows_commands, config_from_dict
from train.config.tree import apply_override, read_json, shipped
from train.paper import Row, places, rows_at
from train.study.outcome import Outcome
from train.study.statistics.hypotheses import Hypothesis, curve_of, hypotheses_from, is_at

Tree = dict[str, Any]
Shape = tuple[Callable[[Any], bool], str]
MOST_TOKENS = 10**15


def _is_text(value: Any) -> bool:
    return isinstance(value, str) and value.strip() != "" and value.isprintable()


def _is_folder_name(value: Any) -> bool:
    """Whether it names one folder in another: no path that leads elsewhere, or into a run."""
    return _is_text(value) and "/" not in value and value not in (".", "..") and len(value) <= 200


def _is_sections(value: Any) -> bool:
    return isinstance(value, dict) and all(isinstance(section, dict) for section in value.values())


def _is_list_of(fits: Callable[[Any], bool]) -> Callable[[Any], bool]:
    return lambda value: isinstance(value, list) and value != [] and all(map(fits, value))


def _is_rows(value: Any) -> bool:
    return _is_text(value) or _is_list_of(_is_text)(value)


def _is_sweep(value: Any) -> bool:
    keys = value if isinstance(value, dict) else {}
    named = all(re.fullmatch(r"[a-z_]+\.[a-z_0-9]+", key) for key in keys)
    return bool(keys) and named and all(_is_list_of(_is_swept)(values) for values in keys.values())


def _is_swept(value: Any) -> bool:
    return isinstance(value, bool | int | float) or _is_folder_name(value)


def _is_chain(value: Any) -> bool:
    """Whether it is a list of stages, each with a name of its own."""
    if not _is_list_of(lambda stage: isinstance(stage, dict) and {"name"} <= stage.keys() <= {"name", "config"})(value):
        return False
    fits = all(_is_folder_name(stage["name"]) and _is_sections(stage.get("config", {})) for stage in value)
    return fits and len({stage["name"] for stage in value}) == len(value)


def _is_tokens(value: Any) -> bool:
    return type(value) in (int, float) and 0 < value <= MOST_TOKENS


FOLDER_NAME: Shape = (_is_folder_name, "a word, which names a folder: no '/', at most 200 characters")
SECTIONS: Shape = (_is_sections, 'an object of sections, say {"model": {"num_layers": 6}}')
KEYS: dict[str, Shape] = {
    "name": FOLDER_NAME,
    "output": (_is_text, "a folder, say runs/mine"),
    "seeds": (_is_list_of(lambda value: type(value) is int), "a list of whole numbers"),
    "base": SECTIONS,
    "runs": (_is_list_of(lambda value: isinstance(value, dict)), "a list of objects with at least one"),
    "hypotheses": (_is_list_of(lambda value: isinstance(value, dict)), "a list of objects with at least one"),
}
RUN_KEYS: dict[str, Shape] = {
    "rows": (_is_rows, "a name or a list of names (python -m train.paper list)"),
    "name": FOLDER_NAME,
    "config": SECTIONS,
    "sweep": (_is_sweep, 'lists of values by key, say {"optimizer.learning_rate": [5e-4, 1e-3]}'),
    "budgets_tokens": (_is_list_of(_is_tokens), f"a list of token counts up to {MOST_TOKENS:g}"),
    "conversion": (_is_chain, 'a list of stages, say [{"name": "linear", "config": {"model": {...}}}, ...]'),
}


class SuiteError(ValueError):
    """The suite cannot be used; the message has one line a fault."""


@dataclass(frozen=True)
class Stage:
    """One training: a run, the trunk or a branch of a run with budgets, or a stage of a conversion.

    Attributes:
        config: resolved; its run_dir is the folder that the stage trains in.
        copied_from: the trunk's folder, for a branch; else None.
        copied_step: step of the trunk at which the branch starts.
        is_result: whether its last evaluation is a result; that of a trunk or of an earlier stage is not.
        saved: its result in a file of finished ones; None if there is none.
        saved_in: that file.
    """

    config: Config
    copied_from: Path | None = None
    copied_step: int = 0
    is_result: bool = True
    saved: Outcome | None = None
    saved_in: Path | None = None

    @property
    def folder(self) -> Path:
        return Path(self.config.run_dir)


@dataclass(frozen=True)
class PlannedRun:
    """One model trained from one seed.

    Attributes:
        name: its label and seed; its folder below the suite's.
        label: the suite file's name for the model, the same for all seeds.
        arm: the entry's name or the row's, the same for all seeds and all values that are swept.
        swept: value of each key that the entry sweeps, as `section.key`.
        stages: in the order of training; one, or with budgets a trunk and a branch for each, or those of a conversion.
        row: of the paper, if it is one.
    """

    name: str
    label: str
    seed: int
    stages: tuple[Stage, ...]
    row: Row | None = None
    arm: str = ""
    swept: dict[str, Any] = field(default_factory=dict)

    @property
    def names(self) -> tuple[str, str, str]:
        """What a user may call it by, alone or with others."""
        return self.name, self.label, self.arm


@dataclass(frozen=True)
class Suite:
    """All runs of a study, and what it claims of them; `output` is the folder that holds theirs."""

    name: str
    output: Path
    runs: tuple[PlannedRun, ...] = field(default=())
    hypotheses: tuple[Hypothesis, ...] = ()

    def chosen(self, names: Sequence[str]) -> list[PlannedRun]:
        """Return the runs that go by these names, in the names' order; without names all, the first seeds first.

        Raises:
            SuiteError: no run goes by one of the names.
        """
        if not names:
            return sorted(self.runs, key=lambda run: run.seed)
        for name in names:
            if not any(name in run.names for run in self.runs):
                all_names = ", ".join(run.name for run in self.runs)
                raise SuiteError(f"--only {name!r} is no run of the suite; its runs are {all_names}")
        return list({run.name: run for name in names for run in self.runs if name in run.names}.values())


def load_suite(path: Path, overrides: list[str] | None = None) -> Suite:
    """Load a suite file.

    Args:
        path: of the file.
        overrides: `section.key=value` for every run, which win over the file; `output=DIR` sets the suite's folder.

    Raises:
        SuiteError: lists every fault of the file and of the configurations that it makes.
    """
    path = shipped(path)
    if not path.exists():
        raise SuiteError(f"{path}: no such suite file; shipped ones are configs/suites/*.json")
    try:
        tree = read_json(path)
    except ConfigError as error:
        raise SuiteError(str(error)) from None
    faults: list[str] = []
    changed: Tree = {}
    for override in overrides or []:
        apply_override(changed, override, faults)
    allow_commands = allows_commands(overrides or [])
    if isinstance(changed.get("data"), dict):
        changed["data"].pop("allow_commands", None)
    if "output" in changed:
        tree["output"] = changed.pop("output")
    faults += _misfits({"overrides": changed}, {"overrides": SECTIONS}, "") + _shape_faults(tree)
    if faults:
        raise SuiteError("\n".join(f"{path}: {fault}" for fault in faults))
    output = local_path(tree.get("output", f"runs/{tree['name']}"))
    runs: list[PlannedRun] = []
    for number, entry in enumerate(tree["runs"]):
        for model in _models(entry, tree.get("base", {})):
            for seed in tree.get("seeds", [1]):
                try:
                    whole = merged(model.tree, changed)
                    runs.append(_planned(model, whole, entry, changed, seed, output, allow_commands))
                except ConfigError as error:
                    faults += [f"runs[{number}] {model.label}: {fault}" for fault in error.faults]
                    break
    names = [run.name for run in runs]
    faults += [f"two runs are called {name}; give one another name" for name in set(names) if names.count(name) > 1]
    hypotheses = _hypotheses(tree.get("hypotheses", []), runs, faults) if not faults else ()
    if faults:
        raise SuiteError("\n".join(f"{path}: {fault}" for fault in faults))
    return Suite(tree["name"], output, tuple(runs), hypotheses)


def _hypotheses(trees: list[Tree], runs: list[PlannedRun], faults: list[str]) -> tuple[Hypothesis, ...]:
    """Return the hypotheses of the file; each speaks of runs that the suite has."""
    curves: dict[str, set[str]] = {}
    for run in runs:
        name, _, value = curve_of(run.arm, run.swept)
        curves.setdefault(name, set()).add(str(value))
    found = hypotheses_from(trees, {name: len(values) for name, values in curves.items()}, faults)
    for hypothesis in found:
        at = hypothesis.at
        if not isinstance(at, dict):
            continue
        for arm in hypothesis.arms:
            there = [run for run in runs if curve_of(run.arm, run.swept)[0] == arm]
            chosen = {str(run.swept) for run in there if is_at(run.stages[-1].config.as_dict(), at)}
            if not chosen:
                faults.append(f"hypothesis {hypothesis.name}: no run of {arm} has {shown(at)}")
            elif len(chosen) > 1 and hypothesis.kind != "more_stable":
                faults.append(f"hypothesis {hypothesis.name}: {len(chosen)} values of {arm} have {shown(at)}; name one")
    return found


def _shape_faults(tree: Tree) -> list[str]:
    faults = _misfits(tree, KEYS, "", {"name", "runs"})
    for number, entry in enumerate(tree["runs"] if not faults else []):
        where = f"runs[{number}]"
        misfits = _misfits(entry, RUN_KEYS, f"{where}: ")
        if not misfits and ("rows" in entry) == ("name" in entry):
            misfits.append(f"{where}: set either rows (of the paper) or name (of a run of your own)")
        if not misfits and {"budgets_tokens", "conversion"} <= entry.keys():
            misfits.append(f"{where}: a conversion has no budgets_tokens; give its stages training.train_tokens")
        for name in _row_names(entry) if not misfits else []:
            if not rows_at(name):
                misfits.append(
                    f"{where}: rows = {name!r} is unknown; choose among all, {', '.join(places())}, or a row's "
                    "name (python -m train.paper list)"
                )
        faults += misfits
    return faults


def _misfits(tree: Tree, shapes: dict[str, Shape], where: str, needed: Collection[str] = ()) -> list[str]:
    """List keys that are unknown or missing, and values that do not have the shape of their key."""
    known = f"known keys: {', '.join(sorted(shapes))}"
    faults = [f"{where}{key!r} is no known key; {known}" for key in sorted(tree.keys() - shapes)]
    faults += [f"{where}{key} is missing; expected {shapes[key][1]}" for key in sorted(set(needed) - tree.keys())]
    for key in sorted(tree.keys() & shapes):
        fits, expected = shapes[key]
        if not fits(tree[key]):
            faults.append(f"{where}{key} = {shown(tree[key])} must be {expected}")
    return faults


@dataclass(frozen=True)
class _Model:
    """What an entry of a suite says of one model, the same for all seeds; `tree` is its configuration."""

    arm: str
    row: Row | None
    tree: Tree
    swept: dict[str, Any]

    @property
    def label(self) -> str:
        """The arm and what is swept, which names a folder: 'EReg-learning_rate0.001'."""
        return "-".join([self.arm, *(f"{key.partition('.')[2]}{value}" for key, value in self.swept.items())])


def _models(entry: Tree, base: Tree) -> Iterator[_Model]:
    """Yield each model that an entry names, once for each combination of what it sweeps."""
    own, sweep = entry.get("config", {}), entry.get("sweep", {})
    arms: list[tuple[str, Row | None, Tree]] = [(entry.get("name", ""), None, merged(base, own))]
    if "rows" in entry:
        rows = {row.name: row for name in _row_names(entry) for row in rows_at(name)}
        arms = [(name, row, merged(row.tree(), base, own)) for name, row in rows.items()]
    for arm, row, tree in arms:
        for values in itertools.product(*sweep.values()):
            swept = dict(zip(sweep, values, strict=True))
            sections = [{section: {name: value}} for key, value in swept.items() for section, name in [key.split(".")]]
            yield _Model(arm, row, merged(tree, *sections), swept)


def _row_names(entry: Tree) -> list[str]:
    rows = entry.get("rows", [])
    return list(rows) if isinstance(rows, list) else [rows]


def merged(*trees: Tree) -> Tree:
    """Merge configuration trees. Later ones win key by key; a length in steps replaces one in tokens and vice versa."""
    result: Tree = {}
    for tree in trees:
        for key, value in tree.items():
            if isinstance(value, dict) and isinstance(result.get(key), dict):
                if key == "training" and {"train_steps", "train_tokens"} & set(value):
                    result[key] = {k: v for k, v in result[key].items() if k not in ("train_steps", "train_tokens")}
                result[key] = {**result[key], **value}
            else:
                result[key] = dict(value) if isinstance(value, dict) else value
    return result


def _planned(
    model: _Model, tree: Tree, entry: Tree, changed: Tree, seed: int, output: Path, allow_commands: bool
) -> PlannedRun:
    """Plan one run of an entry; `changed` holds the overrides of the command line, which win over stages too."""
    budgets: list[float] | None = entry.get("budgets_tokens")
    name = f"{model.label}/seed{seed}"
    if budgets:
        tree = merged(tree, {"training": {"train_tokens": int(max(budgets))}})
    tree = merged(tree, {"training": {"seed": seed}, "run_dir": str(output / name)})
    stages: tuple[Stage, ...]
    if "conversion" in entry:
        stages = tuple(_chained(tree, entry["conversion"], changed, allow_commands))
    else:
        config = config_from_dict(tree, allow_commands)
        stages = branched(config, [int(budget) for budget in budgets]) if budgets else (Stage(config),)
    return PlannedRun(name, model.label, seed, stages, model.row, model.arm, model.swept)


def _chained(tree: Tree, stages: list[Tree], changed: Tree, allow_commands: bool) -> Iterator[Stage]:
    """Yield the stages of a conversion, each of which starts from the one before."""
    folder, faults = tree["run_dir"], []
    for stage in stages:
        tree = merged(tree, stage.get("config", {}), changed, {"run_dir": f"{folder}/{stage['name']}"})
        try:
            yield Stage(config_from_dict(tree, allow_commands), is_result=stage is stages[-1])
        except ConfigError as error:
            faults += [f"conversion {stage['name']}: {fault}" for fault in error.faults]
        tree = merged(tree, {"checkpoint": {"init_from": tree["run_dir"]}})
    if faults:
        raise ConfigError(faults)


def branched(config: Config, budgets_tokens: list[int]) -> tuple[Stage, ...]:
    """Plan a run with budgets: a trunk at a constant rate, and a branch for each budget.

    Over the last decay_fraction of its budget, a branch's rate falls to the floor. The trunk stops where a branch
    starts, and is resumed after it. Each branch is the run that a 'wsd' schedule of its own length would have given: up
    to its start both have the same rate.

    Args:
        config: of the whole run.
        budgets_tokens: in any order.

    Returns:
        For each budget, smallest first: the trunk up to the branch, then the branch.
    """
    optimizer = dataclasses.replace(config.optimizer, schedule="wsd")
    warmup = round(optimizer.warmup_fraction * config.train_steps)
    warmup = optimizer.warmup_steps if optimizer.warmup_steps is not None else warmup
    optimizer = dataclasses.replace(optimizer, warmup_steps=warmup)
    steady = dataclasses.replace(optimizer, decay_fraction=0.0)
    folder = Path(config.run_dir)
    budgets = sorted(set(budgets_tokens))
    keep = max(config.checkpoint.keep, len(budgets))  # a branch that was deleted starts again from its own
    kept = dataclasses.replace(config.checkpoint, keep=keep)
    stages = []
    for budget in budgets:
        steps = max(1, round(budget / config.tokens_per_step))
        branch_step = max(1, min(round((1 - optimizer.decay_fraction) * steps), steps - 1)) if steps > 1 else 1
        trunk = _with(config, steady, branch_step, folder / "trunk", final_evaluation_only=True)
        trunk = dataclasses.replace(trunk, checkpoint=kept)
        branch = _with(config, optimizer, steps, folder / f"tokens{steps * config.tokens_per_step}")
        stages += [Stage(trunk, is_result=False), Stage(branch, folder / "trunk", branch_step)]
    return tuple(stages)


def _with(config: Config, optimizer: Any, steps: int, folder: Path, final_evaluation_only: bool = False) -> Config:
    training = dataclasses.replace(config.training, train_steps=steps, train_tokens=None)
    if final_evaluation_only:
        training = dataclasses.replace(training, evaluation_interval=0)
    return dataclasses.replace(config, optimizer=optimizer, training=training, run_dir=str(folder))
