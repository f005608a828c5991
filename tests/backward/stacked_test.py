"""Frozen kernels of a step under a plan: a GPU's own kernels read them in the stack of all layers."""

import re

import pytest

import jaxpeft as jp
from jaxpeft.backward import loop
from jaxpeft.errors import InputError
from jaxpeft.memory import hlo, planner, targets
from jaxpeft.memory.dataflow import Dataflow
from jaxpeft.memory.movement import moves

LAYERS, D, F = 3, 640, 1408
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


@pytest.mark.usefixtures("optimised")
@pytest.mark.slow
def test_a_layer_is_taken_once_for_all_groups(monkeypatch, tmp_path):
    """Where products cannot read stacks; only a kernel that the backward pass reads once is taken by each group."""

    def sliced(name):
        """Bytes of kernels that are taken out of their stacks, in layers' kernels."""
        step = planner.make_step(CONFIG, jp.lora(rank=16), 3, 256, "blocks,tokens=256", packed=False)
        device = targets.target("rtx4090")
        targets.compile(device, step.function, step.state, step.batch, donate_argnums=0, dump=tmp_path / name)
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
def test_no_layer_is_copied_out_of_its_stack():
    """In the optimised program of an H200 no instruction makes a layer's kernel; custom calls get the stacks."""
    step = planner.make_step(CONFIG, jp.lora(rank=16), 3, 256, "matmuls", packed=False)
    target = targets.target("h200")
    try:
        targets.devices(target)
    except InputError as error:
        pytest.skip(str(error))
    program = targets.compile(target, step.function, step.state, step.batch, donate_argnums=0).executable.as_text()
    for n, m in ((D, D), (D, F), (F, D)):
        assert not re.findall(rf"^.* = .*bf16\[(?:1,)?{n},{m}\].*", program, re.MULTILINE)
        stacks = re.findall(rf"(%\S+) = bf16\[{LAYERS},{n},{m}\]", program)
        calls = [line for line in program.splitlines() if 'custom_call_target="mosaic_gpu' in line]
        assert sum(any(f"{stack}," in line for stack in stacks) for line in calls) >= 2, (n, m)
