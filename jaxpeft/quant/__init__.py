"""Kernels that are not plain arrays, and the one matrix product that takes them all."""

from jaxpeft.quant.dot import dot

__all__ = ["dot"]
