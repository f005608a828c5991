"""SNELLA: values and gradients by torch, the budget by NumPy, the state's bytes, and what is refused."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import jaxpeft as jp
from jaxpeft import sites, tree
from jaxpeft.method import Leaves, Moment, View, shapes_of
from jaxpeft.methods import snella
from jaxpeft.model import Context
from tests import tiny

KEY = jax.random.key(0)
OWN = "layers/mlp/up_proj/snella/"
SETTINGS = {"rank": 4, "sparsity": 0.6, "initial": 0.1, "begin": 1, "until": 4, "every": 2}


def start(**options):
    method = jp.snella(**{**SETTINGS, **options})
    model, trainable, rest = jp.setup(method, *tiny.model(), KEY)
    return method, model, jp.init_state(method, optax.scale_by_adam(), trainable, rest, KEY, model)


@pytest.mark.parametrize("kept", [0, 70, 120])
def test_values_and_gradients_are_those_of_the_published_layer(kept):
    rng, leaf = np.random.default_rng(0), lambda x: torch.tensor(x, requires_grad=True)
    own = {"p": rng.normal(size=(2, 12, 3)), "q": rng.normal(size=(2, 10, 3)), "alpha": 0.7, "gamma": 0.3, "beta": 0.05}
    x, w, dy = rng.normal(size=(7, 12)), rng.normal(size=(12, 10)), rng.normal(size=(7, 10))
    theirs = {name: leaf(value) for name, value in own.items()}
    k = (
        0.1 * torch.tensor([1.0, -1.0], dtype=torch.float64)[:, None, None] * torch.cdist(theirs["p"], theirs["q"])
    ).sum(0)
    k = k + theirs["alpha"] * torch.softmax(k / theirs["gamma"], dim=1) + theirs["beta"]
    size = k.detach().abs()
    d = k * size * (size >= size.flatten().sort(descending=True)[0][kept - 1] if kept else 0)
    y = torch.tensor(x) @ (torch.tensor(w) + d)
    (y * torch.tensor(dy)).sum().backward()
    ours = {name: jnp.asarray(value, jnp.float32) for name, value in own.items()}
    site = sites.Site("layers/v_proj", jnp.asarray(w, jnp.float32), None, True)

    def called(own):
        own = {**own, "kept": jnp.int32(kept), **{name: jnp.zeros_like(own[name[0]]) for name in snella.SCORES}}
        inputs = jnp.asarray(x, jnp.float32)
        return snella.SNELLA(6, 0.0).apply({"params": own}, lambda x: x @ site.kernel, inputs, site, Context())

    found, back = jax.vjp(called, ours)
    np.testing.assert_allclose(found, y.detach().numpy(), rtol=1e-4, atol=1e-4)
    for name, gradient in back(jnp.asarray(dy, jnp.float32))[0].items():
        wanted = theirs[name].grad.numpy()
        np.testing.assert_allclose(gradient, wanted, rtol=1e-3, atol=1e-4 * max(abs(wanted).max(), 1), err_msg=name)
    zeros = int(np.sum(np.asarray(snella.update(ours, jnp.int32(kept))) == 0))
    assert zeros == 120 - kept


def published(scores, sizes, budget):
    """The code's loop: what is beyond a size is shared out again among those that have room."""
    found = np.minimum(sizes, budget * scores / scores.sum())
    while budget - found.sum() > 1e-9 * budget:
        room = found < sizes
        more = (budget - found.sum()) * scores[room] / scores[room].sum()
        found[room] += np.minimum(more, sizes[room] - found[room])
    return found


@settings(max_examples=60, deadline=None)
@given(st.lists(st.tuples(st.floats(1e-3, 1e3), st.integers(1, 10_000)), min_size=1, max_size=9), st.floats(0.01, 0.99))
def test_the_budget_is_shared_out_as_published(matrices, share):
    """Within float32's rounding of sums of 9 numbers; no part is beyond its kernel, and none of the budget is lost."""
    scores, sizes = (np.array(x, np.float64) for x in zip(*matrices, strict=True))
    float32 = lambda x: jnp.asarray(x, jnp.float32)
    found = np.asarray(jax.jit(snella.proportional)(float32(scores), float32(sizes), float32(share * sizes.sum())))
    assert (found <= sizes).all()
    np.testing.assert_allclose(found, published(scores, sizes, share * sizes.sum()), rtol=1e-4, atol=1e-3)


def test_kernels_without_a_score_get_what_others_leave_alone():
    proportional = lambda scores, budget: np.asarray(
        snella.proportional(jnp.array(scores), jnp.array([10.0, 10.0, 20.0]), jnp.float32(budget))
    ).tolist()
    assert proportional([0.0, 0.0, 0.0], 12.0) == [4.0, 4.0, 4.0]
    assert proportional([0.0, 3.0, 1.0], 12.0) == [0.0, 9.0, 3.0]
    assert proportional([1.0, 1.0, 1.0], 40.0) == [10.0, 10.0, 20.0]


def scored(state, own):
    """(L,) of a site's leaves."""
    of = lambda name: np.asarray(state.moved[f"{own}{name}_mean"] * state.moved[f"{own}{name}_spread"], np.float64)
    return of("p").mean((1, 2, 3)) + of("q").mean((1, 2, 3))


@pytest.mark.slow
def test_sensitivities_and_parts_by_numpy():
    """Five steps of two micro-batches: I and U of the step's gradient, and parts of the budget of all kernels."""
    method, model, state = start()
    step = jax.jit(jp.make_train_step(model, method, optax.scale_by_adam(), rate=1e-2, accumulate=2))
    loss = lambda trainable, rest, batch: jp.completion_loss(model, jp.combine(trainable, rest), batch)[0]
    gradient = jax.jit(jax.grad(loss))
    counts = lambda state: {path: np.asarray(leaf) for path, leaf in state.moved.items() if path.endswith("/kept")}
    size = lambda path: np.prod(state.frozen[path.replace("snella/kept", "kernel")].shape[-2:])
    begun = counts(state)
    assert len(begun) == 7 and all((leaf == size(path) - int(0.1 * size(path))).all() for path, leaf in begun.items())
    for number in range(5):
        batch = tiny.batch(seed=number)
        g = gradient(state.trainable, {**state.frozen, **state.moved}, batch)
        before, (state, _) = state, step(state, batch)
        for name in "pq":
            product = np.abs(np.asarray(before.trainable[OWN + name] * g[OWN + name], np.float64))
            mean = 0.85 * before.moved[f"{OWN}{name}_mean"] + 0.15 * product
            spread = 0.85 * before.moved[f"{OWN}{name}_spread"] + 0.15 * abs(product - mean)
            for what, wanted in (("mean", mean), ("spread", spread)):
                atol = 1e-3 * abs(product).max()  # rounding of a mean over micro-batches beside one over the batch
                np.testing.assert_allclose(state.moved[f"{OWN}{name}_{what}"], wanted, rtol=1e-3, atol=atol)
        old, new = counts(before), counts(state)
        if number + 1 not in (2, 4):
            assert all((new[path] == old[path]).all() for path in new)
            continue
        scores = np.concatenate([scored(state, path.removesuffix("kept")) for path in new])
        sizes = np.concatenate([np.full(3, size(path), float) for path in new])
        left = {2: 2 / 3, 4: 0.0}[number + 1]
        share = 0.4 + 0.5 * left**3
        wanted = published(scores, sizes, share * sizes.sum())
        assert np.abs(np.concatenate(list(new.values())) - wanted).max() <= 1 + 1e-4 * wanted.max()  # floor, rounding
    assert len({int(x) for leaf in counts(state).values() for x in leaf}) > 3


def test_a_run_that_goes_on_gives_no_entries_back():
    """Its steps begin anew, and the budget with them: that of the adapter's end holds until it is less."""
    method, _, state = start(targets=["up_proj"], until=8)
    view = View(None, method.specs, method.role, shapes_of(state.leaves))

    def run(moved, steps):
        budgets = []
        for step in range(steps):
            aux = {path: jnp.ones_like(leaf) for path, leaf in moved.items() if path.endswith(("_mean", "_spread"))}
            moment = Moment(jnp.int32(step), KEY, 1e-2, 0.0, aux, {}, view, {})
            moved = method.move(Leaves(state.trainable, moved), moment).moved
            budgets.append(int(moved[f"{OWN}kept"].sum()))
        return moved, budgets

    total = state.frozen["layers/mlp/up_proj/kernel"].size
    moved, first = run(state.moved, 6)
    assert first[0] > first[1] > first[3] > first[5] > 0.4 * total
    _, second = run(moved, 8)
    assert second[:6] == [first[5]] * 6 and second[7] <= 0.4 * total < second[6]


def test_the_state_is_20_bytes_of_a_number():
    """r (n + m) numbers of 4 for the number, 8 of Adam, 8 of I and U; three numbers more of a kernel, and its part."""
    _, _, state = start(targets=["up_proj"])
    counter = 4
    own = (state.trainable, state.opt_state, state.moved)
    assert tree.num_bytes(own) == 3 * (20 * 4 * (32 + 56) + 3 * 12 + 4) + counter


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"rank": 5}, "rank 5 must be an even number of at least 2"),
        ({"sparsity": 1.0}, "sparsity 1.0 must be at least 0 and below 1"),
        ({"sparsity": 0.9999}, "sparsity 0.9999 leaves layers/mlp/down_proj empty, a kernel of 56 x 32"),
        ({"initial": 0.7}, "initial 0.7 must be at least 0 and at most sparsity, 0.6"),
        ({"begin": -1}, "begin -1 must be at least 0"),
        ({"until": 1}, "until 1 must be above begin, 1"),
        ({"every": 0}, "every 0 must be at least 1"),
    ],
)
def test_refusals(options, message):
    with pytest.raises(jp.InputError, match=f"snella: {re.escape(message)}"):
        start(**options)


@pytest.mark.parametrize(
    ("other", "message"),
    [
        (lambda: jp.lisa(1), "snella.lisa: snella's p and q are differentiated whole, and .* would be moved"),
        (jp.mezo, "snella.mezo: snella scores by gradients, and mezo has no backward pass"),
    ],
)
def test_chains_that_do_not_differentiate_are_refused(other, message):
    with pytest.raises(jp.InputError, match=message):
        jp.setup(jp.chain(jp.snella(**SETTINGS), other()), *tiny.model(), KEY)
