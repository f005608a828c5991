"""Attention's kernels: the TPU's interpreted on the CPU, and which of them a described device gets.

cuDNN's can only be compiled here.
"""

import functools
import importlib.util
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxpeft.memory import targets
from pallas_kernels import attention as op
from pallas_kernels.attention import Where, chunked, cudnn, splash


@pytest.fixture
def interpreted(monkeypatch):
    """Splash attention without a TPU."""
    from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel as kernel

    monkeypatch.setattr(kernel, "make_splash_mha", functools.partial(kernel.make_splash_mha, interpret=True))


@pytest.mark.parametrize(
    ("heads", "cuts", "window", "causal"),
    [
        ((2, 2), None, None, True),
        ((4, 2), (70, 200), None, True),
        ((2, 1), None, 100, True),
        ((2, 2), (130,), 60, True),
        ((2, 2), None, None, False),
        ((4, 2), (70, 200), None, False),
    ],
    ids=["MHA", "GQA, segments", "MQA, window", "segments, window", "not causal", "not causal, GQA, segments"],
)
def test_the_tpu_kernel(interpreted, heads, cuts, window, causal):
    """Two blocks of 128 in each direction, against the tiles, which attention_test holds to PyTorch."""
    (h, n), s = heads, 256
    rng = np.random.default_rng(0)
    shapes = ((2, s, h, 64), (2, s, n, 64), (2, s, n, 64), (2, s, h, 64))
    query, key, value, cotangent = (rng.normal(size=shape).astype(np.float32) for shape in shapes)
    segment = None
    if cuts:
        segment = np.stack([1 + sum((np.arange(s) >= cut + row).astype(np.int32) for cut in cuts) for row in range(2)])
    mask, options = Where(None, None, segment, segment), {"scale": 0.1, "window": window, "causal": causal}
    assert splash.supports(query, key, value, mask, **options)

    def run(kernel):
        out, lse = kernel.forward(query, key, value, mask, **options)
        return out, lse, *kernel.backward(query, key, value, mask, out, lse, cotangent, **options)

    for name, ours, theirs in zip(("out", "lse", "d q", "d k", "d v"), run(splash), run(chunked), strict=True):
        error = np.abs(np.asarray(ours) - np.asarray(theirs)).max() / np.abs(theirs).max()
        assert error < 2e-4, f"{name}: {error:.1e}"


def program(name, dtype=jnp.bfloat16, s=256, d=64, segments=False, window=None, cached=False, causal=True):
    """The gradient of attention, lowered for a described device."""
    target = targets.target(name)
    if target.platform == "tpu":
        pytest.importorskip("libtpu")
    if target.platform == "cuda" and not importlib.util.find_spec("jax_plugins"):
        pytest.skip("no CUDA plugin")
    place = jax.sharding.SingleDeviceSharding(targets.devices(target)[0])
    segment = jax.ShapeDtypeStruct((2, s), jnp.int32, sharding=place) if segments else None
    index = jnp.arange(s, dtype=jnp.int32) if cached else None
    arrays = [jax.ShapeDtypeStruct((2, s, n, d), dtype, sharding=place) for n in (4, 2, 2)]

    def total(query, key, value, segment):
        mask = Where(index, index, segment, segment)
        return op.attention(query, key, value, mask, 0.1, window, causal).astype(jnp.float32).sum()

    return jax.jit(jax.grad(total, (0, 1, 2))).lower(*arrays, segment)


KERNELS = {
    "h200": (r"__cudnn\$fmha\w*Softmax\b", r"__cudnn\$fmha\w*SoftmaxBackward\b"),
    "v5p": ("tpu_custom_call", "splash_mha_fwd", "splash_mha_dq", "splash_mha_dkv"),
}


OPTIONS = {
    "causal": {},
    "segments": {"segments": True},
    "window": {"window": 100},
    "encoder": {"causal": False, "segments": True},
    "image": {"causal": False},
}


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
@pytest.mark.parametrize("name", KERNELS)
def test_a_described_device_gets_its_kernels(name, options):
    text = program(name, **options).as_text()
    assert all(re.search(kernel, text) for kernel in KERNELS[name])


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("h200", {"dtype": jnp.float32}),
        ("h200", {"cached": True}),
        ("h200", {"d": 256}),
        ("h200", {"segments": True, "s": cudnn.LONGEST_MASK + 2}),
        ("v5p", {"cached": True}),
        ("v5p", {"s": 200}),
        ("v5p", {"d": 32}),
        ("v5p", {"window": 100, "causal": False}),
        ("h200", {"window": 100, "causal": False}),
        ("cpu", {}),
    ],
)
def test_what_a_kernel_does_not_take_runs_in_tiles(name, options):
    text = program(name, **options).as_text()
    assert "__cudnn" not in text and "tpu_custom_call" not in text and "stablehlo.while" in text


def test_heads_of_32_on_a_gpu():
    """MiniLM's."""
    text = program("h200", d=32, segments=True, causal=False).as_text()
    assert all(re.search(kernel, text) for kernel in KERNELS["h200"])


@pytest.mark.parametrize("options", [{"window": 300}, {"causal": False, "segments": True}], ids=["window", "encoder"])
@pytest.mark.parametrize("name", KERNELS)
def test_the_kernels_compile(name, options):
    """With all that they take; no array of queries x keys in float32 stays."""
    before = jax.config.read("jax_disable_most_optimizations")
    jax.config.update("jax_disable_most_optimizations", False)
    try:
        compiled = program(name, s=1024, **options).compile()
    finally:
        jax.config.update("jax_disable_most_optimizations", before)
    assert re.search(KERNELS[name][0], compiled.as_text())
    assert compiled.memory_analysis().temp_size_in_bytes < 4 * 2 * 4 * 1024 * 1024
