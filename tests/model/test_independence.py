"""`model/` is mathematics for one process: it knows neither ranks nor the engines that train it."""

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import model

ROOT = Path(model.__file__).parent
FORBIDDEN = ("torch.distributed", "deepspeed", "megatron", "parallel", "data", "train")
SOURCES = sorted(path.relative_to(ROOT).as_posix() for path in ROOT.rglob("*.py"))


def imported(tree: ast.AST) -> Iterator[str]:
    """Every dotted name that a module imports or reaches through an attribute of torch."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "relative imports hide what is imported"
            yield from (f"{node.module}.{alias.name}" for alias in node.names)
        elif isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == "torch":
            yield f"torch.{node.attr}"


def forbidden(source: str) -> list[str]:
    names = imported(ast.parse(source))
    return [name for name in names if any(f"{name}.".startswith(f"{other}.") for other in FORBIDDEN)]


@pytest.mark.parametrize("name", SOURCES)
def test_module_imports_nothing_distributed(name: str) -> None:
    assert forbidden((ROOT / name).read_text(encoding="utf-8")) == []


@pytest.mark.parametrize(
    "source",
    [
        "import torch.distributed as dist",
        "from torch import distributed",
        "from torch.distributed.tensor import DTensor",
        "def f(x):\n    torch.distributed.all_reduce(x)",
        "def f():\n    import megatron.core",
        "from parallel.grid import RankGrid",
        "import deepspeed",
    ],
)
def test_the_scan_sees(source: str) -> None:
    assert forbidden(source)


TRAINING_STEP = """
import sys
import torch
from model.config import ModelConfig
from model.regularizer import RegularizerConfig, entropy_penalty
from model.transformer import Transformer

config = ModelConfig(num_layers=2, hidden_size=16, num_attention_heads=2, seq_length=8).resolved()
model = Transformer(config, 11, seed=1)
optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
tokens = torch.arange(9).unsqueeze(1)
losses = []
for _ in range(8):
    total, entropies = model(tokens[:-1], tokens[1:])
    thresholds = [layer.attention.threshold for layer in model.layers.values()]
    loss = total / 8 + 0.1 * entropy_penalty(entropies, thresholds, RegularizerConfig(), 8)
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    losses.append(loss.item())
assert losses[-1] < losses[0] - 0.5, losses
assert not torch.distributed.is_initialized()
loaded = {name.partition(".")[0] for name in sys.modules}
assert not loaded & {"deepspeed", "megatron", "parallel", "train", "data"}, loaded
"""


def test_a_model_trains_in_a_bare_process() -> None:
    result = subprocess.run(
        [sys.executable, "-c", TRAINING_STEP], cwd=ROOT.parent, capture_output=True, text=True, timeout=300
    )
    assert result.returncode == 0, result.stderr
