"""PaCA: a few rows of each kernel train, in place of an adapter beside it.

    y = x W~ = x W + x[:, i] (P - W[i])        x (..., n), W (n, m) frozen, i (r,) rows, P (r, m) trained
    dP = x[:, i]^T dy,   dx = dy W~^T

W~ is W with its rows i (the weights of r inputs) replaced by P. It is never made: W[i] is kept a second time among the
frozen leaves, in the kernel's dtype, and the difference is taken in float32. i is drawn once, or holds the rows with
the largest or smallest norms. P starts at W[i], the adapted model at the base. Merging writes P over W's rows.

Kept for the backward pass: x[:, i], r per token and kernel, as LoRA-FA keeps x A. Under `matmuls` that saves no
activations worth naming over LoRA, whose inputs are calculated again from what is kept anyway; with plain autodiff it
spares every x.

The reference divides P by alpha / r and multiplies it again in the product. For Adam that is a learning rate of alpha /
r times as much, and so it is done here, on the optimizer's direction; weight decay is as there.

Over a quantized kernel the rows are in floating point, beside it (QPaCA): x W is the quantized product, and W[i] its
rows as they are unpacked, so that merging gives the dense form with P for its rows.

Paper: Woo et al. 2025, "PaCA: Partial Connection Adaptation for Efficient Fine-Tuning", arXiv:2503.01905. Deviations:
the product reads P as it is in this step; the reference writes it into the kernel at every second call only.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax
from jax.ad_checkpoint import checkpoint_name

from jaxpeft import sites, tree
from jaxpeft.about import About, Defaults, Promises
from jaxpeft.errors import InputError
from jaxpeft.method import Method, Spec, blind, layer_by_layer, trains, unchanged
from jaxpeft.methods import lora as _lora
from jaxpeft.model import Context
from jaxpeft.quant import dense
from jaxpeft.quant import merged as as_merged

CHOICES = ("random", "largest", "smallest")


class PaCA(nn.Module):
    """The product with other rows. Parameters: index (r,) int32 and base (r, m), frozen; rows (r, m) float32."""

    stacked = True  # only the product reads the kernel

    rank: int
    choice: str = "random"

    @nn.compact
    def __call__(self, inner: Callable, x: jax.Array, site: sites.Site, ctx: Context) -> jax.Array:
        index = self.param("index", choose_rows, site.kernel, self.rank, self.choice)
        base = self.param("base", lambda key: rows_of(site.kernel, index))
        rows = self.param("rows", lambda key: base.astype(jnp.float32))
        change = (rows - base.astype(jnp.float32)).astype(x.dtype)
        return inner(x) + checkpoint_name(jnp.take(x, index, axis=-1), "paca_input") @ change


def choose_rows(key: jax.Array, kernel: Any, rank: int, choice: str) -> jax.Array:
    """i (r,) int32, ascending: rows of a kernel (n, m), drawn without replacement or those with extreme norms."""
    n, _ = kernel.shape
    if choice == "random":
        return jnp.sort(jax.random.permutation(key, n)[:rank]).astype(jnp.int32)
    norms = jnp.sum(jnp.square(dense(kernel)), axis=1)
    return jnp.sort(jax.lax.top_k(norms if choice == "largest" else -norms, rank)[1]).astype(jnp.int32)


def rows_of(kernel: Any, index: jax.Array) -> jax.Array:
    """W[i] (r, m) in its dtype, of a kernel (n, m) of any type."""
    return jnp.take(dense(kernel, kernel.dtype), index, axis=0)


def saved_bytes(inputs: int, outputs: int, itemsize: int, rank: int, **_) -> int:
    """Bytes per token kept at one adapted kernel beyond what a frozen backbone keeps: x[:, i]."""
    del inputs, outputs
    return rank * itemsize


def paca(
    rank: int = 8,
    alpha: float | None = None,
    targets: _lora.Targets = "all-linear",
    rows: str = "random",
) -> Method:
    """PaCA on the sites that `targets` chooses.

    Args:
      rank: r, how many rows of each kernel train; at most its smaller side.
      alpha: the rows' learning rate is alpha / r times the step's; None: the step's.
      targets: "all-linear", "attention", "mlp", a regular expression, or a list of names (see `sites.find`).
      rows: "random", or those with the "largest" or "smallest" norms.

    Returns:
      The method; it trains `<site>/paca/rows` (L, r, m).

    Raises:
      InputError: for a rank below 1 or above a kernel's smaller side, unknown rows, or targets that match nothing.
    """
    config = dict(locals())
    _lora.check_rank("paca", rank)
    _lora.check_alpha("paca", alpha)
    if rows not in CHOICES:
        raise InputError(f"paca: rows {rows!r} is not one of {', '.join(CHOICES)}")
    scale = 1.0 if alpha is None else alpha / rank
    choose = _lora.chosen_sites("paca", targets, lambda site: rank)

    def own(path):
        return path.endswith("/paca/rows")

    @blind
    @layer_by_layer
    def update(optimizer, view):
        mask = lambda leaves: {path: own(path) for path in leaves}
        return optax.chain(optimizer, optax.masked(optax.scale(scale), mask))

    return Method(
        forward=lambda model, view: sites.attach(model, "paca", lambda site: PaCA(rank, rows), choose),
        roles=trains(own),
        update=update if scale != 1 else unchanged,
        merge=fold,
        specs=(Spec("paca", config),),
    )


def fold(params: Mapping[str, Any]) -> tree.Params:
    """W[i] <- P at every adapted site, whose leaves go; P is rounded to W's dtype."""
    flat = tree.flatten(params)
    merged = {path: leaf for path, leaf in flat.items() if "/paca/" not in path}
    for site in sorted({path.split("/paca/")[0] for path in flat if "/paca/" in path}):
        kernel, index, rows = flat[f"{site}/kernel"], flat[f"{site}/paca/index"], flat[f"{site}/paca/rows"]
        write = tree.over(index.ndim - 1, lambda w, i, p: w.at[i].set(p.astype(w.dtype)))
        merged[f"{site}/kernel"] = as_merged(kernel, write(dense(kernel, kernel.dtype), index, rows))
    return tree.unflatten(merged)


ABOUT = About(
    summary="a few rows of each kernel train, without an adapter beside it",
    level="site",
    trains="r rows, r m numbers per kernel",
    saves="as LoRA, and the inputs that only A's gradient needs; under matmuls none worth naming",
    reference="Woo et al. 2025, arXiv:2503.01905",
    example={"rank": 4, "alpha": 8.0},
    promises=Promises(site_bytes=saved_bytes),
    defaults=Defaults(lr=1e-4),
    places=lambda path, n, m: n if path.endswith("/paca/index") else None,
)
