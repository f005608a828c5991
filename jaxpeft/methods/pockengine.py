"""PockEngine: a scheme, fixed before anything is compiled, says which tensors and which of their channels train.

    scheme   {pattern: share}; of the first pattern found in "layers/<number>/<site>" or a leaf's path there, the share
    share 1         W <- W + update: the tensor itself trains, a kernel, a bias or a norm's scale
    share c < 1     y = x W + x[:, i] (P - W[i]): the c n input channels i (r,) with the largest norms train, P (r, m)
    no pattern      frozen

Layers with different schemes are cut into stacks of their own (`tree.cut_layers`), so that which gradients exist is
known from the program's structure: no dW of what is frozen, no residuals and no backward pass below the deepest layer
that trains. What the compiler still finds unused, it drops.

Kept for the backward pass, from that layer on: what a frozen backbone keeps, and of a kernel x, or x[:, i] alone.
Merging writes P over W's rows and joins the layers; whole tensors are ordinary weights already.

`search`, and `jaxpeft scheme`, find a scheme under a limit of bytes. Contributions are measured: by how much the loss
on some batches falls after one sign step of a tensor's channels alone, all else as it is. Bytes are those of what
trains, 16 a number (its master, gradient, Adam's two moments), and of residuals. For each deepest layer, channels are
taken by contribution per byte while they fit; the best sum of contributions wins, and its bytes are then counted on the
traced step itself.

Paper: Zhu et al. 2023, "PockEngine: Sparse and Efficient Fine-tuning in a Pocket", arXiv:2310.17752, with the scheme
search of Lin et al. 2022, "On-Device Training Under 256KB Memory", arXiv:2206.15472. Deviations: its schemes of
transformers are not published in numbers, so none is a default; contributions are of one step, where they are the
accuracy after a training of each tensor, and a greedy choice stands for their evolutionary search over the same sums;
reordering, fusion and kernels are the compiler's work. int8 weights and their gradients' scales (QAS) are not here.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from jaxpeft import patterns, sites, tree
from jaxpeft.about import About, Promises
from jaxpeft.errors import InputError
from jaxpeft.method import Method, Spec, setup, trains
from jaxpeft.methods import full as _full
from jaxpeft.methods import paca as _paca
from jaxpeft.model import Batch, Context, Model
from jaxpeft.quant import dense
from jaxpeft.quant import merged as as_merged
from jaxpeft.starts import probes
from jaxpeft.targets import first_match

SCOPE = "/pockengine/"
TRAINED_BYTES = 16  # of a number that trains: master, gradient and Adam's two moments, in float32
_LAYER = re.compile(r"layers(?:_(\d+)_\d+)?/(.+)")


class Channels(nn.Module):
    """The product with other rows. Parameters: index (r,) int32 and base (r, m), frozen; rows (r, m) float32."""

    stacked = True  # only the product reads the kernel

    share: float

    @nn.compact
    def __call__(self, inner: Callable, x: jax.Array, site: sites.Site, ctx: Context) -> jax.Array:
        rank = channels(self.share, site.kernel.shape[0])
        index = self.param("index", _paca.choose_rows, site.kernel, rank, "largest")
        base = self.param("base", lambda key: _paca.rows_of(site.kernel, index))
        rows = self.param("rows", lambda key: base.astype(jnp.float32))
        return inner(x) + jnp.take(x, index, axis=-1) @ (rows - base.astype(jnp.float32)).astype(x.dtype)


def channels(share: float, inputs: int) -> int:
    """r: how many of so many input channels train."""
    return max(int(share * inputs), 1)


def pockengine(scheme: Mapping[str, float] | None = None) -> Method:
    """What a scheme names, and nothing else.

    Args:
      scheme: {regular expression: share of its input channels that train, above 0 and at most 1}, found in
        "layers/<number of the layer>/<path in it>", as {"layers/31/self_attn": 1.0, "layers/31/mlp/up_proj": 0.25}; the
        first match counts. Of leaves that are no kernels, shares below 1 choose none. `search` finds one.

    Returns:
      The method; it trains leaves of the base, and `<site>/pockengine/rows` (layers of a stack, r, m).

    Raises:
      InputError: for no scheme, a share outside (0, 1], an expression that does not compile or that chooses nothing in
        the model, or a model that shows no stack of layers.
    """
    config = {"scheme": dict(scheme or {})}
    if not scheme:
        raise InputError(
            "pockengine: scheme says what trains, as {'layers/31/self_attn': 1.0}; `jaxpeft scheme` finds one"
        )
    for pattern, value in scheme.items():
        patterns.compiled(pattern, "pockengine: scheme")
        if not 0 < value <= 1:
            raise InputError(f"pockengine: scheme {pattern!r}: share {value} must be above 0 and at most 1")

    def share(layer, rest):
        return first_match(scheme, f"layers/{layer}/{rest}", 0.0)

    def of_path(path):
        """The share of what lies at a path in a stack: all its layers have the same."""
        found = _LAYER.fullmatch(path)
        return 0.0 if found is None else share(int(found[1] or 0), found[2])

    def prepare(params, view):
        segments = tree.segments(params)
        if not segments or not view.base.stack.layered:  # a module scans over all of its stack
            raise InputError("pockengine: the model shows no stack of layers, of which a scheme could name some")
        _check_matches(scheme, params)
        for key, first, end in segments:
            leaves = [path.removesuffix("/kernel") for path in tree.flatten(params[key]) if SCOPE not in f"/{path}"]
            each = [[share(layer, path) for path in leaves] for layer in range(first, end)]
            for i in range(1, len(each)):
                if each[i] != each[i - 1]:
                    params = tree.cut_layers(params, first + i)
        return params

    def choose(params):
        flat = tree.flatten(params)
        found = [path.removesuffix("/kernel") for path in flat if path.endswith("/kernel") and tree.stacked(path)]
        return sorted(site for site in found if 0 < of_path(site) < 1)

    def role(path):
        if SCOPE in path:
            return path.endswith("/rows")
        return tree.stacked(path) and of_path(path.removesuffix("/kernel")) == 1

    return Method(
        prepare=prepare,
        forward=lambda model, view: sites.attach(model, "pockengine", lambda site: Channels(of_path(site)), choose),
        roles=trains(role),
        merge=merge,
        specs=(Spec("pockengine", config),),
    )


def _check_matches(scheme: Mapping[str, float], params: tree.Params) -> None:
    """Raises InputError for a pattern that is found in no path of the layers, or of which another takes all."""
    paths = [
        f"layers/{layer}/{path.removesuffix('/kernel')}"
        for key, first, end in tree.segments(params)
        for path in tree.flatten(params[key])
        for layer in range(first, end)
    ]
    for pattern in scheme:
        if not (found := tree.match(pattern, paths)):
            near = tree.nearest(pattern, paths)
            raise InputError(f"pockengine: scheme {pattern!r} is found in no path of the layers; nearest: {near}")
        others = list(scheme)[: list(scheme).index(pattern)]
        if not [path for path in found if first_match(dict.fromkeys(others, True), path, False) is False]:
            raise InputError(
                f"pockengine: scheme {pattern!r} counts nowhere: patterns before it take all that it names"
            )


def merge(params: Mapping[str, Any]) -> tree.Params:
    """W[i] <- P at every site of which channels train, and one stack of layers."""
    flat = tree.flatten(params)
    merged = {path: leaf for path, leaf in flat.items() if SCOPE not in path}
    for path, rows in flat.items():
        if path.endswith(f"{SCOPE}rows"):
            site = path.removesuffix(f"{SCOPE}rows")
            kernel, index = merged[f"{site}/kernel"], flat[f"{site}{SCOPE}index"]
            write = jax.vmap(lambda w, i, p: w.at[i].set(p.astype(w.dtype)))
            merged[f"{site}/kernel"] = as_merged(kernel, write(dense(kernel, kernel.dtype), index, rows))
    dtypes: dict[str, Any] = {}  # of each stack that its narrowest part has: masters of others are float32
    for path in filter(tree.stacked, merged):
        narrowest = dtypes.setdefault(tree.canonical(path), merged[path].dtype)
        dtypes[tree.canonical(path)] = min(narrowest, merged[path].dtype, key=lambda dtype: jnp.dtype(dtype).itemsize)
    for path in filter(tree.stacked, [*merged]):
        if merged[path].dtype != (dtype := dtypes[tree.canonical(path)]):
            merged[path] = merged[path].astype(dtype)
    return tree.join_layers(tree.unflatten(merged))


# The search for a scheme.


def contributions(
    base: Model,
    params: tree.Params,
    batches: Sequence[Batch],
    targets: str | Sequence[str] = "all-linear",
    shares: Sequence[float] = (0.25, 0.5, 1.0),
    rate: float = 1e-3,
) -> dict[tuple[int, str, float], float]:
    """{(layer, path in it, share): by how much the loss falls}, of one sign step of these channels alone.

    Args:
      base: the model.  params: its parameters, one stack of layers.
      batches: of which the loss is the mean, and its gradient the step's.
      targets: the kernels that are tried (see `sites.find`).
      shares: of a kernel's input channels, those of the largest norms.
      rate: of the step.
    """
    found, flat = {}, tree.flatten(params)

    def loss(kernel, at, batch):
        return probes.by_content(base, tree.unflatten({**flat, at: kernel}), batch)[0]

    losses = jax.jit(loss, static_argnums=1)
    mean = lambda kernel, at: float(np.mean([losses(kernel, at, batch) for batch in batches]))
    for site in sites.find(params, targets, "pockengine"):
        if not tree.stacked(site):
            continue
        at = f"{site}/kernel"
        kernel, g = flat[at], sum(probes.of_kernels(base, params, site, batches))
        before = mean(kernel, at)
        for layer in range(len(kernel)):
            for share in shares:
                index = _paca.choose_rows(jax.random.key(0), kernel[layer], channels(share, kernel.shape[1]), "largest")
                step = (rate * jnp.sign(g[layer, index])).astype(kernel.dtype)
                after = mean(kernel.at[layer, index].add(-step), at)
                found[layer, site.split("/", 1)[1], share] = before - after
    return found


def search(
    base: Model,
    params: tree.Params,
    batches: Iterable[Batch],
    limit: float,
    targets: str | Sequence[str] = "all-linear",
    shares: Sequence[float] = (0.25, 0.5, 1.0),
    rate: float = 1e-3,
) -> dict[str, float]:
    """A scheme for `pockengine` of the largest contributions whose bytes are within a limit.

    Args:
      base: the model.  params: its parameters, one stack of layers.
      batches: some of the training data, as large as a step's.
      limit: bytes of what trains, with its gradients and moments, and of the activations that a step keeps.
      targets: the kernels that may train (see `sites.find`).
      shares: of a kernel's input channels, that may train; ascending.
      rate: of the step by which contributions are measured.

    Returns:
      {pattern: share}.

    Raises:
      InputError: for a limit below what the least of the last layer takes, or where nothing that lowers the loss fits.
    """
    batches = list(batches)
    ((segment, _, layers),) = tree.segments(params)
    flat, (rows, length) = tree.flatten(params), batches[0]["tokens"].shape
    kernel = lambda path: flat[f"{segment}/{path}/kernel"]
    found = [site.split("/", 1)[1] for site in sites.find(params, targets, "pockengine") if tree.stacked(site)]
    if not found:
        raise InputError(f"pockengine: targets {targets!r} name nothing in the layers")
    width = jnp.dtype(kernel(found[0]).dtype).itemsize * rows * length

    def bytes_of(path, share):
        _, n, m = kernel(path).shape
        r = n if share == 1 else channels(share, n)
        return r * (TRAINED_BYTES * m + width)

    thinnest = min(found, key=lambda path: bytes_of(path, shares[0]))
    if limit < (least := needs(base, params, batches[0], _scheme({(layers - 1, thinnest): shares[0]}))):
        what = f"{shares[0]:g} of the last layer's {thinnest}"
        raise InputError(f"pockengine: {limit:.0f} bytes are fewer than the {least} that {what} alone takes")
    gains = contributions(base, params, batches, targets, shares, rate)
    some = next(iter(gains))[1]
    ends = range(layers - 1, max(layers - 3, -1), -1)  # the last layer and, if there is one, that before it
    last = [needs(base, params, batches[0], _scheme({(layer, some): shares[0]})) for layer in ends]
    of_layer = last[-1] - last[0]
    best: tuple[float, dict[tuple[int, str], float]] = (0.0, {})
    for deepest in range(layers):
        room = limit - last[0] + bytes_of(some, shares[0]) - of_layer * (layers - 1 - deepest)
        chosen = _greedy({key: x for key, x in gains.items() if key[0] >= deepest}, bytes_of, room)
        best = max(best, (sum(gains[(*key, share)] for key, share in chosen.items()), chosen), key=lambda x: x[0])
    chosen = best[1]
    while chosen and needs(base, params, batches[0], _scheme(chosen)) > limit:
        del chosen[min(chosen, key=lambda key: gains[(*key, chosen[key])] / bytes_of(key[1], chosen[key]))]
    if not chosen:
        raise InputError(f"pockengine: nothing that lowers the loss fits into {limit:.0f} bytes; raise the limit")
    return _scheme(chosen)


def _greedy(
    gains: Mapping[tuple[int, str, float], float], bytes_of: Callable[[str, float], float], room: float
) -> dict[tuple[int, str], float]:
    """{(layer, path): share}: the best gain per byte first, as long as there is room; a larger share replaces one."""
    order = sorted(gains, key=lambda key: -gains[key] / bytes_of(*key[1:]))
    chosen: dict[tuple[int, str], float] = {}
    for again in range(2):  # a second time, for larger shares in the room that is left
        for layer, path, share in order:
            had = chosen.get((layer, path))
            if gains[layer, path, share] <= (0 if had is None else gains[layer, path, had]) or (had and not again):
                continue
            price = bytes_of(path, share) - (bytes_of(path, had) if had else 0)
            if price <= room:
                chosen[layer, path], room = share, room - price
    return chosen


def _scheme(chosen: Mapping[tuple[int, str], float]) -> dict[str, float]:
    return {f"layers/{layer}/{path}$": share for (layer, path), share in sorted(chosen.items())}


def needs(base: Model, params: tree.Params, batch: Batch, scheme: Mapping[str, float]) -> int:
    """Bytes of what a scheme trains, and of the activations that its step keeps, counted on its trace."""
    from jaxpeft.train.memory import activation_bytes
    from jaxpeft.train.optimizer import make_direction
    from jaxpeft.train.state import init_state

    method, models = pockengine(scheme), []

    def begin(params):
        key = jax.random.key(0)
        model, trainable, rest = setup(method, base, params, key)
        models.append(model)
        return init_state(method, make_direction(), trainable, rest, key, model)

    state = jax.eval_shape(begin, params)
    return TRAINED_BYTES * tree.size(state.trainable) + activation_bytes({}, models[0], state, batch)


ABOUT = About(
    summary="a scheme fixed before compilation: which tensors of which layers train, and which of their channels",
    level="parameters",
    trains="what the scheme names: whole tensors, and rows of kernels",
    saves="gradients, state and inputs of all else; everything below the deepest layer that trains",
    reference="Zhu et al. 2023, arXiv:2310.17752",
    example={"scheme": {"layers/1/(self_attn/|mlp/up_proj)": 1.0, "layers/1/mlp/down_proj": 0.25}},
    promises=Promises(site_bytes=_full.saved_bytes),
    places=lambda path, n, m: n if path.endswith(f"{SCOPE}index") else None,
    stored="base",
)
