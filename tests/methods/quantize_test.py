"""Quantized bases: packed anywhere in a chain, merged, told apart and exported as plain ones; the codes are those of
bitsandbytes (tests/quant_test.py)."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import jaxpeft as jp
from jaxpeft import tree
from jaxpeft.peft import fingerprint
from jaxpeft.quant import dense, is_packed
from tests import tiny

KEY, BATCH = jax.random.key(0), tiny.batch()
CHAINS = {
    "quantize + lora": lambda: (jp.quantize(), jp.lora(4)),
    "lora + quantize": lambda: (jp.lora(4), jp.quantize("int8")),
    "quantize + lora_fa": lambda: (jp.quantize("int4"), jp.lora_fa(4)),
    "lora_fa + quantize": lambda: (jp.lora_fa(4), jp.quantize(double=False)),
    "quantize + pissa": lambda: (jp.quantize(), jp.lora(4, init="pissa")),
    "pissa + quantize": lambda: (jp.lora(4, init="pissa"), jp.quantize()),
    "quantize to 3 bits + lora": lambda: (jp.quantize("nf3"), jp.lora(4)),
    "quantize to 2 bits + lora_fa": lambda: (jp.quantize("int2", targets="mlp"), jp.quantize("nf2"), jp.lora_fa(4)),
}


def kernels(params):
    return {path: leaf for path, leaf in tree.flatten(params).items() if path.endswith("_proj/kernel")}


ALIKE = ("quantize + lora_fa", "lora_fa + quantize", "pissa + quantize", "quantize to 3 bits + lora")


@pytest.fixture(
    scope="module",
    params=[pytest.param(name, marks=pytest.mark.slow) if name in ALIKE else name for name in CHAINS],
)
def trained(request):
    """(method, model, parameters after some steps, the losses)."""
    method = jp.chain(*CHAINS[request.param]())
    base, params = tiny.model()
    model, trainable, frozen = jp.setup(method, base, params, KEY)
    optimizer = optax.adam(1e-2)
    state = jp.init_state(method, optimizer, trainable, frozen, KEY)
    step = jax.jit(jp.make_train_step(model, method, optimizer))
    losses = []
    for _ in range(6):
        state, metrics = step(state, BATCH)
        losses.append(float(metrics["loss"]))
    return method, model, state.params, losses


def test_trains_beside_packed_kernels(trained):
    _, _, params, losses = trained
    assert all(is_packed(kernel) for kernel in kernels(params).values())
    assert not any(is_packed(leaf) for path, leaf in tree.flatten(params).items() if path not in kernels(params))
    assert losses[-1] < losses[0] - 0.1


def test_merged_is_plain_and_computes_the_same(trained):
    method, model, params, _ = trained
    base, original = tiny.model()
    merged = method.merge(params)
    like = jax.tree.map(lambda leaf: (leaf.shape, leaf.dtype), original)
    assert jax.tree.map(lambda leaf: (leaf.shape, leaf.dtype), merged) == like
    np.testing.assert_allclose(base.apply(merged, BATCH), model.apply(params, BATCH), rtol=1e-4, atol=1e-4)


def test_an_adapter_is_an_ordinary_one_of_the_plain_base(trained, tmp_path):
    """Its file is LoRA; with our own file beside it, it comes back with the packed base; without, as plain LoRA."""
    method, model, params, _ = trained
    base, original = tiny.model()
    jp.export_adapter(tmp_path / "adapter", params, method, model.config)
    config = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    assert config["peft_type"] == "LORA" and "quantize" not in json.dumps(config)
    again, leaves = jp.import_adapter(tmp_path / "adapter", model.config, original)
    assert again.specs == method.specs
    flat = tree.flatten(params)
    assert all(np.array_equal(leaf, flat[path]) for path, leaf in leaves.items())
    adapted, trainable, frozen = jp.setup(again, base, tree.unflatten({**tree.flatten(original), **leaves}), KEY)
    found = adapted.apply(jp.combine(trainable, frozen), BATCH)
    np.testing.assert_allclose(found, model.apply(params, BATCH), rtol=1e-4, atol=1e-4)
    (tmp_path / "adapter" / "jaxpeft.json").unlink()
    plain, _ = jp.import_adapter(tmp_path / "adapter", model.config, original)
    assert [spec.name for spec in plain.specs] == ["lora"]


def test_the_fingerprint_is_of_what_is_the_bases_own(trained):
    _, model, params, _ = trained
    _, original = tiny.model()
    found, whole = fingerprint(model.config, params), fingerprint(model.config, original)
    assert found["sizes"] == whole["sizes"] and found["samples"]
    left_out = {path for path in whole["samples"] if path not in found["samples"]}
    assert left_out == set(kernels(original))
    assert found["samples"].items() <= whole["samples"].items()


def test_merges_to_the_dtype_of_the_base():
    base, params = tiny.model(jnp.bfloat16)
    method = jp.chain(jp.quantize(), jp.lora(4))
    _, trainable, frozen = jp.setup(method, base, params, KEY)
    merged = kernels(method.merge(jp.combine(trainable, frozen)))
    for path, kernel in kernels(frozen).items():
        assert merged[path].dtype == jnp.bfloat16 == kernel.dtype
        np.testing.assert_array_equal(merged[path], dense(kernel, jnp.bfloat16))  # B is zero


def test_only_the_targets_and_only_once():
    base, params = tiny.model()
    method = jp.chain(jp.quantize("int8", targets="mlp"), jp.quantize("nf4"), jp.lora(4))
    _, trainable, frozen = jp.setup(method, base, params, KEY)
    formats = {path: kernel.format for path, kernel in kernels(frozen).items()}
    assert {format for path, format in formats.items() if "/mlp/" in path} == {"int8"}
    assert {format for path, format in formats.items() if "/self_attn/" in path} == {"nf4"}
    again = method.prepare(jp.combine(trainable, frozen), None)
    assert all(leaf is frozen[path] for path, leaf in tree.flatten(again).items() if path in frozen)


def test_part_of_a_quantized_model_trains():
    """A segment of its own trains, plain, above packed ones."""
    base, params = tiny.model()
    method = jp.chain(jp.full("last:1"), jp.quantize(targets=r"^layers_0_2/.*_proj$"))
    _, trainable, frozen = jp.setup(method, base, params, KEY)
    assert all(is_packed(kernel) for kernel in kernels(frozen).values()) and kernels(frozen)
    assert not any(is_packed(kernel) for kernel in kernels(trainable).values()) and kernels(trainable)
    merged = method.merge(jp.combine(trainable, frozen))
    assert tree.flatten(merged).keys() == tree.flatten(params).keys()


def test_a_pruned_side_network_starts_from_what_is_packed():
    base, params = tiny.model()
    model, trainable, frozen = jp.setup(jp.chain(jp.quantize(), jp.lst(reduction=2)), base, params, KEY)
    assert np.isfinite(model.apply(jp.combine(trainable, frozen), BATCH)).all()


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: jp.quantize("nf5"), "format 'nf5' is not one of nf4, nf3, nf2, int8"),
        (lambda: jp.quantize(group=0), "group 0 must be at least 1"),
        (lambda: jp.quantize("int8", double=True), "double quantization is of nf4, nf3, nf2, not of int8"),
        (lambda: jp.quantize(group=24), "group 24 does not divide the 56 inputs of layers/mlp/down_proj"),
        (lambda: jp.quantize(targets="lm_head"), "lm_head is not in the layers"),
        (lambda: jp.quantize(targets="q_prof"), "matches no linear site; nearest: .*q_proj"),
        (
            lambda: jp.chain(jp.quantize(), jp.full()),
            "layers/mlp/down_proj/kernel is packed and trains; give quantize targets",
        ),
        (
            lambda: jp.chain(jp.full(), jp.quantize()),
            "layers/mlp/down_proj/kernel is packed and trains; give quantize targets",
        ),
        (lambda: jp.quantize(), "quantize: no parameter is trainable"),
    ],
)
def test_refusals(make, message):
    base, params = tiny.model()
    with pytest.raises(jp.InputError, match=message):
        jp.setup(make(), base, params, KEY)


def test_odd_inputs_are_not_packed_in_pairs():
    base, params = tiny.model(intermediate_size=55)
    with pytest.raises(jp.InputError, match="down_proj has 55 inputs, which nf4 packs in 2s; use int8"):
        jp.setup(jp.chain(jp.quantize(), jp.lora(4)), base, params, KEY)


def test_inputs_that_do_not_fill_bytes_are_told_what_would():
    base, params = tiny.model(intermediate_size=60)
    message = "down_proj has 60 inputs, which nf3 packs in 8s; use nf4 or nf2 or int8 or int4 or int2"
    with pytest.raises(jp.InputError, match=message):
        jp.setup(jp.chain(jp.quantize("nf3"), jp.lora(4)), base, params, KEY)
