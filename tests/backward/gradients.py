"""Models of three small layers, their gradients, and what is kept for them."""

import functools

import jax
import jax.numpy as jnp
import numpy as np

import jaxpeft as jp
from jaxpeft import tree
from jaxpeft.backward import residuals
from jaxpeft.backward.segments import recorded
from tests import tiny

D, F, HEADS, LAYERS, RANK = 32, 56, 4, 3, 4  # of tiny.CONFIG
MHA = {"num_key_value_heads": HEADS}
QWEN2 = {"model_type": "qwen2", "use_sliding_window": True, "sliding_window": 4, "max_window_layers": 2}
MODELS = {
    "llama": {},
    "qwen3": {"model_type": "qwen3", "head_dim": 8},
    "windows by layer": QWEN2,
    "mistral": {"model_type": "mistral", "sliding_window": 5},
    "tied": {"tie_word_embeddings": True},
}
METHODS = {
    "lora": jp.lora(RANK),
    "lora_fa": jp.lora_fa(RANK),
    "lora_fa seed": jp.lora_fa(RANK, store_a=False),
    "full": jp.full(),
    "last:1": jp.full("last:1"),
    "dropout": jp.lora(RANK, dropout=0.3),
    "qlora": jp.chain(jp.quantize("int8"), jp.lora(RANK)),
}


def packed(rows=4):
    """Two documents in each row, and padding."""
    segments = np.array([[1] * 9 + [2] * 5 + [0] * 2, [1] * 3 + [2] * 13] * (rows // 2), np.int32)
    return {**tiny.batch(rows), "segment_ids": segments}


def start(method, dtype=jnp.float32, **changes):
    """(model, trainable, frozen), away from the start, where half of an adapter has no gradient."""
    base, params = tiny.model(dtype, **changes)
    model, trainable, frozen = jp.setup(method, base, params, jax.random.key(0))
    key = jax.random.key(3)
    moved = {p: x + 0.05 * jax.random.normal(key, x.shape, x.dtype) for p, x in trainable.items()}
    return model, moved, frozen


def loss(model, frozen, batch, key=None):
    return lambda trainable: jp.completion_loss(model, tree.combine(trainable, frozen), batch, key)[0]


def gradients(model, trainable, frozen, batch, key=None):
    return jax.jit(jax.value_and_grad(loss(model, frozen, batch, key)))(trainable)


@functools.cache
def plain(method, family):
    """((model, trainable, frozen), (value, gradients) by plain autodiff)."""
    made = start(METHODS[method], **MODELS[family])
    key = jax.random.key(9) if method == "dropout" else None
    return made, gradients(*made, packed(), key)


def same(found, wanted, tolerance=1e-5):
    """Values, and gradients relative to each leaf's largest entry."""
    np.testing.assert_allclose(found[0], wanted[0], rtol=tolerance)
    assert found[1].keys() == wanted[1].keys()
    for path, gradient in wanted[1].items():
        scale = np.abs(gradient).max()
        np.testing.assert_allclose(found[1][path], gradient, rtol=tolerance, atol=tolerance * scale, err_msg=path)


def segments(method, save, batch=None, dtype=jnp.float32, **changes):
    model, trainable, frozen = start(METHODS[method] if isinstance(method, str) else method, dtype, **changes)
    with recorded() as found:
        function = jax.grad(loss(residuals.remat(model, save), frozen, tiny.batch() if batch is None else batch))
        jax.eval_shape(function, trainable)
    return list(found.values())


def kept(segment):
    return sorted(name for name, _ in segment.actions)
