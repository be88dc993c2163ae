"""Print every configuration key with its type, default and meaning.

    python -m train.describe
    python -m train.describe --format markdown > reference.md

Keys are grouped by section, in the order of the configuration file.
"""

import argparse
import dataclasses
import textwrap
import typing
from dataclasses import dataclass

from data.command_line import run_command
from data.files.strict_json import to_json
from train.config import Config
from train.config.tree import describe_type

TOP_LEVEL = "top level"


@dataclass(frozen=True)
class Key:
    """One configuration key; `name` is its full name, e.g. `model.num_layers`."""

    name: str
    type: str
    default: str
    meaning: str


@dataclass(frozen=True)
class Section:
    """One section of the configuration, or the keys that stand outside all sections."""

    name: str
    meaning: str
    keys: list[Key]


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m train.describe", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--format", choices=["text", "markdown"], default="text", help="output format (default: %(default)s)"
    )
    options = parser.parse_args(arguments)
    print({"text": as_text, "markdown": as_markdown}[options.format](sections()))


def sections() -> list[Section]:
    """Return every section of the configuration. Keys outside all sections come last, as one more section."""
    types = typing.get_type_hints(Config)
    found, outside = [], []
    for field in dataclasses.fields(Config):
        section = types[field.name]
        if not dataclasses.is_dataclass(section):
            outside.append(_key(field.name, section, field))
            continue
        hints = typing.get_type_hints(section)
        keys = [_key(f"{field.name}.{key.name}", hints[key.name], key) for key in dataclasses.fields(section)]
        found.append(Section(field.name, (section.__doc__ or "").splitlines()[0], keys))
    return [*found, Section(TOP_LEVEL, "Keys outside all sections.", outside)]


def _key(name: str, annotation: typing.Any, field: dataclasses.Field) -> Key:
    default = field.default if field.default is not dataclasses.MISSING else {}
    return Key(name, describe_type(annotation), to_json(default), field.metadata["help"])


def as_text(sections: list[Section]) -> str:
    """Format the sections for a terminal."""
    lines = []
    for section in sections:
        lines += ["", f"{section.name}: {section.meaning}"]
        for key in section.keys:
            lines.append(f"  {key.name} = {key.default}    ({key.type})")
            lines.append(textwrap.indent(textwrap.fill(key.meaning, 110), "      "))
    return "\n".join(lines)


def as_markdown(sections: list[Section]) -> str:
    """Format the sections as Markdown: one second-level heading, one sentence and one table for each."""
    lines = []
    for section in sections:
        title = section.name.capitalize() if section.name == TOP_LEVEL else f"`{section.name}`"
        lines += [f"## {title}", "", section.meaning, "", "| Key | Type | Default | Meaning |", "|---|---|---|---|"]
        lines += [_table_row(f"`{key.name}`", key.type, f"`{key.default}`", key.meaning) for key in section.keys]
        lines.append("")
    return "\n".join(lines).rstrip()


def _table_row(*cells: str) -> str:
    return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"


if __name__ == "__main__":
    run_command(main)
