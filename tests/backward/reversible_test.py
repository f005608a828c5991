"""Reversible layers: rebuilt streams are the stored ones bit for bit, gradients those of plain autodiff."""

import functools
import re
from fractions import Fraction

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.ad_checkpoint import checkpoint_name

from jaxpeft import tree
from jaxpeft.backward import reversible
from jaxpeft.backward.flops import count_flops
from jaxpeft.backward.reversible import Coupling
from jaxpeft.backward.segments import recorded
from jaxpeft.backward.streams import Fixed, Float, pack, unpack
from jaxpeft.errors import InputError
from jaxpeft.memory import aot, targets
from jaxpeft.model import Context

B, S, D = 4, 40, 32
EIGHTH, ONE = Fraction(1, 8), Fraction(1)


def f(layer, x, ctx):
    """A product, a norm, a nonlinearity, a product, and a residual connection."""
    h = checkpoint_name(x @ layer["w"].astype(x.dtype), "up")
    size = jnp.mean(jnp.square(h.astype(jnp.float32)), -1, keepdims=True)
    h = jax.nn.gelu((h * jax.lax.rsqrt(size + 1e-5)).astype(x.dtype))
    h = h + ctx.shared["shift"] if "shift" in ctx.shared else h
    return x / 2 + h @ layer["v"].astype(x.dtype)


def g(layer, x, ctx):
    return jnp.tanh(checkpoint_name(x @ layer["u"].astype(x.dtype), "up")) / 4


def start(layers, dtype=jnp.float32, scale=1.0):
    keys = jax.random.split(jax.random.key(layers), 4)
    kernels = scale * jax.random.normal(keys[0], (3, layers, D, D)) / D**0.5
    params = dict(zip("wvu", kernels, strict=True))
    return params, jax.random.normal(keys[3], (B, S, D)).astype(dtype)


FIXED, FINE = Fixed(), Fixed(22)  # the finer one's steps are those of float32 near 4


def coupling(lam=EIGHTH, beta=ONE, swap=True, streams=FIXED, **changes):
    return Coupling(f, g, lam, beta, swap, streams)._replace(**changes)


def gradients(of, params, x, ctx=None, tokens=80):
    layers = range(len(jax.tree.leaves(params)[0]))

    def loss(params, x):
        y1, y2 = reversible.run(of, "layers", layers, params, (x, x), Context(ctx or {}), tokens=tokens)
        return jnp.mean(jnp.sin(y1) + y2 * y2)

    return jax.jit(jax.value_and_grad(loss, argnums=(0, 1)))(params, x)


def errors(of, params, x):
    """(layers, 3): what the probe tells of each layer's rebuilt inputs."""
    layers = len(jax.tree.leaves(params)[0])

    def loss(probe):
        rest = (params, (x, x), Context())
        y1, y2 = reversible.run(of._replace(probe=True), "layers", range(layers), *rest, probe=probe)
        return jnp.mean(jnp.sin(y1) + y2 * y2)

    return np.asarray(jax.jit(jax.grad(loss))(jnp.zeros((layers, 3))))


def plain(of, params, x):
    """The two-stream graph, by autodiff."""

    def body(pair, layer):
        x1, x2 = pair
        y1 = float(of.lam) * x1 + f(layer, x2, Context())
        y2 = float(of.beta) * x2 + g(layer, y1, Context())
        return (y2, y1) if of.swap else (y1, y2), None

    def loss(params, x):
        y1, y2 = jax.lax.scan(body, (x, x), params)[0]
        return jnp.mean(jnp.sin(y1) + y2 * y2)

    return jax.jit(jax.value_and_grad(loss, argnums=(0, 1)))(params, x)


def same_bits(found, wanted):
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(wanted), strict=True):
        assert np.asarray(a).tobytes() == np.asarray(b).tobytes()


def close(found, wanted, tolerance):
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(wanted), strict=True):
        assert np.linalg.norm(a - b) <= tolerance * np.linalg.norm(b)


words = st.integers(-(2**31), 2**31 - 1)


@settings(max_examples=60, deadline=None)
@given(st.lists(words, min_size=1, max_size=70), st.integers(0, 20), st.integers(0, 12))
def test_division_is_the_inverse_of_multiplication(values, n, k):
    """For every int32, overflow included, and any length of a row."""
    factor = Fraction(2 * n + 1, 2**k)
    s = jnp.asarray(values, jnp.int32)[:, None]
    product, lost = Fixed().multiply(s, factor)
    np.testing.assert_array_equal(Fixed().divide(product, factor, lost), s)
    if factor.numerator == 1:
        np.testing.assert_array_equal(product, s >> (factor.denominator.bit_length() - 1))


@pytest.mark.parametrize("bits", [1, 3, 8, 16])
@pytest.mark.parametrize("length", [1, 32, 45])
def test_packed_bits(bits, length):
    values = jax.random.randint(jax.random.key(0), (2, length, 3), 0, 2**bits)
    words = pack(values, bits)
    assert words.shape == (2, bits * -(-length // 32), 3) and words.dtype == jnp.uint32
    np.testing.assert_array_equal(unpack(words, bits, length), values)


@pytest.mark.parametrize("swap", [True, False])
@pytest.mark.parametrize("streams", [FIXED, Float()])
def test_gradients_are_those_of_the_two_stream_graph(swap, streams):
    """lam = beta = 1, float32, 6 layers."""
    params, x = start(6, scale=0.5)
    of = coupling(ONE, ONE, swap, streams)
    (value, found), (expected, wanted) = gradients(of, params, x), plain(of, params, x)
    assert value == pytest.approx(float(expected), rel=1e-4)
    close(found, wanted, 1e-4)


@pytest.mark.parametrize("lam, beta, swap", [(EIGHTH, ONE, True), (ONE, EIGHTH, True), (EIGHTH, EIGHTH, False)])
def test_gradients_with_small_factors(lam, beta, swap):
    """Exact streams follow autodiff where floating point ones are lost."""
    params, x = start(12, scale=0.5)
    of = coupling(lam, beta, swap, FINE)
    wanted = plain(of, params, x)[1]
    close(gradients(of, params, x)[1], wanted, 1e-4)
    lost = gradients(of._replace(streams=Float()), params, x)[1][0]["w"][0]
    assert not np.linalg.norm(lost - wanted[0]["w"][0]) < 0.1 * np.linalg.norm(wanted[0]["w"][0])


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize("layers", [24, pytest.param(48, marks=pytest.mark.slow)])
@pytest.mark.parametrize("lam, beta, swap", [(EIGHTH, ONE, True), (Fraction(3, 8), Fraction(1, 256), False)])
def test_rebuilt_streams_are_the_stored_ones(lam, beta, swap, layers, dtype):
    """In one program, and in two: with `every=1` the backward pass reads stored streams, and gradients are the same."""
    params, x = start(layers, dtype)
    of = coupling(lam, beta, swap)
    same_bits(gradients(of, params, x), gradients(of._replace(every=1), params, x))
    different, _, size = errors(of, params, x).T
    assert not different.any() and (size > 0).all()


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_evaluating_once_or_twice_is_the_same(dtype):
    params, x = start(8, dtype)
    close(gradients(coupling(), params, x), gradients(coupling(twice=True), params, x), 1e-5)


def test_the_probe_sees_floating_point_fail():
    """Relative errors of the rebuilt inputs, last layer first: about eightfold with each layer."""
    params, x = start(10, scale=0.5)
    found = errors(coupling(streams=Float()), params, x)
    relative = np.sqrt(found[:, 1] / found[:, 2])[::-1]
    assert relative[0] < 1e-6 and (relative[1:7] > 2 * relative[:6]).all() and relative[6] > 1e3 * relative[0]
    assert (found[:, 0] > 0).all()


def test_kept_pairs_bound_the_error_of_floating_point():
    """Every second pair kept: the error is that of one division, whatever the depth."""
    params, x = start(24, scale=0.5)
    of = coupling(streams=Float())
    wanted = plain(of, params, x)[1]
    close(gradients(of._replace(every=2), params, x)[1], wanted, 1e-4)


@pytest.mark.parametrize("place", [(0, 0, 0), (3, 7, 5)])
@pytest.mark.parametrize("value", [np.nan, np.inf, -4e4])
def test_what_fixed_point_cannot_hold_becomes_nan(value, place):
    """In the input, or in what a layer adds: the range of 16 fractional bits ends at 2^15."""
    params, x = start(4)
    assert np.isfinite(gradients(coupling(), params, x)[0])
    assert np.isnan(gradients(coupling(), params, x.at[place].set(value))[0])
    params["v"] = params["v"].at[2].set(value)
    assert np.isnan(gradients(coupling(), params, x)[0])


def test_a_sum_that_leaves_the_range_is_told():
    near = jnp.full((1, 2), 2**31 - 10, jnp.int32)
    assert not Fixed().add(near, jnp.array([[0.0, 1.0]]))[1] and Fixed().add(near, jnp.array([[0.0, -1.0]]))[1]
    assert not Fixed().add(-near, jnp.array([[0.0, -1.0]]))[1]


def test_groups_of_rows_are_one_computation():
    params, x = start(5)
    of = coupling(streams=FINE)
    close(gradients(of, params, x, tokens=40), gradients(of, params, x, tokens=1000), 1e-4)


def test_what_is_shared_is_differentiated():
    params, x = start(5, scale=0.5)
    of = coupling(ONE, ONE)

    def loss(shift):
        y1, y2 = reversible.run(of, "layers", range(5), params, (x, x), Context(shared={"shift": shift}))
        return jnp.mean(y1 * y2)

    direction, shift, step = jax.random.normal(jax.random.key(1), (D,)), jnp.zeros((D,)), 1e-2
    slope = (loss(shift + step * direction) - loss(shift - step * direction)) / (2 * step)
    assert jnp.vdot(jax.grad(loss)(shift), direction) == pytest.approx(float(slope), rel=2e-2)


@pytest.mark.parametrize("lam, bits", [(EIGHTH, 3), (Fraction(1, 256), 8), (Fraction(3, 8), 3), (ONE, 0)])
def test_keeps_a_pair_and_the_bits_of_each_division(lam, bits):
    """By hand: two int32 per element of the stream, and k bits per element and layer; no layer's activations."""
    params, x = start(7)
    x = x[:, :32]
    with recorded() as found:
        jax.eval_shape(lambda p: gradients(coupling(lam), p, x), params)
    elements = x.size
    expected = {"stream": 2 * 4 * elements, "remainder": 7 * bits * elements // 8, "pair": 0}
    assert found["layers"].kept_bytes() == {"device": expected, "host": {}}
    run = lambda p: reversible.run(coupling(lam), "layers", range(7), p, (x, x), Context())
    pull = jax.eval_shape(lambda p: jax.vjp(run, p)[1], params)
    kept = tree.num_bytes(pull) - tree.num_bytes(params)
    assert kept == sum(expected.values()) + 1  # a flag


def test_the_backward_pass_computes_each_layer_again_once():
    params, x = start(3)
    product = 2 * B * S * D * D
    # A layer: 3 products forward, 3 again, 2 each for the derivative; apart from it also those that it reads from.
    for twice, count in ((False, 3 + 3 + 6), (True, 3 + 3 + 2 + 6)):
        of = coupling(twice=twice)
        with recorded() as found:
            flops = count_flops(jax.make_jaxpr(functools.partial(gradients, of))(params, x))
        assert flops == 3 * count * product
        assert found["layers"].recompute_flops() == 3 * (count - 9) * product


@pytest.mark.parametrize("lam", ["0", "-1/8", "1/10", "2"])
def test_factors_that_exact_streams_cannot_be_divided_by(lam):
    with pytest.raises(InputError, match="^meft: lam .* must be "):
        reversible.check("meft", coupling(Fraction(lam)))
    if Fraction(lam) > 0:
        reversible.check("meft", coupling(Fraction(lam), streams=Float()))


def computations(text):
    """{name: instructions} of a compiled program, without names, memory spaces and the compiler's notes."""
    found, name = {}, None
    for line in text.splitlines():
        if start := re.match(r"^(?:ENTRY )?(%[\w.\-]+) .*\{\s*$", line):
            name = start[1]
            found[name] = []
        elif line.startswith("}"):
            name = None
        elif name:
            found[name].append(line.strip())
    return found


def anonymous(programs, name):
    """A computation and all that it calls, with its values numbered."""
    numbers, lines = {}, []
    for line in programs[name]:
        called = re.findall(r"(?:calls|to_apply|body|condition)=(%[\w.\-]+)", line)
        line = re.sub(r", (metadata=\{[^}]*\}|backend_config=.*)|/\*index=\d+\*/|S\(\d\)", "", line)
        line = re.sub(r"(calls|to_apply|body|condition)=%[\w.\-]+", r"\1", line)
        line = re.sub(r"%[\w.\-]+", lambda found: numbers.setdefault(found[0], f"%{len(numbers)}"), line)
        lines += [line, *(anonymous(programs, inner) for inner in called)]
    return "\n".join(lines)


BRANCHES = re.compile(r"branch_computations=\{([^}]*)\}|true_computation=(%[\w.\-]+), false_computation=(%[\w.\-]+)")


@pytest.mark.usefixtures("optimised")
@pytest.mark.parametrize(
    ("target", "twice"), [("h200", False), ("h200", True), pytest.param("v5p", True, marks=pytest.mark.slow)]
)
def test_both_loops_call_the_same_programs(target, twice):
    """F and G as they are compiled: the forward loop's branches and the backward one's, instruction by instruction."""
    wide = functools.partial(jax.ShapeDtypeStruct, dtype=jnp.bfloat16)
    params = {name: jax.ShapeDtypeStruct((3, 512, 512), jnp.float32) for name in "wvu"}
    function = functools.partial(gradients, coupling(twice=twice), tokens=2048)
    compiled = aot.compile(targets.target(target), function, params, wide((16, 256, 512)))
    programs = computations(compiled.executable.as_text())
    found = []
    for line in (line for lines in programs.values() for line in lines if " conditional(" in line):
        either, *both = BRANCHES.search(line).groups()
        names = either.split(", ") if either else both
        found.append(sorted(anonymous(programs, name) for name in names))
    first, second, third, fourth = sorted(found)
    assert first == second and third == fourth and first != third
