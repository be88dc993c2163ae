"""Run tasks of lm-evaluation-harness on a checkpoint, through the same folder that train.export writes."""

import importlib.util
import tempfile
from pathlib import Path
from typing import Any

from data.errors import first_line
from train.exchange.folder import Form, write_folder
from train.exchange.source import open_trained
from train.run.reader import RunError


def check_installed() -> None:
    """Raise RunError if lm-evaluation-harness, or what it needs to run a model of transformers, is not installed."""
    missing = [name for name in ("lm_eval", "transformers", "accelerate") if importlib.util.find_spec(name) is None]
    if missing:
        raise RunError(
            f"--tasks needs {', '.join(missing)}, which is not installed; install this project's extra 'eval': "
            "pip install 'entropy-guided-transformer[eval]'"
        )


def run_tasks(
    run: Path, tasks: list[str], task_files: Path | None, samples: int | None, device: str, allow_commands: bool = False
) -> dict[str, Any]:
    """Evaluate a run's newest checkpoint on tasks.

    Args:
        run: its folder.
        tasks: names of tasks or groups.
        task_files: folder of task files; None takes those of the harness, whose index takes a while to read.
        samples: documents of each task; None takes all.
        device: "cpu" or "cuda".
        allow_commands: whether the run's dataset may be read by a command.

    Returns:
        step, samples, and for each task its metrics.

    Raises:
        RunError: a task is unknown or failed, or lm-eval is not installed.
        ConfigError, DataError, CheckpointError, LaunchError: the run cannot be read.
    """
    check_installed()
    from lm_eval import simple_evaluate
    from lm_eval.tasks import TaskManager

    own = None if task_files is None else str(task_files)
    manager = TaskManager(include_path=own, include_defaults=own is None)
    unknown = [task for task in tasks if task not in manager.all_tasks]
    if unknown:
        raise RunError(
            f"--tasks: {', '.join(unknown)}: no such task {'in the harness' if own is None else f'in {own}'}; "
            "`lm_eval ls tasks` lists those of the harness"
        )
    trained = open_trained(run, None, allow_commands)
    with tempfile.TemporaryDirectory() as folder:
        write_folder(Path(folder), trained, trained.tokenizer(), Form())
        try:
            found = simple_evaluate(
                model="hf",
                model_args={"pretrained": folder, "trust_remote_code": True, "device": device},
                tasks=list(tasks),
                task_manager=manager,
                limit=samples,
                bootstrap_iters=0,
                log_samples=False,
            )
        except Exception as error:  # of the harness, of datasets, of the network: each has its own
            raise RunError(f"--tasks {','.join(tasks)}: failed ({first_line(error)})") from error
    return {"step": trained.saved.step, "samples": samples, "tasks": _numbers(found["results"])}


def _numbers(results: dict[str, dict[str, Any]]) -> dict[str, dict[str, float]]:
    """Return metric -> value of each task: 'acc,none' is written as 'acc', 'acc,other' as it is."""
    return {
        task: {
            name.removesuffix(",none"): float(value)
            for name, value in metrics.items()
            if isinstance(value, int | float) and "," in name and "stderr" not in name
        }
        for task, metrics in results.items()
    }
