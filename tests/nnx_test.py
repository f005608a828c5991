"""NNX modules of any kind: adapters at their linear maps, the module back with them in it, and what is beside."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
import pytest
from flax import nnx

import jaxpeft as jp
from jaxpeft import sites, tree
from jaxpeft.quant import Folded, pack
from jaxpeft.train.optimizer import decays

X = jax.random.normal(jax.random.key(0), (3, 6, 8))


class Attends(nnx.Module):
    """Attention of several heads, and a head on its flat result."""

    def __init__(self, rngs):
        self.attention = nnx.MultiHeadAttention(2, 8, qkv_features=12, decode=False, rngs=rngs)
        self.out = nnx.LinearGeneral((6, 8), 5, axis=(-2, -1), rngs=rngs)

    def __call__(self, x):
        return self.out(x + self.attention(x))


class Block(nnx.Module):
    """A layer of several kinds of axes, with dropout."""

    def __init__(self, rngs):
        self.split = nnx.LinearGeneral(8, (2, 4), rngs=rngs)
        self.join = nnx.LinearGeneral((2, 4), 8, axis=(-2, -1), use_bias=False, rngs=rngs)
        self.dropout = nnx.Dropout(0.2, rngs=rngs)

    def __call__(self, x):
        return x + self.dropout(self.join(nnx.relu(self.split(x))))


class Scanned(nnx.Module):
    """Layers stacked by `nnx.vmap`, run by `nnx.scan`, each computed again in the backward pass."""

    def __init__(self, rngs):
        self.layers = nnx.vmap(Block)(rngs.fork(split=3))
        self.head = nnx.Linear(8, 4, rngs=rngs)

    def __call__(self, x):
        layer = nnx.remat(lambda x, layer: layer(x))
        return self.head(nnx.scan(layer, in_axes=(nnx.Carry, 0), out_axes=nnx.Carry)(x, self.layers))


class Listed(nnx.Module):
    """Lists, plain and NNX's, and a dict."""

    def __init__(self, rngs):
        self.layers = nnx.List([nnx.Linear(8, 8, rngs=rngs), nnx.Linear(8, 8, use_bias=False, rngs=rngs)])
        self.plain = nnx.data([nnx.Linear(8, 8, rngs=rngs)])
        self.named = nnx.Dict(out=nnx.Linear(8, 3, rngs=rngs))

    def __call__(self, x):
        for layer in (*self.layers, *self.plain):
            x = nnx.tanh(layer(x))
        return self.named.out(x)


class Equations(nnx.Module):
    """`nnx.Einsum`, one of which is no matrix from its first axis to its last; a convolution; a table."""

    def __init__(self, rngs):
        self.heads = nnx.Einsum("btd,dnh->btnh", (8, 2, 4), (2, 4), rngs=rngs)
        self.join = nnx.Einsum("btnh,nhd->btd", (2, 4, 8), rngs=rngs)
        self.diagonal = nnx.Einsum("btd,td->btd", (6, 8), rngs=rngs)
        self.conv = nnx.Conv(8, 8, (3,), rngs=rngs)
        self.table = nnx.Embed(9, 8, rngs=rngs)

    def __call__(self, x):
        x = self.diagonal(self.join(self.heads(x)))
        return self.table.attend(x + self.conv(x))


class Ensemble(nnx.Module):
    """Members under `nnx.vmap`, each on the same input."""

    def __init__(self, rngs):
        self.members = nnx.vmap(lambda rngs: nnx.Linear(8, 5, rngs=rngs))(rngs.fork(split=3))

    def __call__(self, x):
        return nnx.vmap(lambda member, x: member(x), in_axes=(0, None))(self.members, x)


class Shared(nnx.Module):
    """One module under two names, one kernel in two modules, and one that never runs."""

    def __init__(self, rngs):
        self.first = nnx.Linear(8, 8, rngs=rngs)
        self.second = self.first
        self.third, self.tied = nnx.Linear(8, 8, rngs=rngs), nnx.Linear(8, 8, rngs=rngs)
        self.tied.kernel = self.third.kernel
        self.idle = nnx.Linear(8, 8, rngs=rngs)

    def __call__(self, x):
        return self.tied(self.third(self.second(nnx.relu(self.first(x)))))


class Normed(nnx.Module):
    """Batch statistics, dropout, and a count of the calls."""

    def __init__(self, rngs):
        self.hidden = nnx.Linear(8, 16, rngs=rngs)
        self.norm = nnx.BatchNorm(16, rngs=rngs)
        self.dropout = nnx.Dropout(0.5, rngs=rngs)
        self.calls = nnx.Cache(jnp.zeros((), jnp.int32))
        self.out = nnx.Linear(16, 3, rngs=rngs)

    def __call__(self, x):
        self.calls.set_value(self.calls[...] + 1)
        return self.out(self.dropout(self.norm(self.hidden(x))))


MODULES = {
    "attention": (Attends, {"attention/query", "attention/key", "attention/value", "attention/out", "out"}),
    "scanned": (Scanned, {"layers/split", "layers/join", "head"}),
    "listed": (Listed, {"layers/0", "layers/1", "plain/0", "named/out"}),
    "equations": (Equations, {"heads", "join"}),
    "ensemble": (Ensemble, {"members"}),
    "normed": (Normed, {"hidden", "out"}),
}

EVERY = ".*"
METHODS = (
    jp.lora(2, targets=EVERY),
    jp.lora_fa(2, targets=EVERY),
    jp.dora(2, targets=EVERY),
    jp.ia3(targets=EVERY),
    jp.paca(2, targets=EVERY),
    jp.chain(jp.ia3(targets=EVERY), jp.lora(2, targets=EVERY)),
)


def moved(trainable):
    """Other values for every leaf."""
    keys = dict(zip(trainable, jax.random.split(jax.random.key(7), len(trainable)), strict=True))
    return {path: leaf + 0.3 * jax.random.normal(keys[path], leaf.shape) for path, leaf in trainable.items()}


def adapt(method, module):
    """(model, moved trainable leaves, frozen ones, the leaves at the start)."""
    base, params = jp.from_nnx(module)
    model, trainable, frozen = jp.setup(method, base, params, jax.random.key(0))
    return model, moved(trainable), frozen, trainable


def evaluated(module, x=X):
    """What a module computes in evaluation mode."""
    module = nnx.clone(module)
    module.eval()
    return module(x)


def mean_square(model, params, batch, key):
    """A loss."""
    return jnp.mean(model.apply(params, {"x": batch["x"]}, key) ** 2), {"weight": jnp.ones(())}


@pytest.mark.parametrize(
    ("method", "name"),
    [*((METHODS[0], name) for name in MODULES), *((method, "scanned") for method in METHODS[1:])],
    ids=lambda x: x if isinstance(x, str) else x.name,
)
def test_every_linear_map_is_a_site(name, method):
    """Each adapter acts; at the start nothing has changed; merged, and by itself, the module computes the same."""
    make, expected = MODULES[name]
    module = make(nnx.Rngs(3))
    model, changed, frozen, trainable = adapt(method, module)
    apply = jax.jit(lambda params: model.apply(params, {"x": X}))
    np.testing.assert_allclose(apply(jp.combine(trainable, frozen)), evaluated(module), rtol=1e-5, atol=1e-5)
    assert {path.rsplit("/", 2)[0] for path in changed} == expected
    params = jp.combine(changed, frozen)
    found = apply(params)
    for path in changed:
        without = {**changed, path: trainable[path]}
        assert np.abs(apply(jp.combine(without, frozen)) - found).max() > 1e-6, path
    np.testing.assert_allclose(evaluated(jp.to_nnx(model, params)), found, rtol=1e-5, atol=1e-5)
    merged = jp.to_nnx(model, method.merge(params))
    assert jax.tree.structure(nnx.state(merged)) == jax.tree.structure(nnx.state(module))
    assert jax.tree.map(jnp.shape, nnx.state(merged)) == jax.tree.map(jnp.shape, nnx.state(module))
    np.testing.assert_allclose(evaluated(merged), found, rtol=2e-4, atol=2e-4)


@pytest.mark.parametrize("name", ["scanned", "listed", "normed"])
def test_a_whole_module_trains(name):
    make, _ = MODULES[name]
    method, optimizer = jp.full(), optax.adam(1e-2)
    base, params = jp.from_nnx(make(nnx.Rngs(3)))
    model, trainable, frozen = jp.setup(method, base, params, jax.random.key(0))
    assert not frozen and not any(isinstance(leaf, Folded) for leaf in trainable.values())
    state = jp.init_state(method, optimizer, trainable, frozen, jax.random.key(1))
    step = jax.jit(jp.make_train_step(model, method, optimizer, mean_square))
    losses = []
    for _ in range(8):
        state, metrics = step(state, {"x": X})
        losses.append(float(metrics["loss"]))
    assert losses[-1] < losses[0]


def test_gradients_are_those_of_the_merged_kernel():
    """Of every layer of a stack: d loss / d B = A^T dW, as autodiff has it in the user's own module."""
    method = jp.lora(2, targets=["split"])
    model, changed, frozen, _ = adapt(method, Scanned(nnx.Rngs(3)))
    value = lambda leaves: jnp.sum(jnp.sin(model.apply(jp.combine(leaves, frozen), {"x": X})))
    found = jax.jit(jax.grad(value))(changed)
    merged = jp.to_nnx(model, method.merge(jp.combine(changed, frozen)))
    merged.eval()
    whole = nnx.grad(lambda module: jnp.sum(jnp.sin(module(X))))(merged)
    kernel = whole["layers"]["split"]["kernel"].get_value().reshape(3, 8, 8)
    a, b = changed["layers/split/lora/a"], changed["layers/split/lora/b"]
    np.testing.assert_allclose(found["layers/split/lora/b"], a.mT @ kernel, rtol=1e-3, atol=1e-4)
    np.testing.assert_allclose(found["layers/split/lora/a"], kernel @ b.mT, rtol=1e-3, atol=1e-4)


def test_an_adapter_that_is_never_called_is_refused_by_name():
    """A module under two names is one site; a kernel that two modules share is none."""
    base, params = jp.from_nnx(Shared(nnx.Rngs(0)))
    assert set(sites.find(base.init(jax.random.key(0), params))) == {"first", "idle"}
    model, changed, frozen, _ = adapt(jp.lora(2), Shared(nnx.Rngs(0)))
    with pytest.raises(jp.InputError, match="lora: the model never calls idle; leave them out of targets"):
        model.apply(jp.combine(changed, frozen), {"x": X})
    method = jp.lora(2, targets=["first"])
    model, changed, frozen, _ = adapt(method, Shared(nnx.Rngs(0)))
    params = jp.combine(changed, frozen)
    merged = jp.to_nnx(model, method.merge(params))
    assert merged.first is merged.second and merged.tied.kernel is merged.third.kernel
    np.testing.assert_allclose(model.apply(params, {"x": X}), merged(X), rtol=1e-4, atol=1e-4)


class Compiled(nnx.Module):
    """A part that keeps its trace, by the module that it is given."""

    run = staticmethod(nnx.jit(lambda layer, x: layer(x)))

    def __init__(self, rngs):
        self.layer = nnx.Linear(8, 8, rngs=rngs)

    def __call__(self, x):
        return self.run(self.layer, x)


def test_a_trace_that_was_kept_is_a_call():
    for _ in range(2):
        model, changed, frozen, _ = adapt(jp.lora(2), Compiled(nnx.Rngs(0)))
        for _ in range(2):
            model.apply(jp.combine(changed, frozen), {"x": X})


def test_layers_in_a_list_are_no_stack():
    """The preset chooses those of the list; weight decay acts on their matrices; the last K are not cut."""
    base, params = jp.from_nnx(Listed(nnx.Rngs(0)))
    assert sites.find(params, "all-linear") == ["layers/0", "layers/1"]
    assert sites.find(jp.from_nnx(Scanned(nnx.Rngs(0)))[1])
    flat = tree.flatten(params)
    assert decays("layers/0/kernel", flat["layers/0/kernel"]) and not decays("layers/0/bias", flat["layers/0/bias"])
    with pytest.raises(jp.InputError, match="the model shows no stack of layers"):
        jp.setup(jp.full("last:1"), base, params, jax.random.key(0))


@pytest.mark.parametrize("name", ["scanned", "listed"])
def test_the_module_with_its_adapters_is_saved_and_trains(name, tmp_path):
    """Its parameters are ordinary ones for orbax, for the transformations and for an optimizer of NNX's."""
    model, changed, frozen, _ = adapt(METHODS[0], MODULES[name][0](nnx.Rngs(3)))
    module = jp.to_nnx(model, jp.combine(changed, frozen))
    module.eval()
    parameters = nnx.state(module, nnx.Param)
    assert {type(leaf) for _, leaf in nnx.to_flat_state(parameters)} == {nnx.Param}
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(tmp_path / "module", parameters)
    other = jp.to_nnx(model, jp.combine({path: jnp.zeros_like(leaf) for path, leaf in changed.items()}, frozen))
    other.eval()
    assert np.abs(other(X) - module(X)).max() > 1e-3
    with ocp.StandardCheckpointer() as checkpointer:
        nnx.update(other, checkpointer.restore(tmp_path / "module", nnx.state(other, nnx.Param)))
    np.testing.assert_array_equal(other(X), module(X))
    loss = lambda module: jnp.mean(module(X) ** 2)
    optimizer = nnx.Optimizer(module, optax.adam(1e-2), wrt=nnx.Param)
    before = loss(module)
    optimizer.update(module, nnx.grad(loss)(module))
    assert loss(module) < before


class Wide(nnx.Module):
    """Large kernels that are frozen, a list of them, and few rows."""

    def __init__(self, rngs):
        self.layers = nnx.vmap(lambda rngs: nnx.Linear(256, 256, rngs=rngs))(rngs.fork(split=6))

    def __call__(self, x):
        layer = lambda x, layer: nnx.tanh(layer(x))
        return nnx.scan(layer, in_axes=(nnx.Carry, 0), out_axes=nnx.Carry)(x, self.layers)


def test_a_frozen_part_costs_its_bytes_and_nothing_more():
    """Compiled: of a step's arguments frozen kernels are there once; gradients and moments are the adapters'."""
    method, optimizer = jp.lora(2), optax.adam(1e-2)
    base, params = jp.from_nnx(Wide(nnx.Rngs(0)))
    model, trainable, frozen = jp.setup(method, base, params, jax.random.key(0))
    state = jp.init_state(method, optimizer, trainable, frozen, jax.random.key(1))
    batch = {"x": jnp.ones((2, 256))}
    step = jax.jit(jp.make_train_step(model, method, optimizer, mean_square), donate_argnums=0)
    memory = step.lower(state, batch).compile().memory_analysis()
    kernels = frozen["layers/kernel"].nbytes
    assert kernels == 6 * 256 * 256 * 4
    small = 3 * tree.num_bytes(trainable) + tree.num_bytes(frozen) - kernels + tree.num_bytes(batch)
    assert kernels + small <= memory.argument_size_in_bytes < kernels + small + 1024  # and counters
    assert memory.temp_size_in_bytes < kernels / 6 + 2 * small  # a layer of them, and what is of the adapters' size
    whole, leaves, none = jp.setup(jp.full(), base, params, jax.random.key(0))
    state = jp.init_state(jp.full(), optimizer, leaves, none, jax.random.key(1))
    step = jax.jit(jp.make_train_step(whole, jp.full(), optimizer, mean_square), donate_argnums=0)
    memory = step.lower(state, batch).compile().memory_analysis()
    assert memory.argument_size_in_bytes > 3 * kernels and memory.temp_size_in_bytes >= kernels


def test_keys_seed_dropout_and_none_is_evaluation():
    """Of the module's streams and of the adapters; the module that was given does not change."""
    module = Normed(nnx.Rngs(0))
    before = jax.tree.map(lambda x: x, nnx.to_pure_dict(nnx.state(module, nnx.Not(nnx.RngState))))
    for method in (jp.full(), jp.lora(2, dropout=0.5, targets=["hidden"])):
        model, changed, frozen, _ = adapt(method, module)
        run = lambda key: model.apply(jp.combine(changed, frozen), {"x": X}, key)  # noqa: B023
        np.testing.assert_array_equal(run(jax.random.key(1)), run(jax.random.key(1)))
        assert np.abs(run(jax.random.key(1)) - run(jax.random.key(2))).max() > 1e-2
        np.testing.assert_array_equal(run(None), run(None))
    after = nnx.to_pure_dict(nnx.state(module, nnx.Not(nnx.RngState)))
    jax.tree.map(np.testing.assert_array_equal, after, before)


def test_adapters_of_a_stack_drop_each_their_own():
    """The adapter's dropout alone is on: with a key the result is another one, and gradients are finite."""
    module = Scanned(nnx.Rngs(0))
    module.eval()
    model, changed, frozen, _ = adapt(jp.lora(2, dropout=0.5, targets=["split", "join"]), module)
    run = jax.jit(lambda leaves, key: model.apply(jp.combine(leaves, frozen), {"x": X}, key))
    assert np.abs(run(changed, jax.random.key(1)) - run(changed, jax.random.key(2))).max() > 1e-3
    grads = jax.grad(lambda leaves: jnp.sum(run(leaves, jax.random.key(1)) ** 2))(changed)
    assert all(np.isfinite(leaf).all() and np.any(leaf) for leaf in grads.values())


def test_state_is_carried_from_step_to_step():
    """As three calls of the module in training mode have it; without `carry` it stays, and is read."""
    module = Normed(nnx.Rngs(0))
    base, params = jp.from_nnx(module)
    for _ in range(3):
        module(X)
    optimizer = optax.sgd(0.0)
    found = {}
    for name, method in {"carried": jp.chain(jp.lora(2), jp.carry(base)), "read": jp.lora(2)}.items():
        model, trainable, frozen = jp.setup(method, base, params, jax.random.key(0))
        state = jp.init_state(method, optimizer, trainable, frozen, jax.random.key(1))
        step = jax.jit(jp.make_train_step(model, method, optimizer, mean_square))
        for _ in range(3):
            state, _ = step(state, {"x": X})
        found[name] = jp.to_nnx(model, state.params), state
    back, state = found["carried"]
    assert set(state.moved) == {"norm/mean", "norm/var", "calls"} and not found["read"][1].moved
    np.testing.assert_allclose(back.norm.mean[...], module.norm.mean[...], rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(back.norm.var[...], module.norm.var[...], rtol=1e-5, atol=1e-6)
    assert int(back.calls[...]) == 3 and back.calls[...].dtype == jnp.int32
    assert not np.any(found["read"][0].norm.mean[...])
    np.testing.assert_allclose(model.apply(state.params, {"x": X}), evaluated(back), rtol=1e-5, atol=1e-5)


def test_carried_state_with_accumulation_is_the_mean():
    base, params = jp.from_nnx(Normed(nnx.Rngs(0)))
    method, optimizer = jp.chain(jp.lora(2), jp.carry(base)), optax.sgd(0.0)
    batch = {"x": jnp.concatenate([X, X + 1])[jnp.array([0, 3, 1, 4, 2, 5])]}  # parts: every second row
    model, trainable, frozen = jp.setup(method, base, params, jax.random.key(0))
    state = jp.init_state(method, optimizer, trainable, frozen, jax.random.key(1))
    state, _ = jax.jit(jp.make_train_step(model, method, optimizer, mean_square, accumulate=2))(state, batch)
    means = []
    for x in (X, X + 1):
        module = Normed(nnx.Rngs(0))
        module(x)
        means.append(module.norm.mean[...])
    np.testing.assert_allclose(state.moved["norm/mean"], (means[0] + means[1]) / 2, rtol=1e-5, atol=1e-6)
    assert int(state.moved["calls"]) == 1


def test_carry_must_be_last():
    base, params = jp.from_nnx(Normed(nnx.Rngs(0)))
    method, optimizer = jp.chain(jp.carry(base), jp.full()), optax.sgd(0.1)
    model, trainable, frozen = jp.setup(method, base, params, jax.random.key(0))
    state = jp.init_state(method, optimizer, trainable, frozen, jax.random.key(1))
    with pytest.raises(jp.InputError, match="carry: .* is trained by another method; chain carry last"):
        jp.make_train_step(model, method, optimizer, mean_square)(state, {"x": X})


def test_another_function_of_the_module_is_called():
    module = Listed(nnx.Rngs(0))
    base, params = jp.from_nnx(module, method=lambda module, scale, x: scale * module(x))
    np.testing.assert_allclose(base.apply(params, {"scale": 2.0, "x": X}), 2 * module(X), rtol=1e-6)


def test_a_packed_kernel_is_read():
    """By the products of `jaxpeft.quant`, beside an adapter and alone, under `nnx.scan`."""
    module = Wide(nnx.Rngs(0))
    base, params = jp.from_nnx(module)
    x = jax.random.normal(jax.random.key(1), (2, 256))
    params["layers"]["kernel"] = pack(params["layers"]["kernel"], "int8")
    np.testing.assert_allclose(base.apply(params, {"x": x}), module(x), atol=0.05)
    model, trainable, frozen = jp.setup(jp.lora(2), base, params, jax.random.key(0))
    adapted = model.apply(jp.combine(moved(trainable), frozen), {"x": x})
    assert np.abs(adapted - module(x)).max() > 0.1
    grads = jax.grad(lambda leaves: jnp.sum(model.apply(jp.combine(leaves, frozen), {"x": x}) ** 2))(moved(trainable))
    assert all(np.any(leaf) for leaf in grads.values())


def test_what_cannot_be_is_one_line():
    base, params = jp.from_nnx(Listed(nnx.Rngs(0)))
    with pytest.raises(jp.InputError, match="dict is no flax.nnx.Module"):
        jp.from_nnx({})
    with pytest.raises(jp.InputError, match="the parameters lack named/out/bias, named/out/kernel"):
        base.apply({"layers": params["layers"], "plain": params["plain"]}, {"x": X})
    with pytest.raises(jp.InputError, match="an NNX module makes its parameters itself"):
        base.init(jax.random.key(0), {})
    linen = jp.Model(None, None)
    with pytest.raises(jp.InputError, match="to_nnx: the model is not one of from_nnx"):
        jp.to_nnx(linen, params)
    with pytest.raises(jp.InputError, match="carry: the model is not one of from_nnx"):
        jp.carry(linen)
