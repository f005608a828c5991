"""Visual query tuning: against its equations in numpy, frozen tokens untouched, where gradients pass, what is kept."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import jaxpeft as jp
from jaxpeft import method as contract
from jaxpeft import tree
from jaxpeft.methods import vqt
from jaxpeft.models import family
from tests import beside
from tests.methods.unipt_test import encoder, layer_norm

VIT = {
    "model_type": "vit",
    "architectures": ["ViTForImageClassification"],
    "num_labels": 3,
    "image_size": 12,
    "patch_size": 4,
    "num_channels": 1,
    "hidden_size": 32,
    "intermediate_size": 56,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
}
TOKENS, Q = 10, 2


def images(rows=4, size=12):
    return {"pixels": np.random.default_rng(0).normal(size=(rows, size, size, 1)).astype(np.float32)}


def vit(**changes):
    raw = {**VIT, **changes}
    base = family(raw).from_hf(raw)
    params = base.init(jax.random.key(3), {})
    return base, jax.tree.map(lambda x: x * 3 if x.ndim > 1 and x.std() > 0 else x, params)


def start(base, params, **settings):
    return jp.setup(jp.vqt(**{"queries": Q, **settings}), base, params, jax.random.key(0))


def moved(made):
    model, trainable, frozen = made
    return model, tree.combine(beside.moved(trainable), frozen)


def norm(w, name, x):
    x = x - x.mean(-1, keepdims=True)
    x = x / np.sqrt((x * x).mean(-1, keepdims=True) + 1e-12)
    return x * w[f"{name}/scale"] + w[f"{name}/bias"]


def dense(w, name, x):
    return x @ w[f"{name}/kernel"] + w[f"{name}/bias"]


def gelu(x):
    return x * 0.5 * (1 + np.vectorize(math.erf)(x / math.sqrt(2)))


def vit_block(w, x, source):
    """One layer of ViT in numpy for one row: queries from x (q, d), keys and values from source (S, d)."""
    normed, seen = norm(w, "attention_norm", x), norm(w, "attention_norm", source)
    q, k, v = (
        dense(w, f"self_attn/{name}_proj", y).reshape(-1, 4, 8) for name, y in (("q", normed), ("k", seen), ("v", seen))
    )
    scores = np.einsum("qhd,khd->hqk", q, k) / math.sqrt(8)
    weights = np.exp(scores - scores.max(-1, keepdims=True))
    weights /= weights.sum(-1, keepdims=True)
    x = x + dense(w, "self_attn/o_proj", np.einsum("hqk,khd->qhd", weights, v).reshape(-1, 32))
    return x + dense(w, "mlp/down_proj", gelu(dense(w, "mlp/up_proj", norm(w, "mlp_norm", x))))


@pytest.mark.parametrize("normalize", [True, False])
def test_computes_its_equations(normalize):
    base, params = vit()
    model, own = moved(start(base, params, normalize=normalize))
    batch = images()
    h = [np.asarray(x, np.float64) for x in beside.states(base.stack, params, batch)[0]]
    wide = jax.tree.map(lambda x: np.asarray(x, np.float64), own)
    logits = []
    for row in range(4):
        read = [h[-1][row][:1]]
        for i in range(3):
            w = tree.flatten(jax.tree.map(lambda x, i=i: x[i], wide["layers"]))
            read.append(vit_block(w, wide["vqt"]["queries"][i], h[i][row]))
        read = np.concatenate(read)
        read = layer_norm(read) if normalize else read
        logits.append(read.reshape(-1) @ wide["vqt"]["head"]["kernel"] + wide["vqt"]["head"]["bias"])
    np.testing.assert_allclose(model.classify(own, batch), logits, rtol=1e-4, atol=1e-4)


def test_frozen_tokens_are_those_of_the_model_bit_for_bit():
    base, params = vit()
    model, own = moved(start(base, params))
    found = np.asarray(jax.jit(model.hidden)(own, images()))
    assert found.shape == (4, TOKENS + 3 * Q, 32)
    assert found[:, :TOKENS].tobytes() == np.asarray(jax.jit(base.hidden)(params, images())).tobytes()


def test_queries_see_neither_each_other_nor_those_of_other_layers():
    base, params = vit()
    model, own = moved(start(base, params))
    changed = jax.tree.map(lambda x: x, own)
    changed["vqt"]["queries"] = own["vqt"]["queries"].at[1, 0].add(1.0)
    hidden = jax.jit(model.hidden)
    differs = np.asarray(hidden(own, images()) != hidden(changed, images())).any((0, 2))
    assert np.flatnonzero(differs).tolist() == [TOKENS + Q]


def test_gradients_pass_the_rows_of_the_queries_only():
    """Products beyond the forward pass of model and queries: a transposed kernel per product of q rows."""
    base, params = vit()
    made = start(base, params)
    batch, d, f = images(), 32, 56
    answers = lambda model, params: jax.jit(model.hidden)(params, batch)[:, TOKENS:]
    found = beside.gradient_flops(*made, batch, answers) - beside.forward_flops(base, params, batch)
    rows = 4 * Q
    projections, mlp = rows * d * d, 2 * rows * d * f
    attention = 4 * Q * TOKENS * d  # one product; two forward, five in the backward pass's formula
    # Forward, again, and the gradient: q and o; up and down, which is not computed again; attention.
    assert found == 3 * 2 * (3 * 2 * projections + 2.5 * mlp + (2 + 2 + 5) * attention)
    for equation in beside.transposed_products(
        beside.gradient_trace(*made, batch, answers), beside.backbone_kernels(params)
    ):
        assert equation.outvars[0].aval.shape[:2] == (4, Q)


def kept(layers, size):
    """Bytes that the backward pass keeps, for images of size x size."""
    made = start(*vit(num_hidden_layers=layers, image_size=size))
    model, trainable, frozen = made

    def pull(trainable, frozen):
        return jax.vjp(lambda t: model.classify(tree.combine(t, frozen), images(4, size)), trainable)[1]

    return tree.num_bytes(jax.eval_shape(pull, trainable, frozen))


def test_keeps_keys_and_values_alone():
    """The difference of two depths and two sizes of image; position embeddings grow with the image, once."""
    per_layer = [(kept(7, size) - kept(3, size)) / 4 for size in (12, 24)]
    tokens = 4 * (37 - 10)  # rows times the tokens by which a larger image is longer
    base, _ = vit()
    assert (per_layer[1] - per_layer[0]) / tokens == vqt.layer_bytes(base.config, 4) == 2 * 4 * 32


def test_padding_does_not_leak():
    base, params = encoder()
    model, own = moved(start(base, params))
    batch, other, counts = beside.padded()
    hidden = jax.jit(model.hidden)
    one, two = (np.asarray(hidden(own, b)) for b in (batch, other))
    np.testing.assert_array_equal(one[:, counts.shape[1] :], two[:, counts.shape[1] :])
    np.testing.assert_array_equal(one[:, : counts.shape[1]][counts], two[:, : counts.shape[1]][counts])
    np.testing.assert_array_equal(model.classify(own, batch), model.classify(own, other))


def test_learns_to_classify():
    base, params = vit()
    model, trainable, frozen = start(base, params)
    batch, labels, optimizer = images(12), np.arange(12) % 3, optax.adam(1e-2)
    state = optimizer.init(trainable)

    @jax.jit
    def step(trainable, state):
        def loss(t):
            logits = model.classify(tree.combine(t, frozen), batch)
            return -jax.nn.log_softmax(logits)[jnp.arange(12), labels].mean()

        value, grads = jax.value_and_grad(loss)(trainable)
        updates, state = optimizer.update(grads, state)
        return optax.apply_updates(trainable, updates), state, value

    losses = []
    for _ in range(40):
        trainable, state, value = step(trainable, state)
        losses.append(float(value))
    assert losses[-1] < 0.5 * losses[0]


def test_queries_start_uniform():
    base, params = vit(num_hidden_layers=6)
    trainable = start(base, params, queries=20)[1]
    queries = np.asarray(trainable["vqt/queries"])
    bound = math.sqrt(6 / (3 * 16 + 32))
    assert queries.shape == (6, 20, 32)
    assert 0.99 * bound < np.abs(queries).max() <= bound
    np.testing.assert_allclose(queries.std(), bound / math.sqrt(3), rtol=0.03)


def test_refuses():
    with pytest.raises(jp.InputError, match="vqt: asks encoders; llama is a decoder"):
        beside.start(jp.vqt())
    with pytest.raises(jp.InputError, match="vqt: reads rows for a classifier"):
        start(*vit(architectures=["ViTModel"]))
    with pytest.raises(jp.InputError, match="vqt: queries 0 must be at least 1"):
        jp.vqt(0)
    with pytest.raises(jp.InputError, match="vqt: has no merged form"):
        jp.vqt().merge({})


def test_made_again_from_its_spec_and_frozen_leaves_stay():
    base, params = vit()
    method = jp.vqt(Q, normalize=False)
    model, trainable, frozen = jp.setup(method, base, params, jax.random.key(0))
    _, again, _ = jp.setup(contract.from_specs(method.specs), base, params, jax.random.key(0))
    assert again.keys() == trainable.keys() == {"vqt/queries", "vqt/head/kernel", "vqt/head/bias"}
    assert all((again[path] == leaf).all() and leaf.dtype == jnp.float32 for path, leaf in trainable.items())
    for path, leaf in tree.flatten(params).items():
        assert np.asarray(frozen[path]).tobytes() == np.asarray(leaf).tobytes()
    assert model.config.num_labels == again["vqt/head/bias"].size
