"""What of a LoRA and its base can go after a few steps, and what is left of both: Light-PEFT's second phase.

    heads, neurons     the smallest |m|, trained masks of `light_peft`
    modules            LoRA at one linear map of one layer: mean over tokens of ||s x A B|| / ||x W||, the least go
    ranks              of each module that stays: sum |A dA| + |B dB| of A's column and B's row, mean over batches

A module that goes has A = B = 0, which gets no gradient, so that layers stay a stack; PEFT's form leaves it out. Masks
themselves are left out: what stays of the base is as it was.

Paper: Gu et al. 2024, arXiv:2406.03792. Deviations: importances of modules and ranks are taken at the end of the
estimation, on batches of its data with the masks off, where the paper averages over its second half; of each layer the
same share of heads and neurons goes (`jaxpeft.pruning`).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from jaxpeft import pruning, sites, tree
from jaxpeft.errors import InputError
from jaxpeft.method import Method, Spec, setup
from jaxpeft.methods import lora as _lora
from jaxpeft.model import Batch, Context, Model
from jaxpeft.quant import dot
from jaxpeft.train.loss import completion_loss


def masks(leaves: Mapping[str, Any]) -> pruning.Scores:
    """|m| of the leaves of `light_peft`, by path."""
    own = {path.split("/")[-3]: np.abs(np.asarray(leaf)) for path, leaf in leaves.items() if "/light_peft/" in path}
    return pruning.Scores(own["o_proj"], own["down_proj"])


class Parts(NamedTuple):
    """How much the parts of a LoRA matter, by site. modules: (L,).  ranks: (L, r)."""

    modules: dict[str, np.ndarray]
    ranks: dict[str, np.ndarray]


class _Probe(nn.Module):
    """Tells as the gradient of p what share of a product its adapter's part is."""

    @nn.compact
    def __call__(self, inner: Callable, x: jax.Array, site: sites.Site, ctx: Context) -> jax.Array:
        p = self.param("p", nn.initializers.zeros, ())
        y, plain = inner(x), dot(x, site.kernel)
        norm = lambda x: jnp.linalg.norm(x.astype(jnp.float32), axis=-1)
        return _telling(y, p, jnp.mean(norm(y - plain) / jnp.maximum(norm(plain), jnp.finfo(jnp.float32).tiny)))


@jax.custom_vjp
def _telling(y: jax.Array, p: jax.Array, value: jax.Array) -> jax.Array:
    """y; the gradient of p is `value`."""
    del p, value
    return y


_telling.defvjp(lambda y, p, value: (y, value), lambda value, dy: (dy, value, jnp.zeros_like(value)))


def importance(base: Model, method: Method, params: Mapping[str, Any], batches: Iterable[Batch]) -> Parts:
    """How much the parts of a LoRA matter to the loss of some batches.

    Args:
      base: the model before the method.
      method: with `lora` in it.
      params: of the base, with the method's leaves, nested; masks are taken as 1.
      batches: of training.

    Raises:
      InputError: without a batch.
    """
    flat = tree.flatten(params)
    flat = {path: jnp.ones_like(leaf) if "/light_peft/" in path else leaf for path, leaf in flat.items()}
    found = [path.removesuffix("/lora/a") for path in flat if path.endswith("/lora/a")]
    outermost = sites.attach(base, "probe", lambda site: _Probe(), lambda params: found)
    probed, *leaves = setup(method, outermost, tree.unflatten(flat), jax.random.key(0), batches=lambda: ())
    flat = {**leaves[0], **leaves[1]}
    asked = {path: leaf for path, leaf in flat.items() if path.endswith(("/probe/p", "/lora/a", "/lora/b"))}
    rest = {path: leaf for path, leaf in flat.items() if path not in asked}

    @jax.jit
    def measured(asked, rest, batch):
        value = lambda asked: completion_loss(probed, tree.combine(asked, rest), batch)[0]
        gradients = jax.grad(value)(asked)
        first = {path: jnp.abs(leaf * gradients[path]) for path, leaf in asked.items()}
        ranks = {site: first[f"{site}/lora/a"].sum(-2) + first[f"{site}/lora/b"].sum(-1) for site in found}
        return {site: gradients[f"{site}/probe/p"] for site in found}, ranks

    totals: Any = None
    count = 0
    for batch in batches:
        own = measured(asked, rest, batch)
        totals = own if totals is None else jax.tree.map(jnp.add, totals, own)
        count += 1
    if not count:
        raise InputError("needs batches of data; there is none")
    return Parts(*jax.tree.map(lambda x: np.asarray(x) / count, totals))


def chosen(
    leaves: Mapping[str, Any], spec: Spec, parts: Parts, modules: float, ranks: float
) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
    """What stays of a LoRA.

    Args:
      leaves: {path: array}, its factors.
      spec: of `lora`.
      parts: how much they matter.
      modules: share of its modules that stays.
      ranks: share of the ranks of each of them.

    Returns:
      (leaves, arguments of `lora`) of fewer sites and ranks; the scale is what it was.

    Raises:
      InputError: for a share outside (0, 1], or a LoRA of several ranks or scales.
    """
    pruning.check_share("modules", modules)
    pruning.check_share("ranks", ranks)
    config = spec.config
    if config["rank_pattern"] or config["alpha_pattern"]:
        raise InputError("a LoRA of several ranks or scales cannot be cut; train one of one rank")
    names = list(parts.modules)
    values = np.stack([parts.modules[site] for site in names])
    count = max(1, round(modules * values.size))
    there = np.zeros(values.size, bool)
    there[np.argsort(-values.reshape(-1), kind="stable")[:count]] = True
    there = there.reshape(values.shape)
    rank = max(1, round(ranks * config["rank"]))
    found = {}
    for site, stays in zip(names, there, strict=True):
        if not stays.any():
            continue
        at = np.sort(np.argsort(-parts.ranks[site], axis=-1, kind="stable")[:, :rank], axis=-1)
        a, b = (np.asarray(leaves[f"{site}/lora/{name}"]) for name in "ab")
        factor = stays[:, None, None].astype(a.dtype)
        found[f"{site}/lora/a"] = np.take_along_axis(a, at[:, None, :], -1) * factor
        found[f"{site}/lora/b"] = np.take_along_axis(b, at[:, :, None], -2) * factor
    scale = _lora.scale_at(config, "")
    alpha = scale * (math.sqrt(rank) if config["rslora"] else rank)
    targets = sorted({path.split("/")[-3] for path in found})
    return found, {**config, "rank": rank, "alpha": alpha, "targets": targets}
