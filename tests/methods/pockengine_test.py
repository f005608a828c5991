"""PockEngine: the compiled step has no backward pass of what a scheme leaves out; its search holds its limit."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import jaxpeft as jp
from jaxpeft import tree
from jaxpeft.methods import pockengine
from tests import residuals, tiny

KEY, BATCHES = jax.random.key(0), [tiny.batch(rows=2, seed=seed) for seed in (1, 2)]
SCHEME = {"layers/1/(self_attn/q_proj|input_layernorm)": 1.0, "layers/[12]/mlp/down_proj$": 0.25}


def start(scheme, dtype=jnp.float32, **changes):
    method = jp.pockengine(scheme)
    return method, *jp.setup(method, *tiny.model(dtype, **changes), KEY)


@functools.cache
def begun():
    return start(SCHEME)


def test_what_the_scheme_names_trains_and_layers_alike_share_a_stack():
    _, _, trainable, rest = begun()
    assert {path: leaf.shape for path, leaf in trainable.items()} == {
        "layers_1_2/input_layernorm/scale": (1, 32),
        "layers_1_2/self_attn/q_proj/kernel": (1, 32, 32),
        "layers_1_2/mlp/down_proj/pockengine/rows": (1, 14, 32),
        "layers_2_3/mlp/down_proj/pockengine/rows": (1, 14, 32),
    }
    assert [key for key, _, _ in tree.segments(tree.unflatten(rest))] == ["layers_0_1", "layers_1_2", "layers_2_3"]
    _, _, alike, _ = start({"layers/[12]/mlp/down_proj$": 0.25})
    ((path, rows),) = alike.items()
    assert path == "layers_1_3/mlp/down_proj/pockengine/rows" and rows.shape == (2, 14, 32)
    assert not [path for path in start({"layers/\\d/mlp/up_proj$": 1.0})[2] if "_3/" in path]  # all alike: no cut


def test_gradients_are_those_of_the_tensors_and_of_their_channels():
    _, model, trainable, rest = begun()
    loss = lambda trainable: jp.completion_loss(model, jp.combine(trainable, rest), BATCHES[0])[0]
    found = jax.jit(jax.grad(loss))(trainable)
    base, params = tiny.model()
    flat = tree.flatten(params)
    names = ["input_layernorm/scale", "self_attn/q_proj/kernel", "mlp/down_proj/kernel"]
    own = {f"layers/{name}": flat[f"layers/{name}"] for name in names}
    of = lambda own: jp.completion_loss(base, tree.unflatten({**flat, **own}), BATCHES[0])[0]
    full = jax.jit(jax.grad(of))(own)
    for path, gradient in found.items():
        segment, name = path.split("/", 1)
        layer, name = int(segment.split("_")[1]), name.replace("pockengine/rows", "kernel")
        expected = np.asarray(full[f"layers/{name}"])[layer]
        if "rows" in path:
            kernel = np.asarray(flat[f"layers/{name}"])[layer]
            index = np.sort(np.argsort(-np.linalg.norm(kernel, axis=1))[:14])
            np.testing.assert_array_equal(rest[path.replace("rows", "index")][0], index)
            expected = expected[index]
        np.testing.assert_allclose(gradient[0], expected, rtol=1e-4, atol=1e-5 * abs(expected).max(), err_msg=path)


@pytest.mark.parametrize(
    ("scheme", "products"),
    [
        # dW of what trains and nothing else: what it gives reaches the loss through no other kernel.
        ({"layers/2/mlp/down_proj$": 1.0}, ["down_proj 56x32"]),
        # dW of a quarter of the rows, and dx of the one kernel behind.
        ({"layers/2/mlp/up_proj$": 0.25}, ["down_proj 64x56", "up_proj 8x56"]),
        # Of the layer behind each kernel's dx once, the scores' products, and no dW.
        pytest.param(
            {"layers/1/mlp/down_proj$": 0.25},
            ["down_proj 14x32", "down_proj 64x56", *(f"{x}_proj 64x32" for x in ("gate", "k", "o", "q", "up", "v"))],
            marks=pytest.mark.slow,
        ),
    ],
)
def test_the_compiled_step_has_no_other_product_of_a_backward_pass(scheme, products):
    """Read from the compiled program: the matrix products that differentiation has made, of 4 x 16 tokens."""
    method, model, trainable, rest = start(scheme)
    state = jp.init_state(method, optax.scale_by_adam(), trainable, rest, KEY, model)
    step = jax.jit(jp.make_train_step(model, method, optax.scale_by_adam(), rate=1e-3))
    text = step.lower(state, tiny.batch()).compile().as_text()
    made = re.findall(r"= f32\[(\d+),(\d+)\]\S* dot\(.*op_name=\"[^\"]*/transpose\(jvp\(\)\)/[^\"]*/(\w+_proj)/", text)
    assert sorted(f"{name} {n}x{m}" for n, m, name in made) == products
    scores = re.findall(r" dot\(.*op_name=\"[^\"]*/transpose\(jvp\(\)\)/[^\"]*/self_attn/", text)
    assert bool(scores) == ("q_proj 64x32" in products)


def test_nothing_is_kept_below_the_deepest_layer_that_trains():
    """Bytes per token of what the scheme of the last layer keeps are the same under more layers."""
    last = lambda layers: start({f"layers/{layers - 1}/mlp/up_proj$": 0.25}, num_hidden_layers=layers)[1:]
    kept = [residuals.bytes_per_token(*last(layers), lambda rows: tiny.batch(rows)) for layers in (2, 4)]
    assert kept[0] == kept[1] > 0


def test_merged_is_the_base_in_one_stack_and_in_its_dtype():
    _, original = tiny.model(jnp.bfloat16)
    method, _, trainable, rest = start(SCHEME, jnp.bfloat16)
    changed = {path: leaf + 1 for path, leaf in trainable.items()}
    merged, before = tree.flatten(method.merge(jp.combine(changed, rest))), tree.flatten(original)
    assert {path: leaf.dtype for path, leaf in merged.items()} == {path: leaf.dtype for path, leaf in before.items()}
    differs = {
        path: np.flatnonzero(np.any(merged[path] != leaf, axis=tuple(range(1, leaf.ndim))))
        for path, leaf in before.items()
        if path.startswith("layers/")
    }
    named = {path: layers.tolist() for path, layers in differs.items() if len(layers)}
    assert named == {
        "layers/input_layernorm/scale": [1],
        "layers/self_attn/q_proj/kernel": [1],
        "layers/mlp/down_proj/kernel": [1, 2],
    }
    rows = np.asarray(merged["layers/mlp/down_proj/kernel"] != before["layers/mlp/down_proj/kernel"])
    assert rows.any(axis=2).sum(axis=1).tolist() == [0, 14, 14]


@pytest.fixture(scope="module")
def gains():
    base, params = tiny.model()
    return pockengine.contributions(base, params, BATCHES, ["up_proj"], (0.25, 1.0))


@pytest.mark.slow
def test_contributions_are_what_a_step_of_a_tensor_alone_takes_off_the_loss(gains):
    base, params = tiny.model()
    flat, at = tree.flatten(params), "layers/mlp/up_proj/kernel"
    of = lambda own, batch: jp.completion_loss(base, tree.unflatten({**flat, at: own}), batch)[0]
    loss = jax.jit(lambda own: sum(of(own, batch) for batch in BATCHES) / 2)
    kernel = np.asarray(flat[at])
    g = np.asarray(jax.jit(jax.grad(loss))(flat[at]))
    assert set(gains) == {(layer, "mlp/up_proj", share) for layer in range(3) for share in (0.25, 1.0)}
    for (layer, _, share), gain in gains.items():
        own = kernel.copy()
        index = np.argsort(-np.linalg.norm(kernel[layer], axis=1))[: int(share * 32)]
        own[layer, index] -= 1e-3 * np.sign(g[layer, index])
        assert gain == pytest.approx(float(loss(flat[at]) - loss(own)), rel=0.02, abs=2e-6)
    assert all(gains[layer, "mlp/up_proj", 1.0] > gains[layer, "mlp/up_proj", 0.25] > 0 for layer in range(3))


@pytest.mark.slow
def test_a_search_fits_and_more_room_takes_off_more(gains, monkeypatch):
    """A scheme's bytes, counted on its step, are within each limit; with all the room every tensor trains."""
    base, params = tiny.model()
    monkeypatch.setattr(pockengine, "contributions", lambda *_: gains)
    everything = pockengine.needs(base, params, BATCHES[0], {r"layers/\d/mlp/up_proj$": 1.0})
    least = pockengine.needs(base, params, BATCHES[0], {r"layers/2/mlp/up_proj$": 0.25})
    before = 0.0
    for limit in (1.2 * least, (least + everything) / 2, 1.5 * everything):
        scheme = pockengine.search(base, params, BATCHES, limit, ["up_proj"], (0.25, 1.0))
        assert pockengine.needs(base, params, BATCHES[0], scheme) <= limit
        total = sum(gains[int(key.split("/")[1]), "mlp/up_proj", share] for key, share in scheme.items())
        assert total > before
        before = total
    assert scheme == {f"layers/{layer}/mlp/up_proj$": 1.0 for layer in range(3)}
    with pytest.raises(
        jp.InputError, match=f"1000 bytes are fewer than the {least} that 0.25 of the last layer's mlp/up"
    ):
        pockengine.search(base, params, BATCHES, 1000, ["up_proj"], (0.25, 1.0))


@pytest.mark.parametrize(
    ("scheme", "message"),
    [
        (None, "pockengine: scheme says what trains, as {'layers/31/self_attn': 1.0}; `jaxpeft scheme` finds one"),
        ({"layers/1": 0.0}, "pockengine: scheme 'layers/1': share 0.0 must be above 0 and at most 1"),
        ({"layers/1": 1.5}, "pockengine: scheme 'layers/1': share 1.5 must be above 0 and at most 1"),
        ({"layers/(": 1.0}, "pockengine: scheme"),
        (
            {"layers/7/mlp": 1.0},
            "pockengine: scheme 'layers/7/mlp' is found in no path of the layers; nearest: layers/",
        ),
        ({"layers/1": 1.0, "layers/1/mlp": 0.5}, "pockengine: scheme 'layers/1/mlp' counts nowhere"),
        ({"layers/1/input_layernorm": 0.5}, "pockengine: no parameter is trainable"),
    ],
)
def test_refusals(scheme, message):
    with pytest.raises(jp.InputError, match=re.escape(message)):
        start(scheme)
