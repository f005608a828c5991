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
import math
import pkgutil
from collections.abc import Callable, Iterable, Mapping, Sequence
from types import ModuleType
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from jaxpeft import tree
from jaxpeft.errors import InputError
from jaxpeft.model import Model


class Spec(NamedTuple("Spec", [("name", str), ("config", dict[str, Any])])):
    """What a factory was called with: enough to make the method again, and to write its adapter_config.json.

    `config` is the arguments in JSON's own types, so that a Spec is equal after a round trip through a file: tuples
    become lists, numpy's scalars numbers.

    Raises:
      InputError: for an argument that JSON cannot hold.
    """

    __slots__ = ()

    def __new__(cls, name: str, config: Mapping[str, Any]) -> Spec:
        return super().__new__(cls, name, {key: _as_json(f"{name}: {key}", x) for key, x in config.items()})


def _as_json(where: str, value: Any) -> Any:
    if value is None or isinstance(value, bool):
        return value
    if isinstance(value, str):
        return str(value)
    if hasattr(value, "dtype") and hasattr(value, "item") and value.ndim == 0:
        return _as_json(where, value.item())
    if isinstance(value, int):
        return int(value)
    if isinstance(value, float) and math.isfinite(value):
        return float(value)
    if isinstance(value, Mapping) and all(isinstance(key, str) for key in value):
        return {str(key): _as_json(f"{where}: {key}", item) for key, item in value.items()}
    if isinstance(value, Sequence) and not isinstance(value, bytes | bytearray):
        return [_as_json(where, item) for item in value]
    what = "a mapping whose keys are no text" if isinstance(value, Mapping) else repr(value)
    raise InputError(
        f"{where}: JSON cannot hold {what}; a method's arguments are text, finite numbers, true, false, null, "
        "and lists and mappings of these"
    )


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


def _identity(x):
    return x


def _nothing(path: str) -> bool:
    del path
    return False


class Method(NamedTuple):
    """One way to fine-tune. See the module's docstring for the slots."""

    prepare: Callable[[tree.Params], tree.Params] = _identity
    forward: Callable[[Model], Model] = _identity
    trainable: Callable[[str], bool] = _nothing
    gradient: Callable[[Objective], Objective] = _identity
    update: Callable[[optax.GradientTransformation], optax.GradientTransformation] = _identity
    merge: Callable[[tree.Params], tree.Params] = _identity
    specs: tuple[Spec, ...] = ()


def chain(*methods: Method) -> Method:
    """Applies methods in order; `merge` unwinds them in reverse order; a path trains if any of them says so.

    Raises:
      InputError: for one method twice, whose leaves would be one set for both, unless its file says `TWICE = True`.
    """
    specs = [spec for method in methods for spec in method.specs]
    check_once([spec.name for spec in specs])

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

    return Method(
        prepare=in_order("prepare"),
        forward=in_order("forward"),
        trainable=lambda path: any(method.trainable(path) for method in methods),
        gradient=in_order("gradient"),
        update=in_order("update"),
        merge=merge,
        specs=tuple(specs),
    )


def check_once(chained: Sequence[str]) -> None:
    """Raises InputError for a name that stands twice in a chain and whose file does not say `TWICE = True`."""
    for name in dict.fromkeys(chained):
        if chained.count(name) > 1 and not (name in names() and getattr(module(name), "TWICE", False)):
            raise InputError(
                f"{'+'.join(chained)}: {name} stands twice; to give different targets or names is not possible yet"
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
      InputError: if nothing would train.
    """
    model = method.forward(base)
    params = model.init(key, method.prepare(dict(params)))
    trainable, frozen = tree.split(params, method.trainable)
    if not trainable:
        names = ", ".join(spec.name for spec in method.specs) or "method"
        raise InputError(f"{names}: no parameter is trainable; the model has {', '.join(sorted(frozen)[:6])}, ...")
    return model, {path: as_master(leaf) for path, leaf in trainable.items()}, frozen


def as_master(leaf: jax.Array) -> jax.Array:
    """A trainable leaf in float32, on which small updates are not rounded away."""
    return leaf.astype(jnp.float32) if jnp.issubdtype(leaf.dtype, jnp.floating) else leaf


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


def from_specs(specs: Iterable[Spec | Sequence[Any]]) -> Method:
    """Makes a method again from what `Method.specs` recorded; [name, config] pairs, as JSON has them, do as well."""
    made = [getattr(module(name), name)(**config) for name, config in specs]
    return made[0] if len(made) == 1 else chain(*made)
