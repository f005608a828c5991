"""A page of the documentation for each method, made from the method's file alone.

`page(name)` puts together what jaxpeft/methods/<name>.py says: its docstring (equation, what is kept, source,
deviations), its ABOUT, its factory's arguments, and the rows of experiments/results that name it. A method that is
added has its page with no further edit.
"""

import functools
import inspect
import re
from collections.abc import Callable
from typing import Any

from docs.generate import tables
from jaxpeft import method as contract
from jaxpeft import models, sites, tree
from jaxpeft.about import About
from jaxpeft.models import geometries

# The worked example: bfloat16 on a decoder, or where rows or images must be classified on ViT.
DECODER, ENCODER, ITEMSIZE, TOKENS = "llama3.2-1b", "vit-l-16", 2, 4 * 1024
LEVELS = {
    "parameters": "the model's parameters themselves",
    "site": "linear maps, chosen by `--targets`",
    "module": "whole modules: attention, MLP, layer",
    "input": "what layers read beside the stream: keys, values, queries",
    "stack": "how the layers are run",
    "step": "how a step trains what another method, or itself, names",
}
_THEIRS = " In a chain whose other members train adapters, `adapter/` is theirs."
# The most rows of one table of results on a page.
_MOST = 12


def names() -> list[str]:
    """Every method, in the order of its pages."""
    return contract.names()


def page(name: str) -> str:
    """The Markdown of a method's page; its API section is a directive of mkdocstrings."""
    about = contract.about(name)
    docstring = inspect.getdoc(contract.module(name)) or ""
    equations, deviations = split_deviations(docstring)
    parts = [
        f"# {name}\n\n{_sentence(about.summary)}",
        _facts(name, about),
        f"    jaxpeft train --method {about.within or name} ...",
        f"## Equations\n\n{prose(equations)}",
        f"## What a step keeps\n\n{kept(name, about)}",
        f"## Arguments\n\nFor the command line, `--method-options NAME=VALUE ...`.\n\n"
        f"::: jaxpeft.methods.{name}.{name}\n    options:\n      heading_level: 3",
        f"## Merging and PEFT\n\n{forms(about)}",
        f"## Caveats\n\n{caveats(about, deviations)}",
        f"## Measured\n\n{measured(name)}",
        f"Made from `jaxpeft/methods/{name}.py`.",
    ]
    return "\n\n".join(parts) + "\n"


def index() -> str:
    """The page that lists the methods."""
    rows = []
    for name in names():
        about = contract.about(name)
        lr = about.defaults.lr
        cells = (
            f"[{name}]({name}.md)",
            _cell(about.summary),
            _cell(about.saves),
            "" if lr is None else f"{lr:g}",
            _merges(about),
            short_form(about),
        )
        rows.append("| " + " | ".join(cells) + " |")
    head = "| method | what it is | what a step saves | rate | merges | PEFT |\n|---|---|---|---|---|---|\n"
    return (
        "# The methods\n\nEach page is made from the method's file; `jaxpeft methods` prints the same. A rate that is "
        "missing is the run's own. How to choose: [choosing a method](../choosing.md).\n\n" + head + "\n".join(rows)
    )


def _facts(name: str, about: About) -> str:
    defaults = about.defaults
    rate = "the run's own" if defaults.lr is None else f"{defaults.lr:g}"
    beside = "".join(f"; with {other}: {lr:g}" for other, lr in defaults.lr_with.items())
    decay = "0" if defaults.weight_decay is None else f"{defaults.weight_decay:g}"
    chain = f"trains nothing by itself; as in `{about.within}`" if about.within else "alone"
    chain += "" if about.within or about.chain == "alone" else f", or `{about.chain or name + '+...'}`"
    rows = {
        "acts on": LEVELS[about.level],
        "trains": about.trains,
        "saves": about.saves,
        "backward pass": "yes" if about.promises.backward else "none",
        "starts at the base": "yes" if about.promises.starts_at_base else "no, or only nearly",
        "default rate": rate + beside,
        "weight decay": decay,
        "in a chain": chain + ("; more than once, too" if about.twice else ""),
        "merges": _merges(about),
        "PEFT": short_form(about),
        "source": about.reference,
    }
    return "| | |\n|---|---|\n" + "\n".join(f"| {key} | {_cell(value)} |" for key, value in rows.items())


def prose(docstring: str) -> str:
    """A docstring as Markdown: indented blocks stay code, and elsewhere only backticks mean anything."""
    lines = []
    for line in docstring.splitlines():
        if not line.startswith("    "):
            parts = line.split("`")
            parts[::2] = [re.sub(r"([*_<>\[\]|])", r"\\\1", part) for part in parts[::2]]
            line = "`".join(parts)
            if lines and lines[-1].startswith("    ") and line:  # text right below a block
                lines.append("")
        elif lines and lines[-1] and not lines[-1].startswith("    "):  # a block right below text
            lines.append("")
        lines.append(line)
    return "\n".join(lines)


def kept(name: str, about: About) -> str:
    """Bytes per token for the backward pass, by the method's own count, at a published size."""
    promises = about.promises
    geometry = ENCODER if promises.classifies else DECODER
    where = f"{geometry}'s geometry, bfloat16, default arguments"
    if not promises.backward:
        return "Nothing: there is no backward pass. A step needs what a forward pass needs."
    if promises.site_bytes:
        return _kept_at_sites(name, promises.site_bytes, geometry, where)
    config, arguments = _model(geometry)[0], _defaults(name)
    layers = config.num_hidden_layers
    if promises.layer_bytes:
        per_layer = promises.layer_bytes(config, ITEMSIZE, **arguments)
        words = "each layer that it runs keeps, in all,"
    elif promises.block_bytes:
        per_layer = promises.block_bytes(config, ITEMSIZE, **arguments)
        words = "each layer keeps, beyond what a frozen one keeps,"
    else:
        return "What the method that it is chained to keeps."
    if not per_layer and about.level == "step":
        return "No bytes per token of its own: what trains in the backward pass keeps what it keeps alone."
    text = (
        f"With {where}, {words} at most **{per_layer:,.0f} bytes per token**: "
        f"{per_layer * layers * TOKENS / 2**20:,.1f} MiB in {layers} layers at 4 x 1024 tokens."
    )
    if promises.row_bytes:
        row = promises.row_bytes(config, ITEMSIZE, **arguments)
        text += f" Beside these, {row:,.0f} bytes per row of the batch, whatever its length."
    return text


def _kept_at_sites(name: str, site_bytes: Callable[..., float], geometry: str, where: str) -> str:
    config, shapes = _model(geometry)
    arguments = _defaults(name)
    rows, total = [], 0.0
    for site in sites.find(tree.unflatten(shapes), arguments.get("targets", "all-linear")):
        inputs, outputs = shapes[f"{site}/kernel"].shape[-2:]
        here = site_bytes(inputs=inputs, outputs=outputs, itemsize=ITEMSIZE, **arguments)
        total += here
        rows.append(f"| `{site.removeprefix('layers/')}` | {inputs} x {outputs} | {here:,.0f} |")
    layers = config.num_hidden_layers
    return (
        f"With {where}, beyond what a frozen backbone keeps, bytes per token and layer:\n\n"
        "| linear map | inputs x outputs | at most |\n|---|---:|---:|\n" + "\n".join(rows) + "\n"
        f"| all of a layer | | **{total:,.0f}** |\n\n"
        f"That is {total * layers * TOKENS / 2**20:,.1f} MiB in {layers} layers at 4 x 1024 tokens, and an upper "
        "bound: maps that read the same input share it, and a plan (`--save`) that computes inputs again keeps less. "
        "See [where the bytes go](../bytes.md)."
    )


@functools.cache
def _model(geometry: str) -> tuple[Any, tree.Flat]:
    """(configuration, {path: shape}) of a published size; nothing is allocated."""
    config = geometries.load(geometry)
    family = models.family(config)
    own = family.from_hf(config, "bfloat16").config
    return own, family.shapes(own)


def _defaults(name: str) -> dict[str, Any]:
    """The factory's defaults."""
    parameters = inspect.signature(getattr(contract.module(name), name)).parameters
    return {key: p.default for key, p in parameters.items() if p.default is not inspect.Parameter.empty}


def short_form(about: About) -> str:
    """What a run leaves, in a few words."""
    if about.peft:
        return f"`{about.peft.type}`"
    if about.stored == "host":
        return "that of the method beside it"
    return "none: a whole checkpoint" if about.stored == "base" else "none: a format of our own"


def forms(about: About) -> str:
    """What becomes of what was trained."""
    if about.stored == "host":
        return (
            f"`adapter/` is that of the method beside it (`{about.within}`), for the base as it was. `jaxpeft merge` "
            "gives plain kernels in the base's type."
        )
    if about.stored == "base":
        return (
            "Where it trains the weights themselves the run leaves `model/`, a whole checkpoint that every tool reads; "
            "there is nothing to merge." + ("" if about.chain == "alone" else _THEIRS)
        )
    merge = "There is no merged form: `jaxpeft merge` refuses it with a line that says so."
    if about.promises.merges:
        merge = (
            "`jaxpeft merge` folds it into the base: the merged model computes the same, within "
            f"{about.promises.tolerance:g} of the logits in float32."
        )
    form = "PEFT has no form of it: `adapter/` is in a format of our own, which `generate` and `train --adapter` read."
    if about.peft:
        form = f"`adapter/` is in PEFT's format, `peft_type` `{about.peft.type}`, for [other tools](../serving.md)."
        if about.peft.when is None:
            form += " An adapter that PEFT wrote is read as another method of that type."
    return f"{merge}\n\n{form}"


def split_deviations(docstring: str) -> tuple[str, str]:
    """A file's docstring before and behind "Deviations:", its last part."""
    before, _, deviations = re.sub(r"Deviations?:\s+", "\0", docstring, count=1).partition("\0")
    return before.rstrip(), deviations


def caveats(about: About, deviations: str) -> str:
    """What may surprise: from the promises, and where the method deviates from its source."""
    promises = about.promises
    found = []
    if not promises.starts_at_base:
        found.append("The adapted model does not compute exactly what the base computes at the start.")
    if not promises.merges:
        found.append("It cannot be merged, so a tool that reads plain checkpoints cannot serve it.")
    if not promises.backward:
        found.append("One random direction says little of a gradient: many more steps are needed, at a small rate.")
    if promises.classifies:
        found.append("For encoders with a classifier only (`--task classify`).")
    if about.within:
        found.append(f"It trains nothing by itself: write `--method {about.within}`.")
    if about.defaults.direction == "sgd":
        found.append(
            "Its gradients are the direction of a step: the optimizer is plain SGD, and `--clip` has no effect."
        )
    if about.peft is None and promises.merges and about.stored == "own":
        found.append("PEFT has no format for it; `jaxpeft merge` makes a checkpoint that every tool reads.")
    lines = "\n".join(f"- {line}" for line in found)
    if deviations:
        lines += "\n\nWhere it deviates from its source: " + prose(deviations)
    return lines.strip() or "None are known."


def measured(name: str) -> str:
    """The rows of experiments/results that name the method, alone or in a chain."""
    found = []
    # The table of all methods comes first, the device's report last.
    order = sorted(tables.tables(), key=lambda t: ("methods_1b" not in t.file, "device/" in t.file, t.file))
    for table in order:
        if rows := tables.rows_of(table, name):
            link = f"[{table.file}](../results/{table.file})"
            more = f"\n\n{len(rows) - _MOST} more rows in {link}." if len(rows) > _MOST else ""
            found.append(f"{table.title} ({link}):\n\n{table.header}\n" + "\n".join(rows[:_MOST]) + more)
    return "\n\n".join(found) or "Not yet: no table of experiments/results has a row of it."


def _merges(about: About) -> str:
    if about.stored == "base":
        return "nothing to merge"
    return "yes" if about.promises.merges else "no"


def _cell(text: str) -> str:
    return text.replace("|", "\\|")


def _sentence(text: str) -> str:
    return text[0].upper() + text[1:] + "."
