"""Step 2: a LoRA layer beside its frozen product, the card's ceilings, and the kernels' tiles.

For the linear maps of Llama-3-8B, Llama-2-7B and 70B, bfloat16, each in one process: (frozen) x W alone in JAX; (xla)
LoRA in plain JAX; (ours) lora_matmul; (nf4) quant_lora_matmul, (nf4 xla) in plain JAX; (peft) peft's LoRA layer,
adapters in bfloat16, without dropout. `forward` is y, `both` adds dx (for LoRA dA and dB too). Functions take turns;
figures are seconds of a call, one for each round (pallas_kernels/timing.py).

`multi` rows are eight adapters in one batch: (ours) one adapter for all rows, (multi) multi_lora_matmul, (multi xla) in
plain JAX, (ragged_dot) sorted by adapter, all ranks padded, as SkyRL's JAX backend does it.

`tune` rows time the candidates of every kernel of a map and give the fastest, an entry of the tables that
pallas_kernels/tuning.py reads. `ceiling` is what the card can do in the same run: a product of 8192^3 in bfloat16 on
random numbers, by JAX and by PyTorch, and a copy.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from experiments.on_device.record import Prepared, Row, missing

PATIENCE = 240.0
ROUNDS, INNER = 15, 5
MODELS, RANKS, ROWS = ("llama3-8b", "llama3-70b", "llama2-7b"), (16, 64), (8192, 2048, 16384, 65536)
TUNED_ROWS = (2048, 8192)


def keys(toy: bool) -> Iterator[Row]:
    """In the order of their worth."""
    from pallas_kernels.lora_matmul.shapes import MODELS as SHAPES

    if toy:
        yield {"kind": "ceiling"}
        yield {"kind": "tune", "model": "llama3-1b", "map": "k_v", "rank": 16, "rows": 64}
        yield {"kind": "layer", "model": "llama3-1b", "map": "k_v", "rank": 16, "rows": 64}
        return
    yield {"kind": "ceiling"}
    for rows, rank in itertools.product(TUNED_ROWS, RANKS):
        for shape in SHAPES["llama3-8b"]:
            yield {"kind": "tune", "model": "llama3-8b", "map": shape.name, "rank": rank, "rows": rows}
    for name in ("q_o", "gate_up"):
        yield {"kind": "multi", "model": "llama3-8b", "map": name, "rank": 16, "rows": 8192}
    for model, rows, rank in itertools.product(MODELS, ROWS, RANKS):
        for shape in SHAPES[model]:
            yield {"kind": "layer", "model": model, "map": shape.name, "rank": rank, "rows": rows}


def ahead(key: Row) -> int:
    """So many prepare at one time; what they hold in memory must fit."""
    return 3 if key.get("rows", 0) > 16384 else 1 if key["kind"] == "ceiling" else 14


def prepare(key: Row, toy: bool, device: str) -> Prepared:
    """Compiles what a key times."""
    return Prepared({"ceiling": _ceiling, "tune": _tune, "layer": _layer, "multi": _multi}[key["kind"]](key, toy))


def _shape(key: Row) -> Any:
    from pallas_kernels.lora_matmul.shapes import MODELS as SHAPES

    return next(shape for shape in SHAPES[key["model"]] if shape.name == key["map"])


# Ceilings.


def _ceiling(key: Row, toy: bool) -> Callable[[], Row]:
    import jax
    import jax.numpy as jnp

    from pallas_kernels import timing

    n, size = (256, 2**16) if toy else (8192, 2**30)
    x, y = (jax.random.normal(jax.random.key(i), (n, n), jnp.bfloat16) for i in range(2))
    big = jax.random.normal(jax.random.key(2), (size,), jnp.bfloat16)
    multiply, copy = jax.jit(lambda x, y: x @ y), jax.jit(lambda x: -x)
    functions: dict[str, Callable[[], Any]] = {"product": lambda: multiply(x, y), "copy": lambda: copy(big)}
    if not missing(["torch"]):
        import torch

        device = "cuda" if torch.cuda.is_available() else "cpu"
        z = torch.randn(n, n, device=device).to(torch.bfloat16)
        functions["product, PyTorch"] = lambda: z @ z
    for function in functions.values():
        timing.wait(function())

    def measure() -> Row:
        times = timing.paired(functions, 3 if toy else 20, 1 if toy else 10)
        found = {name: 2 * n**3 / times.median(name) for name in functions if name != "copy"}
        return {"flops": found, "bandwidth": 2 * big.nbytes / times.median("copy"), "seconds": times.seconds}

    return measure


# Tiles.


def _tune(key: Row, toy: bool) -> Callable[[], Row]:
    import jax.numpy as jnp

    from pallas_kernels import timing, tune

    runs: list[tuple[str, str, int, dict[Any, Callable[[], Any]]]] = []
    for name, sizes, candidates in tune.candidates(_shape(key), key["rank"], key["rows"], jnp.bfloat16):
        runs.append((name, sizes.key, sizes.rows, candidates))

    def measure() -> Row:
        entries, seconds = [], {}
        for name, of, rows, candidates in runs:
            times = timing.paired(candidates, 5, 3)
            best = min(candidates, key=times.median)
            entries.append([name, of, rows, best._asdict()])
            seconds[f"{name} {of}"] = {str(tuple(config)): times.median(config) for config in candidates}
        return {"entries": entries, "seconds": seconds}

    return measure


def table(rows: list[Row], device: str) -> dict[str, Any]:
    """The tuned tiles of the `tune` rows, as pallas_kernels/tuning.py reads them."""
    found: dict[str, Any] = {}
    for row in rows:
        for name, key, count, config in row.get("entries", ()):
            entries = found.setdefault(device, {}).setdefault(name, {}).setdefault(key, [])
            if not any(count == other for other, _ in entries):
                entries.append([count, config])
    return found


# Layers.


def _layer(key: Row, toy: bool) -> Callable[[], Row]:
    import jax.numpy as jnp

    from pallas_kernels import timing
    from pallas_kernels.lora_matmul import bench as dense
    from pallas_kernels.quant_lora_matmul import bench as quantized

    shape, rank, rows = _shape(key), key["rank"], key["rows"]
    groups: dict[str, dict[str, Any]] = dense.functions(shape, rank, rows, jnp.bfloat16)
    packed = quantized.functions(shape, rank, rows, jnp.bfloat16)
    theirs: Mapping[str, Any] = {} if missing(["torch", "peft"]) else peft_functions(shape, rank, rows)
    failed = {}
    for of, group in groups.items():
        group |= {name: packed[of][name] for name in ("nf4", "nf4 xla")}
        if theirs:
            group["peft"] = theirs[of]
        for function in [*group]:
            try:
                timing.wait(group[function]())
            except Exception as error:  # one that does not compile leaves the others
                failed[f"{of} {function}"] = str(error).strip().splitlines()[0][:200]
                del group[function]

    def measure() -> Row:
        rounds, inner = (2, 1) if toy else (ROUNDS, INNER)
        return {
            "n": shape.n,
            "m": shape.m,
            "seconds": {of: _short(timing.paired(group, rounds, inner).seconds) for of, group in groups.items()},
            **({"failed_functions": failed} if failed else {}),
            **({} if theirs else {"without": ["torch", "peft"]}),
        }

    return measure


def _multi(key: Row, toy: bool) -> Callable[[], Row]:
    import jax.numpy as jnp

    from pallas_kernels import timing
    from pallas_kernels.multi_lora_matmul import bench

    groups = bench.functions(_shape(key), key["rank"], key["rows"], jnp.bfloat16)
    for group in groups.values():
        for function in group.values():
            timing.wait(function())

    def measure() -> Row:
        return {"seconds": {of: _short(timing.paired(group, ROUNDS, INNER).seconds) for of, group in groups.items()}}

    return measure


def _short(seconds: Mapping[str, Any]) -> dict[str, list[float]]:
    """With four digits."""
    return {name: [float(f"{value:.4g}") for value in values] for name, values in seconds.items()}


def peft_functions(shape: Any, rank: int, rows: int, dtype: str = "bfloat16") -> dict[str, Any]:
    """{pass: function} of peft's LoRA layer, on the GPU if there is one."""
    import torch
    from peft import LoraConfig
    from peft.tuners.lora import Linear

    device = "cuda" if torch.cuda.is_available() else "cpu"
    kind = getattr(torch, dtype)
    base = torch.nn.Linear(shape.n, shape.m, bias=False, device=device, dtype=kind).requires_grad_(False)
    config = LoraConfig(r=rank, lora_alpha=2 * rank, lora_dropout=0.0)
    try:
        layer = Linear(base, "default", config=config, r=rank, lora_alpha=2 * rank)
    except TypeError:  # peft before 0.19 takes the fields alone
        layer = Linear(base, "default", r=rank, lora_alpha=2 * rank)  # type: ignore[call-arg]
    layer = layer.to(device=device, dtype=kind)
    x = torch.randn(rows, shape.n, device=device, dtype=kind, requires_grad=True)
    dy = torch.randn(rows, shape.m, device=device, dtype=kind)
    trained = [x, *(p for p in layer.parameters() if p.requires_grad)]

    def both():
        y = layer(x)
        torch.autograd.grad(y, trained, dy)
        return y

    def forward():
        with torch.no_grad():
            return layer(x)

    return {"forward": forward, "both": both}
