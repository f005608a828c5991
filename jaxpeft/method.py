"""The contract: a method is six pure functions, the identity by default, and `chain` composes them.

    slot       signature                                    used by
    prepare    params -> params                             quantization, SVD initialisations, cutting the stack
    forward    Model -> Model                               adapters, prompts, ReFT, reversible stacks, side networks
    trainable  path -> bool                                 every method: the one source of what trains
    gradient   Objective -> Objective                       zeroth-order, layer sampling, coresets, preconditioning
    update     optax transform -> optax transform           GaLore, LISA, SpIEL, learning-rate groups
    merge      params -> params                             everything that folds back into the base

`trainable` differentiates structurally: `tree.split` makes two flat dicts of the parameters and the loss is
differentiated with respect to the first only. State between steps lives in one place, the optimizer state: a method
that needs some adds an optax transform in `update`, and its `gradient` slot reads it from the `opt_state` that it is
handed (`optax.tree_utils.tree_get(opt_state, "field")`). Leaves that change between steps without being
differentiated (indices, masks, sampled layers) are a `jaxpeft.train.state.Mutable` in that state; the step lays them
over the frozen leaves. What a `gradient` slot has to say to `update` it puts into `aux`, which every update receives
as the extra argument `aux`. docs/contract.md writes ten methods of the literature in these slots.
"""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Callable, Mapping
from types import ModuleType
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from jaxpeft import tree
from jaxpeft.errors import InputError
from jaxpeft.model import Model
from jaxpeft.quant import is_packed


class Spec(NamedTuple):
    """What a factory was called with: enough to make the method again, and to write its adapter_config.json."""

    name: str
    config: dict[str, Any]


class Objective(NamedTuple):
    """What a step minimises.

    value: (trainable, frozen, batch, key) -> (loss, aux) of a batch of any size
    value_and_grad: (trainable, frozen, batch, key, opt_state) -> ((loss, aux), gradients) of a step's batch; the
      micro-batches of gradient accumulation are inside. Gradients are like `trainable`, or whatever the method's own
      `update` takes in their place.

    `key` is a PRNG key, always given. `aux` is a dict of arrays: "weight" is what the loss is a mean over, scalars
    become metrics.
    """

    value: Callable[..., tuple[jax.Array, dict[str, Any]]]
    value_and_grad: Callable[..., tuple[tuple[jax.Array, dict[str, Any]], tree.Flat]]


def identity(x):
    """x."""
    return x


def _no_conversions(params: tree.Params) -> dict[str, Callable[[jax.Array], Any]]:
    del params
    return {}


def _nothing(path: str) -> bool:
    del path
    return False


class Method(NamedTuple):
    """One way to fine-tune. See the module's docstring for the slots.

    `convert` says which leaves `prepare` stores otherwise, each of them alone, so that a checkpoint is converted as it
    is read (`jaxpeft.hf.load_pretrained`) and never lies in memory as it was: params -> {path: array -> leaf}. It is
    given shapes, and refuses what it cannot convert; each function takes the leaf, or one layer (n, m) of it, and the
    leaf is the layers stacked. `prepare` does the same to what comes to it as it was, and leaves the rest.
    """

    prepare: Callable[[tree.Params], tree.Params] = identity
    forward: Callable[[Model], Model] = identity
    trainable: Callable[[str], bool] = _nothing
    gradient: Callable[[Objective], Objective] = identity
    update: Callable[[optax.GradientTransformation], optax.GradientTransformation] = identity
    merge: Callable[[tree.Params], tree.Params] = identity
    specs: tuple[Spec, ...] = ()
    convert: Callable[[tree.Params], Mapping[str, Callable[[jax.Array], Any]]] = _no_conversions


def chain(*methods: Method) -> Method:
    """Applies methods in order; `merge` unwinds them in reverse order; a path trains if any of them says so.

    Leaves are converted while they are read only before the first method that prepares something else, which may need
    them as they were (PiSSA): from there on conversions are part of `prepare`.
    """

    def in_order(slot: str):
        def apply(x):
            for method in methods:
                x = getattr(method, slot)(x)
            return x

        return apply

    def merge(params):
        for method in reversed(methods):
            params = method.merge(params)
        return params

    def convert(params):
        found: dict[str, Callable[[jax.Array], Any]] = {}
        for method in methods:
            if method.convert is _no_conversions and method.prepare is not identity:
                break
            found = {**method.convert(params), **found}
        return found

    prepares = any(method.prepare is not identity for method in methods)
    return Method(
        prepare=in_order("prepare") if prepares else identity,
        forward=in_order("forward"),
        trainable=lambda path: any(method.trainable(path) for method in methods),
        gradient=in_order("gradient"),
        update=in_order("update"),
        merge=merge,
        specs=sum((method.specs for method in methods), ()),
        convert=convert if any(method.convert is not _no_conversions for method in methods) else _no_conversions,
    )


def setup(method: Method, base: Model, params: Mapping[str, Any], key: jax.Array) -> tuple[Model, tree.Flat, tree.Flat]:
    """Puts a method on a model.

    Args:
      method: what to train and how.
      base: the pretrained model.
      params: its parameters (nested dict); adapter leaves that are already there are kept.
      key: PRNG key for the parameters that the method adds.

    Returns:
      (model, trainable, frozen): the adapted model; flat dicts. Floating trainable leaves are float32 (the models
      cast them to the compute dtype where they are used); frozen leaves keep their dtype.

    Raises:
      InputError: if nothing would train, or a packed kernel would.
    """
    model = method.forward(base)
    params = model.init(key, method.prepare(dict(params)))
    trainable, frozen = tree.split(params, method.trainable)
    if not trainable:
        names = ", ".join(spec.name for spec in method.specs) or "method"
        raise InputError(f"{names}: no parameter is trainable; the model has {', '.join(sorted(frozen)[:6])}, ...")
    return model, masters(trainable), frozen


def masters(trainable: Mapping[str, Any]) -> tree.Flat:
    """Trainable leaves, floating ones in float32, on which small updates are not rounded away.

    Raises:
      InputError: for a packed kernel.
    """
    if packed := [path for path, leaf in trainable.items() if is_packed(leaf)]:
        raise InputError(
            f"quantize: {packed[0]} trains; give quantize targets that leave it out, or train another part"
        )
    floating = lambda leaf: jnp.issubdtype(leaf.dtype, jnp.floating)
    return {path: leaf.astype(jnp.float32) if floating(leaf) else leaf for path, leaf in trainable.items()}


# Methods by name: one file each in jaxpeft/methods, with a public factory of the file's name.


def names() -> list[str]:
    """Every method's name: the files of `jaxpeft.methods`."""
    package = importlib.import_module("jaxpeft.methods")
    return sorted(info.name for info in pkgutil.iter_modules(package.__path__) if not info.name.startswith("_"))


def module(name: str) -> ModuleType:
    """The file of a method.

    Raises:
      InputError: for an unknown name, with the nearest ones.
    """
    if name not in names():
        raise InputError(f"unknown method {name!r}; nearest: {tree.nearest(name, names())} (see `jaxpeft methods`)")
    return importlib.import_module(f"jaxpeft.methods.{name}")


def from_specs(specs: tuple[Spec, ...]) -> Method:
    """Makes a method again from what `Method.specs` recorded."""
    made = [getattr(module(spec.name), spec.name)(**spec.config) for spec in specs]
    return made[0] if len(made) == 1 else chain(*made)
