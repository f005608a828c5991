"""Pruned activations: the largest of each row to the bit, a norm's derivative from them, and what layers keep."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxpeft as jp
from jaxpeft.backward import norms, residuals
from jaxpeft.backward.plan import parse
from jaxpeft.backward.pruned import prune, spread
from jaxpeft.errors import InputError
from jaxpeft.models import bert, layers
from tests import tiny
from tests.backward.gradients import LAYERS, D, segments

NORMS = ("input_layernorm", "post_attention_layernorm")
DATA = np.random.default_rng(0)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize(
    ("shape", "share"), [((2, 5, 40), 0.1), ((3, 7, 300), 0.25), ((6, 2, 3, 8), 0.01), ((4, 9), 1)]
)
def test_the_largest_come_back_to_the_bit(shape, share, dtype):
    """And all others as zeros; k of n are the share, rounded up; each row has places of its own."""
    x = jnp.asarray(DATA.normal(size=shape), dtype)
    stored = jax.jit(prune, static_argnums=1)(x, share)
    found = np.asarray(jax.jit(spread, static_argnums=(1, 2))(stored, shape[-1], dtype), np.float64)
    wide, k = np.asarray(x, np.float64), math.ceil(share * shape[-1])
    assert stored.values.shape == stored.index.shape == (*shape[:-1], k)
    assert stored.values.dtype == dtype
    kept = found != 0
    np.testing.assert_array_equal(kept.sum(-1), k)
    np.testing.assert_array_equal(found, np.where(kept, wide, 0))
    least = np.where(kept, np.abs(wide), np.inf).min(-1)
    assert (least >= np.where(kept, 0, np.abs(wide)).max(-1)).all()


@pytest.mark.parametrize(
    ("n", "dtype"), [(2, "uint8"), (256, "uint8"), (257, "uint16"), (2**16, "uint16"), (2**16 + 1, "uint32")]
)
def test_a_place_takes_the_smallest_integer(n, dtype):
    assert (
        jax.eval_shape(functools.partial(prune, share=0.1), jax.ShapeDtypeStruct((1, n), "float32")).index.dtype
        == dtype
    )


# A norm's derivative.


def norm(kind):
    """(the module, its parameters, x (3, 5, 24) in float32)."""
    module = {"layer": layers.LayerNorm, "rms": layers.RMSNorm}[kind](1e-5, name="norm")
    draw = lambda *shape: jnp.asarray(DATA.normal(1, 0.5, shape), jnp.float32)
    params = {"scale": draw(24)} | ({"bias": draw(24)} if kind == "layer" else {})
    return module, {"params": params}, 3 * draw(3, 5, 24)


@pytest.mark.parametrize("kind", ["layer", "rms"])
def test_the_derivative_is_the_formula_by_what_is_read(kind):
    """By NumPy, of normalised rows of which some are zero; y is what it is without."""
    module, variables, x = norm(kind)
    dy = jnp.asarray(DATA.normal(size=x.shape), jnp.float32)
    scale, bias = variables["params"]["scale"], variables["params"].get("bias")
    centred = np.asarray(x, np.float64) - (np.mean(x, -1, keepdims=True) if bias is not None else 0)
    rstd = 1 / np.sqrt(np.mean(centred**2, -1) + 1e-5)
    n = np.where(DATA.random(x.shape) < 0.3, centred * rstd[..., None], 0)
    read = lambda x, scale, bias: norms.from_normalized(
        "norm", x, scale, bias, module.apply(variables, x), jnp.float32(n), jnp.float32(rstd)
    )
    y, pull = jax.vjp(read, x, scale, bias)
    np.testing.assert_array_equal(y, module.apply(variables, x))
    g = np.asarray(dy, np.float64) * np.asarray(scale)
    dx = g - n * np.mean(g * n, -1, keepdims=True) - (np.mean(g, -1, keepdims=True) if bias is not None else 0)
    d_x, d_scale, d_bias = pull(dy)
    np.testing.assert_allclose(d_x, rstd[..., None] * dx, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(d_scale, np.sum(dy * n, (0, 1)), rtol=1e-4, atol=1e-4)
    if bias is not None:
        np.testing.assert_allclose(d_bias, np.sum(dy, (0, 1)), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("kind", ["layer", "rms"])
def test_where_names_are_given_nothing_else_differs(kind):
    """y to the bit, and the derivative of autodiff."""
    module, variables, x = norm(kind)
    weights = jnp.asarray(DATA.normal(size=x.shape), jnp.float32)
    function = lambda variables, x: jnp.sum(weights * module.apply(variables, x))
    wanted = jax.grad(function, (0, 1))(variables, x)
    y = module.apply(variables, x)
    with norms.naming():
        np.testing.assert_array_equal(module.apply(variables, x), y)
        found = jax.grad(function, (0, 1))(variables, x)
    jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-4, atol=1e-5), found, wanted)


# In the layers.


ROWS, LENGTH, WIDTH = 4, 8, 40
SHARES = "product=save,norm_rstd=save,norm_normalized="


def block(layer, x, ctx):
    """A norm and a product, of which the backward pass reads a norm's two arrays and the product."""
    y = layers.LayerNorm(1e-5, name="norm").apply({"params": ctx}, x)
    return x + jnp.sin(jax.ad_checkpoint.checkpoint_name(y @ layer, "product"))


def gradient(plan, rows=ROWS, length=LENGTH, width=WIDTH):
    """x, stack (L, width, width) -> (value, dx) under a plan."""
    ctx = {"scale": jnp.linspace(0.5, 1.5, width), "bias": jnp.linspace(-1, 1, width)}
    objective = lambda x, stack: jnp.mean(jnp.sin(jp.planned_scan(block, stack, x, ctx, save=plan)))
    return jax.jit(jax.value_and_grad(objective))


def by_hand(x, stack, share):
    """dx where each norm's derivative reads so much of its rows, in NumPy's float64; of `gradient`."""
    scale, bias = np.linspace(0.5, 1.5, WIDTH), np.linspace(-1, 1, WIDTH)
    kept = []
    for w in np.asarray(stack, np.float64):
        centred = x - x.mean(-1, keepdims=True)
        rstd = 1 / np.sqrt((centred**2).mean(-1, keepdims=True) + 1e-5)
        n = centred * rstd
        least = np.sort(np.abs(n))[..., [-math.ceil(share * WIDTH)]]
        product = (n * scale + bias) @ w
        kept.append((w, rstd, np.where(np.abs(n) >= least, n, 0), product))
        x = x + np.sin(product)
    d = np.cos(x) / x.size
    for w, rstd, n, product in reversed(kept):
        g = (np.cos(product) * d) @ w.T * scale
        d = d + rstd * (g - g.mean(-1, keepdims=True) - n * (g * n).mean(-1, keepdims=True))
    return d


@pytest.mark.parametrize("share", [1, 0.1, 0.3])
def test_the_forward_pass_is_exact_and_the_backward_pass_reads_the_share(share):
    """A share of 1 is the exact gradient, any other that of the formula with zeros in the rows."""
    x = DATA.normal(size=(ROWS, LENGTH, WIDTH))
    stack = jnp.asarray(DATA.normal(size=(3, WIDTH, WIDTH)) / 8, jnp.float32)
    value, exact = gradient("matmuls")(jnp.float32(x), stack)
    same, found = gradient(f"{SHARES}prune:{share}")(jnp.float32(x), stack)
    assert value == same
    near = lambda a, b: np.linalg.norm(a - b) < 1e-5 * np.linalg.norm(b)
    assert near(found, by_hand(np.float64(np.float32(x)), stack, share))
    assert near(found, exact) == (share == 1)


def test_temporaries_are_those_of_the_formula():
    """Of what all layers keep: in float32, of 256 channels 26, with a byte for each one's place."""
    d, tokens = 256, 8 * 32

    def of_a_layer(action):
        made = gradient(SHARES + action, 8, 32, d)
        x = jax.ShapeDtypeStruct((8, 32, d), "float32")
        sizes = []
        for count in (8, 24):
            compiled = made.lower(x, jax.ShapeDtypeStruct((count, d, d), "float32")).compile()
            sizes.append(compiled.memory_analysis().temp_size_in_bytes)
        return (sizes[1] - sizes[0]) // 16

    product, rstd, counters = tokens * d * 4, tokens * 4, 8
    for action, of_a_token in {"save": 4 * d, "prune": 26 * (4 + 1)}.items():
        assert 0 <= of_a_layer(action) - (product + rstd + tokens * of_a_token) <= counters, action


def of_norms(action, names=NORMS):
    return ",".join(["matmuls", *(f"{name}_normalized={action}" for name in names)])


@pytest.mark.slow
def test_a_model_keeps_the_entries_and_no_more_what_its_norm_has_read():
    """Of 32 channels 4, each with a byte for its place, and one float32 of each row; no product is computed again."""
    [plain] = segments("lora_fa", "matmuls", dtype=jnp.bfloat16)
    [found] = segments("lora_fa", of_norms("prune", NORMS[1:]), dtype=jnp.bfloat16)
    before, kept = plain.kept_bytes()["device"], found.kept_bytes()["device"]
    tokens = LAYERS * 64
    stream = {"o_proj", "after_attention"} & before.keys()
    assert [before.pop(name) for name in stream] == [tokens * 2 * D]
    assert kept.pop("post_attention_layernorm_normalized") == tokens * 4 * (2 + 1)
    assert kept.pop("post_attention_layernorm_rstd") == tokens * 4
    assert kept == before
    assert found.recompute_flops() == plain.recompute_flops() == 0


def encoder():
    """(model, trainable, frozen) of a small BERT."""
    fields = {"model_type": "bert", "architectures": ["BertModel"], "vocab_size": 97, "hidden_size": 32}
    fields |= {"intermediate_size": 56, "num_hidden_layers": 2, "num_attention_heads": 4}
    base = bert.from_hf(fields)
    return jp.setup(jp.full(), base, base.init(jax.random.key(0), {}), jax.random.key(1))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("make", "names"),
    [
        (lambda: jp.setup(jp.full(), *tiny.model(), jax.random.key(0)), NORMS),
        (encoder, ("attention_norm", "output_norm")),
    ],
    ids=["decoder", "encoder"],
)
def test_in_models_a_whole_share_is_exact_and_a_tenth_is_near(make, names):
    """The loss is to the bit that without."""
    model, trainable, frozen = make()

    def loss(plan):
        planned = residuals.remat(model, plan)
        objective = lambda leaves: jnp.mean(jnp.sin(planned.hidden(jp.combine(leaves, frozen), tiny.batch(), None)))
        return jax.jit(jax.value_and_grad(objective))(trainable)

    (value, exact), *others = map(loss, ("matmuls", of_norms("prune:1", names), of_norms("prune", names)))
    length = lambda tree: math.sqrt(sum(float(jnp.sum(x * x)) for x in jax.tree.leaves(tree)))
    whole, near = (length(jax.tree.map(jnp.subtract, found, exact)) / length(exact) for _, found in others)
    assert all(same == value for same, _ in others)
    assert whole < 1e-4
    assert 1e-3 < near < 0.5


@pytest.mark.parametrize(
    ("word", "said"),
    [
        ("prune:0", "'norm=prune:0' should be NAME=ACTION with one of save, "),
        ("prune:1.5", "prune:SHARE has a share above 0, at most 1"),
        ("prune:", "prune:SHARE"),
        ("prune:x", "prune:SHARE"),
        ("compress:0.5", "prune:SHARE"),
    ],
)
def test_a_bad_share_is_one_line(word, said):
    with pytest.raises(InputError) as error:
        parse(f"matmuls,norm={word}")
    assert said in str(error.value)
    assert "\n" not in str(error.value)
