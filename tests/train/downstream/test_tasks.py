"""Tasks measured while a run trains: scores by hand, the same under every layout, and answers to bad files."""

import json
from functools import partial
from pathlib import Path

import pytest
import torch

from data.errors import DataError
from data.shards.tokenizer import Tokenizer
from data.stream.dataset import open_dataset
from parallel.engine.engine import evaluate_stage
from parallel.sharding.megatron import Groups
from tests.train.runs import rows, run_main
from train.config import load_config
from train.downstream.tasks import accuracy, load_tasks
from train.parts import build_stage

DOCUMENTS = [
    {"context": "import", "choices": [" torch", " elephant"], "answer": 0},
    {"context": "def forward(self", "choices": [" wxyz", ", x_TBD", " 1"], "answer": 1},
    {
        "context": "",
        "choices": ["from torch import Tensor, nn and much more than the context holds " * 3, "x"],
        "answer": 1,
    },
    {"context": "from torch import", "choices": [" nn", " violet"], "answer": 0},
]


def task_file(folder: Path, *lines: str) -> str:
    file = folder / "words.jsonl"
    file.write_text("\n".join(lines or [json.dumps(document) for document in DOCUMENTS]) + "\n")
    return f"downstream.tasks={json.dumps({'words': str(file)})}"


def test_scores_are_log_probabilities(tiny_config: Path, tmp_path: Path, one_process: Groups) -> None:
    config = load_config(tiny_config, [task_file(tmp_path), "downstream.interval=1", "model.init_std=0.3"])
    manifest = open_dataset(config.data.path)
    documents = load_tasks(config, manifest)["words"]
    stage, _ = build_stage(config, manifest.vocab_size, groups=one_process)
    found = accuracy(documents, one_process, config, partial(evaluate_stage, stage))
    right = 0
    with torch.no_grad():
        for document in documents:
            scores = []
            for choice in document.choices:
                tokens = torch.tensor(choice.tokens)
                logits = stage.transformer(tokens[:-1, None])[0][:, 0].log_softmax(-1)
                scores.append(float(logits.gather(1, tokens[1:, None])[-choice.num_scored :].sum()))
            right += scores.index(max(scores)) == document.answer
    assert found == right / 4
    shorter = load_config(tiny_config, [task_file(tmp_path), "downstream.interval=1", "downstream.samples=3"])
    assert len(load_tasks(shorter, manifest)["words"]) == 3
    assert load_tasks(load_config(tiny_config, [task_file(tmp_path)]), manifest) == {}


def test_texts_are_cut_where_they_should_be(tiny_config: Path, tmp_path: Path) -> None:
    config = load_config(tiny_config, [task_file(tmp_path), "downstream.interval=1"])
    manifest = open_dataset(config.data.path)
    first, _, long, _ = load_tasks(config, manifest)["words"]
    tokenizer = Tokenizer(manifest.tokenizer_path)
    assert first.choices[0].tokens[0] == tokenizer.end_of_document
    scored = first.choices[0].tokens[-first.choices[0].num_scored :]
    assert tokenizer.decode(first.choices[0].tokens[1:]) == "import torch" and tokenizer.decode(scored) == " torch"
    assert len(long.choices[0].tokens) == 33 and long.choices[0].num_scored == 32


@pytest.mark.parametrize(
    ("line", "fault"),
    [
        ("{", "words.jsonl:1: line 1"),
        ('{"context": "a", "choices": ["b"], "answer": 0}', "fewer than two"),
        ('{"context": "a", "choices": ["b", "c"], "answer": 2}', "answer is 2"),
        ('{"context": "a", "choices": ["b", 1], "answer": 0}', r"choices\[1\] is 1, expected a string"),
        ("", "expected an object"),
    ],
)
def test_bad_lines(tiny_config: Path, tmp_path: Path, line: str, fault: str) -> None:
    config = load_config(tiny_config, [task_file(tmp_path, line), "downstream.interval=1"])
    with pytest.raises(DataError, match=fault):
        load_tasks(config, open_dataset(config.data.path))


@pytest.mark.slow
@pytest.mark.parametrize(
    "layout",
    [
        ["parallel.tensor_parallel_size=2"],
        ["parallel.pipeline_parallel_size=2"],
        ["parallel.context_parallel_size=2"],
        ["parallel.zero_stage=3", "training.micro_batch_size=2"],
    ],
)
def test_layouts_agree(tiny_config: Path, tmp_path: Path, layout: list[str]) -> None:
    options = [task_file(tmp_path), "downstream.interval=2", "training.train_steps=5"]
    assert run_main(1, tiny_config, *options).statuses == [0]
    answer = run_main(2, tiny_config, *options, f"run_dir={tmp_path / 'two'}", *layout)
    assert answer.statuses == [0, 0], answer.stderr
    one, two = ([row for row in rows(tmp_path / run) if "downstream_words" in row] for run in ("run", "two"))
    assert [row["step"] for row in one] == [2, 4, 5] and one == two
