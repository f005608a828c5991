"""Full fine-tuning: the pretrained parameters themselves train, all or a part of them.

    W <- W + update(dL/dW)        for every path that `which` chooses

Parts are chosen by path, so bias-only tuning (Ben Zaken et al. 2022, arXiv:2106.10199), norms, the head, or the last
k layers are the same method. The last k layers are a segment of their own: `prepare` cuts the stack and only that
segment is differentiated, so the layers below keep nothing for weight gradients.
"""

from __future__ import annotations

import re

from jaxpeft import patterns, tree
from jaxpeft.about import About, Promises
from jaxpeft.errors import InputError
from jaxpeft.method import Method, Spec, trains

WHICH = {
    "all": r"",
    "layers": r"^layers",
    "biases": r"/bias$",
    "norms": r"norm/(scale|bias)$",
    "head": r"^(norm/(scale|bias)$|lm_head/)",
    "embeddings": r"^embed_tokens/",
}


def saved_bytes(inputs: int, outputs: int, itemsize: int, **_) -> int:
    """Bytes per token kept for one linear map's weight gradient, beyond what a frozen backbone keeps: its input."""
    del outputs
    return inputs * itemsize


def full(which: str = "all") -> Method:
    """Full fine-tuning of the parameters that `which` names.

    Args:
      which: "all", "layers", "biases", "norms", "head", "embeddings", "last:K" (the last K layers), or an expression
        found in the path.

    Returns:
      The method. With "last:K" the parameters come in two segments (`tree.join_layers` undoes it, and so does `merge`).

    Raises:
      InputError: if "last:K" has no whole K of at least 1, or the expression does not compile.
    """
    spec = (Spec("full", {"which": which}),)
    if which.startswith("last:"):
        return _last_layers(which, spec)
    return Method(roles=trains(pattern_of(which, "which").found), specs=spec)


def pattern_of(which: str, what: str) -> patterns.Pattern:
    """The expression for a name of WHICH, or that is given itself; `what` names it in errors."""
    if not which:
        raise InputError(f"{what} {which!r}: names nothing; 'all' names every parameter")
    return patterns.compiled(WHICH.get(which, which), what)


def of(which: str) -> str:
    """What an error says of leaves that it does not find: nothing of all."""
    return "" if which == "all" else f" of which={which!r}"


def _last_layers(which: str, spec: tuple[Spec, ...]) -> Method:
    count = which.removeprefix("last:")
    if not count.isdecimal() or int(count) < 1:
        raise InputError(f"which {which!r}: write last:K with a whole number K of at least 1")

    def prepare(params, view):
        if not tree.segments(params) or not view.base.stack.layered:  # a module scans over all of its stack
            raise InputError(f"which {which!r}: the model shows no stack of layers; name them, as which='^layers/3/'")
        layers = tree.count_layers(params)
        if int(count) > layers:
            raise InputError(f"which {which!r}: the model has {layers} layers")
        return tree.cut_layers(params, layers - int(count)) if int(count) < layers else params

    def trainable(path):
        # The cut gives the last segment a first layer above 0; with K = L there is no cut and `layers` is all of it.
        return re.match(r"layers(_[1-9]\d*_\d+)?/", path) is not None

    return Method(prepare=prepare, roles=trains(trainable), merge=tree.join_layers, specs=spec)


ABOUT = About(
    summary="all parameters, or those of a path pattern (biases, norms, head, last:K layers)",
    level="parameters",
    trains="the parameters that it names",
    saves="nothing; a pattern saves the gradients, optimizer state and weight-gradient inputs of what it leaves out",
    reference="bias-only: Ben Zaken et al. 2022, arXiv:2106.10199",
    example={},
    twice=True,  # each names leaves of the base, and what either names trains
    promises=Promises(site_bytes=saved_bytes),
    stored="base",
)
