"""Shapes of real models, shared by the tests and the benchmark."""

from __future__ import annotations

from typing import NamedTuple


class Shape(NamedTuple):
    """A linear map: x (rows, n) W (n, m) with factors of rank r."""

    name: str
    n: int
    m: int


# (model, map): inputs, outputs. Maps of one shape are named once.
MODELS = {
    "llama2-7b": (Shape("attention", 4096, 4096), Shape("gate_up", 4096, 11008), Shape("down", 11008, 4096)),
    "llama3-8b": (
        Shape("q_o", 4096, 4096),
        Shape("k_v", 4096, 1024),
        Shape("gate_up", 4096, 14336),
        Shape("down", 14336, 4096),
    ),
    "llama3-70b": (
        Shape("q_o", 8192, 8192),
        Shape("k_v", 8192, 1024),
        Shape("gate_up", 8192, 28672),
        Shape("down", 28672, 8192),
    ),
    # An eighth of a 70B layer, columns (q, gate) or rows (o, down) of its kernels divided over 8 devices.
    "llama3-70b/8": (
        Shape("q", 8192, 1024),
        Shape("k_v", 8192, 128),
        Shape("o", 1024, 8192),
        Shape("gate_up", 8192, 3584),
        Shape("down", 3584, 8192),
    ),
    "llama3-1b": (
        Shape("q_o", 2048, 2048),
        Shape("k_v", 2048, 512),
        Shape("gate_up", 2048, 8192),
        Shape("down", 8192, 2048),
    ),
}
RANKS = (8, 16, 64, 256)
ROWS = (2048, 8192, 16384, 65536)

# Small ones that interpretation is fast enough for; a name says what is particular.
SMALL = {
    "even": {"rows": 256, "n": 256, "m": 384, "r": 16},
    "rank 4": {"rows": 128, "n": 256, "m": 256, "r": 4},
    "rank 64": {"rows": 256, "n": 128, "m": 256, "r": 64},
    "rank 256": {"rows": 128, "n": 384, "m": 256, "r": 256},
    "odd rows": {"rows": 200, "n": 256, "m": 256, "r": 16},
    "few rows": {"rows": 7, "n": 256, "m": 128, "r": 8},
    "rank 24": {"rows": 130, "n": 128, "m": 128, "r": 24},
}
