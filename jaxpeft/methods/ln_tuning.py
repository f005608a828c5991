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

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax.numpy as jnp

from jaxpeft import tree
from jaxpeft.about import About, Defaults, Promises
from jaxpeft.errors import InputError
from jaxpeft.method import Method, Spec, View, trains
from jaxpeft.model import Model, marked_as
from jaxpeft.peft import form
from jaxpeft.peft.base import config_of, shapes_of
from jaxpeft.targets import among

SCOPE = "ln_tuning"
LEAVES = ("scale", "bias")
COPIES = ("bitfit", SCOPE)  # the scopes of copies


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

    def choose(paths):
        norms, there = find(paths, targets), set(paths)
        return [path for norm in norms for leaf in LEAVES if (path := f"{norm}/{leaf}") in there]

    return Method(
        forward=lambda model, view: on_copies(model, view, SCOPE, choose),
        roles=trains(lambda path: f"/{SCOPE}/" in path),
        merge=lambda params: merge(params, SCOPE),
        specs=(Spec("ln_tuning", config),),
    )


def on_copies(model: Model, view: View, scope: str, choose: Callable[[list[str]], list[str]]) -> Model:
    """The model that reads vectors of its own in the place of some of the base's.

    Args:
      model: the model.
      view: of the chain.
      scope: a copy of `<module>/<leaf>` is `<module>/<scope>/<leaf>`, float32; `init` adds what is not there yet.
      choose: paths of the base's parameters -> those of the leaves that are copied.

    Raises:
      InputError: in `init`, for a leaf that has a copy of another method's, which would train without effect.
    """
    known = view.base.config is not None or view.base.shapes is not None
    own = {tree.canonical(path) for path in (shapes_of(config_of(view.base)) if known else view.shapes)}

    def init(key, params):
        flat = tree.flatten(model.init(key, params))
        added = {}
        for path in choose([path for path in flat if tree.canonical(path) in own]):
            module, _, leaf = path.rpartition("/")
            if others := [other for other in COPIES if other != scope and f"{module}/{other}/{leaf}" in flat]:
                raise InputError(f"{scope}: {others[0]} trains {path} already; leave it out of either's targets")
            added[f"{module}/{scope}/{leaf}"] = jnp.array(flat[path], jnp.float32, copy=True)
        return tree.unflatten({**added, **flat})

    def tuned(block):
        def call(layer, *rest, **named):
            return block(in_place(layer, scope), *rest, **named)

        return marked_as(call, block)

    stack = model.stack.map_layers(tuned)
    stack = stack._replace(
        embed=lambda params, *rest: model.stack.embed(in_place(params, scope), *rest),
        head=lambda params, x: model.stack.head(in_place(params, scope), x),
    )
    return model._replace(init=init, stack=stack)


def find(paths: Any, targets: str | Sequence[str]) -> list[str]:
    """The norms that `targets` chooses among the paths of a model's leaves: each has a `scale`.

    Raises:
      InputError: if there are none, or a target matches none, with the nearest names.
    """
    norms = sorted(path.removesuffix("/scale") for path in paths if path.endswith("/scale"))
    if not norms:
        raise InputError("ln_tuning: the model has no norms; a norm is a module with a parameter called scale")
    return among(norms, targets, "ln_tuning", "norm")


def in_place(params: Any, scope: str, cast: Callable[[Any, Any], Any] = lambda own, base: own) -> Any:
    """Nested parameters with each module's copies, cast(copy, base's leaf), where the base's vectors were.

    Copies that lie beside no vectors, as LISA's masters of them, are left where they are.
    """
    if not isinstance(params, Mapping):
        return params
    own = params.get(scope, {})
    if not own.keys() <= params.keys():
        return params
    kept = {name: in_place(child, scope, cast) for name, child in params.items() if name != scope}
    return {**kept, **{name: cast(leaf, params[name]) for name, leaf in own.items()}}


def merge(params: Any, scope: str) -> Any:
    """Nested parameters with the copies in the place of the base's vectors, rounded once to their dtype."""
    return in_place(params, scope, lambda own, base: own.astype(base.dtype))


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
