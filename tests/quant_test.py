"""The kernel protocol, and packed kernels against bitsandbytes on the CPU."""

import jax
import jax.numpy as jnp
import numpy as np
import peft
import pytest
import torch

import jaxpeft as jp
from jaxpeft import tree
from jaxpeft.quant import Kernel, dense, is_packed, like, pack
from pallas_kernels import packed
from pallas_kernels.stacked import Stacked

functional = pytest.importorskip("bitsandbytes.functional")


def values(*shape, seed=0):
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32) * 0.02


def bits_and_bytes(w, double):
    """(codes (m, n), its state) of a kernel (n, m), which is an (m, n) matrix there."""
    codes, state = functional.quantize_4bit(
        torch.tensor(np.ascontiguousarray(w.T)), blocksize=64, quant_type="nf4", compress_statistics=double
    )
    flat = codes.numpy().reshape(-1)
    return np.stack([flat >> 4, flat & 15], -1).reshape(w.T.shape), codes, state


@pytest.mark.parametrize("shape", [(256, 48), (512, 192), (64, 64)])
def test_nf4_is_that_of_bitsandbytes(shape):
    """Codes, absmax and values, bit by bit."""
    w = values(*shape)
    theirs, codes, state = bits_and_bytes(w, double=False)
    ours = pack(jnp.asarray(w), "nf4", double=False)
    np.testing.assert_array_equal(packed.unpack(ours.codes), theirs.T)
    np.testing.assert_array_equal(ours.scales, state.absmax.numpy().reshape(shape[1], -1).T)
    np.testing.assert_array_equal(dense(ours), functional.dequantize_4bit(codes, state).numpy().T)


@pytest.mark.parametrize("shape", [(256, 48), (512, 192), (4096, 64)])
def test_double_quantization_is_that_of_bitsandbytes(shape):
    """On the CPU, bitsandbytes takes the second nearest code of one in a hundred scales that lie between two."""
    w = values(*shape, seed=1)
    _, codes, state = bits_and_bytes(w, double=True)
    ours = pack(jnp.asarray(w), "nf4")
    levels, groups = packed.dynamic_map(), shape[0] // 64
    np.testing.assert_allclose(ours.mean, state.offset, rtol=1e-6)
    np.testing.assert_allclose(ours.block_scales, state.state2.absmax, rtol=1e-4)
    np.testing.assert_allclose(levels, state.state2.code, atol=1e-7)
    theirs = state.absmax.numpy().reshape(shape[1], groups).T
    differs = np.asarray(ours.scales) != theirs
    assert differs.mean() < 0.02
    block = np.asarray(ours.block_scales)[np.arange(groups * shape[1]) // 256].reshape(shape[1], groups).T
    exact = (pack(jnp.asarray(w), "nf4", double=False).scales - ours.mean) / block
    near, far = (np.abs(levels[np.asarray(found)] - exact)[differs] for found in (ours.scales, theirs))
    assert (near <= far + 1e-6).all() and (far < near + 1e-3).all()
    there = functional.dequantize_4bit(codes, state).numpy().T
    same = ~np.repeat(differs, 64, axis=0)
    np.testing.assert_allclose(np.where(same, dense(ours), 0), np.where(same, there, 0), atol=1e-7)


@pytest.mark.parametrize("format", packed.FORMATS)
def test_what_every_kernel_can_be_asked(format):
    """A plain stack, a packed one and a layer of each."""
    plain = jnp.asarray(values(3, 128, 24)).astype(jnp.bfloat16)
    stack = pack(plain, format)
    for kernel in (plain, stack, Stacked(plain, jnp.int32(1)), Stacked(stack, jnp.int32(1))):
        asked: Kernel = kernel
        assert asked.dtype == jnp.bfloat16 and asked.ndim == len(asked.shape)
        assert asked.size == np.prod(asked.shape) and asked.nbytes <= 2 * asked.size
        assert dense(kernel).dtype == jnp.float32 and dense(kernel).shape == kernel.shape
        assert dense(kernel, jnp.bfloat16).dtype == jnp.bfloat16
    assert stack.shape == plain.shape and is_packed(stack) and not is_packed(plain)
    assert tree.size({"kernel": stack}) == plain.size and tree.num_bytes({"kernel": stack}) == stack.nbytes
    assert stack.nbytes == sum(leaf.nbytes for leaf in jax.tree.leaves(stack))
    np.testing.assert_array_equal(dense(Stacked(stack, jnp.int32(1))), dense(stack)[1])


@pytest.mark.parametrize("format", packed.FORMATS)
def test_a_stack_is_packed_as_its_layers_are(format):
    plain = jnp.asarray(values(3, 160, 24))
    stack = pack(plain, format, group=32)
    for i in range(3):
        one = pack(plain[i], format, group=32)
        for whole, part in zip(jax.tree.leaves(stack), jax.tree.leaves(one), strict=True):
            np.testing.assert_array_equal(whole[i], part)
        np.testing.assert_array_equal(dense(stack)[i], packed.dequantize(one))


def test_stored_like_another():
    plain = jnp.asarray(values(2, 128, 24))
    other = jnp.asarray(values(2, 128, 24, seed=3))
    half = plain.astype(jnp.bfloat16)
    assert like(half, other).dtype == jnp.bfloat16
    kernel = pack(half, "nf4", group=32, double=False)
    found = like(kernel, other)
    assert jax.tree.structure(found) == jax.tree.structure(kernel)  # format, group, dtype
    np.testing.assert_array_equal(dense(found), dense(pack(other, "nf4", group=32, double=False)))


def test_merging_is_that_of_peft():
    """PEFT packs the sum of a 4-bit layer and its LoRA again; ours, which is left plain, is the same once packed."""
    bnb = pytest.importorskip("bitsandbytes")
    rng = np.random.default_rng(5)
    w, a, b = values(256, 64), rng.normal(size=(256, 4)), rng.normal(size=(4, 64)) * 0.01
    layer = bnb.nn.Linear4bit(256, 64, bias=False, quant_type="nf4", compute_dtype=torch.float32)
    layer.weight = bnb.nn.Params4bit(
        torch.tensor(np.ascontiguousarray(w.T)), requires_grad=False, quant_type="nf4", compress_statistics=False
    )
    layer = layer.to("cpu")
    config = peft.LoraConfig(r=4, lora_alpha=8, target_modules=["0"])
    model = torch.nn.Sequential(layer)
    model.is_loaded_in_4bit = True
    adapted = peft.get_peft_model(model, config).base_model.model[0]
    with torch.no_grad():
        adapted.lora_A["default"].weight.copy_(torch.tensor(a.T))
        adapted.lora_B["default"].weight.copy_(torch.tensor(b.T))
    adapted.merge()
    state = adapted.get_base_layer().weight.quant_state
    there = functional.dequantize_4bit(adapted.get_base_layer().weight.data, state).numpy().T

    method = jp.lora(4, alpha=8)
    kernel = pack(jnp.asarray(w), "nf4", double=False)
    site = {"kernel": kernel, "lora": {"a": jnp.asarray(a, jnp.float32), "b": jnp.asarray(b, jnp.float32)}}
    ours = method.merge({"q_proj": site})["q_proj"]["kernel"]
    np.testing.assert_allclose(dense(like(kernel, ours)), there, atol=1e-6)
