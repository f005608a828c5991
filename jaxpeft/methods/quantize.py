"""Quantization: the frozen kernels of the layers in 2, 3, 4 or 8 bits. With LoRA beside them it is QLoRA.

    W[i, j] ~ value(c[i, j]) scale[i // group, j]        W (n, m); c of 2 to 8 bits, one scale per `group` inputs

    format  value(c)                    bits per number
    nf4     16 quantiles of a normal    4.127 (groups of 64, their scales doubly quantized)
    nf3     8                           3.127
    nf2     4                           2.127
    int8    -127..127                   8.25 (groups of 128)
    int4    -7..7                       4.25
    int3    -3..3                       3.25
    int2    -1..1                       2.25

Nothing trains; the method is a part of a chain, anywhere in it: `chain(quantize(), lora())`. Products unpack a kernel
where they read it, in both passes, and no unpacked kernel is kept (`pallas_kernels.packed`, `quant_lora_matmul`); nf4,
int4 and int8 in kernels of their own where there are some, nf3, nf2, int3 and int2 in plain JAX everywhere.
Embeddings, norms, biases and the head stay as they are; of a model that shows no layers (`from_linen`) every linear map
can be packed, and is unless `targets` leave it out. Merging gives plain kernels in the base's dtype: what was
packed, unpacked, with the adapters' updates.

A checkpoint is packed as it is read, layer by layer, where no method before `quantize` needs the kernels as they
were. One that does is PiSSA: after `lora(init="pissa")` what it leaves of a kernel is packed (QPiSSA), before it the
packed kernel is decomposed and the rest packed again.

Paper: Dettmers et al. 2023, "QLoRA", arXiv:2305.14314. Codes, scales and double quantization of nf4 in groups of 64 are
those of bitsandbytes, a kernel of which 64 does not divide the inputs excepted: its groups are whole columns here. nf3
and nf2 are the same with the codebooks of LQ-LoRA (Guo et al. 2023, arXiv:2311.12023); at 2 bits an adapter has much to
make up for. Deviation: the optimizer is not paged.
"""

from __future__ import annotations

import functools

from jaxpeft import sites, tree
from jaxpeft.about import About, Promises
from jaxpeft.errors import InputError
from jaxpeft.method import Method, Spec
from jaxpeft.methods.lora import Targets
from jaxpeft.quant import FORMATS, by_layer, dense, folded_as, is_packed, matrix, merged, pack
from jaxpeft.widths import check_format
from pallas_kernels.packed import CODEBOOKS, Packed


def saved_bytes(**_) -> int:
    """Bytes per token kept at one kernel beyond what a frozen backbone keeps: none."""
    return 0


def quantize(
    format: str = "nf4", group: int | None = None, double: bool | None = None, targets: Targets = "all-linear"
) -> Method:
    """Packs the kernels of the layers' linear maps that `targets` chooses; where no layers are visible, of all.

    Args:
      format: "nf4", "nf3", "nf2", "int8", "int4", "int3" or "int2".
      group: inputs that share a scale, a divisor of each kernel's; None: 64 for nf and 128 for int, all inputs of a
        kernel where that does not divide them.
      double: double quantization of the scales, of nf alone; None: for nf.
      targets: "all-linear", "attention", "mlp", a regular expression, or a list of names (see `sites.find`).

    Returns:
      The method; it trains nothing. A kernel that is packed already stays as it is.

    Raises:
      InputError: for an unknown format, a group below 1 or that does not divide a kernel's inputs, double quantization
        of another format, inputs that do not fill bytes (2 of 4 bits, 8 of 3, 4 of 2), targets that match nothing or,
        where layers are visible, are not in them.
    """
    config = dict(locals())
    if format not in FORMATS:
        raise InputError(f"quantize: format {format!r} is not one of {', '.join(FORMATS)}")
    if group is not None and group < 1:
        raise InputError(f"quantize: group {group} must be at least 1")
    if double and format not in CODEBOOKS:
        raise InputError(f"quantize: double quantization is of {', '.join(CODEBOOKS)}, not of {format}")

    def check(site, kernel, layered):
        if layered and (kernel.ndim != 3 or not tree.stacked(site)):
            raise InputError(f"quantize: {site} is not in the layers, whose kernels alone can be packed")

    def convert(params):
        flat = tree.flatten(params)
        kernels = {f"{site}/kernel": flat[f"{site}/kernel"] for site in sites.find(params, targets, "quantize")}
        plain = {path: kernel for path, kernel in kernels.items() if not is_packed(kernel)}
        for path, kernel in plain.items():
            check(path.removesuffix("/kernel"), kernel, bool(tree.segments(params)))
        inputs = {path.removesuffix("/kernel"): kernel.shape[-2] for path, kernel in plain.items()}
        check_format("quantize", format, group, inputs)
        return dict.fromkeys(plain, functools.partial(pack, format=format, group=group, double=double))

    def prepare(params, view):
        flat = tree.flatten(params)
        for path, one in convert(params).items():
            flat[path] = folded_as(flat[path], functools.partial(by_layer, one))
        return tree.unflatten(flat)

    def merge(params):
        flat = tree.flatten(params)
        ours = lambda kernel: isinstance(matrix(kernel), Packed)
        plain = lambda kernel: merged(kernel, dense(kernel, kernel.dtype)) if ours(kernel) else kernel
        return tree.unflatten({path: plain(leaf) for path, leaf in flat.items()})

    return Method(prepare=prepare, merge=merge, specs=(Spec("quantize", config),), convert=convert)


ABOUT = About(
    summary="frozen kernels in 2 to 8 bits (NF4, NF3, NF2, int8 to int2), beside which another method trains: QLoRA",
    level="parameters",
    trains="nothing by itself",
    saves="three quarters of the kernels' bytes in 4 bits, half of them in 8, seven eighths in 2; no activations",
    reference="Dettmers et al. 2023, arXiv:2305.14314",
    example={"format": "nf4"},
    promises=Promises(site_bytes=saved_bytes, starts_at_base=False),
    within="quantize+lora",
    twice=True,  # it adds no leaves: other targets, another format
    stored="host",
)
