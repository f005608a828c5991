"""The process of the `jaxpeft` command, which is `python -m jaxpeft` too."""

import sys

from jaxpeft.interrupts import EndTheCommand


def main() -> int:
    """`jaxpeft.cli.main` of the process's arguments; signals are heard before all that this imports."""
    with EndTheCommand():
        from jaxpeft.cli import main as command

        return command()


if __name__ == "__main__":
    sys.exit(main())
