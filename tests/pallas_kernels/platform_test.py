"""Which implementation is lowered where: each is a function of its own, to be seen in the program."""

import functools
import importlib.util

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding, PartitionSpec, SingleDeviceSharding

from jaxpeft.backward.flops import count_flops
from jaxpeft.memory import targets
from pallas_kernels.divided import Dims, Divided
from pallas_kernels.platform import Implementation, operation

NAMES = {"cpu": "sine", "v5p": "tanh", "h200": "exponential"}  # what each platform's implementation is in StableHLO


def even(x, *, times):
    return x.shape[-1] % 2 == 0


def scaled(function):
    return lambda x, *, times: times * function(x)


OPTIONS = {
    "default": scaled(jnp.sin),
    "flops": lambda x, *, times: 7.0 * times * x.size,
    "tpu": Implementation(scaled(jnp.tanh), even),
    "cuda": Implementation(scaled(jnp.exp), even),
}
toy = operation("toy", **OPTIONS)
divisible = operation("toy_divisible", **OPTIONS | {"tpu": Implementation(scaled(jnp.tanh), even, partitions=True)})
known = operation("toy_known", **OPTIONS | {"dims": Dims(("tn",), ("tn",), ("",))})
slope = operation("toy_slope", lambda x, *, times: times * jnp.cos(x))
pair = operation("toy_pair", lambda xs: {"sum": xs[0] + xs[1], "product": xs[0] * xs[1]})


def device(name):
    if name == "v5p":
        pytest.importorskip("libtpu")
    if name == "h200" and not importlib.util.find_spec("jax_plugins"):
        pytest.skip("no CUDA plugin")
    return targets.devices(targets.target(name))[0]


def lowered(function, where, shape=(4, 6)):
    """The names in NAMES that are in the program as it is lowered for a device."""
    x = jax.ShapeDtypeStruct(shape, jnp.float32, sharding=where)
    text = jax.jit(function).lower(x).as_text()
    return {name for name in NAMES.values() if f"stablehlo.{name}" in text}


def three(x):
    return toy(x, times=3)


@pytest.mark.parametrize("name", NAMES)
def test_the_platform_of_the_program_decides(name):
    assert lowered(three, SingleDeviceSharding(device(name))) == {NAMES[name]}


@pytest.mark.parametrize("name", ["v5p", "h200"])
def test_the_default_takes_what_the_others_do_not(name):
    assert lowered(three, SingleDeviceSharding(device(name)), (4, 5)) == {"sine"}


def test_on_several_devices_only_what_can_be_partitioned():
    pytest.importorskip("libtpu")
    mesh = Mesh(targets.devices(targets.target("v5e:2x2")), ("data",))
    rows = NamedSharding(mesh, PartitionSpec("data"))
    assert lowered(three, rows) == {"sine"}
    assert lowered(functools.partial(divisible, times=3), rows) == {"tanh"}


def test_an_operation_that_knows_the_mesh_is_each_devices_own():
    """Where the devices divide its dimensions."""
    pytest.importorskip("libtpu")
    mesh = Mesh(targets.devices(targets.target("v5e:2x2")), ("data",))
    rows = NamedSharding(mesh, PartitionSpec("data"))
    divided = Divided(mesh.abstract_mesh, (("t", ("data",)),))
    assert lowered(functools.partial(known, times=3, divided=divided), rows) == {"tanh"}
    whole = NamedSharding(mesh, PartitionSpec())
    assert lowered(functools.partial(known, times=3, divided=divided), whole, (6, 6)) == {"sine"}


TRANSFORMS = {
    "jit": jax.jit(three),
    "vmap": jax.vmap(three),
    "scan": lambda x: jax.lax.scan(lambda total, row: (total, three(row)), 0, x)[1],
    "remat": jax.checkpoint(three),
    "nested vmap": lambda x: jax.vmap(jax.vmap(three))(x[:, None])[:, 0],
}


@pytest.mark.parametrize("transform", TRANSFORMS)
def test_inside_transformations(transform):
    """Values on the attached device; the described one's implementation is still chosen inside."""
    x = np.linspace(-1, 1, 24, dtype=np.float32).reshape(4, 6)
    np.testing.assert_allclose(TRANSFORMS[transform](x), 3 * np.sin(x), rtol=1e-6)
    assert lowered(TRANSFORMS[transform], SingleDeviceSharding(device("v5p"))) == {"tanh"}


def test_arguments_and_results_are_trees():
    x, y = jnp.arange(3.0), jnp.ones(3)
    found = pair((x, y))
    np.testing.assert_array_equal(found["sum"], x + y)
    np.testing.assert_array_equal(found["product"], x * y)
    mapped = jax.vmap(pair, in_axes=((0, None),))((jnp.stack([x, y], 1).T, y))
    np.testing.assert_array_equal(mapped["product"], jnp.stack([x, y]) * y)


@jax.custom_vjp
def wave(x):
    return three(x)


wave.defvjp(lambda x: (three(x), x), lambda x, d_y: (d_y * slope(x, times=3),))


def test_a_derivative_by_another_operation():
    """Through jit, scan and remat; without the wrapper there is none."""

    def total(x):
        return jax.lax.scan(lambda carry, row: (carry + jax.checkpoint(wave)(row).sum(), None), 0.0, x)[0]

    x = np.linspace(-1, 1, 24, dtype=np.float32).reshape(4, 6)
    np.testing.assert_allclose(jax.jit(jax.grad(total))(x), 3 * np.cos(x), rtol=1e-6)
    with pytest.raises(NotImplementedError, match="toy"):
        jax.grad(lambda x: three(x).sum())(x)


def test_flops_are_by_its_own_formula():
    """Also inside a scan, as often as that runs."""
    jaxpr = jax.make_jaxpr(TRANSFORMS["scan"])(np.ones((4, 6), np.float32))
    assert count_flops(jaxpr) == 4 * 7 * 3 * 6
