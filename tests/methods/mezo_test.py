"""MeZO: against its equations in numpy on whole leaves, as an estimate of the gradient, its rounding, its figures."""

import functools
import importlib.util

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from jax.ad_checkpoint import checkpoint_name

import jaxpeft as jp
from jaxpeft import noise, tree
from jaxpeft.backward.flops import count_flops
from jaxpeft.backward.plan import parse
from jaxpeft.backward.residuals import planned
from jaxpeft.memory import aot, planner, targets
from jaxpeft.method import MOVED, View
from jaxpeft.models import geometries
from jaxpeft.replay import replay
from jaxpeft.train.step import objective_of
from tests import beside, tiny
from tests.methods.estimates import BATCH, EPS, RATE, RUN, SGD, by_hand, start, z_of, z_of_step

DECAY = 0.1


# Alone: the weights move.


@pytest.fixture(scope="module")
def alone():
    """(model, state, compiled step) of a tied model."""
    method = jp.mezo(eps=EPS)
    model, state = start(method, num_hidden_layers=2, tie_word_embeddings=True)
    return model, state, jax.jit(jp.make_train_step(model, method, SGD, rate=RATE, weight_decay=DECAY))


def test_a_step_is_that_of_whole_leaves_in_numpy(alone):
    model, state, step = alone
    assert not state.trainable and not state.frozen
    z = z_of_step(state.moved)
    mean, slope = by_hand(model, state, state.moved, z)
    after, metrics = step(state, BATCH)
    np.testing.assert_allclose([metrics["loss"], metrics["slope"]], [mean, slope], rtol=2e-3)
    for path, leaf in state.moved.items():
        decay = 0 if path.endswith(("scale", "bias")) else DECAY
        expected = leaf - RATE * (float(metrics["slope"]) * z[path] + decay * np.asarray(leaf))
        np.testing.assert_allclose(after.moved[path], expected, rtol=1e-5, atol=1e-6, err_msg=path)


def test_a_restored_state_goes_on_exactly(alone):
    """z is a function of the key and the step alone."""
    _, state, step = alone
    second, _ = step(step(state, BATCH)[0], BATCH)
    first = step(state, BATCH)[0]._replace(key=None)
    restored = jax.tree.map(jnp.array, jax.device_get(first))._replace(key=RUN)
    again, _ = step(restored, BATCH)
    chex.assert_trees_all_equal(again._replace(key=None), second._replace(key=None))


def unrolled(stack, params, batch, key=None, cache=None):
    """`run` without `lax.scan`."""
    x, ctx = stack.embed(params, batch, key)
    for segment, first, end in tree.segments(params):
        for i in range(first, end):
            layer = jax.tree.map(lambda leaf, i=i, first=first: leaf[i - first], params[segment])
            x, _ = stack.block(layer, x, ctx.at(i), None, segment)
    return x, cache


@pytest.mark.slow
def test_any_run_and_micro_batches_give_the_same_slope():
    """In the block by a scan, in groups of rows, on whole leaves of a run of its own, and in two micro-batches."""
    method = jp.mezo(eps=EPS)
    model, state = start(method, num_hidden_layers=2)

    def slope(run, accumulate=1):
        other = model._replace(stack=model.stack._replace(run=run))
        objective = objective_of(other, method, state.leaves, accumulate=accumulate)
        (loss, aux), grads = jax.jit(objective.value_and_grad)({}, state.moved, BATCH, RUN, None)
        assert grads == {} and float(aux["weight"]) == BATCH["loss_weights"].sum()
        return float(loss), float(aux["slope"])

    expected = slope(model.stack.run)
    for found in (slope(planned(parse("matmuls,tokens=16"))), slope(unrolled), slope(model.stack.run, 2)):
        np.testing.assert_allclose(found, expected, rtol=1e-3)


# In a chain: what the others train.

CHAINS = {
    "mezo+lora": lambda mezo: jp.chain(mezo, jp.lora(2, targets="q_proj,up_proj", dropout=0.5)),
    "lora+mezo": lambda mezo: jp.chain(jp.lora(2, targets="v_proj"), mezo),
    "mezo+lst": lambda mezo: jp.chain(mezo, jp.lst(4)),
}


@pytest.mark.parametrize("name", ["mezo+lora", "lora+mezo", pytest.param("mezo+lst", marks=pytest.mark.slow)])
def test_in_a_chain_it_estimates_what_the_others_train(name):
    method = CHAINS[name](jp.mezo(eps=EPS))
    assert not any(method.role(path) == MOVED for path in ("norm/scale", "layers/mlp/up_proj/kernel"))
    model, state = start(method, num_hidden_layers=2)
    state = state._replace(trainable=beside.moved(state.trainable))
    z = z_of_step(state.trainable)
    mean, slope = by_hand(model, state, state.trainable, z)
    after, metrics = jax.jit(jp.make_train_step(model, method, SGD, rate=RATE))(state, BATCH)
    np.testing.assert_allclose([metrics["loss"], metrics["slope"]], [mean, slope], rtol=2e-3, atol=1e-3)
    for path, leaf in state.trainable.items():
        expected = leaf - RATE * float(metrics["slope"]) * z[path]
        np.testing.assert_allclose(after.trainable[path], expected, rtol=1e-5, atol=1e-6, err_msg=path)


@pytest.mark.slow
def test_several_seeds_are_the_mean_of_estimates():
    """Of n directions, the first of which is the only one of n = 1; moved leaves get it as trained ones do."""
    eps, n = 1e-2, 3
    words = np.asarray(noise.draw(jax.random.fold_in(RUN, 0), n)).view(np.uint32)
    np.testing.assert_array_equal(words[0].view(np.int32), noise.draw(jax.random.fold_in(RUN, 0)))
    of_pair = lambda mezo: jp.chain(mezo, jp.lora(1, targets="q_proj"))
    of_norms = lambda mezo: mezo
    for made, which in ((of_pair, "all"), (of_norms, "norms")):
        method = made(jp.mezo(which, eps=eps, seeds=n))
        model, state = start(method, num_hidden_layers=1)
        state = state._replace(trainable=beside.moved(state.trainable))
        leaves = {**state.trainable, **state.moved}
        zs = [{path: z_of(word, path, leaf.shape) for path, leaf in leaves.items()} for word in words]
        means, slopes = zip(*(by_hand(model, state, leaves, z) for z in zs), strict=True)
        after, metrics = jax.jit(jp.make_train_step(model, method, SGD, rate=RATE))(state, BATCH)
        np.testing.assert_allclose(metrics["loss"], np.mean(means), rtol=1e-4)
        np.testing.assert_allclose(metrics["slope"], np.mean(slopes), rtol=5e-3, atol=2e-3)
        for path, leaf in leaves.items():
            step = np.mean([slope * z[path] for slope, z in zip(slopes, zs, strict=True)], axis=0)
            found = {**after.trainable, **after.moved}[path]
            np.testing.assert_allclose(found, leaf - RATE * step, rtol=1e-5, atol=1e-5, err_msg=path)


def test_the_estimate_is_unbiased():
    """The mean of n estimates of d numbers: g on average, at an angle of cosine 1 / sqrt(1 + (d + 1) / n), and, as an
    estimate's variance is (d + 1) |g|^2, at a distance of sqrt((d + 1) / n) |g|.
    """
    seeds, draws = 5, 100
    method, n = jp.chain(jp.mezo(seeds=seeds), jp.lora(1, targets="q_proj")), seeds * draws
    model, state = start(method, num_hidden_layers=1)
    trainable = beside.moved(state.trainable)
    exact = jax.grad(lambda t: jp.completion_loss(model, tree.combine(t, state.frozen), BATCH)[0])(trainable)
    objective = objective_of(model, method, state.leaves)
    one = lambda key: objective.value_and_grad(trainable, state.frozen, BATCH, key, None)[1]
    keys = jax.random.split(jax.random.key(3), draws)
    found = jax.jit(lambda: jax.lax.map(one, keys))()
    flat = lambda grads, lead: np.concatenate(
        [np.reshape(grads[path], (*lead, -1)) for path in sorted(grads)], axis=-1, dtype=np.float64
    )
    g, estimates = flat(exact, ()), flat(found, (draws,))
    mean = estimates.mean(0)
    np.testing.assert_allclose(mean @ g / (g @ g), 1, atol=4 * np.sqrt(2 / n))
    cosine = mean @ g / np.linalg.norm(g) / np.linalg.norm(mean)
    np.testing.assert_allclose(cosine, 1 / np.sqrt(1 + (g.size + 1) / n), atol=0.05)
    for together in (1, 4):  # the squares of distances are means of `n` squared slopes, of variance 2 each
        groups = estimates.reshape(-1, together, g.size).mean(1)
        distance = np.square(groups - g).sum(1).mean() / (g @ g)
        np.testing.assert_allclose(distance, (g.size + 1) / (seeds * together), rtol=4 * np.sqrt(2 * together / n))


# Noise, rounding, tables.


def test_noise_is_normal_and_independent():
    words = noise.draw(jax.random.key(5))
    index = noise.numbers((256, 256))
    leaves = [noise.of_leaf(words, "a"), noise.of_leaf(words, "b"), noise.of_leaf(noise.draw(jax.random.key(6)), "a")]
    layers = noise.of_leaf(words, "a", jnp.arange(2))
    z = np.stack([np.ravel(noise.normal(k, index)) for k in (*leaves, layers[:, 0], layers[:, 1])]).astype(np.float64)
    np.testing.assert_allclose([(z**k).mean(1) for k in (1, 2, 3, 4)], [[x] * 5 for x in (0, 1, 0, 3)], atol=0.1)
    np.testing.assert_allclose(np.corrcoef([*z, np.roll(z[0], 1), np.roll(z[0], 256)]), np.eye(7), atol=0.02)


def test_stochastic_rounding_is_unbiased_between_neighbours():
    keys, index = noise.of_leaf(noise.draw(jax.random.key(5)), "a"), noise.numbers((2**16,))
    for x in (1.001, -0.0123, 3e-20):
        wide = jnp.full(index.shape, x, jnp.float32)
        found = np.asarray(noise.rounded(wide, jnp.bfloat16, keys, index).astype(jnp.float32), np.float64)
        low, high = np.unique(found)
        assert low < x < high
        np.testing.assert_allclose(found.mean(), x, atol=4 * (high - low) / 2 / 2**8)
    assert np.array_equal(noise.rounded(wide, jnp.float32, keys, index), wide)


@pytest.mark.parametrize("rounding", ["stochastic", "nearest"])
def test_small_steps_of_bfloat16_weights(rounding):
    """Of steps far below half of the last place, the nearest weights keep nothing, and stochastic ones the mean."""
    method, rate = jp.mezo(which="embeddings", eps=EPS, rounding=rounding), 7e-3
    model, state = start(method, jnp.bfloat16, num_hidden_layers=1)
    ((path, leaf),) = state.moved.items()
    state = state._replace(moved={path: jnp.where(leaf < 0, -1, 1).astype(leaf.dtype)})
    after, metrics = jax.jit(jp.make_train_step(model, method, SGD, rate=rate))(state, BATCH)
    assert after.moved[path].dtype == jnp.bfloat16
    moved = np.asarray(after.moved[path], np.float64) - np.asarray(state.moved[path], np.float64)
    if rounding == "nearest":
        assert not moved.any()
        return
    z = z_of_step(state.moved)[path]
    share = (moved * z).sum() / (z * z).sum() / (-rate * float(metrics["slope"]))
    # A step s from a place of width u has variance s u at most.
    spread = np.sqrt(2**-7 / (rate * abs(float(metrics["slope"])) * z.size))
    np.testing.assert_allclose(share, 1, atol=5 * spread)
    assert 5 * spread < 0.9


def test_tables_are_those_of_whole_leaves(monkeypatch):
    """Rows and products of W + eps z, in blocks of which the last overlaps."""
    monkeypatch.setattr(noise, "BLOCK", 5 * 8)
    w, eps = jax.random.normal(jax.random.key(0), (17, 8)), jnp.float32(0.1)
    keys = noise.of_leaf(noise.draw(jax.random.key(5)), "table")
    whole = w + eps * noise.normal(keys, noise.numbers(w.shape))
    table, x = noise.Noisy(w, noise.Direction(keys), eps), jax.random.normal(jax.random.key(1), (2, 3, 8))
    turned = noise.Noisy(w.T, noise.Direction(keys), eps)
    whole_turned = w.T + eps * noise.normal(keys, noise.numbers(w.T.shape))
    np.testing.assert_allclose(table.product(x, 1), x @ whole.T, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(turned.product(x, 0), x @ whole_turned, rtol=1e-5, atol=1e-5)
    ids = np.array([[0, 16], [3, -1]])
    np.testing.assert_allclose(table.rows(ids), np.asarray(whole)[ids], rtol=1e-6)
    np.testing.assert_allclose(jnp.asarray(table), whole, rtol=1e-6)
    assert np.isnan(table.rows(np.array([17]))).all()


# What it refuses, what it needs.


def test_refusals():
    several = {"variant": "conservative", "seeds": 2}
    bad_values = ({"eps": 0.0}, {"eps": float("nan")}, {"rounding": "up"}, {"seeds": 0}, {"which": "last:0"}, several)
    for bad in (
        *bad_values,
        {"variant": "best"},
        {"sparsity": 1.0},
        {"sparsity": -0.5},
        {"variant": "forward", "eps": 1.0},
    ):
        with pytest.raises(jp.InputError):
            jp.mezo(**bad)
    method = jp.mezo("norms")
    model, state = start(method, num_hidden_layers=1)
    with pytest.raises(jp.InputError, match="give make_train_step a rate"):
        jax.eval_shape(jp.make_train_step(model, method, SGD), state, BATCH)
    method = jp.chain(jp.mezo(variant="conservative"), jp.lora(1))
    model, state = start(method, num_hidden_layers=1)
    with pytest.raises(jp.InputError, match="tries its learning rate: give make_train_step a rate"):
        jax.eval_shape(jp.make_train_step(model, method, SGD), state, BATCH)
    with pytest.raises(jp.InputError, match=r"mezo: adam needs moments, and .* moves without any; .* mezo\+full"):
        start(jp.mezo(variant="adam"), num_hidden_layers=1)
    packed = View(model, method.specs, jp.mezo().role, {"layers/mlp/up_proj/kernel": object()})
    with pytest.raises(jp.InputError, match="is quantized and cannot move"):
        jp.mezo().gradient(objective_of(model, jp.lora(1), state.leaves), packed)


def test_merge_is_that_of_the_others():
    model, state = start(method := CHAINS["mezo+lora"](jp.mezo()), num_hidden_layers=1)
    merged = method.merge(state.params)
    chex.assert_trees_all_equal(merged, jp.lora(2, targets="q_proj,up_proj").merge(state.params))
    assert jp.mezo().merge(merged) == merged
    assert model.stack.run is tiny.model()[0].stack.run


def test_plans_two_forward_passes():
    """No gradients, no activations, nothing computed again, and the products of two evaluations."""
    config = {**tiny.CONFIG, "num_hidden_layers": 2}
    step = planner.make_step(config, jp.mezo(), 4, 16)
    assert not step.backward
    cost = planner.cost(step)
    value = lambda leaves, batch: step.task.loss(step.model, tree.unflatten(leaves), batch)[0]
    forward = count_flops(jax.make_jaxpr(value)(step.state.moved, step.batch))
    assert (cost.flops, cost.recompute_flops, cost.activations) == (2 * forward, 0, 0)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), 1e39, 10**400, True, "x", [1.0], {}])
@pytest.mark.parametrize("name", ["lr", "slope"])
def test_metrics_that_no_step_has_said_are_not_replayed(alone, name, bad):
    row = {"lr": 0.1, "slope": 1.0, name: bad}
    with pytest.raises(jp.InputError, match=f"step 2 cannot be replayed: its metrics are damaged: {name} "):
        replay(jp.mezo(), jax.tree.map(jnp.copy, alone[1]), [{"lr": 0.1, "slope": 1.0}, row])


@pytest.mark.usefixtures("optimised")
@pytest.mark.parametrize(("method", "streams"), [(jp.mezo, 0), (jp.zo2, 2 * 2 * 10)])
def test_many_seeds_need_the_memory_of_one(method, streams):
    """Compiled for the CPU: no direction is an array. The evaluations of zo2 go from layer to layer side by side."""
    config = {**tiny.CONFIG, "hidden_size": 64, "intermediate_size": 256}
    row = lambda seeds: planner.row(planner.make_step(config, method(seeds=seeds), 1, 16), targets.target("cpu"))
    one, many = (row(seeds)["bytes"]["workspace"] for seeds in (1, 11))
    assert many <= 1.02 * one + streams * 4 * 16 * config["hidden_size"]


ESTIMATED = {
    "mezo": jp.mezo(),
    "lora+mezo": jp.chain(jp.lora(1), jp.mezo()),
    "sparse_mezo": jp.sparse_mezo(),
    "quantize+qzo": jp.chain(jp.quantize("int4", group=8), jp.qzo()),
    "zo2": jp.zo2(),
}


@pytest.mark.parametrize("name", ESTIMATED)
def test_a_plan_that_keeps_activations_is_refused(name):
    """Nothing would read them. `blocks` is the default, and `tokens=` and no plan at all are left."""
    make = functools.partial(planner.make_step, tiny.CONFIG, ESTIMATED[name], 2, 16)
    said = f"{name} has no backward pass, for which activations would be kept; leave it out, or give blocks,tokens="
    said = said.replace("+", r"\+")
    for save in ("matmuls", "offload", "compressed", "blocks,gate_proj=save", "blocks,block_input=offload"):
        with pytest.raises(jp.InputError, match=f"^--save {save}: {said}N$"):
            make(save)
    with pytest.raises(jp.InputError, match=f"^--save matmuls,tokens=64: {said}64$"):
        make("matmuls,tokens=64")
    with pytest.raises(jp.InputError, match=f"^--save matmuls: {said}N$"):
        make("matmuls", form="policy")
    assert str(make().plan) == "blocks"
    for save in ("blocks", "blocks,tokens=64", "blocks,gate_proj=recompute", "everything"):
        assert str(make(save).plan) == save


def test_a_step_of_ones_own_refuses_such_a_plan():
    """Where it is traced; a model that shows no layers, too."""
    model, state = start(jp.mezo(), num_hidden_layers=1)
    step = lambda model: jp.make_train_step(model, jp.mezo(), SGD, rate=RATE)
    with pytest.raises(jp.InputError, match="--save matmuls: mezo has no backward pass"):
        jax.eval_shape(step(jp.remat(model, "matmuls")), state, BATCH)
    jax.eval_shape(step(jp.remat(model, "blocks,tokens=16")), state, BATCH)

    class Layer(nn.Module):
        @nn.compact
        def __call__(self, x, _):
            return checkpoint_name(nn.Dense(4)(x), "up"), None

    class Net(nn.Module):
        @nn.compact
        def __call__(self, x):
            layer = nn.scan(Layer, variable_axes={"params": 0}, split_rngs={"params": True}, length=2)
            return layer()(x, None)[0]

    base = jp.from_linen(Net(), {"x": jnp.ones((2, 4))})
    leaves = tree.flatten(base.init(jax.random.key(0), {}))
    with pytest.raises(jp.InputError, match="--save blocks,up=save: mezo has no backward pass"):
        objective_of(jp.remat(base, "up=save"), jp.mezo(), leaves)
    assert not objective_of(jp.remat(base, "blocks"), jp.mezo(), leaves).backward


@pytest.mark.slow
@pytest.mark.skipif(not importlib.util.find_spec("jax_plugins"), reason="no compiler for GPUs is installed")
def test_figures():
    """Compiled for an H200: all weights of a model of 1.2B in the memory of a forward pass and of one layer's MLP,
    which is moved where it is read, in one direction or four; LoRA in less.
    """
    target, config = targets.target("h200"), geometries.load("llama3.2-1b")
    make = functools.partial(planner.make_step, config, batch_size=4, seq_len=1024)
    step = make(method=jp.mezo())

    def evaluate(leaves, batch):
        return step.task.loss(step.model, tree.unflatten(leaves), batch)[0]

    forward = aot.compile(target, evaluate, step.state.moved, step.batch).memory.total
    weights = planner.row(step, target)["bytes"]
    lora = planner.row(make(method=jp.chain(jp.mezo(), jp.lora(8))), target)["bytes"]
    seeds = planner.row(make(method=jp.mezo(seeds=4)), target)["bytes"]
    mlp = 2 * 3 * config["hidden_size"] * config["intermediate_size"]
    assert max(weights["total"], seeds["total"]) <= forward + mlp
    assert lora["total"] <= 2.55 * 2**30
    for row in (weights, lora, seeds):
        assert row["gradients"] == row["activations"] == row["optimizer"] == 0
