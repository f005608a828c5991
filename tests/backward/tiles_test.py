"""The MLP by tiles of a row: the gradients of plain autodiff, and the bytes of one tile."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxpeft as jp
from jaxpeft.backward import residuals, tiles
from jaxpeft.backward.plan import parse
from jaxpeft.errors import InputError
from jaxpeft.memory import planner, targets
from jaxpeft.model import Context, Stack, by_token
from jaxpeft.models import geometries
from tests import sharding_test, tiny
from tests.backward.gradients import gradients, packed, plain, same


@pytest.mark.parametrize(
    ("method", "family", "save"),
    [
        ("lora", "llama", "blocks,tile=7,tokens=32"),  # 3 tiles of 6 tokens, 2 of zeros; in 2 groups of rows
        pytest.param("lora", "llama", "matmuls,tile=5", marks=pytest.mark.slow),  # 4 tiles of 4 tokens
        pytest.param("full", "tied", "q_rotary=save,after_attention=compress12,tile=7", marks=pytest.mark.slow),
        pytest.param("last:1", "llama", "offload,tile=3,tokens=1", marks=pytest.mark.slow),
        pytest.param("lora_fa seed", "qwen3", "blocks,block_input=offload,tile=16", marks=pytest.mark.slow),
        pytest.param("qlora", "windows by layer", "blocks,tile=8", marks=pytest.mark.slow),
    ],
)
def test_gradients_are_those_of_plain_autodiff(method, family, save):
    (model, trainable, frozen), wanted = plain(method, family)
    # Rounding to bfloat16's 8 bits is what compress12 adds to activations in float32.
    same(gradients(residuals.remat(model, save), trainable, frozen, packed()), wanted, 2**-5 if "12" in save else 1e-5)


def test_each_tile_draws_its_own_masks():
    """The values and gradients of a part with dropout, from masks drawn here tile by tile."""

    def dropped(layer, x, ctx, cache, segment):
        return x * layer["w"] * jax.random.bernoulli(ctx.key, 0.5, x.shape), cache

    stack = Stack(None, dropped, None, None, parts=(by_token(dropped),))
    block = tiles.tiled(stack, 2)
    x, w, key = np.arange(1.0, 25).reshape(2, 6, 2).astype(np.float32), np.float32([2, 3]), jax.random.key(1)
    masks = [np.asarray(jax.random.bernoulli(jax.random.fold_in(key, n), 0.5, (2, 2, 2))) for n in range(3)]
    mask = np.concatenate(masks, axis=1)
    assert not np.array_equal(masks[0], masks[1])

    def of(w, x):
        return block({"w": w}, x, Context(layer=jnp.int32(0), key=key), None, "layers")[0]

    y, pull = jax.vjp(of, w, x)
    np.testing.assert_array_equal(y, x * w * mask)
    d_w, d_x = pull(jnp.asarray(x))
    np.testing.assert_allclose(d_w, (x * x * mask).sum((0, 1)), rtol=1e-6)
    np.testing.assert_array_equal(d_x, x * w * mask)


@pytest.mark.slow
def test_products_are_counted_as_those_that_blocks_computes_again():
    """The MLP's products, forward and again; under `matmuls` gate and up are what tiles compute again."""
    config = geometries.load("llama2-7b") | {"num_hidden_layers": 2}
    found = {}
    for save in ("blocks", "blocks,tile=16", "matmuls,tile=16"):
        traced = planner.cost(planner.make_step(config, jp.lora(8, targets="mlp"), 1, 64, save, packed=False))
        found[save] = (traced.flops, traced.recompute_flops)
    assert found["blocks,tile=16"] == found["blocks"]
    tokens, (n, m), layers, rank = 64, (4096, 11008), 2, 8
    gate, low = 2 * tokens * n * m, 2 * tokens * rank * (n + m)  # W x, and B (A x)
    below = 2 * tokens * rank * m  # of down: A x, which the gradient of its B reads
    again = layers * (2 * (gate + low) + below)
    assert found["matmuls,tile=16"][1] == again


REFUSED = {
    "positions": (lambda: jp.loreft(2, positions="f1+l1"), "takes tokens one by one"),
    "experts": (lambda: jp.mixlora(2), "takes tokens one by one"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_reads_other_tokens_is_refused(name):
    make, says = REFUSED[name]
    base, params = tiny.model()
    model, trainable, rest = jp.setup(make(), base, params, jax.random.key(0))
    remat = residuals.remat(model, "blocks,tile=4")
    with pytest.raises(InputError, match=re.escape(says)) as error:
        jax.eval_shape(lambda params: remat.hidden(params, tiny.batch()), {**jp.combine(trainable, rest)})
    assert "--save blocks,tile=4: tile=4" in str(error.value) and "\n" not in str(error.value)


def test_loops_of_ones_own_are_refused():
    with pytest.raises(InputError, match="tile=4 is of this library's models"):
        jp.planned_scan(lambda part, x, ctx: x * part, jnp.ones((2, 3)), jnp.ones((1, 8, 3)), save="blocks,tile=4")
    with pytest.raises(InputError, match="tile=4 means nothing"):
        jp.checkpoint_policy("blocks,tile=4")
    assert parse("blocks,tile=4") == parse(str(parse("blocks,tile=4")))


@pytest.mark.slow
def test_gradients_on_a_mesh():
    """Tiles of the tokens of every device; the differences are those of sums in another order."""
    meshes = ["seq=8", "fsdp=2,tensor=2,seq=2"]
    found = sharding_test.on_meshes({"lora blocks,tile=3": meshes})["lora blocks,tile=3"]
    for mesh in meshes:
        np.testing.assert_allclose(found[mesh]["losses"], found["one"]["losses"], rtol=1e-5)
        assert found[mesh]["leaves"] < 1e-3


@pytest.mark.slow
@pytest.mark.parametrize("target", ["h200", "v5e"])
def test_what_the_mlp_needs_is_that_of_a_tile(target):
    """Three arrays of the MLP's width, of all tokens, are spared at least: gate, up, a gradient."""
    config, length, tile = geometries.load("llama3.2-1b"), 16384, 2048
    config |= {"num_hidden_layers": 2}

    def temporaries(save):
        step = planner.make_step(config, jp.lora(8), 1, length, save, packed=False)
        return planner.row(step, targets.target(target), planner.cost(step))["bytes"]["workspace"]

    width = 2 * config["intermediate_size"]  # bytes of a token
    assert temporaries("blocks") - temporaries(f"blocks,tile={tile}") > 3 * width * (length - tile)
