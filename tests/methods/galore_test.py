"""GaLore: against optax's, against a transcription of its rule, and that no gradient of a kernel exists."""

import functools
import importlib.util
import re
import zlib

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import jaxpeft as jp
from jaxpeft import projections, tree
from jaxpeft.memory import planner
from jaxpeft.memory.targets import target
from jaxpeft.methods import galore
from jaxpeft.models import geometries
from jaxpeft.train.optimizer import make_direction
from jaxpeft.train.step import objective_of
from pallas_kernels.packed import quantize
from tests import tiny

KEY, BATCH, RANK, SCALE = jax.random.key(0), tiny.batch(), 4, 0.5
SITES = ("self_attn/q_proj", "self_attn/k_proj", "mlp/up_proj", "mlp/down_proj")  # n = m, n > m, n < m, n > m
KERNELS = [f"layers/{site}/kernel" for site in SITES]


def start(method, optimizer, dtype=jnp.float32):
    model, trainable, rest = jp.setup(method, *tiny.model(dtype), KEY)
    return model, jp.init_state(method, optimizer, trainable, rest, jax.random.key(1), model)


def train(method, optimizer, steps, **options):
    model, state = start(method, optimizer)
    step = jax.jit(jp.make_train_step(model, method, optimizer, **options))
    for i in range(steps):
        state, _ = step(state, tiny.batch(seed=i))
    return state


@functools.cache
def full_gradients(seed=0):
    base, params = tiny.model()
    flat = tree.flatten(params)
    loss = lambda flat: jp.completion_loss(base, tree.unflatten(flat), tiny.batch(seed=seed))[0]
    return jax.jit(jax.grad(loss))(flat)


@pytest.fixture(scope="module")
def first():
    """(state, value and gradients) of the first step of either projection."""
    found = {}
    for projection in galore.PROJECTIONS:
        method = jp.galore(RANK, projection=projection, which="all")
        model, state = start(method, make_direction())
        rest = {**state.frozen, **state.moved}
        of = objective_of(model, method, state.leaves, accumulate=2).value_and_grad
        found[projection] = state, jax.jit(of)(state.trainable, rest, BATCH, KEY, state.opt_state)
    return found


@pytest.mark.parametrize("projection", [pytest.param("sketch", marks=pytest.mark.slow), "svd"])
def test_the_gradient_of_r_is_the_projected_gradient(first, projection):
    """Of the whole batch, in two micro-batches; everything else has its ordinary gradient."""
    state, ((_, aux), grads) = first[projection]
    for path, full in full_gradients().items():
        if not path.startswith("layers/") or not path.endswith("/kernel"):
            np.testing.assert_allclose(grads[path], full, rtol=1e-3, atol=1e-5)
            continue
        site = path.removesuffix("/kernel")
        basis = (state.moved if projection == "sketch" else aux)[f"{site}/galore/p"]
        n, m = full.shape[-2:]
        expected = basis.mT @ full if n <= m else full @ basis
        scale = np.abs(expected).max()
        np.testing.assert_allclose(grads[f"{site}/galore/r"], expected, rtol=1e-3, atol=1e-5 * scale)


@pytest.mark.parametrize("projection", galore.PROJECTIONS)
def test_the_directions_are_the_gradients_leading_ones(first, projection):
    """Orthonormal; of a sketch, those of dW times the step's own Gaussian matrix, computed here from all of dW.

    So few hold most of what the best hold, though this gradient's spectrum falls slowly.
    """
    _, ((_, aux), _) = first[projection]
    shares = []
    for path in KERNELS:
        name = path.replace("kernel", "galore/p")
        basis, full = np.asarray(aux[name]), full_gradients()[path]
        n, m = full.shape[-2:]
        np.testing.assert_allclose(basis.mT @ basis, np.tile(np.eye(RANK), (3, 1, 1)), atol=1e-5)
        rows = full if n <= m else full.mT
        if projection == "sketch":
            seeds = jax.random.bits(jax.random.fold_in(KEY, zlib.crc32(name.encode())), (3,), jnp.uint32)
            k = min(RANK + projections.OVERSAMPLING, n, m)
            rows = rows @ jnp.stack([jax.random.normal(jax.random.key(seed), (max(n, m), k)) for seed in seeds])
        best = np.linalg.svd(rows)[0][..., :RANK]
        np.testing.assert_allclose(basis @ basis.mT, best @ best.mT, atol=2e-3, err_msg=path)
        most = (np.linalg.svd(full, compute_uv=False)[:, :RANK] ** 2).sum(-1)
        shares.append(np.linalg.norm(projections.project(full, basis), axis=(-2, -1)) ** 2 / most)
    assert np.mean(shares) > (0.8 if projection == "sketch" else 0.9999)


def by_optax(method, base, lr, steps, paths):
    """Kernels after steps of optax's, which takes a gradient's layers one by one."""
    _, params = tiny.model()
    flat = tree.flatten(params)
    model = tiny.model()[0]
    loss = lambda flat, seed: jp.completion_loss(model, tree.unflatten(flat), tiny.batch(seed=seed))[0]
    gradient = jax.jit(jax.grad(loss), static_argnums=1)
    layers = lambda flat: {path: {str(i): x for i, x in enumerate(flat[path])} for path in paths}
    optimizer = optax.chain(
        optax.contrib.scale_by_galore(RANK, update_proj_gap=method["every"], scale=SCALE, base_optimizer=base()),
        optax.scale(-lr),
    )
    rest = optax.chain(base(), optax.scale(-lr))
    others = {path: x for path, x in flat.items() if path not in paths}
    state, own = optimizer.init(layers(flat)), rest.init(others)
    for seed in range(steps):
        grads = gradient(flat, seed)
        updates, state = optimizer.update(layers(grads), state)
        of_rest, own = rest.update({path: grads[path] for path in others}, own)
        stacked = {path: jnp.stack([updates[path][str(i)] for i in range(3)]) for path in paths}
        flat = optax.apply_updates(flat, {**stacked, **of_rest})
    return flat


@pytest.mark.parametrize(
    ("base", "targets", "lr"),
    [("sgd", "all-linear", 0.1), pytest.param("adam", "[qo]_proj$", 1e-3, marks=pytest.mark.slow)],
    ids=["sgd", "adam"],
)
def test_agrees_with_optax(base, targets, lr):
    """With SGD and a projection of each gradient, whichever side is projected; with Adam where the sides are equal.

    (optax projects the longer side, the paper and this library the shorter one.)
    """
    every = 1 if base == "sgd" else 2
    direction = {"sgd": optax.identity, "adam": optax.scale_by_adam}[base]
    method = jp.galore(RANK, every=every, scale=SCALE, projection="svd", targets=targets, which="all")
    ours = train(method, direction(), 3, rate=lr)
    paths = [path.replace("galore/p", "kernel") for path in ours.moved if path.endswith("/galore/p")]
    theirs = by_optax({"every": every}, direction, lr, 3, paths)
    _, params = tiny.model()
    before = tree.flatten(params)
    for path in paths:
        change = np.asarray(theirs[path] - before[path])
        apart = np.linalg.norm(ours.leaves[path] - theirs[path]) / np.linalg.norm(change)
        assert apart < 2e-2, path  # where a gradient is rounding, Adam's direction has any sign


def test_adam_agrees_with_the_rule():
    """One site of each orientation, two steps within a period, by NumPy: moments on R, then s back(R), and decay."""
    lr, decay, every = 1e-2, 0.1, 2
    method = jp.galore(RANK, every=every, scale=SCALE, projection="svd", targets="mlp", which="all")
    model, state = start(method, optax.scale_by_adam())
    step = jax.jit(jp.make_train_step(model, method, optax.scale_by_adam(), rate=lr, weight_decay=decay))
    base, _ = tiny.model()
    loss = lambda flat, seed: jp.completion_loss(base, tree.unflatten(flat), tiny.batch(seed=seed))[0]
    gradient = jax.jit(jax.grad(loss), static_argnums=1)
    moments: dict = {}
    for t in (1, 2):
        plain = {path: leaf for path, leaf in state.leaves.items() if "galore/" not in path}
        grads = gradient(plain, t)
        new, _ = step(state, tiny.batch(seed=t))
        for site in ("mlp/up_proj", "mlp/down_proj"):
            path = f"layers/{site}/kernel"
            g, w = np.asarray(grads[path], np.float64), np.asarray(state.leaves[path], np.float64)
            left = g.shape[1] <= g.shape[2]
            if t == 1:
                u, _, vt = np.linalg.svd(g, full_matrices=False)
                moments[site] = (u[..., :RANK] if left else vt[:, :RANK].transpose(0, 2, 1)), 0.0, 0.0
            p, mean, square = moments[site]
            r = p.transpose(0, 2, 1) @ g if left else g @ p
            mean, square = 0.9 * mean + 0.1 * r, 0.999 * square + 0.001 * r * r
            moments[site] = p, mean, square
            way = (mean / (1 - 0.9**t)) / (np.sqrt(square / (1 - 0.999**t)) + 1e-8)
            expected = w - lr * (SCALE * (p @ way if left else way @ p.transpose(0, 2, 1)) + decay * w)
            apart = np.linalg.norm(new.leaves[path] - expected) / np.linalg.norm(expected - w)
            assert apart < 2e-2, (site, t)
        state = new


def test_all_directions_with_sgd_are_full_fine_tuning():
    """r = min(n, m) and s = 1: nothing of the gradient is lost, from the first step on with either projection."""
    lr, targets_ = 0.1, "self_attn/[kv]_proj"
    full = train(jp.full(), optax.identity(), 2, rate=lr)
    for projection in galore.PROJECTIONS:
        ours = train(jp.galore(16, 1, 1.0, projection, targets_, which="all"), optax.identity(), 2, rate=lr)
        for path, leaf in full.trainable.items():
            np.testing.assert_allclose(ours.leaves[path], leaf, rtol=1e-3, atol=1e-4, err_msg=path)


def test_projections_change_when_they_are_due(first):
    method = jp.galore(RANK, every=2, which="all")
    model, state = start(method, make_direction())
    step, path = jax.jit(jp.make_train_step(model, method, make_direction(), rate=1e-2)), KERNELS[0]
    basis = path.replace("kernel", "galore/p")
    for done in range(4):
        new, _ = step(state, BATCH)
        assert bool(np.any(new.moved[basis] != state.moved[basis])) == (done % 2 == 0)
        assert np.any(new.moved[path] != state.moved[path])
        assert not any(np.any(leaf) for p, leaf in new.trainable.items() if p.endswith("/galore/r"))
        state = new


def test_rounding_is_unbiased_where_bf16_would_lose_the_change():
    """1 + 2^-10 is 1 to the nearest; at random it is 1 + 2^-7 once in eight times. Negative numbers likewise."""
    for sign in (1, -1):
        wide = jnp.full((1 << 16,), sign * (1 + 2**-10))
        found = projections.stochastic(wide, jax.random.bits(KEY, wide.shape, jnp.uint16)).astype(jnp.float32)
        assert set(np.unique(found)) == {sign * 1.0, sign * (1 + 2**-7)}
        np.testing.assert_allclose(found.mean(), wide.mean(), atol=5e-5)
    kernel, p, r = jnp.ones((2, 4, 8), jnp.bfloat16), jnp.ones((2, 4, 1)), jnp.full((2, 1, 8), 2**-12)
    assert np.all(projections.taken_up(kernel, p, r, 1.0, 1.0, None) == kernel)
    up = jax.vmap(lambda i: projections.taken_up(kernel, p, r, 1.0, 1.0, jax.random.key(i)))(jnp.arange(256))
    np.testing.assert_allclose(up.astype(jnp.float32).mean(), 1 + 2**-12, atol=1.5e-4)


@pytest.mark.parametrize(
    ("method", "message"),
    [
        (lambda: jp.galore(0), "rank 0 must be at least 1"),
        (lambda: jp.galore(17), "rank 17 is above the smaller side of layers/self_attn/k_proj"),
        (lambda: jp.galore(4, scale=-1.0), "scale -1.0 must be a finite number above 0"),
        (lambda: jp.galore(4, every=0), "every 0 must be at least 1"),
        (lambda: jp.galore(4, projection="random"), "projection 'random' is not one of sketch, svd"),
        (lambda: jp.galore(4, rounding="up"), "rounding 'up' is not one of"),
        (lambda: jp.chain(jp.lora(2), jp.galore(4)), "trains in lora.galore; leaves of adapters are thinner"),
        (lambda: jp.chain(jp.full("norms"), jp.galore(4)), "none of the kernels"),
    ],
)
def test_mistakes(method, message):
    with pytest.raises(jp.InputError, match=f"galore: .*{message}"):
        start(method(), make_direction())


def test_quantized_kernels_are_refused():
    base, params = tiny.model()
    flat = tree.flatten(params)
    path = "layers/mlp/up_proj/kernel"
    packed = tree.unflatten({**flat, path: jax.vmap(quantize)(jnp.zeros((3, 64, 64)))})
    with pytest.raises(jp.InputError, match="galore: layers/mlp/up_proj is quantized"):
        jp.setup(jp.galore(RANK), base, packed, KEY)
    with pytest.raises(jp.InputError, match=f"lisa: {path} is quantized"):
        jp.setup(jp.lisa(), base, packed, KEY)


@pytest.mark.slow
@pytest.mark.parametrize(("frozen", "most"), [(False, 10.95), (True, 7.05)], ids=["all", "embeddings frozen"])
def test_what_an_h200_needs(frozen, most, tmp_path):
    """llama3.2-1b, 4 x 1024, `matmuls`, rank 128; no temporary is a stack of kernels, and the kernels lie there once.

    Masters, moments and gradient of the embeddings are 3.9 GiB of the first figure.
    """
    if not importlib.util.find_spec("jax_plugins"):
        pytest.skip("no CUDA plugin")
    method = jp.galore() if frozen else jp.galore(which="all")
    step = planner.make_step(geometries.load("llama3.2-1b"), method, 4, 1024, "matmuls")
    row = planner.row(step, target("h200"), dump=tmp_path)
    assert row["bytes"]["total"] <= most * 2**30
    assignment = max(tmp_path.glob("*buffer-assignment.txt"), key=lambda file: file.stat().st_size).read_text()
    kernels = {leaf.shape for path, leaf in step.state.moved.items() if path.endswith("/kernel")}
    parts = re.split(r"\n(?=allocation \d+:)", assignment)
    (temporaries,) = [part for part in parts if "preallocated-temp" in part[:200]]
    found = [tuple(map(int, shape.split(","))) for shape in re.findall(r": \w+\[([\d,]+)\]", temporaries)]
    assert found and not kernels & set(found)


def test_rounding_turns_only_projections_of_close_singular_values():
    """A vector is off by the rounding over the gap to its neighbours; of close ones what they span is, and no more."""
    rng = np.random.default_rng(0)
    u, v = (np.linalg.qr(rng.standard_normal((size, 5)))[0] for size in (24, 16))
    matrix = u * [9.0, 6.0, 3.0 + 1e-6, 3.0, 0.5] @ v.T
    noise = 3e-6 * (u[:, 2:4] @ v[:, 3:1:-1].T)
    one, other = (np.asarray(projections.leading(jnp.asarray(x, jnp.float32), 4)) for x in (matrix, matrix + noise))
    np.testing.assert_allclose(other[:, :2], one[:, :2], atol=1e-5)
    assert np.abs(other[:, 2:] - one[:, 2:]).max() > 1e-3
    np.testing.assert_allclose(other @ other.T, one @ one.T, atol=1e-5)


@pytest.mark.parametrize("decompose", [projections.leading, projections.exact])
def test_decomposes_a_matrix_at_a_time(decompose):
    """Batched decompositions side by side wait for ever on a processor of two cores."""
    matrices = jax.random.normal(jax.random.key(0), (2, 3, 6, 4))
    found = decompose(matrices, 2)
    alone = [[decompose(one, 2) for one in row] for row in matrices]
    np.testing.assert_allclose(found, jnp.array(alone), rtol=1e-5, atol=1e-5)
    text = jax.jit(functools.partial(decompose, rank=2)).lower(matrices).as_text()
    calls = [line for line in text.splitlines() if "@lapack_" in line]
    assert calls and not any(re.search(r"tensor<\d+x\d+x\d+\S*xf32>", line) for line in calls)
