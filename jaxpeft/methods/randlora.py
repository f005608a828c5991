"""RandLoRA: an update of full rank, of random frozen bases that all sites share; two small scalings per site train.

    y = x W + s drop(x) dW        x (..., n), W (n, m) frozen, s = alpha / r,
                                      k = min(n, m), K = max(n, m), N = ceil(k / r)
    dW = A' B_K^T  if n <= m,  else B_K A'^T                  of rank k
    A'[i, (p, j)] = A[i, p] Lambda[j, p] Gamma[i, j]          (k, r N): N scaled copies of A_k, column by column

A_k is the first k rows of A (., r), B_K the first K rows and r N columns of B, frozen; Lambda (N, r) and Gamma (k, N)
are trained, r N + k N numbers, about k + k^2 / r: a smaller rank trains more. A and B are stored once, in bfloat16, as
large as the largest kernel needs: B has about the numbers of one kernel. Their numbers have a standard deviation of 1:
uniform; or "sparse", -c, 0 and c with probabilities 1/6, 2/3 and 1/6; or "very_sparse", with 1/(2 sqrt(k)) at either
end. Lambda starts at zero, the adapted model at the base, and Gamma at 1 / k.

A' is made again in each pass. Where n > m, only x B is kept for the backward pass, about m per token; elsewhere x, n
per token, and dW is made where that takes less time, of more tokens than outputs. It merges exactly, up to rounding,
and only multiplies with the kernel, so that quantized ones do as well. Its products are about as many as the kernel's.

Paper: Albert et al. 2025, "RandLoRA: Full-rank parameter-efficient fine-tuning of large models", arXiv:2502.00987;
with PEFT's start, its order of the columns (A' by p, then j; B by j, then p) and its scale. Deviations: an adapter
always holds A and B, and no more of them than is read; one of PEFT's without them is read, as its numbers can be drawn
again.
"""

from __future__ import annotations

import math
import re
import zlib
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax.ad_checkpoint import checkpoint_name

from jaxpeft import sites, tree
from jaxpeft.about import About, Promises
from jaxpeft.errors import InputError
from jaxpeft.method import Method, Spec, trains
from jaxpeft.methods.lora import Targets, check_alpha, check_rank
from jaxpeft.model import Context
from jaxpeft.peft import form, twister
from jaxpeft.quant import dense
from jaxpeft.quant import merged as as_merged
from pallas_kernels.dropout import drop

BASES = ("uniform", "sparse", "very_sparse")


class RandLoRA(nn.Module):
    """The adapted product. Parameters: lambda (N, r) and gamma (k, N), float32; A and B are the context's."""

    stacked = True  # only the product reads the kernel

    rank: int
    scale: float
    dropout: float = 0.0

    @nn.compact
    def __call__(self, inner: Callable, x: jax.Array, site: sites.Site, ctx: Context) -> jax.Array:
        n, m = site.kernel.shape
        least, copies = min(n, m), copies_of(min(n, m), self.rank)
        own = {
            "lambda": self.param("lambda", nn.initializers.zeros, (copies, self.rank)),
            "gamma": self.param("gamma", nn.initializers.constant(1 / least), (least, copies)),
        }
        if (shared := sites.beside(self, ctx, "randlora", "bases")) is None:
            return inner(x)
        rate, seed = 0.0, jnp.zeros((), jnp.uint32)
        if self.dropout and self.has_rng("dropout"):
            rate, seed = self.dropout, jax.random.bits(self.make_rng("dropout"), (), jnp.uint32)
        a, b = sliced(shared, own, max(n, m))
        again = lambda function: jax.checkpoint(function, prevent_cse=False)

        def dropped(x, seed):
            return drop(x.reshape(-1, n), seed, rate).reshape(x.shape)

        def from_inputs(x, own, seed):
            up, down = b.astype(x.dtype).T, scaled(a, own, self.scale).astype(x.dtype)
            x = dropped(x, seed)
            return x @ (down @ up) if x.size // n > m else x @ down @ up

        if n <= m:
            return inner(x) + again(from_inputs)(x, own, seed)
        low = again(lambda x, seed: dropped(x, seed) @ b.astype(x.dtype))(x, seed)
        to_outputs = lambda low, own: low @ scaled(a, own, self.scale).astype(low.dtype).T
        return inner(x) + again(to_outputs)(checkpoint_name(low, "randlora_low"), own)


def copies_of(least: int, rank: int) -> int:
    """N, whose copies of r columns are at least as many as the kernel's smaller side."""
    return -(-least // rank)


def sliced(shared: Mapping[str, jax.Array], own: Mapping[str, jax.Array], most: int) -> tuple[jax.Array, jax.Array]:
    """A_k (k, r) and B_K (K, r N) of the shared a and b, beside lambda (..., N, r) and gamma (..., k, N)."""
    (copies, rank), least = own["lambda"].shape[-2:], own["gamma"].shape[-2]
    return shared["a"][:least], shared["b"][:most, : copies * rank]


def scaled(a: jax.Array, own: Mapping[str, jax.Array], scale: float) -> jax.Array:
    """s A' (..., k, r N) of A_k (k, r), lambda (..., N, r) and gamma (..., k, N); in float32."""
    by_column = scale * jnp.swapaxes(own["lambda"], -1, -2)
    product = a.astype(jnp.float32)[:, :, None] * by_column[..., None, :, :] * own["gamma"][..., :, None, :]
    return product.reshape(*product.shape[:-2], -1)


def saved_bytes(inputs: int, outputs: int, itemsize: int, rank: int, **_) -> int:
    """Bytes per token kept at one adapted kernel beyond what a frozen backbone keeps: x, or x B where it is narrower.

    Sites that read the same x share it; this counts it at each.
    """
    return (inputs if inputs <= outputs else rank * copies_of(outputs, rank)) * itemsize


def randlora(
    rank: int = 32,
    alpha: float | None = None,
    targets: Targets = "all-linear",
    bases: str = "uniform",
    dropout: float = 0.0,
) -> Method:
    """RandLoRA on the sites that `targets` chooses.

    Args:
      rank: r, of any size; the update is of full rank, and a smaller r trains more numbers.
      alpha: numerator of the scale; None: 20 times the rank.
      targets: "all-linear", "attention", "mlp", a regular expression, or a list of names (see `sites.find`).
      bases: "uniform", "sparse" or "very_sparse": what A and B are drawn from.
      dropout: rate of dropout in front of the update.

    Returns:
      The method; it trains `<site>/randlora/lambda` (L, N, r) and `<site>/randlora/gamma` (L, k, N), beside the frozen
      `randlora/a` and `randlora/b`.

    Raises:
      InputError: for a rank below 1, an unknown name of bases, a rate outside [0, 1), or targets that match nothing.
    """
    config = dict(locals())
    check_rank("randlora", rank)
    check_alpha("randlora", alpha)
    if bases not in BASES:
        raise InputError(f"randlora: bases {bases!r} should be one of {', '.join(BASES)}")
    if not 0 <= dropout < 1:
        raise InputError(f"randlora: dropout {dropout} must be at least 0 and below 1")
    scale = _alpha_of(config) / rank

    def choose(params):
        return sites.find(params, targets, "randlora")

    def forward(model, view):
        adapted = sites.attach(model, "randlora", lambda site: RandLoRA(rank, scale, dropout), choose, shared=True)

        def init(key, params):
            flat = tree.flatten(adapted.init(key, params))
            if "randlora/a" not in flat:
                kernels = [flat[sites.kernel_path(flat, site)].shape[-2:] for site in choose(params)]
                least, most = sides_of(kernels)
                key_a, key_b = jax.random.split(jax.random.fold_in(key, zlib.crc32(b"randlora")))
                flat["randlora/a"] = _random(key_a, (least, rank), bases, least)
                flat["randlora/b"] = _random(key_b, (most, rank * copies_of(least, rank)), bases, least)
            return tree.unflatten(flat)

        return adapted._replace(init=init)

    return Method(
        forward=forward,
        roles=trains(lambda path: path.endswith(("/randlora/lambda", "/randlora/gamma"))),
        merge=lambda params: fold(params, scale),
        specs=(Spec("randlora", config),),
    )


def _alpha_of(config: Mapping[str, Any]) -> float:
    return 20 * config["rank"] if config["alpha"] is None else config["alpha"]


def sides_of(kernels: list[tuple[int, int]]) -> tuple[int, int]:
    """The largest of the smaller and of the larger sides of kernels (n, m), of which A and B have rows."""
    return max(map(min, kernels)), max(map(max, kernels))


def _random(key: jax.Array, shape: tuple[int, int], bases: str, least: int) -> jax.Array:
    """Numbers of standard deviation 1, bfloat16."""
    if bases == "uniform":
        return jax.random.uniform(key, shape, jnp.float32, -math.sqrt(3), math.sqrt(3)).astype(jnp.bfloat16)
    drawn = jax.random.uniform(key, shape)
    return (math.sqrt(_sparsity(bases, least)) * _signs(drawn, bases, least)).astype(jnp.bfloat16)


def _sparsity(bases: str, least: int) -> float:
    """One in how many numbers is not zero."""
    return math.sqrt(least) if bases == "very_sparse" else 3


def _signs(uniform: Any, bases: str, least: int) -> Any:
    """-1, 0 or 1 by numbers in [0, 1)."""
    edge = 1 / (2 * _sparsity(bases, least))
    return 1.0 * (uniform > np.float32(1 - edge)) - (uniform < np.float32(edge))


def fold(params: Mapping[str, Any], scale: float) -> tree.Params:
    """W <- W + s dW at every adapted site; all the method's leaves go; in float32, rounded once to W's dtype."""
    flat = tree.flatten(params)
    shared = {name: flat.pop(path).astype(jnp.float32) for name in "ab" if (path := f"randlora/{name}") in flat}
    merged = {path: leaf for path, leaf in flat.items() if "/randlora/" not in path}
    for site in sorted({path.split("/randlora/")[0] for path in flat if "/randlora/" in path}):
        own = {leaf: flat[f"{site}/randlora/{leaf}"] for leaf in ("lambda", "gamma")}
        path = sites.kernel_path(merged, site)
        n, m = merged[path].shape[-2:]
        a, b = sliced(shared, own, max(n, m))
        change = jnp.matmul(scaled(a, own, scale), b.T, precision="highest")
        merged[path] = as_merged(merged[path], dense(merged[path]) + (change if n <= m else change.mT))
    return tree.unflatten(merged)


# Hugging Face PEFT, whose A is (r, 1, k), B (K, N, r), lambda (r, N) and gamma (N, k).

_FIELDS = (
    "r randlora_alpha randlora_dropout projection_prng_key save_projection sparse very_sparse init_weights bias "
    "fan_in_fan_out target_modules exclude_modules layers_to_transform layers_pattern"
).split()
_SHARED = re.compile(r"(?:base_model\.)?randlora_(?P<name>[AB])(?:\.[^.]+)?")
_COPY = re.compile(r".+\.randlora_[AB](?:\.[^.]+)?")  # PEFT writes them at every module, too, and does not read these
_BESIDE = ""  # of the parts, where A and B are


def _to_config(config: Mapping[str, Any], parts: Mapping[str, form.Part], base: form.Base) -> dict[str, Any]:
    alpha = _alpha_of(config)
    return {
        "bias": "none",
        "fan_in_fan_out": False,
        "init_weights": True,
        "layers_pattern": None,
        "layers_to_transform": None,
        "projection_prng_key": 0,
        "r": config["rank"],
        "randlora_alpha": int(alpha) if alpha == int(alpha) else alpha,
        "randlora_dropout": config["dropout"],
        "save_projection": True,
        "sparse": config["bases"] == "sparse",
        "target_modules": form.as_target_modules(parts, base),
        "very_sparse": config["bases"] == "very_sparse",
    }


def _write(config: Mapping[str, Any], leaves: tree.Flat, base: form.Base) -> form.Written:
    """What trains of all sites, and A and B once, filled up with zeros to the sizes that PEFT expects."""
    rest = {path: leaf for path, leaf in leaves.items() if path not in ("randlora/a", "randlora/b")}
    written = _FORM.write(config, rest, base)
    a, b = (np.asarray(leaves[f"randlora/{name}"], np.float32) for name in "ab")
    least, most = _sides_of_peft(_kernels({key.split(".", 2)[2].rpartition(".")[0] for key in written.tensors}, base))
    a = np.pad(a, ((0, least - len(a)), (0, 0)))
    b = np.pad(b, ((0, most - len(b)), (0, config["rank"] * copies_of(least, config["rank"]) - b.shape[1])))
    shared = {
        "base_model.randlora_A": np.ascontiguousarray(a.T[:, None]),
        "base_model.randlora_B": b.reshape(most, -1, config["rank"]),
    }
    return written._replace(tensors=written.tensors | shared)


def _kernels(names: Iterable[str], base: form.Base) -> list[tuple[int, int]]:
    """(n, m) of these modules."""
    return [(base.modules[name].n, base.modules[name].m) for name in names]


def _sides_of_peft(kernels: list[tuple[int, int]]) -> tuple[int, int]:
    """The smaller and the larger of the most inputs and the most outputs: PEFT's A and B have rows that none reads."""
    n, m = (max(sides) for sides in zip(*kernels, strict=True))
    return min(n, m), max(n, m)


def _read_by(kernels: list[tuple[int, int]], rank: int, a: np.ndarray, b: np.ndarray) -> dict[str, np.ndarray]:
    """What kernels read of a (., r) and b (., r N)."""
    least, most = sides_of(kernels)
    return {"a": a[:least], "b": b[:most, : rank * copies_of(least, rank)]}


def _parse(tensors: Mapping[str, np.ndarray], base: form.Base) -> dict[str, Any]:
    """The parts, in their modules' shapes, and beside them A and B, if they are there, large enough for all kernels."""
    found = {key: matched["name"].lower() for key in tensors if (matched := _SHARED.fullmatch(key))}
    own = {key: x for key, x in tensors.items() if key not in found and not _COPY.fullmatch(key)}
    parts = _FORM.parse(own, base)
    first = next(iter(parts))
    rank = parts[first]["lambda"].shape[1]
    for (name, part), (n, m) in zip(parts.items(), _kernels(parts, base), strict=True):
        copies = copies_of(min(n, m), rank)
        for leaf, wanted in (("lambda", (copies, rank)), ("gamma", (min(n, m), copies))):
            if part[leaf].shape != wanted:
                raise InputError(
                    f"{name}.randlora_{leaf} has shape {part[leaf].shape[::-1]}; a {n} x {m} kernel at the rank {rank} "
                    f"of {first} needs {wanted[::-1]}"
                )
    if not found:
        return parts
    if sorted(found.values()) != ["a", "b"]:
        raise InputError(f"has {', '.join(sorted(found))}; expected one randlora_A and one randlora_B, or neither")
    shared = {name: np.asarray(tensors[key], np.float32) for key, name in found.items()}
    kernels = _kernels(parts, base)
    least, most = _sides_of_peft(kernels)
    for name, axis, needed in (("a", 0, (rank, 1, least)), ("b", 2, (most, copies_of(least, rank), rank))):
        sizes = shared[name].shape
        enough = len(sizes) == 3 and all(size >= least for size, least in zip(sizes, needed, strict=True))
        if not enough or sizes[axis] != rank:
            raise InputError(
                f"an adapter for another base: randlora_{name.upper()} has shape {sizes}; its kernels need {needed}"
            )
    a, b = shared["a"][:, 0].T, shared["b"].reshape(len(shared["b"]), -1)
    return {**parts, _BESIDE: _read_by(kernels, rank, a, b)}


def _read(fields: Mapping[str, Any], parts: dict[str, Any], base: form.Base) -> tuple[dict[str, Any], Any]:
    """The factory's arguments; A and B are drawn where the adapter says by which key alone.

    Raises:
      InputError: if they are neither there nor to be drawn, or the rank is another.
    """
    own = {name: part for name, part in parts.items() if name != _BESIDE}
    rank = next(iter(own.values()))["lambda"].shape[1]
    if (said := fields.get("r", rank)) != rank:
        raise InputError(f"r {said} should be {rank}, the rank of the tensors")
    bases = "very_sparse" if fields.get("very_sparse") else "sparse" if fields.get("sparse") else "uniform"
    if _BESIDE not in parts:
        if fields.get("save_projection", True):
            raise InputError("save_projection is true, and the adapter has no randlora_A and randlora_B")
        kernels = _kernels(own, base)
        found = drawn(int(fields.get("projection_prng_key") or 0), bases, rank, *_sides_of_peft(kernels))
        parts = {**parts, _BESIDE: _read_by(kernels, rank, **found)}
    alpha = fields.get("randlora_alpha")
    return {
        "rank": rank,
        "alpha": float(640 if alpha is None else alpha),
        "targets": form.sites_as_targets({base.modules[name].site for name in own}, base),
        "bases": bases,
        "dropout": float(fields.get("randlora_dropout") or 0.0),
    }, parts


def drawn(key: int, bases: str, rank: int, least: int, most: int) -> dict[str, np.ndarray]:
    """a (least, r) and b (most, r N), float32, as PEFT draws them of a key, by a Mersenne Twister.

    Uniform ones are rounded to bfloat16, their standard deviation and the quotients as well.
    """
    random, copies = twister.seeded(key), copies_of(least, rank)
    if bases == "uniform":
        a = twister.uniform_bfloat16(random, (rank, least), least**-0.5)
        b = np.stack([twister.uniform_bfloat16(random, (most, rank), rank**-0.5) for _ in range(copies)], axis=1)
        a, b = (twister.bfloat16(x / twister.bfloat16(x.std(ddof=1, dtype=np.float64))) for x in (a, b))
    else:
        shapes = (rank, least), (most, copies, rank)
        a, b = (_signs(twister.uniform(random, shape), bases, least) for shape in shapes)
        a, b = (np.float32(x) / np.float32(x.std(ddof=1, dtype=np.float64)) for x in (a, b))
    return {"a": a.T, "b": b.reshape(most, -1)}


def _restore(config: Mapping[str, Any], parts: dict[str, Any], facts: Mapping[str, Any], base: form.Base) -> tree.Flat:
    """The leaves; A and B in bfloat16 where that loses nothing, as they are drawn, else in float32."""
    own = {name: part for name, part in parts.items() if name != _BESIDE}
    leaves = _FORM.restore(config, own, facts, base)
    shared = {}
    for name, x in parts[_BESIDE].items():
        lossless = np.array_equal(x, twister.bfloat16(x))
        shared[f"randlora/{name}"] = jnp.asarray(x, jnp.bfloat16 if lossless else jnp.float32)
    return {**leaves, **shared}


def _check(fields: Mapping[str, Any]) -> None:
    """Refuses what trains more than the scalings."""
    if (bias := fields.get("bias", "none")) != "none":
        raise InputError(f"bias {bias!r} is not supported; supported: 'none'")


_FORM = form.per_site(
    "RANDLORA",
    "randlora",
    {"lambda": form.Tensor("randlora_lambda", "pj"), "gamma": form.Tensor("randlora_gamma", "jk")},
    _to_config,
    _read,
    _FIELDS,
    check=_check,
)
PEFT = _FORM._replace(write=_write, parse=_parse, restore=_restore)


ABOUT = About(
    summary="an update of full rank, of random bases that all kernels share",
    level="site",
    trains="two scalings, N (r + k) numbers per kernel whose smaller side is k, N = ceil(k / r)",
    saves="gradients and optimizer state of all but the scalings; it keeps the inputs, or fewer numbers than these",
    reference="Albert et al. 2025, arXiv:2502.00987",
    example={"rank": 5},
    promises=Promises(site_bytes=saved_bytes),
    peft=PEFT,
)
