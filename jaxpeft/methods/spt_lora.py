"""SPT-LoRA: each matrix gets LoRA or a sparse update, by how many of the most sensitive weights lie in it.

    s = sum over batches of dW^2               the sensitivity of each weight, of some batches of the training data
    c_i = |{weights of matrix i with s > t}|   one threshold t for all matrices
    y = x W_i + s (x A) B                      where c_i >= r(n + m) / ratio: LoRA, of r(n + m) numbers
    y = x W_i + x S,  S[idx] = v               elsewhere: those c_i weights train by themselves

t is the lowest at which all of this is at most the budget, P = density * (all entries of all matrices) numbers. So a
matrix of many sensitive weights changes as a whole, and one of few only there.

Numbers lie in one vector, `spt_lora/values` (P,), matrix after matrix: A and B of one, or v of another, whose entries
row after row `spt_lora/index` (P,) has at the same places. `<site>/spt_lora/at` () int32, `count` () int32 and `lora`
() bool say where a layer's begin, how many weights and which of the two: shapes depend on no data, so that a run is
planned without any. Less than one LoRA's numbers are left over at the end of the vector, and idle.

A is random and B and v are zero, the adapted model at the base. dW of a start is had of one site's kernels at a time,
as SPEFT's is, and r(n + m) / ratio weights of each matrix are kept of it: more of them change nothing.

Kept for the backward pass: x; which of the two it is, a layer finds out as it runs, and S, its gradient and x A are
made again. Bytes: 16 P (values, Adam's two moments, index), and 9 of a matrix. Merging is exact up to rounding.

Paper: He et al. 2023, "Sensitivity-Aware Visual Parameter-Efficient Fine-Tuning", arXiv:2303.08566, and its code.
Deviations: kernels alone, no biases and norms; the code tries 79 thresholds and takes the one nearest to its budget
(0.2 to 1 million numbers of ViT-B/16's 86), here it is the best one within it; weight decay, 1e-4 there, is that of
vectors, none. "magnitude" is W^2 in the place of dW^2, for a start without data. (The code's defaults: r 8, ratio 10,
at most 16 batches, rate 1e-3.)
"""

from __future__ import annotations

import functools
import math
import zlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from jaxpeft import sites, sparse, tree
from jaxpeft.about import About, Defaults, Promises
from jaxpeft.errors import InputError
from jaxpeft.method import Method, Spec, View, trains
from jaxpeft.methods import lora as _lora
from jaxpeft.methods import shira as _shira
from jaxpeft.model import Batch, Context, Model
from jaxpeft.quant import by_layer, dense
from jaxpeft.quant import merged as as_merged
from jaxpeft.starts import probes

METRICS = ("gradient", "magnitude")
VALUES, INDEX = "spt_lora/values", "spt_lora/index"
PARTS = ("at", "count", "lora")


class SPTLoRA(nn.Module):
    """The adapted product. Parameters, frozen: at () int32, count () int32, lora () bool; it reads the shared two."""

    stacked = True  # only the product reads the kernel

    rank: int
    scale: float
    ratio: float

    @nn.compact
    def __call__(self, inner: Callable, x: jax.Array, site: sites.Site, ctx: Context) -> jax.Array:
        n, m = site.kernel.shape
        types = (jnp.int32, jnp.int32, bool)
        own = [self.param(part, nn.initializers.zeros, (), dtype) for part, dtype in zip(PARTS, types, strict=True)]
        if (shared := sites.beside(self, ctx, "spt_lora", "numbers")) is None:
            return inner(x)
        shape = Matrix(n, m, self.rank, self.scale, self.ratio)

        def change(x, values, index, *own):
            return jax.lax.cond(own[-1], shape.by_factors, shape.by_entries, x, values, index, *own)

        return inner(x) + jax.checkpoint(change, prevent_cse=False)(x, shared["values"], shared["index"], *own)


class Matrix(NamedTuple):
    """How a matrix of n x m reads its numbers of the vector."""

    n: int
    m: int
    rank: int
    scale: float
    ratio: float

    @property
    def factors(self) -> int:
        """How many numbers A and B have."""
        return self.rank * (self.n + self.m)

    @property
    def enough(self) -> int:
        """Of how many weights on it is LoRA."""
        return max(math.ceil(self.factors / self.ratio), 1)

    def pair(self, values: jax.Array, at: jax.Array) -> tuple[jax.Array, jax.Array]:
        """A (n, r) and B (r, m)."""
        own = jax.lax.dynamic_slice(values, (at,), (self.factors,))
        a, b = own[: self.n * self.rank], own[self.n * self.rank :]
        return a.reshape(self.n, self.rank), b.reshape(self.rank, self.m)

    def entries(self, values: jax.Array, index: jax.Array, at: jax.Array, count: jax.Array) -> tuple[jax.Array, ...]:
        """(index (k,), values (k,)), k one less than what makes it LoRA; beyond `count` they are zeros at entry 0."""
        k = min(self.enough - 1, self.n * self.m, len(values))
        first = jnp.clip(at, 0, len(values) - k)  # as the slices begin, near the end of the vector
        place = first + jnp.arange(k)
        own = (place >= at) & (place < at + count)
        taken = lambda x: jnp.where(own, jax.lax.dynamic_slice(x, (first,), (k,)), 0)
        return taken(index), taken(values)

    def by_factors(self, x: jax.Array, values: jax.Array, index: jax.Array, at: jax.Array, *_) -> jax.Array:
        """s (x A) B."""
        if self.factors > len(values):  # no layer has it
            return jnp.zeros((*x.shape[:-1], self.m), x.dtype)
        a, b = self.pair(values.astype(x.dtype), at)
        return self.scale * ((x @ a) @ b)

    def by_entries(
        self, x: jax.Array, values: jax.Array, index: jax.Array, at: jax.Array, count: jax.Array, *_
    ) -> jax.Array:
        """x S."""
        index, values = self.entries(values, index, at, count)
        return x @ _shira.sparse(sparse.pairs(index, self.m), values.astype(x.dtype), (self.n, self.m))

    def dense(self, values: jax.Array, index: jax.Array, at: jax.Array, count: jax.Array, lora: jax.Array) -> jax.Array:
        """What is added to W (n, m), float32."""
        return jax.lax.cond(lora, self.by_factors, self.by_entries, jnp.eye(self.n), values, index, at, count)


def spt_lora(
    density: float = 0.005,
    rank: int = 8,
    alpha: float | None = None,
    ratio: float = 10.0,
    metric: str = "gradient",
    targets: _lora.Targets = "all-linear",
) -> Method:
    """SPT-LoRA on the sites that `targets` chooses.

    Args:
      density: the budget, as a share of all entries of all these kernels.
      rank: r of the kernels that get LoRA.
      alpha: numerator of their scale; None: the rank.
      ratio: a kernel gets LoRA of r (n + m) numbers where it has at least that / ratio of the chosen weights.
      metric: "gradient", of some batches, which `setup` has to be given; or "magnitude".
      targets: "all-linear", "attention", "mlp", a regular expression, or a list of names (see `sites.find`).

    Returns:
      The method; it trains `spt_lora/values` (P,).

    Raises:
      InputError: for a density outside (0, 0.5], or so small that it is no number; a rank below 1 or above a kernel's
        smaller side; a ratio below 1; an unknown metric; a kernel of more than 2^31 - 1 entries; targets that match
        nothing; or no data where the metric is of gradients.
    """
    config = dict(locals())
    sparse.check_density("spt_lora", density)
    _lora.check_rank("spt_lora", rank)
    _lora.check_alpha("spt_lora", alpha)
    if not 1 <= ratio < float("inf"):
        raise InputError(f"spt_lora: ratio {ratio} must be a finite number of at least 1")
    if metric not in METRICS:
        raise InputError(f"spt_lora: metric {metric!r} is not one of {', '.join(METRICS)}")
    of_rank = _lora.chosen_sites("spt_lora", targets, lambda site: rank)
    scale = _lora.scale_of(rank if alpha is None else alpha, rank, False)

    def choose(params):
        flat, found = tree.flatten(params), of_rank(params)
        for site in found:
            sparse.check_size("spt_lora", site, *flat[sites.kernel_path(flat, site)].shape[-2:])
        if (total := budget(density, [flat[sites.kernel_path(flat, site)] for site in found])) < 1:
            raise InputError(f"spt_lora: density {density} leaves nothing to train: less than one number")
        if total > sparse.LARGEST:
            raise InputError(f"spt_lora: density {density} gives {total} numbers, more than {sparse.LARGEST}")
        return found

    def matrix_of(kernel):
        n, m = kernel.shape[-2:]
        return Matrix(n, m, rank, scale, ratio)

    def prepare(params: tree.Params, view: View) -> tree.Params:
        """The parameters with what says which is which, where it is not there and there is something to say it by."""
        flat, found = tree.flatten(params), choose(params)
        kernels = {site: flat[sites.kernel_path(flat, site)] for site in found}
        if INDEX in flat:
            return params
        planned = any(isinstance(leaf, jax.core.Tracer) for leaf in jax.tree.leaves(kernels))
        batches = probes.batches("spt_lora: metric 'gradient'", view) if metric == "gradient" else []
        if planned or (metric == "gradient" and not batches):
            return params
        best = {}
        for site, kernel in kernels.items():
            shape = matrix_of(kernel)
            k = min(shape.enough, shape.n * shape.m)
            if metric == "gradient":
                best[site] = _best(_sensitivity(view, params, site, batches), k)
            else:
                best[site] = by_layer(lambda w, k=k: _best(jnp.square(dense(w)), k), kernel)
        flat |= allotted(best, {site: matrix_of(kernel) for site, kernel in kernels.items()}, budget(density, kernels))
        return tree.unflatten(flat)

    def forward(model: Model, view: View) -> Model:
        adapter = lambda site: SPTLoRA(rank, scale, ratio)
        adapted = sites.attach(model, "spt_lora", adapter, choose, shared=True)

        def init(key, params):
            params = adapted.init(key, params)
            flat, found = tree.flatten(params), choose(params)
            total = budget(density, [flat[sites.kernel_path(flat, site)] for site in found])
            flat.setdefault(INDEX, jnp.zeros(total, jnp.int32))
            if VALUES not in flat:
                flat[VALUES] = jnp.zeros(total)
                for site in found:
                    own = jax.random.fold_in(key, zlib.crc32(site.encode()))
                    flat[VALUES] = _with_a(flat[VALUES], own, flat, site, rank)
            _check_leaves(flat, {site: matrix_of(flat[sites.kernel_path(flat, site)]) for site in found}, total)
            return tree.unflatten(flat)

        return adapted._replace(init=init)

    def merge(params: Mapping[str, Any]) -> tree.Params:
        flat = tree.flatten(params)
        merged = {path: leaf for path, leaf in flat.items() if "spt_lora/" not in path}
        for path in [path for path in flat if path.endswith("/spt_lora/at")]:
            site = path.removesuffix("/spt_lora/at")
            at = sites.kernel_path(merged, site)
            kernel, own = merged[at], [flat[f"{site}/spt_lora/{part}"] for part in PARTS]
            of_layer = functools.partial(matrix_of(kernel).dense, flat[VALUES], flat[INDEX])
            added = tree.over(own[0].ndim, of_layer, tree.in_turn)
            merged[at] = as_merged(kernel, dense(kernel) + added(*own))
        return tree.unflatten(merged)

    return Method(
        prepare=prepare,
        forward=forward,
        roles=trains(lambda path: path == VALUES),
        merge=merge,
        specs=(Spec("spt_lora", config),),
    )


def budget(density: float, kernels: Mapping[str, Any] | Sequence[Any]) -> int:
    """P of these kernels."""
    found = kernels.values() if isinstance(kernels, Mapping) else kernels
    return int(density * sum(math.prod(kernel.shape) for kernel in found))


def _sensitivity(view: View, params: tree.Params, site: str, batches: Sequence[Batch]) -> jax.Array:
    """(..., n, m) float32: the sum over batches of dW^2, of one site's kernels."""
    total: Any = 0.0
    for g in probes.of_kernels(view.base, params, site, batches, view.loss):
        total = total + g**2
    return total


def _best(scores: jax.Array, count: int) -> tuple[jax.Array, jax.Array]:
    """(scores (..., count), entries (..., count)) of matrices (..., n, m), the largest first."""
    found, index = jax.lax.top_k(scores.reshape(*scores.shape[:-2], -1), count)
    return found, index.astype(jnp.int32)


def allotted(
    best: Mapping[str, tuple[jax.Array, jax.Array]], shapes: Mapping[str, Matrix], total: int
) -> dict[str, jax.Array]:
    """{path: leaf} of the index and of what says which matrix has which numbers.

    Args:
      best: {site: (scores (..., k), entries (..., k))} of its matrices, the largest first; k as many as matter.
      shapes: {site: its matrices'}.
      total: P.
    """
    scores, entries, prices, sizes = [], [], [], []
    for site, shape in shapes.items():
        s, e = (np.asarray(x).reshape(-1, x.shape[-1]) for x in best[site])
        price = np.ones(s.shape[1], np.int64)
        if len(price) == shape.enough:  # the last one makes it LoRA, whose numbers take the others' place
            price[-1] += shape.factors - len(price)
        for row in range(len(s)):
            scores.append(s[row])
            entries.append(e[row])
            prices.append(price)
            sizes.append(shape)
    matrix = np.repeat(np.arange(len(scores)), [len(x) for x in scores])
    order = np.argsort(-np.concatenate(scores), kind="stable")
    taken = np.searchsorted(np.cumsum(np.concatenate(prices)[order]), total, side="right")
    counts = np.bincount(matrix[order[:taken]], minlength=len(scores))
    lora = np.array([count == shape.enough for count, shape in zip(counts, sizes, strict=True)])
    numbers = np.where(lora, [shape.factors for shape in sizes], counts)
    at = np.cumsum(numbers) - numbers
    index = np.zeros(total, np.int32)
    for first, count, low, own in zip(at, counts, lora, entries, strict=True):
        if not low:
            index[first : first + count] = np.sort(own[:count])
    found, done = {INDEX: jnp.asarray(index)}, 0
    for site in shapes:
        lead = best[site][0].shape[:-1]
        rows = slice(done, done + math.prod(lead))
        for part, leaf, dtype in (("at", at, jnp.int32), ("count", counts, jnp.int32), ("lora", lora, bool)):
            found[f"{site}/spt_lora/{part}"] = jnp.asarray(leaf[rows], dtype).reshape(lead)
        done = rows.stop
    return found


def _check_leaves(flat: tree.Flat, shapes: Mapping[str, Matrix], total: int) -> None:
    """Raises InputError for leaves of a file that are not those of these matrices."""
    if any(isinstance(leaf, jax.core.Tracer) for path, leaf in flat.items() if "spt_lora/" in path):
        return
    if (sizes := (len(flat[VALUES]), len(flat[INDEX]))) != (total, total):
        raise InputError(f"spt_lora: {VALUES} and {INDEX} have {sizes} numbers, where this base has {total}")
    index = np.asarray(flat[INDEX])
    for site, shape in shapes.items():
        parts = [np.asarray(flat[f"{site}/spt_lora/{part}"]).reshape(-1) for part in PARTS]
        for layer, (at, count, low) in enumerate(zip(*parts, strict=True)):
            end, own = at + (shape.factors if low else count), index[max(at, 0) :][: max(count, 0)]
            outside = not low and (count >= shape.enough or np.any((own < 0) | (own >= shape.n * shape.m)))
            if at < 0 or count < 0 or end > total or outside:
                raise InputError(
                    f"spt_lora: layer {layer} of {site} has {count} numbers at {at}, which are not its own"
                )


def _with_a(values: jax.Array, key: jax.Array, flat: tree.Flat, site: str, rank: int) -> jax.Array:
    """The vector with A of each layer of a site that has LoRA, as LoRA's starts; B is zero."""
    lora, at = (flat[f"{site}/spt_lora/{part}"] for part in ("lora", "at"))
    n = flat[sites.kernel_path(flat, site)].shape[-2]
    draw = lambda key: _lora.INITS["kaiming"](key, (n, rank)).reshape(-1)
    a = jax.vmap(draw)(jax.random.split(key, lora.size))
    place = jnp.where(lora.reshape(-1, 1), at.reshape(-1, 1) + jnp.arange(n * rank), len(values))
    return values.at[place.reshape(-1)].set(a.reshape(-1), mode="drop")


ABOUT = About(
    summary="LoRA on the matrices with many sensitive weights; in others those few weights train",
    level="site",
    trains="density of all entries of all kernels, as factors or as single weights",
    saves="gradients and optimizer state of all but so many numbers; no activations; one update is at work",
    reference="He et al. 2023, arXiv:2303.08566",
    example={"density": 0.06, "rank": 2, "metric": "magnitude"},
    promises=Promises(site_bytes=_shira.saved_bytes),
    defaults=Defaults(lr=1e-3),
)
