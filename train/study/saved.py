"""Keep finished results in a small file, and go on from such files where the runs' folders are gone.

    {"format": "study-results", "version": 1, "suite": "small", "results": [{"run": "EReg/seed1", ...}, ...]}

One result a line, so that two files can be compared. A study on machines that are thrown away is done piece by piece:
each piece starts from the files of those before.
"""

import dataclasses
from collections.abc import Iterable
from pathlib import Path

from data.files.own import write_atomically
from data.files.strict_json import check_shape, read_json, shown, to_json
from train.study.outcome import Outcome, outcome_from
from train.study.results import Record
from train.study.suite import PlannedRun, Stage, Suite, SuiteError

FORMAT, VERSION = "study-results", 1


def write_results(suite: Suite, found: list[Record], file: Path) -> int:
    """Write every finished result; return how many there are."""
    rows = [_row(record) for record in found if record.state.is_final]
    head = to_json({"format": FORMAT, "version": VERSION, "suite": suite.name})
    lines = ",\n".join(to_json(row) for row in rows)
    write_atomically(file, f'{head[:-1]}, "results": [\n{lines}\n]}}\n')
    return len(rows)


def _row(record: Record) -> dict[str, object]:
    """Return a result with what other programs may want to know of it; only the outcome is read again."""
    known = {
        "arm": record.arm,
        "label": record.label,
        "seed": record.seed,
        "swept": record.swept,
        "tokens": record.tokens,
        "parameters": record.parameters,
    }
    return {**record.outcome.as_row(), **known}


def with_results(suite: Suite, files: Iterable[Path]) -> Suite:
    """Give the stages of a suite the results that files hold of them.

    A trunk is left out if the branch that it serves has its result. A result of another configuration is given to its
    stage too: `read_state` compares both.

    Raises:
        SuiteError: a file is damaged, holds a run that the suite lacks, or contradicts another file.
    """
    saved: dict[str, tuple[Outcome, Path]] = {}
    known = {stage.folder.relative_to(suite.output).as_posix() for run in suite.runs for stage in run.stages}
    faults = []
    for file in files:
        for outcome in load_results(file):
            earlier, there = saved.setdefault(outcome.run, (outcome, file))
            if outcome.run not in known:
                name = shown(outcome.run)
                faults.append(f"{file}: {name} is no run of the suite; remove its line, or name it in the suite")
            elif earlier != outcome:
                faults.append(f"{file}: {outcome.run} has another result in {there}; leave one of them out")
    if faults:
        raise SuiteError("\n".join(faults))
    return dataclasses.replace(suite, runs=tuple(_with(run, suite.output, saved) for run in suite.runs))


def _with(run: PlannedRun, output: Path, saved: dict[str, tuple[Outcome, Path]]) -> PlannedRun:
    stages: list[Stage] = []
    for stage in run.stages:
        outcome, file = saved.get(stage.folder.relative_to(output).as_posix(), (None, None))
        if outcome is not None and stages and not stages[-1].is_result:
            stages.pop()
        stages.append(dataclasses.replace(stage, saved=outcome, saved_in=file))
    return dataclasses.replace(run, stages=tuple(stages))


def load_results(file: Path) -> list[Outcome]:
    """Return the results in a file.

    Raises:
        SuiteError: the file cannot be read, or is no file of results.
    """
    try:
        tree = read_json(file)
        check_shape(tree, {"format": str, "version": int, "results": [dict]})
        if (tree["format"], tree["version"]) != (FORMAT, VERSION):
            theirs = f"{shown(tree['format'])} {tree['version']}"
            raise ValueError(f"its format is {theirs}, expected {shown(FORMAT)} {VERSION}")
    except OSError as error:
        raise SuiteError(f"{file}: cannot be read ({error.strerror}); train.study results writes such files") from None
    except ValueError as error:
        raise SuiteError(f"{file}: no file of results ({error}); train.study results writes such files") from None
    found = []
    for number, row in enumerate(tree["results"]):
        try:
            found.append(outcome_from(row))
        except ValueError as error:
            raise SuiteError(f"{file}: results[{number}]: {error}; write the file again") from None
    return found
