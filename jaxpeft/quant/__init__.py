"""Kernels that are not plain arrays: what every kernel can be asked (`Kernel`), and the products that take them all."""

from jaxpeft.quant.dot import dot, low_rank_dot
from jaxpeft.quant.kernel import FORMATS, Kernel, by_layer, dense, is_packed, like, pack

__all__ = ["FORMATS", "Kernel", "by_layer", "dense", "dot", "is_packed", "like", "low_rank_dot", "pack"]
