"""What every method promises, held against each file of jaxpeft/methods."""

import functools
import json
from typing import NamedTuple

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import jaxpeft as jp
from jaxpeft import method as contract
from jaxpeft import tree
from jaxpeft.about import About
from jaxpeft.backward.plan import parse
from jaxpeft.backward.residuals import planned
from jaxpeft.model import scan_layers
from jaxpeft.peft.base import is_written
from jaxpeft.train.optimizer import defaults, make_direction
from jaxpeft.train.step import objective_of
from tests import residuals, tiny

# What is for encoders that classify alone is held to the same in its own test.
METHODS = [name for name in contract.names() if not contract.about(name).promises.classifies]
# What takes a compiler longest is asked of one method of each level, and of the others by `make test-slow`.
OF_LEVEL = sorted({contract.about(name).level: name for name in (*METHODS, "pfeiffer", "lora")}.values())
OTHERS = [name for name in METHODS if name not in OF_LEVEL]
LAYERS = tiny.CONFIG["num_hidden_layers"]
KEY = jax.random.key(0)
BATCH = tiny.batch()


def made(name):
    """The method of a file's example, with the company that its file names."""
    about = contract.about(name)

    def member(other):
        file = contract.module(other)
        return getattr(file, other)(**file.ABOUT.example)

    return jp.chain(*map(member, about.within.split("+"))) if about.within else member(name)


class Case(NamedTuple):
    about: About
    method: jp.Method
    model: jp.Model
    trainable: dict
    rest: dict
    optimizer: optax.GradientTransformation

    @property
    def promises(self):
        return self.about.promises

    def base(self, dtype=jnp.float32, **changes):
        """(Model, params) of the small model that the method is tried on."""
        return tiny.model(dtype, **self.promises.config, **changes)

    def state(self):
        return jp.init_state(self.method, self.optimizer, self.trainable, self.rest, jax.random.key(1), self.model)

    def step(self, **options):
        return jp.make_train_step(self.model, self.method, self.optimizer, rate=self.promises.lr, **options)

    @property
    def arguments(self):
        """Of all members, one after the other; what a file's functions do not know they ignore."""
        found = {}
        for spec in self.method.specs:
            found.update(spec.config)
        return {**found, **self.about.example}


@pytest.fixture(scope="module", params=METHODS)
def case(request):
    """A method at the start of training, with the optimizer that a run would give it."""
    method = made(request.param)
    optimizer = make_direction(defaults(method.specs).direction)
    about = contract.about(request.param)
    return Case(about, method, *jp.setup(method, *tiny.model(**about.promises.config), KEY), optimizer)


@pytest.fixture(scope="module")
def trained(case):
    """(first state, last state, losses) of a few steps, which are traced once."""
    chex.clear_trace_counter()
    state = first = case.state()
    step = jax.jit(chex.assert_max_traces(case.step(), n=1))
    losses = []
    for _ in range(case.promises.steps):
        state, metrics = step(state, BATCH)
        losses.append(float(metrics["loss"]))
        assert float(metrics["lr"]) == np.float32(case.promises.lr)
    chex.assert_trees_all_equal_shapes_and_dtypes(state, first)
    return first, state, losses


def sites_of(*leaves):
    """(inputs, outputs) of every linear map of every layer."""
    shapes = [leaf.shape for part in leaves for path, leaf in part.items() if path.endswith("/kernel")]
    return [shape[-2:] for shape in shapes for _ in range(shape[0] if len(shape) == 3 else 0)]


def test_made_again_from_its_spec(case):
    """The spec, as JSON has it, is enough to make a method that trains the same leaves from the same values."""
    text = json.dumps([[spec.name, spec.config] for spec in case.method.specs])
    again = contract.from_specs(tuple(jp.Spec(name, config) for name, config in json.loads(text)))
    _, trainable, rest = jp.setup(again, *case.base(), KEY)
    chex.assert_trees_all_equal((trainable, rest), (case.trainable, case.rest))


def test_models_are_static_arguments(case):
    """Of compiled functions, as in decoding: they have a hash, and are what they were."""
    assert hash(case.model) == hash(case.model._replace())
    assert case.model == case.model._replace()


def test_starts_at_the_base(case):
    if not case.promises.starts_at_base:
        pytest.skip("not promised")
    base, params = case.base()
    adapted = case.model.apply(jp.combine(case.trainable, case.rest), BATCH)
    np.testing.assert_allclose(adapted, base.apply(params, BATCH), rtol=1e-5, atol=1e-5)


def test_every_leaf_has_one_role(case):
    roles = {path: case.method.role(path) for path in (*case.trainable, *case.rest)}
    assert any(role.name != "frozen" for role in roles.values())
    assert case.trainable.keys() == {path for path, role in roles.items() if role.name == "trained"}
    for path, leaf in case.trainable.items():
        assert leaf.dtype == (roles[path].dtype or leaf.dtype), path
    state = case.state()
    assert state.moved.keys() == {path for path, role in roles.items() if role.name == "moved"}
    assert not state.moved.keys() & state.frozen.keys()
    chex.assert_trees_all_equal_shapes_and_dtypes(state.moved, {path: case.rest[path] for path in state.moved})


def test_trains_and_leaves_frozen_leaves_alone(case, trained):
    first, last, losses = trained
    assert losses[-1] < losses[0] - case.promises.falls
    still = [path for path, leaf in first.trainable.items() if not np.any(last.trainable[path] != leaf)]
    assert set(still) <= set(case.promises.returns(first.trainable) if case.promises.returns else ())
    chex.assert_trees_all_equal(last.frozen, first.frozen)


def test_state_is_what_is_promised(case):
    """Numbers of the optimizer's state; Adam's are two for each that trains."""
    state = case.state()
    view = contract.view_of(case.model, case.method, state.leaves)
    promised = case.promises.state(view, **case.arguments) if case.promises.state else 2 * tree.size(state.trainable)
    counters = sum(leaf.ndim == 0 and leaf.dtype == np.int32 for leaf in jax.tree.leaves(state.opt_state))
    assert tree.size(state.opt_state) - counters == promised


def test_merged_equals_adapted(case, trained):
    _, state, _ = trained
    if not case.promises.merges:
        with pytest.raises(jp.InputError, match="has no merged form"):
            case.method.merge(state.params)
        return
    base, original = case.base()
    merged = case.method.merge(state.params)
    chex.assert_trees_all_equal_shapes_and_dtypes(merged, original)
    tolerance = case.promises.tolerance
    adapted = case.model.apply(state.params, BATCH)
    np.testing.assert_allclose(base.apply(merged, BATCH), adapted, rtol=tolerance, atol=tolerance)


def test_peft_round_trip(case, trained, tmp_path):
    """Exported and read again: the same method and the same bits; written again: the same file."""
    _, state, _ = trained
    method, model = case.method, case.model
    _, original = case.base()
    base = tree.flatten(original)
    trains_base = any(tree.canonical(path) in base for path in (*state.trainable, *state.moved))
    assert trains_base == (case.about.stored == "base")
    if trains_base:
        with pytest.raises(jp.InputError, match="is no adapter; merge it|has no place in an adapter"):
            jp.export_adapter(tmp_path / "adapter", state.params, method, model.config)
        return
    jp.export_adapter(tmp_path / "adapter", state.params, method, model.config)
    again, leaves = jp.import_adapter(tmp_path / "adapter", model.config, original)
    assert again.specs == method.specs
    own = {path: leaf for path, leaf in state.leaves.items() if is_written(path, method, model.config)}
    chex.assert_trees_all_equal(leaves, own)
    jp.export_adapter(tmp_path / "again", tree.unflatten({**base, **leaves}), again, model.config)
    name = "adapter_model.safetensors"
    assert (tmp_path / "again" / name).read_bytes() == (tmp_path / "adapter" / name).read_bytes()


def rematerialised(stack):
    def wrap(function):
        def block(layer, x, ctx, cache, segment):
            return jax.checkpoint(lambda layer, x, ctx: function(layer, x, ctx, cache, segment))(layer, x, ctx)

        return block

    return stack.map_layers(wrap)


def objective(case, model):
    """What a step of the method minimises, on another form of its model."""
    return objective_of(model, case.method, {**case.rest, **case.trainable})


@pytest.mark.parametrize("case", OF_LEVEL, indirect=True)
def test_any_run_gives_the_same_gradients(case, trained):
    """Scanned, in groups of 16 tokens under a memory plan, with layers computed again."""
    assert_any_run_gives_the_same_gradients(case, trained)


@pytest.mark.slow
@pytest.mark.parametrize("case", OTHERS, indirect=True)
def test_any_run_of_all_others(case, trained):
    """The same, in two minutes."""
    assert_any_run_gives_the_same_gradients(case, trained)


def assert_any_run_gives_the_same_gradients(case, trained):
    _, state, _ = trained
    if case.model.stack.run is not scan_layers:
        pytest.skip("runs the layers in its own way, which its own test compares with plain autodiff")

    def gradients(model):
        of = lambda trainable: objective(case, model).value_and_grad(
            trainable, {**state.frozen, **state.moved}, BATCH, KEY, state.opt_state
        )
        return jax.jit(of)(state.trainable)

    (loss, _), scanned = gradients(case.model)
    stack = case.model.stack
    for other in (rematerialised(stack), stack._replace(run=planned(parse("matmuls,tokens=16")))):
        (same, _), found = gradients(case.model._replace(stack=other))
        np.testing.assert_allclose(same, loss, rtol=1e-5)
        for path, gradient in found.items():
            scale = np.abs(scanned[path]).max()
            np.testing.assert_allclose(gradient, scanned[path], rtol=1e-4, atol=2e-5 * scale, err_msg=path)


def backbone(layers=LAYERS):
    """A model whose embeddings alone train: all that a frozen backbone must keep."""
    return jp.setup(jp.full("embeddings"), *tiny.model(num_hidden_layers=layers), KEY)


def at_depth(case, layers):
    """(model, trainable, rest) of the method on a model of so many layers."""
    return jp.setup(contract.from_specs(case.method.specs), *case.base(num_hidden_layers=layers), KEY)


def stated(case):
    """Bytes per token that the members' files say they keep beyond the backbone."""
    sites, total = sites_of(case.rest, case.trainable), 0
    for spec in case.method.specs:
        promises = contract.about(spec.name).promises
        if promises.block_bytes:
            total += LAYERS * promises.block_bytes(case.model.config, itemsize=4, **spec.config)
        if promises.site_bytes:
            total += sum(promises.site_bytes(inputs=n, outputs=m, itemsize=4, **spec.config) for n, m in sites)
    return total


def temporaries(method, model, trainable, rest, rows):
    """Compiled bytes of the step's temporaries beside its gradients: value and gradient, through the method's slots."""
    batch = tiny.batch(rows, 64)
    objective = objective_of(model, method, {**rest, **trainable})
    state = jp.init_state(method, make_direction(), trainable, rest, KEY, model)

    def function(trainable, rest, opt_state, batch):
        return objective.value_and_grad(trainable, rest, batch, KEY, opt_state)

    lowered = jax.jit(function).lower(trainable, rest, state.opt_state, batch)
    return lowered.compile().memory_analysis().temp_size_in_bytes


def compiled_slope(method, made, many=32, few=8):
    """The same, per token of `many` rows beyond `few`: what does not grow with the tokens is left out."""
    return (temporaries(method, *made, many) - temporaries(method, *made, few)) / (many - few) / 64


@functools.cache
def slope_of_backbone(layers):
    """What a frozen backbone's temporaries grow by."""
    return compiled_slope(jp.full("embeddings"), backbone(layers))


def test_keeps_for_the_backward_pass_what_it_states(case):
    """Counted on the vjp of the loss with respect to what trains; nothing where there is no backward pass."""
    rows_of = functools.partial(tiny.batch, length=64)
    if not objective(case, case.model).backward:
        assert not case.promises.backward
        return
    if case.promises.layer_bytes:
        few, many = (residuals.bytes_per_token(*at_depth(case, n), rows_of) for n in (LAYERS, 3 * LAYERS))
        kept = (many - few) / (2 * LAYERS)
        assert kept <= case.promises.layer_bytes(case.model.config, itemsize=4, **case.arguments)
        return
    kept = residuals.bytes_per_token(case.model, case.trainable, case.rest, rows_of)
    floor = residuals.bytes_per_token(*backbone(), rows_of)
    per_row = case.promises.row_bytes
    extra = per_row(case.model.config, itemsize=4, **case.arguments) / 64 if per_row else 0
    assert kept - floor <= stated(case) + extra


def test_no_product_reads_a_bfloat16_stream_in_float32(case):
    """Forward and backward: of a stream of bfloat16 no matrix product reads as many float32 numbers as it has."""
    model, trainable, rest = jp.setup(case.method, *case.base(jnp.bfloat16), KEY)
    batch = tiny.batch(rows=3, length=100)
    value = lambda trainable: jnp.sum(model.hidden(jp.combine(trainable, rest), batch), dtype=jnp.float32)
    stream = 3 * 100 * tiny.CONFIG["hidden_size"]
    assert stream > max(leaf.size for leaf in jax.tree.leaves((trainable, rest)))
    read = [x for pair in residuals.operands(jax.make_jaxpr(jax.grad(value))(trainable).jaxpr) for x in pair]
    assert {str(x.dtype) for x in read if x.size >= stream} == {"bfloat16"}


@pytest.mark.parametrize("case", OF_LEVEL, indirect=True)
def test_compiled_temporaries_within_what_it_states(case):
    """One layer's worth beside the stack is in work; without a backward pass none is kept."""
    assert_temporaries_within_what_it_states(case)


@pytest.mark.slow
@pytest.mark.parametrize("case", OTHERS, indirect=True)
def test_compiled_temporaries_of_all_others(case):
    """The same, in three minutes."""
    assert_temporaries_within_what_it_states(case)


def assert_temporaries_within_what_it_states(case):
    method = case.method
    if not case.promises.backward:
        few, many = (temporaries(method, *at_depth(case, n), 16) for n in (LAYERS, 3 * LAYERS))
        assert many - few <= tree.num_bytes(at_depth(case, LAYERS)[1]) * 2 + 4096  # directions of the trained leaves
        return
    if case.promises.layer_bytes:
        # Of 32 rows and more: a group of rows, whose workspace does not grow, is 2048 tokens at most.
        few, many = (compiled_slope(method, at_depth(case, n), many=64, few=32) for n in (LAYERS, 3 * LAYERS))
        slope = (many - few) / (2 * LAYERS)
        assert slope <= 1.01 * case.promises.layer_bytes(case.model.config, itemsize=4, **case.arguments)
        return
    if per_row := case.promises.row_bytes:
        # What one layer needs to work on is that of longer rows; all layers keep what is stated.
        beyond = [compiled_slope(method, at_depth(case, n)) - slope_of_backbone(n) for n in (LAYERS, 2 * LAYERS)]
        rows = per_row(case.model.config, itemsize=4, **case.arguments) / 64
        assert beyond[1] - beyond[0] <= stated(case) + rows
        return
    extra = compiled_slope(method, case[2:5]) - slope_of_backbone(LAYERS)
    assert extra <= stated(case) * (LAYERS + 1) / LAYERS
