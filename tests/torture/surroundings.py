"""The environment: remains of a launcher, no HOME, a long TMPDIR, a user without a name, the launcher's own end."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil

from tests.torture.attack import Lost, Outcome, Trial, attack
from tests.torture.judge import check_ending, errors, judged, rows
from tests.torture.processes import ROOT, start
from tests.torture.stand import HANG_LIMIT_S, TP2


@attack("surroundings")
def remains_of_a_launcher(trial: Trial) -> Outcome:
    """Some of a launcher's variables remain in the environment: a command runs alone or says what is missing."""
    variables = trial.random.choice(
        [
            {"WORLD_SIZE": "2"},
            {"RANK": "1"},
            {"RANK": "0", "WORLD_SIZE": "2"},
            {"RANK": "1", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29511"},
            {"RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29512"},
            {"LOCAL_RANK": "3"},
            {"WORLD_SIZE": "0"},
            {"RANK": "5", "WORLD_SIZE": "2"},
            {"WORLD_SIZE": "-1"},
            {"MASTER_PORT": "99999", "RANK": "0", "WORLD_SIZE": "1"},
            {"RANK": "", "WORLD_SIZE": ""},
            {"WORLD_SIZE": "9" * 400, "RANK": "0"},
        ]
    )
    command = trial.random.choice(["train.main", "train.main", "train.evaluate"])
    layout = trial.random.choice([(), TP2.overrides])
    trial.did(f"{command} {' '.join(layout)} with {variables}")
    run = trial.half_done()
    if command == "train.main":
        ended = start(
            [command, "--config", str(trial.stand.config), f"run_dir={run}", *layout, "health.start_limit_s=8"],
            trial.folder,
            1,
            {**variables},
        ).wait(HANG_LIMIT_S)
        alone = ended.statuses == [0] and variables.get("WORLD_SIZE", "1") not in ("1", "")
        if alone:
            raise Lost(f"trains alone with {variables}")
    else:
        ended = start([command, "--run", str(run)], trial.folder, 1, {**variables}).wait(HANG_LIMIT_S)
    check_ending(ended)
    return Outcome.SURVIVED if ended.statuses == [0] else Outcome.NAMED


def others_can_read(folder: str) -> bool:
    """Whether another user can import what is installed in a folder and beside the real interpreter."""
    paths = [Path(folder).resolve(), Path(sys.base_prefix).resolve(), ROOT]
    return all(each.stat().st_mode & 0o001 for path in paths for each in (path, *path.parents))


@attack("surroundings")
def poor_environment(trial: Trial) -> Outcome:
    """HOME is unset, missing or read-only, TMPDIR is long or gone, the user has no name: commands work all the same."""
    environment = trial.random.choice(
        [
            {"HOME": None, "USER": None, "LOGNAME": None},
            {"HOME": "/no/such/home"},
            {"HOME": ""},
            {"HOME": "/dev/null"},
            {"TMPDIR": "/no/such/folder"},
            {"TMPDIR": f"{trial.folder}/{'t' * 105}"},
            {"LANG": "C", "LC_ALL": "POSIX", "PYTHONUTF8": "0"},
            {"COLUMNS": "0", "TERM": ""},
            {"TZ": "no/such/zone"},
        ]
    )
    uid = trial.random.choice([None, None, 12345]) if os.geteuid() == 0 and others_can_read(sys.prefix) else None
    command = trial.random.choice(["train.main", "train.main", "train.evaluate", "data.inspect", "train.describe"])
    trial.did(f"{command} with {environment}{'' if uid is None else f' as user {uid}'}")
    if len(environment.get("TMPDIR") or "") > 100:
        Path(environment["TMPDIR"]).mkdir()  # type: ignore[arg-type]
    run = trial.half_done()
    arguments = {
        "train.main": ["--config", str(trial.stand.config), f"run_dir={run}"],
        "train.evaluate": ["--run", str(run)],
        "data.inspect": [str(trial.stand.dataset)],
        "train.describe": [],
    }[command]
    if uid is not None:
        for path in [trial.folder, *trial.folder.rglob("*")]:
            os.chown(path, uid, uid, follow_symlinks=False)

    def tamper(rank: int) -> None:
        if uid is not None:
            os.setgid(uid)
            os.setuid(uid)

    ended = start([command, *arguments], trial.folder, 1, {**environment}, tamper=tamper).wait(HANG_LIMIT_S)
    check_ending(ended)
    if ended.statuses != [0]:
        if "PermissionError" in ended.text or not errors(ended):
            raise Lost(ended.text[-300:])
        return Outcome.NAMED
    if command == "train.main":
        return judged(run, trial, ended)
    return Outcome.SURVIVED


END_LIMIT_S = 40.0
"""DeepSpeed's launcher gives its ranks 30 s."""


def tree_of(pid: int) -> list[psutil.Process]:
    try:
        process = psutil.Process(pid)
        return [process, *process.children(recursive=True)]
    except psutil.NoSuchProcess:
        return []


@attack("launcher", every=5)
def kill_the_launcher(trial: Trial) -> Outcome:
    """kill -9 or SIGTERM of DeepSpeed's launcher or of its node launcher: no rank goes on, and a new start works."""
    run = trial.folder / "run"
    which, number = (
        trial.random.choice(["launcher", "node launcher"]),
        trial.random.choice([signal.SIGKILL, signal.SIGTERM]),
    )
    trial.did(f"{number.name} to the {which}")
    command = [str(Path(sys.executable).with_name("deepspeed")), "--num_gpus", "2", str(ROOT / "train/main.py")]
    options = ["--config", str(trial.stand.config), f"run_dir={run}", *TP2.overrides]
    environment = {**os.environ, "DS_ACCELERATOR": "cpu", "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}
    with (trial.folder / "launcher.txt").open("w") as output:
        long = [*options, "training.train_steps=100000"]
        launcher = subprocess.Popen(
            [*command, *long], stdout=output, stderr=output, cwd=trial.folder, env=environment, start_new_session=True
        )
    family: list[psutil.Process] = []
    try:
        end = time.monotonic() + 2 * HANG_LIMIT_S  # it loads the libraries anew
        while time.monotonic() < end and not _has_row(run) and launcher.poll() is None:
            time.sleep(0.1)
        family = tree_of(launcher.pid)
        if not _has_row(run):
            raise RuntimeError(f"the launcher did not train: {(trial.folder / 'launcher.txt').read_text()[-500:]}")
        victim = family[0]
        if which == "node launcher":
            victim = next(each for each in family if "deepspeed.launcher.launch" in " ".join(each.cmdline()))
        victim.send_signal(number)
        _, alive = psutil.wait_procs(family, timeout=END_LIMIT_S)
        launcher.poll()
        alive = [each for each in alive if each.is_running() and each.status() != psutil.STATUS_ZOMBIE]
        if alive:
            names = [" ".join(each.cmdline()[1:4]) for each in alive]
            raise Lost(f"{len(alive)} processes still run {END_LIMIT_S:g} s later: {names}")
    finally:
        for each in family or tree_of(launcher.pid):
            try:
                each.kill()
            except psutil.NoSuchProcess:
                continue
        launcher.wait()
    last = rows(run / "metrics.jsonl")[-1]["step"]  # another length has another schedule, so no other run's curve
    ended = trial.train(run, TP2, f"training.train_steps={last + 5}")
    check_ending(ended)
    found = [row["step"] for row in rows(run / "metrics.jsonl") if "loss" in row]
    if ended.statuses != [0, 0] or found != list(range(1, last + 6)):
        raise Lost(f"started again it ended with {ended.statuses} and {len(found)} steps: {ended.text[-300:]}")
    return Outcome.SURVIVED


def _has_row(run: Path) -> bool:
    return (run / "metrics.jsonl").exists() and (run / "metrics.jsonl").stat().st_size > 0
