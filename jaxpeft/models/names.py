"""Rows of a family's NAMES table: (our path, Hugging Face's name, whether the matrix is transposed there)."""

from __future__ import annotations

Names = tuple[tuple[str, str, bool], ...]


def dense(path: str, name: str) -> Names:
    """Of a linear map: torch's Linear."""
    return (f"{path}/kernel", f"{name}.weight", True), (f"{path}/bias", f"{name}.bias", False)


def norm(path: str, name: str) -> Names:
    """Of a LayerNorm."""
    return (f"{path}/scale", f"{name}.weight", False), (f"{path}/bias", f"{name}.bias", False)


def table(path: str, name: str) -> Names:
    """Of an embedding."""
    return ((f"{path}/embedding", f"{name}.weight", False),)
