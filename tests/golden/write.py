"""Write the golden losses of the installed torch; `make golden` does it for every tested version:

    python -m tests.golden.write

The diff of the JSON files shows the effect of a change of arithmetic; commit it with the change.
"""

from parallel.local_ranks import run_ranks
from tests.golden.losses import distance, first_losses, read_sections, torch_release, write_section
from tests.golden.small import SHIPPED


def main() -> None:
    version = torch_release()
    for name in SHIPPED:
        (losses,) = run_ranks(first_losses, 1, name)
        before = read_sections(name).get(version)
        write_section(name, version, losses)
        moved = "new" if before is None else f"moved by {distance(losses, before):.1e}"
        print(f"{name}, torch {version}: {moved}")


if __name__ == "__main__":
    main()
