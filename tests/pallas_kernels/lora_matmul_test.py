"""The operation as a user meets it: values, derivatives, what is kept, which implementation runs; on a CPU."""

import functools
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from jax.extend.core import ClosedJaxpr, jaxpr_as_fun
from jax.interpreters import partial_eval
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from jaxpeft.backward.flops import count_flops
from jaxpeft.memory import targets
from pallas_kernels import packed, platform
from pallas_kernels.dropout import mask
from pallas_kernels.lora_matmul import factor_gradient, forward, input_gradient, lora_matmul, low
from pallas_kernels.multi_lora_matmul import multi_lora_matmul
from pallas_kernels.quant_lora_matmul import quant_lora_matmul

SCALE = 1.5


def arrays(lead=(2, 5), n=24, m=16, r=3, dtype=np.float32, seed=0):
    rng = np.random.default_rng(seed)
    shapes = ((*lead, n), (n, m), (n, r), (r, m), (*lead, m))
    return [jnp.asarray(rng.normal(size=shape), dtype) for shape in shapes]


def expected(x, w, a, b, dy, rate=0.0, seed=0):
    """(y, dx, dA, dB) in float64, by the equations."""
    x, w, a, b, dy = (np.asarray(v, np.float64) for v in (x, w, a, b, dy))
    rows, d = x.reshape(-1, x.shape[-1]), dy.reshape(-1, dy.shape[-1])
    kept = np.asarray(mask(jnp.int32(seed), rows.shape, rate)) / (1 - rate) if rate else np.ones_like(rows)
    dropped = rows * kept
    y = rows @ w + SCALE * dropped @ a @ b
    dx = d @ w.T + kept * (SCALE * d @ b.T @ a.T)
    grads = dx.reshape(x.shape), SCALE * dropped.T @ d @ b.T, SCALE * (dropped @ a).T @ d
    return y.reshape(dy.shape), *grads


def distance(found, wanted):
    return np.linalg.norm(np.asarray(found, np.float64) - wanted) / np.linalg.norm(wanted)


def derived(function, x, a, b, dy):
    y, pull = jax.vjp(function, x, a, b)
    return y, *pull(dy.astype(y.dtype))


@settings(max_examples=25, deadline=None)
@given(
    st.sampled_from([(), (1,), (7,), (2, 5)]),
    st.integers(1, 40),
    st.integers(1, 40),
    st.integers(1, 9),
    st.sampled_from([0.0, 0.3]),
)
@example((1,), 1, 33, 5, 0.3)  # dx is 0.0026, of terms that come to 119
def test_values_and_derivatives_of_any_shape(lead, n, m, r, rate):
    """Against float64: float32 sums of at most a few hundred terms are within 1e-5 of what their terms come to without
    signs, in norm; where terms cancel, the sum itself may be far smaller."""
    x, w, a, b, dy = arrays(lead, n, m, r, seed=n + m)
    run = functools.partial(lora_matmul, scale=SCALE, rate=rate, seed=jnp.uint32(9))
    found = derived(lambda x, a, b: run(x, w, a, b), x, a, b, dy)
    wanted = expected(x, w, a, b, dy, rate, 9)
    sizes = expected(*map(jnp.abs, (x, w, a, b, dy)), rate, 9)
    for name, ours, theirs, size in zip(("y", "dx", "dA", "dB"), found, wanted, sizes, strict=True):
        assert np.linalg.norm(np.asarray(ours, np.float64) - theirs) <= 1e-5 * np.linalg.norm(size), name


def test_bfloat16_with_float32_masters():
    """Products in bfloat16, float32 gradients of float32 factors; errors are those of rounding y and z, 2^-9 each."""
    x, w, a, b, dy = arrays((64,), 64, 48, 8)
    found = derived(
        lambda x, a, b: lora_matmul(x, w.astype(jnp.bfloat16), a, b, scale=SCALE), x.astype(jnp.bfloat16), a, b, dy
    )
    assert [g.dtype for g in found] == [jnp.bfloat16, jnp.bfloat16, jnp.float32, jnp.float32]
    for name, ours, theirs in zip(("y", "dx", "dA", "dB"), found, expected(x, w, a, b, dy), strict=True):
        assert distance(ours, theirs) < 1e-2, name


def test_derivatives_are_slopes():
    """Central differences of a random projection, step chosen for float32."""
    x, w, a, b, dy = arrays()
    run = lambda x, a, b: lora_matmul(x, w, a, b, scale=SCALE, rate=0.2, seed=jnp.int32(1))
    total = lambda *args: float((np.asarray(run(*args), np.float64) * dy).sum())
    grads = jax.grad(lambda *args: (run(*args) * dy).sum(), (0, 1, 2))(x, a, b)
    rng, step = np.random.default_rng(1), 1e-2
    for i, grad in enumerate(grads):
        direction = rng.normal(size=grad.shape).astype(np.float32)
        moved = [[v + sign * step * direction if j == i else v for j, v in enumerate((x, a, b))] for sign in (1, -1)]
        slope = (total(*moved[0]) - total(*moved[1])) / (2 * step)
        assert slope == pytest.approx(float((grad * direction).sum()), rel=2e-3)


def test_the_kernel_itself_may_be_differentiated():
    x, w, a, b, dy = arrays()
    plain = lambda w: ((x @ w + SCALE * x @ a @ b) * dy).sum()
    found = jax.grad(lambda w: (lora_matmul(x, w, a, b, scale=SCALE) * dy).sum())(w)
    np.testing.assert_allclose(found, jax.grad(plain)(w), rtol=1e-5, atol=1e-5)


def kept(function, *trained):
    return sorted(leaf.shape for leaf in jax.tree.leaves(jax.eval_shape(lambda *t: jax.vjp(function, *t)[1], *trained)))


def test_what_is_kept():
    """z (r, T) and the factors; x only if A is trained. A that is made of a seed is not kept."""
    x, w, a, b, _ = arrays()
    always = [w.shape, b.shape, (), (3, 10)]
    assert kept(lambda x, b: lora_matmul(x, w, a, b), x, b) == sorted([*always, a.shape])
    assert kept(lambda x, a, b: lora_matmul(x, w, a, b), x, a, b) == sorted([*always, a.shape, x.shape])
    made = functools.partial(lora_matmul, make_a=_constant)
    assert kept(lambda x, b: made(x, w, jnp.uint32(1), b), x, b) == sorted([*always, ()])


def _constant(seed):
    return jnp.full((24, 3), 0.1) * seed


def test_made_factors_are_factors():
    x, w, _, b, dy = arrays()
    seed = jnp.uint32(2)
    made = derived(lambda x, unused, b: lora_matmul(x, w, seed, b, make_a=_constant), x, jnp.zeros(()), b, dy)
    factors = derived(lambda x, a, b: lora_matmul(x, w, a, b), x, _constant(seed), b, dy)
    for i in (0, 1, 3):
        np.testing.assert_allclose(made[i], factors[i], rtol=1e-6)


def test_where_y_is_not_used_only_z_is_computed():
    """Dead code elimination leaves the skinny product of a backward pass that needs z alone."""
    x, w, a, b, _ = arrays()
    function = jax.grad(lambda b: lora_matmul(x, w, a, b, scale=SCALE, rate=0.2, seed=jnp.int32(3)).sum())
    jaxpr = jax.make_jaxpr(function)(b)
    pruned, _ = partial_eval.dce_jaxpr(jaxpr.jaxpr, [True], instantiate=True)
    names = [eqn.primitive.name for eqn in pruned.eqns]
    assert "lora_low" in names and "lora_forward" not in names
    assert count_flops(pruned) == 2 * 10 * 24 * 3 + 2 * 10 * 3 * 16
    (alone,) = jaxpr_as_fun(ClosedJaxpr(pruned, jaxpr.consts))(b)
    np.testing.assert_array_equal(alone, function(b))


TRANSFORMS = {
    "jit": lambda f: jax.jit(f),
    "remat": lambda f: jax.checkpoint(f),
    "vmap": lambda f: lambda x, a, b: jax.vmap(f, (0, None, None))(x, a, b),
    "scan": lambda f: lambda x, a, b: jax.lax.scan(lambda c, row: (c, f(row, a, b)), 0, x)[1],
}


@pytest.mark.parametrize("transform", TRANSFORMS)
def test_inside_transformations(transform):
    x, w, a, b, dy = arrays()
    function = TRANSFORMS[transform](lambda x, a, b: lora_matmul(x, w, a, b, scale=SCALE))
    for ours, theirs in zip(derived(function, x, a, b, dy), expected(x, w, a, b, dy), strict=True):
        assert distance(ours, theirs) < 1e-5


def quantized(x, w, a, b, **options):
    return quant_lora_matmul(x, packed.quantize(w, group=8), a, b, **options)


def test_over_a_packed_kernel():
    """The same over what the packed kernel stands for, which gets no gradient."""
    x, w, a, b, dy = arrays()
    stands_for = packed.dequantize(packed.quantize(w, group=8))
    found = derived(lambda x, a, b: quantized(x, w, a, b, scale=SCALE, rate=0.2, seed=jnp.int32(4)), x, a, b, dy)
    for ours, theirs in zip(found, expected(x, stands_for, a, b, dy, 0.2, 4), strict=True):
        assert distance(ours, theirs) < 1e-5
    residuals = kept(lambda x, b: quant_lora_matmul(x, packed.quantize(w, group=8), a, b), x, b)
    assert w.shape not in residuals and (12, 16) in residuals


@pytest.mark.parametrize("length", [128, 200, 5])
def test_rows_of_different_adapters(length):
    """Each row with its own factors, in any order, an adapter without rows, ranks 2 and 3: row by row."""
    rng = np.random.default_rng(0)
    adapter, scales = jnp.array([2, 0, 2]), jnp.array([0.5, 7.0, 2.0])
    x, w = (jnp.asarray(rng.normal(size=s), jnp.float32) for s in ((3, length, 24), (24, 16)))
    a, b = (rng.normal(size=s).astype(np.float32) for s in ((3, 24, 3), (3, 3, 16)))
    a[0, :, 2:], b[0, 2:] = 0, 0
    dy = jnp.asarray(rng.normal(size=(3, length, 16)), jnp.float32)
    found = derived(lambda x, a, b: multi_lora_matmul(x, w, a, b, adapter, scales=scales), x, a, b, dy)
    rows = [(i, int(g), float(scales[g]) / SCALE) for i, g in enumerate(adapter)]
    for k in (0, 1):  # `expected` multiplies by SCALE
        wanted = np.stack([expected(x[i], w, a[g], s * b[g], dy[i])[k] for i, g, s in rows])
        np.testing.assert_allclose(found[k], wanted, rtol=1e-4, atol=1e-4)
    for k in (2, 3):
        wanted = np.zeros(found[k].shape)
        for i, g, s in rows:
            wanted[g] += s * expected(x[i], w, a[g], b[g], dy[i])[k]
        np.testing.assert_allclose(found[k], wanted, rtol=1e-4, atol=1e-3)
        assert not found[k][1].any()
    assert not found[2][0, :, 2:].any() and not found[3][0, 2:].any()


# Which implementation runs.


def lowered(where, rows=256, dtype=jnp.bfloat16, implementation=None, n=256):
    """The text of the program of y for a place."""
    shapes = ((rows, n), (n, 128), (n, 16), (16, 128))
    structs = [jax.ShapeDtypeStruct(shape, dtype, sharding=where) for shape in shapes]
    return jax.jit(functools.partial(lora_matmul, implementation=implementation)).lower(*structs).as_text()


def place(name):
    pytest.importorskip("libtpu")
    pytest.importorskip("jax_plugins.xla_cuda13")
    return jax.sharding.SingleDeviceSharding(targets.devices(targets.target(name))[0])


KERNEL = {"h200": "mosaic_gpu", "v5p": "tpu"}


@pytest.mark.parametrize("name", KERNEL)
def test_the_platform_has_its_kernel(name):
    where = place(name)
    assert "custom_call" in lowered(where)
    assert "custom_call" not in lowered(where, implementation="xla")
    with platform.forced("xla"):
        assert "custom_call" not in lowered(where)
    assert "custom_call" in lowered(where, implementation=KERNEL[name])


def test_shapes_that_a_kernel_does_not_take(monkeypatch, caplog):
    """Plain JAX, said of the first of a type and logged of each; an error if the kernel was asked for."""
    caplog.set_level("INFO", "pallas_kernels.platform")
    monkeypatch.setattr(platform, "_said", set())
    where = place("h200")
    with pytest.warns(
        platform.KernelFallback, match=r"lora_forward: the mosaic_gpu kernel does not take .*\[256, 100\]"
    ):
        assert "custom_call" not in lowered(where, n=100)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        lowered(where, n=100)
        lowered(where, n=104)
    assert "[256, 104]" in caplog.messages[-1] and "[256, 104]" not in "".join(caplog.messages[:-1])
    with pytest.warns(platform.KernelFallback, match=r"does not take float32\[256, 256\]"):
        lowered(where, dtype=jnp.float32)
    with pytest.raises(NotImplementedError, match="does not take"):
        lowered(where, n=100, implementation="mosaic_gpu")
    with pytest.warns(platform.KernelFallback, match=r"kernels run on compute capability 9\.x, not 8\.0"):
        assert "custom_call" not in lowered(place("a100"))
    with pytest.raises(NotImplementedError, match="'tpu' does not run on cuda"):
        lowered(where, implementation="tpu")
    with pytest.raises(NotImplementedError, match="'tpu' does not run on"):
        jax.jit(functools.partial(lora_matmul, implementation="tpu"))(*arrays()[:4])
    with pytest.raises(ValueError, match="'triton' is not one of xla, mosaic_gpu, tpu"):
        lora_matmul(*arrays()[:4], implementation="triton")


def test_on_a_mesh(monkeypatch):
    """Inside a shard_map the kernel runs on each device's rows; a mesh that XLA partitions gets plain JAX."""
    place("v5p")
    monkeypatch.setattr(platform, "_said", set())
    mesh = Mesh(np.array(targets.devices(targets.target("v5e:2x2"))), ("data",))
    rows, all_ = NamedSharding(mesh, PartitionSpec("data")), NamedSharding(mesh, PartitionSpec())
    shapes = ((512, 256), (256, 128), (256, 16), (16, 128))
    places = (rows, all_, all_, all_)
    structs = [jax.ShapeDtypeStruct(s, jnp.bfloat16, sharding=p) for s, p in zip(shapes, places, strict=True)]
    specs = (PartitionSpec("data"), PartitionSpec(), PartitionSpec(), PartitionSpec())
    mapped = jax.shard_map(lora_matmul, mesh=mesh, in_specs=specs, out_specs=specs[0], check_vma=False)
    assert "tpu_custom_call" in jax.jit(mapped).lower(*structs).as_text()
    with pytest.warns(platform.KernelFallback, match="in a shard_map over all axes"):
        assert "tpu_custom_call" not in jax.jit(lora_matmul).lower(*structs).as_text()


def test_costs_are_counted():
    x, w, a, b, dy = arrays((10,))
    seed = jnp.int32(0)
    both, thin = 2 * 10 * (24 * 16 + 3 * 40), 2 * 10 * 24 * 3
    for function, args, flops in (
        (functools.partial(forward, scale=1.0, rate=0.0), (x, w, a, b, seed), both),
        (functools.partial(input_gradient, scale=1.0, rate=0.0), (dy, w, a, b, seed), both),
        (functools.partial(low, scale=1.0, rate=0.0), (x, a, seed), thin),
        (functools.partial(factor_gradient, rate=0.0), (jnp.ones((3, 10)), x, seed), thin),
    ):
        assert count_flops(jax.make_jaxpr(function)(*args)) == flops


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"a": (23, 3)}, r"a \(23, 3\), b \(3, 16\) are not"),
        ({"b": (4, 16)}, r"are not \(\.\.\., n\), \(n, m\), \(n, r\), \(r, m\)"),
        ({"x": (2, 23)}, r"x \(2, 23\)"),
        ({"rate": 1.0}, "rate 1.0 must be at least 0 and below 1"),
        ({"rate": 0.1}, "rate 0.1 needs a seed"),
    ],
)
def test_refusals(change, message):
    x, w, a, b, _ = arrays()
    given = {"x": x, "w": w, "a": a, "b": b} | {k: jnp.ones(v) if k in "xab" else v for k, v in change.items()}
    with pytest.raises(ValueError, match=message):
        lora_matmul(**given)
