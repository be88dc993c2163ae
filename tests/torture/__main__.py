"""Attack runs at random for some minutes, and count what survived, what was named and what was lost:

    python -m tests.torture --minutes 10 --seed 1
    python -m tests.torture --only kills,flips
    python -m tests.torture --trial kill_ranks_in_a_step:1:17

Runs are tiny: two layers, a dataset of some kilobytes, twenty steps, on one or two CPU processes. The same seed makes
the same trials, except for moments that the clock decides. Exit status: 1 if anything was lost.
"""

import argparse
import contextlib
import importlib
import itertools
import json
import os
import pkgutil
import random
import shutil
import sys
import tempfile
import time
import traceback
from collections import Counter
from pathlib import Path
from typing import Any

import tests.torture
from data.command_line import real_number, whole_number
from tests.torture.attack import ATTACKS, Attack, Lost, Outcome, Trial
from tests.torture.processes import load_libraries
from tests.torture.stand import Stand

LOST = "LOST"


def main(arguments: list[str] | None = None) -> int:
    for module in pkgutil.iter_modules(tests.torture.__path__):
        if module.name != "__main__" and not module.name.startswith("test_"):
            importlib.import_module(f"tests.torture.{module.name}")
    options = parse(arguments)
    if options.list:
        for each in ATTACKS.values():
            print(f"{each.group:10s} {each.name:44s} {each.description}")
        return 0
    load_libraries()
    base = Path(tempfile.mkdtemp(prefix="torture-"))
    base.chmod(0o711)  # other users, as which some attacks run, may pass
    print(f"seed {options.seed}; {len(chosen(options.only))} attacks; everything lies in {base}", flush=True)
    try:
        results = [one(options.trial, Stand(base / "stand"), base)] if options.trial else attack_all(options, base)
    finally:
        if options.keep:
            print(f"kept: {base}")
        else:
            shutil.rmtree(base, ignore_errors=True)
    print(table(results))
    if options.json:
        options.json.write_text(json.dumps({"seed": options.seed, "trials": results}, indent=1) + "\n")
    return int(any(result["outcome"] == LOST for result in results))


def parse(arguments: list[str] | None) -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(
        prog="python -m tests.torture", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--minutes", type=real_number(0), default=10.0, metavar="M", help="how long (default 10)")
    parser.add_argument(
        "--seed", type=whole_number(0), default=int(time.time()), metavar="N", help="of the trials (default: the time)"
    )
    parser.add_argument(
        "--only", type=lambda text: text.split(","), metavar="NAMES", help="groups or attacks, separated by commas"
    )
    parser.add_argument("--trial", metavar="ATTACK:SEED:NUMBER", help="repeat one trial")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write every trial to a file")
    parser.add_argument("--keep", action="store_true", help="keep the folders of lost trials")
    parser.add_argument("--list", action="store_true", help="list the attacks and exit")
    options = parser.parse_args(arguments)
    known = {each.group for each in ATTACKS.values()} | ATTACKS.keys()
    if unknown := set(options.only or []) - known:
        parser.error(f"--only {','.join(unknown)}: expected some of {', '.join(sorted(known))}")
    if options.trial and options.trial.partition(":")[0] not in ATTACKS:
        parser.error(f"--trial {options.trial}: expected ATTACK:SEED:NUMBER; --list lists the attacks")
    return options


def chosen(only: list[str] | None) -> list[Attack]:
    """Return the attacks that --only names, or all."""
    return [each for each in ATTACKS.values() if only is None or {each.name, each.group} & set(only)]


def attack_all(options: argparse.Namespace, base: Path) -> list[dict[str, Any]]:
    """Try one attack after the other, in rounds of a random order, until the time is up."""
    end, results, number = time.monotonic() + 60 * options.minutes, [], 0
    order, stand = random.Random(options.seed), Stand(base / "stand")
    for turn in itertools.count(1):
        attacks = [each for each in chosen(options.only) if turn % each.every == 0 or options.only]
        order.shuffle(attacks)
        for each in attacks:
            left_s = end - time.monotonic()
            if left_s <= 0:
                return results
            number += 1
            results.append(one(f"{each.name}:{options.seed}:{number}", stand, base))
            lost = sum(result["outcome"] == LOST for result in results)
            print(f"  {len(results)} tried, {lost} lost, {left_s / 60:.1f} minutes left", flush=True)
    raise AssertionError("unreachable")


def one(name: str, stand: Stand, base: Path) -> dict[str, Any]:
    """Do one trial and report it."""
    attack = ATTACKS[name.partition(":")[0]]
    trial = Trial(name, stand, base / name.replace(":", "-"), random.Random(name))
    trial.folder.mkdir()
    began = time.monotonic()
    try:
        outcome, why = attack.function(trial).value, ""
    except Lost as error:
        outcome, why = LOST, str(error)
    except Exception as error:  # a fault of the torture, or a ruin that no judge foresaw: somebody has to look
        outcome, why = LOST, f"not judged: {error!r}\n{traceback.format_exc()}"
    done = "; ".join(trial.remarks)
    print(f"{outcome:8s} {time.monotonic() - began:5.1f} s  {name}  {printable(done)}", flush=True)
    if why:
        print("".join(f"         {printable(line)}\n" for line in why.splitlines()), end="", flush=True)
    else:
        with contextlib.suppress(OSError):
            shutil.rmtree(trial.folder)
    return {"trial": name, "group": attack.group, "outcome": outcome, "done": done, "why": why}


def table(results: list[dict[str, Any]]) -> str:
    """Return a table: for each attack how many trials were tried, survived, named, lost."""
    words = [Outcome.SURVIVED.value, Outcome.NAMED.value, LOST]
    counts: dict[str, Counter[str]] = {}
    for result in results:
        for row in (result["trial"].partition(":")[0], "all"):
            counts.setdefault(row, Counter())[result["outcome"]] += 1
    lines = [f"{'attack':44s} {'tried':>6s} " + " ".join(f"{word:>8s}" for word in words)]
    for row in [*ATTACKS, "all"]:
        if row in counts:
            lines.append(f"{row:44s} {counts[row].total():6d} " + " ".join(f"{counts[row][word]:8d}" for word in words))
    return "\n".join(lines)


def printable(text: str) -> str:
    return text.encode("unicode_escape").decode()


if __name__ == "__main__":
    status = main()
    sys.stdout.flush()
    os._exit(status)  # the libraries that are loaded here are none of the attack
