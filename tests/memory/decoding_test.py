"""What a step of decoding moves and holds, on programs compiled for devices that are not here."""

import dataclasses

import jax
import jax.numpy as jnp
import pytest

import jaxpeft as jp
from jaxpeft import generate, tree
from jaxpeft.errors import InputError
from jaxpeft.memory import aot, foreign, hlo, targets, traffic
from jaxpeft.models import decoder, geometries

pytestmark = pytest.mark.usefixtures("optimised")

LAYERS, ROWS, SLOTS = 24, 8, 1024  # so many layers are as fast to compile as two
GREEDY = (True, False)
CONFIG = dataclasses.replace(
    decoder.DecoderConfig.from_hf(geometries.load("llama3.2-1b"), jnp.bfloat16),
    num_hidden_layers=LAYERS,
    vocab_size=1024,
    head_dim=128,
    num_attention_heads=16,
)


def shape(*extents, dtype=jnp.int32):
    return jax.ShapeDtypeStruct(extents, dtype)


def size(leaves):
    return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(leaves))


def parts(method=None, config=CONFIG):
    """(the prompts' pass and its arguments, a step and its arguments)."""
    model, params = decoder.decoder(config), tree.unflatten(decoder.shapes(config))
    if method is not None:
        found = []

        def leaves(params):
            adapted, *flat = jp.setup(method, model, params, jax.random.key(0))
            found.append(adapted)
            return flat

        params = tree.combine(*jax.eval_shape(leaves, params))
        model = found[0]
    settings = {"temperature": shape(dtype=jnp.float32), "top_k": shape(), "top_p": shape(dtype=jnp.float32)}
    settings["ends"] = shape(1)
    batch = {name: shape(ROWS, SLOTS // 2) for name in ("tokens", "positions", "segment_ids")}
    key = jax.eval_shape(lambda: jax.random.key(0))

    def read(params, batch, settings, key, numbers):
        return generate._read.__wrapped__(model, SLOTS, GREEDY, params, batch, settings, key, numbers)

    def step(params, settings, state, until):
        return generate._steps.__wrapped__(model, GREEDY, params, settings, state, until)

    of_read = (params, {**batch, "limit": shape(ROWS)}, settings, key, shape(ROWS))
    return (read, of_read), (step, (params, settings, jax.eval_shape(read, *of_read), shape()))


def compiled(target, function, args, dump=None, donate=()):
    device = targets.target(target)
    try:
        targets.devices(device)
    except InputError as error:
        pytest.skip(str(error))
    return device, aot.compile(device, function, *args, donate_argnums=donate, dump=dump)


@pytest.mark.parametrize(
    ("target", "method"),
    [
        pytest.param("h200", None, marks=pytest.mark.slow),
        ("v5p", None),
        ("h200", jp.lora(16)),
        pytest.param("v5p", jp.lora(16), marks=pytest.mark.slow),
    ],
)
def test_a_token_moves_the_weights_once_the_cache_once_and_a_slot(tmp_path, target, method):
    _, (step, args) = parts(method)
    params, _, state, _ = args
    device, found = compiled(target, step, args, tmp_path, donate=(2,))
    cache = size([state["cache"][name] for name in "kv"])
    layer, slot = cache // LAYERS // 2, cache // SLOTS
    own = size(params) - size(decoder.shapes(CONFIG))  # adapters, which a TPU lays out anew before the first token
    assert found.memory.temporaries < layer / 2 + own  # no second cache, nor a layer of it
    program = hlo.read(tmp_path)
    moved = traffic.traffic(program, foreign.owners_of(program), foreign.ForeignAttribution, device)
    rows = [row for row in moved.rows if row.category == "cache"]
    assert sum(row.read for row in rows) <= 1.05 * cache
    # A TPU writes whole tiles: at most 128 slots of the values, whose last axis is the slots', and 16 of the keys.
    assert slot <= sum(row.written for row in rows) <= (128 + 16 if target == "v5p" else 1.1) * slot
    weights = [row for row in moved.rows if row.category in ("weights", "adapters")]
    assert sum(row.read for row in weights) <= 1.05 * size(params) and not sum(row.written for row in weights)
    kernel = min(leaf.size for path, leaf in tree.flatten(params["layers"]).items() if "kernel" in path) // LAYERS * 2
    assert not [copy for copy in moved.copies if copy.bytes / copy.times >= kernel / 2 and "_proj" in copy.op_name]


@pytest.mark.parametrize("target", ["h200", pytest.param("v5p", marks=pytest.mark.slow)])
def test_the_prompts_are_read_without_a_second_cache(target):
    (read, args), (_, (_, _, state, _)) = parts()
    _, found = compiled(target, read, args)
    cache = size([state["cache"][name] for name in "kv"])
    assert found.memory.total - found.memory.arguments - cache < cache / 2  # the activations of a layer


def test_a_cpu_keeps_one_cache_and_cuts_out_a_layer():
    _, (step, args) = parts(config=dataclasses.replace(CONFIG, dtype=jnp.float32))
    _, found = compiled("cpu", step, args, donate=(2,))
    cache = size([args[2]["cache"][name] for name in "kv"])
    assert found.memory.temporaries < 2 * (cache + size(args[0]["layers"])) / LAYERS
