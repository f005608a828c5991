"""Step 3: does the plan tell the truth? Predicted against measured peak of whole train steps.

Predicted is what `jaxpeft plan` says: the step of `jaxpeft train`, compiled for the described device from shapes alone.
Measured is the allocator's peak in a process of its own, whose arguments are those of the plan, after two steps from
random numbers; `compiled_here` is what the same compiler says when it has the device at hand and may try kernels.

Llama-3.2-1B's geometry at 8 x 2048 tokens, Llama-3.1-8B's at 4 x 2048, rank 16, bfloat16, by full, lora, lora_fa and
meft under each plan, by the others under `matmuls`, or `blocks` where there is no backward pass. A step that is
predicted not to fit is not run.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import Any

from experiments.on_device.record import Prepared, Row

PATIENCE = 300.0
SIZES = {"llama3.1-8b": (4, 2048), "llama3.2-1b": (8, 2048), "toy": (2, 64)}
EVERY = ("matmuls", "blocks", "offload", "compressed")
METHODS = {
    **dict.fromkeys(("lora", "full", "lora_fa"), EVERY),
    "meft": ("everything",),
    "quantize+lora": ("matmuls", "blocks"),
    **dict.fromkeys(("dora", "lisa", "galore", "prefix", "quantize+dora"), ("matmuls",)),
    **dict.fromkeys(("mezo", "mezo+lora"), ("blocks",)),
}
RANKED = ("lora", "lora_fa", "dora")  # get rank 16
BESIDES = 2 << 30  # bytes that a process takes beside its step, at most


def keys(toy: bool) -> Iterator[Row]:
    """In the order of their worth."""
    if toy:
        yield {"geometry": "toy", "rows": 2, "length": 64, "method": "lora", "save": "matmuls"}
        return
    for plans in (("matmuls", "everything"), *EVERY[1:]):
        for geometry, (method, own) in itertools.product(("llama3.1-8b", "llama3.2-1b"), METHODS.items()):
            rows, length = SIZES[geometry]
            for save in [save for save in own if save in plans]:
                yield {"geometry": geometry, "rows": rows, "length": length, "method": method, "save": save}


def ahead(key: Row) -> int:
    """So many prepare at one time."""
    return 7


def target_of(device: str) -> Any:
    """The target of `jaxpeft plan` that a device is; None if it is none."""
    from jaxpeft.memory import targets
    from jaxpeft.memory.kinds import TARGETS

    return next((targets.target(name) for name, kind in TARGETS.items() if device in kind.names), None)


def config_of(geometry: str) -> dict[str, Any]:
    """A parsed config.json; "toy" is that of the embedded model."""
    from jaxpeft import assets
    from jaxpeft.models import geometries

    return geometries.load(str(assets.MODEL) if geometry == "toy" else geometry)


def step_of(key: Row) -> Any:
    """The planner's step for a key."""
    from jaxpeft import recipe
    from jaxpeft.memory import planner

    ranks = {f"{name}.rank": 16 for name in key["method"].split("+") if name in RANKED}
    method = recipe.parse(key["method"], ranks)
    sizes = key["rows"], key["length"]
    return planner.make_step(config_of(key["geometry"]), method, *sizes, key["save"], packed=False)


def prepare(key: Row, toy: bool, device: str) -> Prepared:
    """Compiles the step, for the device as it is described and as it is."""
    from jaxpeft.memory import planner

    step, target = step_of(key), target_of(device)
    predicted: Row = {}
    if target is not None:
        made = planner.row(step, target)
        predicted = {"target": target.name, "predicted": made["bytes"]["total"], "host": made["host_bytes"]}
        predicted["fits"] = bool(made["fits"])
        if not made["fits"]:
            return Prepared(lambda: {**predicted, "measured": None})
    run = compiled(step)
    return Prepared(lambda: {**predicted, **run.measure()}, predicted.get("predicted", 0) + BESIDES)


def compiled(step: Any, times: int = 2) -> Prepared:
    """A step, compiled for the attached device; measuring runs it so often and reads the allocator's peak."""
    import jax

    from jaxpeft import compilation
    from jaxpeft.train.step import in_place

    lowered = jax.jit(in_place(step.function), donate_argnums=0).lower(*step.state.parted, step.batch)
    executable = compilation.compiled(lowered)
    analysis = executable.memory_analysis()
    here = analysis.argument_size_in_bytes + analysis.output_size_in_bytes - analysis.alias_size_in_bytes
    here += analysis.temp_size_in_bytes

    def measure() -> Row:
        from jaxpeft.errors import InputError
        from jaxpeft.memory import resident

        state, batch = filled(step.state), filled(step.batch)
        before = (jax.devices()[0].memory_stats() or {}).get("peak_bytes_in_use")
        changing, frozen = state.parted
        for _ in range(times - 1):
            changing, _ = executable(changing, frozen, batch)
        try:
            peak = resident.measured_peak(executable, changing, frozen, batch)
        except InputError:  # a CPU counts nothing
            peak = None
        return {"measured": peak, "compiled_here": int(here), "peak_before": before}

    return Prepared(measure, int(here) + BESIDES)


def filled(tree: Any) -> Any:
    """Arrays of small random numbers in place of shapes, leaf by leaf; keys are a key, integers zeros."""
    import jax
    import jax.numpy as jnp

    def fill(key, shape, dtype):
        return (jax.random.uniform(key, shape, dtype) - 0.5) * jnp.asarray(0.06, dtype)

    fill = jax.jit(fill, static_argnums=(1, 2))

    def leaf(i, x):
        if jnp.issubdtype(x.dtype, jax.dtypes.prng_key):
            return jax.random.key(0)
        if not jnp.issubdtype(x.dtype, jnp.floating):
            return jnp.zeros(x.shape, x.dtype)
        return fill(jax.random.key(i), x.shape, x.dtype)

    leaves, treedef = jax.tree.flatten(tree)
    return jax.block_until_ready(treedef.unflatten([leaf(i, x) for i, x in enumerate(leaves)]))
