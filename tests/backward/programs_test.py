"""A layer's named activations on its trace, in both forms that JAX has of a name: a primitive, and an object."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import ad_checkpoint
from jax.ad_checkpoint import checkpoint_name
from jax.extend.core import jaxpr_as_fun

from jaxpeft.backward.plan import INPUT, Plan
from jaxpeft.backward.programs import decide, name_of, trace

ROWS, D = 4, 8
X = jax.random.normal(jax.random.key(0), (ROWS, D))
W = jax.random.normal(jax.random.key(1), (D, D)) / D**0.5
PRODUCT = 2 * ROWS * D * D


@pytest.fixture(params=["primitive", "object"])
def form(request):
    """What names are, under a flag that is put back."""
    wanted = request.param == "object"
    before = getattr(jax.config, "jax_remat3", None)
    if before is None and wanted:
        pytest.skip("this JAX has one form of names only")
    if before is not None:
        jax.config.update("jax_remat3", wanted)
    yield request.param
    if before is not None:
        jax.config.update("jax_remat3", before)


def block(x, w):
    """Three products, the inputs of all but the first behind a nonlinearity; two activations of one name."""
    x = checkpoint_name(x, INPUT)
    h = checkpoint_name(x @ w, "up")
    h = checkpoint_name(jnp.tanh(h) @ w, "up")
    return x + checkpoint_name(jnp.tanh(h) @ w, "down")


def test_the_name_of_an_equation(form):
    """Also of each leaf of a named tree; not of a call that has a parameter `name`, nor of names inside it."""

    @jax.jit
    def call(x):
        return checkpoint_name(x, "inside")

    def function(x):
        x = checkpoint_name(jnp.sin(x), "sine")
        x, y = checkpoint_name((x, 2 * x), "pair")
        # JAX 0.12 has one for the forward rules of custom derivatives.
        y = getattr(ad_checkpoint, "checkpoint_name_fwd", checkpoint_name)(y, "forward")
        return jax.checkpoint(call)(call(x)) + y

    equations = jax.make_jaxpr(function)(X).eqns
    assert [name for eqn in equations if (name := name_of(eqn)) is not None] == ["sine", "pair", "pair", "forward"]
    assert any(eqn.primitive.name == "name" for eqn in equations) == (form == "primitive")


def test_a_plan_is_the_same_in_both_forms(form):
    """By hand: the names, what `matmuls` keeps of them, and which products are computed again without."""
    programs = trace(block, [X, W], [True, True])
    first, second, last = programs.names
    assert (first, second, last) == (("up", 0), ("up", 1), ("down", 0))
    assert [shape.shape for shape in programs.shapes] == [(ROWS, D)] * 3
    assert decide(Plan("matmuls"), programs) == {first: "save", second: "save"}
    assert decide(Plan("matmuls", (("up", "recompute"), ("down", "save"))), programs) == {}
    again = [programs.recompute_flops(given) for given in ([], [first], [second], [first, second])]
    assert again == [2 * PRODUCT, PRODUCT, PRODUCT, 0]


@pytest.mark.parametrize("count", [0, 1, 2])
def test_given_activations_take_the_place_of_their_names(form, count):
    """In a loop, compiled: the gradients of plain autodiff, in which no given name is left."""
    programs = trace(block, [X, W], [True, True])
    given = list(programs.names[:count])
    backward, used, read = programs.backward(given)
    assert used == [True, True] and read == given
    assert sum(name_of(eqn) == "up" for eqn in backward.jaxpr.eqns) == 2 - count

    @jax.jit
    def gradients(x, w, d_y):
        def step(total, _):
            _, *values = jaxpr_as_fun(programs.forward)(x, w)
            found = jaxpr_as_fun(backward)(x, w, d_y, *values[:count])
            return [a + b for a, b in zip(total, found, strict=True)], None

        return jax.lax.scan(step, [jnp.zeros_like(x), jnp.zeros_like(w)], None, length=1)[0]

    d_y = jnp.cos(X)
    for found, wanted in zip(gradients(X, W, d_y), jax.vjp(block, X, W)[1](d_y), strict=True):
        np.testing.assert_allclose(found, wanted, rtol=1e-5, atol=1e-5)
