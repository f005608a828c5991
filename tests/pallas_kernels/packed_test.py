"""The packed formats against their definitions, written out once more in plain numpy."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import norm

from pallas_kernels import packed


def kernel(n, m, seed=0):
    return np.random.default_rng(seed).normal(size=(n, m)).astype(np.float32)


@pytest.mark.parametrize(("name", "bits"), [("nf4", 4), ("nf3", 3), ("nf2", 2)])
def test_the_codebook_is_that_of_the_paper(name, bits):
    """Quantiles of the normal distribution, of NF4 eight positive, seven negative and zero, scaled to 1."""
    offset = 0.9677083
    positive = norm.ppf(np.linspace(offset, 0.5, 2 ** (bits - 1) + 1)[:-1])
    negative = -norm.ppf(np.linspace(offset, 0.5, 2 ** (bits - 1))[:-1])
    codes = np.sort(np.concatenate([positive, negative, [0.0]]))
    assert len(packed.CODEBOOKS[name]) == 2**bits == 2 ** packed.BITS[name]
    np.testing.assert_allclose(packed.CODEBOOKS[name], codes / codes.max(), atol=2e-7)


def test_the_dynamic_map():
    levels = packed.dynamic_map()
    assert len(levels) == 256 and (np.diff(levels) > 0).all()
    assert levels[-1] == 1 and 0 in levels
    np.testing.assert_allclose(sorted(-levels[levels < 0]), levels[(levels > 0) & (levels < 1)])
    # The finest exponent has one value, the middle of [0.1, 1] times 1e-6; the next two, the coarsest 64.
    positive = levels[levels > 0]
    np.testing.assert_allclose(positive[:3], [0.55e-6, 0.325e-5, 0.775e-5], rtol=1e-5)
    np.testing.assert_allclose(np.diff(positive[-65:-1]), 0.9 / 64, rtol=1e-4)


def nearest(w, group, book=packed.NF4):
    """(codes (n, m), top (n / group, m)) of a codebook, element by element."""
    blocks = w.reshape(-1, group, w.shape[1])
    top = np.abs(blocks).max(1)
    scaled = blocks / np.where(top > 0, top, 1)[:, None]
    return np.abs(scaled[..., None] - np.array(book)).argmin(-1).reshape(w.shape), top


def test_nf4_takes_the_nearest_code():
    w = kernel(256, 48)
    w[64:128, 3] = 0  # a group of zeros
    found = packed.quantize(w, "nf4", double=False)
    codes, top = nearest(w, 64)
    np.testing.assert_array_equal(packed.unpack(found.codes), codes)
    np.testing.assert_array_equal(found.scales, top)
    expected = np.array(packed.NF4, np.float32)[codes] * np.repeat(top, 64, 0)
    np.testing.assert_allclose(packed.dequantize(found), expected, rtol=1e-6)
    assert not packed.dequantize(found)[64:128, 3].any()


def test_a_byte_holds_inputs_of_both_halves_of_a_tile():
    w = kernel(256, 8)
    found, (codes, _) = packed.quantize(w), nearest(w, 64)
    byte = np.asarray(found.codes)
    for tile, i, j in ((0, 0, 0), (0, 63, 5), (1, 17, 7)):
        assert byte[64 * tile + i, j] == 16 * codes[128 * tile + i, j] + codes[128 * tile + 64 + i, j]


def bits_of(codes, bits):
    """(n, m) codes -> (n bits / 8, m) bytes, number by number, as the module's docstring says where they lie."""
    n, m = codes.shape
    out = np.zeros((n * bits // 8, m), np.uint8)
    for i in range(n):
        if bits == 2:
            out[i // 4] |= (codes[i] << 2 * (i % 4)).astype(np.uint8)
        else:
            out[3 * (i // 8) + i % 8 // 4] |= ((codes[i] & 3) << 2 * (i % 4)).astype(np.uint8)
            out[3 * (i // 8) + 2] |= ((codes[i] >> 2) << i % 8).astype(np.uint8)
    return out


@pytest.mark.parametrize("name", ["nf3", "nf2"])
def test_three_and_two_bits_of_quantiles(name):
    """Codes, their bytes, scales and values bit by bit, with a group of zeros; b + 0.127 bits per number."""
    w = kernel(512, 64)
    w[64:128, 3] = 0
    plain, bits = packed.quantize(w, name, double=False), packed.BITS[name]
    codes, top = nearest(w, 64, packed.CODEBOOKS[name])
    np.testing.assert_array_equal(plain.codes, bits_of(codes, bits))
    np.testing.assert_array_equal(packed.unpack(plain.codes, bits), codes)
    np.testing.assert_array_equal(plain.scales, top)
    expected = np.array(packed.CODEBOOKS[name], np.float32)[codes] * np.repeat(top, 64, 0)
    np.testing.assert_array_equal(packed.dequantize(plain), expected)
    double = packed.quantize(w, name)
    assert 8 * double.nbytes / w.size == pytest.approx(bits + 8 / 64 + 32 / (64 * 256) + 32 / w.size)


@pytest.mark.parametrize("name", ["int3", "int2"])
def test_three_and_two_bits_of_integers(name):
    """-L..L times the ratio of max |W| / L that has the least squared error, group by group."""
    w = kernel(256, 24)
    w[128:, 5] = 0
    found, bits = packed.quantize(w, name), packed.BITS[name]
    levels = 2 ** (bits - 1) - 1
    codes, scales = np.zeros(w.shape, int), np.zeros((2, 24), np.float32)
    for g in range(2):
        for j in range(24):
            column, best = w[128 * g : 128 * g + 128, j], np.inf
            for ratio in packed.RATIOS if column.any() else ():
                scale = np.abs(column).max() / np.float32(levels) * ratio
                tried = np.clip(np.round(column / scale), -levels, levels)
                if (error := ((tried * scale - column).astype(np.float32) ** 2).sum()) < best * (1 - 1e-6):
                    best, scales[g, j], codes[128 * g : 128 * g + 128, j] = error, scale, tried
    np.testing.assert_allclose(found.scales, scales, rtol=1e-6)
    np.testing.assert_array_equal(found.codes, bits_of(codes + 2 ** (bits - 1), bits))
    np.testing.assert_allclose(packed.dequantize(found), codes * np.repeat(scales, 128, 0), rtol=1e-6)
    assert 8 * found.nbytes / w.size == bits + 32 / 128


@pytest.mark.parametrize("bits", [2, 3, 4])
def test_every_byte_comes_back(bits):
    codes = np.random.default_rng(bits).integers(0, 2**bits, (264, 5))
    np.testing.assert_array_equal(packed.unpack(packed.pack(codes, bits), bits), codes)
    assert packed.pack(codes, bits).shape == (264 * bits // 8, 5)


def test_double_quantization():
    """Scales in the order output, input group, in blocks of 256, each nearest in the dynamic map; 4.127 bits."""
    w = kernel(512, 1024) * (1 + np.arange(1024) / 512)
    plain, double = packed.quantize(w, double=False), packed.quantize(w)
    scales = np.asarray(plain.scales).T.reshape(-1)
    mean = scales.mean()
    blocks = (scales - mean).reshape(-1, 256)
    top = np.abs(blocks).max(1)
    codes = np.abs((blocks / top[:, None])[..., None] - packed.dynamic_map()).argmin(-1)
    expected = mean + packed.dynamic_map()[codes] * top[:, None]
    np.testing.assert_allclose(packed.scales(double), expected.reshape(1024, 8).T, rtol=2e-4)
    bits = 8 * sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(double)) / w.size
    assert bits == pytest.approx(4 + 8 / 64 + 32 / (64 * 256) + 32 / w.size)
    assert round(bits, 3) == 4.127


def test_the_round_trip_of_normal_weights():
    """Errors of each format: NF4 as in the literature (RMS 0.0914 at groups of 64), uniform levels by their step."""
    w = kernel(4096, 64)
    rms = {
        f: float(np.sqrt(np.mean((np.asarray(packed.dequantize(packed.quantize(w, f))) - w) ** 2)))
        for f in packed.FORMATS
    }
    assert rms["nf4"] < rms["int4"] < rms["nf3"] < rms["int2"]
    assert rms["nf3"] < rms["nf2"] and rms["int3"] < rms["int2"]
    for name, levels in (("int4", 7), ("int8", 127)):
        step = np.abs(w).reshape(-1, 128, 64).max(1) / levels
        assert rms[name] == pytest.approx(float(np.sqrt(np.mean(step**2) / 12)), rel=0.02)


@settings(max_examples=10, deadline=None)  # each is a shape of its own to compile
@given(st.integers(1, 6), st.sampled_from([32, 64, 128, 160]), st.integers(1, 9), st.sampled_from(packed.FORMATS))
def test_any_shape(groups, group, m, name):
    """Half a step at most, whatever the shape; -max and max come back exactly from NF4."""
    w = kernel(groups * group, m, seed=groups)
    found = packed.quantize(w, name, group=group, double=False)
    assert found.shape == w.shape and found.ndim == 2
    back = np.asarray(packed.dequantize(found)).reshape(groups, group, m)
    blocks = w.reshape(groups, group, m)
    if name in ("int3", "int2"):  # which clip
        assert ((back - blocks) ** 2).sum() <= (blocks**2).sum()
        return
    step = {"nf4": 0.31, "nf3": 0.53, "nf2": 1.01, "int4": 1 / 7, "int8": 1 / 127}[name]  # the codebooks' widest gaps
    assert (np.abs(back - blocks) <= step / 2 * np.abs(blocks).max(1, keepdims=True) + 1e-6).all()


def test_a_stack_of_kernels():
    stack = jax.vmap(packed.quantize)(jnp.stack([kernel(128, 8, seed) for seed in range(3)]))
    assert stack.shape == (3, 128, 8) and stack.ndim == 3
    second = jax.tree.map(lambda leaf: leaf[1], stack)
    np.testing.assert_allclose(packed.dequantize(second), packed.dequantize(packed.quantize(kernel(128, 8, 1))))


@pytest.mark.parametrize(
    ("shape", "options", "message"),
    [
        ((128, 4), {"format": "nf5"}, "'nf5' is not one of nf4, nf3, nf2, int8, int4"),
        ((100, 4), {"group": 64}, "group 64 does not divide the 100 inputs"),
        ((63, 4), {"format": "int4"}, "packs inputs in 2s; 63 is no multiple"),
        ((60, 4), {"format": "nf3"}, "packs inputs in 8s; 60 is no multiple"),
        ((128, 4), {"format": "int8", "double": True}, "of nf4, nf3, nf2, not of int8"),
    ],
)
def test_refusals(shape, options, message):
    with pytest.raises(ValueError, match=message):
        packed.quantize(np.ones(shape, np.float32), **options)
