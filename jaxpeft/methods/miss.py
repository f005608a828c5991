"""MiSS: the rows of each kernel share one trained block, so that the inputs are summed before they meet it.

    y = x W + f(drop(x)) M        x (..., n), W (n, m) frozen, M (r, m) trained
    f(x)_i = x_i + x_(i+r) + x_(i+2r) + ...        (..., r): every r-th input; n need not be a multiple of r
    mini:  M = (D, D, ..., D)                      D (r, d) trained, repeated m / d times over the outputs

So W changes by M, repeated over the inputs and cut off after n rows: a change of rank r at most. M starts at zero, the
adapted model at the base. f has no parameters: kept for the backward pass is f(x), r per token and kernel, as LoRA-FA
keeps x A, and dropout's mask is drawn again. f costs n additions a token, where LoRA's A costs 2 n r operations.

Merging is exact up to rounding: W <- W + the repeated M. The kernel is only multiplied with, so quantized ones do.

Paper: Kang and Yin 2024, "MiSS: Revisiting the Trade-off in LoRA with an Efficient Shard-Sharing Structure",
arXiv:2409.15371 (Bone, in its first version). Deviations: not its nonlinear form ("bat"), whose update is a function of
the kernel's blocks, and would make a second kernel in each step.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from jaxpeft import sites, tree
from jaxpeft.about import About, Promises
from jaxpeft.errors import InputError
from jaxpeft.method import Method, Spec, trains
from jaxpeft.methods.lora import Targets, check_rank
from jaxpeft.model import Context
from jaxpeft.peft import form
from jaxpeft.quant import dense
from jaxpeft.quant import merged as as_merged
from jaxpeft.widths import dividing
from pallas_kernels import dropout as _dropout


class MiSS(nn.Module):
    """The adapted product. Parameters: block (r, m), or (r, d), float32."""

    stacked = True  # only the product reads the kernel

    rank: int
    mini: int = 0
    dropout: float = 0.0

    @nn.compact
    def __call__(self, inner: Callable, x: jax.Array, site: sites.Site, ctx: Context) -> jax.Array:
        m = site.kernel.shape[1]
        block = self.param("block", nn.initializers.zeros, (self.rank, self.mini or m)).astype(x.dtype)
        rate, seed = 0.0, jnp.int32(0)
        if self.dropout and self.has_rng("dropout"):
            rate, seed = self.dropout, jax.random.bits(self.make_rng("dropout"), (), jnp.uint32).astype(jnp.int32)
        change = summed(x, self.rank, rate, seed) @ block
        return inner(x) + (jnp.tile(change, m // self.mini) if self.mini else change)


def summed(x: jax.Array, rank: int, rate: float = 0.0, seed: jax.Array | None = None) -> jax.Array:
    """f(drop(x)) (..., r) of x (..., n), in its dtype."""

    def of(x, seed):
        dropped = _dropout.drop(x.reshape(-1, x.shape[-1]), seed, rate).reshape(x.shape) if rate else x
        padded = jnp.pad(dropped, [(0, 0)] * (x.ndim - 1) + [(0, -x.shape[-1] % rank)])
        return jnp.sum(padded.reshape(*x.shape[:-1], -1, rank), axis=-2)

    return jax.checkpoint(of, prevent_cse=False)(x, seed) if rate else of(x, seed)


def saved_bytes(inputs: int, outputs: int, itemsize: int, rank: int, **_) -> int:
    """Bytes per token kept at one adapted kernel beyond what a frozen backbone keeps: f(x)."""
    del inputs, outputs
    return rank * itemsize


def miss(rank: int = 64, targets: Targets = "all-linear", mini: int = 0, dropout: float = 0.0) -> Method:
    """MiSS on the sites that `targets` chooses.

    Args:
      rank: r, at most the inputs of each kernel.
      targets: "all-linear", "attention", "mlp", a regular expression, or a list of names (see `sites.find`).
      mini: d, which divides the outputs of each kernel; 0: all of them.
      dropout: rate of dropout in front of the sums.

    Returns:
      The method; it trains `<site>/miss/block` (L, r, m), or (L, r, d).

    Raises:
      InputError: for a rank below 1 or above a kernel's inputs, a negative `mini` or one that does not divide a
        kernel's outputs, a rate outside [0, 1), or targets that match nothing.
    """
    config = dict(locals())
    check_rank("miss", rank)
    if mini < 0:
        raise InputError(f"miss: mini {mini} must be at least 0")
    if not 0 <= dropout < 1:
        raise InputError(f"miss: dropout {dropout} must be at least 0 and below 1")

    def choose(params):
        flat, found = tree.flatten(params), sites.find(params, targets, "miss")
        shapes = {site: flat[sites.kernel_path(flat, site)].shape[-2:] for site in found}
        for site, (n, m) in shapes.items():
            if rank > n:
                raise InputError(f"miss: rank {rank} is above the {n} inputs of {site}, a kernel of {n} x {m}")
            if mini and m % mini:
                raise InputError(
                    f"miss: mini {mini} does not divide the {m} outputs of {site}, a kernel of {n} x {m}; "
                    f"{dividing(outputs for _, outputs in shapes.values())}"
                )
        return found

    return Method(
        forward=lambda model, view: sites.attach(model, "miss", lambda site: MiSS(rank, mini, dropout), choose),
        roles=trains(lambda path: path.endswith("/miss/block")),
        merge=fold,
        specs=(Spec("miss", config),),
    )


def fold(params: Mapping[str, Any]) -> tree.Params:
    """W <- W + the repeated M at every adapted site, whose leaf goes; in float32, rounded once to W's dtype."""
    flat = tree.flatten(params)
    merged = {path: leaf for path, leaf in flat.items() if "/miss/" not in path}
    for path, block in flat.items():
        site, _, leaf = path.partition("/miss/")
        if leaf == "block":
            kernel = merged[f"{site}/kernel"]
            n, m = kernel.shape[-2:]
            change = jnp.take(block, jnp.arange(n) % block.shape[-2], axis=-2)
            change = jnp.take(change, jnp.arange(m) % block.shape[-1], axis=-1)
            merged[f"{site}/kernel"] = as_merged(kernel, dense(kernel) + change)
    return tree.unflatten(merged)


# Hugging Face PEFT.

_FIELDS = (
    "r mini_r miss_dropout init_weights bias target_modules exclude_modules layers_to_transform layers_pattern"
).split()
_LINEAR = (True, False, None, "mini")


def _to_config(config: Mapping[str, Any], parts: Mapping[str, form.Part], base: form.Base) -> dict[str, Any]:
    return {
        "bias": "none",
        "init_weights": "mini" if config["mini"] else True,
        "layers_pattern": None,
        "layers_to_transform": None,
        "mini_r": config["mini"] or 1,
        "miss_dropout": config["dropout"],
        "r": config["rank"],
        "target_modules": form.as_target_modules(parts, base),
    }


def _from_config(fields: Mapping[str, Any], parts: dict[str, Any], base: form.Base) -> tuple[dict[str, Any], Any]:
    mini = fields.get("init_weights") == "mini"
    ranks, sizes = set(), set()
    for name, part in parts.items():
        columns, rank = part["block"].shape
        ranks.add(rank)
        sizes.add(columns)
        if not mini and columns != (m := base.modules[name].m):
            raise InputError(f"an adapter for another base: {name} has a block of {columns} outputs, and {m} itself")
    if len(ranks) > 1 or (mini and len(sizes) > 1):
        raise InputError(f"has blocks of several sizes, r {sorted(ranks)} and mini_r {sorted(sizes)}")
    return {
        "rank": ranks.pop(),
        "targets": form.sites_as_targets({base.modules[name].site for name in parts}, base),
        "mini": sizes.pop() if mini else 0,
        "dropout": float(fields.get("miss_dropout") or 0.0),
    }, parts


def _check(fields: Mapping[str, Any]) -> None:
    """Refuses what computes something else."""
    init = fields.get("init_weights", True)
    if not any(init is known or (isinstance(known, str) and init == known) for known in _LINEAR):
        raise InputError(f"init_weights {init!r} is not supported; supported: True, 'mini'")
    if (bias := fields.get("bias", "none")) != "none":
        raise InputError(f"bias {bias!r} is not supported; supported: 'none'")


def _parse(tensors: Mapping[str, np.ndarray], base: form.Base) -> dict[str, Any]:
    """The parts, whose blocks must fit the base's kernels."""
    parts = _FORM.parse(tensors, base)
    for name, part in parts.items():
        columns, rank = part["block"].shape
        _, _, n, m = base.modules[name]
        if rank > n or m % columns:
            raise InputError(
                f"an adapter for another base: {name}.miss_block has shape {(rank, columns)}, where {name} has "
                f"{n} inputs and {m} outputs"
            )
    return parts


_FORM = form.per_site(
    "MISS",
    "miss",
    {"block": form.Tensor("miss_block", "kd")},
    _to_config,
    _from_config,
    _FIELDS,
    to_tensors=lambda config, leaves, module: {"block": jnp.swapaxes(leaves["block"], -1, -2)},
    from_tensors=lambda config, leaves, extra: {"block": jnp.swapaxes(leaves["block"], -1, -2)},
    check=_check,
)
PEFT = _FORM._replace(parse=_parse)


ABOUT = About(
    summary="one trained block that the rows of each kernel share",
    level="site",
    trains="the block, r m numbers per kernel",
    saves="as LoRA, and the inputs that only A's gradient needs; under matmuls none worth naming",
    reference="Kang and Yin 2024, arXiv:2409.15371",
    example={"rank": 4},
    promises=Promises(site_bytes=saved_bytes),
    peft=PEFT,
)
