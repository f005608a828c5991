"""UniPT: against its equations in numpy, what a token may see, what it keeps and computes, decoding."""

import jax
import numpy as np
import pytest

import jaxpeft as jp
from jaxpeft import tree
from jaxpeft.generate import generate
from jaxpeft.methods import unipt
from jaxpeft.models import family
from tests import beside, residuals, tiny
from tests.generate_test import PROMPTS, uncached

BATCH = tiny.batch()
BERT = {
    "model_type": "bert",
    "architectures": ["BertForSequenceClassification"],
    "num_labels": 3,
    "vocab_size": 97,
    "hidden_size": 32,
    "intermediate_size": 56,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "max_position_embeddings": 64,
}


def encoder():
    base = family(BERT).from_hf(BERT)
    return base, base.init(jax.random.key(3), {})


def layer_norm(x, scale=1.0, bias=0.0):
    x = x - x.mean(-1, keepdims=True)
    return x / np.sqrt((x * x).mean(-1, keepdims=True) + 1e-5) * scale + bias


def by_hand(own, h, segments, causal, residual):
    """The equations for one row at a time and one token at a time: h is a list of (B, S, d)."""
    out = np.zeros_like(h[-1])
    for row in range(out.shape[0]):
        t = []
        for i, f in enumerate(h[1:]):
            p = f[row] @ own["project"]["kernel"][i] + own["project"]["bias"][i]
            t.append(layer_norm(p, own["project_norm"]["scale"][i], own["project_norm"]["bias"][i]))
        for q in range(out.shape[1]):
            if segments[row, q] == 0:
                continue
            seen = [k for k in range(q + 1 if causal else out.shape[1]) if segments[row, k] == segments[row, q]]
            a = t[-1][q]
            c, m = [], []
            for one in t:
                scores = np.maximum(one[seen] @ a, 0)
                m.append((scores / (scores.sum() + 1e-6)) @ one[seen] + one[q])
                c.append(own["confidence"] @ (t[-1][seen].mean(0) * one[seen].mean(0)))
            c = np.exp(c - np.max(c))
            mixed = np.einsum("n,nk->k", c / c.sum(), m)
            gathered = mixed @ own["gather"]["kernel"] + own["gather"]["bias"]
            u = a + layer_norm(gathered, own["gather_norm"]["scale"], own["gather_norm"]["bias"])
            out[row, q] = np.maximum(u, 0) @ own["up"]["kernel"] + own["up"]["bias"]
            out[row, q] += h[-1][row, q] if residual else 0
    return out


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("residual", [True, False])
def test_computes_its_equations(causal, residual):
    """Rows of two segments, or one and padding."""
    base, params = tiny.model() if causal else encoder()
    model, trainable, frozen = jp.setup(jp.unipt(4, residual=residual), base, params, jax.random.key(0))
    params = tree.combine(beside.moved(trainable), frozen)
    batch = {name: BATCH[name] for name in ("tokens", "positions", "segment_ids")}
    segments = np.array([[1] * 9 + [2] * 7, [1] * 5 + [0] * 11, [1] * 16, [1] * 2 + [2] * 3 + [0] * 11], np.int32)
    batch["segment_ids"] = segments
    h = [np.asarray(x, np.float64) for x in beside.states(base.stack, params, batch)[0]]
    own = jax.tree.map(lambda x: np.asarray(x, np.float64), params["unipt"])
    found = np.asarray(jax.jit(model.hidden)(params, batch))
    counts = segments > 0
    np.testing.assert_allclose(found[counts], by_hand(own, h, segments, causal, residual)[counts], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("causal", [True, False])
def test_padding_does_not_leak(causal):
    base, params = tiny.model() if causal else encoder()
    model, trainable, frozen = jp.setup(jp.unipt(2), base, params, jax.random.key(0))
    params = tree.combine(beside.moved(trainable), frozen)
    batch, other, counts = beside.padded()
    hidden = jax.jit(model.hidden)
    one, two = (np.asarray(hidden(params, b)) for b in (batch, other))
    np.testing.assert_array_equal(one[counts], two[counts])


def test_no_token_of_a_decoder_sees_what_follows():
    model, trainable, frozen = beside.start(jp.unipt(2))
    params = tree.combine(beside.moved(trainable), frozen)
    tokens = np.array(BATCH["tokens"])
    tokens[:, 10:] = (tokens[:, 10:] + 1) % 97
    hidden = jax.jit(model.hidden)
    one, two = (np.asarray(hidden(params, {**BATCH, "tokens": t})) for t in (BATCH["tokens"], tokens))
    np.testing.assert_array_equal(one[:, :10], two[:, :10])
    assert (one[:, 10:] != two[:, 10:]).any()


def test_no_product_of_the_backbones_backward_pass():
    """The gradient's products are the backbone's forward pass and the method's own, counted by hand."""
    base, params = tiny.model()
    model, trainable, frozen = beside.start(jp.unipt(4))
    found = beside.gradient_flops(model, trainable, frozen, BATCH)
    tokens, length, d, k, layers = BATCH["tokens"].size, 16, 32, 8, 3
    project = layers * tokens * d * k  # forward, again, dW
    pairs = layers * tokens * length * k  # scores and gathering: forward, again, two gradients each
    means = layers * tokens * length * k  # forward, again, one gradient: what is seen has none
    logits = layers * tokens * k
    mixed = layers * tokens * k
    gather, up = tokens * k * k, tokens * k * d
    least = 3 * project + 2 * 3 * pairs + 2 * means + 3 * gather + 3 * up
    most = 3 * project + 2 * 4 * pairs + 3 * means + 8 * logits + 4 * mixed + 4 * gather + 4 * up
    own = (found - beside.forward_flops(base, params, BATCH)) / 2
    assert least <= own <= most
    assert not beside.transposed_products(
        beside.gradient_trace(model, trainable, frozen, BATCH), beside.backbone_kernels(params)
    )


def test_keeps_per_layer_what_it_states():
    assert beside.kept_per_layer(jp.unipt(4)) == unipt.layer_bytes(tiny.config(), 4) == 4 * 32


def test_keeps_no_scores():
    """Twice the length, twice the bytes."""
    model, trainable, frozen = beside.start(jp.unipt(4))
    kept = [
        tree.num_bytes(residuals.saved(model, trainable, frozen, tiny.batch(rows=8, length=length)))
        for length in (32, 64, 128)
    ]
    assert kept[2] - kept[1] == 2 * (kept[1] - kept[0])


def test_decodes_with_its_cache():
    model, trainable, frozen = beside.start(jp.unipt(4, layers=[0, 2]))
    params = tree.combine(beside.moved(trainable), frozen)
    together = generate(model, params, PROMPTS[1:3], 7, eos=())
    assert together == [uncached(model, params, prompt, 7) for prompt in PROMPTS[1:3]]
    assert len(set(together[0] + together[1])) > 2


def test_residual_starts_at_the_base():
    base, params = tiny.model()
    model, trainable, frozen = beside.start(jp.unipt(4, residual=True))
    adapted = tree.combine(trainable, frozen)
    np.testing.assert_allclose(
        jax.jit(model.hidden)(adapted, BATCH), jax.jit(base.hidden)(params, BATCH), rtol=1e-6, atol=1e-6
    )


def test_refuses():
    with pytest.raises(jp.InputError, match="unipt: reduction 5 does not divide the model's hidden size, 32"):
        beside.start(jp.unipt(5))
    with pytest.raises(jp.InputError, match=r"unipt: layers \[3\] should ascend"):
        beside.start(jp.unipt(layers=[3]))
    with pytest.raises(jp.InputError, match="unipt: has no merged form"):
        jp.unipt().merge({})
