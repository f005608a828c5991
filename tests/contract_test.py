"""The sketches of docs/contract.md, executed: each slot does what the page says."""

import os
import re
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import jaxpeft as jp
from jaxpeft import tree
from jaxpeft.train.state import mutable
from tests import residuals, tiny

PAGE = Path(__file__).resolve().parent.parent / "docs" / "contract.md"
BATCH = tiny.batch()


@pytest.fixture(scope="session")
def page():
    """The namespace of the page's code blocks, run in order."""
    namespace = {"__name__": "contract_page"}
    for block in re.findall(r"```python\n(.*?)```", PAGE.read_text(encoding="utf-8"), re.DOTALL):
        exec(compile(block, str(PAGE), "exec"), namespace)
    return namespace


def start(method, optimizer=None):
    base, params = tiny.model()
    model, trainable, frozen = jp.setup(method, base, params, jax.random.key(0))
    state = jp.init_state(method, optimizer or optax.adam(1e-2), trainable, frozen, jax.random.key(1))
    return model, state


def train(method, steps=5, batch=BATCH, optimizer=None):
    """(model, first state, last state, losses)."""
    optimizer = optimizer or optax.adam(1e-2)
    model, state = start(method, optimizer)
    step = jax.jit(jp.make_train_step(model, method, optimizer))
    first, losses = state, []
    for _ in range(steps):
        state, metrics = step(state, batch)
        losses.append(float(metrics["loss"]))
    for path, leaf in first.frozen.items():
        for before, after in zip(jax.tree.leaves(leaf), jax.tree.leaves(state.frozen[path]), strict=True):
            assert np.asarray(before).tobytes() == np.asarray(after).tobytes(), path
    return model, first, state, losses


def test_prefix(page):
    """Trains 2 L p d_kv numbers; every query sees the prefix, and it composes with an adapter at the sites."""
    model, first, last, losses = train(page["prefix"](5))
    assert tree.size(first.trainable) == 2 * 3 * 5 * (2 * 8)
    assert losses[-1] < losses[0]
    logits = [np.asarray(model.apply(state.params, BATCH)) for state in (first, last)]
    assert (np.abs(logits[0] - logits[1]).max(axis=-1) > 0).all()
    assert train(jp.chain(page["prefix"](5), jp.lora(2)), steps=2)[3][-1] < losses[0]


def test_meft_rebuilds_what_it_does_not_keep(page):
    """Gradients are those of plain autodiff of the same graph; what is kept does not grow with depth."""
    method = page["meft"](4)
    model, state = start(method)
    noisy = {p: x + 0.05 * jax.random.normal(jax.random.key(3), x.shape) for p, x in state.trainable.items()}
    frozen = dict(state.frozen)

    def plain(trainable):
        params = tree.combine(trainable, frozen)
        x, ctx = model.stack.embed(params, BATCH, None)
        x1 = x2 = x
        for i in range(3):
            layer = jax.tree.map(lambda leaf, i=i: leaf[i], params["layers"])
            x1 = x1 + model.stack.block(layer, x2, ctx.at(i), None, "layers")[0]
            x2 = x2 + jax.nn.gelu(x1 @ layer["meft"]["down"]) @ layer["meft"]["up"]
        return jnp.sum(jnp.sin(model.head(params, (x1 + x2) / 2)))

    def ours(trainable):
        params = tree.combine(trainable, frozen)
        return jnp.sum(jnp.sin(model.apply(params, BATCH)))

    expected, found = jax.jit(jax.grad(plain))(noisy), jax.jit(jax.grad(ours))(noisy)
    for path in expected:
        scale = np.abs(expected[path]).max()
        np.testing.assert_allclose(found[path], expected[path], rtol=1e-3, atol=1e-4 * scale)

    def kept(layers):
        base = tiny.model(num_hidden_layers=layers)
        adapted, trainable, rest = jp.setup(method, *base, jax.random.key(0))
        return residuals.bytes_per_token(adapted, trainable, rest, tiny.batch)

    assert kept(6) == kept(3)


def test_meft_and_lora_inside_its_blocks(page):
    """A replaced `run` and wrapped blocks compose in either order; both train."""
    for chained in (jp.chain(page["meft"](4), jp.lora(2)), jp.chain(jp.lora(2), page["meft"](4))):
        _, first, last, losses = train(chained, steps=3)
        assert losses[-1] < losses[0]
        moved = {
            path.split("/")[-2] for path in first.trainable if np.any(first.trainable[path] != last.trainable[path])
        }
        assert moved == {"meft", "lora"}


def test_lst_differentiates_nothing_of_the_backbone(page):
    """It keeps, per token and layer, the rung's input and eight arrays of the side network's width, one more for the
    last product."""
    _, _, _, losses = train(page["lst"](4, 3))
    assert losses[-1] < losses[0]
    model, state = start(page["lst"](4, 3))
    kept = residuals.bytes_per_token(model, state.trainable, state.frozen, tiny.batch)
    d, side = 32, 32 // 4
    assert kept <= 4 * (3 * (d + 8 * side) + side)
    shapes = [leaf.shape for leaf in residuals.saved(model, state.trainable, state.frozen, tiny.batch(rows=2))]
    assert not [shape for shape in shapes if shape[-1:] == (56,)]  # nothing of the MLP


def test_qlora(page):
    """Integer kernels are never differentiated; the adapted model is near the base; merging gives plain kernels."""
    method = page["qlora"](4)
    model, first, last, losses = train(method)
    assert losses[-1] < losses[0]
    kernel = first.frozen["layers/mlp/up_proj/kernel"]
    assert isinstance(kernel, page["Int8"]) and kernel.q.dtype == jnp.int8
    base, params = tiny.model()
    exact = base.apply(params, BATCH)
    assert 0 < np.abs(model.apply(first.params, BATCH) - exact).max() < 0.1 * np.abs(exact).max()
    merged = method.merge(last.params)
    assert tree.flatten(merged).keys() == tree.flatten(params).keys()
    np.testing.assert_allclose(base.apply(merged, BATCH), model.apply(last.params, BATCH), rtol=1e-3, atol=1e-3)


def test_mezo_has_no_backward_pass(page):
    """The estimate is the directional derivative times the direction; nothing is kept for a backward pass."""
    method = page["mezo"]("norms")
    model, state = start(method)
    objective = method.gradient(
        jp.Objective(
            lambda t, f, batch, key: jp.completion_loss(model, tree.combine(t, f), batch, key),
            lambda *_: pytest.fail("MeZO must not differentiate"),
        )
    )
    key = jax.random.key(5)
    _, estimate = jax.jit(objective.value_and_grad)(state.trainable, state.frozen, BATCH, key, state.opt_state)
    z = optax.tree_utils.tree_random_like(key, state.trainable)
    exact = jax.grad(lambda t: jp.completion_loss(model, tree.combine(t, state.frozen), BATCH)[0])(state.trainable)
    slope = optax.tree_utils.tree_vdot(exact, z)
    for path, g in estimate.items():
        np.testing.assert_allclose(g, slope * z[path], rtol=0.05, atol=1e-3 * np.abs(slope * z[path]).max())


def test_lisa_trains_the_sampled_layers_only(page):
    """Two of three layers move, moments are for two layers, and they start anew at a switch."""
    method = page["lisa"](count=2, every=3, layers=3)
    _, first, last, _ = train(method, steps=2)
    active = set(np.asarray(optax.tree_utils.tree_get(last.opt_state, "active")).tolist())
    assert len(active) == 2
    path = "layers/mlp/up_proj/kernel"
    moved = {i for i in range(3) if np.any(first.trainable[path][i] != last.trainable[path][i])}
    assert moved == active
    moments = optax.tree_utils.tree_get(last.opt_state, "mu")
    assert moments[path].shape[0] == 2 and np.any(moments[path] != 0)
    _, _, switched, _ = train(method, steps=3)
    assert not np.any(optax.tree_utils.tree_get(switched.opt_state, "mu")[path])


def test_galore_moments_are_low_rank(page):
    """Moments of (L, r, m); the change of every kernel has rank r."""
    method = page["galore"](rank=2, every=10)
    _, first, last, losses = train(method, steps=3)
    assert losses[-1] < losses[0]
    path = "layers/mlp/up_proj/kernel"
    assert optax.tree_utils.tree_get(last.opt_state, "mu")[path].shape == (3, 2, 56)
    change = np.asarray(last.trainable[path] - first.trainable[path])
    for singular in np.linalg.svd(change, compute_uv=False):
        assert singular[1] > 1e-4 and singular[2] < 1e-4 * singular[0]


def test_spiel_moves_its_indices(page):
    """Indices change between steps, never repeat, and values that move start at 0; the step reads the new ones."""
    _, params = tiny.model()
    method = page["spiel"](count=6, every=2, drop=3, model=tree.flatten(params))
    model, first, last, _ = train(method, steps=2)
    before, after = mutable(first.opt_state), mutable(last.opt_state)
    path = "layers/mlp/up_proj/spiel/places"
    changed = np.asarray(before[path] != after[path])
    assert (changed.sum(-1) >= 1).all() and (changed.sum(-1) <= 3).all()
    np.testing.assert_array_equal(np.asarray(last.trainable[path.replace("places", "delta")])[changed], 0)
    for leaf in after.values():
        assert all(len(set(row)) == len(row) for row in np.asarray(leaf).tolist())
    assert not np.allclose(model.apply(last.params, BATCH), model.apply(jp.combine(last.trainable, last.frozen), BATCH))


def test_colm_learns_from_the_chosen_rows(page):
    """The gradient is that of the rows with the highest loss, and of no other."""
    method = jp.chain(jp.lora(2), page["colm"](keep=2))
    batch = {**BATCH, "loss_weights": np.ones_like(BATCH["loss_weights"])}
    model, first, chosen, _ = train(method, steps=1, batch=batch)
    rows = [jax.tree.map(lambda x, i=i: x[i : i + 1], batch) for i in range(4)]
    losses = [float(jp.completion_loss(model, first.params, row)[0]) for row in rows]
    worst = np.argsort(losses)[::-1][:2]
    _, _, expected, _ = train(jp.lora(2), steps=1, batch=jax.tree.map(lambda x: x[np.array(worst)], batch))
    for path, leaf in expected.trainable.items():
        np.testing.assert_allclose(chosen.trainable[path], leaf, rtol=1e-4, atol=1e-6)


def test_many_adapters_in_one_batch(page):
    """A row trains its own adapter: an adapter that owns no row stays where it was."""
    batch = {**BATCH, "adapter": np.array([0, 2, 0, 2], np.int32)}
    model, first, last, losses = train(page["many_lora"](3, 2), batch=batch)
    assert losses[-1] < losses[0]
    for path, leaf in first.trainable.items():
        if path.endswith("/b"):
            moved = [bool(np.any(np.asarray(leaf)[:, i] != np.asarray(last.trainable[path])[:, i])) for i in range(3)]
            assert moved == [True, False, True]
    swapped = {**batch, "adapter": np.array([2, 2, 0, 2], np.int32)}
    logits = [np.asarray(model.apply(last.params, b)) for b in (batch, swapped)]
    differs = [bool(np.abs(a - b).max() > 1e-3) for a, b in zip(*logits, strict=True)]
    assert differs == [True, False, False, False]


SHARDED = """
import sys, jax, numpy as np, optax
import jaxpeft as jp
from tests import contract_test, tiny
page = contract_test.page.__wrapped__()
assert len(jax.devices()) == 4
mesh = jax.make_mesh((2, 2), ("data", "fsdp"), axis_types=(jax.sharding.AxisType.Auto,) * 2)
batch = tiny.batch(rows=8)
for method in (jp.lora(2), jp.lora_fa(2, projected=True), jp.full()):
    optimizer = optax.adam(1e-2, eps=1e-4)  # above the rounding of gradients, which it would blow up to whole steps
    model, state = contract_test.start(method, optimizer)
    step = jax.jit(jp.make_train_step(model, method, optimizer, accumulate=2))
    placed, rows = page["shard"](mesh, state, batch)
    for _ in range(2):
        state, metrics = step(state, batch)
        placed, sharded = step(placed, rows)
    np.testing.assert_allclose(sharded["loss"], metrics["loss"], rtol=1e-5)
    kernel = placed.frozen.get("layers/mlp/up_proj/kernel", placed.trainable.get("layers/mlp/up_proj/kernel"))
    assert kernel.addressable_shards[0].data.shape[-1] * 2 == kernel.shape[-1]
    for path, leaf in state.trainable.items():
        np.testing.assert_allclose(placed.trainable[path], leaf, rtol=2e-3, atol=2e-5, err_msg=path)
"""


def test_a_sharded_run_passes_through_unchanged():
    """The same step on a 2 x 2 mesh of (host) devices gives the same numbers, with the kernels left split."""
    environment = {**os.environ, "XLA_FLAGS": "--xla_force_host_platform_device_count=4", "JAX_PLATFORMS": "cpu"}
    environment["PYTHONPATH"] = str(PAGE.parent.parent)
    done = subprocess.run(
        [sys.executable, "-c", SHARDED], env=environment, capture_output=True, text=True, cwd=PAGE.parent.parent
    )
    assert done.returncode == 0, done.stderr[-3000:]
