"""A layer of a stack of kernels: the products of its slice, on a CPU; TPU kernels that read it where it lies."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import packed
from pallas_kernels.lora_matmul import forward, forward_into, lora_matmul
from pallas_kernels.lora_matmul import tpu as lora_tpu
from pallas_kernels.multi_lora_matmul import multi_lora_matmul
from pallas_kernels.multi_lora_matmul import tpu as multi_tpu
from pallas_kernels.quant_lora_matmul import quant_lora_matmul
from pallas_kernels.quant_lora_matmul import tpu as quant_tpu
from pallas_kernels.stacked import Stacked, taken
from tests.pallas_kernels.mosaic_tpu import INTERPRETED, compiled

LAYERS, LAYER = 3, 1


def normal(*shape, seed=0, dtype=jnp.float32):
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), dtype)


def kernels(n, m, format=None):
    """(Stacked, the layer itself)."""
    whole = normal(LAYERS, n, m, seed=1)
    if format:
        whole = jax.vmap(functools.partial(packed.quantize, format=format))(whole)
    w = Stacked(whole, jnp.int32(LAYER))
    return w, jax.tree.map(lambda x: x[LAYER], whole)


def lora(x, w, a, b):
    return lora_matmul(x, w, a, b, scale=1.5, rate=0.2, seed=jnp.int32(3))


def quant(x, w, a, b):
    return quant_lora_matmul(x, w, a, b, scale=1.5)


def multi(x, w, a, b):
    a, b = jnp.stack([a, 2 * a]), jnp.stack([b, -b])
    return multi_lora_matmul(x[None].repeat(2, 0), w, a, b, jnp.array([1, 0]), scales=jnp.array([1.5, 0.5]))


CASES = {"lora": (lora, None), "nf4": (quant, "nf4"), "int8": (quant, "int8"), "multi": (multi, None)}


@pytest.mark.parametrize(("function", "format"), CASES.values(), ids=CASES)
@pytest.mark.parametrize("rows", [5, 128])
def test_values_and_derivatives_are_those_of_the_slice(function, format, rows):
    """To the bit, where the slice is taken in plain JAX."""
    x, a, b = normal(rows, 128), normal(128, 4), normal(4, 64)

    def derived(w):
        total = lambda x, a, b: (function(x, w, a, b) ** 2).sum()
        return jax.jit(jax.value_and_grad(total, (0, 1, 2)))(x, a, b)

    ours, theirs = map(derived, kernels(128, 64, format))
    jax.tree.map(np.testing.assert_array_equal, ours, theirs)


def test_what_does_not_know_a_stack_sees_an_array():
    w, layer = kernels(16, 8)
    assert (w.shape, w.ndim, w.dtype) == (layer.shape, layer.ndim, layer.dtype)
    x = normal(3, 16)
    np.testing.assert_array_equal(x @ w, x @ layer)
    np.testing.assert_array_equal(jnp.linalg.norm(w, axis=0), jnp.linalg.norm(layer, axis=0))
    assert w.astype(jnp.bfloat16).dtype == jnp.bfloat16
    assert taken(x) is x
    codes, _ = kernels(128, 8, "nf4")
    assert codes.shape == (128, 8) and (codes.format, codes.group) == ("nf4", 64)


def test_it_is_not_differentiated():
    w, _ = kernels(16, 8)
    x, a, b = normal(3, 16), normal(16, 4), normal(4, 8)
    with pytest.raises(ValueError, match="a layer of a stack of kernels is not differentiated"):
        jax.grad(lambda stack: lora(x, Stacked(stack, w.index), a, b).sum())(w.stack)


def calls(rows, n, m, r, dtype):
    """{operation: (function, arguments around the kernel, static, format)} of the TPU kernels."""
    x, dy, a, b = (normal(*shape, dtype=dtype) for shape in ((rows, n), (rows, m), (n, r), (r, m)))
    seed, static = jnp.int32(3), {"scale": 1.5, "rate": 0.0}
    tables = jnp.ones(2), jnp.zeros(-(-rows // 128), jnp.int32)
    several = (jnp.stack([a, a]), jnp.stack([b, b]), *tables)
    found = {}
    for name, first in (("forward", x), ("input_gradient", dy)):
        found[f"lora {name}"] = getattr(lora_tpu, name), (first, a, b, seed), static, None
        found[f"quant {name}"] = getattr(quant_tpu, name), (first, a, b, seed), static, "int8"
        found[f"multi {name}"] = getattr(multi_tpu, name), (first, *several), {}, None
    return found


@pytest.mark.parametrize("name", calls(8, 128, 128, 8, jnp.float32))
def test_tpu_kernels_read_it_where_it_lies(optimised, name):
    """The numbers of the slice, interpreted; compiled, no copy but of a packed kernel's scales."""
    function, (first, *rest), static, format = calls(8, 128, 128, 8, jnp.float32)[name]
    w, layer = kernels(128, 128, format)
    ours, theirs = (function(first, kernel, *rest, **static, interpret=INTERPRETED) for kernel in (w, layer))
    jax.tree.map(np.testing.assert_array_equal, ours, theirs)
    function, (first, *rest), static, format = calls(2048, 512, 1024, 16, jnp.bfloat16)[name]
    w, _ = kernels(512, 1024, format)
    w = w if format else Stacked(w.stack.astype(jnp.bfloat16), w.index)
    shapes = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), (first, w, *rest))
    made, _ = compiled("v5e", function, *shapes, **static)
    # Besides, the layer's number as a vector. A copy of the layer would be a MiB, or half of one.
    assert made.memory.temporaries <= 4096 + (4 * 512 * 1024 // 128 if format else 0)


@pytest.mark.parametrize("rows", [256, 264])
def test_a_tpu_kernel_writes_it_where_it_lies(optimised, rows):
    """To the bit what is written elsewhere, interpreted; compiled, no copy of the layer."""
    args = normal(rows, 128), *kernels(128, 128)[:1], normal(128, 8), normal(8, 128), jnp.int32(3)
    static = {"scale": 1.5, "rate": 0.2}
    config = lora_tpu.Config(128, 128, 128)
    y, z = lora_tpu.forward(*args, **static, config=config, interpret=INTERPRETED)
    before = normal(LAYERS, rows, 128, seed=2)
    out = Stacked(before, jnp.int32(LAYER))
    assert lora_tpu.supports_forward_into(*args, out, **static)
    stack, again, low = lora_tpu.forward_into(*args, out, **static, config=config, interpret=INTERPRETED)
    np.testing.assert_array_equal(stack, before.at[LAYER].set(y))
    np.testing.assert_array_equal(again, y)
    np.testing.assert_array_equal(low, z)

    def run(*args, **static):
        out = jax.lax.empty((LAYERS, 2048, 1024), jnp.bfloat16)
        stack, _, low = lora_tpu.forward_into(*args, Stacked(out, jnp.int32(LAYER)), **static)
        return stack, low

    _, (x, *rest), static, _ = calls(2048, 512, 1024, 16, jnp.bfloat16)["lora forward"]
    w = Stacked(jnp.zeros((LAYERS, 512, 1024), jnp.bfloat16), jnp.int32(LAYER))
    shapes = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), (x, w, *rest))
    made, _ = compiled("v5e", run, *shapes, **static)
    assert made.memory.temporaries <= 8192


@pytest.mark.parametrize("rows", [5, 128])
def test_plain_jax_writes_the_same(rows):
    x, a, b = normal(rows, 128), normal(128, 4), normal(4, 64)
    w, _ = kernels(128, 64)
    y, z = forward(x, w, a, b, jnp.int32(3), scale=1.5, rate=0.2)
    before = normal(LAYERS, rows, 64, seed=2)
    stack, again, low = forward_into(x, w, a, b, jnp.int32(3), Stacked(before, jnp.int32(LAYER)), scale=1.5, rate=0.2)
    np.testing.assert_array_equal(stack, before.at[LAYER].set(y))
    np.testing.assert_array_equal(again, y)
    np.testing.assert_array_equal(low, z)
