"""The learning rate step by step, what weight decay leaves alone, and the optimizers that a run may choose."""

import dataclasses
import typing

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import jaxpeft as jp
from jaxpeft import sharding, tree
from jaxpeft.cli.arguments import StepArguments
from jaxpeft.methods import lisa
from jaxpeft.train import config
from jaxpeft.train.optimizer import Direction, decays, defaults, direction_of, make_direction, make_schedule
from jaxpeft.train.run import Run
from jaxpeft.train.state import TrainState

KINDS = typing.get_args(Direction)


@pytest.mark.parametrize(
    ("kind", "expected"),
    [
        ("constant", [1 / 3, 2 / 3, 1, 1, 1, 1]),
        ("linear", [1 / 3, 2 / 3, 1, 0.75, 0.5, 0.25]),
        ("cosine", [1 / 3, 2 / 3, 1, (1 + 0.5**0.5) / 2, 0.5, (1 - 0.5**0.5) / 2]),
    ],
)
def test_schedule(kind, expected):
    schedule = make_schedule(kind, lr=1.0, steps=6, warmup=2)
    np.testing.assert_allclose([float(schedule(step)) for step in range(6)], expected, rtol=1e-6)


@pytest.mark.parametrize("warmup", [0, 6, 9])
def test_every_step_moves(warmup):
    schedule = make_schedule("linear", lr=1.0, steps=6, warmup=warmup)
    assert all(0 < float(schedule(step)) <= 1 for step in range(6))


def test_weight_decay_spares_vectors_of_each_layer():
    shapes = {
        "layers/mlp/up_proj/kernel": (2, 3, 4),
        "layers/mlp/up_proj/lora/a": (2, 3, 1),
        "layers/mlp/up_proj/bias": (2, 4),
        "layers_1_2/input_layernorm/scale": (1, 3),
        "lm_head/kernel": (3, 5),
        "norm/scale": (3,),
        "lisa/layers/norm/scale": (2, 3),
        "lisa/layers/mlp/up_proj/kernel": (2, 3, 4),
    }
    leaves = {path: jnp.ones(shape) for path, shape in shapes.items()}
    assert [path for path in leaves if decays(path, leaves[path])] == [
        "layers/mlp/up_proj/kernel",
        "layers/mlp/up_proj/lora/a",
        "lm_head/kernel",
        "lisa/layers/mlp/up_proj/kernel",
    ]


def test_clip_holds_the_global_norm():
    leaves = {"a": jnp.array([3.0]), "b": jnp.array([4.0])}
    states = []
    for clip in (None, 1.0):
        optimizer = make_direction(clip=clip)
        _, state = optimizer.update(leaves, optimizer.init(leaves), leaves)
        states.append(optax.tree_utils.tree_get(state, "mu"))
    np.testing.assert_allclose(states[0]["a"], 0.3, rtol=1e-6)
    np.testing.assert_allclose(states[1]["a"], 0.06, rtol=1e-6)


def gradients(shapes, seed=0):
    keys = jax.random.split(jax.random.key(seed), len(shapes))
    return {path: jax.random.normal(key, shape) for key, (path, shape) in zip(keys, shapes.items(), strict=True)}


STACK, TABLE, SCALE, NUMBER = "layers/mlp/up_proj/kernel", "embed_tokens/embedding", "layers/norm/scale", "gate"
SHAPES = {STACK: (2, 130, 140), TABLE: (150, 128), SCALE: (2, 8), NUMBER: ()}


def steps(kind, count=3):
    """Directions of some steps without clipping, and the last state."""
    optimizer = make_direction(kind, clip=None)
    params = {path: jnp.zeros(shape) for path, shape in SHAPES.items()}
    state, found = optimizer.init(params), []
    update = jax.jit(optimizer.update)
    for seed in range(count):
        directions, state = update(gradients(SHAPES, seed), state, params)
        found.append(directions)
    return found, state


def one_by_one(rule, count=3):
    """The same of a NumPy rule (memory, gradient, t) -> direction for each parameter: a layer's is one of its own."""
    found, memories = [], {}
    for t in range(1, count + 1):
        directions = {}
        for path, gradient in gradients(SHAPES, t - 1).items():
            layers = (
                np.asarray(gradient, np.float64) if path.startswith("layers") else [np.asarray(gradient, np.float64)]
            )
            own = [rule(memories.setdefault((path, i), {}), layer, t) for i, layer in enumerate(layers)]
            directions[path] = np.stack(own) if path.startswith("layers") else own[0]
        found.append(directions)
    return found


def adafactor(memory, g, t):
    """Shazeer & Stern 2018, algorithms 4 and 5 without momentum, by means in place of sums, and the clipping of 6."""
    decay, square = 1 - t**-0.8, g * g + 1e-30
    mean = lambda name, new: memory.update({name: decay * memory.get(name, 0.0) + (1 - decay) * new}) or memory[name]
    if g.ndim == 2 and min(g.shape) >= 128:
        row, column = mean("row", square.mean(1)), mean("column", square.mean(0))
        v = row[:, None] * column / row.mean()
    else:
        v = mean("v", square)
    u = g / np.sqrt(v)
    return u / max(1.0, np.sqrt((u * u).mean()))


def sm3(memory, g, t):
    """Anil et al. 2019, SM3-II with a cover of rows and columns, and momentum."""
    if g.ndim < 2:
        v = memory["v"] = memory.get("v", 0.0) + g * g
    else:
        v = (
            np.minimum(memory.get("row", np.zeros(g.shape[0]))[:, None], memory.get("column", np.zeros(g.shape[1])))
            + g * g
        )
        memory["row"], memory["column"] = v.max(1), v.max(0)
    m = memory["m"] = 0.9 * memory.get("m", 0.0) + 0.1 * g / np.sqrt(v + 1e-8)
    return m


def lion(memory, g, t):
    """Chen et al. 2023, program 1."""
    m = memory.get("m", np.zeros(g.shape))
    memory["m"] = 0.99 * m + 0.01 * g
    return np.sign(0.9 * m + 0.1 * g)


@pytest.mark.parametrize("rule", [adafactor, sm3, lion])
def test_directions_are_those_of_the_papers(rule):
    """Of each layer of a stack as of a parameter of its own, and of a single number."""
    for ours, theirs in zip(steps(rule.__name__)[0], one_by_one(rule), strict=True):
        for path, direction in theirs.items():
            np.testing.assert_allclose(ours[path], direction, rtol=2e-4, atol=1e-6, err_msg=path)


@pytest.mark.parametrize(
    ("kind", "numbers"),
    [
        ("adam", 2 * 36400 + 2 * 19200),
        ("sgd", 0),
        ("lion", 36400 + 19200),
        ("adafactor", 2 * (130 + 140) + 150 + 128),
        ("sm3", 36400 + 19200 + 2 * (130 + 140) + 150 + 128),
    ],
)
def test_numbers_of_a_state(kind, numbers):
    """Of a stack of two kernels and a table; vectors, counters and places that nothing fills are a few more."""
    found = tree.size(steps(kind, 1)[1])
    assert numbers <= found <= numbers + 80


def test_all_but_the_gradient_itself_are_clipped():
    for kind in KINDS:
        optimizer, grads = make_direction(kind), {"a": jnp.full((4,), 100.0)}
        (direction,) = jax.tree.leaves(optimizer.update(grads, optimizer.init(grads), grads)[0])
        assert (direction[0] == 100) == (kind == "sgd")
    with pytest.raises(jp.InputError, match="optimizer 'adan' is not one of adam, sgd, adam8bit"):
        make_direction("adan")


def test_one_word_in_all_places():
    """A run's, a plan's and the function's are the same."""
    for arguments in (Run, StepArguments):
        (asked, nothing) = typing.get_args(typing.get_type_hints(arguments)["optimizer"])
        assert typing.get_args(asked) == KINDS and nothing is type(None)


def test_a_methods_own_optimizer_stays():
    assert direction_of(jp.lora().specs) == "adam" and direction_of(jp.lora().specs, "lion") == "lion"
    assert direction_of(jp.mezo().specs) == direction_of(jp.mezo().specs, "sgd") == "sgd"
    chained = jp.chain(jp.lora(), jp.mezo()).specs
    with pytest.raises(jp.InputError, match=r"--optimizer lion: lora\+mezo steps along the gradients themselves"):
        direction_of(chained, "lion")


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"optimizer": "sgd"}, "--optimizer sgd: needs --lr; a method's default is that of Adam"),
        ({"optimizer": "sgd", "lr": 0.1, "clip": 2.0}, "--clip 2.0: has no effect with --optimizer sgd"),
        ({"method": "mezo", "clip": 2.0}, "--clip 2.0: has no effect with mezo"),
        ({"method": "mezo", "optimizer": "adam"}, "--optimizer adam: mezo steps along the gradients themselves"),
    ],
)
def test_mistakes(fields, message):
    with pytest.raises(jp.InputError, match=message):
        Run(**fields).rated()


def test_the_default_rate_of_lion_is_a_fifth():
    assert Run(optimizer="lion").rated().lr == pytest.approx(Run().rated().lr / 5)
    assert Run(optimizer="lion", lr=0.5).rated().lr == 0.5


@pytest.mark.parametrize("kind", ["adam8bit", "adafactor", "sm3"])
def test_a_state_lies_as_its_leaves_do(kind):
    """On 2 x 2 devices: codes as the leaf, blocks and sums as the axes that they are of."""
    mesh = jax.sharding.AbstractMesh((1, 2, 2, 1), sharding.AXES, axis_types=(jax.sharding.AxisType.Auto,) * 4)
    path, factor = "layers/mlp/up_proj/kernel", "layers/mlp/up_proj/lora/a"
    params = {path: jnp.zeros((3, 256, 512)), factor: jnp.zeros((3, 256, 16))}
    opt_state = make_direction(kind).init(params)
    state = TrainState(jnp.zeros(()), params, {}, opt_state, jax.random.key(0))
    lies = sharding.of_state(mesh, state).opt_state
    leaves = zip(jax.tree.leaves(opt_state), jax.tree.leaves(lies), strict=True)
    found = {(x.shape, *where.spec) for x, where in leaves}
    expected = {
        "adam8bit": {
            ((3, 256, 512), None, "fsdp", "tensor"),
            ((3, 256, 2), None, "fsdp", "tensor"),
            ((3, 256, 16), None, "fsdp", None),
            ((3, 16, 1), None, "fsdp", None),
        },
        "adafactor": {
            ((3, 256), None, "fsdp"),
            ((3, 512), None, "tensor"),
            ((3, 256, 16), None, "fsdp", None),
            ((3,), None),
            ((3, 1), None, None),
        },
        "sm3": {
            ((3, 256, 512), None, "fsdp", "tensor"),
            ((3, 256, 16), None, "fsdp", None),
            ((3, 256), None, "fsdp"),
            ((3, 512), None, "tensor"),
            ((3, 16), None, None),
        },
    }[kind]
    assert {one for one in found if one[0]} == expected


@pytest.mark.parametrize("kind", ["adam8bit", "adafactor", "sm3", "lion"])
def test_layers_drawn_anew_start_with_a_fresh_state(kind):
    """LISA's own: after a draw the masters' state is that of the beginning, and the others' goes on."""
    shapes = {"lisa/layers/mlp/up_proj/kernel": (1, 64, 64), "embed_tokens/embedding": (64, 64)}
    params = {path: jnp.zeros(shape) for path, shape in shapes.items()}
    optimizer = lisa.lisa(count=1, every=2).update(make_direction(kind), None)
    fresh = state = optimizer.init(params)
    update = jax.jit(optimizer.update)
    differs = lambda a, b: any(np.any(x != y) for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True))
    for seed in (1, 2):
        directions, state = update(gradients(shapes, seed), state, params)
        assert all(np.any(leaf) for leaf in directions.values())
        assert differs(state.masters, fresh.masters) == (seed == 1)
        assert differs(state.others, fresh.others)


def test_a_resumed_run_has_the_optimizer_of_its_begin(tmp_path):
    documents = [config.describe(dataclasses.replace(Run(), optimizer=kind), (), {}) for kind in (None, "lion")]
    with pytest.raises(jp.InputError, match="--optimizer None -> lion"):
        config.check_same(tmp_path, *documents)


@pytest.mark.parametrize(
    ("words", "rate"),
    [
        ("mezo", 1e-6),
        ("mezo+full", 1e-6),
        ("mezo+lora", 5e-5),
        ("mezo+prefix", 1e-2),
        ("mezo+dora", 0.25 * 2e-4),
        ("dora+mezo", 0.25 * 2e-4),
        ("hybrid+prefix", 1e-2),
        ("hybrid+lora", 2e-4),
        ("quantize+hybrid+lora", 2e-4),
    ],
)
def test_an_estimates_rate_is_that_of_what_it_moves(words, rate):
    """A pair's own first, then a share of the adapter's, in any order; never that of all weights for an adapter."""
    assert defaults([jp.Spec(name, {}) for name in words.split("+")]).lr == pytest.approx(rate)
