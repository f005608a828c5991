"""DoRA: a kernel as directions, which LoRA updates, and a magnitude of each output, which is trained.

    y = (mag / c) * (x V)          V = W + s A B,  c_j = ||V_j||,  s = alpha / r, with rsLoRA alpha / sqrt(r)

x (..., n), W (n, m) frozen, A (n, r), B (r, m), mag (m,) trained; V_j (n,) is a column, the weights of one output. B
starts at zero and mag at c, the adapted model at the base. c counts as a constant in differentiation (section 4.3 of
the paper). V is never made:

    c_j^2 = ||W_j||^2 + 2 s <W_j, (A B)_j> + s^2 ||(A B)_j||^2
          = ||W_j||^2 + 2 s <(A^T W)_j, B_j> + s^2 B_j^T (A^T A) B_j

||W_j||^2 (m,) float32 is calculated once and kept among the frozen leaves. A^T W (r, m) is a product of r rows with
the kernel, which every type of kernel has: no quantized one is unpacked in a step.

Kept for the backward pass, beside what LoRA keeps: x V, m per token, for d mag. Under `matmuls` it takes the place of
y, of which it is a multiple, wherever y or what y is added to was kept: only down_proj's is more than LoRA keeps
(`--save matmuls,down_proj_product=recompute` calculates it again). c is kept as well, m per group of rows, so that
A^T W is calculated once.

Dropout is that of PEFT: with x' = drop(x), y = x W + (mag / c) (x' V) - x' W; so the base product is computed twice,
and each site keeps its own x'. (The mask is drawn again.)

Paper: Liu et al. 2024, "DoRA", arXiv:2402.09353. Deviations: masters are float32 and cast to the stream's dtype for
the products, where the magnitudes scale in float32 and the result is rounded once.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax.ad_checkpoint import checkpoint_name

from jaxpeft import sites, tree
from jaxpeft.about import About, Defaults, Promises
from jaxpeft.errors import InputError
from jaxpeft.method import Method, Spec, trains
from jaxpeft.methods import lora as _lora
from jaxpeft.methods.ia3 import scaled
from jaxpeft.model import Context, Model
from jaxpeft.peft import form
from jaxpeft.quant import CONVOLUTION, dense, dot
from jaxpeft.quant import merged as as_merged
from pallas_kernels import dropout as _dropout

TINY = 1e-30  # of a squared norm: an output whose weights are all zero stays at zero


class DoRA(nn.Module):
    """The adapted product. Parameters: a (n, r), b (r, m), mag (m,), trained; squares (m,), frozen; all float32."""

    stacked = True  # only products read the kernel

    rank: int
    scale: float
    dropout: float = 0.0
    init_a: str = "kaiming"

    @nn.compact
    def __call__(self, inner: Callable, x: jax.Array, site: sites.Site, ctx: Context) -> jax.Array:
        if not site.plain:
            raise InputError("dora: must be nearest to the kernel, whose norms it takes: name it last in the chain")
        n, m = site.kernel.shape
        a = self.param("a", _lora.INITS[self.init_a], (n, self.rank))
        b = self.param("b", nn.initializers.zeros, (self.rank, m))
        squares = self.param("squares", nn.initializers.ones, (m,))  # both start as `_measured` says
        magnitude = self.param("mag", nn.initializers.ones, (m,))
        fixed_a, fixed_b = jax.lax.stop_gradient((a, b))
        c = norms(site.kernel, fixed_a, fixed_b, squares, self.scale, x.dtype)
        gain = magnitude / checkpoint_name(c, "dora_norm")
        if not self.dropout or not self.has_rng("dropout"):
            return scaled(self._directions(inner, x, a, b, site), gain)
        rest, x = _split(x, jax.random.bits(self.make_rng("dropout"), (), jnp.uint32), self.dropout)
        return inner(rest) + scaled(self._directions(inner, x, a, b, site), gain)

    def _directions(self, inner, x, a, b, site):
        product = site.low_rank(inner, x, a, b, scale=self.scale)
        return checkpoint_name(product, f"{site.path.rsplit('/', 1)[-1]}_product")


def squared_norms(kernel: Any) -> jax.Array:
    """||W_j||^2 (..., m) float32 of the columns of W (..., n, m); of a stack layer by layer."""
    if kernel.ndim > 2:
        return jax.lax.map(squared_norms, kernel)
    return jnp.sum(jnp.square(dense(kernel)), axis=-2)


def norms(kernel: Any, a: jax.Array, b: jax.Array, squares: jax.Array, scale: float, dtype: Any) -> jax.Array:
    """c (m,) float32 by A^T W, which is a product in `dtype`, and A^T A."""
    b = scale * b  # s^2 alone may be above float32's numbers
    cross = jnp.sum(dot(a.T.astype(dtype), kernel).astype(jnp.float32) * b, axis=0)
    gram = jnp.matmul(a.T, a, precision="highest")
    own = jnp.sum(jnp.matmul(gram, b, precision="highest") * b, axis=0)
    return jnp.sqrt(jnp.maximum(squares + 2 * cross + own, TINY))


def _split(x: jax.Array, seed: jax.Array, rate: float) -> tuple[jax.Array, jax.Array]:
    """(x - drop(x), drop(x)); the mask is not kept."""

    def of(x, seed):
        dropped = _dropout.drop(x.reshape(-1, x.shape[-1]), seed.astype(jnp.int32), rate).reshape(x.shape)
        return x - dropped, dropped

    return jax.checkpoint(of, prevent_cse=False)(x, seed)


def saved_bytes(inputs: int, outputs: int, itemsize: int, rank: int, **_) -> int:
    """Bytes per token kept at one adapted kernel beyond what a frozen backbone keeps (no dropout): x, x A and x V.

    Sites that read the same x share it; this counts it at each.
    """
    return (inputs + rank + outputs) * itemsize


def dora(
    rank: int = 8,
    alpha: float | None = None,
    targets: _lora.Targets = "all-linear",
    init: str = "kaiming",
    dropout: float = 0.0,
    rslora: bool = False,
    rank_pattern: Mapping[str, int] | None = None,
    alpha_pattern: Mapping[str, float] | None = None,
) -> Method:
    """DoRA on the sites that `targets` chooses. Of a chain's adapters at a site it is the last.

    Args:
      rank: r, at most the smaller side of each kernel.
      alpha: numerator of the scale; None: the rank (a scale of 1, or sqrt(r) with rsLoRA).
      targets: "all-linear", "attention", "mlp", a regular expression, or a list of names (see `sites.find`).
      init: how A starts: "kaiming" (PEFT's default), "gaussian", or "orthonormal".
      dropout: rate of dropout in front of V.
      rslora: scale by alpha / sqrt(r).
      rank_pattern: regular expression -> rank, for sites in whose path it is found (first match wins).
      alpha_pattern: the same for alpha.

    Returns:
      The method; it trains `<site>/dora/a` (L, n, r), `<site>/dora/b` (L, r, m) and `<site>/dora/mag` (L, m).

    Raises:
      InputError: for a rank below 1 or above a kernel's smaller side, an unknown init, a rate outside [0, 1), or
        targets that match nothing; where the model is run: if another adapter is nearer to a kernel.
    """
    config = dict(locals())
    _lora.check_rank("dora", rank)
    _lora.check_alpha("dora", alpha, alpha_pattern)
    if init not in _lora.INITS:
        raise InputError(f"dora: init {init!r} is not one of {', '.join(_lora.INITS)}")
    if not 0 <= dropout < 1:
        raise InputError(f"dora: dropout {dropout} must be at least 0 and below 1")

    def rank_of(site):
        return _lora.check_rank("dora", sites.first_match(rank_pattern or {}, site, rank))

    def adapter(site):
        return DoRA(rank_of(site), scale_at(config, site), dropout, init)

    named = {"rank_pattern": rank_pattern, "alpha_pattern": alpha_pattern}
    choose = _lora.chosen_sites("dora", targets, rank_of, (CONVOLUTION,), named)
    return Method(
        forward=lambda model, view: _measured(sites.attach(model, "dora", adapter, choose)),
        roles=trains(lambda path: path.endswith(("/dora/a", "/dora/b", "/dora/mag"))),
        merge=lambda params: fold(params, lambda site: scale_at(config, site), rank_of),
        specs=(Spec("dora", config),),
    )


def _measured(model: Model) -> Model:
    """The model whose `init` takes the norms of the kernels as they are; magnitudes that are already there stay."""

    def init(key, params):
        known, flat = tree.flatten(params), tree.flatten(model.init(key, params))
        squares = _squares(flat, flat)
        start = {path.removesuffix("squares") + "mag": jnp.sqrt(leaf) for path, leaf in squares.items()}
        return tree.unflatten({**flat, **squares, **{path: known.get(path, leaf) for path, leaf in start.items()}})

    return model._replace(init=init)


def _squares(leaves: tree.Flat, kernels: Mapping[str, Any]) -> tree.Flat:
    """{path: ||W_j||^2} of the sites that have an adapter among `leaves`."""
    found = [path.removesuffix("/dora/a") for path in leaves if path.endswith("/dora/a")]
    return {f"{site}/dora/squares": jax.jit(squared_norms)(kernels[f"{site}/kernel"]) for site in found}


def scale_at(config: Mapping[str, Any], site: str) -> float:
    """s at a site."""
    rank = sites.first_match(config["rank_pattern"] or {}, site, config["rank"])
    default = config["alpha"] if config["alpha"] is not None else rank
    return _lora.scale_of(sites.first_match(config["alpha_pattern"] or {}, site, default), rank, config["rslora"])


def fold(params: Mapping[str, Any], scale: Callable[[str], float], rank_of: Callable[[str], int]) -> tree.Params:
    """W <- (mag / c) (W + s A B) at every adapted site, whose leaves go; in float32, rounded once to W's dtype.

    A packed kernel becomes a plain array.

    Raises:
      InputError: for factors of another rank than `rank_of(site)`.
    """
    flat = tree.flatten(params)
    merged = {path: leaf for path, leaf in flat.items() if "/dora/" not in path}
    for site in sorted({path.split("/dora/")[0] for path in flat if "/dora/" in path}):
        kernel, a, b, magnitude = (flat[f"{site}/{leaf}"] for leaf in ("kernel", "dora/a", "dora/b", "dora/mag"))
        _lora.check_factor("dora", site, b, rank_of(site))
        summed = dense(kernel) + scale(site) * jnp.matmul(a, b, precision="highest")
        gain = magnitude / jnp.sqrt(jnp.maximum(squared_norms(summed), TINY))
        merged[f"{site}/kernel"] = as_merged(kernel, gain[..., None, :] * summed)
    return tree.unflatten(merged)


def _restore(config: Mapping[str, Any], parts: dict[str, Any], facts: Mapping[str, Any], base: form.Base) -> tree.Flat:
    """The leaves, with the norms of the base's kernels where these are known; `init` takes them anyway."""
    leaves = _PAIRS.restore(config, parts, facts, base)
    return leaves if base.params is None else {**leaves, **_squares(leaves, base.params)}


_PAIRS = form.lora_pairs(
    "dora",
    scale=scale_at,
    tensors={"mag": form.Tensor("lora_magnitude_vector", "m")},
    fill={"mag": lambda kernel: np.linalg.norm(kernel, axis=0)},
    fields=lambda config: {"lora_dropout": config["dropout"], "use_rslora": config["rslora"], "use_dora": True},
    when={"use_dora": True},
)
PEFT = _PAIRS._replace(restore=_restore)


ABOUT = About(
    summary="LoRA on each kernel's directions, and a trained magnitude of each output",
    level="site",
    trains="A, B and the magnitudes, r(n+m) + m numbers per kernel",
    saves="as LoRA; it keeps m more activations per kernel, under matmuls those of down_proj alone",
    reference="Liu et al. 2024, arXiv:2402.09353",
    example={"rank": 4, "alpha": 8.0},
    promises=Promises(site_bytes=saved_bytes),
    defaults=Defaults(lr=2e-4),
    peft=PEFT,
)
