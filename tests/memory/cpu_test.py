"""A step on a CPU: what it holds in which type, and that it takes what was planned."""

import json
import re
import subprocess
import sys

import jax
import jax.numpy as jnp
import pytest

import jaxpeft as jp
from jaxpeft import compilation
from jaxpeft.memory import planner, targets
from tests import tiny, virtual

pytestmark = pytest.mark.usefixtures("optimised")

CPU, LAYERS = targets.target("cpu"), 5


@pytest.fixture(scope="module")
def narrow():
    """(step, its executable as it runs) in bfloat16, of which nothing but adapters and norms is in float32."""
    before = jax.config.read("jax_disable_most_optimizations")
    jax.config.update("jax_disable_most_optimizations", False)
    config = {**tiny.CONFIG, "num_hidden_layers": LAYERS}
    step = planner.make_step(config, jp.lora(rank=2), 2, 48, "matmuls", jnp.bfloat16)
    yield step, compilation.compiled(jax.jit(step.function, donate_argnums=0).lower(step.state, step.batch))
    jax.config.update("jax_disable_most_optimizations", before)


def test_no_stack_is_widened_by_a_bfloat16_step(narrow):
    """Neither those of frozen kernels nor those of kept arrays: no loop carries in float32 what there is in 16 bits."""
    step, executable = narrow
    kernels = {x.shape for x in jax.tree.leaves(step.state) if x.dtype == jnp.bfloat16 and x.ndim == 3}
    carried = "".join(re.findall(r"= \((.*?)\) while\(", executable.as_text()))
    stacks = {
        dtype: {
            tuple(map(int, shape.split(","))) for shape in re.findall(rf"\b{dtype}\[({LAYERS},\d[\d,]*)\]", carried)
        }
        for dtype in ("bf16", "f32")
    }
    kept = stacks["bf16"] - kernels
    assert kernels <= stacks["bf16"] and any(len(shape) > 3 for shape in kept)
    assert not (stacks["bf16"] & stacks["f32"])


def test_a_kept_part_is_put_in_its_place_in_16_bits(narrow):
    """Not by widening all layers' parts to replace one's, which a loop would do that fuses the two conversions."""
    step, executable = narrow
    rows, length = step.batch["tokens"].shape
    kept = rf"\[{LAYERS},{rows},{length},\d+\]"
    assert re.search(rf"= u16{kept}\S* dynamic-update-slice", executable.as_text())
    assert not re.search(rf"= f32{kept}\S* dynamic-update-slice", executable.as_text())


def test_what_is_planned_is_what_runs(narrow):
    step, executable = narrow
    planned = planner.row(step, CPU)["bytes"]
    assert planned["temporaries"] == executable.memory_analysis().temp_size_in_bytes


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [pytest.param("float32", marks=pytest.mark.slow), "bfloat16"])
def test_a_step_takes_what_was_planned(dtype):
    """In a process of its own, as a user's, whose allocator keeps nothing of other work; at a size beside which the few
    MiB do not count that it takes for its threads.
    """
    flags = ["--target", "cpu", "--check", "--json", "--rank", "8", "--batch-size", "16", "--seq-len", "256"]
    own = {name: value for name, value in virtual.devices(1).items() if name != "JAX_DISABLE_MOST_OPTIMIZATIONS"}
    command = [sys.executable, "-m", "jaxpeft", "plan", *flags, "--dtype", dtype]
    done = subprocess.run(command, env=own, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    (row,) = json.loads(done.stdout)["rows"]
    assert row["measured_bytes"] == pytest.approx(row["bytes"]["total"], rel=0.1)
