"""Bottleneck adapters: against their equations in numpy, on layers with norms before and behind; mistakes."""

import jax
import numpy as np
import pytest

import jaxpeft as jp
from jaxpeft import bottleneck, tree
from jaxpeft.methods import houlsby, pfeiffer
from jaxpeft.models import family
from tests import beside, by_hand, tiny
from tests.methods.unipt_test import encoder
from tests.methods.vqt_test import images, vit

ACTIVATIONS = {
    "gelu": by_hand.erf_gelu,
    "relu": lambda x: np.maximum(x, 0),
    "swish": by_hand.silu,
    "tanh": np.tanh,
}
# The factory, its settings, and what they mean: modules, activation, scale, whether the adapter is beside.
CASES = [
    (jp.houlsby, {}, ("self_attn", "mlp"), "gelu", 1.0, False),
    (jp.houlsby, {"activation": "swish", "width": 5}, ("self_attn", "mlp"), "swish", 1.0, False),
    (jp.pfeiffer, {"reduction": 8, "scale": 0.5}, ("mlp",), "relu", 0.5, False),
    (jp.parallel, {}, ("mlp",), "relu", 4.0, True),
    (jp.parallel, {"init": "small", "activation": "tanh"}, ("mlp",), "tanh", 4.0, True),
]
OPT = {
    "model_type": "opt",
    "architectures": ["OPTForCausalLM"],
    "vocab_size": 97,
    "hidden_size": 32,
    "ffn_dim": 40,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 40,
}


def opt():
    base = family(OPT).from_hf(OPT)
    return base, base.init(jax.random.key(3), {})


def adapter(w, name, modules, activation, scale, reads_input):
    """(module, x, y) -> y with the adapter of a layer's parameters."""

    def after(module, x, y):
        if module not in modules:
            return y
        own = {leaf: w[f"{module}/{name}/{leaf}"] for leaf in ("down", "down_bias", "up", "up_bias")}
        low = ACTIVATIONS[activation]((x if reads_input else y) @ own["down"] + own["down_bias"])
        return y + scale * (low @ own["up"] + own["up_bias"])

    return after


@pytest.mark.parametrize(("factory", "settings", "modules", "activation", "scale", "reads_input"), CASES)
@pytest.mark.parametrize("kind", ["norms before", "norms behind"])
def test_a_layer_equals_its_equations(kind, factory, settings, modules, activation, scale, reads_input):
    method = factory(**settings)
    model, trainable, frozen = jp.setup(
        method, *(tiny.model() if kind == "norms before" else encoder()), jax.random.key(0)
    )
    flat = {**frozen, **beside.moved(trainable)}
    params = tree.unflatten(flat)
    x = np.random.default_rng(0).normal(size=(2, 7, 32)).astype(np.float32)
    _, ctx = model.stack.embed(params, {"tokens": np.zeros((2, 7), np.int32)}, None)
    layer = jax.tree.map(lambda leaf: leaf[1], params["layers"])
    found, _ = jax.jit(lambda layer, x: model.stack.block(layer, x, ctx.at(1), None, "layers"))(layer, x)
    w = by_hand.layer_of(flat, 1)
    after = adapter(w, method.name, modules, activation, scale, reads_input)
    for row in range(2):
        if kind == "norms before":
            expected = by_hand.llama_layer(w, x[row], np.arange(7), np.tri(7, dtype=bool), after)
        else:
            expected = by_hand.bert_layer(w, x[row], np.ones((7, 7), bool), after)
        np.testing.assert_allclose(found[row], expected, rtol=2e-4, atol=2e-4)


@pytest.mark.parametrize(("method", "count"), [(jp.houlsby(4), 2), (jp.pfeiffer(4), 1), (jp.parallel(4), 1)])
def test_parameter_count(method, count):
    """2 a d + a + d numbers at each adapter."""
    _, trainable, _ = beside.start(method)
    assert tree.size(trainable) == 3 * count * (2 * 32 * 4 + 4 + 32)


def test_widths_and_starts():
    _, trainable, _ = beside.start(jp.houlsby())
    assert trainable["layers/self_attn/houlsby/down"].shape == (3, 32, 2)  # 32 / 16
    for path in ("layers/self_attn/houlsby/down", "layers/mlp/houlsby/up"):
        assert 0 < np.abs(trainable[path]).max() <= 2.001e-3
    assert not np.any(trainable["layers/mlp/houlsby/up_bias"])
    _, trainable, _ = beside.start(jp.parallel())
    assert trainable["layers/mlp/parallel/down"].shape == (3, 32, 16)  # 32 / 2
    assert not np.any(trainable["layers/mlp/parallel/up"])
    assert 0.9 / np.sqrt(32) < np.abs(trainable["layers/mlp/parallel/down"]).max() <= 1 / np.sqrt(32)


def test_chosen_layers_alone_have_adapters():
    method = jp.pfeiffer(4, layers=[0, 2], init="zero")
    model, trainable, frozen = beside.start(method)
    downs = {path: leaf.shape for path, leaf in trainable.items() if path.endswith("/down")}
    assert downs == {f"layers_{name}/mlp/pfeiffer/down": (1, 32, 4) for name in ("0_1", "2_3")}
    base, params = tiny.model()
    adapted = model.apply(jp.combine(trainable, frozen), tiny.batch())
    np.testing.assert_allclose(adapted, base.apply(params, tiny.batch()), rtol=1e-5, atol=1e-5)


def norms_of(method, made):
    _, trainable, _ = jp.setup(method, *made, jax.random.key(0))
    return {path for path in trainable if f"/{method.name}/" not in path}


@pytest.mark.parametrize(
    ("made", "expected"),
    [
        (lambda: tiny.model(model_type="qwen3"), "layers/input_layernorm layers/post_attention_layernorm norm"),
        (encoder, "embed_norm layers/attention_norm layers/output_norm"),
        (opt, "layers/attention_norm layers/mlp_norm norm"),
        (vit, "layers/attention_norm layers/mlp_norm norm"),
    ],
)
def test_norms_of_the_stream_train_where_asked(made, expected):
    """Those of layers, embeddings and the end; not Qwen3's on heads."""
    assert norms_of(jp.houlsby(2), made()) == set()
    found = norms_of(jp.houlsby(2, norms=True), made())
    assert {path.rsplit("/", 1)[0] for path in found} == set(expected.split())


@pytest.mark.parametrize(
    ("made", "batch"),
    [
        (opt, {"tokens": np.arange(10, dtype=np.int32).reshape(2, 5)}),
        (vit, images(2)),
    ],
)
def test_other_families_start_at_the_base_and_feel_their_adapters(made, batch):
    base, params = made()
    for method in (jp.houlsby(2, init="zero"), jp.parallel(2)):
        model, trainable, frozen = jp.setup(method, base, params, jax.random.key(0))
        of = jax.jit(lambda trainable, model=model, frozen=frozen: model.apply(jp.combine(trainable, frozen), batch))
        expected = base.apply(params, batch)
        np.testing.assert_allclose(of(trainable), expected, rtol=1e-5, atol=1e-5)
        assert np.abs(of(beside.moved(trainable)) - expected).max() > 1e-3


def test_adapters_chain_with_lora_and_one_another():
    method = jp.chain(jp.lora(2), jp.houlsby(2, init="zero"), jp.parallel(3))
    model, trainable, frozen = beside.start(method)
    base, params = tiny.model()
    found = model.apply(jp.combine(trainable, frozen), tiny.batch())
    np.testing.assert_allclose(found, base.apply(params, tiny.batch()), rtol=1e-5, atol=1e-5)
    scopes = {path.split("/")[-2] for path in trainable}
    assert scopes == {"lora", "houlsby", "parallel"}


def test_what_is_stated():
    config = tiny.config()
    assert houlsby.ABOUT.promises.block_bytes(config, 4, width=4) == 2 * (32 + 4) * 4
    assert pfeiffer.ABOUT.promises.block_bytes(config, 2, reduction=8) == (32 + 4) * 2
    assert set(bottleneck.ACTIVATIONS) >= set(ACTIVATIONS)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"width": 0}, "houlsby: width 0 must be at least 1"),
        ({"reduction": 0}, "houlsby: reduction 0 should be a whole number of at least 1"),
        ({"reduction": 5}, "houlsby: reduction 5 does not divide the model's width, 32"),
        ({"activation": "rellu"}, "houlsby: activation 'rellu' is not one of gelu, "),
        ({"init": "none"}, "houlsby: init 'none' is not one of small, zero"),
        ({"layers": [0, 7]}, r"houlsby: layers \[0, 7\] should ascend and lie in 0 to 2"),
        ({"layers": "0"}, "houlsby: layers '0' should be a list of whole numbers"),
    ],
)
def test_mistakes_are_one_line(settings, message):
    with pytest.raises(jp.InputError, match=message):
        beside.start(jp.houlsby(**settings))


def test_a_model_without_layers_is_one_line():
    model = jp.Model(lambda key, params: params, tiny.model()[0].stack)
    with pytest.raises(jp.InputError, match="parallel: this model shows no layers"):
        jp.setup(jp.parallel(), model, {"kernel": np.ones((2, 2))}, jax.random.key(0))
