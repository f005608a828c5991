"""VeLoRA: LoRA that keeps of its inputs one number for each group of features, and makes dA of these.

    y = x W + s (x A) B                     x (..., n), W (n, m) frozen, A (n, r), B (r, m) trained, s = alpha / r
    z_g = x_g v                             x_g (d,) the g-th of G groups of x's features, d = ceil(n / G)
    dA ~ x~^T dlow,  x~_g = z_g v           dlow = s dy B^T (..., r)

v (d,) is the mean of all groups of a row's tokens, of length one. y, dx and dB are LoRA's; dA alone is not exact: x~ is
x's part along v, group by group. As v is the same for all groups, dA_g = v (z_g^T dlow): x~ is never made, and a row's
dA has G r numbers of its own, however large n is.

Kept for the backward pass: z, G numbers per token, x A, r, and v, d per row; no x. It starts and merges as LoRA does,
and its adapter is LoRA's. The products beside LoRA's are x_g v, and dy B^T a second time.

At equal bytes the 8-bit codes of the plan `compressed`, which is for any method, are far closer. Over all kernels of
the embedded model, dA of codes is wrong by 0.7 % of its norm, n bytes per token; of as many bytes of z in bfloat16, by
65 %; of an 8th and a 64th of these by 95 and 86 %. What VeLoRA has is fewer bytes than any code of all features.

Paper: Miles et al. 2024, "VeLoRA: Memory Efficient Training using Rank-1 Sub-Token Projections", arXiv:2405.17991. The
paper's v is the mean of the first batch and stays; as in PEFT's default it is that of what is at hand. Deviations: PEFT
takes the mean of a batch, here it is each row's own, so that a step in groups of rows, or on a mesh, gives the same.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from jaxpeft import sites, tree
from jaxpeft.about import About, Promises
from jaxpeft.errors import InputError
from jaxpeft.method import Method, Spec, trains
from jaxpeft.methods import lora as _lora
from jaxpeft.model import Context
from jaxpeft.peft import form


class VeLoRA(nn.Module):
    """The adapted product. Parameters: a (n, r), b (r, m), float32."""

    stacked = True  # only products read the kernel

    rank: int
    scale: float
    groups: int

    @nn.compact
    def __call__(self, inner: Callable, x: jax.Array, site: sites.Site, ctx: Context) -> jax.Array:
        n, m = site.kernel.shape
        a = self.param("a", _lora.INITS["kaiming"], (n, self.rank))
        b = self.param("b", nn.initializers.zeros, (self.rank, m))

        def change(y, x, a, b):
            z, v = project(jax.lax.stop_gradient(x), self.groups)
            z, v = (checkpoint_name(kept, "velora_low") for kept in (z, v))
            return _with_gradient(y, a, z, v, jax.lax.stop_gradient(b))

        with sites.factor_gradient("velora", change):
            return site.low_rank(inner, x, a, b, scale=self.scale)


def project(x: jax.Array, groups: int) -> tuple[jax.Array, jax.Array]:
    """z (..., G) of x (..., n), in its dtype, and v (R, d) of its rows: of the first axis, or one of x of two axes.

    Where G does not divide n, zeros fill the last groups.
    """
    n = x.shape[-1]
    width = -(-n // groups)
    if padding := groups * width - n:
        x = jnp.pad(x, [*[(0, 0)] * (x.ndim - 1), (0, padding)])
    parts = x.reshape(*x.shape[:-1], groups, width)
    rows = parts[None] if x.ndim < 3 else parts
    mean = jnp.mean(rows, axis=tuple(range(1, rows.ndim - 1)), dtype=jnp.float32)
    norm = jnp.linalg.norm(mean, axis=-1, keepdims=True)
    v = jnp.where(norm > 0, mean / jnp.where(norm > 0, norm, 1), width**-0.5)
    z = jnp.einsum("b...gd,bd->b...g", rows, v.astype(x.dtype))
    return z.reshape(*x.shape[:-1], groups), v


@jax.custom_vjp
def _with_gradient(y: jax.Array, a: jax.Array, z: jax.Array, v: jax.Array, b: jax.Array) -> jax.Array:
    """y (..., m), with the gradient of a (n, r) that z (..., G), v (R, d) and s B (r, m) give."""
    del a, z, v, b
    return y


def _keep(y, a, z, v, b):
    return y, (jnp.zeros((a.shape[0], 0), a.dtype), z, v, b)


def _pull(kept, dy):
    like, z, v, b = kept
    by_row = lambda x: x.reshape(len(v), -1, x.shape[-1])
    wide = {"preferred_element_type": jnp.float32}
    d_low = jnp.einsum("bsm,rm->bsr", by_row(dy), b)
    of_groups = jnp.einsum("bsg,bsr->bgr", by_row(z), d_low, **wide)
    d_a = jnp.einsum("bgr,bd->gdr", of_groups, v, precision="highest", **wide)
    d_a = d_a.reshape(-1, d_a.shape[-1])[: like.shape[0]].astype(like.dtype)
    return dy, d_a, *map(jnp.zeros_like, (z, v, b))


_with_gradient.defvjp(_keep, _pull)


def saved_bytes(inputs: int, outputs: int, itemsize: int, rank: int, groups: int, **_) -> int:
    """Bytes per token kept at one adapted kernel beyond what a frozen backbone keeps: z and x A."""
    del inputs, outputs
    return (groups + rank) * itemsize


def row_bytes(config: Any, itemsize: int, groups: int, **_) -> float:
    """Bytes per row, at most: v, float32, of the seven kernels of each layer, counted as that of the most inputs."""
    del itemsize
    widest = max(config.hidden_size, config.intermediate_size)
    return 4 * 7 * -(-widest // groups) * config.num_hidden_layers


def velora(
    rank: int = 8, alpha: float | None = None, targets: _lora.Targets = "all-linear", groups: int = 64
) -> Method:
    """VeLoRA on the sites that `targets` chooses.

    Args:
      rank: r, at most the smaller side of each kernel.
      alpha: numerator of the scale; None: the rank.
      targets: "all-linear", "attention", "mlp", a regular expression, or a list of names (see `sites.find`).
      groups: G, at most the inputs of each kernel; more of them are nearer to LoRA's gradient, and more to keep.

    Returns:
      The method; it trains `<site>/velora/a` (L, n, r) and `<site>/velora/b` (L, r, m).

    Raises:
      InputError: for a rank below 1 or above a kernel's smaller side, groups below 1 or above its inputs, or targets
        that match nothing.
    """
    config = dict(locals())
    _lora.check_rank("velora", rank)
    _lora.check_alpha("velora", alpha)
    if groups < 1:
        raise InputError(f"velora: groups {groups} must be at least 1")
    scale = (alpha if alpha is not None else rank) / rank
    by_rank = _lora.chosen_sites("velora", targets, lambda site: rank)

    def choose(params):
        flat, found = tree.flatten(params), by_rank(params)
        for site in found:
            n, m = flat[sites.kernel_path(flat, site)].shape[-2:]
            if groups > n:
                raise InputError(f"velora: groups {groups} are above the inputs of {site}, a kernel of {n} x {m}")
        return found

    return Method(
        forward=lambda model, view: sites.attach(model, "velora", lambda site: VeLoRA(rank, scale, groups), choose),
        roles=trains(lambda path: path.endswith(("/velora/a", "/velora/b"))),
        merge=lambda params: _lora.fold(
            params, "velora", lambda site: scale, lambda leaves, n: (leaves["a"], leaves["b"]), lambda site: rank
        ),
        specs=(Spec("velora", config),),
    )


# Hugging Face PEFT: an ordinary LoRA checkpoint.

PEFT = form.lora_pairs(
    "velora",
    scale=lambda config, site: (config["alpha"] if config["alpha"] is not None else config["rank"]) / config["rank"],
    when=None,
)


ABOUT = About(
    summary="LoRA whose A learns of a few numbers of each input, along one direction",
    level="site",
    trains="A and B, r(n+m) numbers per kernel",
    saves="as LoRA, and the inputs that A's gradient needs but for G numbers per token and kernel; that is not exact",
    reference="Miles et al. 2024, arXiv:2405.17991",
    example={"rank": 4, "alpha": 8.0, "groups": 5},
    promises=Promises(site_bytes=saved_bytes, row_bytes=row_bytes),
    peft=PEFT,
)
