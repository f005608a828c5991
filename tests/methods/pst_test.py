"""PST: values and gradients by torch, an exact share of zeros, ties, the schedule, packed kernels, what is refused."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

import jaxpeft as jp
from jaxpeft import sites, sparse, tree
from jaxpeft.method import Leaves, Moment, View, shapes_of
from jaxpeft.methods import pst
from jaxpeft.model import Context
from tests import tiny

KEY, SITE, SHAPE = jax.random.key(0), "layers/mlp/up_proj", (32, 56)
NAMES = ("u", "v", "a", "b", "rows", "columns")


class Binary(torch.autograd.Function):
    """The published code's mask: what comes first in the order of scores is pruned; the gradient passes."""

    @staticmethod
    def forward(ctx, scores, share):
        mask = torch.ones(scores.shape, dtype=scores.dtype)
        mask.view(-1)[torch.argsort(scores.reshape(-1))[: int(scores.numel() * share)]] = 0
        return mask

    @staticmethod
    def backward(ctx, gradient):
        return gradient, None


def test_values_and_gradients_are_those_of_the_published_layer():
    """Which is torch's linear map, of transposed matrices, in float64."""
    rng = np.random.default_rng(0)
    shapes = {"u": (3, 10), "v": (12, 3), "a": (2, 10), "b": (12, 2), "rows": (10,), "columns": (12,)}
    own = {name: rng.normal(size=shape) for name, shape in shapes.items()}
    x, w, dy, share = rng.normal(size=(7, 12)), rng.normal(size=(12, 10)), rng.normal(size=(7, 10)), 0.375
    theirs = {name: torch.tensor(leaf.T.copy(), requires_grad=True) for name, leaf in own.items()}
    inputs = torch.tensor(x, requires_grad=True)
    weight = torch.tensor(w.T) + 0.5 * theirs["u"] @ theirs["v"]
    scores = weight.abs() + 0.7 * theirs["a"] @ theirs["b"]
    scores = scores + 0.3 * (theirs["rows"][:, None] + theirs["columns"][None])
    y = inputs @ (Binary.apply(scores, share) * weight).T
    (y * torch.tensor(dy)).sum().backward()
    site = sites.Site("layers/v_proj", jnp.asarray(w, jnp.float32), None, True)
    ctx = Context(shared={"pst": {"sparsity": jnp.float32(share)}})

    def called(own, x):
        return pst.PST(3, 2, 0.5, 0.7, 0.3).apply({"params": own}, None, x, site, ctx)

    ours = {name: jnp.asarray(leaf, jnp.float32) for name, leaf in own.items()}
    found, back = jax.vjp(called, ours, jnp.asarray(x, jnp.float32))
    np.testing.assert_allclose(found, y.detach().numpy(), rtol=1e-4, atol=1e-4)
    leaves, d_x = back(jnp.asarray(dy, jnp.float32))
    np.testing.assert_allclose(d_x, inputs.grad.numpy(), rtol=1e-4, atol=1e-4)
    for name, leaf in leaves.items():
        np.testing.assert_allclose(leaf, theirs[name].grad.numpy().T, rtol=1e-4, atol=1e-4, err_msg=name)


NUMBERS = st.floats(width=32, allow_nan=False) | st.sampled_from([0.0, -0.0, 1.0, -1.0])


@settings(max_examples=100, deadline=None)
@example([0.0] * 11 + [1.5414283107572988e-44], 1)  # below 2^-126, which XLA calculates with as zero
@given(st.lists(NUMBERS, min_size=12, max_size=12), st.integers(0, 12))
def test_as_many_as_were_asked_for_and_the_largest(numbers, count):
    """Of any numbers, alike ones too, of which the first are taken: NumPy's stable order."""
    found = np.asarray(jax.jit(sparse.largest)(jnp.asarray(numbers, jnp.float32).reshape(3, 4), count)).reshape(-1)
    expected = np.zeros(12, bool)
    expected[np.argsort(-np.asarray(numbers, np.float32), kind="stable")[:count]] = True
    np.testing.assert_array_equal(found, expected)


@pytest.fixture(scope="module")
def trained():
    """(method, states) before and after each of six steps of a base in bfloat16, whose weights have ties."""
    method = jp.pst(0.4, 1, 4, 2, 3, targets=["up_proj"])
    model, trainable, rest = jp.setup(method, *tiny.model(jnp.bfloat16), KEY)
    optimizer = optax.scale_by_adam()
    state = jp.init_state(method, optimizer, trainable, rest, jax.random.key(1), model)
    step = jax.jit(jp.make_train_step(model, method, optimizer, rate=1e-2))
    states = [state]
    for _ in range(6):
        state, _ = step(state, tiny.batch())
        states.append(state)
    return method, states


def test_the_share_of_zeros_is_exact_and_cubic(trained):
    """In each layer's merged kernel; the steps after the last change no share."""
    method, states = trained
    n, m = SHAPE
    for done, state in enumerate(states):
        t = min(max(done - 1, 0), 3) / 3
        share = 0.4 * (1 - (1 - t) ** 3)
        merged = np.asarray(tree.flatten(method.merge(state.params))[f"{SITE}/kernel"])
        np.testing.assert_allclose(state.moved[pst.SPARSITY], share, rtol=1e-6)
        assert np.sum(merged == 0, axis=(1, 2)).tolist() == [int(np.float32(share) * np.float32(n * m))] * 3
    first = np.asarray(tree.flatten(method.merge(states[0].params))[f"{SITE}/kernel"])
    np.testing.assert_array_equal(first, tree.flatten(tiny.model(jnp.bfloat16)[1])[f"{SITE}/kernel"])


def test_all_leaves_move_and_the_state_is_what_the_formula_says(trained):
    """12 bytes, of master and moments, of each of (r + q + 1) (n + m) numbers; scores train from the first mask on."""
    _, states = trained
    n, m = SHAPE
    numbers = 3 * (2 + 3 + 1) * (n + m)
    counters = 4 + 4  # Adam's, and the share
    last = states[-1]
    assert tree.num_bytes((last.trainable, last.moved, last.opt_state)) == 12 * numbers + counters
    for name in NAMES:
        leaf = f"{SITE}/pst/{name}"
        assert np.any(last.trainable[leaf] != states[0].trainable[leaf]), name


def test_a_run_that_goes_on_prunes_no_less(trained):
    """Its steps begin anew, and their share with them: what has been pruned stays so."""
    method, states = trained
    again = states[-1]
    view = View(None, method.specs, method.role, shapes_of(again.leaves))
    for step in range(6):
        moment = Moment(jnp.int32(step), KEY, 1e-2, 0.0, {}, {}, view, {})
        moved = method.move(Leaves(again.trainable, again.moved), moment).moved
        np.testing.assert_allclose(moved[pst.SPARSITY], 0.4, rtol=1e-6)


def test_packed_kernels_are_pruned_as_what_they_stand_for():
    base, params = tiny.model()
    method = jp.chain(jp.quantize("int8"), jp.pst(0.5, until=1, targets=["up_proj"]))
    model, trainable, rest = jp.setup(method, base, params, KEY)
    rest = {**rest, pst.SPARSITY: jnp.float32(0.5)}
    adapted = jax.jit(model.apply)(jp.combine(trainable, rest), tiny.batch())
    merged = method.merge(jp.combine(trainable, rest))
    np.testing.assert_allclose(base.apply(merged, tiny.batch()), adapted, rtol=1e-4, atol=1e-4)


def test_an_adapter_that_lies_nearer_to_the_kernel_is_refused():
    method = jp.chain(jp.pst(targets=["up_proj"]), jp.lora(2, targets=["up_proj"]))
    with pytest.raises(jp.InputError, match="pst: must be nearest to the kernel, which it prunes"):
        model, trainable, rest = jp.setup(method, *tiny.model(), KEY)
        model.apply(jp.combine(trainable, rest), tiny.batch())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"sparsity": 1.0}, "sparsity 1.0 must be above 0 and below 1"),
        ({"sparsity": 0.9999}, "sparsity 0.9999 leaves layers/mlp/down_proj empty, a kernel of 56 x 32: less than one"),
        ({"begin": -1}, "begin -1 must be at least 0"),
        ({"begin": 9, "until": 9}, "until 9 must be above begin, 9"),
        ({"rank": 0}, "rank 0 must be at least 1"),
        ({"mask_rank": 0}, "mask_rank 0 must be at least 1"),
        ({"mask_rank": 17}, "of mask_rank: rank 17 is above the smaller side of layers/self_attn/k_proj"),
        ({"beta": 0.0}, "beta 0.0 must be a finite number above 0"),
        ({"alpha2": float("nan")}, "alpha2 nan must be a finite number of at least 0"),
    ],
)
def test_refusals(options, message):
    with pytest.raises(jp.InputError, match=f"pst: .*{re.escape(message)}"):
        jp.setup(jp.pst(**options), *tiny.model(), KEY)
