"""A run that two ranks trained, opened by `train.load` and continued by `python -m train.generate`."""

import io
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from data.errors import DataError
from data.shards.tokenizer import Tokenizer
from data.stream.token_stream import TokenStream
from model.transformer import Transformer
from tests.conftest import TINY
from tests.docs.pages import ROOT, blocks
from tests.train.runs import rows, run_main
from train import load
from train.checkpoint.root import CheckpointError
from train.generate.__main__ import Continuation, count_of_new_tokens, main, prompts_of
from train.run.reader import RunError

T = TINY["model"]["seq_length"]
PROMPTS = ["def forward(", "import", "\u00e9\u4e16"]


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory, dataset: Path) -> Path:
    """Train 12 steps in two tensor-parallel ranks, with what a checkpoint does not hold: a calibrated temperature."""
    folder = tmp_path_factory.mktemp("generate")
    config = folder / "tiny.json"
    config.write_text(json.dumps({**TINY, "data": {"path": str(dataset)}, "run_dir": str(folder / "run")}))
    choices = ["parallel.tensor_parallel_size=2", "model.temperature_init=calibrated", "training.micro_batch_size=8"]
    answer = run_main(2, config, *choices)
    assert answer.statuses == [0, 0], answer.stderr
    return folder / "run"


def test_a_loaded_model_has_the_validation_loss_that_its_training_measured(run: Path, dataset: Path) -> None:
    measured = {row["step"]: row["validation_loss"] for row in rows(run) if "validation_loss" in row}
    last, tokenizer = load(run)
    assert isinstance(tokenizer, Tokenizer) and not last.training
    assert validation_loss(last, dataset, None) == pytest.approx(measured[12], rel=1e-5), "of the whole split"
    middle, _ = load(str(run), step=6, dtype=torch.float64)
    assert validation_loss(middle, dataset, 8) == pytest.approx(measured[6], rel=1e-5), "of the first 8 samples"
    assert middle.head.weight.dtype == torch.float64 and not torch.equal(middle.head.weight.float(), last.head.weight)


def validation_loss(model: Transformer, dataset: Path, samples: int | None) -> float:
    stream = TokenStream(str(dataset), "validation", seq_length=T, micro_batch_size=4, limit_samples=samples)
    total, count = 0.0, 0
    for rows_BT, valid in zip(stream, stream.valid_rows_by_batch, strict=True):
        tokens_TB = torch.from_numpy(rows_BT[:valid]).t()
        with torch.no_grad():
            total += model(tokens_TB[:-1], tokens_TB[1:])[0].item()
        count += valid * T
    stream.close()
    return total / count


def test_the_lines_of_the_guide_run(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    lines = "".join(blocks(ROOT / "docs/guides/generate.md", "python"))
    names: dict[str, object] = {}
    exec(
        lines.replace('"runs/quickstart"', repr(str(run))).replace(
            "generate(model, [tokens], 20", "generate(model, [tokens], 9"
        ),
        names,
    )
    entropies = names["entropies_BNT"]
    assert isinstance(entropies, list) and entropies[0].shape == (1, 4, len(names["tokens"]))  # type: ignore[arg-type]


def test_importing_train_is_cheap() -> None:
    code = "import train, sys; assert not {'torch', 'numpy', 'data', 'model'} & set(sys.modules); train.load"
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)


def test_what_cannot_be_loaded_is_one_line(run: Path, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="holds no complete checkpoint of step 7; complete are steps 6, 12"):
        load(run, step=7)
    with pytest.raises(RunError, match="holds no run"):
        load(tmp_path)
    with pytest.raises(ValueError, match="device gpu: cannot be used here; this machine has cpu"):
        load(run, device="gpu")


def continued_by_hand(model: Transformer, tokens: list[int], count: int) -> list[int]:
    sequence = list(tokens)
    for _ in range(count):
        with torch.no_grad():
            logits_TBV, _ = model(torch.tensor(sequence).unsqueeze(1))
        sequence.append(int(logits_TBV[-1, 0].argmax()))
    return sequence[len(tokens) :]


def test_prompts_of_a_file_are_continued_in_batches(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "prompts.jsonl"
    file.write_text("".join(json.dumps({"prompt": prompt}) + "\n" for prompt in PROMPTS))
    command = ["--run", str(run), "--prompts", str(file), "--json", "--max-new-tokens", "6", "--batch-size", "2"]
    assert main([*command, "--greedy", "--dtype", "float64"]) == 0
    found = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [row["prompt"] for row in found] == PROMPTS
    model, tokenizer = load(run, dtype=torch.float64)
    for row in found:
        expected = continued_by_hand(model, tokenizer.encode(row["prompt"]), 6)
        if row["ended"]:
            assert row["tokens"] == expected[: len(row["tokens"])] and row["tokens"][-1] == tokenizer.end_of_document
        else:
            assert row["tokens"] == expected
        whole = tokenizer.decode([*tokenizer.encode(row["prompt"]), *row["tokens"]])
        assert row["prompt"] + row["text"] == whole


def test_one_prompt_streams_the_same_text_for_a_seed(
    run: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    texts = []
    for seed in ("3", "3", "4"):
        monkeypatch.setattr("sys.stdin", io.StringIO("def forward("))
        assert main(["--run", str(run), "--max-new-tokens", "15", "--seed", seed, "--top-p", "0.95"]) == 0
        texts.append(capsys.readouterr().out)
    assert texts[0] == texts[1] != texts[2] and texts[0].startswith("def forward(")
    assert main(["--run", str(run), "--prompt", "def forward(", "--max-new-tokens", "15", "--seed", "3",
                 "--top-p", "0.95", "--json"]) == 0  # fmt: skip
    row = json.loads(capsys.readouterr().out)
    printed = "".join(char if char.isprintable() or char in "\n\t" else repr(char)[1:-1] for char in row["text"])
    assert texts[0] == f"def forward({printed}\n"


def test_what_is_too_long_is_refused_before_weights_are_read(
    run: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("train.checkpoint.whole.find_checkpoint", lambda *_: pytest.fail("read weights"))
    long = "import torch\n" * 40
    assert main(["--run", str(run), "--prompt", "a", "--prompt", long, "--max-new-tokens", str(T)]) == 2
    first, second = capsys.readouterr().err.splitlines()
    assert first.startswith(
        "error: prompt 1: 1 tokens and 32 new ones are more than the model's seq_length = 32; ask for"
    )
    assert first.endswith("ask for at most 31 (--max-new-tokens)") and second.endswith("; shorten the prompt")


def test_the_default_fills_what_the_context_leaves() -> None:
    wanted = [Continuation(0, "", [1] * 100), Continuation(1, "", [1] * 20)]
    assert count_of_new_tokens(wanted, None, 1024) == 128
    assert count_of_new_tokens(wanted, None, 110) == 10
    assert count_of_new_tokens(wanted, 7, 110) == 7


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--prompts", "nowhere.txt"], "nowhere.txt: cannot be read (No such file or directory)"),
        (["--prompt", "a", "--data", "nowhere"], "nowhere/manifest.json: cannot be read"),
        (["--prompt", "a", "--step", "5"], "holds no complete checkpoint of step 5"),
        (["--prompt", "a", "--prompt", "\udcff"], "prompt 2: is not UTF-8"),
    ],
)
def test_faults_are_one_line(run: Path, arguments: list[str], words: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--run", str(run), *arguments]) == 2
    assert words in capsys.readouterr().err


def test_entropies_of_a_run_are_those_of_its_model(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from train.entropy.__main__ import main as entropy

    file, text = tmp_path / "text.py", "def forward(self, x):\n    return self.linear(x)\n" * 12
    file.write_text(text)
    assert entropy(["--run", str(run), "--text", str(file), "--dtype", "float64", "--batch-size", "3", "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    model, tokenizer = load(run, dtype=torch.float64)
    tokens = tokenizer.encode(text)
    rows_ST = torch.tensor(tokens[: len(tokens) // T * T]).view(-1, T)
    with torch.no_grad():
        _, entropies_SNT = model(rows_ST.t())
    expected = torch.stack(entropies_SNT).mean((1, 3))
    torch.testing.assert_close(torch.tensor(report["entropy_nats"], dtype=torch.float64), expected)
    assert report["sequences"] == len(rows_ST) > 3 and report["model"].endswith("step 12")
    assert entropy(["--run", str(run), "--text", str(file), "--seq-length", str(T + 1)]) == 2
    assert f"reads at most {T} tokens" in capsys.readouterr().err


def test_prompts_of_a_file_are_its_lines(tmp_path: Path) -> None:
    text, rows, bad = (tmp_path / name for name in ("a.txt", "a.jsonl", "bad.jsonl"))
    text.write_bytes("one\r\n\n two\u2028\x0cthree \n".encode())
    assert prompts_of(text) == ["one", "", " two\u2028\x0cthree "]
    rows.write_text('{"prompt": "a\\nb", "other": 1}\n{"prompt": ""}\n')
    assert prompts_of(rows) == ["a\nb", ""]
    bad.write_text('{"prompt": "a"}\n{"prompt": 3}\n')
    with pytest.raises(DataError, match=r'bad.jsonl: line 2: expected a JSON object with a text "prompt"'):
        prompts_of(bad)
    text.write_text("")
    with pytest.raises(DataError, match="holds no prompt"):
        prompts_of(text)
