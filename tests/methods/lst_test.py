"""Ladder side-tuning: against its equations in numpy, what it keeps and computes, pruning, decoding."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxpeft as jp
from jaxpeft import tree
from jaxpeft.errors import InputError
from jaxpeft.features import frozen_pass
from jaxpeft.generate import generate
from jaxpeft.memory import planner, targets
from jaxpeft.methods import lst
from tests import beside, tiny
from tests.generate_test import PROMPTS, uncached

BATCH = tiny.batch()


def sigmoid(x):
    return 1 / (1 + np.exp(-x))


def norm(x, scale, epsilon):
    return x / np.sqrt((x * x).mean(-1, keepdims=True) + epsilon) * scale


def rotated(x, positions):
    """x (B, S, H, D), angles position * theta^(-2i/D)."""
    half = x.shape[-1] // 2
    angles = positions[..., None, None] * 10000.0 ** (-np.arange(half) / half)
    a, b = x[..., :half], x[..., half:]
    return np.concatenate([a * np.cos(angles) - b * np.sin(angles), b * np.cos(angles) + a * np.sin(angles)], -1)


def llama_block(w, x, positions, heads, kv, dim):
    """One Llama layer on x (B, S, s) in numpy; w is `{path: leaf}`."""
    b, s, _ = x.shape
    normed = norm(x, w["input_layernorm/scale"], 1e-5)
    q = rotated((normed @ w["self_attn/q_proj/kernel"]).reshape(b, s, heads, dim), positions)
    k = rotated((normed @ w["self_attn/k_proj/kernel"]).reshape(b, s, kv, dim), positions)
    v = (normed @ w["self_attn/v_proj/kernel"]).reshape(b, s, kv, dim)
    k, v = (np.repeat(y, heads // kv, axis=2) for y in (k, v))
    scores = np.einsum("bqhd,bkhd->bhqk", q, k) / np.sqrt(dim)
    scores = np.where(np.tril(np.ones((s, s), bool)), scores, -np.inf)
    weights = np.exp(scores - scores.max(-1, keepdims=True))
    weights /= weights.sum(-1, keepdims=True)
    out = np.einsum("bhqk,bkhd->bqhd", weights, v).reshape(b, s, -1)
    x = x + out @ w["self_attn/o_proj/kernel"]
    normed = norm(x, w["post_attention_layernorm/scale"], 1e-5)
    gate, up = normed @ w["mlp/gate_proj/kernel"], normed @ w["mlp/up_proj/kernel"]
    return x + (gate * sigmoid(gate) * up) @ w["mlp/down_proj/kernel"]


@pytest.mark.parametrize(("layers", "merge_last"), [(None, False), ([0, 2], True)])
def test_computes_its_equations(layers, merge_last):
    model, trainable, frozen = beside.start(jp.lst(4, layers=layers, merge_last=merge_last))
    params = tree.combine(beside.moved(trainable), frozen)
    h, _ = beside.states(tiny.model()[0].stack, params, BATCH)
    h = [np.asarray(x, np.float64) for x in h]
    own = jax.tree.map(lambda x: np.asarray(x, np.float64), params["lst"])
    g = h[0] @ own["first"]["kernel"] + own["first"]["bias"]
    for i, layer in enumerate(layers or range(3)):
        rung = jax.tree.map(lambda x, i=i: x[i], own["rungs"])
        mu = sigmoid(rung["alpha"] / 0.1)
        g = mu * g + (1 - mu) * (h[layer + 1] @ rung["down"]["kernel"] + rung["down"]["bias"])
        g = llama_block(tree.flatten(rung["block"]), g, BATCH["positions"], heads=2, kv=1, dim=4)
    out = norm(g, own["norm"]["scale"], 1e-6) @ own["up"]["kernel"] + own["up"]["bias"]
    if merge_last:
        mu = sigmoid(own["alpha"] / 0.1)
        out = mu * out + (1 - mu) * h[-1]
    np.testing.assert_allclose(jax.jit(model.hidden)(params, BATCH), out, rtol=1e-4, atol=1e-4)


def test_the_frozen_pass_is_the_base_bit_for_bit():
    base, params = tiny.model()
    found = jax.jit(lambda params: frozen_pass(base.stack, params, BATCH, (0, 2))[:3])(params)
    first = {**params, "layers": jax.tree.map(lambda leaf: leaf[:1], params["layers"])}
    hidden = jax.jit(lambda params: base.hidden(params, BATCH))
    for ours, theirs in zip((*found[1], found[2]), (hidden(first), hidden(params), hidden(params)), strict=True):
        assert np.asarray(ours).tobytes() == np.asarray(theirs).tobytes()


def test_a_cut_stack_computes_the_same():
    model, trainable, frozen = beside.start(jp.lst(4))
    params = tree.combine(trainable, frozen)
    hidden = jax.jit(model.hidden)
    whole, cut = (hidden(p, BATCH) for p in (params, tree.cut_layers(params, 2)))
    np.testing.assert_allclose(whole, cut, rtol=1e-5, atol=1e-6)


def test_no_product_of_the_backbones_backward_pass():
    """The gradient's products are the backbone's forward pass and the side network's, counted by hand."""
    base, params = tiny.model()
    model, trainable, frozen = beside.start(jp.lst(4))
    found = beside.gradient_flops(model, trainable, frozen, BATCH)
    tokens, s, f, q, kv, d = BATCH["tokens"].size, 8, 14, 8, 4, 32
    attention = 4 * 16 * 16 * 2 * 4  # multiply-adds of one causal product: rows, S x S, heads, D, halved below
    linear = tokens * (s * (q + 2 * kv) + q * s + 3 * s * f)
    block = 3 * linear + (linear - tokens * f * s)  # forward, dW, dx; and again all but down_proj
    block += (2 + 2 + 5) * attention / 2
    down = (1 + 1 + 1) * tokens * d * s  # forward, again, dW: nothing reads the gradient of h
    by_hand = 2 * (3 * (block + down) + 2 * tokens * d * s + 3 * tokens * s * d)
    assert found == beside.forward_flops(base, params, BATCH) + by_hand
    trace = beside.gradient_trace(model, trainable, frozen, BATCH)
    assert not beside.transposed_products(trace, beside.backbone_kernels(params))
    # The check sees what it should: with full fine-tuning each of seven kernels has its gradient, most hand one on.
    full = beside.gradient_trace(*beside.start(jp.full()), BATCH)
    assert len(beside.transposed_products(full, beside.backbone_kernels(params))) > 7


@pytest.mark.parametrize("reduction", [2, 4])
def test_keeps_per_layer_what_it_states(reduction):
    config = tiny.config()
    stated = lst.layer_bytes(config, 4, reduction=reduction)
    assert stated == 4 * (32 + 32 // reduction)
    assert beside.kept_per_layer(jp.lst(reduction)) == stated


def test_layers_without_a_rung_keep_nothing():
    assert beside.kept_per_layer(jp.lst(4, layers=[0, 1])) == 0


def test_padding_does_not_leak():
    model, trainable, frozen = beside.start(jp.lst(4))
    params = tree.combine(beside.moved(trainable), frozen)
    batch, other, counts = beside.padded()
    hidden = jax.jit(model.hidden)
    one, two = (np.asarray(hidden(params, b)) for b in (batch, other))
    np.testing.assert_array_equal(one[counts], two[counts])


def test_decodes_with_both_caches():
    model, trainable, frozen = beside.start(jp.lst(4, layers=[0, 2]))
    params = tree.combine(beside.moved(trainable), frozen)
    together = generate(model, params, PROMPTS[1:3], 7, eos=())
    assert together == [uncached(model, params, prompt, 7) for prompt in PROMPTS[1:3]]
    assert len(set(together[0] + together[1])) > 2


def largest(scores, count):
    return np.sort(np.argsort(-np.asarray(scores))[:count])


def test_pruning_keeps_what_is_largest():
    """The stream's channels are the same in all layers; heads and units are each layer's own, on both sides."""
    _, params = tiny.model()
    w = {path: np.abs(np.asarray(leaf)) for path, leaf in tree.flatten(params["layers"]).items()}
    model, trainable, _ = beside.start(jp.lst(2))
    reading = ("self_attn/q_proj", "self_attn/k_proj", "self_attn/v_proj", "mlp/gate_proj", "mlp/up_proj")
    stream = sum(w[f"{site}/kernel"].sum((0, 2)) for site in reading)
    stream += sum(w[f"{site}/kernel"].sum((0, 1)) for site in ("self_attn/o_proj", "mlp/down_proj"))
    stream = largest(stream, 16)
    np.testing.assert_array_equal(np.argmax(trainable["lst/first/kernel"], 0), stream)
    for i in range(3):
        units = w["mlp/gate_proj/kernel"][i].sum(0) + w["mlp/up_proj/kernel"][i].sum(0)
        units = largest(units + w["mlp/down_proj/kernel"][i].sum(1), 28)
        queries = w["self_attn/q_proj/kernel"][i].sum(0) + w["self_attn/o_proj/kernel"][i].sum(1)
        keys = w["self_attn/k_proj/kernel"][i].sum(0) + w["self_attn/v_proj/kernel"][i].sum(0)
        head = int(np.argmax(queries.reshape(2, 16).sum(1) + keys.reshape(2, 8).sum(1)))
        queries, keys = np.arange(16) + 16 * head, np.arange(8) + 8 * head
        axes = {
            "self_attn/q_proj/kernel": (stream, queries),
            "self_attn/k_proj/kernel": (stream, keys),
            "self_attn/v_proj/kernel": (stream, keys),
            "self_attn/o_proj/kernel": (queries, stream),
            "mlp/gate_proj/kernel": (stream, units),
            "mlp/up_proj/kernel": (stream, units),
            "mlp/down_proj/kernel": (units, stream),
            "input_layernorm/scale": (stream,),
            "post_attention_layernorm/scale": (stream,),
        }
        for path, kept in axes.items():
            ours = np.asarray(trainable[f"lst/rungs/block/{path}"][i])
            np.testing.assert_array_equal(ours, np.asarray(tree.flatten(params["layers"])[path][i])[np.ix_(*kept)])
    assert model.config.hidden_size == 32


def test_narrower_heads_keep_evenly_spaced_channels():
    """Half of a head of eight: channels 0 and 2 and their partners, whose frequencies are those of a head of four."""
    _, params = tiny.model()
    _, trainable, _ = beside.start(jp.lst(4))
    picked = np.argmax(trainable["lst/first/kernel"], 0)
    ours = np.asarray(trainable["lst/rungs/block/self_attn/k_proj/kernel"][0])
    whole = np.asarray(params["layers"]["self_attn"]["k_proj"]["kernel"][0])[picked]
    assert any((ours == whole[:, 8 * head + np.array([0, 2, 4, 6])]).all() for head in range(2))


def test_fisher_information_is_the_mean_of_squared_gradients():
    base, params = tiny.model()
    batches = [tiny.batch(2, seed=seed) for seed in (0, 1)]
    found = tree.flatten(lst.fisher_information(base, params, batches))
    gradient = jax.jit(jax.grad(lambda p, b: jp.completion_loss(base, p, b)[0]))
    grads = [gradient(params, b) for b in batches]
    for path, leaf in found.items():
        mean = sum(tree.flatten(grad)[path] ** 2 for grad in grads) / 2
        np.testing.assert_allclose(leaf, mean, rtol=1e-4, atol=1e-10)
    assert all(tree.stacked(path) for path in found)


def test_fisher_comes_from_the_training_data_where_it_is_not_given():
    """As calculated by hand from the same batches; a plan, which has none, has the same shapes."""
    base, params = tiny.model()
    batches = [tiny.batch(rows=2, seed=seed) for seed in range(3)]
    given = jp.lst(4, init="fisher", information=lst.fisher_information(base, params, batches))
    _, expected, _ = jp.setup(given, base, params, jax.random.key(0))
    _, found, _ = jp.setup(jp.lst(4, init="fisher"), base, params, jax.random.key(0), batches=lambda: iter(batches))
    chex.assert_trees_all_equal(found, expected)
    planned = jax.eval_shape(
        lambda params: jp.setup(jp.lst(4, init="fisher"), base, params, jax.random.key(0), batches=lambda: ())[1],
        params,
    )
    chex.assert_trees_all_equal_shapes_and_dtypes(planned, expected)


def test_fisher_prunes_by_information_not_by_size():
    base, params = tiny.model()
    matter = jax.tree.map(jnp.zeros_like, {"layers": params["layers"]})
    matter["layers"]["mlp"]["down_proj"]["kernel"] = matter["layers"]["mlp"]["down_proj"]["kernel"].at[:, 7, 3].set(1.0)
    _, trainable, _ = jp.setup(jp.lst(4, init="fisher", information=matter), base, params, jax.random.key(0))
    assert 3 in np.argmax(trainable["lst/first/kernel"], 0)
    kept = np.asarray(trainable["lst/rungs/block/mlp/down_proj/kernel"])
    picked = np.argmax(trainable["lst/first/kernel"], 0)
    row = np.asarray(params["layers"]["mlp"]["down_proj"]["kernel"])[:, 7][:, picked]
    assert all((kept[i] == row[i]).all(-1).any() for i in range(3))


@pytest.mark.slow
def test_the_start_depends_on_the_key_only_where_it_is_drawn():
    base, params = tiny.model()

    def starts(key, **settings):
        return jp.setup(jp.lst(4, **settings), base, params, jax.random.key(key))[1]

    for path, leaf in starts(0).items():
        np.testing.assert_array_equal(leaf, starts(1)[path])
    one, again, other = (starts(key, init="random") for key in (0, 0, 1))
    kernels = [path for path in one if path.endswith("kernel")]
    assert all((one[path] == again[path]).all() and (one[path] != other[path]).any() for path in kernels)


def test_merge_last_starts_near_the_base():
    """h_L / 2 in front of a norm: what is left is the norm's epsilon."""
    base, params = tiny.model()
    model, trainable, frozen = beside.start(jp.lst(4, merge_last=True))
    adapted = tree.combine(trainable, frozen)
    np.testing.assert_allclose(
        jax.jit(model.hidden)(adapted, BATCH), 0.5 * base.hidden(params, BATCH), rtol=1e-5, atol=1e-6
    )
    np.testing.assert_allclose(model.apply(adapted, BATCH), base.apply(params, BATCH), atol=1e-2)


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"reduction": 5}, "reduction 5 does not divide the model's hidden size, 32"),
        ({"reduction": 0}, "reduction 0 should be a whole number of at least 1"),
        ({"reduction": "4"}, "reduction '4' should be a whole number"),
        ({"layers": "1,2"}, "layers '1,2' should be a list of whole numbers"),
        ({"information": 3}, "information should be what"),
        ({"reduction": 3}, "reduction 3 does not divide"),
        ({"init": "zeros"}, "init 'zeros' is not one of magnitude, fisher, random"),
        ({"reduction": 4, "init": "fisher"}, "needs data"),
        ({"reduction": 4, "layers": [2, 3]}, r"layers \[2, 3\] should ascend and lie in 0 to 2"),
        ({"reduction": 4, "layers": []}, "should ascend"),
    ],
)
def test_refuses(settings, words):
    with pytest.raises(jp.InputError, match=words):
        beside.start(jp.lst(**settings))


def test_refuses_heads_that_rotary_cannot_turn():
    """Two key-value heads of two channels: a quarter would be one head of one channel."""
    with pytest.raises(jp.InputError, match="leaves heads of 1 channels; rotary needs pairs"):
        beside.start(jp.lst(4), head_dim=2)


def test_has_no_merged_form():
    with pytest.raises(jp.InputError, match="lst: has no merged form"):
        jp.lst().merge({})


@pytest.mark.slow
def test_a_gpus_compiler_takes_it():
    """The loop over layers counts them: of numbers read from an array XLA could not tell the loop's slices."""
    target = targets.target("h200")
    try:
        targets.devices(target)
    except InputError as error:
        pytest.skip(str(error))
    step = planner.make_step(tiny.CONFIG, jp.lst(reduction=4), 4, 64)
    assert planner.row(step, target)["fits"]
