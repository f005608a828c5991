"""Tables without rows that the data never use: the run is that of the whole table, bit for bit."""

import json
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from safetensors.numpy import load_file, save_file

import jaxpeft as jp
from jaxpeft import assets, cli, tree
from jaxpeft.cli.export import saved_leaves
from jaxpeft.memory import planner
from jaxpeft.train import config, metrics
from jaxpeft.unused_rows import TABLE, check_still, prune_embeddings, read, spelt, used
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


@pytest.mark.parametrize("method", [jp.prompt(2), jp.dept(2, 2, positions=8)], ids=["prompt", "dept"])
def test_words_in_front_of_the_table_find_the_same_rows(method):
    """What a method starts from is the whole table; then the rows are cut, and tokens are found behind its own type."""
    model, params = tiny.model()
    pruned = prune_embeddings(model, params, used(BATCHES))
    whole, *leaves = jp.setup(method, model, params, jax.random.key(0))
    wanted = whole.apply(jp.combine(*leaves), BATCHES[0])
    model, trainable, rest = jp.setup(method, pruned.model, params, jax.random.key(0))
    np.testing.assert_array_equal(model.apply(jp.combine(trainable, rest), BATCHES[0]), wanted)
    found = model.apply(jp.combine(pruned.cut(trainable), pruned.cut(rest)), BATCHES[0])
    np.testing.assert_array_equal(found, wanted)


def test_a_plan_has_so_many_rows():
    """The table's master and two moments, where it trains; its frozen numbers, where it does not."""
    for method, numbers in ((jp.full(), 3), (jp.lora(rank=2), 1)):
        size = lambda count, method=method: (
            tree.num_bytes(
                (
                    step := planner.make_step(tiny.CONFIG, method, 2, 8, dtype=jnp.float32, prune_embeddings=count)
                ).state.leaves
            )
            + tree.num_bytes(step.state.opt_state)
        )
        assert size(None) - size(40) == numbers * (97 - 40) * 32 * 4
    with pytest.raises(jp.InputError, match="--prune-embeddings 98: embed_tokens/embedding has 97 rows"):
        planner.make_step(tiny.CONFIG, jp.lora(), 2, 8, prune_embeddings=98)


@pytest.fixture(scope="module")
def untied(tmp_path_factory):
    """The embedded model with a head of its own, which starts as the table."""
    folder = tmp_path_factory.mktemp("untied")
    for file in assets.MODEL.iterdir():
        shutil.copy(file, folder)
    config = json.loads((folder / "config.json").read_text()) | {"tie_word_embeddings": False}
    (folder / "config.json").write_text(json.dumps(config))
    tensors = load_file(folder / "model.safetensors")
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].copy()
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


RUN = {"method": "full", "method_options": ("which=^embed_tokens",), "clip": None, "steps": 2, "seq_len": 32}
RUN |= {"data": str(assets.VALIDATION), "batch_size": 2, "samples": 1, "schedule": "constant", "warmup": 0}


@pytest.fixture(scope="module")
def runs(untied, tmp_path_factory):
    """The folders of a run with the whole table and of one with the rows that the data name."""
    folder = tmp_path_factory.mktemp("runs")
    for name in ("whole", "pruned"):
        jp.run(**RUN, model=untied, out=folder / name, prune_embeddings=name == "pruned")
    return folder


def logged(folder):
    """(rows of metrics.jsonl without the gradients' norms, these)."""
    rows = metrics.read(folder / "metrics.jsonl")
    return rows, [row.pop("grad_norm") for row in rows if "grad_norm" in row]


def test_a_run_leaves_what_that_of_the_whole_table_does(runs, tmp_path):
    """Losses, answers and the model, bit for bit; its checkpoint has the rows alone, and is exported with all.

    The norm of the gradients adds fewer zeros, in another order.
    """
    (rows, norms), (wanted, others) = (logged(runs / name) for name in ("pruned", "whole"))
    assert rows == wanted
    assert norms == pytest.approx(others, rel=1e-6)
    samples = [config.read_report(runs / name)["sample"] for name in ("pruned", "whole")]
    assert samples[0] == samples[1]
    name = "model/model.safetensors"
    assert (runs / "pruned" / name).read_bytes() == (runs / "whole" / name).read_bytes()
    ids = read(config.read(runs / "pruned")["rows"])
    assert 0 < len(ids) < 4096
    saved = saved_leaves(runs / "pruned/checkpoints", 2)
    assert saved[TABLE].shape == (len(ids), 256)
    assert cli.main(["export", "--run", f"{runs}/pruned", "--out", f"{tmp_path}/model"]) == 0
    written = (tmp_path / "model/model.safetensors").read_bytes()
    assert written == (runs / "whole/model/model.safetensors").read_bytes()


@pytest.mark.slow
def test_a_run_goes_on_bit_for_bit(runs, untied, tmp_path):
    """To more steps, with the rows of its beginning; other data, or the whole table, are refused."""
    how = {**RUN, "model": untied, "out": tmp_path / "run"}
    jp.run(**{**how, "steps": 1}, prune_embeddings=True)
    other = tmp_path / "other.jsonl"
    other.write_text(assets.VALIDATION.read_text().partition("\n")[2])
    with pytest.raises(jp.InputError, match="--data .* \\(other content\\)"):
        jp.run(**{**how, "data": str(other)}, prune_embeddings=True, resume=True)
    with pytest.raises(jp.InputError, match="--prune-embeddings True -> False"):
        jp.run(**how, resume=True)
    jp.run(**how, prune_embeddings=True, resume=True)
    for name in ("metrics.jsonl", "model/model.safetensors"):
        assert (tmp_path / "run" / name).read_bytes() == (runs / "pruned" / name).read_bytes(), name


def test_rows_that_a_step_would_move_or_tell_by():
    for method, direction, decay, said in (
        (jp.mezo(), "sgd", 0, "mezo moves embed_tokens/embedding itself"),
        (jp.full(), "adam", 0.1, "weight decay 0.1 shrinks rows of embed_tokens/embedding"),
        (jp.full(), "adafactor", 0, "adafactor tells by several rows"),
        (jp.full(), "adam8bit", 0, "adam8bit tells by several rows"),
    ):
        with pytest.raises(jp.InputError, match=said):
            check_still(method, direction, decay)
    check_still(jp.full(), "lion", 0)
    check_still(jp.lora(), "adafactor", 0.1)  # the table stays as it is
    assert read(spelt(np.array([0, 3, 4, 5, 9]))).tolist() == [0, 3, 4, 5, 9]
    with pytest.raises(jp.InputError, match='rows "3-x": should be numbers'):
        read("3-x")


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
