"""Freezing by optax.masked over a whole tree is structural freezing, to the bit, and what it costs compiled."""

import functools

import jax
import numpy as np
import optax
import pytest

import jaxpeft as jp
from jaxpeft import tree
from jaxpeft.errors import InputError
from jaxpeft.method import about, make, names, view_of
from tests import tiny
from tests.methods_test import OF_LEVEL

STEPS = 10
OPTIMIZER = optax.chain(optax.clip_by_global_norm(1.0), optax.adam(1e-2))


def made(name):
    return jp.lora(4, lr_ratio=4.0) if name == "lora+" else jp.full("last:1") if name == "last" else make(name, {})


@functools.cache
def start(name):
    base, params = tiny.model(**(about(name).promises.config if name in names() else {}))
    return jp.setup(made(name), base, params, jax.random.key(0), lambda: [tiny.batch()])


def structural(name, steps):
    method, (model, trainable, rest) = made(name), start(name)
    state = jp.init_state(method, OPTIMIZER, trainable, rest, jax.random.key(1), model)
    step = jax.jit(jp.make_train_step(model, method, OPTIMIZER))
    for i in range(steps):
        state, _ = step(state, tiny.batch(seed=i))
    return state


def whole(name, logged=False):
    """(step, params, opt_state) of a loop that differentiates everything; a step returns a logged norm or zero."""
    method, (model, trainable, rest) = made(name), start(name)
    tx = jp.masked(method, OPTIMIZER)
    params = jp.combine(trainable, rest)

    def step(params, opt_state, batch, i=0):
        key = jax.random.fold_in(jax.random.key(1), i)  # as make_train_step has it
        loss = lambda params: jp.completion_loss(model, params, batch, key)[0]
        grads = jax.grad(loss, allow_int=True)(params)
        updates, opt_state = tx.update(grads, opt_state, params)
        return optax.apply_updates(params, updates), opt_state, optax.global_norm(grads) if logged else 0.0

    return step, params, tx.init(params)


def same(found, wanted):
    return all(np.array_equal(found[path], leaf) for path, leaf in wanted.items())


def check_with_shared_gradients(name):
    """Gradients of both differ at most by rounding, which Adam makes large where they are nearly zero.

    With the gradients of one program for both, ten steps are equal to the bit.
    """
    method, (model, trainable, rest) = made(name), start(name)
    loss = lambda params, key: jp.completion_loss(model, params, tiny.batch(), key)[0]
    keys = [jax.random.fold_in(jax.random.key(1), i) for i in range(STEPS)]
    gradients = jax.jit(jax.grad(loss, allow_int=True))
    of_trained = jax.jit(jax.grad(lambda trained, key: loss(jp.combine(trained, rest), key)))
    one, two = of_trained(trainable, keys[0]), tree.flatten(gradients(jp.combine(trainable, rest), keys[0]))
    largest = max(float(np.abs(leaf).max()) for leaf in one.values())
    for path, leaf in one.items():
        np.testing.assert_allclose(two[path], leaf, rtol=1e-4, atol=1e-6 * largest, err_msg=path)

    tx, own = jp.masked(method, OPTIMIZER), method.update(OPTIMIZER, view_of(model, method, {**trainable, **rest}))
    params, state, own_state = jp.combine(trainable, rest), None, own.init(trainable)
    state = tx.init(params)
    for key in keys:
        grads = gradients(params, key)
        updates, state = tx.update(grads, state, params)
        params = optax.apply_updates(params, updates)
        flat = tree.flatten(grads)
        directions, own_state = own.update({path: flat[path] for path in trainable}, own_state, trainable)
        trainable = optax.apply_updates(trainable, directions)
    assert same(tree.flatten(params), {**rest, **trainable})


# Of each level one method; the others, which take three minutes, are slow tests.
OTHERS = [pytest.param(name, marks=pytest.mark.slow) for name in names() if name not in ("lora", *OF_LEVEL)]


@pytest.mark.parametrize("name", ["lora", "lora+", "last", *OF_LEVEL, *OTHERS])
def test_ten_steps_are_those_of_structural_freezing(name):
    try:
        step, params, opt_state = whole(name)
    except InputError as error:
        assert "\n" not in str(error) and name in str(error)
        pytest.skip(str(error))
    step = jax.jit(step)
    for i in range(STEPS):
        params, opt_state, _ = step(params, opt_state, tiny.batch(seed=i), i)
    wanted = structural(name, STEPS)
    found = tree.flatten(params)
    assert found.keys() == wanted.leaves.keys() and wanted.trainable
    if not same(found, wanted.leaves):  # only where XLA rounds the gradients otherwise
        check_with_shared_gradients(name)
    moved = [path for path in wanted.trainable if not np.array_equal(found[path], start(name)[1][path])]
    assert moved
    assert sorted(x.shape for x in jax.tree.leaves(opt_state)) == sorted(
        x.shape for x in jax.tree.leaves(wanted.opt_state)
    )


def test_a_mask_is_like_the_parameters():
    _, trainable, rest = start("lora")
    params = jp.combine(trainable, rest)
    mask = jp.trainable_mask(made("lora"), params)
    assert jax.tree.structure(mask) == jax.tree.structure(params)
    assert {path for path, trains in tree.flatten(mask).items() if trains} == trainable.keys()


def compiled(function, *args):
    return jax.jit(function, donate_argnums=(0, 1)).lower(*args).compile().memory_analysis()


@pytest.mark.slow
def test_bytes_and_the_trap():
    """Frozen gradients are not made until something reads them: one logged norm brings them all back."""
    batch = tiny.batch()
    _, trainable, rest = start("lora")
    # The backward scan ends with the gradients of all layers at once, each of them as large as its leaf.
    layers = tree.num_bytes({path: x for path, x in rest.items() if tree.stacked(path)})
    kernel = min(x.nbytes for path, x in rest.items() if path.endswith("/kernel"))
    state = jp.init_state(made("lora"), OPTIMIZER, trainable, rest, jax.random.key(1))
    step, params, opt_state = whole("lora")
    assert tree.num_bytes(opt_state) == tree.num_bytes(state.opt_state)
    quiet = compiled(step, params, opt_state, batch)
    own = jax.jit(jp.make_train_step(start("lora")[0], made("lora"), OPTIMIZER), donate_argnums=0)
    structural = own.lower(state, batch).compile().memory_analysis()
    assert quiet.temp_size_in_bytes - structural.temp_size_in_bytes < kernel
    loud = compiled(whole("lora", logged=True)[0], params, opt_state, batch)
    flops = [count(whole("lora", logged=logged)[0], params, opt_state, batch) for logged in (False, True)]
    assert flops[0] < flops[1]
    assert loud.temp_size_in_bytes - quiet.temp_size_in_bytes >= layers


def count(function, *args):
    return jax.jit(function).lower(*args).compile().cost_analysis()["flops"]


@pytest.mark.parametrize(("name", "slots"), [("mezo", "gradient and move"), ("lisa", "move"), ("galore", "gradient")])
def test_methods_whose_step_is_more_are_refused(name, slots):
    with pytest.raises(InputError, match=f"^{name}: an optax transform cannot do its own {slots}"):
        jp.masked(make(name, {}), OPTIMIZER)


def test_other_refusals():
    base, params = tiny.model()
    with pytest.raises(InputError, match=r"^lora: none of \d+ leaves trains; give all of the adapted model's"):
        jp.masked(jp.lora(2), OPTIMIZER).init(params)
    quantized = jp.chain(jp.quantize("int8"), jp.lora(2))
    _, trainable, rest = jp.setup(quantized, base, params, jax.random.key(0))
    with pytest.raises(InputError, match=r"^quantize\+lora: layers/\S+ is packed and cannot be differentiated"):
        jp.masked(quantized, OPTIMIZER).init(jp.combine(trainable, rest))
    tx = jp.masked(jp.full(), OPTIMIZER)
    with pytest.raises(ValueError, match="needs the parameters"):
        tx.update(params, tx.init(params))
