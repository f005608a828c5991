"""`jaxpeft methods`: every method in jaxpeft/methods, as its file describes it (`ABOUT`, see jaxpeft/about.py)."""

import dataclasses
import shutil
import textwrap
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
    promises, defaults, host = about.promises, about.defaults, about
    if about.stored == "host":
        (other,) = [member for member in about.within.split("+") if member != name]
        host = method.about(other)
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
        "peft": host.peft.type if host.peft else None,
        "stored": about.stored,
        "reference": about.reference,
    }


def show(document: dict[str, Any]) -> None:
    """Prints the methods, a few lines each."""
    width = min(shutil.get_terminal_size().columns, 120)
    for row in document["methods"]:
        within = f" ({row['within']})" if row["within"] else ""
        merged = "" if row["merges"] else "; has no merged form"
        rate = "" if row["lr"] is None else f"; rate {row['lr']:g}"
        own = "a form of our own" if row["stored"] == "own" else "a whole model"
        form = f"PEFT's {row['peft']}" if row["peft"] else own
        print(textwrap.fill(f"{row['name']}{within}: {row['level']}; {row['summary']}{merged}", width))
        detail = f"trains {row['trains']}; saves {row['saves']}; stored in {form}{rate}; {row['reference']}"
        print(textwrap.fill(detail, width, initial_indent="    ", subsequent_indent="    "))
    print("\nSeveral in a chain, applied in order: --method meft+lora --method-options meft.width=16 lora.rank=4")
