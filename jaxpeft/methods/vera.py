"""VeRA: LoRA whose factors are random, frozen and shared by all sites; two vectors per site train.

    y = x W + (((drop(x) A_n) * d) B_m) * b
        x (..., n), W (n, m) frozen, A_n the first n rows of A (N, r), B_m the first m columns of B (r, M), frozen;
        d (r,) and b (m,) trained

A and B are stored once, as large as the largest kernel needs: N and M are the most inputs and outputs of any adapted
kernel. A is uniform in +-sqrt(6 / N), B in +-sqrt(6 / r), d starts at 0.1 and b at zero, the adapted model at the base.

d and b are multiplied into B, which has fewer numbers than the stream: the product is LoRA's with a frozen A, and
B' = d B_m b is made again in each layer. So only x A_n is kept for the backward pass, r numbers per token and site, and
no input. It merges, exactly up to rounding: W <- W + A_n B'.

Paper: Kopiczko et al. 2023, "VeRA: Vector-based Random Matrix Adaptation", arXiv:2310.11454; with the shapes, the
slices and the start of PEFT. Deviations: an adapter always holds A and B, where the paper and PEFT may keep a seed
alone; one of PEFT's without them is read, as its numbers can be drawn again.
"""

from __future__ import annotations

import math
import re
import zlib
from collections.abc import Callable, Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from jaxpeft import sites, tree
from jaxpeft.about import About, Defaults, Promises
from jaxpeft.errors import InputError
from jaxpeft.method import Method, Spec, trains
from jaxpeft.methods.lora import Targets, check_rank
from jaxpeft.methods.lora import fold as fold_product
from jaxpeft.model import Context
from jaxpeft.peft import form, twister


class VeRA(nn.Module):
    """The adapted product. Parameters: lambda_d (r,) and lambda_b (m,), float32; A and B are the context's."""

    stacked = True  # only products read the kernel

    rank: int
    start: float = 0.1
    dropout: float = 0.0

    @nn.compact
    def __call__(self, inner: Callable, x: jax.Array, site: sites.Site, ctx: Context) -> jax.Array:
        n, m = site.kernel.shape
        d = self.param("lambda_d", nn.initializers.constant(self.start), (self.rank,))
        b = self.param("lambda_b", nn.initializers.zeros, (m,))
        if (shared := sites.beside(self, ctx, "vera", "factors")) is None:
            return inner(x)
        rate, seed = 0.0, None
        if self.dropout and self.has_rng("dropout"):
            rate, seed = self.dropout, jax.random.bits(self.make_rng("dropout"), (), jnp.uint32)
        a, up = factors(shared, d, b, n)
        return site.low_rank(inner, x, a, up, scale=1.0, rate=rate, seed=seed)


def factors(shared: Mapping[str, jax.Array], d: jax.Array, b: jax.Array, inputs: int) -> tuple[jax.Array, jax.Array]:
    """A_n (n, r) and B' = d B_m b (..., r, m) of the shared a (N, r) and b (r, M), d (..., r) and b (..., m)."""
    return shared["a"][:inputs], d[..., :, None] * shared["b"][:, : b.shape[-1]] * b[..., None, :]


def saved_bytes(inputs: int, outputs: int, itemsize: int, rank: int, **_) -> int:
    """Bytes per token kept at one adapted kernel beyond what a frozen backbone keeps: x A."""
    del inputs, outputs
    return rank * itemsize


def vera(rank: int = 256, targets: Targets = "all-linear", start: float = 0.1, dropout: float = 0.0) -> Method:
    """VeRA on the sites that `targets` chooses.

    Args:
      rank: r, of any size: A and B are not trained.
      targets: "all-linear", "attention", "mlp", a regular expression, or a list of names (see `sites.find`).
      start: where d starts.
      dropout: rate of dropout in front of A.

    Returns:
      The method; it trains `<site>/vera/lambda_d` (L, r) and `<site>/vera/lambda_b` (L, m), beside the frozen `vera/a`
      (N, r) and `vera/b` (r, M).

    Raises:
      InputError: for a rank below 1, a start of zero, from which nothing trains, a rate outside [0, 1), or targets that
        match nothing.
    """
    config = dict(locals())
    check_rank("vera", rank)
    if not math.isfinite(start) or start == 0:
        raise InputError(f"vera: start {start} must be a finite number other than 0: d and b of zero have no gradients")
    if not 0 <= dropout < 1:
        raise InputError(f"vera: dropout {dropout} must be at least 0 and below 1")

    def choose(params):
        return sites.find(params, targets, "vera")

    def forward(model, view):
        adapted = sites.attach(model, "vera", lambda site: VeRA(rank, start, dropout), choose, shared=True)

        def init(key, params):
            flat = tree.flatten(adapted.init(key, params))
            if "vera/a" not in flat:
                kernels = [flat[sites.kernel_path(flat, site)].shape[-2:] for site in choose(params)]
                key_a, key_b = jax.random.split(jax.random.fold_in(key, zlib.crc32(b"vera")))
                flat["vera/a"] = _uniform(key_a, (max(n for n, _ in kernels), rank))
                flat["vera/b"] = _uniform(key_b, (rank, max(m for _, m in kernels)))
            return tree.unflatten(flat)

        return adapted._replace(init=init)

    return Method(
        forward=forward,
        roles=trains(lambda path: path.endswith(("/vera/lambda_d", "/vera/lambda_b"))),
        merge=fold,
        specs=(Spec("vera", config),),
    )


def bound_of(inputs: int) -> float:
    """Of a uniform start whose products keep the scale of what a ReLU gives (He et al. 2015)."""
    return math.sqrt(6 / inputs)


def _uniform(key: jax.Array, shape: tuple[int, int]) -> jax.Array:
    bound = bound_of(shape[0])
    return jax.random.uniform(key, shape, jnp.float32, -bound, bound)


def fold(params: Mapping[str, Any]) -> tree.Params:
    """W <- W + A_n B' at every adapted site; the leaves go, the shared ones too; rounded once to W's dtype."""
    flat = tree.flatten(params)
    shared = {name: flat.pop(path) for name in "ab" if (path := f"vera/{name}") in flat}

    def of_site(leaves, inputs):
        return factors(shared, leaves["lambda_d"], leaves["lambda_b"], inputs)

    return fold_product(tree.unflatten(flat), "vera", lambda site: 1.0, of_site)


# Hugging Face PEFT.

_FIELDS = (
    "r vera_dropout d_initial projection_prng_key save_projection init_weights bias fan_in_fan_out target_modules "
    "exclude_modules layers_to_transform layers_pattern"
).split()
_SHARED = re.compile(r"(?:base_model\.)?vera_(?P<name>[AB])(?:\.[^.]+)?")
_BESIDE = ""  # of the parts, where A and B are


def _to_config(config: Mapping[str, Any], parts: Mapping[str, form.Part], base: form.Base) -> dict[str, Any]:
    return {
        "bias": "none",
        "d_initial": config["start"],
        "fan_in_fan_out": False,
        "init_weights": True,
        "layers_pattern": None,
        "layers_to_transform": None,
        "projection_prng_key": 0,
        "r": config["rank"],
        "save_projection": True,
        "target_modules": form.as_target_modules(parts, base),
        "vera_dropout": config["dropout"],
    }


def _write(config: Mapping[str, Any], leaves: tree.Flat, base: form.Base) -> form.Written:
    """The vectors of all sites, and A and B as PEFT has them, (r, N) and (M, r)."""
    rest = {path: leaf for path, leaf in leaves.items() if path not in ("vera/a", "vera/b")}
    written = _FORM.write(config, rest, base)
    shared = {
        f"base_model.vera_{name.upper()}": np.ascontiguousarray(np.asarray(leaves[f"vera/{name}"], np.float32).T)
        for name in "ab"
    }
    return written._replace(tensors=written.tensors | shared)


def _parse(tensors: Mapping[str, np.ndarray], base: form.Base) -> dict[str, Any]:
    """The parts, whose ranks must be one, and beside them A and B, if they are there, large enough for all kernels."""
    found = {key: matched["name"].lower() for key in tensors if (matched := _SHARED.fullmatch(key))}
    parts = _FORM.parse({key: x for key, x in tensors.items() if key not in found}, base)
    (first, rank), *others = [(name, part["lambda_d"].shape[0]) for name, part in parts.items()]
    for name, other in others:
        if other != rank:
            raise InputError(f"{name} has a rank of {other}, and {first} of {rank}")
    if not found:
        return parts
    if sorted(found.values()) != ["a", "b"]:
        raise InputError(f"has {', '.join(sorted(found))}; expected one vera_A and one vera_B, or neither")
    shared = {name: np.asarray(tensors[key], np.float32).T for key, name in found.items()}
    n, m = _largest(parts, base)
    for name, side, least in (("a", "inputs", n), ("b", "outputs", m)):
        x = shared[name] if name == "a" else shared[name].T  # (largest side, r)
        if x.ndim != 2 or x.shape[0] < least or x.shape[1] != rank:
            raise InputError(
                f"an adapter for another base: vera_{name.upper()} has shape {shared[name].shape[::-1]}, where kernels "
                f"have up to {least} {side} and the rank is {rank}"
            )
    return {**parts, _BESIDE: shared}


def _largest(parts: Mapping[str, Any], base: form.Base) -> tuple[int, int]:
    """N and M of these modules."""
    kernels = [base.modules[name] for name in parts]
    return max(kernel.n for kernel in kernels), max(kernel.m for kernel in kernels)


def _read(fields: Mapping[str, Any], parts: dict[str, Any], base: form.Base) -> tuple[dict[str, Any], Any]:
    """The factory's arguments; A and B are drawn where the adapter says by which key alone.

    Raises:
      InputError: if they are neither there nor to be drawn.
    """
    own = {name: part for name, part in parts.items() if name != _BESIDE}
    rank = next(iter(own.values()))["lambda_d"].shape[0]
    if _BESIDE not in parts:
        if fields.get("save_projection", True):
            raise InputError("save_projection is true, and the adapter has no vera_A and vera_B")
        parts = {**parts, _BESIDE: drawn(int(fields.get("projection_prng_key") or 0), rank, *_largest(own, base))}
    return {
        "rank": rank,
        "targets": form.sites_as_targets({base.modules[name].site for name in own}, base),
        "start": float(fields.get("d_initial") or 0.1),
        "dropout": float(fields.get("vera_dropout") or 0.0),
    }, parts


def drawn(key: int, rank: int, inputs: int, outputs: int) -> dict[str, np.ndarray]:
    """a (N, r) and b (r, M) as PEFT draws them of a key: of a Mersenne Twister, 24 of each 32 bits."""
    random = twister.seeded(key)

    def uniform(shape):
        bound = np.float32(bound_of(shape[1]))
        return (twister.uniform(random, shape) * (2 * bound) - bound).T

    return {"a": uniform((rank, inputs)), "b": uniform((outputs, rank))}


def _restore(config: Mapping[str, Any], parts: dict[str, Any], facts: Mapping[str, Any], base: form.Base) -> tree.Flat:
    own = {name: part for name, part in parts.items() if name != _BESIDE}
    leaves = _FORM.restore(config, own, facts, base)
    return {**leaves, **{f"vera/{name}": jnp.asarray(x) for name, x in parts[_BESIDE].items()}}


def _check(fields: Mapping[str, Any]) -> None:
    """Refuses what trains more than the vectors."""
    if (bias := fields.get("bias", "none")) != "none":
        raise InputError(f"bias {bias!r} is not supported; supported: 'none'")


_FORM = form.per_site(
    "VERA",
    "vera",
    {"lambda_d": form.Tensor("vera_lambda_d", "k"), "lambda_b": form.Tensor("vera_lambda_b", "m")},
    _to_config,
    _read,
    _FIELDS,
    fill={"lambda_d": 0.1},
    check=_check,
)
PEFT = _FORM._replace(write=_write, parse=_parse, restore=_restore)


ABOUT = About(
    summary="vectors on random factors that all kernels share",
    level="site",
    trains="two vectors, r + m numbers per kernel",
    saves="gradients and optimizer state of all but the vectors, and the inputs that only A's gradient needs",
    reference="Kopiczko et al. 2023, arXiv:2310.11454",
    example={"rank": 8},
    promises=Promises(site_bytes=saved_bytes),
    defaults=Defaults(lr=4e-3),
    peft=PEFT,
)
