"""Kernels that are not plain arrays, and the products that take them all."""

from jaxpeft.quant.dot import dot, low_rank_dot

__all__ = ["dot", "low_rank_dot"]
