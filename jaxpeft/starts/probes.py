"""Numbers of sites that the base says of batches: the gradients of leaves that a probe has there.

A probe is an adapter that leaves its site's output as it is, and whose leaves have a gradient all the same: a
statistic of the site's inputs, or a product with the gradient of its kernel. So they are had of any model, through
loops over layers and whatever else JAX differentiates, as adapters are. Layers are computed again in the backward pass,
so that one layer's inputs are kept at a time.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec

from jaxpeft import constraints, shares, sites, tree
from jaxpeft.errors import InputError
from jaxpeft.method import View
from jaxpeft.model import Batch, Context, Model
from jaxpeft.starts.pair import Sited
from jaxpeft.train.loss import classification_loss, completion_loss

SCOPE = "probe"
COUNTS = "counts"  # of the context: (B, S) bool, the positions that count
Leaves = dict[str, dict[str, Any]]  # path of a site -> {leaf: array}
Loss = Callable[[Model, tree.Params, Batch], jax.Array]


def batches(what: str, view: View) -> list[Batch]:
    """Those that a start is calculated from; none where a run is planned, or goes on from a checkpoint.

    Raises:
      InputError: where there is no data.
    """
    if view.batches is None:
        raise InputError(f"{what} starts from data: setup(..., batches=...) gives it some batches")
    return list(view.batches())


def gradients(
    base: Model, params: tree.Params, chosen: Sequence[Sited], probe: Callable[[Sited], nn.Module], loss: Loss
) -> tuple[Leaves, Callable[[Leaves, Batch], Leaves]]:
    """(the probes' leaves as they are initialised, (leaves, batch) -> their gradients of the loss).

    Args:
      base: the model; only its parameters are read.
      params: nested; packed kernels do.
      chosen: the sites that get a probe.
      probe: of a site; an adapter, see `sites.attach`.
      loss: of the model with probes.

    On a mesh the gradients come to the host, whole: what is calculated of them then is no program of several devices.
    """
    by_path = {site.path: site for site in chosen}
    stack = base.stack.map_layers(_again)._replace(embed=_counting(base.stack.embed))
    adapter = lambda path: probe(by_path[path])
    model = sites.attach(base._replace(stack=stack), SCOPE, adapter, lambda params: list(by_path))
    own, rest = tree.split(model.init(jax.random.key(0), params), lambda path: f"/{SCOPE}/" in path)

    @jax.jit
    def of_batch(own, rest, batch):
        found = jax.grad(lambda own: loss(model, tree.combine(own, rest), batch))(own)
        return jax.lax.with_sharding_constraint(found, PartitionSpec()) if constraints.divides() else found

    def call(leaves, batch):
        found = of_batch(_flat(leaves), rest, dict(batch))
        return _by_site(shares.all_on_host(found) if constraints.divides() else found)

    return _by_site(own), call


class Whole(nn.Module):
    """The site's product. Parameter: w (n, m) zeros, whose gradient is that of the kernel."""

    @nn.compact
    def __call__(self, inner: Callable, x: jax.Array, site: sites.Site, ctx: Context) -> jax.Array:
        return inner(x) + x @ self.param("w", nn.initializers.zeros, site.kernel.shape).astype(x.dtype)


def of_kernels(
    base: Model, params: tree.Params, site: str, batches: Iterable[Batch], loss: Callable[..., Any] | None = None
) -> Iterator[jax.Array]:
    """dW (..., n, m) float32 of each batch, of one site's kernels, packed or not: of all its layers at once.

    Args:
      base: the model.  params: its parameters, nested.
      site: the path.
      batches: some.
      loss: of `setup`.
    """
    leaves, of_batch = gradients(base, params, [Sited(site, 1, 1.0)], lambda _: Whole(), value(loss))
    for batch in batches:
        yield of_batch(leaves, batch)[site]["w"].astype(jnp.float32)


def value(loss: Callable[..., Any] | None) -> Loss:
    """The loss of a batch: the one that `setup` was given, or by what the batch holds."""
    return lambda model, params, batch: (loss or by_content)(model, params, batch, None)[0]


def running(loss: Callable[..., Any] | None, whole: bool = False) -> Loss:
    """A number of a batch whose calculation runs all sites in the layers, and where it is `whole` all others too."""
    if loss is not None:
        return value(loss)
    return lambda model, *of: jnp.sum((model.apply if whole else model.hidden)(*of), dtype=jnp.float32)


def by_content(model: Model, params: tree.Params, batch: Batch, key: jax.Array | None = None) -> Any:
    """(loss, aux) of a batch with labels or targets.

    Raises:
      InputError: for one with neither.
    """
    if "labels" not in batch and "targets" not in batch:
        raise InputError(
            f"a start from the loss's gradient needs batches with targets or labels, not of {', '.join(batch)} alone; "
            "setup(..., loss=...) takes any other"
        )
    return (classification_loss if "labels" in batch else completion_loss)(model, params, batch, key)


def _again(block: Callable[..., Any]) -> Callable[..., Any]:
    """A block that keeps no more than its inputs."""

    def call(layer, x, ctx, cache, segment):
        function = lambda layer, x, ctx: block(layer, x, ctx, cache, segment)
        return jax.checkpoint(function, prevent_cse=False)(layer, x, ctx)

    return call


def _counting(embed: Callable[..., Any]) -> Callable[..., Any]:
    """`embed` that tells the layers which positions of the batch count."""

    def call(params, batch, key):
        x, ctx = embed(params, batch, key)
        if "loss_weights" in batch:
            return x, ctx.add(rows={COUNTS: batch["loss_weights"] > 0})
        if "weights" in batch and "segment_ids" in batch:
            return x, ctx.add(rows={COUNTS: (batch["segment_ids"] > 0) & (batch["weights"] > 0)[:, None]})
        return x, ctx

    return call


def _by_site(flat: Mapping[str, Any]) -> Leaves:
    found: Leaves = {}
    for path, leaf in flat.items():
        site, _, name = path.rpartition(f"/{SCOPE}/")
        found.setdefault(site, {})[name] = leaf
    return found


def _flat(leaves: Leaves) -> tree.Flat:
    return {f"{site}/{SCOPE}/{name}": leaf for site, own in leaves.items() for name, leaf in own.items()}
