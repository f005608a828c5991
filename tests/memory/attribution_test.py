"""Steps under the residual engine: what the compiler's buffers say is kept is what the engine says it keeps."""

import jax
import pytest

import jaxpeft as jp
from jaxpeft.errors import InputError
from jaxpeft.memory import aot, planner, profile, targets
from jaxpeft.train.step import in_place

# What is kept has to be too large for a TPU's VMEM, which is no part of the profile.
CONFIG = {
    "model_type": "llama",
    "vocab_size": 1024,
    "hidden_size": 512,
    "intermediate_size": 1408,
    "num_hidden_layers": 8,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "max_position_embeddings": 1024,
    "rms_norm_eps": 1e-5,
}
ROWS, LENGTH = 16, 1024


pytestmark = pytest.mark.usefixtures("optimised")


def profiled(target, dump, method, save, **more):
    step = planner.make_step(CONFIG, method, ROWS, LENGTH, save, **more)
    device = targets.target(target)
    try:
        targets.devices(device)
    except InputError as error:
        pytest.skip(str(error))
    cost = planner.cost(step)
    args = (*step.state.parted, step.batch)
    aot.compile(device, in_place(step.function), *args, donate_argnums=0, dump=dump)
    metrics = jax.eval_shape(step.function, step.state, step.batch)[1]
    return step, cost, profile.read(dump, profile.step_owners(step.state, step.batch, step.base, metrics))


@pytest.mark.parametrize("target", ["h200", pytest.param("v5p", marks=pytest.mark.slow)])
def test_lora_keeps_what_the_plan_says(target, tmp_path):
    _, cost, found = profiled(target, tmp_path, jp.lora(rank=16, targets="all-linear"), "matmuls")
    assert found.unattributed_bytes <= 0.02 * found.live_bytes
    assert found.categories["saved activations"] == pytest.approx(cost.activations, rel=0.05)
    kept = {}
    for buffer in found.buffers:
        if buffer.category == "saved activations":
            kept[buffer.activation] = kept.get(buffer.activation, 0) + buffer.bytes
    # By hand: 12 d + 4 f bytes for each token and layer, besides the low-rank products and the log-sum-exp.
    tokens, d, f = ROWS * LENGTH * CONFIG["num_hidden_layers"], CONFIG["hidden_size"], CONFIG["intermediate_size"]
    stream = ("block_input", "q_proj", "k_proj", "v_proj", "attention", "o_proj")
    exact = dict.fromkeys(stream, 2 * tokens * d) | dict.fromkeys(("gate_proj", "up_proj"), 2 * tokens * f)
    assert {name: kept.get(name) for name in exact} == exact
    (gate,) = [b for b in found.buffers if b.activation == "gate_proj" and b.category == "saved activations"]
    assert gate.module == "layers/mlp/gate_proj"


def test_full_fine_tuning_has_the_gradients_of_its_leaves(tmp_path):
    step, cost, found = profiled("h200", tmp_path, jp.full(), "blocks")
    assert found.unattributed_bytes <= 0.02 * found.live_bytes
    kept = {b.activation: b.bytes for b in found.buffers if b.category == "saved activations" and b.activation}
    assert kept == {"block_input": cost.activations}  # and nothing of the loss, whose gradient is taken in it
    gradients = {buffer.module: buffer.bytes for buffer in found.buffers if buffer.category == "gradients"}
    exact = {path: leaf.size * leaf.dtype.itemsize for path, leaf in step.state.trainable.items()}
    of_layers = [path for path in exact if path.startswith("layers/")]
    assert {path: gradients.get(path) for path in of_layers} == {path: exact[path] for path in of_layers}


@pytest.mark.slow
def test_micro_batches_have_gradients_twice(tmp_path):
    """Those of the micro-batch, and the sum."""
    step, _, found = profiled("v5p", tmp_path, jp.full(), "blocks", accumulate=2)
    assert found.unattributed_bytes <= 0.02 * found.live_bytes
    gradients = {}
    for buffer in found.buffers:
        if buffer.category == "gradients":
            gradients.setdefault(buffer.module, []).append(buffer.bytes)
    for path, leaf in step.state.trainable.items():
        if path.endswith("_proj/kernel"):  # the small ones may be in VMEM
            assert gradients[path] == [leaf.size * leaf.dtype.itemsize] * 2, path
