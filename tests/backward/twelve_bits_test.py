"""12-bit floats: to the bit those of the specification, and what layers keep of them."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxpeft as jp
from jaxpeft.backward import residuals
from jaxpeft.backward.plan import INPUT
from jaxpeft.backward.twelve_bits import lengthen, shorten
from tests import tiny
from tests.backward.gradients import LAYERS, MHA, D, F, gradients, segments


def by_hand(bits):
    """(digits, nibble of each number, largest exponent of each block, the numbers again) of bfloat16 bits (..., n)."""
    digits, nibbles, back = (np.zeros(bits.shape, int) for _ in range(3))
    largest = np.zeros((*bits.shape[:-1], -(-bits.shape[-1] // 128)), int)
    for place in np.ndindex(*bits.shape[:-1]):
        for block in range(largest.shape[-1]):
            own = range(128 * block, min(128 * (block + 1), bits.shape[-1]))
            largest[*place, block] = top = max(int(bits[*place, c]) >> 7 & 255 for c in own)
            for c in own:
                number = int(bits[*place, c])
                sign, exponent, mantissa = number >> 15, number >> 7 & 255, number & 127
                if top - exponent > 14:
                    digits[*place, c], nibbles[*place, c], back[*place, c] = sign << 7, 15, sign << 15
                else:
                    digits[*place, c], nibbles[*place, c], back[*place, c] = (
                        sign << 7 | mantissa,
                        top - exponent,
                        number,
                    )
    return digits, nibbles, largest, back


def bits_of(x):
    return np.asarray(jax.lax.bitcast_convert_type(x, jnp.uint16))


def floats(bits):
    return jax.lax.bitcast_convert_type(jnp.asarray(bits, jnp.uint16), jnp.bfloat16)


def all_bits(shape, seed=0):
    """Any bits: infinities, NaN, subnormal numbers; and rows whose exponents are near one another."""
    rng = np.random.default_rng(seed)
    bits = rng.integers(0, 1 << 16, shape)
    near = rng.integers(0, 2, shape) << 15 | rng.integers(0, 24, shape) << 7 | rng.integers(0, 128, shape)
    return np.where(rng.random((*shape[:-1], 1)) < 0.5, bits, near).astype(np.uint16)


@pytest.mark.parametrize("shape", [(2, 4, 256), (3, 5, 300), (2, 7, 3, 24), (5, 130), (1, 1), (2, 1, 129)])
def test_the_specification_to_the_bit(shape):
    bits = all_bits(shape)
    digits, nibbles, largest, back = by_hand(bits)
    stored = jax.jit(shorten)(floats(bits))
    axis = len(shape) - 2 if len(shape) < 3 else 1
    half = -(-shape[axis] // 2)
    pairs = np.take(nibbles, range(half), axis)
    high = np.zeros_like(pairs)
    rest = [slice(None)] * axis
    high[*rest, : shape[axis] - half] = np.take(nibbles, range(half, shape[axis]), axis)
    np.testing.assert_array_equal(stored.digits, digits)
    np.testing.assert_array_equal(stored.offsets, pairs | high << 4)
    np.testing.assert_array_equal(stored.largest, largest)
    assert {x.dtype for x in stored} == {jnp.dtype("uint8")}
    np.testing.assert_array_equal(bits_of(jax.jit(lengthen, static_argnums=1)(stored, jnp.bfloat16)), back)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.float16, jnp.bfloat16])
def test_other_types_are_rounded_as_bfloat16_is(dtype):
    """To the nearest, and back in their own; with ties, which go to the even one."""
    x = np.random.default_rng(1).normal(size=(2, 6, 200)).astype(np.float32)
    x[0, 0, :4] = [1 + 2**-8, 1 + 3 * 2**-8, -1 - 2**-8, 1 + 2**-8 + 2**-20]
    found = jax.jit(lambda x: lengthen(shorten(x), x.dtype))(jnp.asarray(x, dtype))
    assert found.dtype == dtype
    wanted = jnp.asarray(x, dtype).astype(jnp.bfloat16).astype(jnp.float32)
    np.testing.assert_array_equal(found.astype(jnp.float32), wanted)
    if dtype == jnp.float32:
        np.testing.assert_array_equal(found[0, 0, :4], [1, 1 + 2**-6, -1, 1 + 2**-7])


def test_what_becomes_zero_is_below_a_16384th_of_the_largest():
    """Numbers down to 2^-14 of the largest's power of two stay; all that are lost of a block are, in norm, below 2^-10
    of its largest, and another block's are not touched."""
    x = np.full((1, 1, 256), 0.9999 * 2**-14, np.float32)
    x[0, 0, :3] = 1, 2**-14, -(2**-14)
    found = np.asarray(lengthen(shorten(jnp.asarray(x)), jnp.float32))
    np.testing.assert_array_equal(found[0, 0, :3], x[0, 0, :3])
    x = floats(bits_of(jnp.asarray(x, jnp.bfloat16)) - np.where(np.arange(256) < 3, 0, 1).astype(np.uint16))
    found, x = (np.asarray(a, np.float64) for a in (lengthen(shorten(x), jnp.bfloat16), x))
    assert not found[0, 0, 3:128].any()
    np.testing.assert_array_equal(found[0, 0, 128:], x[0, 0, 128:])
    assert 0.9 * 2**-10.6 < np.linalg.norm(found - x) < 2**-10


# In the layers.


def test_three_quarters_of_the_bytes_and_no_product_again():
    """Per number a byte and a half, per token and block of channels one more; log-sum-exp and x A as they are."""
    [exact], [small] = (segments("lora", plan, dtype=jnp.bfloat16, **MHA) for plan in ("matmuls", "compressed12"))
    whole, found = exact.kept_bytes()["device"], small.kept_bytes()["device"]
    assert found.keys() == whole.keys()
    for name in ("attention_lse", "lora_low"):
        assert found.pop(name) == whole.pop(name)
    for name, size in found.items():
        width = F if name in ("gate_proj", "up_proj") else D
        assert whole[name] == LAYERS * 64 * 2 * width
        assert size == LAYERS * 64 * (1.5 * width + 1), name
    assert small.recompute_flops() == 0


def test_in_bfloat16_gradients_are_those_of_what_is_saved():
    """But for numbers below a 16384th of their block's largest, in norm below 2^-10 of it: with 13 tokens in a row."""
    base, params = tiny.model(jnp.bfloat16)
    model, trainable, frozen = jp.setup(jp.lora(4), base, params, jax.random.key(0))
    trainable = {path: x + 0.05 * jax.random.normal(jax.random.key(3), x.shape) for path, x in trainable.items()}
    batch = {name: x[:3, :13] for name, x in tiny.batch().items()}
    (value, exact), (same, found) = (
        gradients(residuals.remat(model, plan), trainable, frozen, batch) for plan in ("matmuls", "compressed12")
    )
    assert value == same  # the forward pass goes on with what is not rounded
    for path, wanted in exact.items():
        assert np.linalg.norm(found[path] - wanted) < 2**-10 * np.linalg.norm(wanted), path


def test_the_input_of_a_layer_may_be_named():
    [segment] = segments("lora", f"blocks,{INPUT}=compress12", dtype=jnp.bfloat16)
    assert segment.kept_bytes()["device"] == {INPUT: LAYERS * 64 * (1.5 * D + 1)}
