"""8-bit Adam against bitsandbytes on the CPU: maps, codes, and steps from the same state."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import torch

from jaxpeft.train import adam8bit
from jaxpeft.train.adam8bit import Codes, decode, encode, scale_by_adam8bit

functional = pytest.importorskip("bitsandbytes.functional")

STACK, ODD, SMALL = "layers/mlp/up_proj/kernel", "layers/mlp/down_proj/kernel", "norm/scale"
SHAPES = {STACK: (2, 24, 512), "layers/mlp/up_proj/lora/a": (2, 512, 16), ODD: (2, 67, 96), SMALL: (300,)}
SHAPES |= {"embed_tokens/embedding": (40, 128)}


def numbers(shape, signed=True, seed=0):
    """Over many decades, as moments are."""
    rng = np.random.default_rng(seed)
    x = rng.normal(size=shape) * np.exp(2 * rng.normal(size=shape)) * 1e-3
    return np.asarray(x if signed else x * x, np.float32)


def theirs(x, signed):
    """(codes, absmax) of one parameter."""
    code = functional.create_dynamic_map(signed=signed)
    codes, state = functional.quantize_blockwise(torch.tensor(np.ascontiguousarray(x)), code=code, blocksize=256)
    return codes, state


def lead(path):
    return int(path.startswith("layers"))


@pytest.mark.parametrize("signed", [True, False])
def test_the_map_is_that_of_bitsandbytes(signed):
    np.testing.assert_array_equal(adam8bit.dynamic_map(signed), functional.create_dynamic_map(signed=signed).numpy())


@pytest.mark.parametrize("signed", [True, False])
@pytest.mark.parametrize("path", [path for path in SHAPES if path != SMALL])
def test_codes_are_those_of_bitsandbytes(path, signed):
    """Each layer's as of a parameter of its own, also where 256 divides neither its rows nor its columns.

    Where x / absmax lies on the edge of two codes, to float32's rounding of its place, a compiler may round otherwise.
    """
    x = numbers(SHAPES[path], signed)
    ours = jax.jit(encode, static_argnums=(1, 2))(jnp.asarray(x), signed, lead(path))
    layers = x if lead(path) else x[None]
    for i, layer in enumerate(layers):
        codes, state = theirs(layer, signed)
        own = jax.tree.map(lambda leaf: leaf[i] if lead(path) else leaf, ours)  # noqa: B023
        apart = np.asarray(own.codes, int) - codes.numpy()
        assert (apart != 0).mean() < 1e-4 and abs(apart).max() <= 1
        np.testing.assert_array_equal(own.absmax.ravel(), state.absmax.numpy())
        same = Codes(jnp.asarray(codes.numpy()), own.absmax)
        found = jax.jit(decode, static_argnums=(1, 2))(same, signed, 0)
        np.testing.assert_array_equal(found, functional.dequantize_blockwise(codes, state).numpy())


def test_zeros_stay_zeros():
    """Of a whole block, and beside numbers that are none, where bitsandbytes makes 1.5e-5 absmax of them."""
    x = np.zeros((32, 256), np.float32)
    x[1, 0] = 1
    for signed in (True, False):
        ours = decode(encode(jnp.asarray(x), signed), signed)
        np.testing.assert_array_equal(ours, x)
        codes, state = theirs(x, signed)
        assert np.count_nonzero(functional.dequantize_blockwise(codes, state).numpy()) > 250


def bits_and_bytes(gradient, m, v, step):
    """(direction, m, v) of a parameter's step of size 1 in 8 bits; moments are (codes, absmax)."""
    parameter, g = torch.zeros(gradient.shape), torch.tensor(np.ascontiguousarray(gradient))
    maps = [functional.create_dynamic_map(signed=signed) for signed in (True, False)]
    (m, of_m), (v, of_v) = [(torch.tensor(np.array(c)), torch.tensor(np.array(a).ravel())) for c, a in (m, v)]
    functional.optimizer_update_8bit_blockwise(
        "adam", g, parameter, m, v, 0.9, 0.999, 0.0, 0.0, 1e-8, step, 1.0, *maps, of_m, of_v
    )
    return -parameter.numpy(), (m.numpy(), of_m.numpy()), (v.numpy(), of_v.numpy())


def test_steps_are_those_of_bitsandbytes():
    """Three steps, each from our state of the step before, of every leaf and layer."""
    params = {path: jnp.zeros(shape) for path, shape in SHAPES.items()}
    optimizer = scale_by_adam8bit()
    state, update = optimizer.init(params), jax.jit(optimizer.update)
    for step in range(1, 4):
        grads = {path: jnp.asarray(numbers(shape, seed=step)) for path, shape in SHAPES.items()}
        directions, new = update(grads, state)
        for path in SHAPES:
            if path == SMALL:
                continue
            for i in range(SHAPES[path][0] if lead(path) else 1):
                cut = lambda x, path=path, i=i: np.asarray(x[i] if lead(path) else x)
                of_layer = [jax.tree.map(cut, moment[path]) for moment in (state.mu, state.nu)]
                direction, *moments = bits_and_bytes(cut(grads[path]), *of_layer, step)
                np.testing.assert_allclose(cut(directions[path]), direction, rtol=2e-5, atol=1e-6)
                for own, (codes, absmax) in zip((new.mu[path], new.nu[path]), moments, strict=True):
                    apart = cut(own.codes).astype(int) - codes
                    assert (apart != 0).mean() < 1e-3 and abs(apart).max() <= 1  # on an edge, to rounding
                    np.testing.assert_allclose(cut(own.absmax).ravel(), absmax, rtol=1e-6)
        state = new


def test_a_layer_or_some_rows_at_a_time(monkeypatch):
    """The same bits as of whole leaves, but for rounding of the direction."""
    params = {path: jnp.zeros(shape) for path, shape in SHAPES.items()}
    grads = {path: jnp.asarray(numbers(shape)) for path, shape in SHAPES.items()}
    optimizer = scale_by_adam8bit()
    found = []
    for part in (adam8bit.PART, 2000):
        monkeypatch.setattr(adam8bit, "PART", part)
        update = jax.jit(lambda grads, state: optimizer.update(grads, state))
        loops = update.lower(grads, optimizer.init(params)).as_text().count("stablehlo.while")
        assert loops == (0 if part > 2000 else 4)  # three stacks and a table
        _, state = update(grads, optimizer.init(params))
        found.append(update(grads, state))
    (directions, state), (others, other) = found
    for path in SHAPES:
        np.testing.assert_allclose(directions[path], others[path], rtol=1e-5, atol=1e-7)
    for ours, theirs in zip(jax.tree.leaves(state), jax.tree.leaves(other), strict=True):
        np.testing.assert_allclose(ours.astype(float), theirs.astype(float), rtol=1e-6, atol=ours.dtype == jnp.uint8)


def test_small_leaves_are_adams():
    """Below 4096 numbers of a layer, as in bitsandbytes: float32, and the direction that of optax."""
    params = {
        SMALL: jnp.zeros(4095),
        "layers/norm/scale": jnp.zeros((4, 1024)),
        "layers/x/kernel": jnp.zeros((1, 4096)),
    }
    ours, adam = scale_by_adam8bit(), optax.scale_by_adam()
    state, other = ours.init(params), adam.init(params)
    assert [isinstance(state.mu[path], Codes) for path in params] == [False, False, True]
    for seed in range(3):
        grads = {path: jnp.asarray(numbers(leaf.shape, seed=seed)) for path, leaf in params.items()}
        found, state = ours.update(grads, state)
        expected, other = adam.update(grads, other)
        for path in list(params)[:2]:
            np.testing.assert_allclose(found[path], expected[path], rtol=1e-5)


def test_bytes_of_the_state():
    """Two bytes for each number, and a float32 for each 256 of them."""
    state = jax.eval_shape(scale_by_adam8bit().init, {STACK: jnp.zeros((4, 1024, 2048))})
    total = sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(state))
    assert total == 4 * 1024 * 2048 * (2 + 2 * 4 / 256) + 4
