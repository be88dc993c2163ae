"""The commands of the tutorial run as they stand, in an empty folder."""

import os
import subprocess
import sys
from pathlib import Path

from tests.docs.pages import ROOT, blocks


def test_the_tutorial_leads_from_an_empty_folder_to_a_head_map(tmp_path: Path) -> None:
    commands = blocks(ROOT / "docs/tutorial.md", "bash")
    script = "\n".join(["set -euo pipefail", *commands])
    environment = {
        **os.environ,
        "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
        "PYTHONPATH": str(ROOT),
        "OMP_NUM_THREADS": "1",
        "CUDA_VISIBLE_DEVICES": "",
    }
    done = subprocess.run(
        ["bash"], input=script, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=540
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    assert "resumed runs/first at step 40" in done.stdout
    for picture in ("runs/first/figures/head_map.png", "comparison/validation_loss.png", "comparison/head_maps.png"):
        assert (tmp_path / picture).stat().st_size > 0
    assert (tmp_path / "runs/split/metrics.jsonl").read_text().count("\n") >= 20
