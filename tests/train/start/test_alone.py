"""Commands of one process do not take themselves for a rank, whatever launcher's variables they inherit."""

from collections.abc import Callable
from pathlib import Path

import pytest

from parallel.processes.place import Place, is_launched, place

INHERITED = {"RANK": "1", "WORLD_SIZE": "2", "LOCAL_RANK": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29500"}


def commands() -> dict[str, tuple[Callable[[list[str]], int], list[str]]]:
    """Return the commands that train or evaluate in this process or in others, with arguments that they refuse."""
    import train.benchmark.__main__
    import train.compare.command
    import train.evaluate
    import train.layout_test.__main__
    import train.study.__main__

    return {
        "evaluate": (train.evaluate.main, ["--run", "nowhere"]),
        "study": (train.study.__main__.main, ["run", "nowhere"]),
        "layout_test": (train.layout_test.__main__.main, ["--only", "tp=0"]),
        "compare": (train.compare.command.main, ["--config", "nowhere", "--layouts", "tp=2"]),
        "benchmark": (train.benchmark.__main__.main, ["learning", "--config", "nowhere"]),
    }


@pytest.mark.parametrize("name", ["evaluate", "study", "layout_test", "compare", "benchmark"])
def test_inherited_ranks_are_forgotten(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, name: str) -> None:
    monkeypatch.chdir(tmp_path)
    for variable, value in {**INHERITED, "LOCAL_SIZE": "2", "TORCHELASTIC_USE_AGENT_STORE": "True"}.items():
        monkeypatch.setenv(variable, value)
    assert place().world_size == 2
    main, arguments = commands()[name]
    assert main(arguments) == 2
    assert place() == Place() and not is_launched()
