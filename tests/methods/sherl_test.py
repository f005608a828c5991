"""SHERL: against its equations in numpy, which layers gradients pass, what it keeps, decoding."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxpeft as jp
from jaxpeft import tree
from jaxpeft.generate import generate
from jaxpeft.methods import sherl
from tests import beside, residuals, tiny
from tests.generate_test import PROMPTS, uncached
from tests.methods.unipt_test import encoder, layer_norm

BATCH = tiny.batch()


def by_hand(own, h):
    """What the late layers read, token by token: h is a list of (B, S, d), the early layers' outputs."""
    out = np.zeros_like(h[-1])
    for place in np.ndindex(*out.shape[:2]):
        t = []
        for i, f in enumerate(h):
            p = f[place] @ own["project"]["kernel"][i] + own["project"]["bias"][i]
            t.append(layer_norm(p, own["project_norm"]["scale"][i], own["project_norm"]["bias"][i]))
        shallow, deep = t[:-1], t[-1]
        unit = [s / np.linalg.norm(s) for s in shallow]
        weights = [
            max(own["confidence"] @ (s * deep), 0) / sum(max(a @ b, 0) for b in unit)
            for s, a in zip(shallow, unit, strict=True)
        ]
        guide = deep + sum(w * s for w, s in zip(weights, shallow, strict=True)) / (sum(weights) + 1e-6)
        mapped = np.maximum(guide, 0) @ own["out"]["kernel"] + own["out"]["bias"]
        out[place] = layer_norm(mapped, own["out_norm"]["scale"], own["out_norm"]["bias"])
        out[place] += np.tanh(own["gate"] / 0.1) * h[-1][place]
    return out


@pytest.mark.parametrize(("kind", "late"), [("decoder", 3), ("encoder", 1)])
def test_computes_its_equations(kind, late):
    base, params = tiny.model(num_hidden_layers=5) if kind == "decoder" else encoder()
    model, trainable, frozen = jp.setup(jp.sherl(4, late=late), base, params, jax.random.key(0))
    own = tree.combine(beside.moved(trainable), frozen)
    batch = {name: BATCH[name] for name in ("tokens", "positions", "segment_ids")}
    h, ctx = beside.states(base.stack, params, batch)
    early = len(h) - 1 - late
    wide = jax.tree.map(lambda x: np.asarray(x, np.float64), own["sherl"])
    x = by_hand(wide, [np.asarray(f, np.float64) for f in h[1 : early + 1]]).astype(np.float32)
    for i in range(early, early + late):
        layer = jax.tree.map(lambda leaf, i=i: leaf[i], params["layers"])
        x, _ = base.stack.block(layer, x, ctx.at(i), None, "layers")
    np.testing.assert_allclose(jax.jit(model.hidden)(own, batch), x, rtol=1e-4, atol=1e-4)


def plain_gradients(base, params, trainable):
    """Gradients of the loss of the same model, built layer by layer and without recomputation or stop_gradient."""

    def run(stack, params, batch, key=None, cache=None):
        whole = tree.join_layers(params)
        h, ctx = beside.states(stack, whole, batch)
        x = sherl.aggregate(params["sherl"], jnp.stack(h[1:-1]))
        x = x + jnp.tanh(params["sherl"]["gate"] / 0.1) * h[-2]
        layer = jax.tree.map(lambda leaf: leaf[-1], whole["layers"])
        return stack.block(layer, x, ctx.at(len(h) - 2), None, "layers")[0], None

    plain = base._replace(stack=base.stack._replace(run=run))
    return jax.jit(jax.grad(lambda t: jp.completion_loss(plain, tree.combine(t, params), BATCH)[0]))(trainable)


@pytest.mark.slow
def test_gradients_are_those_of_the_plain_graph():
    base, _ = tiny.model()
    model, trainable, frozen = beside.start(jp.sherl(4))
    trainable = beside.moved(trainable)
    found = jax.jit(jax.grad(lambda t: jp.completion_loss(model, tree.combine(t, frozen), BATCH)[0]))(trainable)
    for path, plain in plain_gradients(base, frozen, trainable).items():
        np.testing.assert_allclose(found[path], plain, rtol=1e-3, atol=1e-6, err_msg=path)


def test_gradients_pass_the_late_layers_only():
    """More early layers cost their forward pass and the method's own products; transposed kernels are the last's."""
    models = [tiny.model(num_hidden_layers=count) for count in (3, 7)]
    own, forward = [], []
    for count, (base, params) in zip((3, 7), models, strict=True):
        made = beside.start(jp.sherl(4), num_hidden_layers=count)
        own.append(beside.gradient_flops(*made, BATCH))
        forward.append(beside.forward_flops(base, params, BATCH))
    tokens, d, k = BATCH["tokens"].size, 32, 8
    cosines = lambda shallow: tokens * shallow**2 * k
    projections = 4 * 3 * tokens * d * k  # forward, again, dW
    redundancy = 4 * (cosines(5) - cosines(1))  # forward, again, and both gradients
    rest = 8 * 4 * tokens * k  # sums over layers: weights and guide
    extra = (own[1] - own[0] - (forward[1] - forward[0])) / 2
    assert projections + redundancy <= extra <= projections + redundancy + 2 * rest
    kernels = beside.backbone_kernels(models[0][1])
    transposed = [
        len(
            beside.transposed_products(
                beside.gradient_trace(*beside.start(jp.sherl(4), num_hidden_layers=n), BATCH), kernels
            )
        )
        for n in (3, 7)
    ]
    assert transposed[0] == transposed[1] > 0


def test_keeps_per_layer_what_it_states():
    assert beside.kept_per_layer(jp.sherl(4)) == sherl.layer_bytes(tiny.config(), 4) == 4 * 32


def test_late_layers_keep_their_inputs():
    """Of layers that run with gradients: the stream between them, and no second copy of their weights."""
    one, three = (beside.start(jp.sherl(4, late=late), num_hidden_layers=6) for late in (1, 3))
    kept = [residuals.bytes_per_token(*made, tiny.batch) for made in (one, three)]
    assert kept[0] - kept[1] == 0  # two early layers fewer, two late ones more, d each
    shapes = [leaf.shape for leaf in residuals.saved(*three, tiny.batch())]
    assert shapes.count((3, 32, 56)) <= 2  # gate and up, once each


def test_padding_does_not_leak():
    model, trainable, frozen = beside.start(jp.sherl(2))
    params = tree.combine(beside.moved(trainable), frozen)
    batch, other, counts = beside.padded()
    hidden = jax.jit(model.hidden)
    one, two = (np.asarray(hidden(params, b)) for b in (batch, other))
    np.testing.assert_array_equal(one[counts], two[counts])


@pytest.mark.slow
def test_decodes_with_the_models_cache():
    model, trainable, frozen = beside.start(jp.sherl(4))
    params = tree.combine(beside.moved(trainable), frozen)
    together = generate(model, params, PROMPTS[1:3], 7, eos=())
    assert together == [uncached(model, params, prompt, 7) for prompt in PROMPTS[1:3]]
    assert len(set(together[0] + together[1])) > 2


def test_dropout_is_drawn_from_the_key():
    model, trainable, frozen = beside.start(jp.sherl(4, dropout=0.5))
    params = tree.combine(trainable, frozen)
    hidden = jax.jit(model.hidden)
    plain, one, again, other = (hidden(params, BATCH, key) for key in (None, *map(jax.random.key, (0, 0, 1))))
    assert (one == again).all() and (one != other).any() and (one != plain).any()


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"reduction": 5}, "reduction 5 does not divide the model's hidden size, 32"),
        ({"late": 3}, "late 3 must be at least 1 and below the model's 3 layers"),
        ({"late": 0}, "late 0 must be"),
        ({"layers": [1, 2]}, r"layers \[1, 2\] should ascend and lie in 0 to 1"),
        ({"dropout": 1.0}, "dropout 1.0 must be at least 0 and below 1"),
    ],
)
def test_refuses(settings, words):
    with pytest.raises(jp.InputError, match=f"sherl: {words}"):
        beside.start(jp.sherl(**settings))


def test_has_no_merged_form():
    with pytest.raises(jp.InputError, match="sherl: has no merged form"):
        jp.sherl().merge({})
