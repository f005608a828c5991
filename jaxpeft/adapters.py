"""Several adapters on one base at once: every row of a batch has one of them, or none.

    y_i = x_i W + s_g x_i A_g B_g        g = batch["adapter"][i], a number of the adapters' order; negative: x_i W

The base is held once, and each adapter at its own ranks, sites and scale, in leaves `<site>/several/<name>/a` and `b`.
Which adapter a row has is data of the batch: another one is another number, and nothing is compiled again. An adapter
is what its own method says (`jp.lora`, `jp.lora_fa`): how it starts, what of it trains, its rate for B.

    adapters = {"tidy": jp.lora(rank=8), "wide": jp.lora(rank=64, targets="qv", rslora=True)}
    method = jp.several(adapters)
    model, trainable, rest = jp.setup(method, base, params, key)
    batch["adapter"] = rows(adapters, ["tidy", None, "wide"])

In training each adapter's gradient is that of a step on its own rows alone, whatever else the batch holds: the step's
loss is a mean over all rows, so gradients of adapter g are multiplied by the batch's weight over that of its rows.
"""

from __future__ import annotations

import inspect
import re
import zlib
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax

from jaxpeft import sites, tree
from jaxpeft.errors import InputError, did_you_mean
from jaxpeft.method import Method, Objective, Role, about, module, unchanged
from jaxpeft.model import Batch, Context
from jaxpeft.quant import low_rank_dot_of

if TYPE_CHECKING:  # whose package reads adapters for this module
    from jaxpeft.peft.form import Form

SCOPE, FIELD = "several", "adapter"  # of the leaves at a site; of a batch
NONE = "none"  # no adapter, where a text has to say it
_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]*")
_LEAF = re.compile(rf"(?P<site>.+)/{SCOPE}/(?P<name>[^/]+)/(?P<leaf>[^/]+)")
Adapters = Mapping[str, Method]


class Several(nn.Module):
    """The product with the adapters that a site has, whose parameters are {name: {"a": (n, r_g), "b": (r_g, m)}}.

    names, scales, rates: of all adapters, those among them that the site lacks.
    """

    stacked = True  # only products read the kernel

    names: tuple[str, ...]
    scales: tuple[float, ...]
    rates: tuple[float, ...]

    @nn.compact
    def __call__(self, inner: Callable, x: jax.Array, site: sites.Site, ctx: Context) -> jax.Array:
        if FIELD not in ctx.rows:
            return inner(x)
        own = self.variables["params"]
        here = [g for g, name in enumerate(self.names) if name in own]
        table = np.full(len(self.names) + 1, -1, np.int32)
        table[here] = np.arange(len(here))
        number = jnp.clip(ctx.rows[FIELD], -1, len(self.names) - 1)  # -1: the last of the table
        low = None
        if any(self.rates) and self.has_rng("dropout"):
            rate = jnp.asarray([*self.rates, 0.0])[number][:, None, None]
            kept = jax.random.bernoulli(self.make_rng("dropout"), 1 - rate, x.shape)
            low = jnp.where(kept, x / (1 - rate).astype(x.dtype), 0)
        a, b = ([own[self.names[g]][leaf] for g in here] for leaf in "ab")
        scales = [self.scales[g] for g in here]
        kernel = site.kernel if site.plain else inner
        return low_rank_dot_of(jnp.asarray(table)[number], x, kernel, a, b, scales=scales, low=low)


def several(adapters: Adapters) -> Method:
    """The method of several adapters, each trained or served for the rows that name it.

    Args:
      adapters: {name: method}, in the order by which batches number them: LoRA's and LoRA-FA's, of any ranks, targets
        and scales. Dropout, where a step has some, is of x in front of A.

    Returns:
      The method, for models of visible layers. `batch["adapter"]` (B,) integers says whose the rows are (see `rows`);
      without it a forward pass is the base's.

    Raises:
      InputError: for no adapter, a name that cannot be one, or a method that is more than a pair of factors. In
        `setup`: for a model without layers, or an adapter at a site outside of them.
    """
    adapters = dict(adapters)
    forms = {name: _form(name, method) for name, method in adapters.items()}
    if not forms:
        raise InputError("several: names no adapter")

    def adapter(site):
        config = {name: method.specs[0].config for name, method in adapters.items()}
        scales = tuple(form.scale(config[name], site) for name, form in forms.items())  # type: ignore[misc]
        return Several(tuple(adapters), scales, tuple(config[name].get("dropout", 0.0) for name in adapters))

    def forward(model, view):
        def init(key, params):
            flat = tree.flatten(model.init(key, params))
            for name, method in adapters.items():
                start = method.forward(model, view).init
                own_key = jax.random.fold_in(key, zlib.crc32(name.encode()))
                try:
                    fresh = start(own_key, _alone(flat, name, forms[name]))
                except InputError as error:
                    raise InputError(f"adapter {name!r}: {error}") from None
                flat |= _named({path: x for path, x in tree.flatten(fresh).items() if forms[name].owns(path)}, name)
            _check_inside(flat)
            return tree.unflatten(flat)

        def embed(params, batch, key):
            x, ctx = model.stack.embed(params, batch, key)
            return x, ctx.add(rows={FIELD: batch[FIELD]}) if FIELD in batch else ctx

        if not model.stack.layered:
            raise InputError("several: rows have adapters of their own in a model of visible layers (jaxpeft.models)")
        told = model._replace(stack=model.stack._replace(embed=embed))
        return sites.attach(told, SCOPE, adapter, lambda params: [])._replace(init=init)

    def role(path, others) -> Role:
        if (found := _LEAF.fullmatch(path)) and found["name"] in adapters:
            return adapters[found["name"]].role(_own_path(path, forms[found["name"]]))
        return others(path)

    def update(optimizer, view):
        own = {name: method for name, method in adapters.items() if method.update is not unchanged}
        parts = [_on(name, forms[name], method.update(optax.identity(), view)) for name, method in own.items()]
        return optax.chain(optimizer, *parts)

    def merge(params):
        raise InputError("several: one adapter is merged at a time: jaxpeft.adapters.alone(...) gives its parameters")

    return Method(
        forward=forward,
        roles=lambda others: lambda path: role(path, others),
        gradient=lambda objective, view: _by_rows(objective, tuple(adapters)),
        update=update if any(method.update is not unchanged for method in adapters.values()) else unchanged,
        merge=merge,
    )


def rows(adapters: Adapters | Sequence[str], names: Sequence[str | None]) -> np.ndarray:
    """`batch["adapter"]`: the adapters' numbers for rows by their names, (B,) int32; None is no adapter, -1.

    Raises:
      InputError: for a name that is none of them.
    """
    numbers: dict[str | None, int] = {None: -1}
    numbers |= {name: g for g, name in enumerate(adapters)}
    for name in names:
        if name not in numbers:
            raise InputError(f"no adapter is called {name!r}" + did_you_mean(str(name), adapters))
    return np.array([numbers[name] for name in names], np.int32)


def check_rows(params: tree.Params, numbers: Sequence[int]) -> None:
    """Refuses numbers of rows' adapters that the parameters have not; below 0 is none.

    Raises:
      InputError: for a model without several adapters, or a number beyond them.
    """
    leaves = (_LEAF.fullmatch(path) for path in tree.flatten(params))
    count = len({found["name"] for found in leaves if found})
    if count == 0:
        raise InputError("rows have adapters, and the model has not several; jaxpeft.attach_several gives it some")
    if beyond := [number for number in numbers if number >= count]:
        raise InputError(f"adapter number {beyond[0]} is beyond the {count} of the model, which are numbered from 0")


def together(adapters: Adapters | Sequence[str], batches: Mapping[str | None, Batch]) -> dict[str, np.ndarray]:
    """One batch of the batches of several adapters, as they come from data of their own.

    Args:
      adapters: as `several` took them.
      batches: {name: arrays (B_g, ...)} with the same fields; None for rows without an adapter.

    Returns:
      Arrays (B, ...), the rows in order, and `adapter` (B,). Shorter rows end in zeros, which is padding in all fields.

    Raises:
      InputError: for a name that is none of the adapters, or batches of different fields.
    """
    numbers = rows(adapters, list(batches))
    fields = {name: sorted(batch) for name, batch in batches.items()}
    first = next(iter(fields), None)
    for name, own in fields.items():
        if own != fields[first]:
            raise InputError(
                f"the batch of {name!r} has fields {', '.join(own)}; {first!r}: {', '.join(fields[first])}"
            )

    def joined(field):
        parts = [np.asarray(batch[field]) for batch in batches.values()]
        sizes = np.max([part.shape[1:] for part in parts], axis=0).astype(int)
        wide = [
            np.pad(x, [(0, 0), *((0, most - n) for most, n in zip(sizes, x.shape[1:], strict=True))]) for x in parts
        ]
        return np.concatenate(wide)

    made = {field: joined(field) for field in fields.get(first, [])}
    counts = [len(next(iter(batch.values()))) for batch in batches.values()]
    return {**made, FIELD: np.repeat(numbers, counts)}


def alone(params: Mapping[str, Any], adapters: Adapters, name: str) -> tree.Params:
    """Parameters with one of the adapters alone, at the paths of its own method: to export it, merge it, or go on.

    Args:
      params: nested parameters of the model with all adapters.
      adapters: as `several` took them.
      name: whose.

    Raises:
      InputError: for a name that is none of them.
    """
    rows(adapters, [name])
    return _alone(tree.flatten(params), name, _form(name, adapters[name]))


def beside(adapters: Adapters, leaves: Mapping[str, tree.Flat]) -> tree.Flat:
    """{name: leaves of an adapter alone} as leaves of `several`, to put among the base's before `jaxpeft.setup`."""
    found: tree.Flat = {}
    for name, own in leaves.items():
        rows(adapters, [name])
        found |= _named(own, name)
    return found


def is_pair(method: Method) -> bool:
    """Whether a method's adapters are x W + s x A B and no more: what `several` takes."""
    form = about(method.specs[0].name).peft if len(method.specs) == 1 else None
    plain = all(getattr(method, slot) is unchanged for slot in ("prepare", "loss", "gradient", "move"))
    config = method.specs[0].config if method.specs else {}
    return form is not None and form.scale is not None and plain and config.get("store_a", True)


def _form(name: str, method: Method) -> Form:
    """PEFT's form of an adapter's method."""
    if not _NAME.fullmatch(name) or name == NONE:
        raise InputError(f"the adapter's name {name!r} should be of letters, digits, '_', '-' and '.', and not {NONE}")
    if not is_pair(method):
        raise InputError(
            f"adapter {name!r}: {_with_options(method)} is more than a pair of factors beside frozen kernels; several "
            f"at once are lora and lora_fa"
        )
    return about(method.specs[0].name).peft


def _with_options(method: Method) -> str:
    """The method's name, and the arguments of the first that are not its defaults."""
    first = method.specs[0] if method.specs else None
    if first is None:
        return "what adds no adapter"
    factory = inspect.signature(getattr(module(first.name), first.name)).parameters
    given = [f"{key}={value!r}" for key, value in first.config.items() if value != factory[key].default]
    return f"{method.name} with {', '.join(given)}" if given else method.name


def _own_path(path: str, form: Form) -> str:
    """<site>/several/<name>/<leaf> as the adapter's own method has it."""
    return re.sub(_LEAF, rf"\g<site>/{form.scope}/\g<leaf>", path)


def _named(leaves: tree.Flat, name: str) -> tree.Flat:
    """Leaves <site>/<scope>/<leaf> of an adapter alone as <site>/several/<name>/<leaf>."""
    parts = {path: path.rsplit("/", 2) for path in leaves}
    return {f"{site}/{SCOPE}/{name}/{leaf}": leaves[path] for path, (site, _, leaf) in parts.items()}


def _alone(flat: tree.Flat, name: str, form: Form) -> tree.Params:
    """The base's leaves, and those of one adapter at its own paths."""
    found = {path: _LEAF.fullmatch(path) for path in flat}
    kept = {path: leaf for path, leaf in flat.items() if (at := found[path]) is None or at["name"] == name}
    return tree.unflatten({_own_path(path, form) if found[path] else path: leaf for path, leaf in kept.items()})


def _check_inside(flat: tree.Flat) -> None:
    """Refuses sites that no row reaches."""
    for path in flat:
        if (found := _LEAF.fullmatch(path)) and not tree.stacked(path):
            raise InputError(
                f"adapter {found['name']!r}: adapts {found['site']}, outside the layers, where rows have no adapter; "
                "leave it out of targets, or use the adapter alone"
            )


def _by_rows(objective: Objective, names: tuple[str, ...]) -> Objective:
    """The objective whose gradients of each adapter are those of the mean over its own rows."""

    def value_and_grad(trainable, rest, batch, key, opt_state):
        if FIELD not in batch:
            raise InputError(f"several: the batch says of no row which adapter is trained: it has no field {FIELD!r}")
        (value, aux), grads = objective.value_and_grad(trainable, rest, batch, key, opt_state)
        weights = batch.get("loss_weights", batch.get("weights", jnp.ones(len(batch[FIELD]))))  # of tokens, of rows
        of_rows = weights.reshape(len(batch[FIELD]), -1).sum(1, dtype=jnp.float32)
        own = jnp.sum(jnp.where(batch[FIELD][:, None] == np.arange(len(names)), of_rows[:, None], 0), axis=0)
        ratio = jnp.where(own > 0, of_rows.sum() / jnp.maximum(own, 1e-9), 0)

        def scaled(path, gradient):
            if (found := _LEAF.fullmatch(path)) is None or found["name"] not in names:
                return gradient
            return gradient * ratio[names.index(found["name"])].astype(gradient.dtype)

        return (value, aux), {path: scaled(path, gradient) for path, gradient in grads.items()}

    return objective._replace(value_and_grad=value_and_grad)


def _on(name: str, form: Form, inner: optax.GradientTransformation) -> optax.GradientTransformation:
    """What a method does to directions, to those of one adapter."""

    def own(leaves: tree.Flat) -> tree.Flat:
        found = {path: _LEAF.fullmatch(path) for path in leaves}
        return {_own_path(path, form): x for path, x in leaves.items() if (at := found[path]) and at["name"] == name}

    def update(updates, state, params=None):
        changed, state = inner.update(own(updates), state, None if params is None else own(params))
        return {**updates, **_named(changed, name)}, state

    return optax.GradientTransformation(lambda leaves: inner.init(own(leaves)), update)


__all__ = ["FIELD", "NONE", "Adapters", "Several", "alone", "beside", "is_pair", "rows", "several", "together"]
