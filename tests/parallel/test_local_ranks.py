"""The fork server starts wherever temporary files lie."""

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]
PROGRAM = """
from parallel.local_ranks import fork_server
if __name__ == "__main__":
    process = fork_server("json").Process(target=print, args=("it runs",))
    process.start()
    process.join()
"""


def test_a_long_folder_of_temporary_files_is_no_trouble(tmp_path: Path) -> None:
    """The name of a socket has at most 107 bytes."""
    folder = tmp_path / ("x" * 60) / ("y" * 60)
    folder.mkdir(parents=True)
    environment = {**os.environ, "TMPDIR": str(folder), "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-c", PROGRAM]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, cwd=tmp_path, timeout=120)
    assert (done.stdout, done.returncode) == ("it runs\n", 0), done.stderr
