"""(IA)^3: learned vectors that scale keys, values and the inner activations of the MLP.

    y = l * (x W + bias)        k_proj, v_proj: l (m,) over the outputs
    y = (l * x) W + bias        down_proj:      l (n,) over the inputs

x (..., n), W (n, m) and the bias frozen. The vectors start at one, the adapted model at the base. Scaling happens in
float32 and is rounded once. Kept for the backward pass, for d l alone: what l scales, m or n per token. Under `matmuls`
that costs nothing: x W takes the place of y, and the MLP's product is computed again from its factors.

Merging is exact up to rounding: W <- W l and bias <- l bias, or W <- l W, column by column or row by row. Training on
quantized kernels works; what is merged there is their dense form.

Paper: Liu et al. 2022, "Few-Shot Parameter-Efficient Fine-Tuning is Better and Cheaper than In-Context Learning",
arXiv:2205.05638. T-Few scales the MLP's inner activations where they leave the activation function, which is the input
of down_proj, as in PEFT. Deviations: the paper's unlikelihood and length losses are not used; one set of names serves
all families, where PEFT takes q_proj instead of k_proj for some of them, and, by the end of its name, the attention's
output in BERT as well.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from jaxpeft import sites, tree
from jaxpeft.about import About, Defaults, Promises
from jaxpeft.errors import InputError
from jaxpeft.method import Method, Spec, trains
from jaxpeft.methods.lora import Targets
from jaxpeft.model import Context
from jaxpeft.peft import form
from jaxpeft.quant import dense
from jaxpeft.quant import merged as as_merged

TARGETS = ("k_proj", "v_proj", "down_proj")
FEEDFORWARD = ("down_proj",)


class IA3(nn.Module):
    """The scaled product. Parameters: out (m,), or in (n,), float32."""

    stacked = True  # only the product reads the kernel

    feedforward: bool

    @nn.compact
    def __call__(self, inner: Callable, x: jax.Array, site: sites.Site, ctx: Context) -> jax.Array:
        n, m = site.kernel.shape
        if self.feedforward:
            return inner(scaled(x, self.param("in", nn.initializers.ones, (n,))))
        scale = self.param("out", nn.initializers.ones, (m,))
        product = checkpoint_name(inner(x), f"{site.path.rsplit('/', 1)[-1]}_product")
        return scaled(product, scale, site.bias)


def scaled(y: jax.Array, scale: jax.Array, bias: jax.Array | None = None) -> jax.Array:
    """scale * y + (scale - 1) * bias in float32, rounded once to y's dtype; y is kept as it is, and no wider copy.

    With the bias added to it, that is scale * (y + bias).
    """

    def of(y, scale, bias):
        wide = y.astype(jnp.float32)
        if bias is None:
            return (scale * wide).astype(y.dtype)
        bias = bias.astype(jnp.float32)
        return (scale * (wide + bias) - bias).astype(y.dtype)

    return jax.checkpoint(of, prevent_cse=False)(y, scale, bias)


def saved_bytes(inputs: int, outputs: int, itemsize: int, **_) -> int:
    """Bytes per token kept at one adapted kernel beyond what a frozen backbone keeps: what the vector scales.

    That is the outputs or the inputs, as the site may be; this counts the larger.
    """
    return max(inputs, outputs) * itemsize


def ia3(targets: Targets = TARGETS, feedforward: str | Sequence[str] = FEEDFORWARD) -> Method:
    """(IA)^3 on the sites that `targets` chooses.

    Args:
      targets: the sites with a vector: "all-linear", "attention", "mlp", a regular expression, or a list of names (see
        `sites.find`).
      feedforward: names that those sites end with whose inputs are scaled; of all others the outputs are.

    Returns:
      The method; it trains `<site>/ia3/out` (L, m) or `<site>/ia3/in` (L, n).

    Raises:
      InputError: for targets that match nothing, or a feedforward name with which no target ends.
    """
    feed = feedforward.split(",") if isinstance(feedforward, str) else list(feedforward)
    config = {"targets": targets if isinstance(targets, str) else list(targets), "feedforward": feed}

    def ends(site, name):
        return f"/{tree.canonical(site)}".endswith(f"/{name.replace('.', '/')}")

    def choose(params):
        found = sites.find(params, targets, "ia3")
        for name in feed if feed != list(FEEDFORWARD) else ():
            if not any(ends(site, name) for site in found):
                nearest = tree.nearest(name, [site.rsplit("/", 1)[-1] for site in found])
                raise InputError(f"ia3: feedforward {name!r}: no target ends with it; nearest: {nearest}")
        return found

    def adapter(site):
        return IA3(any(ends(site, name) for name in feed))

    return Method(
        forward=lambda model, view: sites.attach(model, "ia3", adapter, choose),
        roles=trains(lambda path: path.endswith(("/ia3/out", "/ia3/in"))),
        merge=fold,
        specs=(Spec("ia3", config),),
    )


def fold(params: Mapping[str, Any]) -> tree.Params:
    """W <- W l and bias <- l bias, or W <- l W, at every site with a vector, which goes; in float32, rounded once."""
    flat = tree.flatten(params)
    merged = {path: leaf for path, leaf in flat.items() if "/ia3/" not in path}

    def scale(path, by):
        merged[path] = as_merged(merged[path], by * dense(merged[path]))

    for path, vector in flat.items():
        site, _, leaf = path.partition("/ia3/")
        if leaf == "in":
            scale(f"{site}/kernel", vector[..., :, None])
        if leaf == "out":
            scale(f"{site}/kernel", vector[..., None, :])
            if (bias := merged.get(f"{site}/bias")) is not None:  # of several axes where the outputs have them
                scale(f"{site}/bias", vector.reshape(bias.shape))
    return tree.unflatten(merged)


PEFT = form.vectors(
    "IA3", "ia3", "ia3_l", lambda targets, feedforward: {"targets": targets, "feedforward": feedforward}
)


ABOUT = About(
    summary="learned vectors that scale keys, values and the MLP's inner activations",
    level="site",
    trains="one vector per site: m numbers at keys and values, n at down_proj",
    saves="gradients and optimizer state of all but the vectors; no activations under matmuls",
    reference="Liu et al. 2022, arXiv:2205.05638",
    example={},
    promises=Promises(site_bytes=saved_bytes),
    defaults=Defaults(lr=3e-3),
    peft=PEFT,
)
