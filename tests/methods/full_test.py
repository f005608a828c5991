"""Full fine-tuning and its parts."""

import jax
import numpy as np
import optax
import pytest

import jaxpeft as jp
from jaxpeft import tree
from tests import residuals, tiny


def start(which, **changes):
    base, params = tiny.model(**changes)
    return jp.setup(jp.full(which), base, params, jax.random.key(0))


@pytest.mark.parametrize(
    ("which", "paths"),
    [
        ("biases", {f"layers/self_attn/{name}_proj/bias" for name in "qkvo"}),
        ("norms", {"norm/scale", "layers/input_layernorm/scale", "layers/post_attention_layernorm/scale"}),
        ("head", {"norm/scale", "lm_head/kernel"}),
        ("embeddings", {"embed_tokens/embedding"}),
        ("mlp/down", {"layers/mlp/down_proj/kernel"}),
    ],
)
def test_parts(which, paths):
    _, trainable, _ = start(which, attention_bias=True)
    assert set(trainable) == paths


@pytest.mark.parametrize("count", [1, 2, 3])
def test_last_layers(count):
    """The last K layers are a segment of their own; the cut changes no logit, and merging undoes it."""
    base, params = tiny.model()
    model, trainable, frozen = start(f"last:{count}")
    assert {path.split("/")[0] for path in trainable} == {"layers" if count == 3 else f"layers_{3 - count}_3"}
    assert all(leaf.shape[0] == count for leaf in trainable.values())
    batch = tiny.batch()
    cut = jp.combine(trainable, frozen)
    np.testing.assert_allclose(model.apply(cut, batch), base.apply(params, batch), rtol=1e-5, atol=1e-5)
    merged = tree.flatten(jp.full(f"last:{count}").merge(cut))
    for path, leaf in tree.flatten(params).items():
        np.testing.assert_array_equal(merged[path], leaf)


def test_layers_below_the_last_keep_nothing():
    """Backpropagation stops at the cut: one of three layers keeps a third of what three keep."""
    kept = {count: residuals.bytes_per_token(*start(f"last:{count}"), tiny.batch) for count in (1, 2)}
    added = kept[2] - kept[1]
    assert kept[1] < 1.05 * added


def test_last_layers_train_with_windows_and_dropout_keys():
    """A cut stack still knows each layer's index: the windows of a mixed model stay where they were."""
    changes = {"model_type": "qwen2", "use_sliding_window": True, "sliding_window": 4, "max_window_layers": 2}
    base, params = tiny.model(**changes)
    model, trainable, frozen = jp.setup(jp.full("last:2"), base, params, jax.random.key(0))
    batch = tiny.batch()
    np.testing.assert_allclose(
        model.apply(jp.combine(trainable, frozen), batch), base.apply(params, batch), rtol=1e-5, atol=1e-5
    )


@pytest.mark.parametrize("which", ["last:0", "last:x", "last:4", "(", "nothing here"])
def test_bad_parts(which):
    with pytest.raises(jp.InputError):
        start(which)


def test_bf16_weights_train_in_float32():
    """Steps too small for bf16 still add up in the masters."""
    base, params = tiny.model(dtype=jax.numpy.bfloat16)
    method, optimizer = jp.full("norms"), optax.sgd(1e-5)
    model, trainable, frozen = jp.setup(method, base, params, jax.random.key(0))
    state = jp.init_state(method, optimizer, trainable, frozen, jax.random.key(1))
    step = jax.jit(jp.make_train_step(model, method, optimizer))
    after, _ = step(state, tiny.batch())
    change = np.abs(after.trainable["norm/scale"] - trainable["norm/scale"]).max()
    assert 0 < change < 2**-9
