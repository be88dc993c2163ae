"""--dry-run: every shipped configuration, parameters against hand formulas, exit statuses of the command."""

import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from model.config import ModelConfig
from model.transformer import global_shapes
from tests.model.reference import PLACEMENTS, RECIPES
from train.config import ConfigError, load_config
from train.cost.parameters import KINDS, parameter_counts
from train.plan import print_dry_run

ROOT = Path(__file__).parents[2]
SHIPPED = sorted(path.name for path in (ROOT / "configs").glob("*.json"))


def plan(capsys: pytest.CaptureFixture[str], name: str, *overrides: str, world: int | None = None) -> str:
    arguments = ["data.path=not/prepared/yet", *overrides]
    print_dry_run(load_config(ROOT / "configs" / name, arguments), world)
    return capsys.readouterr().out


def figure(text: str, label: str) -> int:
    """The first number behind a label of the plan."""
    match = re.search(rf"^\s*{re.escape(label)} +([\d,]+)", text, re.MULTILINE)
    assert match, f"no line {label!r} in\n{text}"
    return int(match[1].replace(",", ""))


def test_the_promised_configurations_are_shipped() -> None:
    assert {"quickstart.json", "ereg.json", "baseline.json", "ereg_1b.json"} <= set(SHIPPED)


@pytest.mark.parametrize("name", SHIPPED)
def test_every_shipped_configuration_has_a_plan(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    text = plan(capsys, name)
    parts = [figure(text, kind) for kind in KINDS if re.search(rf"^  {re.escape(kind)} ", text, re.MULTILINE)]
    assert sum(parts) == figure(text, "parameters")
    assert figure(text, "tokens") >= figure(text, "steps") > 0


def test_ereg_counts(capsys: pytest.CaptureFixture[str]) -> None:
    """V = 50000, d = 768, L = 12, H = 12, T = 128, by the formulas of the method."""
    text = plan(capsys, "ereg.json")
    d, layers, heads, context = 768, 12, 12, 128
    expected = {
        "word embedding": 50_000 * d,
        "position embedding": context * d,
        "attention": layers * (4 * d * d + 2 * d),
        "temperatures": layers * heads * context,
        "thresholds": layers * heads,
        "FFN": layers * d * d,
        "FFN scaling": layers * 2,
        "norms": 2 * d,
    }
    assert {kind: figure(text, kind) for kind in expected} == expected
    assert figure(text, "parameters") == 73_926_312
    assert figure(text, "steps") == 32_044  # 2.1e9 tokens at 512 * 128 a step, rounded up
    assert figure(text, "tokens") == 32_044 * 65_536


def test_baseline_counts(capsys: pytest.CaptureFixture[str]) -> None:
    """GPT-2 small without V, O and FFN biases: an FFN of 8 d^2, two norms a layer, no temperatures or theta."""
    text = plan(capsys, "baseline.json")
    d, layers = 768, 12
    assert figure(text, "FFN") == layers * 8 * d * d
    assert figure(text, "norms") == (2 * layers + 1) * 2 * d
    assert figure(text, "parameters") == 123_489_792
    assert not re.search("temperatures|thresholds|FFN scaling|^  head", text, re.MULTILINE)


def test_ereg_1b_has_a_billion(capsys: pytest.CaptureFixture[str]) -> None:
    assert figure(plan(capsys, "ereg_1b.json"), "parameters") == pytest.approx(1.05e9, rel=0.03)


@pytest.mark.parametrize("architecture", RECIPES)
@pytest.mark.parametrize("tied", [True, False])
def test_every_parameter_has_a_kind(architecture: str, tied: bool) -> None:
    for placement in PLACEMENTS if architecture in ("SM+WN", "SM+SN") else ("none",):
        keys = {"weight_norm": placement} if architecture == "SM+WN" else {}
        model = ModelConfig(architecture, 2, 16, 4, 8, tied_head=tied, **keys).resolved()
        shapes = global_shapes(model, 29)
        assert "other" not in parameter_counts(model, 29)
        assert sum(parameter_counts(model, 29).values()) == sum(shape.numel() for shape in shapes.values())


def test_ranks_and_micro_batches(capsys: pytest.CaptureFixture[str]) -> None:
    sizes = ["parallel.tensor_parallel_size=2", "parallel.pipeline_parallel_size=2", "training.micro_batch_size=64"]
    text = plan(capsys, "ereg.json", *sizes, world=8)
    assert "512 sequences = 4 micro-batches of 64 on 2 data-parallel ranks" in text
    assert "8 = 2 stages x 2 replicas x 1 context shards x 2 tensor shards" in text
    assert text.splitlines()[-1].split() == ["7", "1", "1", "0", "1", "11-11"]  # and the head, as much as 12 layers
    assert "padded to 50,176" in text  # the next multiple of 2 * 128


def test_world_that_does_not_fit(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(ConfigError, match="world size 3 is not a multiple"):
        plan(capsys, "ereg.json", "parallel.tensor_parallel_size=2", world=3)
    with pytest.raises(ConfigError, match="world size 0 must be at least 1"):
        plan(capsys, "ereg.json", world=0)


def test_vocabulary_from_nowhere() -> None:
    config = load_config(ROOT / "configs" / "ereg.json", ["data.path=not/prepared/yet", "data.planned_vocab_size=null"])
    with pytest.raises(ConfigError, match=r"not/prepared/yet.*data\.planned_vocab_size"):
        print_dry_run(config, None)


def command(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "train/main.py", *arguments], cwd=ROOT, capture_output=True, text=True, timeout=300
    )


def assert_told(result: subprocess.CompletedProcess[str], *parts: str) -> None:
    """Status 2, nothing on stdout, and on stderr one line `error: ...` a fault."""
    assert result.returncode == 2, result.stderr
    assert result.stdout == ""
    lines = result.stderr.splitlines()
    assert len(lines) == len(parts), result.stderr
    for line, part in zip(lines, parts, strict=True):
        assert line.startswith("error: ") and part in line


def test_command_prints_the_plan_and_exits_with_0() -> None:
    result = command("--config", "configs/ereg.json", "--dry-run", "model.num_layers=6")
    assert result.returncode == 0, result.stderr
    assert result.stderr == ""
    assert '"num_layers": 6' in result.stdout
    assert figure(result.stdout, "thresholds") == 72


def test_command_tells_every_fault_in_a_line_and_exits_with_2() -> None:
    result = command(
        "--config", "configs/ereg.json", "--dry-run", "model.num_layrs=6", "logging.interval=0", "training.seed=-3"
    )
    assert_told(result, "did you mean model.num_layers?", "training.seed = -3", "logging.interval = 0")


def test_command_without_a_file() -> None:
    assert_told(command("--config", "configs/no.json", "--dry-run"), "configs/no.json: no such configuration file")


def test_a_reader_who_has_seen_enough_ends_the_plan_quietly() -> None:
    script = f"set -o pipefail; {sys.executable} train/main.py --config configs/ereg.json --dry-run | true"
    result = subprocess.run(["bash", "-c", script], cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert (result.returncode, result.stderr) == (128 + signal.SIGPIPE, "")


def test_training_without_a_dataset_is_refused_before_anything_starts() -> None:
    result = command("--config", "configs/ereg.json", "data.path=not/prepared/yet")
    assert_told(result, "not/prepared/yet")
    assert not (ROOT / "not").exists()
