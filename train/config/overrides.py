"""Parses overrides `section.key=value` anywhere on a command line with subcommands."""

import argparse


def parse_with_overrides(parser: argparse.ArgumentParser, arguments: list[str] | None) -> argparse.Namespace:
    """Parse a command line. Overrides after an option, which argparse leaves over, join `overrides`."""
    options, rest = parser.parse_known_args(arguments)
    unknown = [word for word in rest if word.startswith("-") or not hasattr(options, "overrides")]
    if unknown:
        parser.error(f"unrecognized arguments: {' '.join(unknown)}")
    if rest:
        options.overrides += rest
    return options
