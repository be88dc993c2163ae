"""The command train.export on whole runs, and the folder as a stranger uses it."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from data.stream.token_stream import TokenStream
from parallel.local_ranks import run_ranks
from tests.train.runs import Output, rows, run_main

STRANGER = """
import sys
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

rows = torch.load(sys.argv[1])
for folder in sys.argv[2:]:
    model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)
    tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=True)
    inputs = tokenizer(["def f(", "import torch"], return_tensors="pt", padding=True)
    assert model.generate(**inputs, max_new_tokens=5).shape[1] > inputs["input_ids"].shape[1]
    with torch.no_grad():
        logits = model(rows[:, :-1]).logits
    print(float(torch.nn.functional.cross_entropy(logits.flatten(0, 1), rows[:, 1:].flatten())))
assert not {"train", "parallel", "model", "data"} & set(sys.modules)
"""


def export(*arguments: str) -> Output:
    """Run the command in this process."""
    import contextlib
    import io

    from train.export import main

    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            status = main(list(arguments))
        except SystemExit as error:
            status = int(error.code or 0)
    return status, out.getvalue(), err.getvalue()


def in_one_process(*commands: list[str]) -> list[Output]:
    """Run several exports in a process of their own, which joins a process group."""
    return run_ranks(all_exports, 1, list(commands))[0]


def all_exports(commands: list[list[str]]) -> list[Output]:
    return [export(*command) for command in commands]


def strangers_losses(folders: list[Path], dataset: Path) -> list[float]:
    """Load exported folders in a process without this project; return the validation losses in nats a token."""
    rows_file, work = folders[0].parent / "rows.pt", folders[0].parent
    torch.save(torch.from_numpy(np.concatenate(list(TokenStream(dataset, "validation", 32, 1)))), rows_file)
    environment = {**os.environ, "PYTHONPATH": "", "HF_HUB_OFFLINE": "1", "HF_HOME": str(work / "home")}
    command = [sys.executable, "-c", STRANGER, *map(str, [rows_file, *folders])]
    done = subprocess.run(command, cwd=work, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return [float(line) for line in done.stdout.splitlines()]


def test_export_of_a_run_that_two_ranks_trained(tiny_config: Path, dataset: Path, tmp_path: Path) -> None:
    pytest.importorskip("transformers")
    layout = ["parallel.tensor_parallel_size=2", "training.train_steps=4", "checkpoint.interval=2"]
    assert run_main(2, tiny_config, *layout).statuses == [0, 0]
    run = ["--run", str(tmp_path / "run"), "--output"]
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "file").touch()
    answers = in_one_process(
        [*run, str(tmp_path / "plain")],
        [*run, str(tmp_path / "folded"), "--fold"],
        [*run, str(tmp_path / "half"), "--dtype", "bfloat16", "--step", "2"],
        [*run, str(tmp_path / "full")],
        [*run, str(tmp_path / "new"), "--step", "3"],
        [*run, str(tmp_path / "new"), "--format", "gpt2"],
        [*run, str(tmp_path / "new"), "--tokenizer", str(tiny_config)],
        ["--run", str(tmp_path), "--output", str(tmp_path / "new")],
        [*run, str(tmp_path / "nowhere" / "new")],
    )
    assert [status for status, _, _ in answers] == [0, 0, 0, 2, 2, 2, 2, 2, 2], answers
    faults = [err for status, _, err in answers if status]
    assert all(err.count("error: ") == err.count("\n") == 1 for err in faults), faults
    expected = [
        "exists",
        "of step 3; complete are steps 2, 4",
        "no GPT-2 has",
        "SentencePiece",
        "holds no run",
        "folder that exists",
    ]
    assert all(words in err for words, err in zip(expected, faults, strict=True)), faults
    assert "at step 2 of 4" in answers[2][2] and "FFNs are folded away" in answers[1][1]
    assert not list(tmp_path.glob(".*.tmp")) and not (tmp_path / "new").exists()

    config = json.loads((tmp_path / "folded" / "config.json").read_text())
    assert set(config["ffn"]) == {"none"} and not config["tie_word_embeddings"]
    assert (tmp_path / "plain" / "head_map.png").stat().st_size > 1000
    assert json.loads((tmp_path / "half" / "config.json").read_text())["dtype"] == "bfloat16"
    card = (tmp_path / "plain" / "README.md").read_text()
    manifest = json.loads((dataset / "manifest.json").read_text())
    validation = next(row["validation_loss"] for row in reversed(rows(tmp_path / "run")) if "validation_loss" in row)
    assert manifest["fingerprint"] in card and f"{validation:.4f} nats" in card

    losses = strangers_losses([tmp_path / "plain", tmp_path / "folded"], dataset)
    assert losses == pytest.approx([validation, validation], rel=1e-5)
