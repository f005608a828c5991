"""Updates inside the backward pass: equal to the ordinary step, a layer's gradient at a time, and what is refused."""

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import jaxpeft as jp
from jaxpeft.backward.residuals import remat
from jaxpeft.errors import InputError
from jaxpeft.memory import planner, targets
from jaxpeft.models import geometries
from jaxpeft.train.memory import gradient_bytes
from jaxpeft.train.optimizer import make_direction
from jaxpeft.train.step import in_place
from tests import runs, tiny

KEY = jax.random.key(0)
WIDE = {"hidden_size": 64, "intermediate_size": 64}  # layers of 4096 numbers have codes


def made(method, kind="adam", save="blocks", in_backward=True, optimizer=None, accumulate=1, loss=None, **changes):
    base, params = tiny.model(**changes)
    model, trainable, frozen = jp.setup(method, base, params, KEY)
    model = remat(model, save)
    optimizer = optimizer or make_direction(kind, clip=None)
    state = jp.init_state(method, optimizer, trainable, frozen, jax.random.key(1), model)
    options = {"rate": lambda count: 1e-2 / (1 + count), "weight_decay": 0.1, "accumulate": accumulate}
    options |= {} if loss is None else {"loss": loss}
    return state, jp.make_train_step(model, method, optimizer, update_in_backward=in_backward, **options)


def after(steps, state, step):
    """(the last state, metrics of each step)."""
    step, found = jax.jit(step), []
    for seed in range(steps):
        state, metrics = step(state, tiny.batch(seed=seed))
        found.append(metrics)
    return state, found


@pytest.mark.parametrize(
    "method, kind, save, changes",
    [
        (jp.full(), "adam", "matmuls,tokens=32", {"tie_word_embeddings": True}),
        pytest.param(jp.full(), "adam8bit", "blocks", WIDE, marks=pytest.mark.slow),
        pytest.param(jp.full(), "adafactor", "blocks", {}, marks=pytest.mark.slow),
        pytest.param(jp.full("last:1"), "lion", "blocks", {}, marks=pytest.mark.slow),
        pytest.param(jp.lora(2, lr_ratio=4.0), "adam", "matmuls,tokens=32", {}, marks=pytest.mark.slow),
        pytest.param(jp.galore(rank=4, every=2), "adam", "blocks", {}, marks=pytest.mark.slow),
    ],
    ids=["full", "codes", "adafactor", "last_layer", "lora_plus", "galore"],
)
def test_is_the_ordinary_step(method, kind, save, changes):
    """Losses, norms and leaves after steps with decay and a falling rate: the sums differ by rounding alone.

    A step of Adam moves an element by about the rate, 1e-2, and by any share of it where its gradient is a sum that
    rounds to nearly nothing: 1e-5 is a thousandth of a step. Of a moment between two codes rounding chooses one; they
    differ by up to 2% of the largest, and so does the step.
    """
    (one, m1), (two, m2) = (after(2, *made(method, kind, save, in_backward=own, **changes)) for own in (False, True))
    chex.assert_trees_all_equal_shapes_and_dtypes(one, two)
    for expected, found in zip(m1, m2, strict=True):
        assert expected.keys() == found.keys()
        for name, value in expected.items():
            np.testing.assert_allclose(found[name], value, rtol=1e-5, err_msg=name)
    for path, leaf in one.leaves.items():
        atol = 2e-4 if kind == "adam8bit" else 1e-5
        np.testing.assert_allclose(two.leaves[path], leaf, rtol=1e-5, atol=atol, err_msg=path)


@pytest.mark.slow
def test_sums_of_plain_gradients_are_the_same_bits():
    """SGD from equal gradients: nothing is added in another order."""
    ends = [after(2, *made(jp.full(), "sgd", in_backward=own))[0] for own in (False, True)]
    chex.assert_trees_all_equal(*(end.trainable for end in ends))


def test_gradients_of_all_layers_never_exist():
    """Of the compiled step's temporaries the ordinary one has the gradients of all layers more."""
    wide = {"num_hidden_layers": 24, "hidden_size": 64, "intermediate_size": 128}
    temporaries = {}
    for own in (False, True):
        state, step = made(jp.full("layers"), in_backward=own, **wide)
        compiled = jax.jit(in_place(step), donate_argnums=0).lower(*state.parted, tiny.batch()).compile()
        temporaries[own] = compiled.memory_analysis().temp_size_in_bytes
    every, one = gradient_bytes(state.trainable), gradient_bytes(state.trainable, update_in_backward=True)
    assert one * 24 == every
    assert temporaries[False] - temporaries[True] > 0.9 * (every - one)


@pytest.mark.slow
@pytest.mark.parametrize("target", ["h200", "v5e"])
def test_what_is_planned_has_one_layers_gradients(target):
    """Llama-3.2-1B in full: temporaries shrink by the gradients of 15 of 16 layers, which are most of them."""
    rows = {}
    for own in (False, True):
        step = planner.make_step(geometries.load("llama3.2-1b"), jp.full(), 1, 2048, "blocks", update_in_backward=own)
        rows[own] = planner.row(step, targets.target(target))
    spared = rows[False]["bytes"]["gradients"] - rows[True]["bytes"]["gradients"]
    assert spared > 3.3 * 2**30
    assert rows[False]["bytes"]["total"] - rows[True]["bytes"]["total"] > spared
    assert rows[True]["update_in_backward"] and not rows[False]["update_in_backward"]


@pytest.mark.slow
def test_a_run_continues_bit_for_bit(tmp_path):
    fields = {"method": "full", "optimizer": "adam8bit", "update_in_backward": True, "clip": None, "steps": 4}
    fields |= {"batch_size": 2, "seq_len": 32, "samples": 0, "eval_every": 0, "schedule": "constant"}
    fields |= {"save": "blocks", "dtype": "float32"}
    whole = runs.assert_continues(tmp_path, **fields)
    assert whole["memory_bytes"]["gradients"] < 0.6 * whole["memory_bytes"]["weights"]
    with pytest.raises(InputError, match="--update-in-backward True -> False"):
        jp.run(**{**fields, "update_in_backward": False}, out=tmp_path / "parts", resume=True)


def doubled(model, params, batch, key=None):
    """A loss that runs the layers twice, the second time on other tokens."""
    loss, aux = jp.completion_loss(model, params, batch, key)
    again, _ = jp.completion_loss(model, params, {**batch, "tokens": batch["targets"]}, key)
    return loss + again, aux


def reading(model, params, batch, key=None):
    """A loss that holds layers' parameters small itself."""
    loss, aux = jp.completion_loss(model, params, batch, key)
    return loss + jnp.sum(params["layers"]["mlp"]["down_proj"]["kernel"] ** 2), aux


@pytest.mark.parametrize(
    "method, options, says",
    [
        (jp.full(), {"accumulate": 2}, "--accumulate 2: with --update-in-backward .* --save blocks,tokens=2048"),
        (jp.full(), {"save": "everything"}, "--update-in-backward: needs our own loops over the layers"),
        (jp.full(), {"optimizer": make_direction("adam")}, "reads the gradient of .* to update layers/"),
        (jp.full(), {"optimizer": optax.chain(optax.clip_by_global_norm(1.0), optax.adam(1e-3))}, "reads the gradient"),
        (jp.full(), {"loss": doubled}, "the loss runs the layers on something else"),
        (jp.full(), {"loss": reading}, "the loss reads 'layers' itself"),
        (jp.full("embeddings"), {}, "full trains nothing in the layers; leave it out"),
        (jp.mezo(), {"kind": "sgd"}, "mezo makes a step's gradients in a way of its own"),
        (jp.galore(rank=4, projection="svd"), {}, "galore makes a step's gradients in a way of its own"),
        (jp.natural_galore(rank=4), {}, "natural_galore changes the optimizer in a way that needs all layers"),
        (jp.lisa(), {}, "lisa .*leave it out"),
        (jp.prompt(4), {}, "--update-in-backward: layers are read before the first of them runs"),
    ],
)
def test_refusals(method, options, says):
    state, step = made(method, **options)
    with pytest.raises(InputError, match=says) as error:
        jax.eval_shape(step, state, tiny.batch())
    assert "\n" not in str(error.value)


def test_a_run_refuses_before_anything_is_written(tmp_path):
    run = functools.partial(jp.run, out=tmp_path / "out", update_in_backward=True, save="blocks", samples=0)
    for fields, says in [
        ({"method": "full"}, r"--clip 1.0: with --update-in-backward .* give --clip None"),
        ({"method": "full", "clip": None, "accumulate": 2}, "--accumulate 2: with --update-in-backward"),
        ({"method": "full", "clip": None, "remat": "policy"}, "needs our own loops over the layers: --remat loops"),
    ]:
        with pytest.raises(InputError, match=says):
            run(**fields)
    assert not (tmp_path / "out").exists() or not any((tmp_path / "out").glob("*.json"))
