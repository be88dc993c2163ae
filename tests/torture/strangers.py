"""Someone else: their files beside ours, links they planted, a run folder they sent, the secrets they look for."""

import json
import shutil
from pathlib import Path

from tests.torture.attack import Lost, Outcome, Trial, attack
from tests.torture.judge import check_ending, check_untouched, errors, judged, snapshot, survived
from tests.torture.processes import Ended
from tests.torture.running import paused_in_step
from tests.torture.stand import HANG_LIMIT_S, LAYOUTS, ONE, STEPS

NAMES = (
    "step_by_step_notes/thesis.tex",
    "step_list.txt",
    "step_00000007/data.csv",
    "step_00000008.bak/rank_00000_000.bin",
    "step_8/notes.txt",
    "step_/x",
    "step_00000004 (copy)/checkpoint.json",
    "step_99999999/mine.txt",
    "step_00000016/mine.txt",
    "writable",
    "checkpoint.json",
    "checkpoint.json.tmp",
    "config.json.tmp",
    "metrics.jsonl.tmp",
    "tensors.json",
    "notes.tmp",
    ".hidden/x",
    "run.lock.old",
    "journal.jsonl.bak",
    "code/analysis.py",
    "figures/mine.png",
)
"""What people may have in a folder, some of it named much like ours."""
SECRET = "s3cr3t-T0K3N"


def plant(trial: Trial, folder: Path, names: list[str]) -> None:
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(f"mine {trial.random.random()}\n")


@attack("strangers")
def files_beside_checkpoints(trial: Trial) -> Outcome:
    """checkpoint.path, or the run's folder, holds someone else's files: all are there after the run, unchanged."""
    run = trial.folder / "run"
    root = trial.random.choice([trial.folder / "shared", run / "checkpoints", run])
    names = trial.random.sample(NAMES, trial.random.randint(1, 8))
    trial.did(f"{', '.join(names)} in {root.relative_to(trial.folder)}")
    plant(trial, root, names)
    if trial.random.random() < 0.3:
        (root / "step_00000012.lnk").symlink_to(trial.folder / "elsewhere")
    before = snapshot(root)
    options = [] if root != trial.folder / "shared" else [f"checkpoint.path={root}"]
    options += [f"checkpoint.keep={trial.random.choice([1, 2])}"]
    ended = trial.train(run, ONE, *options)
    check_ending(ended)
    check_untouched({path: kept for path, kept in before.items() if path != str(root)}, root)
    if ended.statuses == [0]:
        if root == trial.folder / "shared":
            (run / "checkpoints").symlink_to(root)
        survived(run, trial)
        return Outcome.SURVIVED
    if not errors(ended):
        raise Lost(f"no message: {ended.text[-300:]}")
    return Outcome.NAMED


@attack("strangers")
def copy_beside_checkpoints(trial: Trial) -> Outcome:
    """Somebody copied a complete checkpoint beside the others, under another name: it stays."""
    run = trial.half_done()
    name = trial.random.choice(["step_00000008.bak", "step_00000008_copy", "best", "step_8", "step_00000012.old"])
    shutil.copytree(run / "checkpoints/step_00000008", run / "checkpoints" / name)
    trial.did(f"a copy named {name}")
    before = snapshot(run / "checkpoints" / name)
    ended = trial.train(run, ONE, "checkpoint.keep=1")
    check_untouched(before, run / "checkpoints" / name)
    return judged(run, trial, ended)


@attack("strangers")
def planted_links(trial: Trial) -> Outcome:
    """Names that a run writes are links to someone else's file: nothing is written through them."""
    run, victim = trial.folder / "run", trial.folder / "victim.txt"
    victim.write_text("mine\n")
    if trial.random.random() < 0.5:
        trial.half_done()
    names = [
        *("run.lock", "journal.jsonl", "metrics.jsonl", "entropy.jsonl", "ranks.jsonl", "config.json", "goodput.json"),
        *("config.json.tmp", "goodput.json.tmp", "metrics.jsonl.tmp", "entropy.jsonl.tmp", "evaluation.json"),
        *("evaluation.json.tmp", "stacks", "checkpoints/step_00000016", "checkpoints/writable", "checkpoints"),
        *("checkpoints/writable.tmp", "checkpoints/step_00000004/checkpoint.json.tmp", "checkpoints/run.lock"),
    ]
    name = trial.random.choice(names)
    link = run / name
    link.parent.mkdir(parents=True, exist_ok=True)
    if link.is_dir():
        link.rename(trial.folder / "moved")
    link.unlink(missing_ok=True)
    away = trial.random.random() < 0.3
    link.symlink_to(trial.folder / "made-through-a-link" if away else victim)
    trial.did(f"{name} is a link to {'a missing file' if away else 'a file'}")
    before = snapshot(victim)
    ended = trial.train(run)
    looked = trial.command("train.evaluate", "--run", str(run))
    check_untouched(before, victim)
    if (trial.folder / "made-through-a-link").exists() and name != "checkpoints":
        raise Lost("a file was made where a link pointed")
    for each in (ended, looked):
        check_ending(each)
    if ended.statuses == [0]:
        survived(run, trial)
        return Outcome.SURVIVED
    return Outcome.NAMED


@attack("strangers")
def someone_elses_folder(trial: Trial) -> Outcome:
    """run_dir is a folder with someone else's files and no run: refused, and left as it is."""
    run = trial.folder / "run"
    names = ["thesis.tex", "data/a.csv", "metrics.jsonl", "entropy.jsonl", "notes.txt", ".git/HEAD"]
    plant(trial, run, trial.random.sample(names, trial.random.randint(1, 2)))
    if (run / "metrics.jsonl").exists():  # other programs write a file of this name too
        (run / "metrics.jsonl").write_text("".join(f'{{"step": {step}, "loss": 2.5}}\n' for step in range(1, 9)))
    before = snapshot(run)
    trial.did(", ".join(path.name for path in run.iterdir()))
    ended = trial.train(run)
    check_ending(ended)
    if ended.statuses != [2]:
        raise Lost(f"ended with {ended.statuses}, expected a refusal")
    if snapshot(run) != before:
        raise Lost("the folder is not as it was")
    return Outcome.NAMED


def stranger_address(trial: Trial, canary: Path) -> str:
    """Return an address whose command, if anybody runs it, makes the canary."""
    plain = f"pipe:touch {canary}; cat {{}}"
    return trial.random.choice(
        [
            *(plain, plain, plain, plain, plain, plain),
            f"PIPE:touch {canary}; cat {{}}",
            f"pipe::touch {canary} && cat {{}}",
            f" pipe:touch {canary}; cat {{}}",
            f"file://pipe:touch {canary} {{}}",
            f"dir::pipe:touch {canary};{{}}",
            f"$(touch {canary})",
            f"`touch {canary}`",
            f"; touch {canary};",
            f"simplecache::pipe:touch {canary};{{}}",
        ]
    )


@attack("strangers")
def run_folder_from_a_stranger(trial: Trial) -> Outcome:
    """A run folder that someone sent names commands as addresses: no command that looks at it runs one."""
    run, canary = trial.half_done(), trial.folder / "CANARY"
    key, address = trial.random.choice(["data.path", "data.path", "checkpoint.path", "data.cache_dir"]), ""
    address = stranger_address(trial, canary)
    mixture = trial.random.random() < 0.3
    if mixture:
        key, file = "data.path", trial.folder / "mixture.json"
        part = {"path": str(trial.stand.dataset), "shards": address}
        file.write_text(json.dumps({"datasets": [trial.random.choice([part, {"path": address}])]}))
        address = str(file)
    config = json.loads((run / "config.json").read_text())
    section, _, name = key.partition(".")
    config["config"][section][name] = address
    (run / "config.json").write_text(json.dumps(config, indent=2))
    command = trial.random.choice(
        [
            ["train.evaluate", "--run", str(run)],
            ["train.figures", "--run", str(run)],
            ["train.main", "--config", str(run / "config.json"), "--dry-run"],
            ["data.inspect", "--run", str(run)],
            ["data.inspect", address],
        ]
    )
    if command[0] == "data.inspect" and not mixture:
        command = ["train.evaluate", "--run", str(run)]  # else the user typed the address
    if command[0] == "train.main":
        plain = trial.folder / "their.json"
        plain.write_text(json.dumps(config["config"]))
        command[2] = str(plain)
    trial.did(f"{key} = {address}; {command[0]}")
    ended = trial.command(*command)
    if canary.exists():
        raise Lost("a command of the stranger's was run")
    check_ending(ended)
    return Outcome.SURVIVED if ended.statuses == [0] else Outcome.NAMED


@attack("strangers")
def secrets_in_addresses(trial: Trial) -> Outcome:
    """Tokens in addresses appear in no output, and in no file that others can read."""
    run = trial.folder / "run"
    address = trial.random.choice(
        [
            f"https://user:{SECRET}@127.0.0.1:9/data",
            f"https://127.0.0.1:9/data?token={SECRET}",
            f"https://127.0.0.1:9/data?X-Amz-Signature={SECRET}&X-Amz-Credential=me",
            f"ftp://user:{SECRET}@127.0.0.1:9/data",
            f"s3://key:{SECRET}@bucket/data",
            f"sftp://user:{SECRET}@127.0.0.1:9/x",
            f"pipe:false --header 'Authorization: Bearer {SECRET}' {{}}",
            f"memory://user:{SECRET}@host/x",
            f"https://127.0.0.1:9/{{}}?sig={SECRET}#fragment",
        ]
    )
    key = trial.random.choice(["data.path", "checkpoint.path", "data.path in a mixture"])
    options = [f"{key}={address}", "data.fetch_attempts=1", "data.fetch_time_limit_s=2"]
    if key.endswith("mixture"):
        file = trial.folder / "mixture.json"
        file.write_text(json.dumps({"datasets": [{"path": str(trial.stand.dataset), "shards": address}]}))
        file.chmod(0o600)
        options[0] = f"data.path={file}"
    trial.did(f"{key} = {address.replace(SECRET, 'TOKEN')}")
    ended = trial.train(run, ONE, *options)
    planned = trial.command("train.main", "--config", str(trial.stand.config), *options, f"run_dir={run}", "--dry-run")
    for each in (ended, planned):
        if SECRET in each.text:
            raise Lost(f"a token is printed: {each.text[:300].replace(SECRET, 'TOKEN')}")
        check_ending(each)
    where = [path for path in trial.folder.rglob("*") if path.is_file() and SECRET in path.read_text(errors="replace")]
    open_ones = [path for path in where if path.stat().st_mode & 0o077]
    if open_ones:
        raise Lost(f"a token lies in {open_ones[0].relative_to(trial.folder)}, which others can read")
    return Outcome.SURVIVED if ended.statuses == [0] else Outcome.NAMED


@attack("strangers")
def one_path_rule(trial: Trial) -> Outcome:
    """'~' and file:// mean the same in every setting: nothing of a run lands anywhere else."""
    home = trial.folder / "home"
    home.mkdir()
    there = home / "x"
    spelled = trial.random.choice(["~/x", f"file://{there}", f"file://{trial.folder}/./home/x", "~/./x"])
    which = trial.random.choice(["run_dir", "data.prepare --output", "data.path", "evaluate --run"])
    trial.did(f"{which} = {spelled}")
    environment: dict[str, str | None] = {"HOME": str(home)}
    if which == "data.prepare --output":
        text = trial.folder / "text"
        shutil.copytree(trial.stand.folder / "text", text)
        ended = trial.command(
            *("data.prepare", "--input", str(text), "--output", spelled, "--vocab-size", "270", "--workers", "1"),
            *("--validation-fraction", "0.2"),
            environment=environment,
        )
        expected = there / "manifest.json"
    elif which == "data.path":
        shutil.copytree(trial.stand.dataset, there)
        ended = trial.train(
            trial.folder / "run", ONE, f"data.path={spelled}", "checkpoint.path=~/y", environment=environment
        )
        expected = home / f"y/step_{STEPS:08d}"
    elif which == "run_dir":
        ended = trial.train(spelled, environment=environment)
        expected = there / f"checkpoints/step_{STEPS:08d}"
    else:
        trial.half_done().rename(there)
        ended = trial.command("train.evaluate", "--run", spelled, environment=environment)
        expected = there / "evaluation.json"
    check_ending(ended)
    strays = [path for path in trial.folder.rglob("*") if path.name in ("~", "file:")]
    if strays:
        raise Lost(f"made {strays[0].relative_to(trial.folder)}")
    if ended.statuses != [0]:
        return Outcome.NAMED
    if not expected.exists():
        raise Lost(f"{expected.relative_to(trial.folder)} is not there")
    if which == "run_dir":
        survived(there, trial)
    return Outcome.SURVIVED


def wait_for_listeners(pid: int) -> list[str]:
    """Return the addresses other than loopback on which a process listens."""
    import psutil

    return [
        f"{each.laddr.ip}:{each.laddr.port}"
        for each in psutil.Process(pid).net_connections("inet")
        if each.status == psutil.CONN_LISTEN and each.laddr.ip not in ("127.0.0.1", "::1", "::ffff:127.0.0.1")
    ]


@attack("strangers")
def listening_sockets(trial: Trial) -> Outcome:
    """While a run on one machine trains, no process of it listens on an address that others can reach."""
    layout = trial.random.choice(LAYOUTS[:2])
    trial.did(layout.name)
    flag = trial.folder / "flag"
    ranks = trial.start(trial.folder / "run", layout, tamper=paused_in_step(2, flag))
    ranks.until(flag.exists, HANG_LIMIT_S)
    found = [address for pid in ranks.pids for address in wait_for_listeners(pid)]
    while ranks.is_running():
        flag.unlink(missing_ok=True)
    ended: Ended = ranks.wait(HANG_LIMIT_S)
    check_ending(ended)
    if found:
        raise Lost(f"listens on {', '.join(found)}")
    return Outcome.SURVIVED
