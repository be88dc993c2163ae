"""Hostile content: JSON of other types and sizes with sound digests, control characters in names, odd settings."""

import contextlib
import hashlib
import json
import shutil
from pathlib import Path
from typing import Any

from tests.fuzz.property import TEXTS
from tests.torture.attack import Lost, Outcome, Trial, attack
from tests.torture.damage import files_of, restored
from tests.torture.judge import check_ending, judged
from tests.torture.processes import start
from tests.torture.stand import HANG_LIMIT_S, ONE

PLACE = "\0place\0"


def put_value(text: str, trial: Trial) -> tuple[str, str, str]:
    """Replace a random value of a JSON text; return the new text, where the value was, and the value."""
    tree = json.loads(text)
    places = list(_places(tree))
    place = trial.random.choice(places)
    value = trial.random.choice(TEXTS)
    node = tree
    for key in place[:-1]:
        node = node[key]
    if place:
        node[place[-1]] = PLACE
    else:
        tree = PLACE
    shown = value if len(value) < 50 else f"{value[:20]}... ({len(value)} characters)"
    return json.dumps(tree).replace(json.dumps(PLACE), value), ".".join(map(str, place)), shown


def _places(tree: Any, path: tuple[Any, ...] = ()) -> Any:
    yield path
    children = tree.items() if isinstance(tree, dict) else enumerate(tree) if isinstance(tree, list) else ()
    for key, child in children:
        yield from _places(child, (*path, key))


def seal_checkpoint(folder: Path) -> None:
    """Give a checkpoint with a changed table or marker the digests that it states, as a forger would."""
    marker = folder / "checkpoint.json"
    with contextlib.suppress(Exception):
        tree = json.loads(marker.read_text())
        table = (folder / "tensors.json").read_bytes()
        tree["checkpoint"]["files"]["tensors.json"].update(bytes=len(table), sha256=hashlib.sha256(table).hexdigest())
        text = json.dumps(tree["checkpoint"], sort_keys=True)
        tree["sha256"] = hashlib.sha256(text.encode()).hexdigest()
        marker.write_text(json.dumps(tree))


def seal_dataset(folder: Path) -> None:
    """Give a changed manifest the fingerprint of its content."""
    from data.shards.manifest import _fingerprint

    with contextlib.suppress(Exception):
        fields = json.loads((folder / "manifest.json").read_text())
        fields["fingerprint"] = _fingerprint(fields)
        (folder / "manifest.json").write_text(json.dumps(fields))


@attack("hostile")
def value_of_another_kind(trial: Trial) -> Outcome:
    """One value in a JSON file of a killed run or its dataset is of another kind; digests are made to fit."""
    run = trial.half_done()
    dataset = shutil.copytree(trial.stand.dataset, trial.folder / "dataset")
    file = trial.random.choice([path for path in files_of(run) + files_of(dataset) if path.suffix == ".json"])
    sound = file.read_bytes()
    text, place, value = put_value(sound.decode(), trial)
    file.write_text(text)
    trial.did(f"{file.relative_to(trial.folder)}: {place} = {value}")
    aside = {each: each.read_bytes() for each in files_of(file.parent) if each.suffix == ".json" and each != file}
    if "step_" in file.parent.name:
        seal_checkpoint(file.parent)
    seal_dataset(dataset)
    ended = trial.train(run, ONE, f"data.path={dataset}")
    if ended.statuses == [0] and file.name == "manifest.json":
        check_ending(ended)  # another dataset, which the run may even be able to use; the curve is then another too
        return Outcome.SURVIVED
    if judged(run, trial, ended) is Outcome.SURVIVED:
        return Outcome.SURVIVED
    for each, content in aside.items():
        each.write_bytes(content)
    return restored(trial, run, dataset, file, sound)


@attack("hostile")
def row_of_another_kind(trial: Trial) -> Outcome:
    """A line of a .jsonl file of a finished run is hostile: the commands that read it end in order."""
    run = shutil.copytree(trial.stand.straight(), trial.folder / "run", symlinks=True)
    file = run / trial.random.choice(["metrics.jsonl", "entropy.jsonl", "ranks.jsonl", "journal.jsonl"])
    lines = file.read_text().splitlines()
    number = trial.random.randrange(len(lines))
    lines[number], place, value = put_value(lines[number], trial)
    file.write_text("\n".join(lines) + "\n")
    command = trial.random.choice(["train.figures", "train.evaluate", "train.main"])
    trial.did(f"{file.name}:{number + 1}: {place} = {value}; {command}")
    ended = trial.train(run) if command == "train.main" else trial.command(command, "--run", str(run))
    check_ending(ended)
    return Outcome.SURVIVED if ended.statuses == [0] else Outcome.NAMED


@attack("hostile")
def side_file_of_another_kind(trial: Trial) -> Outcome:
    """evaluation.json, goodput.json or config.json of a finished run is hostile: its readers end in order."""
    run = shutil.copytree(trial.stand.straight(), trial.folder / "run", symlinks=True)
    assert trial.command("train.evaluate", "--run", str(run)).statuses == [0]
    file = run / trial.random.choice(["evaluation.json", "goodput.json", "config.json"])
    text, place, value = put_value(file.read_text(), trial)
    file.write_text(text)
    command = trial.random.choice(["train.figures", "train.evaluate"])
    trial.did(f"{file.name}: {place} = {value}; {command}")
    ended = trial.command(command, "--run", str(run))
    check_ending(ended)
    return Outcome.SURVIVED if ended.statuses == [0] else Outcome.NAMED


ODD = ["\x1b[31mred", "a\nb", "\x00", "\u202e", "café", "\x07", "a\tb", " ", "\x7f", "\u2028", "x" * 300, "😀", "%s{}"]
"""Parts of names that people and programs make."""


@attack("hostile")
def odd_names(trial: Trial) -> Outcome:
    """Control characters, lone surrogates and long words in paths, keys and values of the command line and files."""
    odd = trial.random.choice([*ODD, "\udc80", "\udcff\x1b"])
    kind = trial.random.choice(["run_dir", "data.path", "checkpoint.path", "key", "value", "--config", "key in file"])
    trial.did(f"{kind} with {odd!r}")
    config, run, options = trial.stand.config, trial.folder / "run", []
    if kind == "run_dir":
        run = trial.folder / f"run{odd}"
    elif kind == "data.path":
        options = [f"data.path={trial.folder}/none{odd}"]
    elif kind == "checkpoint.path":
        options = [f"checkpoint.path={trial.folder}/to{odd}"]
    elif kind == "key":
        options = [f"training.{odd}=3"]
    elif kind == "value":
        options = [f"model.architecture={odd}"]
    elif kind == "--config":
        config = trial.folder / f"none{odd}.json"
    else:
        config = trial.folder / "odd.json"
        tree = json.loads(trial.stand.config.read_text())
        tree[trial.random.choice(["training", "model", "deepspeed"])] = {odd: odd, "x": [odd]}
        config.write_text(json.dumps(tree))
    ended = start(["train.main", "--config", str(config), f"run_dir={run}", *options], trial.folder).wait(HANG_LIMIT_S)
    check_ending(ended)
    return Outcome.SURVIVED if ended.statuses == [0] else Outcome.NAMED


SETTINGS = [
    *("training.train_steps={}", "training.train_tokens={}", "health.step_limit_s={}", "health.start_limit_s={}"),
    *("model.num_layers={}", "model.hidden_size={}", "optimizer.learning_rate={}", "checkpoint.keep={}"),
    *("data.fetch_time_limit_s={}", "data.cache_gigabytes={}", "training.seed={}", "logging.interval={}"),
    *("parallel.tensor_parallel_size={}", "checkpoint.interval={}", "training.micro_batch_size={}"),
    *("deepspeed.zero_optimization.offload_optimizer={}", "deepspeed.wandb={}", "deepspeed.no_such_key={}"),
    *("deepspeed.steps_per_print={}", "data.prefetch_micro_batches={}", "data.shuffle_window_shards={}"),
    *("health.save_limit_s={}", "regularizer.margin={}", "model.rope_base={}", "deepspeed={}", "model={}"),
]
NUMBERS = ["9" * 400, "1e300", "-1", "0", "1e-300", "NaN", "Infinity", "1e400", '"x"', "null", "[]", "{}", "true"]


@attack("hostile")
def odd_settings(trial: Trial) -> Outcome:
    """A setting is absurd: one message, or a run."""
    setting = trial.random.choice(SETTINGS)
    value = trial.random.choice([*NUMBERS, '{"device": "cpu"}', '{"enabled": true}'])
    option = setting.format(value)
    trial.did(option[:80])
    extra = [] if setting.startswith("training.train_") else ["training.train_steps=2"]
    command = ["train.main", "--config", str(trial.stand.config), f"run_dir={trial.folder / 'run'}", option, *extra]
    dry = ["--dry-run"] if setting.startswith(("training.train_", "model.")) else []
    ended = start([*command, *dry], trial.folder).wait(HANG_LIMIT_S)
    check_ending(ended)
    if ended.statuses == [0] and "no_such_key" in setting:
        raise Lost("an unknown key is ignored without a word")
    return Outcome.SURVIVED if ended.statuses == [0] else Outcome.NAMED
