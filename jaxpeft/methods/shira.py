"""SHiRA: a sparse update of each kernel, of as many entries as LoRA has parameters.

    y = x (W + S)        x (..., n), W (n, m) frozen, S (n, m) zero but at k = r (n + m) entries
    S[i_t, j_t] = v_t    i, j (k,) drawn once and frozen; v (k,) trained

S has any rank. v starts at zero, the adapted model at the base. The entries are drawn one from each of k strata of W's
entries, row after row, of n m / k each: every entry is as likely as any other, none comes twice, and no permutation of
n m numbers is at work, which for a stack of layers would be larger than the model.

Kept for the backward pass: x, as LoRA keeps it; S is made again, so that only one is at work at a time, as large as the
kernel in x's dtype, and one for its gradient, of which k entries are taken. So is the time: x S costs as much as x W.
What it spares is the optimizer's state and the adapter's file, of 3 numbers for each entry.

Merging is exact up to rounding: W <- W + S. The kernel is only multiplied with, so quantized ones do.

Paper: Bhardwaj et al. 2024, "Sparse High Rank Adapters", arXiv:2406.13175. Deviations: of its masks the random one
(as in PEFT); not those by the weights' or gradients' size. Nothing is dropped, as there.
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

LARGEST = 2**32 - 1  # entries that uint32 tells apart


class SHiRA(nn.Module):
    """The adapted product. Parameters: index (k, 2) int32, frozen; values (k,) float32."""

    stacked = True  # only the product reads the kernel

    rank: int

    @nn.compact
    def __call__(self, inner: Callable, x: jax.Array, site: sites.Site, ctx: Context) -> jax.Array:
        n, m = site.kernel.shape
        count = self.rank * (n + m)
        index = self.param("index", draw, n, m, count)
        values = self.param("values", nn.initializers.zeros, (count,))

        def change(x, index, values):
            return x @ sparse(index, values.astype(x.dtype), (n, m))

        return inner(x) + jax.checkpoint(change, prevent_cse=False)(x, index, values)


def draw(key: jax.Array, n: int, m: int, count: int) -> jax.Array:
    """(i_t, j_t) (count, 2) int32 of different entries of an n x m matrix, one of each stratum, in their order."""
    size, longer = divmod(n * m, count)  # the first strata have one entry more
    t = jnp.arange(count, dtype=jnp.uint32)
    start = t * jnp.uint32(size) + jnp.minimum(t, jnp.uint32(longer))
    length = jnp.where(t < longer, size + 1, size).astype(jnp.uint32)
    flat = start + jax.random.bits(key, (count,), jnp.uint32) % length
    return jnp.stack(jnp.divmod(flat, jnp.uint32(m)), axis=-1).astype(jnp.int32)


def sparse(index: jax.Array, values: jax.Array, shape: tuple[int, int]) -> jax.Array:
    """S (n, m) in the values' dtype."""
    at = jnp.zeros(shape, values.dtype).at[index[:, 0], index[:, 1]]
    return at.add(values, mode="promise_in_bounds")


def saved_bytes(inputs: int, outputs: int, itemsize: int, **_) -> int:
    """Bytes per token kept at one adapted kernel beyond what a frozen backbone keeps: x, which sites may share."""
    del outputs
    return inputs * itemsize


def shira(rank: int = 32, targets: Targets = "all-linear") -> Method:
    """SHiRA on the sites that `targets` chooses.

    Args:
      rank: r: r (n + m) entries of a kernel of n x m train, as many as LoRA of that rank has.
      targets: "all-linear", "attention", "mlp", a regular expression, or a list of names (see `sites.find`).

    Returns:
      The method; it trains `<site>/shira/values` (L, r (n + m)).

    Raises:
      InputError: for a rank below 1, or of more entries than a kernel has; a kernel of more than 2^32 - 1 entries; or
        targets that match nothing.
    """
    config = dict(locals())
    check_rank("shira", rank)

    def choose(params):
        flat, found = tree.flatten(params), sites.find(params, targets, "shira")
        for site in found:
            n, m = flat[sites.kernel_path(flat, site)].shape[-2:]
            if rank * (n + m) > n * m:
                most = n * m // (n + m)
                raise InputError(f"shira: rank {rank} is above the {most} that {site} has room for, of {n} x {m}")
            if n * m > LARGEST:
                raise InputError(f"shira: {site}, a kernel of {n} x {m}, has more than {LARGEST} entries; leave it out")
        return found

    return Method(
        forward=lambda model, view: sites.attach(model, "shira", lambda site: SHiRA(rank), choose),
        roles=trains(lambda path: path.endswith("/shira/values")),
        merge=fold,
        specs=(Spec("shira", config),),
    )


def fold(params: Mapping[str, Any]) -> tree.Params:
    """W <- W + S at every adapted site, whose leaves go; in float32, rounded once to W's dtype."""
    flat = tree.flatten(params)
    merged = {path: leaf for path, leaf in flat.items() if "/shira/" not in path}
    for path, values in flat.items():
        site, _, leaf = path.partition("/shira/")
        if leaf == "values":
            kernel, index = merged[f"{site}/kernel"], flat[f"{site}/shira/index"]
            add = tree.over(values.ndim - 1, lambda w, i, v: w.at[i[:, 0], i[:, 1]].add(v))
            merged[f"{site}/kernel"] = as_merged(kernel, add(dense(kernel), index, values))
    return tree.unflatten(merged)


# Hugging Face PEFT: the entries are (output, input) there.


def _flipped(leaves: Mapping[str, Any]) -> dict[str, Any]:
    return {"index": np.asarray(leaves["index"])[..., ::-1], "values": leaves["values"]}


def _to_config(config: Mapping[str, Any], parts: Mapping[str, form.Part], base: form.Base) -> dict[str, Any]:
    return {
        "fan_in_fan_out": False,
        "init_weights": True,
        "mask_type": "random",
        "r": config["rank"],
        "random_seed": None,
        "target_modules": form.as_target_modules(parts, base),
    }


def _from_config(fields: Mapping[str, Any], parts: dict[str, Any], base: form.Base) -> tuple[dict[str, Any], Any]:
    rank, chosen = fields.get("r"), {base.modules[name].site for name in parts}
    for name, (site, _, n, m) in base.modules.items():
        if site in chosen and name not in parts:
            raise InputError(f"{name} has none, other layers do")
        if site in chosen and (count := len(parts[name]["values"])) != (rank or 0) * (n + m):
            raise InputError(f"{name} has {count} entries, where r {rank} gives {n} x {m} {(rank or 0) * (n + m)}")
    return {"rank": rank, "targets": form.sites_as_targets(chosen, base)}, parts


def _parse(tensors: Mapping[str, np.ndarray], base: form.Base) -> dict[str, Any]:
    """The parts, whose entries must lie in the base's kernels."""
    parts = _FORM.parse(tensors, base)
    for name, part in parts.items():
        _, _, n, m = base.modules[name]
        index = part["index"]
        if index.shape != (len(part["values"]), 2):
            raise InputError(f"{name}.shira_indices has shape {index.T.shape}, where there are {len(part['values'])}")
        if (index < 0).any() or (index >= (m, n)).any() or (index % 1).any():
            raise InputError(f"an adapter for another base: {name}.shira_indices has some outside of {m} x {n}")
    return parts


_FORM = form.per_site(
    "SHIRA",
    "shira",
    {"index": form.Tensor("shira_indices", "ck", np.int32), "values": form.Tensor("shira_weight", "k")},
    _to_config,
    _from_config,
    "r fan_in_fan_out init_weights mask_type random_seed target_modules exclude_modules".split(),
    to_tensors=lambda config, leaves, module: _flipped(leaves),
    from_tensors=lambda config, leaves, extra: {
        **_flipped(leaves),
        "index": jnp.asarray(_flipped(leaves)["index"], jnp.int32),
    },
)
PEFT = _FORM._replace(parse=_parse)


ABOUT = About(
    summary="a sparse update of each kernel, of entries drawn once",
    level="site",
    trains="r(n+m) entries per kernel",
    saves="gradients and optimizer state of all but r(n+m) numbers per kernel; no activations; an update is at work",
    reference="Bhardwaj et al. 2024, arXiv:2406.13175",
    example={"rank": 4},
    promises=Promises(site_bytes=saved_bytes),
    peft=PEFT,
)
