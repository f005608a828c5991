"""BitFit: transformers' gradients of its biases, those of the biases themselves, which ones, files, what is refused."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxpeft as jp
from jaxpeft import hf, models, tree
from jaxpeft.methods import bitfit
from jaxpeft.peft import attach
from jaxpeft.train.optimizer import make_direction
from tests import residuals, tiny
from tests.models import families
from tests.peft import reference

BIASED = {"attention_bias": True, "mlp_bias": True}
LINEAR = {f"layers/self_attn/{name}_proj" for name in "qkvo"} | {
    f"layers/mlp/{name}_proj" for name in ("gate", "up", "down")
}


def with_biases(dtype=jnp.float32):
    """A small Llama with biases, which are not zero."""
    base, params = tiny.model(dtype, **BIASED)
    flat = tree.flatten(params)
    noise = lambda i, leaf: 0.2 * jax.random.normal(jax.random.key(i), leaf.shape, leaf.dtype)
    own = {path: leaf + noise(i, leaf) for i, (path, leaf) in enumerate(flat.items()) if path.endswith("/bias")}
    return base, tree.unflatten({**flat, **own})


@pytest.mark.parametrize("case", ["opt, causal LM", "bert, masked LM"])
def test_gradients_and_merged_checkpoints_are_those_of_transformers(case, tmp_path):
    """A model of transformers' whose biases alone train, those of norms too; merged, it is read as a checkpoint."""
    theirs, base, params = families.both(case, tmp_path / "base")
    method = jp.bitfit()
    model, trainable, rest = jp.setup(method, base, params, jax.random.key(0))
    assert {path.replace("/bitfit/", "/") for path in trainable} == {
        p for p in tree.flatten(params) if p.endswith("/bias")
    }
    given, batch = families.inputs(case)
    weights = (
        np.random.default_rng(0).normal(size=(*families.MASK.shape, 1)).astype(np.float32) * families.MASK[..., None]
    )

    def ours(trainable):
        return jnp.sum(model.apply(tree.combine(trainable, rest), batch) * weights)

    found = families.compiled(jax.grad(ours), trainable)
    named = dict(theirs.named_parameters())
    for name, parameter in named.items():
        parameter.requires_grad_(name.endswith("bias"))
    (families.their_output(theirs, given) * families.torch.tensor(weights)).sum().backward()
    scale = max(np.abs(gradient).max() for gradient in found.values())
    for path, gradient in found.items():
        name = models.hf_name(base.config, path.replace("/bitfit/", "/"))[0]
        rows = [named[name.format(i=layer)].grad.numpy() for layer in range(len(gradient))] if "{i}" in name else None
        wanted = named[name].grad.numpy() if rows is None else np.stack(rows)
        np.testing.assert_allclose(gradient, wanted, rtol=1e-4, atol=1e-4 * scale, err_msg=path)

    whole = tree.combine(reference.randomise(trainable), rest)
    hf.save_pretrained(tmp_path / "merged", tmp_path / "base", method.merge(whole))
    again, merged = jp.load_pretrained(tmp_path / "merged", jnp.float32)
    np.testing.assert_allclose(again.apply(merged, batch), model.apply(whole, batch), rtol=1e-4, atol=1e-4)
    jp.export_adapter(tmp_path / "adapter", whole, method, base.config)
    read, leaves, _ = attach(tmp_path / "adapter", base, params)
    np.testing.assert_array_equal(read.apply(leaves, batch), model.apply(whole, batch))


def test_gradients_are_those_of_the_biases_themselves():
    """In bfloat16 and with LoRA beside it: the copies compute what `full("biases")` does, bit for bit."""
    base, params = with_biases(jnp.bfloat16)

    def gradients(method):
        model, trainable, rest = jp.setup(method, base, params, jax.random.key(0))
        loss = lambda trainable: jnp.sum(model.apply(jp.combine(trainable, rest), tiny.batch()) ** 2)
        return jax.jit(jax.grad(loss))(trainable)

    lora = lambda: jp.lora(2, targets=["q_proj"])
    found, wanted = gradients(jp.chain(jp.bitfit(), lora())), gradients(jp.chain(jp.full("biases"), lora()))
    assert len(found) == len(wanted) == 9
    for path, gradient in wanted.items():
        own = path.replace("/bias", "/bitfit/bias")
        assert gradient.dtype == jnp.float32
        np.testing.assert_array_equal(found[own], gradient, err_msg=path)


@pytest.mark.parametrize(
    ("targets", "modules"),
    [
        ("all", LINEAR),
        ("q_proj,up_proj", {"layers/self_attn/q_proj", "layers/mlp/up_proj"}),
        ("mlp", {module for module in LINEAR if "/mlp/" in module}),
        (["self_attn.o_proj"], {"layers/self_attn/o_proj"}),
    ],
)
def test_targets(targets, modules):
    _, trainable, _ = jp.setup(jp.bitfit(targets), *with_biases(), jax.random.key(0))
    assert set(trainable) == {f"{module}/bitfit/bias" for module in modules}


def test_neither_other_methods_biases_nor_a_classifier_s(tmp_path):
    method = jp.chain(jp.pfeiffer(4), jp.bitfit("q_proj"))
    _, trainable, _ = jp.setup(method, *with_biases(), jax.random.key(0))
    assert [path for path in trainable if "/bitfit/" in path] == ["layers/self_attn/q_proj/bitfit/bias"]
    _, base, params = families.both("bert, classifier", tmp_path / "base")
    _, trainable, _ = jp.setup(jp.bitfit(), base, params, jax.random.key(0))
    assert "embed_norm/bitfit/bias" in trainable and not [path for path in trainable if path.startswith("classifier")]


def test_a_bias_that_another_method_trains_is_refused(tmp_path):
    _, base, params = families.both("opt, causal LM", tmp_path / "base")
    with pytest.raises(
        jp.InputError, match="bitfit: ln_tuning trains layers/attention_norm/bias already; leave it out"
    ):
        jp.setup(jp.chain(jp.ln_tuning(), jp.bitfit()), base, params, jax.random.key(0))
    _, trainable, _ = jp.setup(jp.chain(jp.ln_tuning(), jp.bitfit("_proj")), base, params, jax.random.key(0))
    assert {"norm/ln_tuning/bias", "layers/mlp/up_proj/bitfit/bias"} < set(trainable)


@pytest.mark.parametrize("made", [jp.bitfit, jp.ln_tuning])
def test_layers_of_it_are_sampled(made):
    """LISA's masters are copies of copies, which lie in no module."""
    method, (base, params) = jp.chain(made(), jp.lisa(2, 2)), with_biases()
    model, trainable, rest = jp.setup(method, base, params, jax.random.key(0))
    optimizer = make_direction("adam")
    state = jp.init_state(method, optimizer, trainable, rest, jax.random.key(1), model)
    step, losses = jax.jit(jp.make_train_step(model, method, optimizer, rate=1e-2)), []
    for _ in range(3):
        state, metrics = step(state, tiny.batch())
        losses.append(float(metrics["loss"]))
    assert losses[2] < losses[0] - 1e-3
    adapted = model.apply(state.params, tiny.batch())
    np.testing.assert_allclose(base.apply(method.merge(state.params), tiny.batch()), adapted, rtol=1e-4, atol=1e-4)


def test_beside_packed_kernels():
    """Which stay packed; merged, the biases alone are others."""
    base, params = with_biases()
    method = jp.chain(jp.quantize("int8"), jp.bitfit())
    model, trainable, rest = jp.setup(method, base, params, jax.random.key(0))
    whole = jp.combine({path: leaf + 0.1 for path, leaf in trainable.items()}, rest)
    merged = tree.flatten(jp.bitfit().merge(whole))
    for path, leaf in tree.flatten(params).items():
        if path.endswith("/bias"):
            np.testing.assert_allclose(merged[path], leaf + 0.1, rtol=1e-5)
    np.testing.assert_allclose(
        base.apply(tree.unflatten(merged), tiny.batch(2)), model.apply(whole, tiny.batch(2)), rtol=1e-4, atol=1e-4
    )


def test_keeps_no_more_than_a_frozen_backbone():
    start = lambda method: jp.setup(method, *with_biases(), jax.random.key(0))
    kept = residuals.bytes_per_token(*start(jp.bitfit()), tiny.batch)
    assert kept <= residuals.bytes_per_token(*start(jp.full("embeddings")), tiny.batch)


def test_refusals():
    with pytest.raises(jp.InputError, match="bitfit: the model has no biases; ln_tuning trains the norms' scales, ia3"):
        jp.setup(jp.bitfit(), *tiny.model(), jax.random.key(0))
    with pytest.raises(jp.InputError, match="bitfit: targets 'norm': matches no module with a bias; nearest: "):
        jp.setup(jp.bitfit(["norm"]), *with_biases(), jax.random.key(0))
    with pytest.raises(jp.InputError, match="targets"):
        bitfit.find(["layers/self_attn/q_proj/bias"], "(")
