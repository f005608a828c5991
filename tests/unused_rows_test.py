"""Tables without rows that the data never use: the run is that of the whole table, bit for bit."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import jaxpeft as jp
from jaxpeft import tree
from jaxpeft.unused_rows import TABLE, prune_embeddings, used
from tests import tiny

BATCHES = [tiny.batch(rows=2, length=8, seed=seed, vocab=40) for seed in range(3)]


def steps(model, params, method):
    """(losses, the state at the end) of a step on each batch."""
    model, trainable, rest = jp.setup(method, model, params, jax.random.key(0))
    adam = optax.scale_by_adam()
    state = jp.init_state(method, adam, trainable, rest, jax.random.key(1), model)
    step = jax.jit(jp.make_train_step(model, method, adam, rate=1e-2))
    losses = []
    for batch in BATCHES:
        state, metrics = step(state, batch)
        losses.append(np.asarray(metrics["loss"]))
    return losses, state


@pytest.mark.parametrize(
    "method",
    [pytest.param(jp.full(), id="full"), pytest.param(jp.lora(rank=2), id="lora", marks=pytest.mark.slow)],
)
def test_losses_and_leaves_are_those_of_the_whole_table(method):
    model, params = tiny.model()
    pruned = prune_embeddings(model, params, used(BATCHES))
    losses, state = steps(model, params, method)
    own_losses, own = steps(pruned.model, pruned.params, method)
    np.testing.assert_array_equal(own_losses, losses)
    whole = tree.flatten(pruned.whole(own.params))
    assert whole.keys() == state.leaves.keys()
    for path, leaf in state.leaves.items():
        np.testing.assert_array_equal(np.asarray(whole[path]), np.asarray(leaf), err_msg=path)
    if "full" in method.name:
        moved = np.any(whole[TABLE] != np.asarray(params["embed_tokens"]["embedding"]), axis=1)
        assert moved.any()
        assert set(np.flatnonzero(moved)) <= set(np.unique([batch["tokens"] for batch in BATCHES]))


def test_the_state_has_so_many_rows_less():
    model, params = tiny.model()
    ids = used(BATCHES)
    pruned = prune_embeddings(model, params, ids)
    size = lambda state: sum(x.nbytes for x in jax.tree.leaves((state.leaves, state.opt_state)))

    def state(model, params):
        method, adam = jp.full(), optax.scale_by_adam()
        model, trainable, rest = jp.setup(method, model, params, jax.random.key(0))
        return jp.init_state(method, adam, trainable, rest, jnp.zeros((2,), jnp.uint32), model)

    less = size(state(model, params)) - size(state(pruned.model, pruned.params))
    assert less == 3 * (97 - len(ids)) * 32 * 4  # the master and two moments


def test_a_bfloat16_table_comes_back_in_the_masters_type():
    model, params = tiny.model(jnp.bfloat16)
    params = jax.tree.map(lambda x: x.astype(jnp.bfloat16), params)
    pruned = prune_embeddings(model, params, [5, 3, 3])
    np.testing.assert_array_equal(pruned.ids, [3, 5])
    table = params["embed_tokens"]["embedding"].astype(jnp.float32)
    leaves = {**tree.flatten(pruned.params), TABLE: np.zeros((2, 32), np.float32)}
    whole = tree.flatten(pruned.whole(leaves))[TABLE]
    np.testing.assert_array_equal(whole, np.asarray(table.at[np.array([3, 5])].set(0)))


def test_a_token_without_a_row_is_never_read_as_another():
    model, params = tiny.model()
    pruned = prune_embeddings(model, params, [0, 1, 2, 3])
    batch = {name: x[:1, :4] for name, x in BATCHES[0].items()} | {"tokens": np.array([[0, 3, 50, 1]], np.int32)}
    x, _ = pruned.model.stack.embed(pruned.params, batch, None)
    expected, _ = model.stack.embed(params, batch, None)
    assert np.isnan(x[0, 2]).all()
    np.testing.assert_array_equal(np.asarray(x[0, [0, 1, 3]]), np.asarray(expected[0, [0, 1, 3]]))


def test_refusals():
    model, params = tiny.model(tie_word_embeddings=True)
    with pytest.raises(jp.InputError, match=r"head reads all rows of embed_tokens/embedding \(tied"):
        prune_embeddings(model, params, [1])
    model, params = tiny.model()
    with pytest.raises(jp.InputError, match="id 97: the table has rows 0 to 96"):
        prune_embeddings(model, params, [1, 97])
    with pytest.raises(jp.InputError, match="give a list of whole numbers"):
        prune_embeddings(model, params, [])
    adapted, trainable, rest = jp.setup(jp.lora(rank=2), model, params, jax.random.key(0))
    with pytest.raises(jp.InputError, match="prune before setup"):
        prune_embeddings(adapted, tree.combine(trainable, rest), [1])
    with pytest.raises(jp.InputError, match=r"no embed_tokens/embedding"):
        prune_embeddings(model, {"layers": params["layers"]}, [1])
    with pytest.raises(jp.InputError, match=r"has shape \(97, 32\); the pruned one has \(2, 32\)"):
        prune_embeddings(model, params, [1, 2]).whole(params)
