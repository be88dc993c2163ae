"""Compiled code is run from folders of this user alone."""

import os
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

from train.config import ConfigError
from train.start import compiled_code
from train.start.compiled_code import VARIABLES, keep_compiled_code_private

ROOT = Path(__file__).parents[3]


@pytest.fixture(autouse=True)
def cache(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    for variable in VARIABLES:
        monkeypatch.setenv(variable, "")  # so that what a test sets is taken back
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache/entropy-guided-transformer/compiled"


def test_folders_of_the_users_own_are_named(cache: Path) -> None:
    umask = os.umask(0)
    try:
        keep_compiled_code_private()
        keep_compiled_code_private()
    finally:
        os.umask(umask)
    assert cache.stat().st_mode & 0o777 == 0o700
    assert os.environ["TORCHINDUCTOR_CACHE_DIR"] == f"{cache}/inductor"
    assert os.environ["TRITON_CACHE_DIR"] == f"{cache}/triton"


def test_what_the_user_names_stays(monkeypatch: pytest.MonkeyPatch, cache: Path) -> None:
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", "/scratch/inductor")
    keep_compiled_code_private()
    assert os.environ["TORCHINDUCTOR_CACHE_DIR"] == "/scratch/inductor"
    assert os.environ["TRITON_CACHE_DIR"] == f"{cache}/triton"


@pytest.mark.parametrize("kind", ["another user's", "group", "others", "file", "another user's link", "dangling link"])
def test_a_prepared_folder_is_refused_in_a_line(
    monkeypatch: pytest.MonkeyPatch, cache: Path, tmp_path: Path, kind: str
) -> None:
    cache.parent.mkdir(parents=True)
    if kind == "file":
        cache.touch()
    elif "link" in kind:
        if kind != "dangling link":
            (tmp_path / "target").mkdir(0o700)
        cache.symlink_to(tmp_path / "target")
    else:
        cache.mkdir(0o700)
    if kind.startswith("another"):
        monkeypatch.setattr(os, "geteuid", lambda: os.getuid() + 1)
    if kind in ("group", "others"):
        cache.chmod({"group": 0o770, "others": 0o702}[kind])
    with pytest.raises(ConfigError, match=f"^{cache}: .* and compiled code would be run from it; delete it, or name"):
        keep_compiled_code_private()
    assert not os.environ["TORCHINDUCTOR_CACHE_DIR"]


def test_without_a_home_the_folder_lies_among_temporary_files(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setattr("os.path.expanduser", lambda path: path)
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    keep_compiled_code_private()
    folder = tmp_path / f"entropy-guided-transformer-{os.getuid()}"
    assert os.environ["TRITON_CACHE_DIR"] == f"{folder}/triton" and folder.stat().st_mode & 0o777 == 0o700
    monkeypatch.setenv("XDG_CACHE_HOME", "/proc/nowhere")
    monkeypatch.setenv("TRITON_CACHE_DIR", "")
    keep_compiled_code_private()
    assert os.environ["TRITON_CACHE_DIR"] == f"{folder}/triton"


def test_torch_takes_the_folder(monkeypatch: pytest.MonkeyPatch, cache: Path) -> None:
    from torch._inductor.runtime.cache_dir_utils import cache_dir

    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", "")  # the import has entered one
    keep_compiled_code_private()
    assert cache_dir() == f"{cache}/inductor"


@pytest.mark.parametrize("choice", ["", "/triton/0"])
def test_torchs_own_choice_is_not_the_users(monkeypatch: pytest.MonkeyPatch, cache: Path, choice: str) -> None:
    """torch enters it in the environment, and processes that are started then inherit it."""
    for variable in VARIABLES:
        monkeypatch.setenv(variable, f"{tempfile.gettempdir()}/torchinductor_{os.getuid()}{choice}")
    keep_compiled_code_private()
    assert os.environ["TORCHINDUCTOR_CACHE_DIR"] == f"{cache}/inductor"
    assert os.environ["TRITON_CACHE_DIR"] == f"{cache}/triton"


def test_a_change_of_what_graphs_call_changes_the_key(monkeypatch: pytest.MonkeyPatch) -> None:
    import torch

    keys = []
    for model, loop in ("aa", "ba", "ab"):
        facts = {"source model/transformer.py": model, "source train/loop/trainer.py": loop}
        monkeypatch.setattr(compiled_code, "source_facts", lambda facts=facts: facts)
        monkeypatch.setattr(torch.compiler.config, "cache_key_tag", "")  # put back after
        compiled_code.key_compiled_code.__wrapped__()
        keys.append(torch.compiler.config.cache_key_tag)
    assert keys[0] != keys[1] and keys[0] == keys[2]


COMPILED = """
import sys
import torch
from train.start import compiled_code

factor, tag = float(sys.argv[1]), sys.argv[2]
compiled_code.source_facts = lambda: {"source model/x.py": tag}
compiled_code.key_compiled_code()

@torch.library.custom_op("tests::twice", mutates_args=())
def twice(x: torch.Tensor) -> torch.Tensor:
    return 2 * x

twice.register_fake(torch.empty_like)
twice.register_autograd(lambda ctx, grad: factor * grad)

class Identity(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x.view_as(x)

    @staticmethod
    def backward(ctx, grad):
        return grad

x = torch.zeros(3, requires_grad=True)
torch.compile(lambda x: twice(Identity.apply(x.sin())), fullgraph=True)(x).sum().backward()
print(x.grad[0].item(), torch._dynamo.utils.counters["aot_autograd"]["autograd_cache_hit"])
"""


@pytest.mark.slow
def test_a_second_start_compiles_nothing_unless_a_backward_formula_has_changed(cache: Path) -> None:
    """torch does not see the formula: under the same key, it would go on with the old one's gradient."""
    found = []
    for arguments in (("2", "a"), ("2", "a"), ("5", "b"), ("5", "a")):
        environment = {**os.environ, "PYTHONPATH": str(ROOT), "TORCHINDUCTOR_CACHE_DIR": str(cache / "inductor")}
        command = [sys.executable, "-c", COMPILED, *arguments]
        done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
        assert done.returncode == 0, done.stderr
        found.append(done.stdout.split())
    assert found == [["2.0", "0"], ["2.0", "1"], ["5.0", "0"], ["2.0", "1"]]


@pytest.mark.slow
def test_a_user_without_a_home_trains_and_evaluates(tiny_config: Path, tmp_path: Path) -> None:
    """Importing megatron-core already makes torch look into its folder; so the folders are named before that."""
    environment = {"PATH": os.environ["PATH"], "TMPDIR": str(tmp_path), "OMP_NUM_THREADS": "1"}
    script = "import os, sys, runpy; os.path.expanduser = lambda path: path; sys.argv = sys.argv[1:]; "
    train = [sys.executable, "-c", script + "runpy.run_path(sys.argv[0], run_name='__main__')", "train/main.py"]
    evaluate = [sys.executable, "-c", script + "runpy.run_module(sys.argv[0], run_name='__main__')", "train.evaluate"]
    for command in (
        [*train, "--config", str(tiny_config), "training.train_steps=2"],
        [*evaluate, "--run", str(tmp_path / "run")],
    ):
        done = subprocess.run(command, env=environment, capture_output=True, text=True, cwd=ROOT, timeout=300)
        assert done.returncode == 0 and "error" not in done.stderr, done.stderr
    assert (tmp_path / f"entropy-guided-transformer-{os.getuid()}").is_dir()
    assert not [path.name for path in tmp_path.iterdir() if path.name.startswith(("torchinductor", "~"))]
    assert not (ROOT / "~").exists()
