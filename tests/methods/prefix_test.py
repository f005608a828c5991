"""Prefix tuning: against its equations in numpy, packed rows, windows, encoders, decoding, starts, chains."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxpeft as jp
from jaxpeft import tree
from jaxpeft.backward.residuals import remat
from jaxpeft.generate import generate
from jaxpeft.methods import prefix as file
from jaxpeft.train.loss import completion_loss
from tests import beside, by_hand, tiny
from tests.methods.unipt_test import encoder
from tests.methods.vqt_test import images, vit

P = 3


@pytest.fixture(scope="module")
def start():
    """(model, flat parameters) of settings and changes of the tiny decoder, the prefix far from zero."""

    @functools.cache
    def made(init="random", width=None, **changes):
        model, trainable, frozen = beside.start(jp.prefix(P, init, width), **changes)
        return model, {**frozen, **trainable}

    return made


def expected_stream(params, x, positions, segments, window=None):
    """The layers on one row, and their prefixes."""
    behind = np.arange(len(x))[:, None] - np.arange(len(x))
    seen = (behind >= 0) & (segments[:, None] == segments) & (window is None or behind < window)
    for i in range(3):
        w = by_hand.layer_of(params, i)
        prefix = w["prefix/k"], w["prefix/v"]
        x = by_hand.llama_layer(w, x, positions, seen, prefix=prefix)
    return x


@pytest.mark.parametrize("changes", [{}, {"model_type": "mistral", "sliding_window": 3}])
def test_a_packed_row_equals_its_equations(start, changes):
    """Every token sees the prefix, in each segment and behind any window; positions are those of the segment plus p."""
    model, params = start(**changes)
    tokens = np.random.default_rng(1).integers(0, 97, (1, 11)).astype(np.int32)
    positions = np.array([[0, 1, 2, 3, 4, 0, 1, 2, 3, 4, 5]], np.int32)
    segments = np.array([[1] * 5 + [2] * 6], np.int32)
    batch = {"tokens": tokens, "positions": positions, "segment_ids": segments}
    found = jax.jit(model.hidden)(tree.unflatten(params), batch)[0]
    x = np.asarray(params["embed_tokens/embedding"], np.float64)[tokens[0]]
    expected = expected_stream(params, x, positions[0] + P, segments[0], changes.get("sliding_window"))
    np.testing.assert_allclose(found, expected, rtol=2e-4, atol=2e-4)


def test_an_encoder_equals_its_equations():
    base, params = encoder()
    model, trainable, frozen = jp.setup(jp.prefix(P), base, params, jax.random.key(0))
    params = {**frozen, **trainable}
    batch = {"tokens": np.arange(14, dtype=np.int32).reshape(2, 7)}
    at = {**batch, "positions": np.tile(np.arange(7, dtype=np.int32) + P, (2, 1))}
    x = np.asarray(base.stack.embed(tree.unflatten(frozen), at, None)[0][0], np.float64)
    for i in range(3):
        w = by_hand.layer_of(params, i)
        x = by_hand.bert_layer(w, x, np.ones((7, 7), bool), prefix=(w["prefix/k"], w["prefix/v"]))
    np.testing.assert_allclose(model.hidden(tree.unflatten(params), batch)[0], x, rtol=2e-4, atol=2e-4)
    assert model.classify(tree.unflatten(params), batch).shape == (2, 3)
    long = {"tokens": np.zeros((1, 62), np.int32)}
    with pytest.raises(jp.InputError, match="prefix: rows of 62 tokens and a prefix of 3: the model has 64 positions"):
        model.hidden(tree.unflatten(params), long)


@pytest.mark.slow
def test_images_start_from_random_numbers_only():
    base, params = vit()
    with pytest.raises(jp.InputError, match="prefix: vit reads no tokens to start from; use init=random"):
        jp.setup(jp.prefix(P), base, params, jax.random.key(0))
    model, trainable, frozen = jp.setup(jp.prefix(P, "random"), base, params, jax.random.key(0))
    found = model.classify(jp.combine(trainable, frozen), images(2))
    assert np.abs(found - base.classify(params, images(2))).max() > 1e-3


@pytest.mark.parametrize("width", [None, 6])
def test_activations_are_those_of_tokens_in_front(width):
    """With keys and values of p tokens the model computes what it does behind these tokens."""
    base, params = tiny.model()
    model, trainable, frozen = jp.setup(jp.prefix(P, width=width), base, params, jax.random.key(0))
    key = jax.random.split(jax.random.fold_in(jax.random.key(0), file.zlib.crc32(b"prefix")), 4)[0]
    first = jax.random.randint(key, (1, P), 0, 97)
    tokens = np.random.default_rng(2).integers(0, 97, (1, 8)).astype(np.int32)
    whole = base.apply(params, {"tokens": jnp.concatenate([first, tokens], axis=1)})
    found = model.apply(jp.combine(trainable, frozen), {"tokens": tokens})
    np.testing.assert_allclose(found, whole[:, P:], rtol=1e-4, atol=1e-4)


def test_what_trains():
    """2 L p d_kv numbers; with a network its own, and `plain` gives keys and values that compute the same."""
    _, trainable, _ = beside.start(jp.prefix(P, "zero"))
    assert {path: leaf.shape for path, leaf in trainable.items()} == {
        f"layers/prefix/{name}": (3, P, 2, 8) for name in "kv"
    }
    assert tree.size(trainable) == 2 * 3 * P * 16
    assert not any(np.any(leaf) for leaf in trainable.values())
    model, trainable, frozen = beside.start(jp.prefix(P, "random", width=6))
    assert {path: leaf.shape for path, leaf in trainable.items()} == {
        "prefix/embedding": (P, 32),
        "prefix/down": (32, 6),
        "prefix/down_bias": (6,),
        "layers/prefix/up": (3, 6, 32),
        "layers/prefix/up_bias": (3, P, 32),
    }
    params = jp.combine(beside.moved(trainable), frozen)
    plain = file.plain(params, model.config)
    assert {path for path in tree.flatten(plain) if "prefix" in path} == {f"layers/prefix/{name}" for name in "kv"}
    hidden = np.tanh(params["prefix"]["embedding"] @ params["prefix"]["down"] + params["prefix"]["down_bias"])
    both = hidden @ params["layers"]["prefix"]["up"][2] + params["layers"]["prefix"]["up_bias"][2]
    np.testing.assert_allclose(plain["layers"]["prefix"]["v"][2], both[:, 16:].reshape(P, 2, 8), rtol=1e-5, atol=1e-5)
    same = jax.jit(model.apply)
    np.testing.assert_allclose(same(plain, tiny.batch()), same(params, tiny.batch()), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("changes", [{}, {"model_type": "mistral", "sliding_window": 4}])
def test_decoding_with_the_cache_equals_decoding_without(start, changes):
    model, params = start(**changes)
    nested = tree.unflatten(params)
    prompts = [[5], [7, 11, 13], list(range(20, 31))]
    apply = jax.jit(lambda tokens: jnp.argmax(model.apply(nested, {"tokens": tokens}), -1))

    def uncached(prompt, count=5):
        ids = list(prompt)
        for _ in range(count):
            padded = np.zeros((1, 16), np.int32)
            padded[0, : len(ids)] = ids
            ids.append(int(apply(padded)[0, len(ids) - 1]))
        return ids[len(prompt) :]

    assert generate(model, nested, prompts, 5, eos=()) == [uncached(prompt) for prompt in prompts]


def test_the_cache_has_whole_tiles_and_the_model_room_for_fewer_tokens(start):
    model, _ = start()
    assert model.config.max_position_embeddings == 128 - P
    for slots, whole in ((32, 32 + P), (256, 512)):
        cache = jax.eval_shape(lambda slots=slots: model.stack.init_cache(2, slots))
        assert cache["k"].shape == (3, 2, 2, whole, 8)


@pytest.mark.slow
@pytest.mark.parametrize(
    "method",
    [
        jp.chain(jp.prefix(P, width=6), jp.lora(2)),
        pytest.param(jp.prefix(P, width=6), marks=pytest.mark.slow),
        pytest.param(jp.chain(jp.lora(2), jp.prefix(P)), marks=pytest.mark.slow),
    ],
)
def test_gradients_under_a_memory_plan(method):
    """Of the network that the layers share, and beside LoRA in either order."""
    model, trainable, frozen = beside.start(method)
    trainable = beside.moved(trainable)
    batch = tiny.batch()

    def gradients(model):
        loss = lambda trainable: completion_loss(model, jp.combine(trainable, frozen), batch)[0]
        return jax.jit(jax.grad(loss))(trainable)

    expected, found = gradients(model), gradients(remat(model, "matmuls,tokens=16"))
    assert {path.split("/")[-2] for path in found} == {spec.name for spec in method.specs}
    for path, leaf in expected.items():
        scale = np.abs(leaf).max()
        assert scale > 0, path
        np.testing.assert_allclose(found[path], leaf, rtol=1e-4, atol=2e-5 * scale, err_msg=path)


def test_a_cut_stack_has_its_part_of_the_prefix():
    _, trainable, _ = beside.start(jp.chain(jp.full("last:1"), jp.prefix(P)))
    shapes = {path: leaf.shape for path, leaf in trainable.items() if path.endswith("/prefix/k")}
    assert shapes == {"layers_0_2/prefix/k": (2, P, 2, 8), "layers_2_3/prefix/k": (1, P, 2, 8)}


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"length": 0}, "prefix: length 0 must be at least 1"),
        ({"width": 0}, "prefix: width 0 must be at least 1"),
        ({"init": "ones"}, "prefix: init 'ones' is not one of activations, random, zero"),
        ({"length": 128}, "prefix: length 128 leaves no room; the model has 128 positions"),
    ],
)
def test_mistakes_are_one_line(settings, message):
    with pytest.raises(jp.InputError, match=message):
        beside.start(jp.prefix(**settings))
