"""`jaxpeft methods`: every method in jaxpeft/methods, as its file describes it (`ABOUT`, see jaxpeft/about.py)."""

import dataclasses
import inspect
import json
import shutil
import textwrap
from typing import Any

import tyro


@dataclasses.dataclass(frozen=True)
class Methods:
    """List the fine-tuning methods: what trains, what it saves, the default rate, PEFT's form, the reference.

    Of one that is named, or of each in a chain, also the options.
    """

    recipe: tyro.conf.Positional[str | None] = None
    """A method, or a chain as quantize+lora, to describe with its options; without one, all methods are listed."""
    json: bool = False
    """Print one JSON document on stdout and nothing else there."""


def run(args: Methods) -> dict[str, Any]:
    """Returns {"methods": [{"name", "level", "summary", "trains", "saves", "lr", ...}, ...]}, by name.

    Of a recipe these are its methods, in its order, each with "options": [{"name", "default", "help"}, ...].

    Raises:
        InputError: for a name that no method has.
    """
    from jaxpeft import method

    if args.recipe is None:
        return {"methods": [describe(name) for name in method.names()]}
    chained = [part.strip() for part in args.recipe.split("+")]
    return {"methods": [{**describe(name), "options": options(name)} for name in chained]}


def options(name: str) -> list[dict[str, Any]]:
    """What `--method-options` takes of a method: its factory's arguments, and what the docstring says of each."""
    from docstring_parser import DocstringStyle, parse

    from jaxpeft import method

    factory = getattr(method.module(name), name)
    said = {item.arg_name: item.description for item in parse(factory.__doc__ or "", DocstringStyle.GOOGLE).params}
    return [
        {"name": name, "default": argument.default, "help": " ".join((said.get(name) or "").split())}
        for name, argument in inspect.signature(factory).parameters.items()
    ]


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
        for option in row.get("options", ()):
            given = json.dumps(option["default"]) if option["default"] is not inspect.Parameter.empty else "needed"
            text = f"{row['name']}.{option['name']}={given}  {option['help']}"
            print(textwrap.fill(text, width, initial_indent="    ", subsequent_indent="        "))
    print("\nSeveral in a chain, applied in order: --method meft+lora --method-options meft.width=16 lora.rank=4")
