"""Operations on a mesh of eight host devices: each device computes on its part, the whole is one device's."""

import json
import subprocess
import sys

import jax
import pytest
from jax.sharding import AbstractMesh

from pallas_kernels.divided import Dims, Divided, fits
from pallas_kernels.packed import quantize
from tests import virtual

PRODUCTS = {
    "rows": {"b": ("x", "y")},
    "rows and tokens": {"b": ("x",), "s": ("y", "z")},
    "outputs": {"b": ("x",), "m": ("z",)},
    "inputs": {"b": ("x",), "n": ("z",)},
    "all": {"b": ("x",), "s": ("y",), "n": ("z",)},
}
KERNELS = ("dense", "stacked", "nf4", "doubled", "int8")
ATTENTION = {
    "rows and heads": {"b": ("x",), "h": ("y",)},
    "tokens": {"s": ("x", "y", "z")},
    "more devices than key-value heads": {"h": ("y", "z")},
    "all": {"b": ("x",), "s": ("y",), "h": ("z",)},
}
MASKS = ("causal", "segments", "full", "window", "own window")

# Prints {kind: {layout: {case: largest difference of values and gradients, of numbers of about 1}}}.
WORKER = """
import functools, json
import jax, jax.numpy as jnp, numpy as np
from pallas_kernels.attention import Where, attention
from pallas_kernels.divided import Divided
from pallas_kernels.lora_matmul import forward_into, lora_matmul
from pallas_kernels.packed import quantize
from tests import virtual
from pallas_kernels.quant_lora_matmul import quant_lora_matmul
from pallas_kernels.stacked import Stacked
from tests.pallas_kernels import divided_test as cases

mesh = jax.make_mesh((2, 2, 2), ("x", "y", "z"), axis_types=(jax.sharding.AxisType.Auto,) * 3)
abstract = mesh.abstract_mesh
keys = jax.random.split(jax.random.key(0), 9)
normal = lambda i, *shape: jax.random.normal(keys[i], shape)

def far(function, *args):
    \"\"\"From what the whole function gives, of what it gives divided.\"\"\"
    def all_of(divided):
        def value(*args):
            y = function(*args, divided=divided)
            return jnp.vdot(y, jnp.sin(jnp.arange(y.size, dtype=y.dtype).reshape(y.shape))), y
        return jax.jit(jax.value_and_grad(value, tuple(range(len(args))), has_aux=True))
    whole = all_of(None)(*args)
    with jax.set_mesh(mesh):
        return lambda divided: max(
            float(np.abs(np.asarray(a) - np.asarray(b)).max() / max(np.abs(np.asarray(a)).max(), 1))
            for a, b in zip(jax.tree.leaves(whole), jax.tree.leaves(all_of(divided)(*args)), strict=True))

def of(axes):
    return Divided(abstract, tuple(axes.items()))

n, m, r = 512, 128, 4
w = normal(0, n, m) / n**0.5
stack = jnp.stack([w * 0, w])
index = jnp.int32(1)
kernels = {"dense": w, "stacked": Stacked(stack, index), "nf4": quantize(w, double=False), "doubled": quantize(w),
           "int8": quantize(w, "int8")}
x, a, b = normal(1, 4, 8, n), normal(2, n, r) / n**0.5, normal(3, r, m)
found = {"products": {}, "dropout": {}, "attention": {}, "into": {}}
for name in cases.KERNELS:
    function = lora_matmul if name in ("dense", "stacked") else quant_lora_matmul
    call = lambda x, a, b, divided: function(x, kernels[name], a, b, scale=2.0, divided=divided)
    with jax.set_mesh(mesh):
        differs = far(call, x, a, b)
        for layout, axes in list(cases.PRODUCTS.items())[0 if name in ("dense", "stacked") else 2 :]:
            found["products"].setdefault(layout, {})[name] = differs(of(axes))
call = lambda x, a, b, divided: lora_matmul(x, w, a, b, rate=0.4, seed=jnp.int32(7), divided=divided)
with jax.set_mesh(mesh):
    differs = far(call, x, a, b)
    for layout in ("rows", "outputs", "inputs"):
        found["dropout"][layout] = differs(of(cases.PRODUCTS[layout]))
    for layout, axes in cases.PRODUCTS.items():
        axes = {{"b": "t"}.get(letter, letter): names for letter, names in axes.items() if letter != "s"}
        rows, out = x.reshape(-1, n), Stacked(normal(4, 3, 32, m), jnp.int32(1))
        run = jax.jit(functools.partial(forward_into, scale=2.0, rate=0.0, divided=of(axes)))
        made = run(rows, w, a, b, jnp.int32(0), out)
        alone = forward_into(rows, w, a, b, jnp.int32(0), out, scale=2.0, rate=0.0)
        found["into"][layout] = max(float(jnp.abs(p - q).max()) for p, q in zip(made, alone))

q, k, v = normal(5, 2, 32, 4, 16), normal(6, 2, 32, 2, 16), normal(7, 2, 32, 2, 16)
segments = jnp.asarray(np.repeat([[1, 2, 3], [1, 1, 2]], [14, 5, 13], axis=1), jnp.int32)
masks = {"causal": (Where(), None, True), "segments": (Where(None, None, segments, segments), None, True),
         "full": (Where(None, None, segments, segments), None, False), "window": (Where(), 6, True),
         "own window": (Where(window=jnp.int32(6)), None, True)}
for name in cases.MASKS:
    where, window, causal = masks[name]
    call = lambda q, k, v, divided: attention(q, k, v, where, 0.25, window, causal, divided)
    with jax.set_mesh(mesh):
        differs = far(call, q, k, v)
        for layout, axes in cases.ATTENTION.items():
            found["attention"].setdefault(layout, {})[name] = differs(of(axes))
print(json.dumps(found))
"""


@pytest.fixture(scope="module")
def found():
    command = [sys.executable, "-c", WORKER]
    done = subprocess.run(command, env=virtual.devices(8), capture_output=True, text=True, cwd=virtual.ROOT)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.parametrize("layout", PRODUCTS)
def test_products(found, layout):
    """To float32's rounding, in other orders of sums; values and the gradients of x, A and B."""
    assert found["products"][layout].keys() == set(KERNELS[: 2 if "rows" in layout else None])
    assert max(found["products"][layout].values()) < 1e-5
    assert found["into"][layout] < 1e-5


def test_dropout_has_one_devices_mask(found):
    assert max(found["dropout"].values()) < 1e-5


@pytest.mark.parametrize("layout", ATTENTION)
def test_attention(found, layout):
    assert found["attention"][layout].keys() == set(MASKS)
    assert max(found["attention"][layout].values()) < 1e-5


MESH = AbstractMesh((2, 4), ("x", "y"))
DIMS = Dims(("tn", "nm"), ("tm",), ("n",))


def shape(*sizes):
    return jax.ShapeDtypeStruct(sizes, "float32")


@pytest.mark.parametrize(
    ("axes", "kernel", "fitting"),
    [
        ({"t": ("x", "y")}, shape(6, 4), True),
        ({"n": ("y",)}, shape(6, 4), False),
        ({"m": ("x",)}, shape(6, 4), True),
        ({"n": ("x",)}, jax.eval_shape(lambda w: quantize(w, double=False), shape(256, 4)), True),
        ({"n": ("y",)}, jax.eval_shape(lambda w: quantize(w, double=False), shape(256, 4)), False),  # within a tile
        ({"n": ("y",)}, jax.eval_shape(lambda w: quantize(w, "nf3", 64, double=False), shape(256, 4)), True),
        ({"n": ("x", "y")}, jax.eval_shape(lambda w: quantize(w, "nf3", 64, double=False), shape(256, 4)), False),
        ({"m": ("x",)}, jax.eval_shape(quantize, shape(256, 4)), False),  # scales that depend on their place
    ],
)
def test_what_the_devices_do_not_divide_is_not_divided(axes, kernel, fitting):
    assert fits(DIMS, Divided(MESH, tuple(axes.items())), (shape(8, kernel.shape[0]), kernel)) is fitting
