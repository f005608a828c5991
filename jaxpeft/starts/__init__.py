"""How LoRA's factors start where that is calculated: from the kernels, from activations, from gradients.

    y = x (W - s A0 B0) + s x A B        W (n, m) the base's, A (n, r), B (r, m)

A start gives A and B of each site, and A0, B0 where something is taken out of the kernel:

    pissa      A B = A0 B0, the principal part of W's singular value decomposition       kernels.py
    olora      A B = A0 B0, the first rows and columns of W's QR decomposition
    loftq      A B, the principal part of what quantization loses; A0 B0 that of the round before
    eva        A, the principal directions of the site's inputs; B = 0                   eva.py
    lora_ga    A B = A0 B0, singular vectors of the loss's gradient                      lora_ga.py

A0 and B0 are kept, so that the adapter can be exported for W, and what is left of the kernel be made again.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence

from jaxpeft import factory, tree
from jaxpeft.errors import InputError
from jaxpeft.method import View
from jaxpeft.starts.eva import eva
from jaxpeft.starts.kernels import loftq, olora, pissa
from jaxpeft.starts.lora_ga import lora_ga
from jaxpeft.starts.pair import Pair, Sited, Start, left
from jaxpeft.targets import kernel_path

STARTS: dict[str, Callable[..., Start]] = {
    "pissa": pissa,
    "olora": olora,
    "loftq": loftq,
    "eva": eva,
    "lora_ga": lora_ga,
}
Options = Mapping[str, int | float | str | bool]
__all__ = ["STARTS", "Options", "Pair", "Sited", "Start", "make", "put"]


def make(name: str, options: Options | None) -> Start:
    """A start of STARTS with its own options.

    Raises:
      InputError: for an option that it has not, or a value that it refuses.
    """
    known = ", ".join(inspect.signature(STARTS[name]).parameters) or "none"
    for option in options or {}:
        if option not in known.split(", "):
            raise InputError(f"lora: init {name!r} has no option {option!r}; it has {known}")
    return factory.call(f"lora, init {name!r}", STARTS[name], dict(options or {}))


def put(scope: str, start: Start, params: tree.Params, chosen: Sequence[Sited], view: View) -> tree.Params:
    """The parameters with `<site>/<scope>/a`, `b` and, where something is taken out of the kernel, `a0` and `b0`.

    A site that has leaves already (read from a file, for the original W) keeps them, and what is left of its kernel is
    made with them. A packed kernel is unpacked, and what is left of it packed again.
    """
    flat = tree.flatten(params)
    found = start.pairs(params, [site for site in chosen if f"{site.path}/{scope}/a" not in flat], view)
    for site in chosen:
        own, at = f"{site.path}/{scope}", kernel_path(flat, site.path)
        if (pair := found.get(site.path)) is not None:
            flat |= {f"{own}/a": pair.a, f"{own}/b": pair.b}
            flat |= {} if pair.taken is None else dict(zip((f"{own}/a0", f"{own}/b0"), pair.taken, strict=True))
        if f"{own}/a0" in flat:
            flat[at] = left(flat[at], flat[f"{own}/a0"], flat[f"{own}/b0"], site.scale)
    return tree.unflatten(flat)
