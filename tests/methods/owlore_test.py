"""OwLore: scores are OWL's, the drawn layers' kernels change by GaLore's rule, and layers are drawn by their scores."""

import importlib.util
import itertools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import jaxpeft as jp
from jaxpeft import projections, sampling, tree
from jaxpeft.memory import planner, targets
from jaxpeft.models import geometries
from jaxpeft.models.layers import Dense
from jaxpeft.train.optimizer import make_direction
from tests import tiny

KEY, EVERY, GAP, RANK, LR, SCALE = jax.random.key(0), 4, 3, 4, 0.05, 0.5
SITES = ("self_attn/q_proj", "self_attn/k_proj", "mlp/up_proj", "mlp/down_proj")  # n = m, n > m, n < m, n > m
OPTIONS = {"every": EVERY, "gap": GAP, "rank": RANK, "scale": SCALE, "scores": "increase"}


def start(method, optimizer=None, batches=None, **options):
    base, params = tiny.model(**options)
    model, trainable, rest = jp.setup(method, base, params, KEY, batches)
    return model, jp.init_state(method, optimizer or make_direction(), trainable, rest, jax.random.key(1), model)


def inputs(batch):
    """{(layer, site): what it reads}, of the base's blocks called one after the other."""
    base, params = tiny.model()
    found, layer = {}, 0

    def intercept(next_function, args, kwargs, context):
        if isinstance(context.module, Dense) and context.method_name == "linear":
            found[layer, "/".join(context.module.path)] = np.asarray(args[0], np.float64)
        return next_function(*args, **kwargs)

    x, ctx = base.stack.embed(params, batch, None)
    for layer in range(3):
        own = jax.tree.map(lambda leaf: leaf[layer], params["layers"])  # noqa: B023
        with nn.intercept_methods(intercept):
            x, _ = base.stack.block(own, x, ctx.at(jnp.asarray(layer)), None, "layers")
    return found


@pytest.fixture(scope="module")
def calibrated():
    """A threshold that some weights are above: means are of 3 x what they are of 13 in a large model."""
    batches = [tiny.batch(seed=i, rows=2) for i in range(2)]
    method = jp.owlore(count=1, rank=RANK, threshold=3.0)
    return batches, start(method, batches=lambda: batches)[1]


@pytest.mark.slow
def test_scores_are_the_shares_of_outliers(calibrated):
    """By NumPy: |W_ij| times the norm of input i over the positions with a target, above M times the layer's mean."""
    batches, state = calibrated
    _, params = tiny.model()
    kernels = {
        path[7:-7]: x for path, x in tree.flatten(params).items() if path.startswith("layers/") and "kernel" in path
    }
    squares: dict = {}
    for batch in batches:
        counts = (batch["loss_weights"] > 0)[..., None]
        for at, x in inputs(batch).items():
            squares[at] = squares.get(at, 0) + (x**2 * counts).sum(axis=(0, 1))
    expected = []
    for layer in range(3):
        metric = [np.abs(x[layer]) * np.sqrt(squares[layer, site])[:, None] for site, x in kernels.items()]
        flat = np.concatenate([x.ravel() for x in metric])
        expected.append((flat > 3.0 * flat.mean()).mean())
    assert min(expected) > 0
    # One weight in 9,000 may lie on either side.
    np.testing.assert_allclose(state.moved["owlore/scores"], expected, atol=2 / flat.size)


@pytest.mark.slow
def test_reversed_scores_draw_layers_as_the_published_code_does(calibrated):
    """Its probabilities are max(p) - p over their sum, p = D over its sum: that of the largest D is zero."""
    batches, state = calibrated
    method = jp.owlore(count=1, rank=RANK, threshold=3.0, scores="outliers_reverse")
    found = np.asarray(start(method, batches=lambda: batches)[1].moved["owlore/scores"], np.float64)
    p = np.asarray(state.moved["owlore/scores"], np.float64)
    p /= p.sum()
    expected = (p.max() - p) / (p.max() - p).sum()
    assert expected.min() == 0
    np.testing.assert_allclose(found / found.sum(), expected, atol=1e-5)  # of a difference of float32 numbers near 0.01


def test_without_batches(calibrated):
    """A run that is planned, or goes on from a checkpoint, has scores of the same shape; without data it is refused."""
    _, state = calibrated
    method = jp.owlore(count=1, rank=RANK)
    assert start(method, batches=list)[1].moved["owlore/scores"].shape == state.moved["owlore/scores"].shape
    with pytest.raises(jp.InputError, match="owlore: scores 'outliers' starts from data"):
        start(method)


@pytest.fixture(scope="module")
def run():
    """The states before the first step and after each of some, by SGD."""
    method, optimizer = jp.owlore(count=1, **OPTIONS), optax.identity()
    model, state = start(method, optimizer)
    step, states = jax.jit(jp.make_train_step(model, method, optimizer, rate=LR)), [state]
    for i in range(EVERY + GAP):
        states.append(step(states[-1], tiny.batch(seed=i))[0])
    return method, states


def test_a_step_is_the_projected_one_of_the_drawn_layer(run):
    """W - lr s P P^T dW, or dW P P^T; norms there and all outside the layers by their gradients; nothing else moves."""
    method, states = run
    base, _ = tiny.model()
    gradient = jax.jit(jax.grad(lambda flat, batch: jp.completion_loss(base, tree.unflatten(flat), batch)[0]))
    for i, (before, after) in enumerate(itertools.pairwise(states)):
        old, new = (tree.flatten(method.merge(state.params)) for state in (before, after))
        grads = gradient(old, tiny.batch(seed=i))
        (active,) = np.asarray(before.moved["owlore/active"])
        for path, g in grads.items():
            change = np.asarray(new[path] - old[path], np.float64)
            if not path.startswith("layers/"):
                expected = -LR * np.asarray(g)
            else:
                others = np.arange(3) != active
                assert not change[others].any(), path
                change, expected = change[active], -LR * np.asarray(g[active], np.float64)
            if path.endswith("/kernel") and path.startswith("layers/"):
                p = np.asarray(before.moved[f"owlore/{path.replace('kernel', 'galore/p')}"][0], np.float64)
                left = expected.shape[0] <= expected.shape[1]
                expected = SCALE * (p @ (p.T @ expected) if left else (expected @ p) @ p.T)
            np.testing.assert_allclose(change, expected, rtol=1e-2, atol=2e-3 * np.abs(expected).max(), err_msg=path)


def test_projections_are_renewed_when_they_are_due(run):
    """In the first step of a period and every `gap` steps; by directions that hold most of that step's gradient."""
    method, states = run
    base, _ = tiny.model()
    gradient = jax.jit(jax.grad(lambda flat, batch: jp.completion_loss(base, tree.unflatten(flat), batch)[0]))
    shares = []
    for i, (before, after) in enumerate(itertools.pairwise(states)):
        due = i % EVERY == 0 or i % GAP == 0
        grads = gradient(tree.flatten(method.merge(before.params)), tiny.batch(seed=i)) if due else {}
        (active,) = np.asarray(before.moved["owlore/active"])
        for site in SITES:
            path = f"owlore/layers/{site}/galore/p"
            fresh = after.moved[path]
            assert bool(np.any(fresh != before.moved[path])) == due
            np.testing.assert_allclose(fresh[0].T @ fresh[0], np.eye(RANK), atol=1e-5)
            if due:
                full = np.asarray(grads[f"layers/{site}/kernel"][active])
                most = (np.linalg.svd(full, compute_uv=False)[:RANK] ** 2).sum()
                shares.append(np.linalg.norm(projections.project(full, fresh[0])) ** 2 / most)
    assert np.mean(shares) > 0.8  # the sketch's, see GaLore's test


def test_layers_are_drawn_by_their_scores():
    """Two of three, one after the other: how often each pair comes is by the rule; one without outliers comes last."""
    weights = np.array([0.5, 0.3, 0.2])
    draw = jax.jit(jax.vmap(lambda key: sampling.weighted(key, [0, 1, 2], 2, jnp.asarray(weights))))
    drawn, number = np.asarray(draw(jax.random.split(KEY, 4000))), 4000
    for first, second in itertools.permutations(range(3), 2):
        expected = weights[first] * weights[second] / (1 - weights[first])
        found = ((drawn[:, 0] == first) & (drawn[:, 1] == second)).mean()
        assert abs(found - expected) < 5 * np.sqrt(expected * (1 - expected) / number)
    _, state = start(jp.owlore(count=3, **OPTIONS))
    np.testing.assert_array_equal(state.moved["owlore/scores"], [1, 2, 3])
    assert sorted(np.asarray(state.moved["owlore/active"])) == [0, 1, 2]


@pytest.mark.parametrize(
    ("method", "message"),
    [
        (lambda: jp.owlore(count=0), "count 0 must be at least 1"),
        (lambda: jp.owlore(every=0), "every 0 must be at least 1"),
        (lambda: jp.owlore(gap=0), "gap 0 must be at least 1"),
        (lambda: jp.owlore(rank=0), "rank 0 must be at least 1"),
        (lambda: jp.owlore(scores="owl"), "scores 'owl' is not one of outliers, outliers_reverse, norms"),
        (lambda: jp.owlore(threshold=0), "threshold 0 must be a finite number above 0"),
        (lambda: jp.owlore(scale=0), "scale 0 must be a finite number above 0"),
        (lambda: jp.owlore(rounding="up"), "rounding 'up' is not one of"),
        (lambda: jp.owlore(count=4, **OPTIONS), "count 4 must be at most 3, the layers that train"),
        (lambda: jp.owlore(count=1, **{**OPTIONS, "rank": 17}), "rank 17 is above the smaller side of"),
        (lambda: jp.chain(jp.lora(2), jp.owlore(count=1, **OPTIONS)), "sample them by lora.lisa or lora.ist"),
        (lambda: jp.owlore(count=1, which="norm", **OPTIONS), "none of the kernels that targets 'all-linear' names"),
        (lambda: jp.chain(jp.quantize(), jp.full(), jp.owlore(count=1, **OPTIONS)), "is quantized and cannot train"),
    ],
)
def test_mistakes(method, message):
    with pytest.raises(jp.InputError, match=f"owlore: .*{message}"):
        start(method())


@pytest.mark.slow
def test_what_an_h200_needs():
    """llama3.2-1b, 4 x 1024, `matmuls`, three layers: less than LISA's 11.4 GiB, of which embeddings are the most."""
    if not importlib.util.find_spec("jax_plugins"):
        pytest.skip("no CUDA plugin")
    step = planner.make_step(geometries.load("llama3.2-1b"), jp.owlore(3, rank=128), 4, 1024, "matmuls")
    assert planner.row(step, targets.target("h200"))["bytes"]["total"] <= 11.4 * 2**30
