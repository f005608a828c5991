"""Residuals by name: the gradients of plain autodiff, what is kept for them counted by hand, and plans as text."""

import functools
import subprocess
import sys

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import jaxpeft as jp
from jaxpeft import sites, tree
from jaxpeft.backward import loop, passes, residuals
from jaxpeft.backward.flops import count_flops
from jaxpeft.backward.plan import INPUT
from jaxpeft.errors import InputError
from jaxpeft.models import layers
from pallas_kernels import packed as quantized
from pallas_kernels.platform import tracing_for
from pallas_kernels.stacked import Stacked
from tests import contract_test, tiny, virtual
from tests.residuals import bytes_per_token, saved

page = contract_test.page  # the namespace of docs/contract.md
D, F, HEADS, LAYERS, RANK = 32, 56, 4, 3, 4  # of tiny.CONFIG
MHA = {"num_key_value_heads": HEADS}
QWEN2 = {"model_type": "qwen2", "use_sliding_window": True, "sliding_window": 4, "max_window_layers": 2}
MODELS = {
    "llama": {},
    "qwen3": {"model_type": "qwen3", "head_dim": 8},
    "windows by layer": QWEN2,
    "mistral": {"model_type": "mistral", "sliding_window": 5},
    "tied": {"tie_word_embeddings": True},
}
METHODS = {
    "lora": jp.lora(RANK),
    "lora_fa": jp.lora_fa(RANK),
    "lora_fa seed": jp.lora_fa(RANK, store_a=False),
    "full": jp.full(),
    "last:1": jp.full("last:1"),
    "dropout": jp.lora(RANK, dropout=0.3),
    "qlora": jp.chain(jp.quantize("int8"), jp.lora(RANK)),
}


def packed(rows=4):
    """Two documents in each row, and padding."""
    segments = np.array([[1] * 9 + [2] * 5 + [0] * 2, [1] * 3 + [2] * 13] * (rows // 2), np.int32)
    return {**tiny.batch(rows), "segment_ids": segments}


def start(method, dtype=jnp.float32, **changes):
    """(model, trainable, frozen), away from the start, where half of an adapter has no gradient."""
    base, params = tiny.model(dtype, **changes)
    model, trainable, frozen = jp.setup(method, base, params, jax.random.key(0))
    key = jax.random.key(3)
    moved = {p: x + 0.05 * jax.random.normal(key, x.shape, x.dtype) for p, x in trainable.items()}
    return model, moved, frozen


def loss(model, frozen, batch, key=None):
    return lambda trainable: jp.completion_loss(model, tree.combine(trainable, frozen), batch, key)[0]


def gradients(model, trainable, frozen, batch, key=None):
    return jax.jit(jax.value_and_grad(loss(model, frozen, batch, key)))(trainable)


@functools.cache
def plain(method, family):
    """((model, trainable, frozen), (value, gradients) by plain autodiff)."""
    made = start(METHODS[method], **MODELS[family])
    key = jax.random.key(9) if method == "dropout" else None
    return made, gradients(*made, packed(), key)


def same(found, wanted, tolerance=1e-5):
    """Values, and gradients relative to each leaf's largest entry."""
    np.testing.assert_allclose(found[0], wanted[0], rtol=tolerance)
    assert found[1].keys() == wanted[1].keys()
    for path, gradient in wanted[1].items():
        scale = np.abs(gradient).max()
        np.testing.assert_allclose(found[1][path], gradient, rtol=tolerance, atol=tolerance * scale, err_msg=path)


# Gradients.


@pytest.mark.parametrize(
    ("method", "family", "save"),
    [
        ("lora", "llama", "matmuls"),
        ("lora", "llama", "matmuls,attention=recompute,tokens=16"),
        pytest.param("lora", "llama", "offload,block_input=offload,tokens=32", marks=pytest.mark.slow),
        pytest.param("lora_fa", "llama", "matmuls", marks=pytest.mark.slow),
        ("lora_fa seed", "llama", "blocks"),
        ("full", "llama", "gate_proj=save,q_rotary=offload,after_attention=save,tokens=40"),
        pytest.param("full", "tied", "matmuls", marks=pytest.mark.slow),
        pytest.param("last:1", "llama", "matmuls,tokens=1", marks=pytest.mark.slow),
        ("lora", "qwen3", "matmuls"),
        ("lora", "windows by layer", "matmuls"),
        ("lora", "mistral", "blocks,tokens=16"),
        # All rows in one group: the masks of plain autodiff.
        pytest.param("dropout", "llama", "matmuls", marks=pytest.mark.slow),
    ],
)
def test_gradients_are_those_of_plain_autodiff(method, family, save):
    (model, trainable, frozen), wanted = plain(method, family)
    key = jax.random.key(9) if method == "dropout" else None
    same(gradients(residuals.remat(model, save), trainable, frozen, packed(), key), wanted)


@pytest.mark.parametrize("name", ["qlora", "many_lora"])
def test_methods_that_change_the_stack(page, name):
    """Kernels that are pytrees of integers, adapters chosen row by row."""
    made = start(page["many_lora"](3, 2) if name == "many_lora" else jp.chain(jp.quantize("int8"), jp.lora(4)))
    batch = {**packed(), "adapter": np.array([0, 2, 1, 2], np.int32)} if name == "many_lora" else packed()
    remat = residuals.remat(made[0], "matmuls,tokens=32")
    same(gradients(remat, *made[1:], batch), gradients(*made, batch))


@pytest.mark.parametrize("name", ["lora", "last:1", "int8"])
def test_a_block_reads_frozen_kernels_in_their_stacks(monkeypatch, name):
    """In both loops, and in the primal; to the bit what it computes with slices of them."""
    model, trainable, frozen = start(METHODS["lora" if name == "int8" else name])
    model = residuals.remat(model, "matmuls,tokens=32")
    if name == "int8":
        quantize = jax.vmap(functools.partial(quantized.quantize, format="int8"))
        frozen = {path: quantize(x) if path.endswith("_proj/kernel") else x for path, x in frozen.items()}
    seen, dense = [], layers.Dense.linear

    def linear(self, x, kernel):
        seen.append(isinstance(kernel, Stacked))
        return dense(self, x, kernel)

    with monkeypatch.context() as patch:
        patch.setattr(layers.Dense, "linear", linear)
        ours = gradients(model, trainable, frozen, packed())
        value = jax.jit(loss(model, frozen, packed()))(trainable)
    assert any(seen) and np.isclose(value, ours[0], rtol=1e-6)
    monkeypatch.setattr(loop.Loop, "stacked", lambda self, leaves, perturbed, nested=True: self)
    jax.tree.map(np.testing.assert_array_equal, ours, gradients(model, trainable, frozen, packed()))


@pytest.mark.parametrize(
    ("method", "save"),
    [
        pytest.param("lora", "matmuls,tokens=32", marks=pytest.mark.slow),
        pytest.param("lora", "blocks,tokens=16", marks=pytest.mark.slow),  # the backward pass holds kernels
        pytest.param("lora", "compressed,block_input=compress,tokens=16", marks=pytest.mark.slow),
        pytest.param("lora", "compressed12,tokens=16", marks=pytest.mark.slow),  # whose codes are made without a seed
        ("lora", "blocks,block_input=offload,tokens=16"),
        pytest.param("lora", "offload,tokens=32", marks=pytest.mark.slow),  # one loop: what is made goes to the host
        pytest.param("dropout", "matmuls,tokens=16", marks=pytest.mark.slow),
        pytest.param("qlora", "blocks,tokens=16", marks=pytest.mark.slow),
        pytest.param("last:1", "blocks,tokens=16", marks=pytest.mark.slow),
        pytest.param("full", "matmuls,tokens=16", marks=pytest.mark.slow),
    ],
)
def test_groups_within_layers(method, save):
    """On GPUs: to the bit the values and gradients of one loop over both; but for codes, whose rounding differs."""
    model, trainable, frozen = start(METHODS[method])
    model, key = residuals.remat(model, save), jax.random.key(9) if method == "dropout" else None

    def depth(platform):
        with tracing_for(platform):
            jaxpr = jax.make_jaxpr(jax.value_and_grad(loss(model, frozen, packed(), key)))(trainable).jaxpr
            return max(map(_loops, jaxpr.eqns)), gradients(model, trainable, frozen, packed(), key)

    (flat, wanted), (nested, found) = depth("cpu"), depth("cuda")
    assert (flat, nested) == (1, 1 if save.startswith("offload") else 2)
    if save.startswith("compressed,"):
        same(found, wanted, 1e-6)
    else:
        jax.tree.map(np.testing.assert_array_equal, found, wanted)


def _loops(equation) -> int:
    """How many scans of the block are within one another; those without a product are others."""
    bodies = [x.jaxpr for x in jax.tree.leaves(dict(equation.params)) if hasattr(x, "jaxpr")]
    inside = max((_loops(e) for body in bodies for e in body.eqns), default=0)
    own = equation.primitive.name == "scan" and count_flops(equation.params["jaxpr"]) > 0
    return inside + own


def test_an_adapter_that_reads_the_kernel_gets_its_values():
    class Normed(nn.Module):
        @nn.compact
        def __call__(self, inner, x, site, ctx):
            gain = self.param("gain", nn.initializers.ones, (site.kernel.shape[1],))
            return x @ (site.kernel * (gain / jnp.linalg.norm(site.kernel, axis=0)))

    base, params = tiny.model()
    model = sites.attach(base, "normed", lambda site: Normed(), lambda params: ["layers/mlp/up_proj"])
    params = model.init(jax.random.key(0), params)
    planned = residuals.remat(model, "matmuls")
    np.testing.assert_allclose(planned.apply(params, packed()), model.apply(params, packed()), rtol=1e-4, atol=1e-4)


@pytest.mark.slow
def test_a_group_has_dropout_of_its_own():
    """Groups draw masks of their own, the same in both passes: the slope is that of the value that was computed."""
    (model, trainable, frozen), _ = plain("dropout", "llama")
    function = loss(residuals.remat(model, "matmuls,tokens=16"), frozen, packed(), jax.random.key(9))
    z = {path: jax.random.normal(jax.random.key(4), x.shape) for path, x in trainable.items()}

    @jax.jit
    def slopes(trainable):
        ends = [function({p: x + step * z[p] for p, x in trainable.items()}) for step in (1e-3, -1e-3)]
        return (ends[0] - ends[1]) / 2e-3, optax.tree_utils.tree_vdot(jax.grad(function)(trainable), z)

    measured, exact = slopes(trainable)
    np.testing.assert_allclose(measured, exact, rtol=2e-2)


def test_bfloat16():
    """Recomputed values are rounded as the first ones were; only sums over groups differ."""
    model, trainable, frozen = start(METHODS["lora"], jnp.bfloat16)
    found = gradients(residuals.remat(model, "matmuls,tokens=16"), trainable, frozen, packed())
    same(found, gradients(model, trainable, frozen, packed()), 3e-2)


def test_a_train_step_with_accumulation():
    (model, trainable, frozen), _ = plain("lora", "llama")
    optimizer, ends = optax.sgd(0.1), []
    for each in (model, residuals.remat(model, "matmuls,tokens=16")):
        state = jp.init_state(METHODS["lora"], optimizer, trainable, frozen, jax.random.key(1))
        step = jax.jit(jp.make_train_step(each, METHODS["lora"], optimizer, accumulate=2))
        state, metrics = step(state, packed())
        ends.append((metrics["loss"], state.trainable))
    same(ends[1], ends[0])


SHARDED = """
import jax, numpy as np
from jaxpeft.backward import passes, residuals
from tests import contract_test
from tests.backward import residuals_test as here
page = contract_test.page.__wrapped__()
mesh = jax.make_mesh((2, 2), ("data", "fsdp"), axis_types=(jax.sharding.AxisType.Auto,) * 2)
made, batch = here.start(here.METHODS["lora"]), here.packed(rows=8)
wanted = here.gradients(*made, batch)
(trainable, frozen), rows = page["shard"](mesh, made[1:], batch)
for save in ("matmuls,tokens=64", "blocks,tokens=16"):
    found = here.gradients(residuals.remat(made[0], save), trainable, frozen, rows)
    here.same(found, wanted)
assert frozen["layers/mlp/up_proj/kernel"].addressable_shards[0].data.shape[-1] == here.F // 2
"""


@pytest.mark.slow
def test_sharded():
    """Parameters split over a 2 x 2 mesh of host devices, rows over all four."""
    command = [sys.executable, "-c", SHARDED]
    done = subprocess.run(command, env=virtual.devices(4), capture_output=True, text=True, cwd=virtual.ROOT)
    assert done.returncode == 0, done.stderr[-3000:]


def test_a_compressed_input_moves_only_the_backward_pass():
    (model, trainable, frozen), (value, wanted) = plain("lora", "llama")
    found = gradients(residuals.remat(model, "compressed,block_input=compress"), trainable, frozen, packed())
    np.testing.assert_allclose(found[0], value, rtol=1e-6)
    assert any(np.abs(found[1][path] - g).max() > 1e-4 * np.abs(g).max() for path, g in wanted.items())


# What is kept.


def segments(method, save, batch=None, dtype=jnp.float32, **changes):
    model, trainable, frozen = start(METHODS[method] if isinstance(method, str) else method, dtype, **changes)
    with passes.recorded() as found:
        function = jax.grad(loss(residuals.remat(model, save), frozen, tiny.batch() if batch is None else batch))
        jax.eval_shape(function, trainable)
    return list(found.values())


def kept(segment):
    return sorted(name for name, _ in segment.actions)


@pytest.mark.parametrize("method", ["lora", "lora_fa", "lora_fa seed"])
def test_matmuls_keeps_twelve_d_and_four_f(method):
    """By hand, in bf16: the input, q, k, v, attention, one of what makes the stream after it: 6 d; gate and up: 2 f."""
    [segment] = segments(method, "matmuls", dtype=jnp.bfloat16, **MHA)
    tokens = 4 * 16
    bytes_of = segment.kept_bytes()
    stream = [name for name in ("o_proj", "after_attention") if name in bytes_of["device"]]
    assert len(stream) == 1
    expected = dict.fromkeys((INPUT, "q_proj", "k_proj", "v_proj", "attention", *stream), 2 * D)
    expected |= {"gate_proj": 2 * F, "up_proj": 2 * F, "lora_low": 7 * 2 * RANK, "attention_lse": 4 * HEADS}
    assert bytes_of == {"device": {name: LAYERS * tokens * size for name, size in expected.items()}, "host": {}}
    assert sum(expected.values()) == 12 * D + 4 * F + 14 * RANK + 4 * HEADS


def test_grouped_queries_keep_smaller_keys_and_values():
    [segment] = segments("lora", "matmuls,tokens=16")
    assert segment.steps == 4 * LAYERS and segment.shapes["k_proj", 0].shape == (1, 16, D // 2)
    assert segment.kept_bytes()["device"]["k_proj"] == 4 * LAYERS * 64 * D // 2


def test_qwen3_keeps_no_second_copy_of_queries_and_keys():
    """The norm on the heads and the rotation are computed again from q_proj and k_proj."""
    [segment] = segments("lora", "matmuls", **MODELS["qwen3"])
    assert not {"q_norm", "k_norm", "q_rotary", "k_rotary"} & set(kept(segment))


@pytest.mark.parametrize("method", ["lora", "lora_fa", "full"])
@pytest.mark.parametrize("save", ["matmuls", "blocks"])
def test_the_closure_holds_what_was_planned_and_nothing_else(method, save):
    """bf16: the bytes that the backward function itself holds; of float32 only log-sum-exp, once rotary tables."""
    made = start(METHODS[method], jnp.bfloat16, **MHA)
    model = residuals.remat(made[0], save)
    [segment] = segments(method, save, dtype=jnp.bfloat16, **MHA)
    planned = sum(segment.kept_bytes()["device"].values()) / 64
    context = 2 * 4 * (D // HEADS // 2) + 4 + 4  # cos and sin, positions, segment ids
    token_ids = 4 if method == "full" else 0  # for the gradient of the embeddings
    assert bytes_per_token(model, *made[1:], tiny.batch) == planned + context + token_ids
    own = {leaf.shape for leaf in jax.tree.leaves(made[1:])}
    wide = [leaf.shape for leaf in saved(model, *made[1:], tiny.batch(rows=2)) if leaf.dtype == jnp.float32]
    tables = [(2, 16, 1, D // HEADS // 2), (1, 2, 16, 1, D // HEADS // 2)]
    lse = (LAYERS, 2, HEADS, 16)
    assert set(wide) - own - set(tables) == ({lse} if save == "matmuls" else set())


def test_plain_autodiff_keeps_more():
    """Without a plan: what the adapters of q, k, v, of o, of gate, up and of down read, beside the products that
    `matmuls` keeps; a float32 for each norm; and no float32 copy of the stream."""
    made = start(METHODS["lora"], jnp.bfloat16, **MHA)
    everything = bytes_per_token(*made, tiny.batch)
    assert residuals.remat(made[0], "everything") is made[0]
    positions = 4  # read to make the rotary tables, which are kept
    inputs = LAYERS * (3 * 2 * D + 2 * F + 2 * 4)
    assert everything + positions == bytes_per_token(residuals.remat(made[0]), *made[1:], tiny.batch) + inputs
    assert (LAYERS, 2, 16, D) not in {
        leaf.shape for leaf in saved(*made, tiny.batch(rows=2)) if leaf.dtype == jnp.float32
    }


def test_only_layers_that_train_are_kept():
    """Below the last layer nothing is differentiated."""
    [segment] = segments("last:1", "matmuls")
    assert segment.steps == 1


def test_what_nothing_would_read_is_not_kept():
    """o_proj is not read once the stream after it is there, nor are a block's last ones."""
    [segment] = segments("lora", "matmuls,after_attention=save,o_proj=save")
    assert "after_attention" in kept(segment) and "o_proj" not in kept(segment)
    [segment] = segments("lora", "blocks,down_proj=save,block_output=save")
    assert kept(segment) == [INPUT]


def test_offload_keeps_the_large_ones_on_the_host():
    [here], [there] = segments("lora", "matmuls"), segments("lora", "offload")
    before, after = here.kept_bytes(), there.kept_bytes()
    assert set(after["device"]) == {INPUT, "lora_low", "attention_lse"}
    assert {**after["device"], **after["host"]} == before["device"]


def test_compressed_keeps_a_byte_per_number():
    """Per number a byte; per token a float32; per row and channel two bf16, per step a seed. Attention runs again."""
    [exact], [small] = segments("lora", "matmuls", **MHA), segments("lora", "compressed", **MHA)
    expected = dict(exact.kept_bytes()["device"])
    del expected["attention"], expected["attention_lse"]
    for name in ("gate_proj", "up_proj", "q_proj", "k_proj", "v_proj"):
        width = F if name in ("gate_proj", "up_proj") else D
        expected[name] = LAYERS * (64 * width + 64 * 4 + 4 * width * 2 * 2 + 4)
    assert small.kept_bytes()["device"] == expected
    _, attention, *_ = products(D)
    assert small.recompute_flops() == LAYERS * 64 * attention


def products(q, r=0):
    """FLOPs per token of the forward products of one layer: seven kernels, attention, adapters of rank r."""
    kernels = [(D, D), (D, q), (D, q), (D, D), (D, F), (D, F), (F, D)]
    attention = 2 * 2 * 16 * D / 2
    return [2 * n * m for n, m in kernels], attention, [2 * r * n for n, _ in kernels], [2 * r * m for _, m in kernels]


@pytest.mark.parametrize("method", ["lora", "lora_fa", "full"])
def test_no_product_is_computed_twice(method):
    """The whole gradient's FLOPs under `matmuls` are those of plain autodiff."""
    model, trainable, frozen = start(METHODS[method])
    counts = []
    for each in (model, residuals.remat(model, "matmuls,tokens=16")):

        def function(trainable, each=each):
            return each.hidden(tree.combine(trainable, frozen), tiny.batch()).sum()

        counts.append(count_flops(jax.make_jaxpr(jax.grad(function))(trainable)))
    assert counts[0] == counts[1]
    [segment] = segments(method, "matmuls,tokens=16")
    assert segment.recompute_flops() == 0


def test_blocks_computes_the_forward_products_again():
    """All but the last, whose output nothing reads; of its adapter x A."""
    [segment] = segments("lora", "blocks", **MHA)
    kernels, attention, down, up = products(D, RANK)
    per_token = sum(kernels[:-1]) + attention + sum(down) + sum(up[:-1])
    assert segment.recompute_flops() == LAYERS * 64 * per_token
    [segment] = segments("full", "blocks", **MHA)
    kernels, attention, *_ = products(D)
    assert segment.recompute_flops() == LAYERS * 64 * (sum(kernels[:-1]) + attention)


def test_a_table_is_charged_for_what_it_leaves_out():
    kernels, attention, down, up = products(D, RANK)
    [segment] = segments("lora", "matmuls,attention=recompute", **MHA)
    assert segment.recompute_flops() == LAYERS * 64 * attention
    assert "attention_lse" not in kept(segment)  # the kernel that makes one makes the other
    [segment] = segments("lora", "matmuls,gate_proj=recompute", **MHA)
    # One operation makes x W + s (x A) B and x A, though x A is kept.
    assert segment.recompute_flops() == LAYERS * 64 * (kernels[4] + down[4] + up[4])


@pytest.mark.parametrize(
    ("rows", "length", "tokens", "groups"),
    [(8, 16, 2048, 1), (8, 16, 32, 4), (8, 16, 1, 8), (6, 16, 64, 2), (7, 5, 30, 7)],
)
def test_groups_are_equal_and_as_few_as_fit(rows, length, tokens, groups):
    assert loop.num_groups(rows, length, tokens) == groups


# Refused.


def test_an_unknown_activation_names_the_nearest():
    with pytest.raises(InputError, match="no activation is called 'gate_prj'; nearest: gate_proj") as error:
        segments("lora", "matmuls,gate_prj=save")
    assert "known: block_input, input_layernorm" in str(error.value) and "\n" not in str(error.value)


def test_a_model_that_runs_its_layers_itself_is_refused(page):
    model, _, _ = start(page["meft"](4))
    with pytest.raises(InputError, match="--save matmuls: this model runs its layers in its own way"):
        residuals.remat(model)
    assert residuals.remat(model, "everything") is model


def test_a_block_that_a_method_has_changed_gets_plain_arrays():
    """A function around a block that computes with its layer's parameters: the same under every plan."""
    base, params = tiny.model()

    def scaled(function):
        def call(layer, *args, **named):
            return function(jax.tree.map(lambda leaf: 2 * leaf - jnp.mean(leaf), layer), *args, **named)

        return call

    model = base._replace(stack=base.stack.map_layers(scaled))
    of = lambda model: jax.jit(lambda params: jp.completion_loss(model, params, packed())[0])(params)
    assert np.allclose(of(model), of(residuals.remat(model, "matmuls")), rtol=1e-6)
    assert not np.allclose(of(model), of(base), rtol=1e-3)
