"""WTA-CRS: a weight's gradient from a sample of the tokens, whose mean over samples is exact; y and dx are exact.

    dW = X^T dY = sum_t x_t^T dy_t              x_t (n,) a row's tokens, dy_t (m,), W (n, m)
    dW ~ sum_j w_j x_{i_j}^T dy_{i_j}           of k = ceil(ratio S) of the row's S tokens, at least `least`

    p_t ~ |x_t|, 0 for padding; sorted (by 5 bits of them), P_c the sum of the c largest
    c = argmin_{c < k} (1 - P_c) / (k - c)      the winners: the c largest are taken as they are, w = 1
    the k - c others are drawn from the rest, with replacement, by p_t / (1 - P_c);  w = (1 - P_c) / ((k - c) p_t)

A kernel that trains gets such a gradient, and where it is frozen an adapter's A (n, r) behind it in the chain does, for
which dy_t is s dy_t B^T; B's gradient is exact. Maps that read the same x share a sample, and a layer's maps the random
numbers behind it. Each row samples its own tokens, so that groups of rows, or a mesh, give the same gradient.

Kept for the backward pass: k n numbers of w x per row in place of S n, with k indices. But x is the output of a norm or
of an activation function, and the plan `matmuls` keeps neither x nor its sample: both are calculated again from what
any frozen layer keeps. Only plain autodiff (`everything`) has x in memory; there the sample spares 1 - ratio of it.

Paper: Liu et al. 2023, "Winner-Take-All Column Row Sampling for Memory Efficient Adaptation of Language Model",
arXiv:2305.15265. Deviations: it takes p_t ~ |x_t| |dy_t|, with |dy_t| of the sample's last epoch out of a table of all
samples that it keeps on the host, and |x_t| alone until it has one; here it is |x_t| always, as batches do not say
which samples they are of. It draws from the batch; here each row does. Its code samples attention's products, too, and
without replacement where c = 0, which is biased; attention is exact here.
"""

from __future__ import annotations

import contextvars
from collections.abc import Callable
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from jaxpeft import sites
from jaxpeft.about import About, Promises
from jaxpeft.errors import InputError
from jaxpeft.features import segments_in
from jaxpeft.method import FROZEN, TRAINED, Method, Objective, Spec, View
from jaxpeft.methods import lora as _lora
from jaxpeft.methods.full import full
from jaxpeft.model import Context, Model, reads_stacks
from jaxpeft.quant import dot

SEEDS = "wta_crs"  # of the context's rows: (B,) uint32
_NEAR = 1e-30  # sums of probabilities below it are none

# {id of x: (x, its sample)} of the layer that is traced.
_samples: contextvars.ContextVar[dict[int, tuple[jax.Array, Sample]] | None]
_samples = contextvars.ContextVar("samples", default=None)


class Sample(NamedTuple):
    """Of x (B, S, n).

    rows: (B, k, n), w_j x_{i_j}.
    index: (B, k) int32, i_j.
    """

    rows: jax.Array
    index: jax.Array


class WTACRS(nn.Module):
    """The product, whose weights' gradients are of a sample. No parameters.

    trains: whether the kernel does.
    """

    stacked = True  # only products read the kernel

    ratio: float
    least: int
    trains: bool

    @nn.compact
    def __call__(self, inner: Callable, x: jax.Array, site: sites.Site, ctx: Context) -> jax.Array:
        seeds = ctx.rows.get(SEEDS)
        size = None if seeds is None or x.ndim != 3 else size_of(x.shape[1], self.ratio, self.least)
        if size is None or size == x.shape[1]:
            return inner(x)
        if self.trains:
            if not site.plain or site.through is not None:
                raise InputError(f"wta_crs: the kernel of {site.path} trains beside an adapter; let one of them train")
            sample = self.sample(x, seeds, size, ctx)
            return _with_gradient(dot(x, jax.lax.stop_gradient(site.kernel)), site.kernel, *sample)
        called = []

        def change(y, x, a, b):
            called.append(a)
            return _with_factor(y, a, jax.lax.stop_gradient(b), *self.sample(x, seeds, size, ctx))

        with sites.factor_gradient("wta_crs", change):
            y = inner(x)
        if not called and not site.plain:
            raise InputError(
                f"wta_crs: what is behind it at {site.path} has no A that reads x; chain it to lora or full"
            )
        return y

    def sample(self, x: jax.Array, seeds: jax.Array, size: int, ctx: Context) -> Sample:
        """The one sample of this x in this layer."""
        known = _samples.get()
        if known is not None and id(x) in known:
            return known[id(x)][1]
        live = segments_in("wta_crs", ctx, x)
        layer = jnp.zeros((), jnp.uint32) if ctx.layer is None else ctx.layer.astype(jnp.uint32)
        found = drawn(jax.lax.stop_gradient(x), seeds, layer, size, None if live is None else live != 0)
        found = Sample(checkpoint_name(found.rows, "wta_rows"), found.index)
        if known is not None:
            known[id(x)] = (x, found)
        return found


def size_of(length: int, ratio: float, least: int) -> int:
    """k of a row of `length` tokens."""
    return min(length, max(least, -int(-ratio * length // 1)))


def drawn(x: jax.Array, seeds: jax.Array, layer: jax.Array, size: int, live: jax.Array | None = None) -> Sample:
    """A sample of each row of x (B, S, n).

    Args:
      x: in any floating dtype.
      seeds: (B,) uint32, of the rows.
      layer: () uint32.
      size: k, below S.
      live: (B, S) bool, the tokens that are no padding; None: all are.
    """
    norms = jnp.linalg.norm(x.astype(jnp.float32), axis=-1)
    if live is not None:
        norms = jnp.where(live, norms, 0)
    index, weights = jax.vmap(lambda p, seed: _draw(p, jax.random.fold_in(jax.random.key(seed), layer), size))(
        norms, seeds
    )
    rows = jnp.take_along_axis(x, index[..., None], axis=1)
    return Sample((rows * weights[..., None]).astype(x.dtype), index)


def _draw(norms: jax.Array, key: jax.Array, size: int) -> tuple[jax.Array, jax.Array]:
    """(i (k,) int32, w (k,) float32) of a row whose tokens have these norms (S,)."""
    # What decides is rounded to a few bits: norms' outputs are nearly of one length, and which of them is larger by the
    # last bit differs from device to device. Tokens of one rounded length stand as in the row.
    order = jnp.argsort(-jax.lax.reduce_precision(norms, 8, 4))
    p = norms[order]
    p = p / jnp.maximum(jnp.sum(p), _NEAR)
    rest = jnp.flip(jnp.cumsum(jnp.flip(p)))  # 1 - P_c, summed from its end
    winners = jnp.argmin(jax.lax.reduce_precision(rest[:size] / (size - jnp.arange(size)), 8, 6))
    mass, others = rest[winners], size - winners
    places = jnp.arange(len(p))
    # Numbers on [0, 1 - P_c) find the token in whose part of the sum from the end they lie.
    u = jax.random.uniform(key, (size,)) * mass
    found = len(p) - 1 - jnp.searchsorted(jnp.flip(rest), u, side="right")
    found = jnp.clip(found, winners, len(p) - 1)
    place = jnp.where(places[:size] < winners, places[:size], found)
    weight = jnp.where(p[place] > 0, mass / (others * jnp.maximum(p[place], _NEAR)), 0)
    return order[place].astype(jnp.int32), jnp.where(places[:size] < winners, 1, weight)


# y, and of a leaf the gradient that a sample gives.


@jax.custom_vjp
def _with_gradient(y: jax.Array, kernel: jax.Array, rows: jax.Array, index: jax.Array) -> jax.Array:
    """y (B, S, m), with the gradient of W (n, m)."""
    del kernel, rows, index
    return y


def _keep(y, kernel, rows, index):
    return y, (jnp.zeros((0,), kernel.dtype), rows, index)


def _pull(kept, dy):
    like, rows, index = kept
    return dy, _outer(rows, _taken(dy, index)).astype(like.dtype), jnp.zeros_like(rows), None


_with_gradient.defvjp(_keep, _pull)


@jax.custom_vjp
def _with_factor(y: jax.Array, a: jax.Array, b: jax.Array, rows: jax.Array, index: jax.Array) -> jax.Array:
    """y (B, S, m), with the gradient of A (n, r), for s B (r, m)."""
    del a, b, rows, index
    return y


def _keep_factor(y, a, b, rows, index):
    return y, (jnp.zeros((0,), a.dtype), b, rows, index)


def _pull_factor(kept, dy):
    like, b, rows, index = kept
    d_low = jnp.einsum("bkm,rm->bkr", _taken(dy, index), b)
    return dy, _outer(rows, d_low).astype(like.dtype), jnp.zeros_like(b), jnp.zeros_like(rows), None


_with_factor.defvjp(_keep_factor, _pull_factor)


def _taken(dy: jax.Array, index: jax.Array) -> jax.Array:
    return jnp.take_along_axis(dy, index[..., None], axis=1)


def _outer(rows: jax.Array, dy: jax.Array) -> jax.Array:
    """The sum over tokens of all rows, float32."""
    return jnp.einsum("bkn,bkm->nm", rows, dy, preferred_element_type=jnp.float32)


def saved_bytes(inputs: int, outputs: int, itemsize: int, ratio: float, **_) -> float:
    """Bytes per token kept at one kernel beyond what a frozen backbone keeps: a sample's rows and their indices.

    Maps that read the same x share it; this counts it at each.
    """
    del outputs
    return ratio * (inputs * itemsize + 4)


def row_bytes(config: Any, itemsize: int, least: int, **_) -> float:
    """Bytes per row, at most: k is rounded up, and at least `least`, of seven kernels a layer; and a row's seed."""
    widest = max(config.hidden_size, config.intermediate_size)
    return 7 * config.num_hidden_layers * max(1, least) * (widest * itemsize + 4) + 4


def wta_crs(
    ratio: float = 0.3, least: int = 10, targets: _lora.Targets = "all-linear", which: str = "layers"
) -> Method:
    """WTA-CRS on the kernels that `targets` chooses, of those that the chain trains, or on the adapters behind it.

    Args:
      ratio: of a row's tokens, those that a gradient is made of.
      least: tokens of a row, at least; rows that have no more are not sampled.
      targets: "all-linear", "attention", "mlp", a regular expression, or a list of names (see `sites.find`).
      which: alone: what trains, as in `full`: "layers", or "all".

    Returns:
      The method, a modifier: `full+wta_crs`, `wta_crs+lora`. It adds no leaf.

    Raises:
      InputError: for a ratio outside (0, 1], `least` below 1, targets that match nothing, a model that shows no layers,
        a chain in which nothing at these sites trains, or adapters in front of it. When traced: for adapters without
        an A that reads x, with dropout in front of it, or beside a kernel that trains.
    """
    config = dict(locals())
    if not 0 < ratio <= 1:
        raise InputError(f"wta_crs: ratio {ratio} must be above 0 and at most 1")
    if least < 1:
        raise InputError(f"wta_crs: least {least} must be at least 1")
    weights = full(which)

    def choose(params):
        return sites.find(params, targets, "wta_crs")

    def forward(model: Model, view: View) -> Model:
        if not model.stack.layered:
            raise InputError("wta_crs: this model shows no layers, whose rows' tokens are sampled; stack them")
        adapter = lambda site: WTACRS(ratio, least, view.role(f"{site}/kernel").name == "trained")
        own = sites.attach(model, "wta_crs", adapter, choose, parameters=False)

        def init(key, params):
            params = own.init(key, params)
            choose(params)  # targets that match nothing are said here
            return params

        def embed(params, batch, key):
            x, ctx = own.stack.embed(params, batch, key)
            key = jax.random.key(0) if key is None else jax.random.fold_in(key, 0x37A)
            return x, ctx.add(rows={SEEDS: jax.random.bits(key, (len(x),), jnp.uint32)})

        def layer(function):
            def call(*args, **named):
                token = _samples.set({})
                try:
                    return function(*args, **named)
                finally:
                    _samples.reset(token)

            return reads_stacks(call, like=function)

        return own._replace(init=init, stack=own.stack.map_layers(layer)._replace(embed=embed))

    def gradient(objective: Objective, view: View) -> Objective:
        chain = [spec.name for spec in view.specs]
        before = {f"/{name}/" for name in chain[: chain.index("wta_crs")]}
        sampled = [path.rpartition("/")[0] for path in view.shapes if path.endswith("/kernel")]
        sampled = [site for site in sampled if sites.chooses(targets, site)]
        for path in view.trained:
            site = next((site for site in sampled if path.startswith(f"{site}/")), None)
            if site is not None and (late := next((name for name in before if name in path), None)):
                raise InputError(
                    f"wta_crs: {path} is in front of it, and reads all of x; put wta_crs before {late.strip('/')}"
                )
        inputs = {site: view.shapes[f"{site}/kernel"].shape[-2] for site in sampled}
        reading = [
            path
            for path, leaf in view.trained.items()
            for site, n in inputs.items()
            if path.startswith(f"{site}/") and leaf.shape[-2:-1] == (n,)
        ]
        if not reading:
            raise InputError(
                f"wta_crs: in {'+'.join(chain)} nothing trains that reads the inputs of the sites that targets "
                f"{targets!r} name"
            )
        return objective

    return Method(
        prepare=weights.prepare,
        forward=forward,
        gradient=gradient,
        merge=weights.merge_own,
        specs=(Spec("wta_crs", config),),
        alone=lambda path: TRAINED if weights.trainable(path) else FROZEN,
    )


ABOUT = About(
    summary="gradients of weights from a sample of each row's tokens, without bias",
    level="site",
    trains="all parameters of the layers, or what is chained to it",
    saves="of the inputs that weights' gradients need all but `ratio`, which matters where they are kept at all",
    reference="Liu et al. 2023, arXiv:2305.15265",
    example={"ratio": 0.5, "least": 4},
    promises=Promises(site_bytes=saved_bytes, row_bytes=row_bytes),
    stored="base",
)
