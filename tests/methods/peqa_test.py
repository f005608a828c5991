"""PEQA: the paper's quantiser, product and gradient in NumPy, codes that stay, bytes kept, chains, what is refused."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxpeft as jp
from jaxpeft import sharding, sites, tree
from jaxpeft.backward.plan import parse
from jaxpeft.backward.residuals import planned
from jaxpeft.memory import planner
from jaxpeft.methods import peqa
from jaxpeft.model import Context
from jaxpeft.models import geometries
from jaxpeft.quant import Affine, affine, dense, dot, is_packed, like, pack_affine
from jaxpeft.train.optimizer import make_direction
from jaxpeft.train.step import objective_of
from tests import residuals, tiny

N, M, T = 24, 5, 7
KEY = jax.random.key(0)
CASES = [(2, 8), (3, 0), (4, 0), (8, 0), (3, 8), (4, 6), (8, 4)]


def of_paper(w, s, z, bits):
    """(codes, zero points of each input, scales of each input, W) of the paper's quantiser, element by element."""
    n, m = w.shape
    codes, zeros, scales, approximate = (np.empty((n, m)) for _ in range(4))
    for i in range(n):
        for j in range(m):
            g = i * len(s) // n
            codes[i, j] = min(max(np.rint(w[i, j] / s[g, j]) + z[g, j], 0), 2**bits - 1)
            zeros[i, j], scales[i, j] = z[g, j], s[g, j]
            approximate[i, j] = s[g, j] * (codes[i, j] - z[g, j])
    return codes, zeros, scales, approximate


@pytest.fixture(scope="module")
def case():
    rng = np.random.default_rng(0)
    x, w, dy = rng.normal(size=(T, N)), rng.normal(size=(N, M)) + 0.4, rng.normal(size=(T, M))
    w[:, -1] = 0  # a column that no range can be taken of
    return tuple(part.astype(np.float32) for part in (x, w, dy))


@pytest.mark.parametrize(("bits", "group"), CASES)
def test_the_quantiser_is_the_paper_s(bits, group, case):
    """Codes by its formula, zero points of the range, and scales of less error than the range's or others'."""
    w = case[1]
    packed = pack_affine(jnp.asarray(w), bits, group)
    s, z = np.asarray(packed.scales), np.asarray(packed.zeros).astype(int)
    codes, _, _, approximate = of_paper(w, s, z, bits)
    np.testing.assert_array_equal(affine.unpack(packed.codes, bits), codes)
    np.testing.assert_allclose(dense(packed), approximate, rtol=1e-6, atol=1e-7)
    groups = w.reshape(len(s), -1, M)
    low, high = np.minimum(groups.min(1), 0), np.maximum(groups.max(1), 0)
    whole = np.where(high > low, (high - low) / (2**bits - 1), 1)
    np.testing.assert_allclose(z, -low / whole, atol=0.5001)
    error = lambda w_hat: np.square(w_hat - w).reshape(len(s), -1, M).sum(1)
    for ratio in (1, 0.9, 0.8, 0.7, 0.5):
        other = of_paper(w, (whole * np.float32(ratio)).astype(np.float32), z, bits)[3]
        assert np.all(error(approximate) <= error(other) + 1e-6)
    if bits < 8:
        assert error(approximate).sum() < error(of_paper(w, whole, z, bits)[3]).sum()


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_codes_are_packed_without_a_gap(bits):
    codes = np.random.default_rng(0).integers(0, 2**bits, (16, 3))
    fields = affine.pack(jnp.asarray(codes), bits)
    np.testing.assert_array_equal(affine.unpack(fields, bits), codes)
    assert sum(field.nbytes for field in fields) == codes.size * bits // 8
    halves = [affine.pack(jnp.asarray(part), bits) for part in (codes[:8], codes[8:])]
    for field, *parts in zip(fields, *halves, strict=True):  # neighbouring inputs, so that a mesh can part them
        np.testing.assert_array_equal(field, np.concatenate(parts))


@pytest.mark.parametrize(("bits", "group"), CASES)
def test_output_and_gradients_are_those_of_the_paper(bits, group, case):
    x, w, dy = case
    packed = pack_affine(jnp.asarray(w), bits, group)
    module, site = peqa.PEQA(), sites.Site("", packed, None, True)
    inner = lambda x: dot(x, packed)
    start = module.init(KEY, inner, x, site, Context())["params"]["scales"]
    np.testing.assert_array_equal(start, packed.scales)
    scale = np.asarray(start) * np.linspace(0.5, 1.5, start.size, dtype=np.float32).reshape(start.shape)

    def ours(x, scale):
        y = module.apply({"params": {"scales": scale}}, inner, x, site, Context())
        return jnp.sum(y * dy), y

    (d_x, d_scale), y = jax.jit(jax.grad(ours, argnums=(0, 1), has_aux=True))(x, scale)
    codes, zeros, _, _ = of_paper(w, np.asarray(start), np.asarray(packed.zeros).astype(int), bits)
    of_input = np.repeat(scale.astype(np.float64), N // len(scale), axis=0)
    trained = of_input * (codes - zeros)
    d_s = ((codes - zeros) * (x.T @ dy)).reshape(len(scale), -1, M).sum(1)
    np.testing.assert_allclose(y, x @ trained, rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(d_x, dy @ trained.T, rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(d_scale, d_s, rtol=1e-4, atol=1e-4 * np.abs(d_s).max())
    if not group:  # the paper's gradient without x, where no output of a channel is zero for good
        by_output = ((x @ trained) * dy).sum(0) / scale[0]
        np.testing.assert_allclose(d_scale[0], by_output, rtol=1e-4, atol=1e-4 * np.abs(d_s).max())


@pytest.mark.parametrize(("bits", "group"), [(4, 0), (3, 8)])
def test_a_run_changes_scales_alone(bits, group):
    """Codes and zero points bit by bit; 8 bytes of Adam per scale; merged is what the trained integers say."""
    base, params = tiny.model()
    method = jp.peqa(bits, group)
    model, trainable, rest = jp.setup(method, base, params, KEY)
    optimizer = make_direction()
    state = jp.init_state(method, optimizer, trainable, rest, KEY, model)
    step = jax.jit(jp.make_train_step(model, method, optimizer, rate=1e-3))
    losses = []
    for _ in range(4):
        state, metrics = step(state, tiny.batch())
        losses.append(float(metrics["loss"]))
    assert losses[-1] < losses[0] - 0.01
    kernels = {path: leaf for path, leaf in rest.items() if is_packed(leaf)}
    assert len(kernels) == len(trainable) == 7
    merged, total = tree.flatten(method.merge(state.params)), tree.size(state.trainable)
    moments = [leaf.nbytes for leaf in jax.tree.leaves(state.opt_state) if leaf.ndim]
    assert sum(moments) == 8 * total
    for path, kernel in kernels.items():
        after, scale = state.frozen[path], state.trainable[path.replace("/kernel", "/peqa/scales")]
        for before, now in zip(jax.tree.leaves(kernel), jax.tree.leaves(after), strict=True):
            np.testing.assert_array_equal(before, now)
        layers, n, m = kernel.shape
        groups = n // group if group else 1
        assert kernel.nbytes == layers * (n * m * bits // 8 + 5 * groups * m)
        codes = np.stack([affine.unpack(jax.tree.map(lambda x: x[i], kernel.codes), bits) for i in range(layers)])  # noqa: B023
        each = lambda x: np.repeat(np.asarray(x, np.float32), n // groups, axis=1)  # noqa: B023
        np.testing.assert_allclose(merged[path], each(scale) * (codes - each(kernel.zeros)), rtol=1e-6)
    reloaded = tree.combine(state.trainable, {**state.frozen, **{path: tree.flatten(params)[path] for path in kernels}})
    for path, leaf in tree.flatten(method.merge(reloaded)).items():  # scales from a file beside a base as it was
        np.testing.assert_array_equal(leaf, merged[path])


@pytest.fixture(scope="module")
def grouped():
    return jp.peqa(4, 8), *jp.setup(jp.peqa(4, 8), *tiny.model(), KEY)


def test_groups_keep_inputs_and_no_kernel(grouped):
    method, model, trainable, rest = grouped
    rows_of = lambda rows: tiny.batch(rows, length=64)
    floor = residuals.bytes_per_token(*jp.setup(jp.full("embeddings"), *tiny.model(), KEY), rows_of)
    kernels = [leaf.shape for path, leaf in rest.items() if is_packed(leaf)]
    stated = sum(n_layers * peqa.saved_bytes(n, m, 4, 8) for n_layers, n, m in kernels)
    assert residuals.bytes_per_token(model, trainable, rest, rows_of) - floor <= stated
    for one in (method, jp.peqa()):
        model, trainable, rest = jp.setup(one, *tiny.model(), KEY)
        kept = residuals.saved(model, trainable, rest, rows_of(2))
        wide = [leaf.shape for leaf in kept if jnp.issubdtype(leaf.dtype, jnp.floating)]
        assert not {*kernels, *(shape[1:] for shape in kernels)} & set(wide)


@pytest.mark.slow
def test_a_plan_keeps_products_in_the_place_of_outputs():
    """Under `matmuls`: beside what LoRA over packed kernels keeps, the output of down_proj; with groups nothing."""

    def kept(method, plan="matmuls"):
        step = planner.make_step(geometries.load("llama3.2-1b"), method, 1, 64, plan)
        return planner.cost(step).segments["layers"].kept_bytes()["device"]

    frozen = kept(jp.chain(jp.quantize(), jp.lora()))
    del frozen["lora_low"]
    assert kept(jp.peqa(4, 128)) == frozen
    own = {name.removesuffix("_product"): count for name, count in kept(jp.peqa()).items()}
    assert own == frozen | {"down_proj": frozen["block_input"]}
    again = kept(jp.peqa(), "matmuls,down_proj_product=recompute")
    assert sum(again.values()) == sum(frozen.values())


def test_groups_have_the_same_gradients_in_any_run(grouped):
    method, model, trainable, rest = grouped

    def gradients(run):
        changed = model._replace(stack=model.stack._replace(run=run))
        objective = objective_of(changed, method, {**rest, **trainable})
        of = lambda leaves: objective.value_and_grad(leaves, rest, tiny.batch(), KEY, None)[1]
        return jax.jit(of)(trainable)

    scanned, others = gradients(model.stack.run), gradients(planned(parse("matmuls,tokens=16")))
    for path, gradient in scanned.items():
        np.testing.assert_allclose(others[path], gradient, rtol=1e-4, atol=2e-5 * np.abs(gradient).max(), err_msg=path)


@pytest.mark.parametrize("group", [0, 8])
def test_tokens_stay_in_bfloat16(group, case):
    x, w, dy = (jnp.asarray(part, jnp.bfloat16) for part in case)
    packed = pack_affine(w, 4, group)
    assert packed.dtype == jnp.bfloat16
    module, site = peqa.PEQA(), sites.Site("", packed, None, True)
    apply = lambda x, scale: module.apply({"params": {"scales": scale}}, lambda x: dot(x, packed), x, site, Context())
    y, vjp = jax.vjp(apply, x, packed.scales)
    kept = {leaf.dtype for leaf in jax.tree.leaves(vjp) if leaf.shape[:1] == (T,)}
    d_x, d_scale = vjp(dy)
    assert (y.dtype, d_x.dtype, d_scale.dtype, kept) == (jnp.bfloat16, jnp.bfloat16, jnp.float32, {y.dtype})


def test_a_kernel_is_packed_alike_layer_by_layer_and_again():
    """As a checkpoint is converted while it is read, and as the kernels of another method are put back."""
    _, params = tiny.model()
    flat = tree.flatten(params)
    stacks = jp.peqa(3, 4).convert(params)
    path, one = next(iter(stacks.items()))
    whole = one(flat[path])
    assert is_packed(whole)
    assert isinstance(whole, Affine)
    layer = jax.tree.map(lambda x: x[1], whole)
    again = like(layer, flat[path][1])
    for leaf, other in zip(jax.tree.leaves(layer), jax.tree.leaves(again), strict=True):
        np.testing.assert_array_equal(leaf, other)
    assert again.shape == flat[path].shape[1:]
    assert (again.ndim, again.size) == (2, flat[path][1].size)


@pytest.mark.parametrize(
    "chain",
    [
        lambda: jp.chain(jp.lora(2), jp.peqa(4, 8)),
        lambda: jp.chain(jp.peqa(targets="mlp"), jp.quantize("int8", targets="attention")),
        lambda: jp.chain(jp.quantize("int8", targets="attention"), jp.peqa(targets="mlp")),
    ],
)
def test_chains_merge_to_what_they_compute(chain):
    base, params = tiny.model()
    method = chain()
    model, trainable, rest = jp.setup(method, base, params, KEY)
    trainable = {path: leaf * 1.2 + 0.01 * (path.endswith("/b")) for path, leaf in trainable.items()}
    leaves = jp.combine(trainable, rest)
    merged = base.apply(method.merge(leaves), tiny.batch())
    np.testing.assert_allclose(merged, model.apply(leaves, tiny.batch()), rtol=1e-4, atol=1e-4)


class Heads(nn.Module):
    """Projections to heads and back, whose kernels have three axes."""

    @nn.compact
    def __call__(self, x):
        heads = nn.DenseGeneral((2, 4), name="split")(x)
        return nn.DenseGeneral(N, axis=(-2, -1), name="join")(nn.gelu(heads))


@pytest.mark.parametrize("group", [0, 8])
def test_kernels_of_a_module_of_one_s_own(group, case):
    module, x = Heads(), case[0]
    own, method = module.init(KEY, x)["params"], jp.peqa(4, group)
    model, trainable, rest = jp.setup(method, jp.from_linen(module, {"x": x}), own, KEY)
    leaves = jp.combine({path: 1.2 * leaf for path, leaf in trainable.items()}, rest)
    merged = method.merge(leaves)
    assert jax.tree.map(jnp.shape, merged) == jax.tree.map(jnp.shape, own)
    expected = module.apply({"params": merged}, x)
    np.testing.assert_allclose(model.apply(leaves, {"x": x}), expected, rtol=1e-4, atol=1e-5)


def test_codes_are_divided_over_a_mesh_and_one_scale_per_output_is_not():
    mesh = jax.sharding.AbstractMesh((1, 2, 2, 1), sharding.AXES, axis_types=(jax.sharding.AxisType.Auto,) * 4)
    _, trainable, rest = jp.setup(jp.peqa(3), *tiny.model(), KEY)
    found = sharding.of_leaves(mesh, {**trainable, **rest})
    kernel = found["layers/self_attn/o_proj/kernel"]
    assert [tuple(field.spec) for field in kernel.codes] == [(None, "tensor", "fsdp")] * 2
    whole = (None, None, "fsdp")
    assert tuple(kernel.scales.spec) == tuple(kernel.zeros.spec) == whole
    assert tuple(found["layers/self_attn/o_proj/peqa/scales"].spec) == whole


@pytest.mark.parametrize(
    ("method", "message"),
    [
        (lambda: jp.peqa(5), "peqa: bits 5 is not one of 2, 3, 4, 8"),
        (lambda: jp.peqa(group=-1), "peqa: group -1 must be at least 1, or 0 for one scale per output"),
        (
            lambda: jp.peqa(group=16),
            "peqa: group 16 does not divide the 56 inputs of layers/mlp/down_proj; 8",
        ),
        (lambda: jp.peqa(targets=["lm_head"]), "peqa: lm_head is not in the layers, whose kernels alone can be packed"),
        (lambda: jp.chain(jp.quantize("int4"), jp.peqa()), "layers/mlp/down_proj is packed already; peqa packs"),
        (lambda: jp.peqa(targets="q_prj"), "targets 'q_prj': matches no linear site"),
    ],
)
def test_refusals(method, message):
    with pytest.raises(jp.InputError, match=message):
        jp.setup(method(), *tiny.model(), KEY)


def test_refuses_inputs_that_fill_no_bytes():
    _, params = tiny.model(intermediate_size=60)
    message = "peqa: layers/mlp/down_proj has 60 inputs, which 3 bits pack in 8s; use bits 2 or bits 4 or bits 8"
    with pytest.raises(jp.InputError, match=message):
        jp.peqa(3).convert(params)


def test_refuses_to_be_outside_of_another_adapter():
    model, trainable, rest = jp.setup(jp.chain(jp.peqa(), jp.lora(2)), *tiny.model(), KEY)
    with pytest.raises(jp.InputError, match="peqa: must be nearest to the kernel"):
        jax.eval_shape(model.apply, jp.combine(trainable, rest), tiny.batch())


@pytest.mark.parametrize("call", [(5, 0), (4, 7), (4, -8)])
def test_the_quantiser_refuses(call):
    with pytest.raises(ValueError, match="bits are not|does not divide"):
        affine.quantize(jnp.zeros((24, 2)), *call)
    with pytest.raises(ValueError, match="12 inputs are no multiple of 8"):
        affine.quantize(jnp.zeros((12, 2)), 3)
