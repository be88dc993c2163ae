"""python -m train.evaluate --tasks: lm-evaluation-harness on a checkpoint, with a task of our own and no network."""

import json
import os
from pathlib import Path
from unittest import mock

import pytest

from parallel.local_ranks import run_ranks
from tests.train.runs import Output, main_output, run_faulty
from train.exchange import harness
from train.run.reader import RunError

WORDS = Path(__file__).with_name("tasks") / "tiny_words.jsonl"
TASK = f"""
task: tiny_words
dataset_path: json
dataset_kwargs: {{data_files: {{test: {WORDS}}}}}
test_split: test
output_type: multiple_choice
doc_to_text: context
doc_to_choice: choices
doc_to_target: answer
target_delimiter: ""
metric_list: [{{metric: acc}}]
"""


def evaluations(run: str, task_files: str) -> list[Output]:
    """Run the command twice in this process: a task of ours, and one that nobody has."""
    import contextlib
    import io

    from train.evaluate import main

    def called(*arguments: str) -> Output:
        out, err = io.StringIO(), io.StringIO()
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            status = main(["--run", run, *arguments])
        return status, out.getvalue(), err.getvalue()

    offline = {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1", "HF_HOME": f"{task_files}/home"}
    with mock.patch.dict(os.environ, offline):
        return [
            called("--tasks", "tiny_words", "--task-files", task_files, "--samples", "2"),
            called("--tasks", "no_such_task", "--task-files", task_files),
        ]


def test_a_task_of_ones_own(tiny_config: Path, tmp_path: Path) -> None:
    pytest.importorskip("lm_eval", reason="the extra 'eval' is not installed")
    answer = run_faulty(main_output, 1, tiny_config, ["training.train_steps=2"])
    assert answer.statuses == [0], answer.stderr
    (tmp_path / "tasks").mkdir()
    (tmp_path / "tasks" / "tiny_words.yaml").write_text(TASK)
    good, bad = run_ranks(evaluations, 1, str(tmp_path / "run"), str(tmp_path / "tasks"))[0]
    assert good[0] == 0, good
    row = json.loads((tmp_path / "run" / "evaluation_tasks.json").read_text())
    assert row["step"] == 2 and row["samples"] == 2 and row["tasks"]["tiny_words"]["acc"] in (0.0, 0.5, 1.0)
    assert "tiny_words: acc" in good[1]
    assert bad[0] == 2 and "error: --tasks: no_such_task: no such task" in bad[2]


def test_what_is_missing_is_named() -> None:
    missing = mock.patch("importlib.util.find_spec", lambda name: None if name == "lm_eval" else mock.sentinel.found)
    with missing, pytest.raises(RunError, match=r"--tasks needs lm_eval, which is not installed; install .*eval"):
        harness.check_installed()
