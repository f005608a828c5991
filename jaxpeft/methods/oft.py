"""OFT: each kernel's inputs are rotated, block by block, by trained orthogonal matrices.

    y = (x R) W        x (..., n), W (n, m) frozen, R = diag(R_1, ..., R_g) orthogonal, blocks of b x b, g b = n
    R_i = I + 2 Q + 2 Q^2 + ... + 2 Q^(k-2) + Q^(k-1)        k terms: a series that approaches (I + Q) (I - Q)^-1
    R_i = (I - Q) (I + Q)^-1                                  exact: Cayley's transform

Q (b, b) is skew-symmetric; its b (b - 1) / 2 numbers above the diagonal, row by row, are what trains: w (g, b (b-1)/2),
or one row for all blocks (`share`). They start at zero, R at the identity, the adapted model at the base. The series is
orthogonal up to Q^(k-1); both forms merge exactly, up to rounding: W <- R W.

The blocks are made in float32 and cast to the stream's dtype for the product. Kept for the backward pass: x, n per
token, for dR alone; R and its powers are made again. The kernel is only multiplied with, so quantized ones do as well.

Paper: Qiu et al. 2023, "Controlling Text-to-Image Diffusion by Orthogonal Finetuning", arXiv:2306.07280; the input
side and the series as in Qiu et al. 2025, "Orthogonal Finetuning Made Scalable", arXiv:2506.19847, and in PEFT. There
Q's sign differs between the two forms, and so it does here. Deviations: no constrained variant (COFT) and no dropout of
blocks; a block size that does not divide a kernel's inputs is refused, where PEFT takes another one.
"""

from __future__ import annotations

import math
import re
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
from jaxpeft.methods.lora import Targets
from jaxpeft.model import Context
from jaxpeft.peft import form
from jaxpeft.quant import dense
from jaxpeft.quant import merged as as_merged
from jaxpeft.widths import dividing

LEAST_TERMS = 4  # with fewer PEFT's series has other terms


class OFT(nn.Module):
    """The product of rotated inputs. Parameters: w (g, b (b-1)/2), or (1, b (b-1)/2), float32."""

    stacked = True  # only the product reads the kernel

    block_size: int
    terms: int = 5
    exact: bool = False
    share: bool = False

    @nn.compact
    def __call__(self, inner: Callable, x: jax.Array, site: sites.Site, ctx: Context) -> jax.Array:
        blocks = 1 if self.share else site.kernel.shape[0] // self.block_size
        w = self.param("w", nn.initializers.zeros, (blocks, self.block_size * (self.block_size - 1) // 2))

        def rotate(x, w):
            rotation = rotations(w, self.terms, self.exact).astype(x.dtype)
            return rotated(x, rotation)

        return inner(jax.checkpoint(rotate, prevent_cse=False)(x, w))


def rotations(w: jax.Array, terms: int, exact: bool) -> jax.Array:
    """R (..., b, b) float32 of the numbers above the diagonal of Q, w (..., b (b-1)/2)."""
    q = skew(w.astype(jnp.float32))
    eye = jnp.eye(q.shape[-1])
    if exact:  # X (I + Q) = I - Q, transposed, where Q^T = -Q
        return jnp.linalg.solve(eye - q, eye + q).mT
    multiply = lambda a, b: jnp.matmul(a, b, precision="highest")
    total, power = eye + 2 * q, q
    for _ in range(2, terms - 1):
        power = multiply(power, q)
        total = total + 2 * power
    return total + multiply(power, q)


def skew(w: jax.Array) -> jax.Array:
    """Q (..., b, b) with w (..., b (b-1)/2) above the diagonal, row by row, and -w below."""
    b = block_size_of(w.shape[-1])
    upper, place = np.triu(np.ones((b, b), np.float32), 1), np.zeros((b, b), np.int32)
    place[np.triu_indices(b, 1)] = np.arange(w.shape[-1])
    return jnp.take(w, place + place.T, axis=-1) * (upper - upper.T)


def block_size_of(numbers: int) -> int:
    """b of b (b-1) / 2."""
    return (1 + math.isqrt(1 + 8 * numbers)) // 2


def rotated(x: jax.Array, rotation: jax.Array) -> jax.Array:
    """x R (..., n), by blocks (g, b, b), or (1, b, b) for all."""
    b = rotation.shape[-1]
    apart = x.reshape(*x.shape[:-1], x.shape[-1] // b, b)
    if rotation.shape[0] == 1:
        return (apart @ rotation[0]).reshape(x.shape)
    return jnp.einsum("...gb,gbc->...gc", apart, rotation).reshape(x.shape)


def saved_bytes(inputs: int, outputs: int, itemsize: int, **_) -> int:
    """Bytes per token kept at one adapted kernel beyond what a frozen backbone keeps: x.

    Sites that read the same x share it; this counts it at each.
    """
    del outputs
    return inputs * itemsize


def oft(
    block_size: int = 32,
    targets: Targets = "all-linear",
    terms: int = 5,
    exact: bool = False,
    share: bool = False,
    block_pattern: Mapping[str, int] | None = None,
) -> Method:
    """OFT on the sites that `targets` chooses.

    Args:
      block_size: b, which divides the inputs of each kernel.
      targets: "all-linear", "attention", "mlp", a regular expression, or a list of names (see `sites.find`).
      terms: of the series, at least 4.
      exact: Cayley's transform itself, by solving a system of b equations, in place of the series.
      share: one block for all places of a kernel's inputs.
      block_pattern: regular expression -> block size, for sites in whose path it is found (first match wins).

    Returns:
      The method; it trains `<site>/oft/w` (L, n/b, b (b-1)/2), or (L, 1, b (b-1)/2) if a block is shared.

    Raises:
      InputError: for a block size below 2 or one that does not divide a kernel's inputs, fewer terms than 4, or targets
        that match nothing.
    """
    config = dict(locals())
    _check_size(block_size)
    if terms < LEAST_TERMS:
        raise InputError(f"oft: terms {terms} must be at least {LEAST_TERMS}")

    def size_of(site):
        return _check_size(sites.first_match(block_pattern or {}, site, block_size))

    def choose(params):
        flat, found = tree.flatten(params), sites.find(params, targets, "oft")
        shapes = {site: flat[sites.kernel_path(flat, site)].shape[-2:] for site in found}
        for site, (n, m) in shapes.items():
            if n % size_of(site):
                name, nearest = tree.canonical(site).rsplit("/", 1)[-1], adjusted(n, size_of(site), least=2)
                raise InputError(
                    f"oft: block_size {size_of(site)} does not divide the {n} inputs of {site}, a kernel of {n} x {m}; "
                    f"{dividing(inputs for inputs, _ in shapes.values())}, and block_pattern {{{name}: {nearest}}} is "
                    "for this one alone"
                )
        return found

    return Method(
        forward=lambda model, view: sites.attach(
            model, "oft", lambda site: OFT(size_of(site), terms, exact, share), choose
        ),
        roles=trains(lambda path: path.endswith("/oft/w")),
        merge=lambda params: fold(params, terms, exact),
        specs=(Spec("oft", config),),
    )


def _check_size(block_size: int) -> int:
    if block_size < 2:
        raise InputError(f"oft: block_size {block_size} must be at least 2")
    return block_size


def adjusted(inputs: int, size: int, least: int = 1) -> int:
    """The divisor of `inputs` nearest to a size, the smaller of two: what PEFT takes in its place."""
    return min((d for d in range(least, inputs + 1) if inputs % d == 0), key=lambda d: (abs(d - size), d), default=1)


def fold(params: Mapping[str, Any], terms: int, exact: bool) -> tree.Params:
    """W <- R W at every adapted site, whose leaf goes; in float32, rounded once to W's dtype."""
    flat = tree.flatten(params)
    merged = {path: leaf for path, leaf in flat.items() if "/oft/" not in path}
    for path, w in flat.items():
        site, _, leaf = path.partition("/oft/")
        if leaf == "w":
            rotation = rotations(w, terms, exact)  # (..., g, b, b)
            kernel = merged[f"{site}/kernel"]
            wide = dense(kernel)
            *lead, n, m = wide.shape
            b = rotation.shape[-1]
            product = jnp.matmul(rotation, wide.reshape(*lead, n // b, b, m), precision="highest")
            merged[f"{site}/kernel"] = as_merged(kernel, product.reshape(wide.shape))
    return tree.unflatten(merged)


# Hugging Face PEFT.

_FIELDS = (
    "r oft_block_size module_dropout init_weights coft eps block_share use_cayley_neumann num_cayley_neumann_terms "
    "bias fan_in_fan_out target_modules exclude_modules layers_to_transform layers_pattern"
).split()


def _to_config(config: Mapping[str, Any], parts: Mapping[str, form.Part], base: form.Base) -> dict[str, Any]:
    kernels = {(base.modules[name].n, block_size_of(part.leaves["w"].shape[0])) for name, part in parts.items()}
    return {
        **_blocks(kernels),
        "bias": "none",
        "block_share": config["share"],
        "coft": False,
        "fan_in_fan_out": False,
        "init_weights": True,
        "layers_pattern": None,
        "layers_to_transform": None,
        "module_dropout": 0.0,
        "num_cayley_neumann_terms": config["terms"],
        "target_modules": form.as_target_modules(parts, base),
        "use_cayley_neumann": not config["exact"],
    }


def _blocks(kernels: set[tuple[int, int]]) -> dict[str, int]:
    """PEFT's oft_block_size or r by which kernels of n inputs get blocks of size b, of all pairs (n, b)."""
    sizes, counts = sorted({b for _, b in kernels}), {n // b for n, b in kernels}
    for size in range(sizes[0], sizes[-1] + 1):
        if all(adjusted(n, size) == b for n, b in kernels):
            return {"oft_block_size": size, "r": 0}
    if len(counts) == 1:
        return {"oft_block_size": 0, "r": counts.pop()}
    raise InputError(f"oft: PEFT has one block size or one number of blocks, and here are sizes {sizes}; merge it")


def _from_config(fields: Mapping[str, Any], parts: dict[str, Any], base: form.Base) -> tuple[dict[str, Any], Any]:
    sizes = {base.modules[name].site: block_size_of(part["w"].shape[0]) for name, part in parts.items()}
    share = bool(fields.get("block_share"))
    for name, part in parts.items():
        numbers, blocks = part["w"].shape
        if blocks != (expected := 1 if share else base.modules[name].n // block_size_of(numbers)):
            raise InputError(f"{name} has {blocks} blocks, where block_share {share} means {expected}")
    common = form.commonest(sizes.values())
    exact = not fields.get("use_cayley_neumann", True)
    return {
        "block_size": common,
        "targets": form.sites_as_targets(sizes, base),
        "terms": int(fields.get("num_cayley_neumann_terms") or 5) if not exact else 5,
        "exact": exact,
        "share": share,
        "block_pattern": {f"^{re.escape(site)}$": b for site, b in sizes.items() if b != common} or None,
    }, parts


def _check(fields: Mapping[str, Any]) -> None:
    """Refuses what computes something else."""
    if fields.get("coft"):
        raise InputError("coft True is not supported; supported: False")
    if (bias := fields.get("bias", "none")) != "none":
        raise InputError(f"bias {bias!r} is not supported; supported: 'none'")


def _parse(tensors: Mapping[str, np.ndarray], base: form.Base) -> dict[str, Any]:
    """The parts, whose blocks must be those of the base's inputs."""
    parts = _FORM.parse(tensors, base)
    for name, part in parts.items():
        numbers, blocks = part["w"].shape
        b, n = block_size_of(numbers), base.modules[name].n
        if b < 2 or b * (b - 1) // 2 != numbers or n % b or blocks not in (1, n // b):
            raise InputError(
                f"an adapter for another base: {name}.oft_R.weight has shape {(blocks, numbers)}, where blocks of "
                f"size b have (n / b, b (b - 1) / 2), and {name} has n = {n} inputs"
            )
    return parts


_FORM = form.per_site(
    "OFT",
    "oft",
    {"w": form.Tensor("oft_R.weight", "gk")},
    _to_config,
    _from_config,
    _FIELDS,
    to_tensors=lambda config, leaves, module: {"w": jnp.swapaxes(leaves["w"], -1, -2)},
    from_tensors=lambda config, leaves, extra: {"w": jnp.swapaxes(leaves["w"], -1, -2)},
    check=_check,
)
PEFT = _FORM._replace(parse=_parse)


ABOUT = About(
    summary="trained rotations of each kernel's inputs, block by block",
    level="site",
    trains="the rotations, n (b - 1) / 2 numbers per kernel with blocks of size b",
    saves="gradients and optimizer state of all but the rotations; it keeps the inputs, as LoRA does",
    reference="Qiu et al. 2023, arXiv:2306.07280",
    example={"block_size": 4},
    promises=Promises(site_bytes=saved_bytes),
    defaults=Defaults(lr=1e-4),
    peft=PEFT,
)
