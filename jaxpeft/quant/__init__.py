"""Kernels that are not plain arrays: what every kernel can be asked (`Kernel`), and the products that take them all."""

from jaxpeft.quant.absent import Absent
from jaxpeft.quant.affine import Affine
from jaxpeft.quant.dot import dot, low_rank_dot, low_rank_dot_of
from jaxpeft.quant.folded import (
    CONVOLUTION,
    EMBEDDING,
    Folded,
    fold,
    folded_as,
    is_linear,
    kind_of,
    matrix,
    refolded,
    unfolded,
    unfolded_all,
)
from jaxpeft.quant.kernel import FORMATS, Kernel, by_layer, dense, is_packed, like, merged, pack, pack_affine, unpacked
from jaxpeft.quant.nested import Nested
from jaxpeft.quant.paired import Paired

__all__ = [
    "CONVOLUTION",
    "EMBEDDING",
    "FORMATS",
    "Absent",
    "Affine",
    "Folded",
    "Kernel",
    "Nested",
    "Paired",
    "by_layer",
    "dense",
    "dot",
    "fold",
    "folded_as",
    "is_linear",
    "is_packed",
    "kind_of",
    "like",
    "low_rank_dot",
    "low_rank_dot_of",
    "matrix",
    "merged",
    "pack",
    "pack_affine",
    "refolded",
    "unfolded",
    "unfolded_all",
    "unpacked",
]
