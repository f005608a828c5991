"""A frozen linear map with its low-rank update, at the price of the frozen product alone.

    y = x W + s (drop(x) A) B           x (..., n), W (n, m), A (n, r), B (r, m)

    mosaic_gpu   z = s A^T drop(x)^T in one kernel, then one product over (x, z^T) and (W, B)     gpu.py
    tpu          one pass over x for both                                                         tpu.py
    else         plain JAX                                                                        reference.py

For the backward pass z (r, T) is kept, and x only if A (or W) is differentiated: with A frozen (LoRA-FA) no adapter
input is kept. z is named (`jax.ad_checkpoint.checkpoint_name`), so that a memory plan may keep it or compute it again;
where y itself is not needed again, only z is computed. The mask of dropout is drawn from a counter in both passes and
never stored (`pallas_kernels/dropout.py`).

    e = s B dy^T        dx = dy W^T + drop(e^T A^T)        dA = drop(x)^T e^T        dB = z dy

Papers: Hu et al. 2021, "LoRA", arXiv:2106.09685; where the graph is split on a GPU: Zhu et al. 2025, "LoRAFusion",
arXiv:2510.00206.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jax.custom_derivatives import SymbolicZero

from pallas_kernels import tuning
from pallas_kernels.divided import Dims, Divided, flat, unflat
from pallas_kernels.lora_matmul import reference
from pallas_kernels.platform import Implementation, Part, operation
from pallas_kernels.stacked import Stacked, put
from pallas_kernels.tuning import Sizes

__all__ = ["lora_matmul"]


def flops_of_low(x, a, *rest, **static):
    """2 T n r."""
    del rest, static
    return 2.0 * x.shape[0] * a.shape[0] * a.shape[1]


def flops_of_both(x, w, a, *rest, **static):
    """2 T (n m + r (n + m)), in either direction."""
    del rest, static
    n, m = w.shape
    return 2.0 * x.shape[0] * (n * m + a.shape[-1] * (n + m))


def flops_of_factor(z, x, *rest, **static):
    """2 r T k."""
    del rest, static
    return 2.0 * z.shape[0] * x.shape[0] * x.shape[1]


def sizes_of_low(x, a, *rest):
    """Of z = s A^T x^T."""
    del rest
    return Sizes(x.shape[0], x.shape[1], 0, a.shape[-1], x.dtype)


def sizes_of_both(x, w, a, *rest):
    """Of the products with W, in either direction."""
    del rest
    n, m = w.shape
    return Sizes(x.shape[0], n, m, a.shape[-1], x.dtype)


def sizes_of_factor(z, x, *rest):
    """Of z x."""
    del rest
    return Sizes(x.shape[0], x.shape[1], 0, z.shape[0], x.dtype)


def _counted(rows: int, seed: int):
    """On a mesh dropout counts the rows of the whole: argument `seed` moves by those before argument `rows`."""

    def local(run, divided, *args, **static):
        given = [*args]
        if static["rate"] and divided.of("t"):
            given[seed] += jax.lax.axis_index(divided.of("t")) * given[rows].shape[0]
        return run(*given, **static)

    return local


def _put_on_one(run, divided, x, w, a, b, seed, out, **static):
    """`forward_into`, whose sums over devices are taken before they are put."""
    if not divided.of("n"):
        return _counted(0, 4)(run, divided, x, w, a, b, seed, out, **static)
    parts = _counted(0, 4)(forward, divided, x, w, a, b, seed, **static)
    y, z = jax.lax.psum(parts, divided.of("n"))
    return put(out, y), y, z


# t rows, n inputs, m outputs, r rank.
_BOTH = ("tn", "nm", "nr", "rm", "")
FORWARD = Dims(_BOTH, ("tm", "rt"), ("n", "n"), _counted(0, 4))
INPUT_GRADIENT = Dims(("tm", "nm", "nr", "rm", ""), ("tn", "rt"), ("m", "m"), _counted(0, 4))

low = operation(
    "lora_low",
    reference.low,
    flops=flops_of_low,
    dims=Dims(("tn", "nr", ""), ("rt",), ("n",), _counted(0, 2)),
    **tuning.kernels("pallas_kernels.lora_matmul", "low", sizes_of_low),
)
forward_into = operation(
    "lora_forward_into",
    reference.forward_into,
    flops=flops_of_both,
    dims=Dims((*_BOTH, "tm"), ("ltm", "tm", "rt"), ("", "", ""), _put_on_one),
    **tuning.kernels("pallas_kernels.lora_matmul", "forward_into", sizes_of_both, like="forward"),
)
forward = operation(
    "lora_forward",
    reference.forward,
    flops=flops_of_both,
    dims=FORWARD,
    into=forward_into,
    part=Part(outputs=(1,), function=low, args=(0, -3, -1), static=("scale", "rate")),
    **tuning.kernels("pallas_kernels.lora_matmul", "forward", sizes_of_both),
)
input_gradient = operation(
    "lora_input_gradient",
    reference.input_gradient,
    flops=flops_of_both,
    dims=INPUT_GRADIENT,
    **tuning.kernels("pallas_kernels.lora_matmul", "input_gradient", sizes_of_both),
)
factor_gradient = operation(
    "lora_factor_gradient",
    reference.factor_gradient,
    flops=flops_of_factor,
    dims=Dims(("rt", "tk", ""), ("rk",), ("t",), _counted(1, 2)),
    cpu=Implementation(reference.factor_gradient_of_float32, lambda *args, **static: True, partitions=True),
    **tuning.kernels("pallas_kernels.lora_matmul", "factor_gradient", sizes_of_factor),
)


class Operations(NamedTuple):
    """The two products that read W, by the type of W."""

    forward: Callable[..., Any]
    input_gradient: Callable[..., Any]


class Options(NamedTuple):
    """What is static: s, the rate of dropout, how A is made of what is given for it, the implementation, the mesh."""

    scale: float
    rate: float
    make_a: Callable[[jax.Array], jax.Array] | None
    implementation: str | None
    operations: Operations
    divided: Divided | None = None

    def factor(self, a, dtype):
        """A in the products' dtype."""
        return (self.make_a(a) if self.make_a else a).astype(dtype)

    @property
    def static(self) -> dict[str, Any]:
        return {
            "scale": self.scale,
            "rate": self.rate,
            "implementation": self.implementation,
            "divided": self.divided,
        }

    def factor_gradient(self, z, x, seed, columns: str, rate: float = 0.0):
        """The product over rows of z (r, T) and x (T, k), whose columns have this letter."""
        divided = self.divided and self.divided.renamed(k=columns)
        return factor_gradient(z, x, seed, rate=rate, implementation=self.implementation, divided=divided)


@jax.tree_util.register_static
class _Perturbed(NamedTuple):
    """Which arguments are differentiated."""

    x: bool
    w: bool
    a: bool
    b: bool


def lora_matmul(
    x: jax.Array,
    w: jax.Array | Stacked,
    a: jax.Array,
    b: jax.Array,
    *,
    scale: float = 1.0,
    rate: float = 0.0,
    seed: jax.Array | None = None,
    make_a: Callable[[jax.Array], jax.Array] | None = None,
    name: str = "lora_low",
    implementation: str | None = None,
    divided: Divided | None = None,
) -> jax.Array:
    """x W + scale (drop(x) A) B.

    Args:
      x: (..., n) floating point; the products are computed in its dtype with float32 sums.
      w: (n, m); the frozen kernel. Its gradient is plain JAX, and costs only where it is asked for. A layer of a stack
        has none.
      a: (n, r), or what `make_a` makes it of.  b: (r, m). Cast to x's dtype; gradients come in their own.
      scale: s.
      rate: of dropout on what A reads, in [0, 1).
      seed: () integer, of the mask; needed if rate > 0.
      make_a: hashable; a -> A (n, r), made in both passes and not kept. A is not differentiated then.
      name: of z.
      implementation: "xla", "mosaic_gpu" or "tpu"; None: the kernel of the platform that the program is lowered for
        where it takes these shapes, else plain JAX.
      divided: how dimensions lie on the mesh of the program: b and s of x (b, s, n) or else its rows t, inputs n,
        outputs m.

    Returns:
      (..., m) in x's dtype.

    Raises:
      ValueError: for shapes that don't fit, a rate outside [0, 1), or a rate without a seed.
      NotImplementedError: when lowered, if the implementation that is asked for cannot run.
    """
    check("lora_matmul", x, w, None if make_a else a, b, rate, seed)
    operations = Operations(forward, input_gradient)
    options = Options(scale, rate, make_a, implementation, operations, of_rows(divided, rate))
    return differentiable(x, w, a, b, seed, name, options)


def of_rows(divided: Divided | None, rate: float) -> Divided | None:
    """With rows t = b s. Dropout counts the columns of what A reads: where they are divided, the compiler does all."""
    if divided is None or (rate and divided.of("n")):
        return None
    if "t" in dict(divided.axes):
        return divided
    return divided._replace(axes=(*divided.axes, ("t", divided.of("bs"))))


def differentiable(x, w, a, b, seed, name: str, options: Options) -> jax.Array:
    """The operation on rows, y's and z's computation apart from their derivative, which reads z by its name."""
    rows = flat(x, options.divided)
    seed = jnp.asarray(0 if seed is None else seed).astype(jnp.int32)
    fixed = jax.lax.stop_gradient((rows, w, options.factor(a, x.dtype), b.astype(x.dtype)))
    y, z = options.operations.forward(*fixed, seed, **options.static)
    y = unflat(y, x, options.divided)
    # x as it came: sites that read the same x keep the same array.
    return _computed(options, x, w, a, b, seed, y, checkpoint_name(z, name))


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _computed(options: Options, x, w, a, b, seed, y, z):
    """`y`, which has been computed, with the derivative of the product."""
    return y


def _keep(options, x, w, a, b, seed, y, z):
    perturbed = _Perturbed(x.perturbed, is_perturbed(w), a.perturbed, b.perturbed)
    wanted = perturbed.a or perturbed.w
    return y.value, (perturbed, x.value if wanted else None, values(w), a.value, b.value, seed.value, z.value)


def is_perturbed(w) -> bool:
    """Whether any of the arrays that make up w is differentiated; they are as `custom_vjp` gives them to a rule."""
    return any(leaf.perturbed for leaf in jax.tree.leaves(w, is_leaf=lambda leaf: hasattr(leaf, "perturbed")))


def values(w):
    """w of its arrays' values."""
    return jax.tree.map(lambda leaf: leaf.value, w, is_leaf=lambda leaf: hasattr(leaf, "perturbed"))


def _pull(options: Options, saved, dy):
    perturbed, x, w, a, b, seed, z = saved
    if isinstance(dy, SymbolicZero):
        return (None,) * 7
    factors = options.factor(a, dy.dtype), b.astype(dy.dtype)
    dx = e = da = db = dw = None
    whole, dy = dy, flat(dy, options.divided)
    x = None if x is None else flat(x, options.divided)
    if perturbed.x:
        dx, e = options.operations.input_gradient(dy, w, *factors, seed, **options.static)
        dx = unflat(dx, whole, options.divided)
    elif perturbed.a:
        e = reference.low_gradient(dy, factors[1], scale=options.scale)
    if perturbed.a:
        da = options.factor_gradient(e, x, seed, "n", options.rate).T.astype(a.dtype)
    if perturbed.b:
        db = options.factor_gradient(z, dy, seed, "m").astype(b.dtype)
    if perturbed.w and isinstance(w, Stacked):
        raise ValueError("a layer of a stack of kernels is not differentiated")
    if perturbed.w:
        dw = jnp.einsum("tn,tm->nm", x, dy).astype(w.dtype)
    return dx, dw, da, db, None, None, None


_computed.defvjp(_keep, _pull, symbolic_zeros=True)


def check(name: str, x, w, a, b, rate, seed) -> None:
    """Refuses shapes that don't fit, a rate that is none, and a rate without a seed."""
    n, m = w.shape
    r = b.shape[0] if b.ndim == 2 else 0
    if x.shape[-1:] != (n,) or b.shape != (r, m) or (a is not None and a.shape != (n, r)):
        given = f"x {x.shape}, w {w.shape}, a {None if a is None else a.shape}, b {b.shape}"
        raise ValueError(f"{name}: {given} are not (..., n), (n, m), (n, r), (r, m)")
    if not 0 <= rate < 1:
        raise ValueError(f"{name}: rate {rate} must be at least 0 and below 1")
    if rate and seed is None:
        raise ValueError(f"{name}: rate {rate} needs a seed")
