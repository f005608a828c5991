"""Do the documents' commands still print what stands below them? Each table of `jaxpeft plan` is made anew.

    python -m experiments.printed                      # of README.md and docs/, some ten minutes
    python -m experiments.printed README.md docs/pods.md
    python -m experiments.printed --list               # the commands, without running them

A line of a document counts as printed where its words stand in this order in a line of the command's output: a document
may leave columns out. Exit status 1 where one does not; what to write in its place is shown. Figures are a compiler's,
of the JAX that runs this, and no device is needed.
"""

from __future__ import annotations

import argparse
import os
import shlex
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).parents[1]
INDENT = "    "
BEGINS = "jaxpeft plan "


class Example(NamedTuple):
    """A command of a document, and the lines that stand below it as its output."""

    command: str
    lines: tuple[str, ...]


def examples(text: str) -> Iterator[Example]:
    """The commands of a Markdown text that stand alone in their block with output in the blocks below."""
    lines = text.splitlines()
    for i, line in enumerate(lines):
        whole = line.startswith(INDENT + BEGINS) and "..." not in line
        if whole and not any(lines[i + 1 : i + 2]):
            below = []
            for other in lines[i + 1 :]:
                if other and not other.startswith(INDENT):
                    break
                below.append(other.strip())
            if printed := tuple(filter(None, below)):
                yield Example(line.strip(), printed)


def stands(line: str, output: str) -> bool:
    """Whether the words of a line are, in this order, among those of one line of an output; "..." is any."""
    words = [word for word in line.split() if word != "..."]

    def among(other: str) -> bool:
        left = iter(other.split())
        return all(word in left for word in words)

    return any(map(among, output.splitlines()))


def run(command: str) -> str:
    """What a command prints, both streams, with devices described and none attached."""
    argv = [sys.executable, "-m", *shlex.split(command)]
    done = subprocess.run(argv, cwd=ROOT, env={**os.environ, "JAX_PLATFORMS": "cpu"}, capture_output=True, text=True)
    return done.stdout + done.stderr


def documents(names: Sequence[str]) -> list[Path]:
    """The files of these names; by default README.md and the pages of docs/."""
    return [ROOT / name for name in names] or [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", help="documents; README.md and docs/*.md by default")
    parser.add_argument("--list", action="store_true", help="the commands")
    args = parser.parse_args()
    if absent := [name for name in args.names if not (ROOT / name).is_file()]:
        parser.error(f"no document {absent[0]!r} in {ROOT}")
    outputs: dict[str, str] = {}
    same = True
    for path in documents(args.names):
        for example in examples(path.read_text()):
            where = f"{path.relative_to(ROOT)}: {example.command}"
            if args.list:
                print(where)
                continue
            if example.command not in outputs:
                outputs[example.command] = run(example.command)
            lacking = [line for line in example.lines if not stands(line, outputs[example.command])]
            same &= not lacking
            print(f"{where}: {'the same' if not lacking else 'differs'}", flush=True)
            if lacking:
                print("\n".join([*(f"  - {line}" for line in lacking), outputs[example.command].rstrip()]), flush=True)
    sys.exit(0 if same else 1)


if __name__ == "__main__":
    main()
