"""Linen modules of any kind: what runs is a site, whatever the axes of its kernel; what never acts is told."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import NamedSharding, PartitionSpec

import jaxpeft as jp
from jaxpeft import sites, tree
from jaxpeft.method import from_specs
from jaxpeft.quant import Folded, is_packed
from tests.modules import X, losses, moved


class Attends(nn.Module):
    """An encoder block as Flax's examples write it: attention of several heads, a head on its mean."""

    boxed: bool = False

    @nn.compact
    def __call__(self, x):
        init = nn.initializers.lecun_normal()
        init = nn.with_logical_partitioning(init, ("embed", "mlp")) if self.boxed else init
        x = x + nn.MultiHeadDotProductAttention(num_heads=2, qkv_features=12, name="attention")(x)
        x = nn.relu(nn.Dense(10, kernel_init=init, name="up")(x))
        return nn.DenseGeneral(5, axis=(-2, -1), name="out")(x)


class Layer(nn.Module):
    """What is scanned over."""

    @nn.compact
    def __call__(self, x, _):
        y = nn.DenseGeneral((2, 4), name="split")(x)
        return x + nn.DenseGeneral(8, axis=(-2, -1), use_bias=False, name="join")(nn.relu(y)), None


class Scanned(nn.Module):
    """Layers stacked by `nn.scan`, each computed again in the backward pass."""

    @nn.compact
    def __call__(self, x):
        layer = nn.scan(nn.remat(Layer), variable_axes={"params": 0}, split_rngs={"params": True}, length=3)
        x, _ = layer(name="blocks")(x, None)
        return nn.Dense(4, name="head")(x)


class Members(nn.Module):
    """Members of members under `nn.vmap`, each on the same input."""

    inner: int = 0
    outer: int = 1

    @nn.compact
    def __call__(self, x):
        options = {"split_rngs": {"params": True}, "in_axes": None}
        dense = nn.vmap(nn.Dense, variable_axes={"params": self.inner}, axis_size=3, **options)
        return nn.vmap(dense, variable_axes={"params": self.outer}, axis_size=2, **options)(8, name="dense")(x)


class Equations(nn.Module):
    """`nn.Einsum`, one of which is no matrix from its first axis to its last; a convolution; a table."""

    @nn.compact
    def __call__(self, x):
        x = nn.Einsum((8, 2, 4), "btd,dnh->btnh", name="heads")(x)
        x = nn.Einsum((2, 4, 8), "btnh,nhd->btd", use_bias=False, name="join")(x)
        x = nn.Einsum((6, 8), "btd,td->btd", use_bias=False, name="diagonal")(x)
        x = x + nn.Conv(8, (3,), name="conv")(x)
        return x @ nn.Embed(9, 8, name="table").embedding.T


class Shared(nn.Module):
    """One module that is called twice, and one that is called only while the module is initialised."""

    @nn.compact
    def __call__(self, x):
        twice = nn.Dense(8, name="twice")
        if self.is_initializing():
            nn.Dense(3, name="never")(x)
        return nn.Dense(3, name="out")(twice(nn.relu(twice(x))))


MODULES = {
    "attention": (Attends(), {"attention/query", "attention/key", "attention/value", "attention/out", "up", "out"}),
    "boxed": (
        Attends(boxed=True),
        {"attention/query", "attention/key", "attention/value", "attention/out", "up", "out"},
    ),
    "scanned": (Scanned(), {"blocks/split", "blocks/join", "head"}),
    "equations": (Equations(), {"heads", "join"}),
    "members": (Members(), {"dense"}),
}


METHODS = (
    jp.lora(2),
    jp.lora_fa(2),
    jp.dora(2),
    jp.ia3(targets="all-linear"),
    jp.paca(2),
    jp.chain(jp.ia3(targets="all-linear"), jp.lora(2)),
)


@pytest.mark.parametrize(
    ("method", "name"),
    [
        *((METHODS[0], name) for name in MODULES),
        *(pytest.param(method, "scanned", marks=pytest.mark.slow) for method in METHODS[1:]),
    ],
    ids=lambda x: x if isinstance(x, str) else x.name,
)
def test_every_linear_map_that_runs_is_a_site(name, method):
    """Each adapter acts; at the start nothing has changed; merged, the module computes the same, in its own shapes."""
    module, expected = MODULES[name]
    model = jp.from_linen(module, {"x": X})
    own = module.init(jax.random.key(3), X)["params"]
    assert set(sites.find(model.init(jax.random.key(3), {}))) == expected
    plain = nn.meta.unbox(own)
    adapted, trainable, frozen = jp.setup(method, model, own, jax.random.key(0))
    start = jp.combine(trainable, frozen)
    np.testing.assert_allclose(adapted.apply(start, {"x": X}), module.apply({"params": plain}, X), rtol=1e-5, atol=1e-5)
    changed = moved(trainable)
    assert {path.rsplit("/", 2)[0] for path in changed} == expected
    found = adapted.apply(jp.combine(changed, frozen), {"x": X})
    for path in changed:
        without = {**changed, path: trainable[path]}
        assert np.abs(adapted.apply(jp.combine(without, frozen), {"x": X}) - found).max() > 1e-6, path
    merged = method.merge(jp.combine(changed, frozen))
    shapes = lambda params: {path: leaf.shape for path, leaf in tree.flatten(params).items()}
    assert shapes(merged) == shapes(plain)
    np.testing.assert_allclose(module.apply({"params": merged}, X), found, rtol=2e-4, atol=2e-4)


@pytest.mark.parametrize("name", MODULES)
def test_a_whole_module_trains(name):
    module, _ = MODULES[name]
    model = jp.from_linen(module, {"x": X})
    adapted, trainable, frozen = jp.setup(jp.full(), model, model.init(jax.random.key(3), {}), jax.random.key(0))
    assert not frozen and not any(isinstance(leaf, Folded) for leaf in trainable.values())
    found = losses(adapted, jp.full(), trainable, frozen, steps=5)
    assert found[-1] < found[0]


def test_gradients_are_those_of_the_merged_kernel():
    """d loss / d B of the adapter is A^T of the kernel's own gradient, as autodiff has it in the module's shapes."""
    module = Attends()
    model = jp.from_linen(module, {"x": X})
    method = jp.lora(2, targets="query")
    adapted, trainable, frozen = jp.setup(method, model, model.init(jax.random.key(3), {}), jax.random.key(0))
    changed = moved(trainable)
    value = lambda params: jnp.sum(jnp.sin(adapted.apply(params, {"x": X})))
    found = jax.grad(lambda leaves: value(jp.combine(leaves, frozen)))(changed)
    merged = method.merge(jp.combine(changed, frozen))
    of_kernel = jax.grad(lambda params: jnp.sum(jnp.sin(module.apply({"params": params}, X))))(merged)
    whole = of_kernel["attention"]["query"]["kernel"].reshape(8, 12)
    a, b = changed["attention/query/lora/a"], changed["attention/query/lora/b"]
    np.testing.assert_allclose(found["attention/query/lora/b"], a.T @ whole, rtol=1e-3, atol=1e-4)
    np.testing.assert_allclose(found["attention/query/lora/a"], whole @ b.T, rtol=1e-3, atol=1e-4)


class Hidden(nn.Module):
    """What is called as our stacks of layers are, and never runs but while it is initialised."""

    @nn.compact
    def __call__(self, x):
        if self.is_initializing():
            nn.Dense(3, name="layers")(x)
        return nn.Dense(3, name="out")(x)


def test_a_subtree_called_as_our_layers_are_hides_nothing():
    model = jp.from_linen(Hidden(), {"x": X})
    method = jp.lora(2, targets=["layers"])
    adapted, trainable, frozen = jp.setup(method, model, model.init(jax.random.key(3), {}), jax.random.key(0))
    with pytest.raises(jp.InputError, match="lora: the model never calls layers; leave"):
        adapted.apply(jp.combine(trainable, frozen), {"x": X})


class Named(nn.Module):
    """Scanned layers whose kernels' axes have names, and one kernel without."""

    @nn.compact
    def __call__(self, x):
        class Layer(nn.Module):
            @nn.compact
            def __call__(self, x, _):
                init = nn.with_logical_partitioning(nn.initializers.lecun_normal(), ("embed", "heads", None))
                return x + nn.DenseGeneral((2, 4), kernel_init=init, name="split")(x).reshape(x.shape), None

        axes, names = {"params": 0}, {nn.PARTITION_NAME: "layers"}
        layer = nn.scan(Layer, variable_axes=axes, split_rngs={"params": True}, length=2, metadata_params=names)
        return nn.Dense(3, name="out")(layer(name="blocks")(x, None)[0])


def test_names_of_axes_are_kept_for_a_mesh():
    """They place the leaves of a step, a kernel of several axes among them."""
    model = jp.from_linen(Named(), {"x": X})
    axes = model.axes()
    assert axes == {"blocks/split/kernel": PartitionSpec("layers", "embed", "heads", None)}
    adapted, trainable, frozen = jp.setup(jp.lora(2), model, model.init(jax.random.key(3), {}), jax.random.key(0))
    assert adapted.axes() == axes
    mesh, rules = jax.make_mesh((1,), ("fsdp",)), (("layers", None), ("embed", "fsdp"), ("heads", None))
    spec = lambda path: nn.logical_to_mesh_axes(axes[path], rules) if path in axes else PartitionSpec()
    placed = {path: jax.device_put(leaf, NamedSharding(mesh, spec(path))) for path, leaf in frozen.items()}
    assert placed["blocks/split/kernel"].array.sharding.spec == PartitionSpec(None, "fsdp", None, None)
    found = adapted.apply(jp.combine(trainable, placed), {"x": X})
    np.testing.assert_allclose(found, adapted.apply(jp.combine(trainable, frozen), {"x": X}), rtol=1e-5, atol=1e-6)


def test_what_no_adapter_reads_keeps_its_shape():
    """A convolution's kernel, and those of sites that were not chosen: merged parameters are the module's."""
    for name, target in (("attention", "up"), ("equations", "heads")):
        module, _ = MODULES[name]
        model = jp.from_linen(module, {"x": X})
        method = jp.lora(2, targets=[target])
        _, trainable, frozen = jp.setup(method, model, model.init(jax.random.key(3), {}), jax.random.key(0))
        folded = [path for path, leaf in frozen.items() if isinstance(leaf, Folded)]
        assert folded == (["heads/kernel"] if target == "heads" else [])
        module.apply({"params": method.merge(jp.combine(trainable, frozen))}, X)


def test_a_kernel_of_several_axes_that_trains_beside_its_adapter_is_refused():
    model = jp.from_linen(Attends(), {"x": X})
    both = jp.chain(jp.lora(2), jp.full("query/kernel"))
    with pytest.raises(jp.InputError, match=r"lora.full: changes attention/query/kernel, a kernel of 8x2x6, itself"):
        jp.setup(both, model, model.init(jax.random.key(3), {}), jax.random.key(0))


class Doubled(nn.Dense):
    """A product and something else."""

    @nn.compact
    def __call__(self, x):
        return 2 * super().__call__(x)


class Odd(nn.Module):
    """Linear maps that are not the product of a kernel, and one that is."""

    @nn.compact
    def __call__(self, x):
        x = nn.DenseGeneral(4, batch_dims=0, name="batch")(x)
        x = nn.Dense(4, dot_general=lambda *args, **kwargs: jax.lax.dot_general(*args, **kwargs), name="product")(x)
        return Doubled(3, name="doubled")(nn.Dense(4, dot_general=jax.lax.dot_general, name="plain")(x))


@pytest.mark.parametrize(
    ("module", "site", "why"),
    [
        (
            Members(1, 0),
            "dense",
            r"its layers are stacked on axis 1 \(variable_axes\), where an adapter's are on axis 0",
        ),
        (Members(0, -1), "dense", "its layers are stacked on axis 3"),
        (Odd(), "batch", r"its DenseGeneral has batch_dims \(0,\), a matrix for each index of them"),
        (Odd(), "product", "its Dense has a dot_general of its own"),
        (Odd(), "doubled", "Doubled has a __call__ of its own"),
    ],
)
def test_a_linear_map_that_no_adapter_fits_is_refused_by_name(module, site, why):
    params = jp.from_linen(module, {"x": X}).init(jax.random.key(3), {})
    with pytest.raises(jp.InputError, match="targets 'all-linear': .* is no site: "):
        sites.find(params)
    with pytest.raises(jp.InputError, match=f"targets '{site}': {site} is no site: {why}"):
        sites.find(params, [site])
    if isinstance(module, Odd):
        assert sites.find(params, ["plain"]) == ["plain"]


def test_an_adapter_that_is_never_called_is_refused_by_name():
    model = jp.from_linen(Shared(), {"x": X})
    adapted, trainable, frozen = jp.setup(jp.lora(2), model, model.init(jax.random.key(3), {}), jax.random.key(0))
    with pytest.raises(jp.InputError, match="lora: the model never calls never; leave them out of targets"):
        adapted.apply(jp.combine(trainable, frozen), {"x": X})
    method = jp.lora(2, targets=["twice", "out"])
    adapted, trainable, frozen = jp.setup(method, model, model.init(jax.random.key(3), {}), jax.random.key(0))
    changed = jp.combine(moved(trainable), frozen)
    merged = method.merge(changed)
    expected = Shared().apply({"params": merged}, X)
    np.testing.assert_allclose(adapted.apply(changed, {"x": X}), expected, rtol=1e-4, atol=1e-5)


def test_other_collections_are_read():
    class Normed(nn.Module):
        @nn.compact
        def __call__(self, x):
            return nn.Dense(3, name="out")(nn.BatchNorm(use_running_average=True, name="norm")(x))

    module = Normed()
    variables = module.init(jax.random.key(3), X)
    statistics = jax.tree.map(lambda x: x + 0.5, variables["batch_stats"])
    model = jp.from_linen(module, {"x": X}, collections={"batch_stats": statistics})
    adapted, trainable, frozen = jp.setup(jp.lora(2), model, variables["params"], jax.random.key(0))
    expected = module.apply({"params": variables["params"], "batch_stats": statistics}, X)
    np.testing.assert_allclose(adapted.apply(jp.combine(trainable, frozen), {"x": X}), expected, atol=1e-6)


def squares(model, params, batch, key):
    return jnp.mean((model.apply(params, batch) - 1) ** 2), {"weight": jnp.ones(())}


def stepper(method, model, trainable, frozen):
    """(a compiled step of Adam, its first state)."""
    optimizer = optax.adam(1e-2)
    state = jp.init_state(method, optimizer, trainable, frozen, jax.random.key(1))
    return jax.jit(jp.make_train_step(model, method, optimizer, squares)).lower(state, {"x": X}).compile(), state


@pytest.mark.parametrize(("name", "format"), [("attention", "int8"), ("scanned", "nf4"), ("equations", "int4")])
def test_a_packed_base_computes_trains_and_merges(name, format):
    """All kernels are packed, those of the sites without an adapter, too; merged, they have their module's shapes."""
    module, expected = MODULES[name]
    model = jp.from_linen(module, {"x": X})
    own = module.init(jax.random.key(3), X)["params"]
    target = sorted(expected)[0]
    method = jp.chain(jp.quantize(format), jp.lora(2, targets=[target]))
    adapted, trainable, frozen = jp.setup(method, model, own, jax.random.key(0))
    assert {path.removesuffix("/kernel") for path, leaf in frozen.items() if is_packed(leaf)} == expected
    start = adapted.apply(jp.combine(trainable, frozen), {"x": X})
    base = method.merge(jp.combine(trainable, frozen))
    assert jax.tree.map(jnp.shape, base) == jax.tree.map(jnp.shape, own)
    np.testing.assert_allclose(start, module.apply({"params": base}, X), rtol=1e-5, atol=1e-5)
    assert np.abs(start - module.apply({"params": own}, X)).max() > 1e-4
    step, state = stepper(method, adapted, trainable, frozen)
    history = []
    for _ in range(5):
        state, metrics = step(state, {"x": X})
        history.append(float(metrics["loss"]))
    assert history[-1] < history[0]
    merged = method.merge(state.params)
    np.testing.assert_allclose(
        adapted.apply(state.params, {"x": X}), module.apply({"params": merged}, X), rtol=2e-4, atol=2e-4
    )


def test_a_step_over_a_packed_base_is_given_four_bits():
    """What the compiled step takes is less than that of LoRA alone by what packing spares of each kernel."""
    model = jp.from_linen(Scanned(), {"x": X})
    params, sizes = model.init(jax.random.key(3), {}), {}
    quantized = jp.chain(jp.quantize("int4"), jp.lora(2))
    for method in (jp.lora(2), quantized):
        adapted, trainable, frozen = jp.setup(method, model, params, jax.random.key(0))
        step, _ = stepper(method, adapted, trainable, frozen)
        sizes[method.name] = step.memory_analysis().argument_size_in_bytes
    packed = [leaf for leaf in frozen.values() if is_packed(leaf)]
    assert len(packed) == 3
    assert sum(leaf.nbytes for leaf in packed) == sum(leaf.size // 2 + leaf.size // 8 * 4 for leaf in packed)
    assert sizes["lora"] - sizes["quantize+lora"] == sum(4 * leaf.size - leaf.nbytes for leaf in packed)


def test_pissa_leaves_a_kernel_its_axes():
    method = jp.lora(2, init="pissa")
    model = jp.from_linen(Attends(), {"x": X})
    own = model.init(jax.random.key(3), {})
    for chained in (method, jp.chain(jp.quantize("int8"), method)):
        adapted, trainable, frozen = jp.setup(chained, model, own, jax.random.key(0))
        params = jp.combine(trainable, frozen)
        merged = chained.merge(params)
        expected = Attends().apply({"params": merged}, X)
        np.testing.assert_allclose(adapted.apply(params, {"x": X}), expected, rtol=1e-4, atol=1e-4)


class Stops(nn.Module):
    """Maps that run and whose outputs the loss cannot see: one in scanned layers, one unused, one cut off."""

    @nn.compact
    def __call__(self, x):
        class Cut(nn.Module):
            @nn.compact
            def __call__(self, x, _):
                return x + nn.Dense(8, name="seen")(x) * jax.lax.stop_gradient(nn.Dense(8, name="cut")(x)), None

        layer = nn.scan(nn.remat(Cut), variable_axes={"params": 0}, split_rngs={"params": True}, length=2)
        x, _ = layer(name="blocks")(x, None)
        nn.Dense(3, name="unused")(x)
        return nn.Dense(3, name="out")(x)


@pytest.mark.parametrize("method", [METHODS[0], METHODS[1], METHODS[2]], ids=lambda method: method.name)
def test_an_adapter_that_cannot_reach_the_loss_is_refused_by_name(method):
    """By the gradient's dependences, not by its values: LoRA's A has a zero gradient where B is zero."""
    model = jp.from_linen(Stops(), {"x": X})
    params = model.init(jax.random.key(3), {})
    adapted, trainable, frozen = jp.setup(method, model, params, jax.random.key(0))
    with pytest.raises(jp.InputError, match=f"{method.name}: the loss does not depend on blocks/cut, unused by"):
        stepper(method, adapted, trainable, frozen)
    spec = method.specs[0]
    some = from_specs([(spec.name, {**spec.config, "targets": ["seen", "out"]})])
    adapted, trainable, frozen = jp.setup(some, model, params, jax.random.key(0))
    step, state = stepper(some, adapted, trainable, frozen)
    state = step(step(state, {"x": X})[0], {"x": X})[0]
    assert all(np.any(state.trainable[path] != leaf) for path, leaf in trainable.items())
