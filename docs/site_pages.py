"""Make the pages of the site that come from elsewhere: those beside docs/, and the reference from the code.

MkDocs calls the functions named on_*. Nothing is written into docs/.
"""

import ast
import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File, Files

ROOT = Path(__file__).resolve().parents[1]
PAGES_OF = {"README": "index.md", "CONTRIBUTING": "contributing.md", "CHANGELOG": "changelog.md"}
PACKAGES = ("model", "parallel", "data", "train")
sys.path.insert(0, str(ROOT))


def on_config(config: Any) -> Any:
    """Add a page for each room to the navigation."""
    pages = [{room: f"reference/api/{room}.md"} for room in rooms()]
    reference = next(entry["Reference"] for entry in config["nav"] if "Reference" in entry)
    reference.append({"API": pages})
    return config


def on_files(files: Files, config: Any) -> Files:
    """Add the pages that are made here."""
    made = {
        "index.md": "---\nhide: [navigation]\n---\n" + from_root("README.md"),
        "contributing.md": from_root("CONTRIBUTING.md"),
        "changelog.md": from_root("CHANGELOG.md"),
        "reference/configuration.md": configuration(),
        "reference/commands.md": commands(),
        **{f"reference/api/{room}.md": api(room, modules) for room, modules in rooms().items()},
    }
    for path, content in made.items():
        files.append(File.generated(config, path, content=content))
    return files


def from_root(name: str) -> str:
    """Return a page beside docs/ with its links as they are inside docs/; files of the code lead to their API."""
    text = re.sub(r"\]\(docs/", "](", (ROOT / name).read_text(encoding="utf-8"))
    text = re.sub(r"\]\(([A-Z]+)\.md\)", lambda link: f"]({PAGES_OF[link[1]]})", text)
    text = text.replace("[LICENSE](LICENSE)", "`LICENSE`")
    return re.sub(r"\]\(([\w/]+)\.py\)", lambda link: f"]({api_address(link[1])})", text)


def api_address(path: str) -> str:
    """Return where a module is described: model/transformer -> reference/api/model.md#model.transformer."""
    room = path.rpartition("/")[0].replace("/", ".")
    return f"reference/api/{room}.md#{path.replace('/', '.')}"


def rooms() -> dict[str, list[str]]:
    """Return the modules of every folder of code, both by dotted name."""
    found: dict[str, list[str]] = {}
    for package in PACKAGES:
        for file in sorted((ROOT / package).rglob("*.py")):
            folder = ".".join(file.parent.relative_to(ROOT).parts)
            if file.name != "__init__.py":
                found.setdefault(folder, []).append(f"{folder}.{file.stem}")
            elif ast.parse(file.read_text(encoding="utf-8")).body[1:]:  # more than a docstring
                found.setdefault(folder, []).insert(0, folder)
    return found


def api(room: str, modules: list[str]) -> str:
    """Return the page of a room, which mkdocstrings fills."""
    return "\n\n".join([f"# {room}", *(f"::: {module}" for module in modules)]) + "\n"


def configuration() -> str:
    """Return every key with its default, type and meaning."""
    from train.describe import sections

    lines = [
        "# Configuration",
        "",
        "A configuration is a JSON file with these sections. A value on the command line, `section.key=value`, wins "
        "over the file, and the file over the defaults. An unknown key is an error. The same list in a terminal: "
        "`python -m train.describe`.",
    ]
    for section in sections():
        lines += ["", f"## {section.name}", "", section.meaning]
        for key in section.keys:
            lines += ["", f"`{key.name}` = `{key.default}` ({key.type})", f":   {key.meaning}"]
    return "\n".join(lines) + "\n"


def commands() -> str:
    """Return what every command says with --help."""
    found = sorted(module for modules in rooms().values() for module in modules if is_command(module))
    names = [module.removesuffix(".__main__") for module in found]
    texts = help_of([[name] for name in names])
    parts = [[name, sub] for name, text in zip(names, texts, strict=True) for sub in subcommands(name, text)]
    below = dict(zip(map(tuple, parts), help_of(parts), strict=True))
    lines = ["# Commands", "", "What each command says with `--help`. Exit statuses: [here](exit-statuses.md)."]
    for name, text in zip(names, texts, strict=True):
        lines += ["", f"## {name}", "", "```text", text, "```"]
        for (parent, sub), sub_text in below.items():
            if parent == name:
                lines += ["", f"### {name} {sub}", "", "```text", sub_text, "```"]
    return "\n".join(lines) + "\n"


def is_command(module: str) -> bool:
    """Return whether a module can be run."""
    file = ROOT / Path(*module.split(".")).with_suffix(".py")
    return file.exists() and 'if __name__ == "__main__"' in file.read_text(encoding="utf-8")


def subcommands(name: str, text: str) -> list[str]:
    """Return the subcommands that a help text names."""
    braces = re.search(r"^usage:.*?\{([a-z,]+)\} \.\.\.", text, re.MULTILINE)
    return braces[1].split(",") if braces else list(dict.fromkeys(re.findall(rf"python -m {name} ([a-z]+)\b", text)))


PRINT_HELP = """
import contextlib, io, json, runpy, sys
texts = []
for name, *rest in json.loads(sys.argv[1]):
    sys.argv = [name, *rest, "--help"]
    with contextlib.redirect_stdout(io.StringIO()) as text, contextlib.suppress(SystemExit):
        runpy.run_module(name, run_name="__main__", alter_sys=True)
    texts.append(text.getvalue().strip())
print(json.dumps(texts))
"""


def help_of(calls: list[list[str]]) -> list[str]:
    """Return what `python -m NAME [SUBCOMMAND] --help` prints for each call, all in one process."""
    environment = {**os.environ, "COLUMNS": "100", "NO_COLOR": "1", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-W", "ignore", "-c", PRINT_HELP, json.dumps(calls)]
    done = subprocess.run(command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, text=True, check=True)
    texts: list[str] = json.loads(done.stdout.splitlines()[-1])
    missing = [" ".join(call) for call, text in zip(calls, texts, strict=True) if not text]
    if missing:
        raise RuntimeError(f"no --help of {', '.join(missing)}")
    return texts
