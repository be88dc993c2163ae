from pathlib import Path

import pytest

from data.errors import DataError
from data.files.address import is_command, is_remote, local_path, resolved_address


@pytest.mark.parametrize(
    ("address", "path"),
    [
        ("runs/x", "runs/x"),
        ("~/runs/x", "/home/ada/runs/x"),
        (".", "."),
        ("file:///tmp/x", "/tmp/x"),
        ("file://~/x", "/home/ada/x"),
        (Path("~/x"), "/home/ada/x"),
    ],
)
def test_one_address_is_one_path(monkeypatch: pytest.MonkeyPatch, address: str, path: str) -> None:
    monkeypatch.setenv("HOME", "/home/ada")
    assert local_path(address) == Path(path)
    assert not is_remote(address)


def test_a_path_stays_itself(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert local_path("./~/x") == local_path(local_path("./~/x")) == tmp_path / "~/x"


@pytest.mark.parametrize(
    "address", ["", "a\0b", "a" * 5000, "\ud800", "~nobody-of-this-name/x", "s3://b/x", "pipe:cat {}"]
)
def test_what_is_no_path_is_one_line(address: str) -> None:
    with pytest.raises(DataError) as error:
        local_path(address)
    assert str(error.value).isprintable()
    assert len(str(error.value)) < 4400


def test_remote_addresses_are_passed_on() -> None:
    assert resolved_address("s3://bucket/x/") == "s3://bucket/x"
    assert resolved_address("pipe:cat /d/{}/") == "pipe:cat /d/{}/"
    assert is_remote("memory://x")
    assert is_command("pipe:cat {}")
