"""What plans cost, by the compilers of a TPU v5p and an H200: against what is kept, counted by hand.

The value and gradient of one LoRA step, adapters in bf16, chunked cross-entropy, no optimizer. 16 rows of 1024 tokens:
what is kept is several times a TPU's on-chip memory (128 MiB), which the compiler's temporaries leave out.
"""

import functools
import importlib.util

import jax
import jax.numpy as jnp
import pytest

import jaxpeft as jp
from jaxpeft import tree
from jaxpeft.backward import residuals
from jaxpeft.memory import aot, targets
from jaxpeft.method import view_of
from jaxpeft.models import decoder, geometries

GiB, ALIGNMENT = 2**30, 1 << 20
D, F, HEADS, VOCAB, RANK = 512, 1376, 8, 1024, 64
ROWS, LENGTH, LAYERS = 16, 1024, 4
TOKENS, GROUP, CHUNK = ROWS * LENGTH, 2048, 512
SMALL = {
    "model_type": "llama",
    "vocab_size": VOCAB,
    "hidden_size": D,
    "intermediate_size": F,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": HEADS,
    "rms_norm_eps": 1e-5,
}

# Bytes per token and layer in bf16. A TPU may lay out the seven low-rank products in whole lanes of 128.
INPUT, STREAM, ATTENTION = 2 * D, 2 * D, 2 * D
READ = 2 * (3 * D + 2 * F)  # q, k, v, gate, up
LOW, LSE = 7 * 2 * 128, 4 * HEADS
CODES = READ // 2 + 5 * 4 + 2 * READ / LENGTH  # a byte per number, a scale per token, two numbers per row and channel
ON_DEVICE = {
    "matmuls": INPUT + STREAM + ATTENTION + READ + LOW + LSE,
    "blocks": INPUT,
    "offload": INPUT + LOW + LSE,
    "compressed": INPUT + STREAM + CODES + LOW,
    "compressed12": (INPUT + STREAM + ATTENTION + READ) * (12 + 8 / 128) / 16 + LOW + LSE,
    "compressed4": (INPUT + STREAM + READ - 4 * D) * 4.5 / 16 + 2 * (D + 4 + 4 * D / LENGTH) + LOW,
}
# While one group passes one layer: all that it computes (12 arrays of d, 3 of f), with cotangents, in float32.
WORK = GROUP * 2 * 4 * (12 * D + 3 * F)
# Beside the layers: the stream and its cotangent before and after a loop, and a chunk's logits and theirs.
REST = 4 * TOKENS * 2 * D + 2 * 4 * CHUNK * VOCAB


pytestmark = pytest.mark.usefixtures("optimised")
# A TPU's compiler takes most of a minute for each of these programs: one of the presets is compiled for it by default,
# the others and a whole 7B step, of whose kind the H200's are, with `make test-slow`.
SLOWLY = pytest.param("v5p", marks=pytest.mark.slow)


def memory(name, config, save, rows=ROWS, length=LENGTH):
    """The compiler's figures for one step on a described device."""
    target = targets.target(name)
    if target.platform == "tpu":
        pytest.importorskip("libtpu")
    if target.platform == "cuda" and not importlib.util.find_spec("jax_plugins"):
        pytest.skip("no CUDA plugin")
    method = jp.lora(RANK)
    base = decoder.from_hf(config, jnp.bfloat16)
    model = method.forward(base, view_of(base, method, {}))
    params = jax.eval_shape(lambda key: model.init(key, {}), jax.random.key(0))
    params = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, jnp.bfloat16), params)
    trainable, frozen = tree.split(params, method.trainable)
    model = residuals.remat(model, save)
    ids = jax.ShapeDtypeStruct((rows, length), jnp.int32)
    weights = jax.ShapeDtypeStruct((rows, length), jnp.float32)
    batch = {"tokens": ids, "targets": ids, "loss_weights": weights}

    def step(trainable, frozen, batch):
        def loss(trainable):
            return jp.completion_loss(model, tree.combine(trainable, frozen), batch)[0]

        return jax.value_and_grad(loss)(trainable)

    return aot.compile(target, step, trainable, frozen, batch).memory


@functools.cache
def small(name, save, layers=LAYERS):
    return memory(name, {**SMALL, "num_hidden_layers": layers}, save)


QUICK = [("h200", "blocks"), ("h200", "compressed12")]
OTHERS = [(name, save) for name in ("h200", "v5p") for save in ON_DEVICE if (name, save) not in QUICK]
PRESETS = [*QUICK, *(pytest.param(*preset, marks=pytest.mark.slow) for preset in OTHERS)]


@pytest.mark.parametrize(("name", "save"), PRESETS)
def test_a_preset_needs_what_it_keeps_and_one_group_of_one_layer(name, save):
    found = small(name, save)
    assert found.temporaries <= LAYERS * TOKENS * ON_DEVICE[save] + WORK + REST
    there = ATTENTION + STREAM + READ if save == "offload" else 0
    assert found.host == LAYERS * TOKENS * there


@pytest.mark.slow
@pytest.mark.parametrize("name", ["v5p", "h200"])
def test_plain_autodiff_needs_far_more(name):
    """Inputs of all adapters, and float32 inside the rotation: at least half as much again."""
    assert small(name, "everything").temporaries > 1.5 * small(name, "matmuls").temporaries


@pytest.mark.slow
@pytest.mark.parametrize("name", ["v5p", "h200"])
def test_more_layers_cost_their_inputs(name):
    """Gradients are outputs. 16 layers' inputs are too large for a TPU's on-chip memory; kernels that would fit there,
    attention's of all layers, its compiler copies into the order in which both loops read them."""
    few, many = small(name, "blocks", 16), small(name, "blocks", 32)
    copies = 16 * 4 * 2 * D * D if name == "v5p" else 0
    assert many.temporaries - few.temporaries <= 16 * TOKENS * INPUT + copies + ALIGNMENT


@pytest.mark.parametrize("name", [SLOWLY, "h200"])
def test_the_7b_reference_step(name):
    """Llama-2-7B, batch 16 x 1024, LoRA of rank 64 on all linear maps, bf16, `matmuls`: 45.9 GiB are kept by hand
    (12 d + 4 f and the low-rank products); work and loss must do with the 0.9 GiB that are left to 46.8."""
    d, f, layers = 4096, 11008, 32
    kept = 16 * 1024 * layers * (12 * d + 4 * f + 7 * 2 * RANK)
    assert 45.8 < kept / GiB < 46
    found = memory(name, geometries.load("llama2-7b"), "matmuls")
    assert kept / GiB < found.temporaries / GiB <= 46.8
    assert found.host == 0


@pytest.mark.slow
def test_the_7b_reference_step_in_4_bits():
    """28,424 bytes per token and layer (docs/bytes.md), 13.9 GiB, and what is left to 15 for work and loss."""
    found = memory("h200", geometries.load("llama2-7b"), "compressed4")
    assert 13.8 < found.temporaries / GiB <= 15
    assert found.host == 0


@pytest.mark.slow
def test_the_7b_reference_step_in_12_bits():
    """Three quarters of what is kept there, and a byte for 128 numbers; nothing is computed again but elementwise."""
    found = memory("h200", geometries.load("llama2-7b"), "compressed12")
    assert found.temporaries / GiB <= 35.5
    assert found.host == 0
