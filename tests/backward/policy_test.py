"""Plans as policies of jax.checkpoint: what JAX then keeps and computes again, by hand; a model's layers under them."""

import re

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.ad_checkpoint import checkpoint_name

import jaxpeft as jp
from jaxpeft import tree
from jaxpeft.backward import residuals
from jaxpeft.backward.flops import count_flops
from jaxpeft.backward.plan import Plan
from jaxpeft.backward.segments import recorded
from jaxpeft.errors import InputError
from jaxpeft.memory import planner, targets
from tests import tiny
from tests.backward.gradients import gradients, packed, same, start

ROWS, D = 4, 8
X = jax.random.normal(jax.random.key(0), (ROWS, D))
W = jax.random.normal(jax.random.key(1), (D, D)) / D**0.5
PRODUCT = 2 * ROWS * D * D
LATER = tuple(int(part) for part in jax.__version__.split(".")[:2]) >= (0, 12)


@pytest.fixture(params=[False, True], ids=["remat", "remat3"])
def flag(request):
    """Both implementations of jax.checkpoint, under a flag that is put back."""
    before = jax.config.jax_remat3
    jax.config.update("jax_remat3", request.param)
    yield request.param
    jax.config.update("jax_remat3", before)


def block(x, w):
    """Three products: up, down, and one without a name; their gradients need the inputs of each, tanh its output."""
    up = checkpoint_name(x @ w, "up")
    down = checkpoint_name(jnp.tanh(up) @ w, "down")
    return jnp.tanh(jnp.tanh(down) @ w)


def products(function):
    """Matrix products of a function's gradient; 3 forward and 6 backward are without recomputation."""
    return count_flops(jax.make_jaxpr(jax.grad(lambda w: function(X, w).sum()))(W)) / PRODUCT


NONE = products(block)


@pytest.mark.parametrize(
    ("plan", "again", "later"),
    [
        ("everything", 0, True),
        ("blocks", 3, False),
        ("matmuls", 0, True),
        ("up=save", 2, False),
        ("up=save,down=save", 1, False),
        ("block_input=save,down=save", 2, False),
        ("up=save,down=offload", 1, True),
        (Plan("blocks", (("down", "offload"),)), 2, True),
        ("matmuls,up=save", 0, True),
        ("offload", 0, True),
    ],
)
def test_what_is_computed_again(flag, plan, again, later):
    """By hand; `later`: what JAX 0.10 recomputes under its flag, as is documented."""
    run = jax.checkpoint(block, policy=jp.checkpoint_policy(plan))
    if not (flag and later and not LATER):
        assert products(run) - NONE == again
    wanted = jax.grad(lambda w: block(X, w).sum())(W)
    np.testing.assert_allclose(jax.jit(jax.grad(lambda w: run(X, w).sum()))(W), wanted, rtol=1e-5, atol=1e-6)


def test_a_block_says_which_names_spare_its_products(flag):
    """The last product has no name: up and down spare the other two. An action of a name comes on top."""
    policy = jp.checkpoint_policy("matmuls", block, X, jax.ShapeDtypeStruct(W.shape, W.dtype))
    assert products(jax.checkpoint(block, policy=policy)) - NONE == 1
    policy = jp.checkpoint_policy("matmuls,up=recompute", block, X, W)
    assert products(jax.checkpoint(block, policy=policy)) - NONE == 2


def test_what_is_offloaded_lies_in_the_hosts_memory():
    policy = jp.checkpoint_policy("down=offload")
    run = jax.checkpoint(block, policy=policy)
    text = str(jax.make_jaxpr(jax.grad(lambda w: run(X, w).sum()))(W))
    assert text.count("device_put[") == 2  # there and back
    assert "device_put[" not in str(jax.make_jaxpr(jax.grad(lambda w: block(X, w).sum()))(W))


@pytest.mark.parametrize(
    ("plan", "args", "words"),
    [
        ("compressed", (), "compressed cannot be: a policy says where a value lies, and changes none"),
        ("compressed12", (), "compressed12 cannot be: a policy says where a value lies, and changes none"),
        ("up=compress12", (), "up cannot be: a policy says where a value lies"),
        ("up=prune:0.5", (), "up cannot be: a policy says where a value lies"),
        ("up=compress", (), "up cannot be: a policy says where a value lies"),
        ("matmuls,tokens=4096", (), "tokens=4096 means nothing: it cannot divide rows"),
        ("blocks,tile=4096", (), "tile=4096 means nothing: it cannot divide tokens"),
        ("block_input=offload", (), "block_input is always saved"),
        ("matmuls,up=recompute", (), "up may be one; give the block and its arguments too"),
        ("offload,up=save", (), "give the block and its arguments too"),
        ("upp=save", (block, X, W), "no activation is called 'upp'; nearest: up"),
        ("matmul", (), "unknown preset 'matmul'"),
        ("blocks", (lambda x, w: (x, w), X, W), "the block gives 2 arrays; it should give one"),
    ],
)
def test_what_a_policy_cannot_do_is_one_line(plan, args, words):
    with pytest.raises(InputError, match=re.escape(words)) as error:
        jp.checkpoint_policy(plan, *args)
    assert "\n" not in str(error.value)


class Layer(nn.Module):
    """`block` in Linen."""

    @nn.compact
    def __call__(self, x):
        return block(x, self.param("w", lambda key: W))


class NnxLayer(nnx.Module):
    """`block` in NNX."""

    def __init__(self):
        self.w = nnx.Param(W)

    def __call__(self, x):
        return block(x, self.w[...])


@pytest.mark.parametrize("kind", ["linen", "nnx", "scan"])
def test_in_the_forms_that_take_a_policy(kind):
    """up is kept, down and the last product are computed again: nn.remat, nnx.remat, a scan over jax.checkpoint."""
    policy = jp.checkpoint_policy("up=save")
    if kind == "linen":
        layer = nn.remat(Layer, policy=policy)()
        function = lambda x, w: layer.apply({"params": {"w": w}}, x)
    elif kind == "nnx":
        graph, _ = nnx.split(NnxLayer())
        call = nnx.remat(lambda layer, x: layer(x), policy=policy)
        function = lambda x, w: call(nnx.merge(graph, nnx.State({"w": nnx.Param(w)})), x)
    else:
        body = jax.checkpoint(lambda x, w: (block(x, w), None), policy=policy, prevent_cse=False)
        function = lambda x, w: jax.lax.scan(body, x, w[None])[0]
    # A scan differentiates what it carries: the stream's gradient is a product more.
    assert products(function) - NONE == 2 + (kind == "scan")
    wanted = jax.grad(lambda w: block(X, w).sum())(W)
    np.testing.assert_allclose(jax.grad(lambda w: function(X, w).sum())(W), wanted, rtol=1e-5, atol=1e-6)


# The layers of a model.

QUANTIZED = jp.chain(jp.quantize("int8"), jp.lora(4))
METHODS = {"lora": jp.lora(4), "full": jp.full(), "last:1": jp.full("last:1"), "int8": QUANTIZED}


@pytest.mark.parametrize(
    ("method", "save"),
    [
        pytest.param("lora", "matmuls", marks=pytest.mark.slow),
        ("lora", "gate_proj=save,up_proj=offload"),
        ("full", "matmuls,attention=recompute"),
        pytest.param("last:1", "blocks", marks=pytest.mark.slow),
        pytest.param("int8", "matmuls", marks=pytest.mark.slow),
    ],
)
def test_a_model_under_a_policy_is_the_model_under_loops(method, save):
    """Gradients, what is kept by name, and the products of the whole step, recomputed ones among them."""
    model, trainable, frozen = start(METHODS[method])
    found = {}
    for form in residuals.FORMS:
        under = jp.remat(model, save if form == "policy" else f"{save},tokens=1024", form=form)
        step = jax.value_and_grad(lambda t: jp.completion_loss(under, tree.combine(t, frozen), packed())[0])  # noqa: B023
        with recorded() as segments:
            flops = count_flops(jax.make_jaxpr(step)(trainable))
        told = {name: (s.kept_bytes(), s.recompute_flops()) for name, s in segments.items()}
        found[form] = gradients(under, trainable, frozen, packed()), told, flops
    same(found["policy"][0], found["loops"][0])
    assert found["policy"][1:] == found["loops"][1:]


def test_jax_keeps_what_is_said_to_be_kept():
    """What the vjp of the loss closes over grows by the names that a plan adds, and by nothing else."""
    model, trainable, frozen = start(METHODS["lora"])
    sizes, told = {}, {}
    for save in ("blocks", "gate_proj=save,v_proj=save"):
        under = jp.remat(model, save, form="policy", trained=METHODS["lora"].changes)
        value = lambda t: jp.completion_loss(under, tree.combine(t, frozen), packed())[0]  # noqa: B023
        with recorded() as segments:
            kept = jax.eval_shape(lambda t: jax.vjp(value, t)[1], trainable)  # noqa: B023
        sizes[save], told[save] = tree.num_bytes(kept), sum(segments["layers"].kept_bytes()["device"].values())
    small, large = sizes
    assert sizes[large] - sizes[small] == told[large] - told[small] > 0


def test_a_model_under_a_policy_with_the_flag():
    """Made without it: JAX 0.10 has no batching of names there, which an initialisation of stacked layers needs."""
    made = start(METHODS["lora"])
    batch = tiny.batch()
    wanted = gradients(*made, batch)
    before = jax.config.jax_remat3
    try:
        jax.config.update("jax_remat3", True)
        same(gradients(jp.remat(made[0], "matmuls", form="policy"), *made[1:], batch), wanted)
    finally:
        jax.config.update("jax_remat3", before)


def test_refusals_of_a_model():
    model, trainable, frozen = start(METHODS["lora"])
    with pytest.raises(InputError, match="compressed cannot be"):
        jp.remat(model, "compressed", form="policy")
    with pytest.raises(InputError, match="--remat 'rings': unknown form; known: loops, policy"):
        jp.remat(model, "matmuls", form="rings")
    own = jp.from_linen(nn.Dense(3), {"inputs": X})
    with pytest.raises(InputError, match="this model runs no scan over stacked parameters"):
        jp.remat(own, "matmuls").apply(own.init(jax.random.key(0), {}), {"inputs": X})
    with pytest.raises(InputError, match="meft: this model shows no layers"):
        jp.setup(jp.meft(), own, own.init(jax.random.key(0), {}), jax.random.key(0))
    with pytest.raises(InputError, match="no activation is called 'gate'"):
        gradients(jp.remat(model, "gate=save", form="policy"), trainable, frozen, packed())


@pytest.mark.slow
def test_a_planned_step():
    """What a row of the plan says of both forms: the same kept bytes and products, one block's rows taken at once."""
    rows = {}
    for form in residuals.FORMS:
        step = planner.make_step(tiny.CONFIG, jp.lora(2), 4, 16, "blocks,gate_proj=save", jnp.float32, form=form)
        rows[form] = planner.row(step, targets.target("cpu"))
    policy, loops = rows["policy"], rows["loops"]
    assert (policy["remat"], loops["remat"]) == ("policy", "loops")
    assert policy["bytes"]["activations"] == loops["bytes"]["activations"] == 4 * 16 * 4 * 3 * (32 + 56)
    assert (policy["flops"], policy["recompute_flops"]) == (loops["flops"], loops["recompute_flops"])


@pytest.mark.slow
def test_a_run(tmp_path):
    """Its losses are those of the loops, its report names the form, and it is resumed under no other."""
    fields = {"rank": 2, "steps": 2, "batch_size": 2, "seq_len": 32, "samples": 0, "eval_every": 0, "save": "blocks"}
    reports = {form: jp.run(**fields, out=tmp_path / form, remat=form) for form in residuals.FORMS}
    assert [reports[form]["remat"] for form in residuals.FORMS] == list(residuals.FORMS)
    np.testing.assert_allclose(reports["policy"]["train_loss"], reports["loops"]["train_loss"], rtol=1e-5)
    with pytest.raises(InputError, match="--remat policy -> loops"):
        jp.run(**fields, out=tmp_path / "policy", resume=True)
