"""LoRA-FA: LoRA with A frozen, so that no adapter keeps its input.

    y = x W + s (x A) B        x (..., n), W (n, m) and A (n, r) frozen, B (r, m) trainable, s = alpha / r
    dB = s (x A)^T dy,  dx = dy W^T + s (dy B^T) A^T

Only x A is kept for the backward pass: r numbers per token instead of n + r. A is stored, or made again from a 4-byte
seed in both passes (`store_a=False`).

Projected form: a step on B moves W by s A dB. The step whose effect is nearest to the gradient of the whole W,
argmin_g || s A g - dW ||_F, is

    g = (A^T A)^-1 dB / s^2

which needs the r x r Gram matrix only. With orthonormal A (`init="orthonormal"`) it is dB up to the factor, which
Adam ignores.

Paper: Zhang et al. 2023, "LoRA-FA", arXiv:2308.03303; the projected form as in PEFT's LoRA-FA optimizer. Deviations:
the Gram matrix is computed in each step (n r^2 operations per site, nothing beside the step); the projection comes
before the optimizer's clipping, where PEFT clips first. Dropout is on x A, where it needs no copy and no mask of x;
at a convolution it is on x, and where a table's rows are looked up there is none.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from jaxpeft import sites
from jaxpeft.about import About, Promises
from jaxpeft.errors import InputError
from jaxpeft.method import Method, Objective, Spec, trains, unchanged
from jaxpeft.methods import lora as _lora
from jaxpeft.model import Context
from jaxpeft.peft import form
from jaxpeft.quant import CONVOLUTION, EMBEDDING


class LoRAFA(nn.Module):
    """The adapted product. Parameters: a (n, r) float32 or seed () uint32, frozen; b (r, m) float32."""

    stacked = True  # only products read the kernel

    rank: int
    scale: float
    dropout: float = 0.0
    init_a: str = "kaiming"
    store_a: bool = True

    @nn.compact
    def __call__(self, inner: Callable, x: jax.Array, site: sites.Site, ctx: Context) -> jax.Array:
        n, m = site.kernel.shape
        make_a: Any = None
        if self.store_a:
            a = self.param("a", _lora.start_of(self.init_a, site.kernel), (n, self.rank))
        else:
            a = self.param("seed", lambda key: jax.random.bits(key, (), jnp.uint32))
            make_a = Regenerate(n, self.rank, self.init_a)
        b = self.param("b", nn.initializers.zeros, (self.rank, m))
        rate, seed = 0.0, None
        if self.dropout and self.has_rng("dropout") and site.through is not None:
            rate, seed = self.dropout, jax.random.bits(self.make_rng("dropout"), (), jnp.uint32)
        elif self.dropout and self.has_rng("dropout"):
            low = x @ (make_a(a) if make_a else a).astype(x.dtype)
            low = checkpoint_name(_lora.drop(low, self.dropout, self.make_rng("dropout")), "lora_low")
            return inner(x) + self.scale * (low @ b.astype(x.dtype))
        return site.low_rank(inner, x, a, b, scale=self.scale, rate=rate, seed=seed, make_a=make_a)


class Regenerate(NamedTuple):
    """seed () uint32 -> A (n, r) float32."""

    n: int
    rank: int
    init: str

    def __call__(self, seed: jax.Array) -> jax.Array:
        return regenerate(seed, self.n, self.rank, self.init)


def regenerate(seed: jax.Array, n: int, rank: int, init: str) -> jax.Array:
    """A (n, r) float32 from its seed () uint32."""
    return _lora.INITS[init](jax.random.key(seed), (n, rank))


def saved_bytes(inputs: int, outputs: int, itemsize: int, rank: int, **_) -> int:
    """Bytes per token kept at one adapted kernel beyond what a frozen backbone keeps (no dropout): x A."""
    del inputs, outputs
    return rank * itemsize


def lora_fa(
    rank: int = 8,
    alpha: float | None = None,
    targets: _lora.Targets = "all-linear",
    init: str = "kaiming",
    dropout: float = 0.0,
    projected: bool = False,
    store_a: bool = True,
) -> Method:
    """LoRA-FA on the sites that `targets` chooses.

    Args:
      rank: r, at most the smaller side of each kernel.
      alpha: numerator of the scale; None: the rank.
      targets: "all-linear", "attention", "mlp", a regular expression, or a list of names (see `sites.find`).
      init: how A is drawn: "kaiming", "gaussian", or "orthonormal".
      dropout: rate of dropout on x A.
      projected: use the projected gradient (see the module's docstring).
      store_a: keep A among the frozen parameters; False keeps a seed and draws A again in every pass.

    Returns:
      The method; it trains `<site>/lora_fa/b` (L, r, m).

    Raises:
      InputError: for a rank below 1 or above a kernel's smaller side, an unknown init, a rate outside [0, 1), or
        targets that match nothing.
    """
    config = dict(locals())
    _lora.check_rank("lora_fa", rank)
    _lora.check_alpha("lora_fa", alpha)
    if init not in _lora.INITS:
        raise InputError(f"lora_fa: init {init!r} is not one of {', '.join(_lora.INITS)}")
    if not 0 <= dropout < 1:
        raise InputError(f"lora_fa: dropout {dropout} must be at least 0 and below 1")
    scale = (alpha if alpha is not None else rank) / rank

    def adapter(site):
        del site
        return LoRAFA(rank, scale, dropout, init, store_a)

    kinds = (EMBEDDING, CONVOLUTION) if store_a else (CONVOLUTION,)
    choose = _lora.chosen_sites("lora_fa" if store_a else "lora_fa(store_a=False)", targets, lambda site: rank, kinds)

    def gradient(objective: Objective, view) -> Objective:
        def value_and_grad(trainable, frozen, batch, key, opt_state):
            value, grads = objective.value_and_grad(trainable, frozen, batch, key, opt_state)
            own = {path: g for path, g in grads.items() if path.endswith("/lora_fa/b")}
            for path, g in own.items():
                site = path.removesuffix("/lora_fa/b")
                leaves = {name: frozen.get(f"{site}/lora_fa/{name}") for name in ("a", "seed")}
                a, _ = factors(config, {**leaves, "b": g}, frozen[sites.kernel_path(frozen, site)].shape[-2])
                own[path] = project(a, g, scale)
            return value, {**grads, **own}

        return objective._replace(value_and_grad=value_and_grad)

    return Method(
        forward=lambda model, view: sites.attach(model, "lora_fa", adapter, choose),
        roles=trains(lambda path: path.endswith("/lora_fa/b")),
        gradient=gradient if projected else unchanged,
        merge=lambda params: _lora.fold(
            params, "lora_fa", lambda site: scale, lambda leaves, n: factors(config, leaves, n), lambda site: rank
        ),
        specs=(Spec("lora_fa", config),),
    )


def project(a: jax.Array, d_b: jax.Array, scale: float) -> jax.Array:
    """(A^T A)^-1 dB / s^2 for A (..., n, r), dB (..., r, m); 1e-8 on the Gram matrix's diagonal, as PEFT adds."""
    a = a.astype(jnp.float32)
    gram = jnp.einsum("...nr,...ns->...rs", a, a, precision="highest")
    gram += 1e-8 * jnp.eye(gram.shape[-1])
    return jnp.linalg.solve(gram, d_b.astype(jnp.float32)) / scale / scale


def factors(config: Mapping[str, Any], leaves: Mapping[str, Any], inputs: int) -> tuple[jax.Array, jax.Array]:
    """A (..., n, r), drawn again where only its seed is kept, and B (..., r, m)."""
    a = leaves.get("a")
    if a is None:
        seed, rank = jnp.asarray(leaves["seed"]), leaves["b"].shape[-2]
        a = jax.vmap(lambda s: regenerate(s, inputs, rank, config["init"]))(seed.reshape(-1))
        a = a.reshape(*seed.shape, inputs, rank)
    return a, leaves["b"]


# Hugging Face PEFT: an ordinary LoRA checkpoint.


def _leaves(config: Mapping[str, Any], pair: Mapping[str, Any], extra: Mapping[str, Any]) -> dict[str, Any]:
    """The leaves of a site: the inverse of `factors`.

    Raises:
      InputError: if the stored A is not the one that the seed gives (random bits of another JAX version).
    """
    if config["store_a"]:
        return dict(pair)
    leaves = {"seed": jnp.asarray(extra["seed"], jnp.uint32), "b": pair["b"]}
    drawn, _ = factors(config, leaves, pair["a"].shape[-2])
    if not jnp.allclose(drawn, pair["a"], rtol=1e-5, atol=1e-6):
        raise InputError("lora_fa: the seed does not give the stored A; remove jaxpeft.json to read it as plain LoRA")
    return leaves


PEFT = form.lora_pairs(
    "lora_fa",
    scale=lambda config, site: (config["alpha"] if config["alpha"] is not None else config["rank"]) / config["rank"],
    to_tensors=lambda config, leaves, module: dict(zip("ab", factors(config, leaves, module.n), strict=True)),
    from_tensors=_leaves,
    extra=("seed",),
    when=None,
)

ABOUT = About(
    summary="LoRA with A frozen: no adapter input is kept for the backward pass",
    level="site",
    trains="B, r m numbers per kernel",
    saves="as LoRA, and the activations that only A's gradient needs: n per token and kernel",
    reference="Zhang et al. 2023, arXiv:2308.03303",
    example={"rank": 4, "alpha": 8.0},
    promises=Promises(site_bytes=saved_bytes),
    peft=PEFT,
)
