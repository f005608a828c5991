"""NNX modules of any kind: adapters at their linear maps, and the module back with them in it."""

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
from tests.modules import X, losses, mean_square, moved
from tests.nnx_modules import MODULES, Listed, Scanned, Shared, adapt, evaluated

EVERY = ".*"
METHODS = (
    jp.lora(2, targets=EVERY),
    jp.lora_fa(2, targets=EVERY),
    jp.dora(2, targets=EVERY),
    jp.ia3(targets=EVERY),
    jp.paca(2, targets=EVERY),
    jp.chain(jp.ia3(targets=EVERY), jp.lora(2, targets=EVERY)),
)


@pytest.mark.parametrize(
    ("method", "name"),
    [
        *((METHODS[0], name) for name in MODULES),
        *(pytest.param(method, "scanned", marks=pytest.mark.slow) for method in METHODS[1:]),
    ],
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
    base, params = jp.from_nnx(make(nnx.Rngs(3)))
    model, trainable, frozen = jp.setup(jp.full(), base, params, jax.random.key(0))
    assert not frozen and not any(isinstance(leaf, Folded) for leaf in trainable.values())
    found = losses(model, jp.full(), trainable, frozen)
    assert found[-1] < found[0]


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


@pytest.mark.parametrize(("name", "format"), [("attention", "int8"), ("scanned", "nf4"), ("equations", "nf4")])
def test_an_adapter_over_packed_kernels(name, format):
    """Of several axes and of stacks: as unpacked at the start, with dropout, merged in the module's own shapes."""
    make, _ = MODULES[name]
    targets = ["split", "join"] if name == "scanned" else EVERY
    method = jp.chain(jp.quantize(format, targets=targets), jp.lora(2, targets=targets, dropout=0.5))
    module = make(nnx.Rngs(3))
    model, changed, frozen, trainable = adapt(method, module)
    unpacked = jp.to_nnx(model, method.merge(jp.combine(trainable, frozen)))
    assert jax.tree.map(jnp.shape, nnx.state(unpacked)) == jax.tree.map(jnp.shape, nnx.state(module))
    start = model.apply(jp.combine(trainable, frozen), {"x": X})
    np.testing.assert_allclose(start, evaluated(unpacked), rtol=1e-5, atol=1e-5)
    params = jp.combine(changed, frozen)
    found = model.apply(params, {"x": X})
    np.testing.assert_allclose(evaluated(jp.to_nnx(model, method.merge(params))), found, rtol=2e-4, atol=2e-4)
    np.testing.assert_allclose(evaluated(jp.to_nnx(model, params)), found, rtol=1e-5, atol=1e-5)
    dropped = model.apply(params, {"x": X}, jax.random.key(1))
    assert np.isfinite(dropped).all() and np.abs(dropped - found).max() > 1e-3


class Odd(nnx.Module):
    """Linear maps that are not the product of a kernel, or whose layers lie elsewhere."""

    def __init__(self, rngs):
        self.batch = nnx.LinearGeneral(8, 4, batch_axis={0: 3}, rngs=rngs)
        axes = nnx.StateAxes({nnx.Param: 1, ...: 0})
        self.layers = nnx.vmap(lambda rngs: nnx.Linear(8, 5, rngs=rngs), out_axes=axes)(rngs.fork(split=3))


def test_a_linear_map_that_no_adapter_fits_is_refused_by_name():
    base, params = jp.from_nnx(Odd(nnx.Rngs(0)))
    params = base.init(jax.random.key(0), params)
    with pytest.raises(jp.InputError, match="batch is no site: its LinearGeneral has batch_axis {0: 3}, a matrix for"):
        sites.find(params, ["batch"])
    with pytest.raises(jp.InputError, match=r"layers is no site: its kernel of \(8, 3, 5\) is \(8, 5\) of Linear with"):
        sites.find(params, ["layers"])


def test_names_of_axes_are_kept():
    with nnx.use_eager_sharding(False):
        layer = nnx.Linear(8, 3, kernel_metadata={"out_sharding": ("embed", "mlp")}, rngs=nnx.Rngs(0))
        base, params = jp.from_nnx(nnx.Dict(out=layer, plain=nnx.Linear(8, 3, rngs=nnx.Rngs(0))))
        assert base.axes() == {"out/kernel": jax.sharding.PartitionSpec("embed", "mlp")}
        model, _, _ = jp.setup(jp.lora(2), base, params, jax.random.key(0))
    assert model.axes() == base.axes()


@pytest.mark.parametrize(
    ("method", "what"),
    [
        (jp.pst(rank=1, mask_rank=1, targets=EVERY), "shares"),
        (jp.sparsegrad(0.5, metric="magnitude", targets=EVERY), "bases"),
        (jp.spt_lora(0.5, rank=1, metric="magnitude", targets=EVERY), "numbers"),
    ],
    ids=lambda x: getattr(x, "name", None),
)
def test_an_adapter_that_reads_beside_its_module_does_not_run_alone(method, what):
    """Merged it does; without what it reads it would be another function, without a word."""
    base, params = jp.from_nnx(Listed(nnx.Rngs(0)))
    model, trainable, frozen = jp.setup(method, base, params, jax.random.key(0))
    trained = jp.combine(moved(trainable), frozen)
    with pytest.raises(jp.InputError, match=f"{method.name}: its {what} are beside the module, which cannot run alone"):
        jp.to_nnx(model, trained)(X)
    alone = jp.to_nnx(model, method.merge(trained))(X)
    np.testing.assert_allclose(alone, model.apply(trained, {"x": X}), rtol=1e-4, atol=1e-4)


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
