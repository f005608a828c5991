"""What a method's file says of its method: one typed object, `ABOUT`, at the end of the file.

`jaxpeft methods`, the conformance test, the exporter and a run's defaults read it; nothing else knows what a method is.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from typing import Any, Literal, NamedTuple, get_args

Level = Literal["parameters", "site", "module", "input", "stack", "step"]


class Defaults(NamedTuple):
    """What a run does where its user says nothing. None: no opinion.

    lr: peak learning rate.  lr_with: {another member of the chain: the rate with it}.
    beside: the rate beside an adapter that has one of its own, as a multiple of that.
    weight_decay: decoupled.
    direction: "adam", or "sgd" for a method whose gradients are the direction.
    """

    lr: float | None = None
    lr_with: Mapping[str, float] = {}
    beside: float | None = None
    weight_decay: float | None = None
    direction: Literal["adam", "sgd"] | None = None


class Promises(NamedTuple):
    """What a step with this method promises; tests/methods_test.py holds each file to it.

    site_bytes: (inputs, outputs, itemsize, **arguments) -> bytes per token that one adapted kernel keeps for the
      backward pass beyond what a frozen backbone keeps; or
    block_bytes: (config, itemsize, **arguments) -> bytes per token that one layer keeps beyond what a frozen one keeps,
      of a method that is not at kernels; or
    layer_bytes: (config, itemsize, **arguments) -> bytes per token that one more layer keeps, of a method that runs
      the layers in its own way.
    row_bytes: (config, itemsize, **arguments) -> bytes per row of the batch, whatever its length, beside these.
    state: (view, **arguments) -> how many numbers the optimizer's state has; None: Adam's two for each trained one.
    backward: whether a step has a backward pass.
    starts_at_base: whether the adapted model equals the base at the start.
    merges: whether there is a merged form; tolerance: within which it computes the same.
    returns: {path: leaf} of the trained leaves -> those that end each step where they began, taken over by `move`.
    falls: by how much the loss falls in `steps` steps on one batch at `lr`.
    classifies: for encoders that classify rows, and no other model.
    config: fields of config.json that the tests' Llama has beside its own, for a method that trains what no Llama has.
    """

    site_bytes: Callable[..., float] | None = None
    block_bytes: Callable[..., float] | None = None
    layer_bytes: Callable[..., float] | None = None
    row_bytes: Callable[..., float] | None = None
    state: Callable[..., int] | None = None
    backward: bool = True
    starts_at_base: bool = True
    merges: bool = True
    tolerance: float = 1e-4
    returns: Callable[..., Any] | None = None
    falls: float = 0.01
    steps: int = 6
    lr: float = 1e-2
    classifies: bool = False
    config: Mapping[str, Any] = {}


class About(NamedTuple):
    """A method, in its file's words.

    summary: what it is, in a line.
    level: what it acts on.
    trains: what is differentiated, or moves.
    saves: what a step does without that full fine-tuning needs; and what it keeps more than a frozen backbone.
    reference: the source.
    example: arguments of the factory, for the conformance test.
    promises: what a step promises.
    defaults: of a run.
    chain: where it stands in a chain, as in "...+lisa"; "" in front of others; "alone" for one that is in none.
    within: for a method that trains nothing by itself, the members it is tried with, as in "quantize+lora"; "" alone.
    peft: its form in Hugging Face PEFT (a `jaxpeft.peft.form.Form`); None where PEFT has none.
    stored: where PEFT has none, what a run of it leaves: an adapter in our own form; the "base", a whole model, as
      parameters of the base itself train; or what the "host" leaves, the other member of `within`, to which it adds
      nothing.
    twice: whether it may stand in a chain more than once.
    steps: the argument that says how many steps a run should have more of; "" if there is none.
    changes_kernels: arguments -> whether the kernels beside its leaves are others than those of the base that an
      exported adapter is for.
    remade: path -> whether `setup` makes a leaf of the method's again, so that no adapter's file holds it: a frozen one
      that follows from the base, or one of training alone, such as the masters of layers that are drawn, which after
      each step stand in their stacks.
    shaped: path -> whether the shape of a leaf of the method's follows from the base's values (a rank from a spectrum),
      so that an adapter's file tells it.
    places: (path, the (n, m) of the kernel beside it) -> the number below which the integers of a leaf of the method's
      are, as they count places in the kernel; None of another leaf.
    """

    summary: str
    level: Level
    trains: str
    saves: str
    reference: str
    example: Mapping[str, Any]
    promises: Promises
    defaults: Defaults = Defaults()
    within: str = ""
    chain: str = ""
    peft: Any = None
    stored: Literal["own", "base", "host"] = "own"
    twice: bool = False
    steps: str = ""
    changes_kernels: Callable[[Mapping[str, Any]], bool] = lambda arguments: False
    remade: Callable[[str], bool] = lambda path: False
    shaped: Callable[[str], bool] = lambda path: False
    places: Callable[[str, int, int], int | None] = lambda path, n, m: None


def check(name: str, file: Any) -> About:
    """The ABOUT of a method's file.

    Raises:
      TypeError: for a file without one, or one with a field that cannot be right.
    """
    about = getattr(file, "ABOUT", None)
    if not isinstance(about, About):
        raise TypeError(f"jaxpeft/methods/{name}.py: has no ABOUT of type jaxpeft.about.About")
    for field in ("summary", "trains", "saves", "reference"):
        if not isinstance(getattr(about, field), str) or not getattr(about, field).strip():
            raise TypeError(f"jaxpeft/methods/{name}.py: ABOUT.{field} says nothing")
    if about.level not in get_args(Level):
        raise TypeError(f"jaxpeft/methods/{name}.py: ABOUT.level {about.level!r} is not one of {get_args(Level)}")
    known = inspect.signature(getattr(file, name)).parameters
    if strange := [argument for argument in about.example if argument not in known]:
        raise TypeError(f"jaxpeft/methods/{name}.py: ABOUT.example: {name} takes no {strange[0]}")
    if about.steps and about.steps not in known:
        raise TypeError(f"jaxpeft/methods/{name}.py: ABOUT.steps: {name} takes no {about.steps}")
    promises = about.promises
    given = [promises.site_bytes, promises.block_bytes, promises.layer_bytes]
    if promises.backward and given.count(None) != 2 and not about.within:
        raise TypeError(f"jaxpeft/methods/{name}.py: ABOUT.promises: give one of site_bytes, block_bytes, layer_bytes")
    return about
