"""Compiled code is run from folders of this user alone."""

import os
from pathlib import Path

import pytest

from train.config import ConfigError
from train.start.compiled_code import VARIABLES, keep_compiled_code_private


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


def test_torch_takes_the_folder(cache: Path) -> None:
    from torch._inductor.runtime.cache_dir_utils import cache_dir, triton_cache_dir

    keep_compiled_code_private()
    assert cache_dir() == f"{cache}/inductor" and triton_cache_dir(0) == f"{cache}/triton"
