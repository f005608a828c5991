"""PEQA: the kernels become integers of 2, 3, 4 or 8 bits, and their scales alone train.

    W ~ W_0 = s_0 (c - z)          c (n, m) of b bits and zero points z (G, m) fixed: `jaxpeft.quant.affine`
    y = x W,  W = s (c - z)        s (G, m) float32 trained, G = n / group

    group = 0, one scale per output:    y = (s / s_0) (x W_0)    ds_j = sum over tokens of dy_j (x W_0)_j / s_0j
    groups of inputs:                   ds_gj = sum over i in group g of (c - z)_ij (x^T dy)_ij

x (..., n), W (n, m). Kept for the backward pass: with one scale per output x W_0, m per token, and no x. Under
`matmuls` it takes the place of y and costs nothing but at down_proj, whose y is not kept otherwise; with
`matmuls,down_proj_product=recompute` it is made again. With groups x is kept, n per token, which the sites that read
the same x share, and under `matmuls` nothing more; x^T dy is made one group at a time. No unpacked kernel is kept.

Codes and zero points stay as they are, bit by bit: a task is its scales. Adam's state is 8 bytes per scale. s_0 stays
beside the codes, 4 bytes per scale, so that what reads the kernel reads the base. Merging gives s (c - z), unpacked in
the base's dtype.

The method packs the kernels, as they are read from a checkpoint where no method before it needs them as they were, or
trains the scales of those that GPTQ or AWQ has made, where bits and groups are told as the checkpoint has them; it has
to be nearest to them, last in the chain: `lora+peqa`. Weight decay would pull the scales to zero; there is none.

Paper: Kim et al. 2023, "Memory-Efficient Fine-Tuning of Compressed Large Language Models via sub-4-bit Integer
Quantization", arXiv:2305.14152. s_0 and z are to minimise the squared error; here s_0 does on a grid, and z is that of
the range with zero in it. Neither code nor rate is published: the default is of full fine-tuning's size, and smaller
models, of larger weights, want more. Deviation: 2 and 8 bits are possible, too.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from jaxpeft import sites, tree
from jaxpeft.about import About, Defaults, Promises
from jaxpeft.errors import InputError
from jaxpeft.method import Method, Spec, trains
from jaxpeft.methods.ia3 import scaled
from jaxpeft.methods.lora import Targets
from jaxpeft.model import Context
from jaxpeft.quant import Affine, affine, by_layer, dense, folded_as, is_packed, matrix, merged, pack_affine
from jaxpeft.widths import check_affine


class PEQA(nn.Module):
    """The product with trained scales. Parameter: scales (G, m), float32."""

    @nn.compact
    def __call__(self, inner: Callable, x: jax.Array, site: sites.Site, ctx: Context) -> jax.Array:
        if not site.plain:
            raise InputError("peqa: must be nearest to the kernel, whose scales it trains: name it last in the chain")
        kernel = matrix(site.kernel)
        scales = self.param("scales", lambda key: kernel.scales.astype(jnp.float32))
        if kernel.groups > 1:
            return affine.scaled_product(x, kernel, scales)
        product = checkpoint_name(inner(x), f"{site.path.rsplit('/', 1)[-1]}_product")
        return scaled(product, (scales / kernel.scales)[0])


def saved_bytes(inputs: int, outputs: int, itemsize: int, group: int = 0, **_) -> int:
    """Bytes per token kept at one kernel beyond what a frozen backbone keeps: its output, or with groups its input."""
    return (inputs if group else outputs) * itemsize


def peqa(bits: int = 4, group: int = 0, targets: Targets = "all-linear") -> Method:
    """PEQA on the sites that `targets` chooses; the other kernels stay as they are.

    Args:
      bits: of a code: 2, 3, 4 or 8.
      group: inputs that share a scale and a zero point, a divisor of each kernel's; 0: all of an output's.
      targets: "all-linear", "attention", "mlp", a regular expression, or a list of names (see `sites.find`).

    Returns:
      The method; it trains `<site>/peqa/scales` (L, G, m).

    Raises:
      InputError: for other bits, a group below 0 or that does not divide a kernel's inputs, inputs that do not fill
        bytes, a kernel that is packed already in another way, or targets that match nothing or, where layers are
        visible, are not in them.
    """
    config = dict(locals())
    if bits not in affine.FIELDS:
        raise InputError(f"peqa: bits {bits} is not one of {', '.join(map(str, affine.FIELDS))}")
    if group < 0:
        raise InputError(f"peqa: group {group} must be at least 1, or 0 for one scale per output")

    def check(site, kernel, layered):
        if layered and (kernel.ndim != 3 or not tree.stacked(site)):
            raise InputError(f"peqa: {site} is not in the layers, whose kernels alone can be packed")
        if is_packed(kernel):
            raise InputError(f"peqa: {site} is packed already; peqa packs kernels itself: give quantize other targets")

    def check_packed(site, kernel):
        if kernel.group_index is not None:
            raise InputError(f"peqa: {site} has groups in the order of activations (desc_act), which it does not train")
        n = kernel.shape[-2]
        if (kernel.bits, n // kernel.groups) != (bits, group or n):
            given = f"bits={kernel.bits}, group={n // kernel.groups if kernel.groups > 1 else 0}"
            raise InputError(f"peqa: {site} is packed already, with {given}; give these")

    def choose(params):
        return sites.find(params, targets, "peqa")

    pack = functools.partial(pack_affine, bits=bits, group=group)

    def convert(params):
        flat = tree.flatten(params)
        kernels = {site: flat[f"{site}/kernel"] for site in choose(params)}
        packed = {site: matrix(kernel) for site, kernel in kernels.items() if isinstance(matrix(kernel), Affine)}
        for site, kernel in packed.items():
            check_packed(site, kernel)
        wanted = [site for site in kernels if site not in packed]
        for site in wanted:
            check(site, kernels[site], bool(tree.segments(params)))
        check_affine("peqa", bits, group, {site: kernels[site].shape[-2] for site in wanted})
        return {f"{site}/kernel": pack for site in wanted}

    def prepare(params, view):
        flat = tree.flatten(params)
        for path, one in convert(params).items():
            flat[path] = folded_as(flat[path], functools.partial(by_layer, one))
        return tree.unflatten(flat)

    return Method(
        prepare=prepare,
        forward=lambda model, view: sites.attach(model, "peqa", lambda site: PEQA(), choose),
        roles=trains(lambda path: path.endswith("/peqa/scales")),
        merge=functools.partial(fold, pack=pack),
        specs=(Spec("peqa", config),),
        convert=convert,
    )


def fold(params: Mapping[str, Any], pack: Callable[[jax.Array], Affine]) -> tree.Params:
    """W <- s (c - z), a plain array, at every site with scales, which go; a kernel that is not packed yet is first."""
    flat = tree.flatten(params)
    plain = {path: leaf for path, leaf in flat.items() if not path.endswith("/peqa/scales")}
    for path, scales in flat.items():
        if path.endswith("/peqa/scales"):
            at = f"{path.removesuffix('/peqa/scales')}/kernel"
            kernel = matrix(flat[at])
            packed = kernel if isinstance(kernel, Affine) else pack(kernel)
            plain[at] = merged(flat[at], dense(packed.with_scales(scales), packed.dtype))
    return tree.unflatten(plain)


ABOUT = About(
    summary="the scales of kernels that are integers of 2, 3, 4 or 8 bits",
    level="site",
    trains="one scale per output, or per group of inputs of each",
    saves="the kernels' bytes but 2 to 8 bits per number, and gradients and optimizer state of all but the scales",
    reference="Kim et al. 2023, arXiv:2305.14152",
    example={"bits": 4},
    promises=Promises(site_bytes=saved_bytes, starts_at_base=False, lr=1e-3),
    defaults=Defaults(lr=2e-5, weight_decay=0.0),
)
