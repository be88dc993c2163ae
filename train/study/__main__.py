"""Plan, run and report a suite of trainings:

    python -m train.study run configs/suites/small.json
    python -m train.study status configs/suites/small.json
    python -m train.study report configs/suites/small.json --output docs/study/small
    python -m train.study results configs/suites/small.json --output small.json

`run` trains what is unfinished. It may be stopped and started at any time. A run that diverges is a result: its step
and layer are recorded, and it is not started again without --retry. A folder that holds a run of another configuration
is refused, since its results are not the suite's. On a cluster, `slurm` submits an array job of the next stage of every
run. A suite with budgets needs it once for each stage.

`results` writes what is finished into a small file. With --results FILE every command goes on from it, so that a study
may be done piece by piece on machines that are thrown away.
"""

import argparse
import shlex
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterable

from data.command_line import output_file, path_argument, print_faults, real_number, run_command, whole_number
from data.files.strict_json import to_json
from parallel.processes.lifetime import SignalWatch
from parallel.processes.place import forget_launcher
from train.config.overrides import parse_with_overrides
from train.study.suite import PlannedRun, Suite, SuiteError, load_suite

NOT_FINISHED = "the same command goes on; python -m train.study status says where each stands"


def main(arguments: list[str] | None = None) -> int:
    options = parse(arguments)
    forget_launcher()
    try:
        suite = load_suite(options.suite, options.overrides)
        if options.results:
            from train.study.saved import with_results

            suite = with_results(suite, options.results)
    except SuiteError as error:
        print_faults(error)
        return 2
    return COMMANDS[options.command](suite, options)


def parse(arguments: list[str] | None) -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(
        prog="python -m train.study",
        description="Plan, run and report a suite of trainings.",
        epilog="train/study/suite.py explains the suite file; python -m train.paper list prints the paper's rows.",
    )
    commands = parser.add_subparsers(dest="command", required=True)
    run = commands.add_parser("run", help="train everything that is unfinished, on this machine")
    run.add_argument(
        "--only",
        action="append",
        default=[],
        metavar="RUN",
        help="only this run: a name, a label for all its seeds, or an arm for all of its sweep; may be given several "
        "times, and the runs keep that order",
    )
    run.add_argument("--jobs", type=whole_number(1), default=1, metavar="N", help="runs at a time (default: 1)")
    run.add_argument(
        "--launcher",
        type=command_words,
        default=[],
        metavar="COMMAND",
        help="command before train/main.py, say 'deepspeed --num_gpus 8' (default: one process a run)",
    )
    run.add_argument(
        "--time-limit",
        type=real_number(0),
        default=0,
        metavar="S",
        help="seconds after which trainings save and stop (default: no limit)",
    )
    run.add_argument("--retry", action="store_true", help="start diverged runs anew")
    status = commands.add_parser("status", help="print the state of every run")
    status.add_argument("--json", action="store_true", help="print one JSON object a result instead")
    report = commands.add_parser("report", help="write a report of the results so far")
    report.add_argument(
        "--output",
        type=path_argument,
        metavar="DIR",
        help="folder of the report (default: report/ in the suite's folder)",
    )
    report.add_argument("--note", default="", metavar="TEXT", help="a sentence for the top of the report")
    report.add_argument(
        "--entropy-step",
        type=whole_number(1),
        metavar="N",
        help="step whose layer entropies stand below the sweeps (default: an eighth of the run)",
    )
    results = commands.add_parser("results", help="write every finished result into a small file")
    results.add_argument(
        "--output", type=output_file, required=True, metavar="FILE", help="file to write, say done.json"
    )
    slurm = commands.add_parser("slurm", help="print or submit an array job of the next stage of every unfinished run")
    slurm.add_argument("--submit", action="store_true", help="submit the job with sbatch")
    for command in (run, status, report, results, slurm):
        command.add_argument(
            "--results",
            type=path_argument,
            action="append",
            default=[],
            metavar="FILE",
            help="file of finished results, whose runs count as done; may be given several times",
        )
        command.add_argument(
            "suite", type=path_argument, metavar="SUITE", help="suite file, say configs/suites/small.json"
        )
        command.add_argument(
            "overrides",
            nargs="*",
            metavar="section.key=value",
            help="override for every run, say data.path=datasets/mine; output=DIR sets the suite's folder",
        )
    return parse_with_overrides(parser, arguments)


def command_words(text: str) -> list[str]:
    """Split a command as a shell would and check that it is installed; an argparse type."""
    try:
        words = shlex.split(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"{text!r}: {error}; expected a command as a shell would read it") from None
    if words and shutil.which(words[0]) is None:
        raise argparse.ArgumentTypeError(
            f"{text!r}: no command {words[0]!r} is found here; install it or give its path"
        )
    return words


def run(suite: Suite, options: argparse.Namespace) -> int:
    """Train every run that is not finished; return the exit status."""

    from train.study.runner import Runner

    try:
        chosen = suite.chosen(options.only)
    except SuiteError as error:
        print_faults(error)
        return 2
    if holds_others(chosen):
        return 2
    runner = Runner(
        suite,
        launcher=options.launcher,
        jobs=options.jobs,
        retry=options.retry,
        time_limit_s=options.time_limit,
        say=lambda text: print(text, flush=True),
    )
    watch = SignalWatch({signal.SIGTERM: signal.default_int_handler})  # as Ctrl-C: trainings save and end
    try:
        failed = runner.run(options.only)
    except KeyboardInterrupt:
        print("stopped; the same command goes on where the checkpoints are", file=sys.stderr)
        return 1
    finally:
        watch.close()
    if failed:
        print(f"error: {failed} run(s) are not finished; {NOT_FINISHED}", file=sys.stderr)
    return 1 if failed else 0


def holds_others(runs: Iterable[PlannedRun]) -> bool:
    """Return whether the folder of a run holds one of another configuration; print an error message about it."""
    from train.study.state import read_state

    for planned in runs:
        for stage in planned.stages:
            if (state := read_state(stage)).word == "other":
                print(f"error: {planned.name}: {state.detail}", file=sys.stderr)
                return True
    return False


def status(suite: Suite, options: argparse.Namespace) -> int:
    """Print where every run stands; return the exit status."""

    from train.study.results import records, results_rows

    found = records(suite)
    if options.json:
        for row in results_rows(found):
            print(to_json(row))
        return 0
    width = max(len(record.label) for record in found)
    print(f"{'run':{width}}  seed   tokens (M)        state      perplexity")
    for record in found:
        share = f"{record.tokens / 1e6:.3g} of {record.planned_tokens / 1e6:.3g}"
        value = f"{record.perplexity:.3f}" if record.perplexity is not None else ""
        detail = f"  {record.state.detail}" if record.state.detail else ""
        print(f"{record.label:{width}}  {record.seed:4}  {share:>16}  {record.state.word:8}  {value:>9}{detail}")
    return 0


def report(suite: Suite, options: argparse.Namespace) -> int:
    """Write the report and print its files; return the exit status."""

    from train.study.report.write import write_report

    for file in write_report(suite, options.output or suite.output / "report", options.note, options.entropy_step):
        print(file)
    return 0


def results(suite: Suite, options: argparse.Namespace) -> int:
    """Write the finished results; return the exit status."""

    from train.study.results import records
    from train.study.saved import write_results

    if holds_others(suite.runs):
        return 2
    count = write_results(suite, records(suite), options.output)
    print(f"{options.output}: {count} finished results")
    return 0


def slurm(suite: Suite, options: argparse.Namespace) -> int:
    """Print or submit an array job of the next stage of every run; return the exit status."""

    from train.study.stages import prepare
    from train.study.state import next_stage

    if holds_others(suite.runs):
        return 2
    files = [str(prepare(stage)) for run in suite.runs if (stage := next_stage(run)) is not None]
    if not files:
        print("nothing to submit: every run is at its end or being trained")
        return 0
    command = ["sbatch", f"--array=0-{len(files) - 1}", "slurm/sweep.sh", *files]
    print(shlex.join(command))
    if not options.submit:
        return 0
    try:
        return subprocess.run(command).returncode
    except FileNotFoundError:
        print("error: sbatch is not installed here; run the command above where it is", file=sys.stderr)
        return 1


COMMANDS: dict[str, Callable[[Suite, argparse.Namespace], int]] = {
    "run": run,
    "status": status,
    "report": report,
    "results": results,
    "slurm": slurm,
}


if __name__ == "__main__":
    run_command(main)
