"""Prints every configuration key with its default and meaning: python -m train.describe"""

import argparse
import dataclasses
import json
import textwrap
import typing

from data.errors import run_command
from train.config import Config
from train.config.tree import describe_type


def main(arguments: list[str] | None = None) -> None:
    argparse.ArgumentParser(prog="python -m train.describe", description=__doc__).parse_args(arguments)
    types = typing.get_type_hints(Config)
    for section in dataclasses.fields(Config):
        if not dataclasses.is_dataclass(types[section.name]):
            _print_key(section.name, types[section.name], section)
            continue
        print(f"\n{section.name}: {(types[section.name].__doc__ or '').splitlines()[0]}")
        hints = typing.get_type_hints(types[section.name])
        for key in dataclasses.fields(types[section.name]):
            _print_key(f"{section.name}.{key.name}", hints[key.name], key)


def _print_key(name: str, annotation: typing.Any, key: dataclasses.Field) -> None:
    default = key.default if key.default is not dataclasses.MISSING else {}
    print(f"  {name} = {json.dumps(default)}    ({describe_type(annotation)})")
    print(textwrap.indent(textwrap.fill(key.metadata["help"], 110), "      "))


if __name__ == "__main__":
    run_command(main)
