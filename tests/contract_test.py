"""The sketches of docs/contract.md, executed: each slot does what the page says."""

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
from tests import residuals, tiny, virtual

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
    state = jp.init_state(method, optimizer or optax.adam(1e-2), trainable, frozen, jax.random.key(1), model)
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


def test_spiel_moves_its_indices(page):
    """Indices change between steps, never repeat, and values that move start at 0; the step reads the new ones."""
    model, first, last, _ = train(page["spiel"](count=6, every=2, drop=3), steps=2)
    path = "layers/mlp/up_proj/spiel/places"
    changed = np.asarray(first.moved[path] != last.moved[path])
    assert (changed.sum(-1) >= 1).all() and (changed.sum(-1) <= 3).all()
    np.testing.assert_array_equal(np.asarray(last.trainable[path.replace("places", "delta")])[changed], 0)
    for leaf in last.moved.values():
        assert all(len(set(row)) == len(row) for row in np.asarray(leaf).tolist())
    ones = jax.tree.map(jnp.ones_like, last.trainable)
    new, old = (jp.combine(ones, {**last.frozen, **moved}) for moved in (last.moved, first.moved))
    assert not np.allclose(model.apply(new, BATCH), model.apply(old, BATCH))


def test_distillation_holds_the_model_near_the_base(page):
    """The term is zero at the base, and its weight keeps the adapted model nearer to it."""
    apart = []
    for weight in (0.0, 10.0):
        model, first, last, _ = train(jp.chain(jp.lora(2), page["near_the_base"](weight)), steps=5)
        base, params = tiny.model()
        apart.append(float(np.abs(model.apply(last.params, BATCH) - base.apply(params, BATCH)).mean()))
    assert apart[1] < 0.7 * apart[0]
    step = jax.jit(jp.make_train_step(model, jp.chain(jp.lora(2), page["near_the_base"](1.0)), optax.adam(1e-2)))
    np.testing.assert_allclose(step(first, BATCH)[1]["apart"], 0, atol=1e-5)


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


def test_several_methods_by_name(page, tmp_path):
    """The shipped form of it: both adapters train, and each is an adapter of its own in PEFT's form."""
    base, params = tiny.model()
    losses = page["two_at_once"](base, params, BATCH, jax.random.key(0), tmp_path)
    assert losses[-1] < losses[0] - 0.01
    for name, rank in (("tidy", 4), ("wide", 16)):
        _, leaves = jp.import_adapter(tmp_path / name, base.config, params)
        assert leaves["layers/self_attn/q_proj/lora/b"].shape == (3, rank, 32)
        assert all(np.any(leaf) for leaf in leaves.values())


SHARDED = """
import sys, jax, numpy as np, optax
import jaxpeft as jp
from tests import contract_test, tiny
page = contract_test.page.__wrapped__()
assert len(jax.devices()) == 4
mesh = jax.make_mesh((2, 2), ("data", "fsdp"), axis_types=(jax.sharding.AxisType.Auto,) * 2)
batch = tiny.batch(rows=8)
for method in (jp.lora_fa(2, projected=True), jp.full()):  # adapters beside split kernels; split kernels that train
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


@pytest.mark.slow
def test_a_sharded_run_passes_through_unchanged():
    """The same step on a 2 x 2 mesh of (host) devices gives the same numbers, with the kernels left split."""
    command = [sys.executable, "-c", SHARDED]
    done = subprocess.run(command, env=virtual.devices(4), capture_output=True, text=True, cwd=virtual.ROOT)
    assert done.returncode == 0, done.stderr[-3000:]
