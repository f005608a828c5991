"""LoRA's products on NVIDIA GPUs of the Hopper generation, by the kernels that gpu_products.py describes.

    forward           z = low_product(x, A);  y = product(x, W, z, B)
    input_gradient    e = low_product(dy, B);  dx = product(dy, W^T, e, A^T)
    low, factor_gradient                       low_product, row_product alone

What is here is what a call needs around them: arrays in whole tiles where TMA wants them so, which shapes and dtypes
the kernels take, and which tiles.
"""

from __future__ import annotations

from typing import Any

from pallas_kernels import mosaic_gpu as gpu
from pallas_kernels.lora_matmul.gpu_low import low_product
from pallas_kernels.lora_matmul.gpu_products import ROWS, Config, product
from pallas_kernels.lora_matmul.gpu_rows import row_product
from pallas_kernels.mosaic_gpu import ALIGNMENT, TILE, ceil_div, round_up
from pallas_kernels.stacked import Stacked

RANKS = range(4, 257)


def forward(x, w, a, b, seed, *, scale: float, rate: float, config: Config | None = None, interpret: Any = None):
    """(y (T, m), z (r, T)); see reference.py."""
    (t, n), (r, m) = x.shape, b.shape
    config = config or default_config(t, n, m, r)
    x, (a, b) = whole_rows(x), whole_ranks(a, b)
    z = low_product(x, a, seed, transposed=True, scale=scale, rate=rate, config=config, interpret=interpret)
    y = product(x, w, z, b, transposed=False, config=config, interpret=interpret)
    return y[:t], z[:r, :t]


def forward_into(
    x, w, a, b, seed, out, *, scale: float, rate: float, config: Config | None = None, interpret: Any = None
):
    """(the stack that `out` (T, m) is a layer of, with y there, y as it is read there, z (r, T)); T a multiple of 8."""
    (t, n), (r, m) = x.shape, b.shape
    config = config or default_config(t, n, m, r)
    a, b = whole_ranks(a, b)
    z = low_product(x, a, seed, transposed=True, scale=scale, rate=rate, config=config, interpret=interpret)
    stack = product(x, w, z, b, transposed=False, into=out, config=config, interpret=interpret)
    return stack, Stacked(stack, out.index).take(), z[:r, :t]


def low(x, a, seed, *, scale: float, rate: float, config: Config | None = None, interpret: Any = None):
    """z (r, T); see reference.py."""
    t, (n, r) = len(x), a.shape
    x, a = whole_rows(x), gpu.padded(a, n, gpu.short_or_whole(r))
    config = config or Config()
    z = low_product(x, a, seed, transposed=True, scale=scale, rate=rate, config=config, interpret=interpret)
    return z[:r, :t]


def input_gradient(
    dy, w, a, b, seed, *, scale: float, rate: float, config: Config | None = None, interpret: Any = None
):
    """(dx (T, n), e (r, T)); see reference.py."""
    (t, m), (n, r) = dy.shape, a.shape
    config = config or default_config(t, m, n, r)
    dy, (a, b) = whole_rows(dy), whole_ranks(a, b)
    e = low_product(dy, b, seed, transposed=False, scale=scale, config=config, interpret=interpret)
    dx = product(dy, w, e, a, seed, transposed=True, rate=rate, config=config, interpret=interpret)
    return dx[:t], e[:r, :t]


def factor_gradient(z, x, seed, *, rate: float, config: Config | None = None, interpret: Any = None):
    """z drop(x), float32 (r, k); see reference.py."""
    r = len(z)
    config = config or Config()
    partial = row_product(whole_low(z), whole_rows(x), seed, rate=rate, config=config, interpret=interpret)
    return (partial[0] if len(partial) == 1 else partial.sum(0))[:r]


def supports_forward(x, w, a, b, seed, *, scale: float, rate: float) -> bool:
    """Whether `forward` takes arguments of these shapes."""
    return supported(x, w, a, b) and b.shape[0] in RANKS


def supports_forward_into(x, w, a, b, seed, out, *, scale: float, rate: float) -> bool:
    """Whether `forward_into` takes arguments of these shapes: as `forward`, in whole tiles of rows."""
    return supports_forward(x, w, a, b, seed, scale=scale, rate=rate) and len(x) % ALIGNMENT == 0 and writes(x, out)


def writes(x, out) -> bool:
    """Whether rows of x's products can be written to a layer of a stack."""
    return out.stack.ndim == 3 and out.dtype == x.dtype and len(x) == out.shape[0]


def supports_input_gradient(dy, w, a, b, seed, *, scale: float, rate: float) -> bool:
    """Whether `input_gradient` takes arguments of these shapes."""
    return supported(dy, w, a, b) and b.shape[0] in RANKS


def supports_low(x, a, seed, *, scale: float, rate: float) -> bool:
    """Whether `low` takes arguments of these shapes."""
    return supported(x, None, a) and a.shape[-1] in RANKS


def supports_factor_gradient(z, x, seed, *, rate: float) -> bool:
    """Whether `factor_gradient` takes arguments of these shapes."""
    return supported(x, None, z) and z.shape[0] in RANKS


def default_config(rows: int, n: int, m: int, r: int) -> Config:
    """A good guess for x (rows, n) W (n, m); for dy W^T, n and m are the other way round."""
    columns = 256
    while columns > TILE and (m % columns or ceil_div(rows, ROWS) * (m // columns) < gpu.BLOCKS):
        columns //= 2
    return Config(columns=columns, slots=4 if columns == 256 else 6)


def candidates(rows: int, n: int, m: int, r: int) -> list[Config]:
    """What is worth timing for x (rows, n) W (n, m), beginning with the default."""
    found = [default_config(rows, n, m, r)]
    for columns, width in ((256, 4), (256, 8), (256, 16), (128, 4), (128, 8), (128, 16), (64, 8)):
        config = Config(columns, 4 if columns == 256 else 6, width)
        if columns <= m and config not in found:
            found.append(config)
    return found


def configs(function: str, *args) -> list[Config]:
    """The candidates of a call function(*args), the default first."""
    if function in ("low", "factor_gradient"):
        return [Config()]
    n, m = args[1].shape if function == "forward" else args[1].shape[::-1]
    return candidates(args[0].shape[0], n, m, args[2].shape[-1])


def supported(x, w, *factors) -> bool:
    """Whether the kernels take arrays of these dtypes, and maps of these extents."""
    wide = [*x.shape[1:], *(() if w is None else w.shape)]
    same = all(array is None or array.dtype == x.dtype for array in (w, *factors))
    return (
        x.dtype in gpu.DTYPES
        and same
        and len(x.shape) == 2
        and x.shape[0] > 0
        and not any(extent % TILE for extent in wide)
    )


def whole_rows(x):
    """x (T, k), T a multiple of 8."""
    return gpu.padded(x, round_up(len(x), ALIGNMENT), x.shape[1])


def whole_low(z):
    """z (r, T), T a multiple of 64, with ranks of zeros as `whole_ranks` has them."""
    return gpu.padded(z, gpu.short_or_whole(z.shape[0]), round_up(z.shape[1], TILE))


def whole_ranks(a, b):
    """a (..., n, r) and b (..., r, m), with ranks of zeros where r is one that TMA does not take."""
    r = gpu.short_or_whole(b.shape[-2])
    return gpu.padded(a, a.shape[-2], r), gpu.padded(b, r, b.shape[-1])
