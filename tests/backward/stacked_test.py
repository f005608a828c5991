"""Frozen kernels of a step under a plan: a GPU's own kernels read them in the stack of all layers."""

import re

import pytest

import jaxpeft as jp
from jaxpeft.errors import InputError
from jaxpeft.memory import planner, targets

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
