"""LaMDA: the equation's numbers, both starts, rows that are frozen to the bit, packed kernels, ranks by energy."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import jaxpeft as jp
from jaxpeft import sites, tree
from jaxpeft.methods import lamda
from jaxpeft.model import Context
from jaxpeft.quant import dot
from jaxpeft.train.optimizer import make_direction
from pallas_kernels.packed import dequantize, quantize
from tests import residuals, tiny

RNG = np.random.default_rng(0)
BATCH = tiny.batch(2)


def normal(*shape):
    return RNG.normal(size=shape).astype(np.float32)


def leaves_of(n, m, r, init="svd"):
    """An adapter's parameters with E and D that are not zero."""
    start = {"a": normal(n, r), "s0": normal(r, r)} | ({"v": normal(r, m)} if init == "svd" else {})
    return jax.tree.map(jnp.asarray, {"start": start, "e": normal(r, r), "d": normal(r, m)})


def called(own, x, kernel, init="svd", **rngs):
    site, module = sites.Site("layers/v_proj", kernel, None, True), lamda.LaMDA(5, 0.5, init, True, 0.5)
    return module.apply({"params": own}, lambda x: dot(x, kernel), x, site, Context(), **rngs)


@pytest.mark.parametrize("init", lamda.INITS)
def test_values_and_gradients_are_the_equations(init):
    """y = x W + s (x A) (S B - S0 V); dS = (x A)^T (s dy B^T), dB = S^T (x A)^T s dy."""
    x, w, dy, own = normal(7, 12), normal(12, 8), normal(7, 8), leaves_of(12, 8, 5, init)
    numbers = {
        name: np.asarray(leaf, np.float64) for name, leaf in {**own["start"], "e": own["e"], "d": own["d"]}.items()
    }
    v = numbers.get("v", np.zeros((5, 8)))
    s, b, low = numbers["s0"] + numbers["e"], v + numbers["d"], x @ numbers["a"]
    expected = x @ w + 0.5 * low @ (s @ b - numbers["s0"] @ v)
    np.testing.assert_allclose(called(own, x, w, init), expected, rtol=1e-4, atol=1e-4)

    def loss(own, x):
        return jnp.sum(called(own, x, jnp.asarray(w), init) * dy)

    found, d_x = jax.grad(loss, argnums=(0, 1))(own, jnp.asarray(x))
    np.testing.assert_allclose(found["e"], low.T @ (0.5 * dy @ b.T), rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(found["d"], s.T @ low.T @ (0.5 * dy), rtol=1e-4, atol=1e-4)
    change = 0.5 * numbers["a"] @ (s @ b - numbers["s0"] @ v)
    np.testing.assert_allclose(d_x, dy @ (w + change).T, rtol=1e-4, atol=1e-4)


def test_the_start_is_the_largest_part_of_the_kernel():
    _, params = tiny.model()
    _, trainable, rest = jp.setup(jp.lamda(3, targets=["k_proj"]), *tiny.model(), jax.random.key(0))
    site = "layers/self_attn/k_proj"
    a, s0, v = (np.asarray(rest[f"{site}/lamda/start/{name}"], np.float64) for name in ("a", "s0", "v"))
    assert (a.shape, s0.shape, v.shape) == ((3, 32, 3), (3, 3, 3), (3, 3, 16))
    assert {path: leaf.shape for path, leaf in trainable.items()} == {
        f"{site}/lamda/e": (3, 3, 3),
        f"{site}/lamda/d": (3, 3, 16),
    }
    for layer, kernel in enumerate(np.asarray(tree.flatten(params)[f"{site}/kernel"], np.float64)):
        sigma = np.linalg.svd(kernel, compute_uv=False)
        np.testing.assert_allclose(np.diag(s0[layer]), sigma[:3], rtol=1e-4)
        left = kernel - a[layer] @ s0[layer] @ v[layer]
        np.testing.assert_allclose(np.linalg.svd(left, compute_uv=False)[:13], sigma[3:], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("own_optimizer", [False, True])
def test_rows_are_frozen_one_after_the_other_and_keep_their_bits(own_optimizer):
    """With decay and moments, of the step's rate as of an optimizer of one's own; E goes on."""
    method = jp.lamda(3, freeze=6, targets=["q_proj"])
    model, trainable, rest = jp.setup(method, *tiny.model(), jax.random.key(0))
    trainable = {path: leaf + 0.1 for path, leaf in trainable.items()}
    optimizer = optax.adamw(1e-2, weight_decay=0.3) if own_optimizer else make_direction("adam")
    options = {} if own_optimizer else {"rate": 1e-2, "weight_decay": 0.3}
    state = jp.init_state(method, optimizer, trainable, rest, jax.random.key(1), model)
    step = jax.jit(jp.make_train_step(model, method, optimizer, **options))
    path = "layers/self_attn/q_proj/lamda"
    for done in range(8):
        new, _ = step(state, BATCH)
        moves = np.any(np.asarray(new.trainable[f"{path}/d"] != state.trainable[f"{path}/d"]), axis=(0, 2))
        np.testing.assert_array_equal(moves, np.arange(3) >= 3 * done // 6)
        assert np.all(new.trainable[f"{path}/e"] != state.trainable[f"{path}/e"])
        state = new


def test_clipping_does_not_see_frozen_rows():
    d, e = jnp.full((1, 2, 3), 10.0), jnp.full((1, 2, 2), 0.1)
    optimizer = lamda.thawed(make_direction("adam"), 2)
    grads = {"layers/q_proj/lamda/d": d, "layers/q_proj/lamda/e": e}
    state = optimizer.init(grads)._replace(steps=jnp.asarray(2))
    _, state = optimizer.update(grads, state, grads)
    means = jax.tree.leaves(state.inner, is_leaf=lambda x: isinstance(x, dict))
    of_e = next(leaf["layers/q_proj/lamda/e"] for leaf in means if isinstance(leaf, dict))
    np.testing.assert_allclose(of_e, 0.1 * 0.1, rtol=1e-5)  # Adam's first mean of a gradient that was not clipped


def test_a_second_projection_that_is_frozen_from_the_start():
    """It has no leaf and no state; what is kept is x A, and no x."""
    start = lambda method: jp.setup(method, *tiny.model(), jax.random.key(0))
    method = jp.lamda(4, freeze=0)
    model, trainable, rest = start(method)
    assert trainable and all(path.endswith("/lamda/e") and leaf.shape == (3, 4, 4) for path, leaf in trainable.items())
    floor = residuals.bytes_per_token(*start(jp.full("embeddings")), tiny.batch)
    assert residuals.bytes_per_token(model, trainable, rest, tiny.batch) - floor <= 7 * 3 * 4 * 4
    trained = jp.combine({path: leaf + 0.1 for path, leaf in trainable.items()}, rest)
    adapted, base = model.apply(trained, BATCH), tiny.model()[0]
    assert np.abs(adapted - base.apply(tiny.model()[1], BATCH)).max() > 0.1
    np.testing.assert_allclose(base.apply(method.merge(trained), BATCH), adapted, rtol=1e-4, atol=1e-4)


def test_on_a_packed_kernel_in_bfloat16():
    """Values and gradients of the unpacked kernel; the stream is not widened; dropout is of the inputs."""
    kernel = quantize(jnp.asarray(normal(128, 16)), "int8")
    plain, x, own = dequantize(kernel, jnp.float32), jnp.asarray(normal(3, 128), jnp.bfloat16), leaves_of(128, 16, 5)
    start = lamda.decompose(kernel, 5)
    sigma = np.linalg.svd(np.asarray(plain, np.float64), compute_uv=False)
    np.testing.assert_allclose(np.diag(start["s0"]), sigma[:5], rtol=1e-4)

    def loss(own, x, kernel):
        return jnp.sum(jnp.square(called(own, x, kernel).astype(jnp.float32)))

    assert called(own, x, kernel).dtype == jnp.bfloat16
    found, wanted = jax.grad(loss)(own, x, kernel), jax.grad(loss)(own, x.astype(jnp.float32), plain)
    for name in ("e", "d"):
        np.testing.assert_allclose(found[name], wanted[name], atol=0.03 * np.abs(wanted[name]).max())
    jaxpr = jax.make_jaxpr(lambda x: called(own, x, plain.astype(jnp.bfloat16)))(x)
    shapes = {(v.aval.shape, v.aval.dtype.name) for e in residuals.equations(jaxpr.jaxpr) for v in e.outvars}
    assert ((3, 128), "float32") not in shapes and ((3, 16), "float32") not in shapes

    ones, nothing = jnp.ones((4000, 128)), jnp.zeros((128, 16))
    whole, dropped = called(own, ones, nothing), called(own, ones, nothing, rngs={"dropout": jax.random.key(0)})
    assert np.abs(dropped - whole).max() > 0.1
    np.testing.assert_allclose(dropped.mean(0), whole[0], atol=0.1 * np.abs(whole[0]).max())


def test_ranks_give_each_kernel_the_same_share_of_its_energy():
    """Of a flat spectrum a share needs more directions than of a steep one; the mean is not exceeded, but used."""
    _, params = tiny.model()
    flat, steep = np.stack([np.eye(32)] * 3), np.stack([np.diag(0.5 ** np.arange(32))] * 3)
    turned = lambda x: jnp.asarray(np.linalg.qr(normal(32, 32))[0] @ x @ np.linalg.qr(normal(32, 32))[0], jnp.float32)
    kernels = {"layers/self_attn/q_proj/kernel": turned(flat), "layers/self_attn/o_proj/kernel": turned(steep)}
    params = tree.unflatten({**tree.flatten(params), **kernels})
    found = lamda.ranks(params, 8, ["q_proj", "o_proj"])
    of_flat, of_steep = found["^layers/self_attn/q_proj$"], found["^layers/self_attn/o_proj$"]
    assert of_flat > 2 * of_steep and 15 <= of_flat + of_steep <= 16
    bounded = lamda.ranks(params, 8, ["q_proj", "o_proj"], least=4, most=10)
    assert sorted(bounded.values()) == [6, 10]
    assert sum(lamda.ranks(params, 5).values()) <= 5 * 7
    method = jp.lamda(8, targets=["q_proj", "o_proj"], rank_pattern=found, freeze=0)
    _, trainable, _ = jp.setup(method, tiny.model()[0], params, jax.random.key(0))
    assert {path.split("/")[2]: leaf.shape[-1] for path, leaf in trainable.items()} == {
        "q_proj": of_flat,
        "o_proj": of_steep,
    }
    with pytest.raises(jp.InputError, match="ranks from least 9 to most None must have rank 8 between them"):
        lamda.ranks(params, 8, least=9)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"rank": 0}, "lamda: rank 0 must be at least 1"),
        ({"rank": 17}, "lamda: rank 17 is above the smaller side of layers/self_attn/k_proj, a kernel of 32 x 16"),
        ({"rank_pattern": {"k_proj": 20}}, "lamda: rank 20 is above the smaller side of layers/self_attn/k_proj"),
        ({"init": "pissa"}, "lamda: init 'pissa' is not one of svd, random"),
        ({"freeze": -1}, "lamda: freeze -1 must be at least 0"),
        ({"freeze": 0, "init": "random"}, "freeze 0 must be at least 1 with init='random', where B starts at zero"),
        ({"dropout": 1.0}, "lamda: dropout 1.0 must be at least 0 and below 1"),
        ({"targets": ["q_prj"]}, "targets 'q_prj': matches no linear site; nearest: q_proj"),
    ],
)
def test_refusals(options, message):
    with pytest.raises(jp.InputError, match=message):
        jp.setup(jp.lamda(**{"rank": 4, **options}), *tiny.model(), jax.random.key(0))
