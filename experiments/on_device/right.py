"""Step 1: what the kernels compute on the device, against float64, from random inputs into poisoned memory.

Every operation in both directions: y (or the attention's output) and all gradients, as one compiled program. Memory is
poisoned before it is used: arrays of NaN of the outputs' and the temporaries' sizes are made and freed, so that the
allocator hands out their memory; `poisoned` is the share of outputs that came to lie in it. An output that a kernel
left unwritten is then not a number, and no error bound holds for it.

The error is |ours - float64| / |float64| in Frobenius norms; float64 is NumPy's, of the very inputs that the kernel
read. bfloat16 rounds by up to 2^-9 = 0.2 %: what is rounded once may be off by BOUND; z, e and the attention's own
residuals are rounded on the way, and what is made of them may be off by twice that.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np

from experiments.on_device.record import Prepared, Row

PATIENCE = 200.0
BOUND = 4e-3
SCALE = 1.5
REAL = {"8b q_o": (512, 4096, 4096, 16), "8b gate_up": (300, 4096, 14336, 64), "8b down": (256, 14336, 4096, 16)}
ATTENTION: dict[str, dict[str, Any]] = {
    "causal": {},
    "grouped heads": {"kv": 2},
    "segments": {"segments": 3},
    "window": {"window": 100},
    "segments, window, grouped": {"segments": 3, "window": 100, "kv": 2},
    "not causal": {"causal": False},
    "head size 64": {"d": 64, "kv": 2},
    "odd length": {"s": 333},
}


def keys(toy: bool) -> Iterator[Row]:
    """In the order of their worth."""
    from pallas_kernels.lora_matmul.shapes import SMALL

    if toy:
        yield {"op": "lora_matmul", "shape": "few rows"}
        yield {"op": "attention", "shape": "segments"}
        return
    for shape in (*REAL, *SMALL):
        yield {"op": "lora_matmul", "shape": shape}
    for shape in ("8b q_o", "even", "odd rows", "rank 256", "8b down"):
        yield {"op": "quant_lora_matmul", "shape": shape}
    for shape in ("even", "odd rows", "rank 64", "8b q_o"):
        yield {"op": "multi_lora_matmul", "shape": shape}
    for shape in ATTENTION:
        yield {"op": "attention", "shape": shape}


def ahead(key: Row) -> int:
    """So many prepare at one time."""
    return 14


Case = tuple[Callable[..., Any], tuple, Callable[[], dict[str, np.ndarray]]]


def prepare(key: Row, toy: bool, device: str) -> Prepared:
    """Compiles the cases of a key."""
    import jax

    made = dict(globals()[f"_{key['op']}"](key["shape"]))
    compiled = {name: jax.jit(function).lower(*args).compile() for name, (function, args, _) in made.items()}

    def measure() -> Row:
        found: dict[str, dict[str, Any]] = {}
        for name, (_, args, expected) in made.items():
            out, share = poisoned(compiled[name], args)
            errors = {
                part: distance(mine, right)
                for (part, right), mine in zip(expected().items(), jax.tree.leaves(out), strict=True)
            }
            found[name] = {"errors": errors, "poisoned": share}
        worst = max(max(case["errors"].values()) for case in found.values())
        return {"cases": found, "worst": worst, "right": bool(worst < 2 * BOUND)}

    return Prepared(measure, 2 << 30)


def distance(ours: Any, right: np.ndarray) -> float:
    """|ours - right| / |right|; infinite for what is not a number."""
    ours = np.asarray(ours).astype(np.float64)
    assert ours.shape == right.shape, f"{ours.shape} is not {right.shape}"
    error = float(np.linalg.norm(ours - right) / np.linalg.norm(right))
    return error if np.isfinite(error) else 1e30


def poisoned(compiled: Any, args: tuple) -> tuple[Any, float]:
    """(what it returns, the share of outputs whose memory held NaNs before)."""
    import jax
    import jax.numpy as jnp

    first = jax.block_until_ready(compiled(*args))
    shapes = [jax.ShapeDtypeStruct(x.shape, x.dtype) for x in jax.tree.leaves(first)]
    del first
    temporaries = int(compiled.memory_analysis().temp_size_in_bytes)
    bad = [jnp.full(s.shape, jnp.nan, s.dtype) for s in shapes] + [jnp.full(temporaries // 4 + 1, jnp.nan, jnp.float32)]
    jax.block_until_ready(bad)
    places = {_place(x) for x in bad} - {None}
    del bad
    out = jax.block_until_ready(compiled(*args))
    leaves = jax.tree.leaves(out)
    return out, sum(_place(x) in places for x in leaves) / len(leaves)


def _place(x: Any) -> int | None:
    try:
        return x.unsafe_buffer_pointer()
    except Exception:  # not every backend tells
        return None


def _sizes(shape: str) -> tuple[int, int, int, int]:
    from pallas_kernels.lora_matmul.shapes import SMALL

    if shape in REAL:
        return REAL[shape]
    return tuple(SMALL[shape][name] for name in ("rows", "n", "m", "r"))  # type: ignore[return-value]


def _arrays(*shapes: tuple[int, ...]) -> list[Any]:
    """Fresh random arrays in bfloat16, each of about the size of 1 / sqrt(its first axis), rows of about 1."""
    import jax.numpy as jnp

    rng = np.random.default_rng()
    return [
        jnp.asarray(rng.normal(size=shape) / (1 if i == 0 else shape[-2] ** 0.5), jnp.bfloat16)
        for i, shape in enumerate(shapes)
    ]


def _wide(*arrays: Any) -> list[np.ndarray]:
    return [np.asarray(x).astype(np.float64) for x in arrays]


def _with_gradients(function: Callable[..., Any]) -> Callable[..., Any]:
    """(dy, *differentiated, *others) -> (y, *gradients)."""
    import jax

    def run(dy, moved, *others):
        y, pull = jax.vjp(lambda *moved: function(*moved, *others), *moved)
        return y, *pull(dy)

    return run


def _lora(x, w, a, b, dy, *, kept, scale) -> dict[str, np.ndarray]:
    """Everything that is asked for, of float64 arrays; kept: the mask over 1 - rate, or 1."""
    low = scale * (x * kept) @ a
    e = scale * dy @ b.T
    return {
        "y": x @ w + low @ b,
        "dx": dy @ w.T + (e @ a.T) * kept,
        "da": (x * kept).T @ e,
        "db": low.T @ dy,
    }


def _lora_matmul(shape: str) -> Iterator[tuple[str, Case]]:
    import jax.numpy as jnp

    from pallas_kernels import dropout
    from pallas_kernels.lora_matmul import forward_into, lora_matmul
    from pallas_kernels.stacked import Stacked

    t, n, m, r = _sizes(shape)
    x, w, a, b, dy = _arrays((t, n), (n, m), (n, r), (r, m), (t, m))
    for rate in (0.0, 0.25):
        seed = jnp.int32(7)

        def product(x, a, b, w, seed, rate=rate):
            return lora_matmul(x, w, a, b, scale=SCALE, rate=rate, seed=seed)

        def expected(rate=rate, seed=seed):
            kept = np.asarray(dropout.mask(seed, (t, n), rate)) / (1 - rate) if rate else 1.0
            return _lora(*_wide(x, w, a, b, dy), kept=kept, scale=SCALE)

        yield f"dropout {rate}", (_with_gradients(product), (dy, (x, a, b), w, seed), expected)

    def in_place(x, w, a, b):
        stack = Stacked(jnp.full((3, t, m), 2, x.dtype), jnp.int32(1))
        stack, *_ = forward_into(x, w, a, b, jnp.int32(0), stack, scale=SCALE, rate=0.0)
        return stack[1], stack[0], stack[2]

    def around():
        y = _lora(*_wide(x, w, a, b, dy), kept=1.0, scale=SCALE)["y"]
        return {"y": y, "layer before": np.full_like(y, 2), "layer after": np.full_like(y, 2)}

    yield "written in a stack", (in_place, (x, w, a, b), around)


def _quant_lora_matmul(shape: str) -> Iterator[tuple[str, Case]]:
    from pallas_kernels import packed
    from pallas_kernels.quant_lora_matmul import quant_lora_matmul

    t, n, m, r = _sizes(shape)
    x, w, a, b, dy = _arrays((t, n), (n, m), (n, r), (r, m), (t, m))
    for name in packed.FUSED:
        kernel = packed.quantize(w, name)

        def product(x, a, b, kernel):
            return quant_lora_matmul(x, kernel, a, b, scale=SCALE)

        def expected(kernel=kernel):
            import jax.numpy as jnp

            whole = packed.dequantize(kernel, jnp.bfloat16)  # what is multiplied is rounded
            return _lora(*_wide(x, whole, a, b, dy), kept=1.0, scale=SCALE)

        yield name, (_with_gradients(product), (dy, (x, a, b), kernel), expected)


def _multi_lora_matmul(shape: str) -> Iterator[tuple[str, Case]]:
    import jax.numpy as jnp

    from pallas_kernels.multi_lora_matmul import multi_lora_matmul

    _, n, m, r = _sizes(shape)
    length, owners = (200 if shape == "odd rows" else 256), (2, 0, 2, 3)  # nobody is 1
    x, w, a, b, dy = _arrays((4, length, n), (n, m), (5, n, r), (5, r, m), (4, length, m))
    scales = np.array([0.5, 1.0, 1.5, 2.0, 1.0])

    def product(x, a, b, w, adapter):
        return multi_lora_matmul(x, w, a, b, adapter, scales=jnp.asarray(scales, jnp.float32))

    def expected():
        xs, whole, als, bs, dys = _wide(x, w, a, b, dy)
        rows = [_lora(xs[i], whole, als[g], bs[g], dys[i], kept=1.0, scale=scales[g]) for i, g in enumerate(owners)]
        sums = {"da": np.zeros_like(als), "db": np.zeros_like(bs)}
        for row, g in zip(rows, owners, strict=True):
            sums["da"][g] += row["da"]
            sums["db"][g] += row["db"]
        return {"y": np.stack([row["y"] for row in rows]), "dx": np.stack([row["dx"] for row in rows]), **sums}

    yield "5 adapters", (_with_gradients(product), (dy, (x, a, b), w, jnp.asarray(owners, jnp.int32)), expected)


def _attention(shape: str) -> Iterator[tuple[str, Case]]:
    import jax.numpy as jnp

    from pallas_kernels.attention import Where, attention

    options = {"s": 512, "d": 128, "kv": 4, "segments": 0, "window": None, "causal": True} | ATTENTION[shape]
    b, s, h, n, d = 2, options["s"], 4, options["kv"], options["d"]
    q, k, v, dy = _arrays((b, s, h, d), (b, s, n, d), (b, s, n, d), (b, s, h, d))
    k = k * 2  # scores that are not all alike
    segments = None
    if options["segments"]:
        rng = np.random.default_rng()
        segments = 1 + np.sort(rng.integers(0, options["segments"], (b, s)), axis=1).astype(np.int32)

    def function(q, k, v, segments):
        return attention(q, k, v, Where(None, None, segments, segments), d**-0.5, options["window"], options["causal"])

    expected = functools.partial(_exact_attention, q, k, v, dy, segments, options)
    yield (
        "both directions",
        (
            _with_gradients(function),
            (dy, (q, k, v), None if segments is None else jnp.asarray(segments)),
            expected,
        ),
    )


def _exact_attention(q, k, v, dy, segments, options) -> dict[str, np.ndarray]:
    q, k, v, dy = (x.transpose(0, 2, 1, 3) for x in _wide(q, k, v, dy))
    group, scale, s = q.shape[1] // k.shape[1], q.shape[-1] ** -0.5, q.shape[2]
    k, v = (x.repeat(group, axis=1) for x in (k, v))
    behind = np.arange(s)[:, None] - np.arange(s)
    seen = np.ones((1, 1, s, s), bool)
    if options["causal"]:
        seen = seen & (behind >= 0)
    if options["window"] is not None:
        seen = seen & (behind < options["window"])
    if segments is not None:
        seen = seen & (segments[:, None, :, None] == segments[:, None, None, :])
    scores = np.where(seen, scale * q @ k.swapaxes(2, 3), -np.inf)
    p = np.exp(scores - scores.max(-1, keepdims=True))
    p /= p.sum(-1, keepdims=True)
    out = p @ v
    dp = dy @ v.swapaxes(2, 3)
    ds = p * (dp - (dy * out).sum(-1, keepdims=True)) * scale
    own = lambda x: x.reshape(x.shape[0], x.shape[1] // group, group, *x.shape[2:]).sum(2)
    found = {
        "out": out,
        "dq": ds @ k,
        "dk": own(ds.swapaxes(2, 3) @ q),
        "dv": own(p.swapaxes(2, 3) @ dy),
    }
    return {name: x.transpose(0, 2, 1, 3) for name, x in found.items()}
