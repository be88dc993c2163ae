"""Test the files of CodeParrot, the paper's data: .json.gz, one JSON object per line, text under the key 'content'."""

import gzip
import json
from pathlib import Path

from data.prepare import main
from data.shards.manifest import load_manifest


def test_codeparrot_files_are_prepared_as_they_come(tmp_path: Path) -> None:
    source = tmp_path / "codeparrot"
    source.mkdir()
    for number in range(2):
        rows = [
            {"repo_name": "a/b", "path": "c.py", "content": f"def f_{number}_{row}(x):\n    return x + {row}\n" * 9}
            for row in range(40)
        ]
        text = "".join(json.dumps(row) + "\n" for row in rows)
        (source / f"file-{number:012}.json.gz").write_bytes(gzip.compress(text.encode()))
    output = tmp_path / "set"
    arguments = ["--include", "*.json.gz", "--text-key", "content", "--vocab-size", "300", "--workers", "1"]
    main(["--input", str(source), "--output", str(output), *arguments])
    report = json.loads((output / "report.json").read_text())
    assert report["documents"] == 80 and load_manifest(output).num_tokens("train") > 0
