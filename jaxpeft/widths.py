"""Widths of kernels that an option or a format does not fit: the errors, which say what fits all of a method's."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping

from jaxpeft import tree
from jaxpeft.errors import InputError
from jaxpeft.quant import FORMATS, Affine, affine
from pallas_kernels.packed import ALIGNED, BITS

_MOST_NAMES = 12  # of targets in an error; more of them are a list that nobody wants to copy


def dividing(sizes: Iterable[int]) -> str:
    """The end of an error about a number that does not divide every size.

    >>> dividing([172, 64])
    '4 and its divisors divide those of all'
    >>> dividing([7, 64])
    'no number above 1 divides those of all'
    """
    divides = math.gcd(*sizes)
    return f"{f'{divides} and its divisors divide' if divides > 1 else 'no number above 1 divides'} those of all"


def left_out(widths: Mapping[str, int], fits: Callable[[int], bool]) -> str:
    """The end of an error about a site that does not fit: the targets that leave out all such; "" if all are.

    Args:
      widths: {site: its width} of the method's.
      fits: whether one fits.

    >>> left_out({"layers/q_proj": 64, "layers/mlp/up_proj": 64, "layers/mlp/down_proj": 172}, lambda n: n == 64)
    'leave it out: targets q_proj,up_proj'
    """
    names = lambda wanted: {tree.canonical(s).rsplit("/", 1)[-1] for s, n in widths.items() if fits(n) == wanted}
    good, bad = names(True), names(False)
    if not good:
        return ""
    if good & bad or len(good) > _MOST_NAMES:
        return "leave it out of targets"
    return f"leave it out: targets {','.join(sorted(good))}{',' if len(good) == 1 else ''}"


def check_group(method: str, group: int | None, inputs: Mapping[str, int]) -> None:
    """Refuses groups that do not divide the inputs of every kernel, {site: inputs}; None and 0 always do.

    Raises:
      InputError: with the groups that do, and the targets of which this one does.
    """
    for site, n in inputs.items():
        if n % (group or 1):
            instead = [dividing(inputs.values()), left_out(inputs, lambda n: n % (group or 1) == 0)]
            said = f"{method}: group {group} does not divide the {n} inputs of {site}"
            raise InputError(f"{said}; {', or '.join(filter(None, instead))}")


def check_packs(method: str, what: str, unit: int, inputs: Mapping[str, int], others: Mapping[str, int] = {}) -> None:
    """Refuses a format that packs inputs in units which do not fill those of every kernel.

    Args:
      method, what: the method's name, and the format with its verb: "nf4 packs".
      unit: the inputs that are packed together.
      inputs: {site: inputs}.
      others: {what a user may take in its place: its unit}.

    Raises:
      InputError: with those of the others that fit all kernels, and the targets that this one fits.
    """
    for site, n in inputs.items():
        if n % unit:
            fitting = [words for words, of in others.items() if not any(n % of for n in inputs.values())]
            instead = [f"use {' or '.join(fitting)}" if fitting else "", left_out(inputs, lambda n: n % unit == 0)]
            said = f"{method}: {site} has {n} inputs, which {what} in {unit}s"
            raise InputError("; ".join(filter(None, [said, ", or ".join(filter(None, instead))])))


def check_format(method: str, format: str, group: int | None, inputs: Mapping[str, int]) -> None:
    """`check_group` and `check_packs` of one of `quant.FORMATS`."""
    units = {name: ALIGNED[BITS[name]] for name in FORMATS}
    check_group(method, group, inputs)
    check_packs(method, f"{format} packs", units[format], inputs, units)


def check_affine(method: str, bits: int, group: int | None, inputs: Mapping[str, int]) -> None:
    """`check_group` and `check_packs` of affine kernels of so many bits."""
    units = {f"bits {other}": Affine.aligned(other) for other in affine.FIELDS}
    check_group(method, group, inputs)
    check_packs(method, f"{bits} bits pack", Affine.aligned(bits), inputs, units)
