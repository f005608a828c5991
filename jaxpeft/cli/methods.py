"""`jaxpeft methods`: every method in jaxpeft/methods, what it is, what it saves and its source.

A method file says so itself in four constants: SUMMARY, KIND, SAVES and REFERENCE.
"""

import dataclasses
from typing import Any


@dataclasses.dataclass(frozen=True)
class Methods:
    """List the fine-tuning methods: what each is, what it saves, its reference."""

    json: bool = False
    """Print one JSON document on stdout and nothing else there."""


def run(args: Methods) -> dict[str, Any]:
    """Returns {"methods": [{"name", "summary", "kind", "saves", "reference"}, ...]}, by name."""
    from jaxpeft import method

    return {"methods": [describe(name, method.module(name)) for name in method.names()]}


def describe(name: str, module: Any) -> dict[str, str]:
    """One method's name and its four constants.

    Raises:
        AttributeError: for a method file without one of the four.
    """
    return {
        "name": name,
        "summary": module.SUMMARY,
        "kind": module.KIND,
        "saves": module.SAVES,
        "reference": module.REFERENCE,
    }


def show(document: dict[str, Any]) -> None:
    """Prints the methods, a few lines each."""
    import rich.console
    import rich.table

    table = rich.table.Table(box=None, pad_edge=False, padding=(0, 2, 1, 0))
    for column in ("name", "kind", "what it is", "saves", "reference"):
        table.add_column(column, overflow="fold", no_wrap=column == "name")
    for row in document["methods"]:
        table.add_row(row["name"], row["kind"], row["summary"], row["saves"], row["reference"])
    console = rich.console.Console(markup=False, highlight=False)
    console.print(table)
    console.print(
        "Several in a chain, applied in order: --method meft+lora --method-options meft.width=16 lora.rank=4",
        soft_wrap=True,
    )
