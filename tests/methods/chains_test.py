"""Several members of a chain: at one site, in either order, the equation's numbers; and what is refused."""

import jax
import numpy as np
import pytest

import jaxpeft as jp
from jaxpeft import tree
from jaxpeft.quant import is_packed
from jaxpeft.train.optimizer import make_direction
from tests import tiny

LORA = {"rank": 2, "alpha": 4.0, "targets": ["v_proj", "down_proj"]}
IA3 = {"targets": ["v_proj", "down_proj"]}
V, DOWN = "layers/self_attn/v_proj", "layers/mlp/down_proj"
BATCH = tiny.batch(2)


def kernels(order, leaves):
    """(W of v_proj, W of down_proj), merged by the equations: the last of the chain is nearest to the kernel."""
    w = {site: leaves[f"{site}/kernel"] for site in (V, DOWN)}
    update = {site: 2 * leaves[f"{site}/lora/a"] @ leaves[f"{site}/lora/b"] for site in (V, DOWN)}
    out, feed = leaves[f"{V}/ia3/out"][:, None, :], leaves[f"{DOWN}/ia3/in"][:, :, None]
    if order == "ia3+lora":
        return out * (w[V] + update[V]), feed * (w[DOWN] + update[DOWN])
    return out * w[V] + update[V], feed * w[DOWN] + update[DOWN]


@pytest.mark.parametrize("order", ["ia3+lora", "lora+ia3"])
def test_lora_and_ia3(order):
    members = {"lora": jp.lora(**LORA), "ia3": jp.ia3(**IA3)}
    method = jp.chain(*(members[name] for name in order.split("+")))
    base, params = tiny.model()
    model, trainable, rest = jp.setup(method, base, params, jax.random.key(0))
    keys = jax.random.split(jax.random.key(1), len(trainable))
    trainable = {
        path: leaf + 0.3 * jax.random.normal(key, leaf.shape)
        for key, (path, leaf) in zip(keys, trainable.items(), strict=True)
    }
    merged = method.merge(jp.combine(trainable, rest))
    for site, expected in zip((V, DOWN), kernels(order, {**trainable, **rest}), strict=True):
        np.testing.assert_allclose(tree.flatten(merged)[f"{site}/kernel"], expected, rtol=1e-5, atol=1e-5)
    adapted = model.apply(jp.combine(trainable, rest), BATCH)
    np.testing.assert_allclose(base.apply(merged, BATCH), adapted, rtol=1e-4, atol=1e-4)


def test_ia3_over_dora():
    """l * (mag / c) (x V): DoRA folds first, and its columns are scaled."""
    method = jp.chain(jp.ia3(**IA3), jp.dora(**LORA))
    base, params = tiny.model()
    model, trainable, rest = jp.setup(method, base, params, jax.random.key(0))
    trainable = {path: leaf + 0.1 for path, leaf in trainable.items()}
    adapted = model.apply(jp.combine(trainable, rest), BATCH)
    merged = method.merge(jp.combine(trainable, rest))
    np.testing.assert_allclose(base.apply(merged, BATCH), adapted, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("first", [True, pytest.param(False, marks=pytest.mark.slow)])
@pytest.mark.parametrize("name", ["dora", "ia3", "loha", "lokr", "paca", "vera"])
def test_over_packed_kernels(name, first):
    """Beside packed kernels, which stay packed: starts at the packed base, and is merged to plain ones."""
    others = {"loha": jp.loha, "lokr": jp.lokr, "paca": jp.paca, "vera": jp.vera}
    adapters = {"dora": jp.dora(**LORA), "ia3": jp.ia3(**IA3)}
    adapter = adapters.get(name) or others[name](2, targets=LORA["targets"])
    method = jp.chain(jp.quantize(), adapter) if first else jp.chain(adapter, jp.quantize())
    base, params = tiny.model()
    model, trainable, rest = jp.setup(method, base, params, jax.random.key(0))
    assert all(is_packed(rest[f"{site}/kernel"]) for site in (V, DOWN))
    apply = jax.jit(model.apply)
    packed = base.apply({**params, "layers": tree.unflatten(rest)["layers"]}, BATCH)
    np.testing.assert_allclose(apply(jp.combine(trainable, rest), BATCH), packed, rtol=1e-4, atol=1e-4)
    trainable = {path: leaf + 0.1 for path, leaf in trainable.items()}
    merged = method.merge(jp.combine(trainable, rest))
    assert not any(is_packed(tree.flatten(merged)[f"{site}/kernel"]) for site in (V, DOWN))
    adapted = apply(jp.combine(trainable, rest), BATCH)
    np.testing.assert_allclose(base.apply(merged, BATCH), adapted, rtol=1e-4, atol=1e-4)


OTHERS = {
    "lisa": {"count": 1},
    "owlore": {"rank": 4, "count": 1, "scores": "uniform"},
    "ist": {"share": 0.5},
    "lora": {"rank": 2},
}
OTHERS |= {"galore": {"rank": 4}, "natural_galore": {"rank": 4}}
TWICE = "another member of the chain samples layers already"
BEFORE = "stands in front of what replaces the gradient; put {} last, or leave one of them out"
PROJECTED = "another member of the chain projects kernels, or moves them itself"
APART = "{}'s layers/mlp/down_proj/galore/r is differentiated whole, and would be moved"


@pytest.mark.parametrize(
    ("names", "message"),
    [
        ("lora+ist+lisa", f"lisa: {TWICE}"),
        ("half+lisa", f"lisa: {TWICE}"),
        ("lisa+half", f"half: {TWICE}"),
        ("half+owlore", f"owlore: {TWICE}"),
        ("galore+mezo", f"galore: {BEFORE.format('galore')}"),
        ("natural_galore+mezo", f"natural_galore: {BEFORE.format('natural_galore')}"),
        ("owlore+mezo", f"owlore: {BEFORE.format('owlore')}"),
        ("lora+ist+mezo", f"ist: {BEFORE.format('ist')}"),
        ("galore+lisa", f"galore[+]lisa: {APART.format('galore')}"),
        ("natural_galore+galore", f"galore: {PROJECTED}"),
        ("galore+natural_galore", f"natural_galore: {PROJECTED}"),
        ("mezo+galore", f"galore: {PROJECTED}"),
        ("hybrid+mezo", f"hybrid: {BEFORE.format('hybrid')}"),
    ],
)
def test_members_that_would_undo_one_another_are_refused(names, message):
    members = [getattr(jp, name)(**OTHERS.get(name, {})) for name in names.split("+")]
    with pytest.raises(jp.InputError, match=message):
        run(jp.chain(*members))


def run(method):
    """One step, traced alone."""
    model, trainable, rest = jp.setup(method, *tiny.model(), jax.random.key(0))
    optimizer = make_direction("adam")
    state = jp.init_state(method, optimizer, trainable, rest, jax.random.key(1), model)
    return jax.eval_shape(jp.make_train_step(model, method, optimizer, rate=1e-3), state, BATCH)
