"""LayerNorm tuning: the norms' scales, and biases where they have them, train; every matrix is frozen.

    y = s * x / sqrt(mean(x^2) + epsilon)                        RMSNorm:   s (d,) trained
    y = s * (x - mean(x)) / sqrt(var(x) + epsilon) + c           LayerNorm: s and c (d,) trained

A norm gets a float32 copy of its vectors beside them, `<norm>/ln_tuning/scale` and `bias`, which is read in their
place: the base stays as it is, and the copies are an adapter that can be saved alone, as PEFT does. They start at the
base's values, the adapted model at the base. A norm computes in float32 and rounds once, with either.

Kept for the backward pass, for d s and d c alone: nothing. Both are made of what d x is made of, the norm's input,
which a gradient that passes the norm needs anyway. While a layer is differentiated one more vector per token is at
work.

Merging puts the copies in the place of the base's vectors, in the base's dtype: exact up to that rounding. Kernels are
not touched, so it trains beside packed ones.

Paper: Zhao et al. 2023, "Tuning LayerNorm in Attention: Towards Efficient Multi-Modal LLM Finetuning",
arXiv:2312.11420. Deviations: of a multi-modal model the paper also trains the connector, the word embeddings and the
head; here only norms train (chain `full` for the others). By default all norms of a model do, those on the heads of
q and k among them, where PEFT has a list of names for each family.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax.numpy as jnp

from jaxpeft import patterns, tree
from jaxpeft.about import About, Defaults, Promises
from jaxpeft.errors import InputError
from jaxpeft.method import Method, Spec, trains
from jaxpeft.model import reads_stacks
from jaxpeft.peft import form
from jaxpeft.peft.base import config_of, shapes_of

SCOPE = "ln_tuning"
LEAVES = ("scale", "bias")


def block_bytes(config: Any, itemsize: int, **_) -> float:
    """Bytes per token kept in one layer beyond what a frozen backbone keeps: none.

    This counts each layer's share of the one vector per token that a layer has at work while it is differentiated.
    """
    return config.hidden_size * itemsize / config.num_hidden_layers


def ln_tuning(targets: str | Sequence[str] = "all") -> Method:
    """LayerNorm tuning.

    Args:
      targets: the norms that train: "all", a regular expression found in a norm's path (`re.search`), or names that
        paths end with, as in PEFT's `target_modules` (`["input_layernorm", "norm"]`, or "input_layernorm,norm").

    Returns:
      The method; it trains `<norm>/ln_tuning/scale` (L, d), and `bias` (L, d) where the norm has one.

    Raises:
      InputError: for a model without norms, or a target that matches none.
    """
    config = {"targets": targets if isinstance(targets, str) else list(targets)}

    def forward(model, view):
        known = view.base.config is not None or view.base.shapes is not None
        own = {tree.canonical(path) for path in (shapes_of(config_of(view.base)) if known else view.shapes)}

        def init(key, params):
            flat = tree.flatten(model.init(key, params))
            added = {}
            for norm in find((path for path in flat if tree.canonical(path) in own), targets):
                for leaf in LEAVES:
                    if f"{norm}/{leaf}" in flat:
                        added[f"{norm}/{SCOPE}/{leaf}"] = jnp.array(flat[f"{norm}/{leaf}"], jnp.float32, copy=True)
            return tree.unflatten({**added, **flat})

        def tuned(block):
            def call(layer, *rest, **named):
                return block(in_place(layer), *rest, **named)

            return reads_stacks(call, like=block)

        stack = model.stack.map_layers(tuned)
        stack = stack._replace(
            embed=lambda params, *rest: model.stack.embed(in_place(params), *rest),
            head=lambda params, x: model.stack.head(in_place(params), x),
        )
        return model._replace(init=init, stack=stack)

    return Method(
        forward=forward,
        roles=trains(lambda path: f"/{SCOPE}/" in path),
        merge=lambda params: in_place(params, lambda own, base: own.astype(base.dtype)),
        specs=(Spec("ln_tuning", config),),
    )


def find(paths: Any, targets: str | Sequence[str]) -> list[str]:
    """The norms that `targets` chooses among the paths of a model's leaves: each has a `scale`.

    Raises:
      InputError: if there are none, or a target matches none, with the nearest names.
    """
    norms = sorted(path.removesuffix("/scale") for path in paths if path.endswith("/scale"))
    if not norms:
        raise InputError("ln_tuning: the model has no norms; a norm is a module with a parameter called scale")
    if isinstance(targets, str) and re.fullmatch(r"[\w./]+(,[\w./]+)+", targets):
        targets = targets.split(",")
    if isinstance(targets, str):
        wanted = {targets: "" if targets == "all" else targets}
    else:
        wanted = {name: rf"(^|/){re.escape(name.replace('.', '/'))}$" for name in targets}
    chosen: set[str] = set()
    for name, expression in wanted.items():
        pattern = patterns.compiled(expression, "targets")
        found = {norm for norm in norms if pattern.found(tree.canonical(norm)) or pattern.found(norm)}
        if not found:
            names = dict.fromkeys([norm.rsplit("/", 1)[-1] for norm in norms])
            raise InputError(f"ln_tuning: targets {name!r}: matches no norm; nearest: {tree.nearest(name, names)}")
        chosen |= found
    return sorted(chosen)


def in_place(params: Any, cast: Callable[[Any, Any], Any] = lambda own, base: own) -> Any:
    """Nested parameters with each norm's copies, cast(copy, base's leaf), where the base's vectors were."""
    if not isinstance(params, Mapping):
        return params
    own = params.get(SCOPE, {})
    kept = {name: in_place(child, cast) for name, child in params.items() if name != SCOPE}
    return {**kept, **{name: cast(leaf, params[name]) for name, leaf in own.items()}}


ABOUT = About(
    summary="the norms' scales and biases, on copies that are saved alone",
    level="module",
    trains="the vectors of every norm: d numbers each, 2 d with a bias",
    saves="gradients and optimizer state of all but the norms, and the matrices' weight-gradient inputs",
    reference="Zhao et al. 2023, arXiv:2312.11420",
    example={},
    promises=Promises(block_bytes=block_bytes),
    defaults=Defaults(lr=1e-3),
    peft=form.norms("LN_TUNING", SCOPE, "ln_tuning_layers", lambda targets: {"targets": targets}),
)
