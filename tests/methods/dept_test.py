"""DePT: its equations in numpy, packed rows, decoding, two rates, MeZO's noise, what is refused."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import jaxpeft as jp
from jaxpeft import noise, tree, zeroth_order
from jaxpeft.generate import generate
from jaxpeft.train.loss import completion_loss
from tests import beside, by_hand, tiny
from tests.methods.unipt_test import encoder

P, RANK, N = 3, 2, 7  # tokens of the prompt, and of a text that are updated
SHAPES = {"dept/embedding": (P, 32), "dept/a": (N, RANK), "dept/b": (RANK, 32)}


@pytest.fixture(scope="module")
def start():
    """(model, flat parameters) of the tiny decoder, with a B that is not zero."""
    model, trainable, rest = beside.start(jp.dept(P, RANK, positions=N))
    own = {"dept/b": np.random.default_rng(0).normal(size=SHAPES["dept/b"]).astype(np.float32)}
    return model, {**rest, **trainable, **own}


def expected(params, tokens):
    """The stream behind a text (S,), in float64."""
    own = {name: np.asarray(params[name], np.float64) for name in (*SHAPES, "embed_tokens/embedding")}
    x = own["embed_tokens/embedding"][tokens]
    update = 8 / np.sqrt(RANK) * own["dept/a"] @ own["dept/b"]
    x[:N] += update[: len(x)]
    x = np.concatenate([own["dept/embedding"], x])
    seen = np.tri(len(x), dtype=bool)
    for i in range(3):
        x = by_hand.llama_layer(by_hand.layer_of(params, i), x, np.arange(len(x)), seen)
    return x[P:]


def test_a_packed_row_equals_its_equations(start):
    """Each text sees the prompt, and is updated from its own first token on, as far as there are positions."""
    model, params = start
    tokens = np.random.default_rng(1).integers(0, 97, 16).astype(np.int32)
    batch = {
        "tokens": tokens[None],
        "positions": np.array([[*range(5), *range(11)]], np.int32),
        "segment_ids": np.array([[1] * 5 + [2] * 11], np.int32),
    }
    hidden = jax.jit(model.hidden)
    found = hidden(tree.unflatten(params), batch)[0]
    by_text = [expected(params, tokens[:5]), expected(params, tokens[5:])]
    np.testing.assert_allclose(found, np.concatenate(by_text), rtol=2e-4, atol=2e-4)
    found = hidden(tree.unflatten(params), {"tokens": tokens[None, 5:]})[0]
    np.testing.assert_allclose(found, by_text[1], rtol=2e-4, atol=2e-4)


def test_it_starts_as_a_prompt_of_its_length():
    model, trainable, rest = beside.start(jp.dept(P, RANK, positions=N))
    assert {path: leaf.shape for path, leaf in trainable.items()} == SHAPES
    assert not np.any(trainable["dept/b"]) and np.abs(trainable["dept/a"]).max() <= RANK**-0.5
    assert np.abs(trainable["dept/a"]).std() > 0.1
    prompted = beside.start(jp.prompt(P))[0]
    own = {"prompt/embedding": trainable["dept/embedding"]}
    same = prompted.apply(jp.combine(own, rest), tiny.batch())
    np.testing.assert_allclose(model.apply(jp.combine(trainable, rest), tiny.batch()), same, rtol=1e-5, atol=1e-5)


def test_padding_moves_nothing_and_the_stream_keeps_its_type(start):
    model, params = start
    batch, other, counts = beside.padded()
    batch, other = ({**rows, "loss_weights": counts.astype(np.float32)} for rows in (batch, other))
    trainable = {path: params[path] for path in SHAPES}
    rest = {path: leaf for path, leaf in params.items() if path not in SHAPES}
    of = jax.jit(jax.grad(lambda own, rows: completion_loss(model, jp.combine(own, rest), rows)[0]))
    found, same = of(trainable, batch), of(trainable, other)
    for path, leaf in found.items():
        assert np.abs(leaf).max() > 0, path
        np.testing.assert_allclose(leaf, same[path], rtol=1e-5, atol=1e-7)
    model, trainable, rest = beside.start(jp.dept(P, RANK, positions=N), np.dtype(jnp.bfloat16))
    assert {leaf.dtype for leaf in trainable.values()} == {np.dtype(np.float32)}
    assert jax.eval_shape(model.hidden, jp.combine(trainable, rest), batch).dtype == jnp.bfloat16


def test_decoding_with_the_cache_equals_decoding_without(start):
    model, params = start
    nested, prompts = tree.unflatten(params), [[5], [7, 11, 13], list(range(20, 31))]
    apply = jax.jit(lambda tokens: jnp.argmax(model.apply(nested, {"tokens": tokens}), -1))

    def uncached(prompt, count=5):
        ids = list(prompt)
        for _ in range(count):
            padded = np.zeros((1, 16), np.int32)
            padded[0, : len(ids)] = ids
            ids.append(int(apply(padded)[0, len(ids) - 1]))
        return ids[len(prompt) :]

    assert generate(model, nested, prompts, 5, eos=()) == [uncached(prompt) for prompt in prompts]


def test_the_factors_have_a_rate_of_their_own():
    update = jp.dept(P, RANK, positions=N, lr_ratio=0.25).update(optax.identity(), None)
    ones = {path: jnp.ones(shape) for path, shape in SHAPES.items()}
    found, _ = update.update(ones, update.init(ones), ones)
    assert {path: float(leaf[0, 0]) for path, leaf in found.items()} == {
        "dept/embedding": 1.0,
        "dept/a": 0.25,
        "dept/b": 0.25,
    }


def test_noise_of_mezo_is_that_of_whole_leaves(start):
    model, params = start
    words, eps = noise.draw(jax.random.key(3)), jnp.float32(0.1)
    noisy = zeroth_order.perturbed(model, frozenset(SHAPES), words, eps, zeroth_order.Settings("mezo", eps))
    whole = {**params, **beside.noisy({path: params[path] for path in SHAPES}, words, eps)}
    found = jax.jit(noisy.apply)(tree.unflatten(params), tiny.batch())
    expected = jax.jit(model.apply)(tree.unflatten(whole), tiny.batch())
    np.testing.assert_allclose(found, expected, rtol=1e-3, atol=1e-3)


def test_its_parameters_are_those_of_a_longer_prompt():
    """The paper's: 40 tokens and rank 45 of 256 positions for 100 tokens of width 768."""
    base = tiny.model(hidden_size=768, num_attention_heads=12, num_hidden_layers=1)
    _, trainable, _ = jp.setup(jp.dept(), *base, jax.random.key(0))
    assert tree.size(trainable) == 100 * 768


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"length": 0}, "dept: length 0 must be at least 1"),
        ({"rank": 0}, "dept: rank 0 must be at least 1, and at most the 256 positions"),
        ({"rank": 8, "positions": 7}, "dept: rank 8 must be at least 1, and at most the 7 positions"),
        ({"rank": 33}, "dept: rank 33 is above the model's width, 32"),
        ({"rank": 2, "lr_ratio": 0.0}, "dept: lr_ratio 0.0 must be a finite number above 0"),
        ({"rank": 2, "init": "ones"}, "dept: init 'ones' is not one of vocabulary, text, random"),
        ({"rank": 2, "length": 128}, "dept: length 128 leaves no room; the model has 128 positions"),
    ],
)
def test_mistakes_are_one_line(settings, message):
    with pytest.raises(jp.InputError, match=message):
        beside.start(jp.dept(**settings))


def test_it_is_for_decoders_and_merges_nothing():
    with pytest.raises(jp.InputError, match="dept: bert is an encoder, whose prompt would read each row; use prefix"):
        jp.setup(jp.dept(P, RANK), *encoder(), jax.random.key(0))
    with pytest.raises(jp.InputError, match="dept: has no merged form; its prompt is served as the first entries"):
        jp.dept().merge({})
