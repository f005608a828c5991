"""What every method promises, held against each file of jaxpeft/methods."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import jaxpeft as jp
from jaxpeft import method as contract
from jaxpeft import tree
from jaxpeft.methods import lora
from jaxpeft.model import scan_layers
from jaxpeft.train.loss import completion_loss
from tests import residuals, tiny

# What is for encoders that classify alone is held to the same in its own test.
METHODS = [name for name in contract.names() if not getattr(contract.module(name), "CLASSIFIES", False)]
LAYERS = tiny.CONFIG["num_hidden_layers"]
KEY = jax.random.key(0)
BATCH = tiny.batch()


@pytest.fixture(scope="module", params=METHODS)
def case(request):
    """(file, method, model, trainable, frozen) at the start of training."""
    file = contract.module(request.param)
    method = getattr(file, request.param)(**file.EXAMPLE)
    if not getattr(file, "ALONE", True):  # it trains nothing
        method = jp.chain(method, jp.lora(**lora.EXAMPLE))
    base, params = tiny.model()
    return file, method, *jp.setup(method, base, params, jax.random.key(0))


@pytest.fixture(scope="module")
def trained(case):
    """(state, losses) after a few steps."""
    _, method, model, trainable, frozen = case
    optimizer = optax.adam(1e-2)
    state = jp.init_state(method, optimizer, trainable, frozen, jax.random.key(1))
    step = jax.jit(jp.make_train_step(model, method, optimizer))
    losses = []
    for _ in range(6):
        state, metrics = step(state, BATCH)
        losses.append(float(metrics["loss"]))
    return state, losses


def sites_of(frozen, trainable):
    """(inputs, outputs) of every linear map of every layer."""
    shapes = [leaf.shape for path, leaf in {**frozen, **trainable}.items() if path.endswith("/kernel")]
    return [shape[-2:] for shape in shapes for _ in range(shape[0] if len(shape) == 3 else 0)]


def test_says_what_it_is(case):
    file = case[0]
    for field in ("SUMMARY", "KIND", "SAVES", "REFERENCE"):
        assert isinstance(getattr(file, field), str) and getattr(file, field).strip(), field
    assert file.__doc__ and len(file.__doc__.splitlines()) > 5


def test_made_again_from_its_spec(case):
    """The spec is enough to make a method that trains the same leaves from the same values."""
    _, method, _, trainable, _ = case
    base, params = tiny.model()
    _, again, _ = jp.setup(contract.from_specs(method.specs), base, params, jax.random.key(0))
    assert again.keys() == trainable.keys()
    for path, leaf in trainable.items():
        np.testing.assert_array_equal(again[path], leaf)


def test_starts_at_the_base(case):
    file, _, model, trainable, frozen = case
    if not file.STARTS_AT_BASE:
        pytest.skip("not promised")
    base, params = tiny.model()
    np.testing.assert_allclose(
        model.apply(jp.combine(trainable, frozen), BATCH), base.apply(params, BATCH), rtol=1e-5, atol=1e-5
    )


def test_partition_is_whole_and_masters_are_float32(case):
    _, method, _, trainable, frozen = case
    assert trainable and not trainable.keys() & frozen.keys()
    assert all(method.trainable(path) for path in trainable)
    assert not any(method.trainable(path) for path in frozen)
    assert all(leaf.dtype == jnp.float32 for leaf in trainable.values())


def test_trains_and_leaves_frozen_leaves_alone(case, trained):
    _, _, _, trainable, frozen = case
    state, losses = trained
    assert losses[-1] < losses[0] - 0.01
    assert all(np.any(np.asarray(state.trainable[path]) != np.asarray(leaf)) for path, leaf in trainable.items())
    assert state.frozen.keys() == frozen.keys()
    for path, leaf in frozen.items():
        for ours, theirs in zip(jax.tree.leaves(state.frozen[path]), jax.tree.leaves(leaf), strict=True):
            assert np.asarray(ours).tobytes() == np.asarray(theirs).tobytes(), path


def test_optimizer_state_covers_the_trainable_leaves_only(case, trained):
    state, _ = trained
    moments = tree.size(optax.tree_utils.tree_get(state.opt_state, "mu"))
    assert moments == tree.size(case[3])


def test_merged_equals_adapted(case, trained):
    file, method, model, _, _ = case
    state, _ = trained
    if not getattr(file, "MERGES", True):
        with pytest.raises(jp.InputError, match="has no merged form"):
            method.merge(state.params)
        return
    params = jp.combine(state.trainable, state.frozen)
    base, original = tiny.model()
    merged = method.merge(params)
    assert tree.flatten(merged).keys() == tree.flatten(original).keys()
    np.testing.assert_allclose(base.apply(merged, BATCH), model.apply(params, BATCH), rtol=1e-4, atol=1e-4)


def test_peft_round_trip(case, trained, tmp_path):
    """Exported and read again: the same method and the same bits; written again: the same file."""
    _, method, model, trainable, _ = case
    state, _ = trained
    _, original = tiny.model()
    base = tree.flatten(original)
    if any(tree.canonical(path) in base for path in trainable):
        with pytest.raises(jp.InputError, match="is no adapter; merge it"):
            jp.export_adapter(tmp_path / "adapter", state.params, method, model.config)
        return
    jp.export_adapter(tmp_path / "adapter", state.params, method, model.config)
    again, leaves = jp.import_adapter(tmp_path / "adapter", model.config, original)
    assert again.specs == method.specs
    own = {path: leaf for path, leaf in tree.flatten(state.params).items() if tree.canonical(path) not in base}
    assert leaves.keys() == own.keys()
    for path, leaf in own.items():
        assert np.asarray(leaves[path]).tobytes() == np.asarray(leaf).tobytes(), path
    jp.export_adapter(tmp_path / "again", tree.unflatten({**tree.flatten(original), **leaves}), again, model.config)
    name = "adapter_model.safetensors"
    assert (tmp_path / "again" / name).read_bytes() == (tmp_path / "adapter" / name).read_bytes()


def unrolled(stack, params, batch, key=None, cache=None):
    """`run` without `lax.scan`."""
    x, ctx = stack.embed(params, batch, key)
    for segment, first, end in tree.segments(params):
        for i in range(first, end):
            layer = jax.tree.map(lambda leaf, i=i, first=first: leaf[i - first], params[segment])
            x, _ = stack.block(layer, x, {**ctx, "layer": i}, None, segment)
    return x, cache


def rematerialised(stack):
    def wrap(function):
        def block(layer, x, ctx, cache, segment):
            return jax.checkpoint(lambda layer, x, ctx: function(layer, x, ctx, cache, segment))(layer, x, ctx)

        return block

    return stack.map_layers(wrap)


def test_scan_unrolled_and_remat_give_the_same_gradients(case, trained):
    _, _, model, _, _ = case
    state, _ = trained
    if model.stack.run is not scan_layers:
        pytest.skip("runs the layers in its own way, which its own test compares with plain autodiff")

    def gradients(stack):
        changed = model._replace(stack=stack)

        def loss(trainable):
            return completion_loss(changed, tree.combine(trainable, state.frozen), BATCH)[0]

        return jax.jit(jax.grad(loss))(state.trainable)

    scanned = gradients(model.stack)
    for stack in (model.stack._replace(run=unrolled), rematerialised(model.stack)):
        for path, gradient in gradients(stack).items():
            scale = np.abs(scanned[path]).max()
            np.testing.assert_allclose(gradient, scanned[path], rtol=1e-4, atol=1e-5 * scale, err_msg=path)


def backbone():
    """A model whose embeddings alone train: all that a frozen backbone must keep."""
    base, params = tiny.model()
    return jp.setup(jp.full("embeddings"), base, params, jax.random.key(0))


def stated(case):
    """Bytes per token that the method's file says it keeps beyond the backbone."""
    file, _, _, trainable, frozen = case
    files = [file] if getattr(file, "ALONE", True) else [file, lora]
    sites = sites_of(frozen, trainable)
    return sum(f.saved_bytes(inputs=n, outputs=m, itemsize=4, **f.EXAMPLE) for f in files for n, m in sites)


def by_layer(case, measure):
    """What a quantity grows by with one more layer: (model, trainable, frozen) -> number, at two depths."""
    file, method, _, _, _ = case
    found = []
    for layers in (LAYERS, 3 * LAYERS):
        base, params = tiny.model(num_hidden_layers=layers)
        found.append(measure(*jp.setup(getattr(file, method.specs[0].name)(**file.EXAMPLE), base, params, KEY)))
    return (found[1] - found[0]) / (2 * LAYERS)


def temporaries(model, trainable, frozen, rows):
    """Compiled bytes of the gradient's temporaries."""
    batch = tiny.batch(rows, 64)

    def function(trainable, frozen, batch):
        return jax.grad(lambda t: completion_loss(model, tree.combine(t, frozen), batch)[0])(trainable)

    return jax.jit(function).lower(trainable, frozen, batch).compile().memory_analysis().temp_size_in_bytes


def compiled_slope(model, trainable, frozen, many=32, few=8):
    """The same, per token of `many` rows beyond `few`: what does not grow with the tokens is left out."""
    return (
        (temporaries(model, trainable, frozen, many) - temporaries(model, trainable, frozen, few)) / (many - few) / 64
    )


def test_keeps_for_the_backward_pass_what_it_states(case):
    file, _, model, trainable, frozen = case
    if hasattr(file, "layer_bytes"):
        kept = by_layer(case, lambda *made: residuals.bytes_per_token(*made, functools.partial(tiny.batch, length=64)))
        assert kept <= file.layer_bytes(model.config, itemsize=4, **file.EXAMPLE)
        return
    kept = residuals.bytes_per_token(model, trainable, frozen, tiny.batch)
    floor = residuals.bytes_per_token(*backbone(), tiny.batch)
    assert kept - floor <= stated(case)


def test_compiled_temporaries_within_what_it_states(case):
    """One layer's worth beside the stack is in work."""
    file, _, model, trainable, frozen = case
    if hasattr(file, "layer_bytes"):
        # Of 32 rows and more: a group of rows, whose workspace does not grow, is 2048 tokens at most.
        slope = by_layer(case, functools.partial(compiled_slope, many=64, few=32))
        assert slope <= 1.01 * file.layer_bytes(model.config, itemsize=4, **file.EXAMPLE)
        return
    extra = compiled_slope(model, trainable, frozen) - compiled_slope(*backbone())
    assert extra <= stated(case) * (LAYERS + 1) / LAYERS
