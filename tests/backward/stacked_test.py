"""Frozen kernels of a step under a plan: a GPU's own kernels read them in the stack of all layers."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.ad_checkpoint import checkpoint_name

import jaxpeft as jp
from jaxpeft.backward import loop, passes
from jaxpeft.errors import InputError
from jaxpeft.memory import aot, hlo, planner, targets
from jaxpeft.memory.dataflow import Dataflow
from jaxpeft.memory.movement import moves
from jaxpeft.model import Context

LAYERS, ROWS, D, F = 3, 3, 640, 1408
CONFIG = {
    "model_type": "llama",
    "vocab_size": 1024,
    "hidden_size": D,
    "intermediate_size": F,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 5,
    "num_key_value_heads": 5,
    "max_position_embeddings": 1024,
    "rms_norm_eps": 1e-5,
}


@pytest.mark.parametrize("save", ["blocks", "inner=save,outer=save"])
@pytest.mark.parametrize("tokens", [4, 64])
def test_a_stream_that_lies_in_what_is_kept_changes_nothing(monkeypatch, save, tokens):
    """Outputs and gradients are bit-equal to those of a stream of its own, with groups of rows and without."""
    keys = jax.random.split(jax.random.key(0), 3)
    params = {name: 0.3 * jax.random.normal(key, (LAYERS, 8, 8)) for name, key in zip("ab", keys, strict=False)}
    x = jax.random.normal(keys[2], (4, 4, 8))

    def block(layer, x, ctx):
        return x + checkpoint_name(jnp.tanh(checkpoint_name(x @ layer["a"], "inner")) @ layer["b"], "outer")

    def loss(params, x):
        y = jp.planned_scan(block, params, x, Context(), save=f"{save},tokens={tokens}")
        return jnp.sum(y**2), y

    monkeypatch.setattr(loop, "nests", lambda: True)  # as on a GPU
    found = []
    for flows in (True, False):
        monkeypatch.setattr(passes, "flows", lambda flows=flows: flows)
        step = jax.value_and_grad(lambda *args: loss(*args), argnums=(0, 1), has_aux=True)
        found.append(jax.jit(step)(params, x))
    jax.tree.map(np.testing.assert_array_equal, *found)


@pytest.mark.usefixtures("optimised")
@pytest.mark.slow
def test_a_layer_is_taken_once_for_all_groups(monkeypatch, tmp_path):
    """Where products cannot read stacks; only a kernel that the backward pass reads once is taken by each group."""

    def sliced(name):
        """Bytes of kernels that are taken out of their stacks, in layers' kernels."""
        step = planner.make_step(CONFIG, jp.lora(rank=16), 3, 256, "blocks,tokens=256", packed=False)
        device = targets.target("rtx4090")
        aot.compile(device, step.function, step.state, step.batch, donate_argnums=0, dump=tmp_path / name)
        found, _ = moves(Dataflow(hlo.read(tmp_path / name)))
        size = sum(m.times * sum(a.bytes for a in m.writes) for m in found if m.kind == "copy: slice")
        return size / (2 * LAYERS * (4 * D * D + 3 * D * F))

    try:
        targets.devices(targets.target("rtx4090"))
    except InputError as error:
        pytest.skip(str(error))
    nested = sliced("nested")
    monkeypatch.setattr(loop, "nests", lambda: False)
    flat = sliced("flat")
    assert flat > 6  # three groups, two passes
    assert nested < 3.5, (nested, flat)


@pytest.mark.usefixtures("optimised")
def test_no_layer_is_copied_out_of_its_stack(tmp_path):
    """In the optimised program of an H200 no instruction makes a layer's kernel; custom calls get the stacks.

    Nor does one copy the stream: a block writes what comes into the next one where it is kept, and reads it there.
    """
    step = planner.make_step(CONFIG, jp.lora(rank=16), ROWS, 256, "matmuls,tokens=256", packed=False)
    target = targets.target("h200")
    try:
        targets.devices(target)
    except InputError as error:
        pytest.skip(str(error))
    args = (step.function, step.state, step.batch)
    program = aot.compile(target, *args, donate_argnums=0, dump=tmp_path).executable.as_text()
    for n, m in ((D, D), (D, F), (F, D)):
        assert not re.findall(rf"^.* = .*bf16\[(?:1,)?{n},{m}\].*", program, re.MULTILINE)
        stacks = re.findall(rf"(%\S+) = bf16\[{LAYERS},{n},{m}\]", program)
        calls = [line for line in program.splitlines() if 'custom_call_target="mosaic_gpu' in line]
        assert sum(any(f"{stack}," in line for stack in stacks) for line in calls) >= 2, (n, m)
    found, _ = moves(Dataflow(hlo.read(tmp_path)))
    # Only what enters the layers is put there, before the loop and after it, and what leaves them taken out.
    own = [m for m in found if "block_input" in m.instruction.op_name and m.kind.startswith("copy")]
    assert all(m.times == 1 for m in own), own
    forward = [m for m in found if m.times == LAYERS * ROWS and "transpose" not in m.instruction.op_name]
    assert any("save:block_input" in m.instruction.op_name for m in forward)
