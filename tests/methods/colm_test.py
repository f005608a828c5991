"""CoLM: rows are those that the published rule chooses, written out in NumPy; a step is the ordinary one on them."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxpeft as jp
from jaxpeft import tree
from jaxpeft.backward.plan import parse
from jaxpeft.backward.residuals import remat
from jaxpeft.method import view_of
from jaxpeft.methods import colm
from jaxpeft.train.optimizer import make_direction
from jaxpeft.train.step import make_objective, objective_of
from tests import tiny

KEY, EPS = jax.random.key(0), 1e-2


def batch(rows=12, seed=0):
    """Rows of four sources, of which two are small, with their numbers in the order of their first rows."""
    sources = np.array([1, 2, 2, 1, 3, 2, 1, 2, 4, 1, 2, 2], np.int32)
    return {**tiny.batch(rows, 16, seed), "sources": np.resize(sources, rows)}


# The published rule: features are vectors g_i z, moments of them, the largest coordinates, and a greedy coreset.


class Published:
    def __init__(self, size, dim):
        self.z = np.random.default_rng(3).normal(size=size)
        self.dim, self.m, self.v, self.t = dim, np.zeros(size), np.zeros(size), 0

    def choose(self, g, sources, count):
        average = len(g) / len(set(sources))
        small = np.array([(sources == source).sum() < average for source in sources])
        kept, left = np.flatnonzero(small)[:count], np.flatnonzero(~small)
        count -= len(kept)
        self.t += 1
        features = g[left, None] * self.z
        m = 0.9 * self.m + 0.1 * features
        v = 0.999 * self.v + 0.001 * features**2
        features = m / (1 - 0.9**self.t) / (np.sqrt(v / (1 - 0.999**self.t)) + 1e-8)
        if not count:
            return sorted(kept)
        classes = np.unique(sources[left])
        shares = np.array([int((sources[left] == c).mean() * count) for c in classes])
        for i in np.argsort(shares, kind="stable")[: count - shares.sum()]:
            shares[i] += 1
        chosen = []
        for c, share in zip(classes, shares, strict=True):
            own = np.flatnonzero(sources[left] == c)
            largest = np.argsort(-np.abs(features[own].mean(0)))[: self.dim]
            chosen += [own[i] for i in facilities(features[own][:, largest], share)]
        self.m, self.v = m[chosen].mean(0), v[chosen].mean(0)
        return sorted([*kept, *left[chosen]])


def facilities(features, count):
    """Greedy facility location: each time what enlarges sum_i max_j similarity the most, of equal ones the first."""
    distances = np.abs(features[:, None] - features[None]).sum(-1)
    likeness, chosen = distances.max() - distances, []
    value = lambda rows: likeness[:, rows].max(1).sum() if rows else 0
    while len(chosen) < count:
        gains = {i: value([*chosen, i]) - value(chosen) for i in range(len(features)) if i not in chosen}
        chosen.append(next(i for i in gains if gains[i] + colm.TIE * distances.max() >= max(gains.values())))
    return chosen


def test_rows_are_those_that_the_published_rule_chooses():
    """In six steps, whose moments depend on what was chosen before; vectors of 300 numbers, 40 of them compared."""
    rng, sources = np.random.default_rng(0), batch(24)["sources"]
    sources[-1] = 5
    published, ours = Published(300, 40), colm.Moments(jnp.zeros(1), jnp.zeros(1), jnp.zeros((), jnp.int32))
    choose = jax.jit(functools.partial(colm.coreset, count=12, small=1.0))
    for _ in range(6):
        g = rng.normal(size=24) + 0.3
        features, means, squares = ours.features(jnp.asarray(g[:, None], jnp.float32))
        found = choose(features, sources, jnp.ones(24, bool))
        ours = ours.after(means, squares, found.ours)
        assert found.rows.tolist() == published.choose(g, sources, 12)
    np.testing.assert_allclose(ours.mean[0] * published.z, published.m, rtol=1e-4)
    np.testing.assert_allclose(ours.square[0] * published.z**2, published.v, rtol=1e-4)


def test_rows_that_are_none_are_chosen_last_and_each_row_stands_for_its_nearest():
    features = jnp.array([[0.0], [9.0], [0.1], [9.2], [0.0], [5.0]])
    there = jnp.array([True, True, True, True, False, False])
    found = colm.coreset(features, jnp.zeros(6, jnp.int32), there, 2, 1.0)
    assert found.rows.tolist() == [0, 1] or found.rows.tolist() == [1, 2]
    assert found.sizes.tolist() == [2, 2]
    more = colm.coreset(features, jnp.zeros(6, jnp.int32), there, 5, 1.0)
    assert more.rows.tolist() == [0, 1, 2, 3, 4]
    few = colm.coreset(features, jnp.array([1, 2, 3, 3, 3, 3]), jnp.ones(6, bool), 1, 1.0)
    assert few.rows.tolist() == [0]  # of the small ones that there is no room for, the first


def setup(method, **changes):
    model, trainable, rest = jp.setup(method, *tiny.model(**changes), KEY)
    noise = lambda path, leaf: 0.1 * jax.random.normal(jax.random.key(len(path)), leaf.shape)
    return model, {path: leaf + noise(path, leaf) for path, leaf in trainable.items()}, rest


@pytest.mark.parametrize("chain", ["lora", pytest.param("meft+lora", marks=pytest.mark.slow)])
def test_slopes_are_those_of_whole_passes_of_single_rows(chain):
    """B of the last layer goes both ways; the other layers are passed once, or, where they run otherwise, twice."""
    lora = jp.lora(rank=2)
    method = lora if chain == "lora" else jp.chain(jp.meft(), lora)
    model, trainable, rest = setup(method)
    data = tiny.batch(6)
    data["loss_weights"][4] = 0
    view = view_of(model, method, {**rest, **trainable})
    (path,) = colm.compared(view)
    assert path == "layers/self_attn/v_proj/lora/b"
    objective = make_objective(model, jp.completion_loss)
    found = jax.jit(lambda data: colm._slopes(objective, [path], EPS, 2, 3, trainable, rest, data))(data)

    @jax.jit
    def loss(leaf, row):
        return jp.completion_loss(model, tree.combine({**trainable, path: leaf}, rest), row)[0]

    for i in range(6):
        row = jax.tree.map(lambda x: x[i : i + 1], data)  # noqa: B023
        for k in range(2):
            far = colm._along(path, trainable[path], k, EPS)
            up, down = (loss(trainable[path].at[-1].add(sign * far), row) for sign in (1, -1))
            np.testing.assert_allclose(found[i, k], (up - down) / (2 * EPS), rtol=1e-2, atol=1e-4)


@pytest.fixture(scope="module")
def run():
    """(model, method, states) of three steps of lora+colm, begun with moments by which rows differ."""
    method = jp.chain(jp.lora(rank=2), jp.colm(ratio=0.5, eps=EPS))
    model, trainable, rest = setup(method)
    state = jp.init_state(method, make_direction(), trainable, rest, KEY, model)
    begun = {"colm/mean": jnp.full(1, 0.1), "colm/square": jnp.full(1, 0.1), "colm/steps": jnp.int32(9)}
    state = state._replace(moved={**state.moved, **begun})
    step = jax.jit(jp.make_train_step(model, method, make_direction(), rate=1e-2))
    states = [state]
    for i in range(3):
        states.append(step(states[-1], batch(seed=i))[0])
    return model, method, states


def test_a_step_is_the_ordinary_one_on_the_chosen_rows(run):
    adapted, method, states = run
    plain = jp.lora(rank=2)
    model, _, rest = jp.setup(plain, *tiny.model(), KEY)
    step = jax.jit(jp.make_train_step(model, plain, make_direction(), rate=1e-2))
    objective, paths = (
        make_objective(adapted, jp.completion_loss),
        colm.compared(view_of(adapted, method, states[0].leaves)),
    )
    slopes_of = jax.jit(lambda trainable, data: colm._slopes(objective, paths, EPS, 1, 6, trainable, rest, data))
    for i, (before, after) in enumerate(itertools.pairwise(states)):
        data = batch(seed=i)
        moments = colm.Moments(*(before.moved[f"colm/{name}"] for name in ("mean", "square", "steps")))
        features = moments.features(slopes_of(before.trainable, data))[0]
        rows = colm.coreset(features, data["sources"], jnp.ones(12, bool), 6, 1.0).rows
        assert {4, 8} <= set(rows.tolist())  # of the small sources
        state = jp.init_state(plain, make_direction(), before.trainable, rest, KEY, model)
        state = state._replace(opt_state=before.opt_state, step=before.step)
        state, _ = step(state, {name: x[rows] for name, x in data.items()})
        for path, leaf in state.trainable.items():
            np.testing.assert_allclose(after.trainable[path], leaf, rtol=1e-4, atol=1e-5, err_msg=path)
        assert after.moved["colm/steps"] == 10 + i


@pytest.mark.slow
def test_a_weighted_row_counts_for_those_that_it_stands_for():
    """So that what counts of the chosen rows is as much as what counts of the batch, whose rows are alike in that."""
    method = jp.chain(jp.lora(rank=2), jp.colm(ratio=0.25, weighted=True, small=0))
    model, trainable, rest = setup(method)
    data = {**tiny.batch(8), "loss_weights": np.ones((8, 16), np.float32)}
    of = objective_of(model, method, {**rest, **trainable})
    (_, aux), _ = jax.jit(of.value_and_grad)(trainable, rest, data, KEY, None)
    assert aux["weight"] == 8 * 16


def temporaries(method, rows, save="everything"):
    model, trainable, rest = jp.setup(method, *tiny.model(), KEY)
    model = remat(model, parse(save), 1)
    state = jp.init_state(method, make_direction(), trainable, rest, KEY, model)
    step = jp.make_train_step(model, method, make_direction(), rate=1e-2)
    lowered = jax.jit(step, donate_argnums=0).lower(state, tiny.batch(rows, 32))
    return lowered.compile().memory_analysis().temp_size_in_bytes


@pytest.mark.slow
def test_memory_is_that_of_the_chosen_rows():
    """A quarter of 128 rows: the step on 32. In the rows' forward passes nothing is kept."""
    lora = lambda: jp.lora(rank=2)
    whole, part = temporaries(lora(), 128), temporaries(lora(), 32)
    found = temporaries(jp.chain(lora(), jp.colm(ratio=0.25)), 128)
    assert whole > 3 * part
    assert found < 1.05 * part  # beside it there are the 128 rows' numbers


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: jp.colm(ratio=0), "colm: ratio 0 must be above 0 and at most 1"),
        (lambda: jp.colm(ratio=1.5), "colm: ratio 1.5 must be above 0"),
        (lambda: jp.colm(eps=0), "colm: eps 0 must be a finite number above 0"),
        (lambda: jp.colm(directions=0), "colm: directions 0 must be at least 1"),
        (lambda: jp.colm(small=-1), "colm: small -1 must be a finite number of at least 0"),
        (
            lambda: traced(jp.chain(jp.prompt(2), jp.colm())),
            r"prompt\+colm: colm compares rows by what trains in the last",
        ),
        (lambda: traced(jp.chain(jp.zo2(), jp.colm())), r"zo2\+colm: .*host's memory; put mezo"),
        (
            lambda: traced(jp.chain(jp.lora(2), jp.colm(ratio=0.4)), accumulate=4),
            "ratio 0.4 of a batch of 8 rows is 3, wh",
        ),
    ],
)
def test_what_cannot_be_is_refused_in_a_line(make, message):
    with pytest.raises(jp.InputError, match=message) as error:
        make()
    assert "\n" not in str(error.value)


def traced(method, **options):
    model, trainable, rest = jp.setup(method, *tiny.model(), KEY)
    state = jp.init_state(method, make_direction(), trainable, rest, KEY, model)
    jax.eval_shape(jp.make_train_step(model, method, make_direction(), rate=1e-2, **options), state, tiny.batch(8))
