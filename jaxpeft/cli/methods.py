"""`jaxpeft methods`: every method in jaxpeft/methods, as its file describes it (`ABOUT`, see jaxpeft/about.py)."""

import dataclasses
from typing import Any


@dataclasses.dataclass(frozen=True)
class Methods:
    """List the fine-tuning methods: what trains, what it saves, the default rate, PEFT's form, the reference."""

    json: bool = False
    """Print one JSON document on stdout and nothing else there."""


def run(args: Methods) -> dict[str, Any]:
    """Returns {"methods": [{"name", "level", "summary", "trains", "saves", "lr", ...}, ...]}, by name."""
    from jaxpeft import method

    return {"methods": [describe(name) for name in method.names()]}


def describe(name: str) -> dict[str, Any]:
    """One method, from its file.

    Raises:
        TypeError: for a method file whose ABOUT is not whole.
    """
    from jaxpeft import method

    about = method.about(name)
    promises, defaults = about.promises, about.defaults
    return {
        "name": name,
        "level": about.level,
        "summary": about.summary,
        "trains": about.trains,
        "saves": about.saves,
        "within": about.within or None,
        "backward": promises.backward,
        "merges": promises.merges,
        "lr": defaults.lr,
        "weight_decay": defaults.weight_decay,
        "peft": about.peft.type if about.peft else None,
        "reference": about.reference,
    }


def show(document: dict[str, Any]) -> None:
    """Prints the methods, a few lines each."""
    import rich.console
    import rich.table

    table = rich.table.Table(box=None, pad_edge=False, padding=(0, 2, 1, 0))
    for column in ("name", "what it is", "trains", "saves", "rate", "PEFT", "reference"):
        table.add_column(column, overflow="fold", no_wrap=column == "name")
    for row in document["methods"]:
        name = row["name"] + (f"\n({row['within']})" if row["within"] else "")
        rate = "-" if row["lr"] is None else f"{row['lr']:g}"
        merged = "" if row["merges"] else "; has no merged form"
        form = (row["peft"], row["reference"])
        table.add_row(
            name,
            f"{row['level']}: {row['summary']}{merged}",
            row["trains"],
            row["saves"],
            rate,
            form[0] or "own",
            form[1],
        )
    console = rich.console.Console(markup=False, highlight=False)
    console.print(table)
    console.print(
        "Several in a chain, applied in order: --method meft+lora --method-options meft.width=16 lora.rank=4",
        soft_wrap=True,
    )
