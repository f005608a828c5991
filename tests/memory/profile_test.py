import json
import re
import xml.etree.ElementTree
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import jaxpeft as jp
from jaxpeft import tree
from jaxpeft.backward import residuals
from jaxpeft.errors import InputError
from jaxpeft.memory import aot, draw, hlo, profile, targets
from jaxpeft.models import decoder, layers
from jaxpeft.train.step import in_place
from tests import tiny

TARGETS = ("cpu", "v5p", "h200")


pytestmark = pytest.mark.usefixtures("optimised")


def compiled(name, function, *args, dump, donate=()):
    try:
        device = targets.devices(targets.target(name))[0]
    except InputError as error:
        pytest.skip(str(error))
    where = jax.sharding.SingleDeviceSharding(device)
    jitted = jax.jit(function, in_shardings=where, out_shardings=where, donate_argnums=donate)
    with aot.without_cache():  # which other tests of this process may have in use
        return jitted.lower(*args).compile(compiler_options={"xla_dump_to": str(dump), **hlo.DUMP_OPTIONS})


def f32(*shape):
    return jax.ShapeDtypeStruct(shape, jnp.float32)


# A chain whose answer is known.

LAYERS, TOKENS, WIDTH = 6, 65536, 256  # what is kept is too large for a TPU's VMEM, which is no part of the profile
CHAIN = profile.Owners([profile.Owner("weights", "w"), profile.Owner("batch", "x")], [profile.Owner("gradients", "w")])


def chain_loss(w, x):
    """x -> tanh(x w), layer by layer. Kept by the rule below: each tanh, and nothing else."""

    @jax.custom_vjp
    def layer(x, w):
        return jnp.tanh(x @ w)

    def forward(x, w):
        y = layer(x, w)
        return y, (x, y, w)

    def backward(kept, d):
        x, y, w = kept
        d = d * (1 - y * y)
        return d @ w.T, x.T @ d

    layer.defvjp(forward, backward)
    return jnp.sum(jax.lax.scan(lambda x, w: (layer(x, w), None), x, w)[0])


@pytest.mark.parametrize("name", TARGETS)
def test_a_chain_is_what_it_is_by_hand(name, tmp_path):
    args = f32(LAYERS, WIDTH, WIDTH), f32(TOKENS, WIDTH)
    executable = compiled(name, jax.grad(chain_loss), *args, dump=tmp_path)
    found = profile.read(tmp_path, CHAIN)
    sizes = found.categories

    weights = 4 * LAYERS * WIDTH * WIDTH
    assert sizes["weights"] == sizes["gradients"] == weights
    assert sizes["batch"] == 4 * TOKENS * WIDTH
    # The layer's input and output, stacked; a TPU keeps the input as the bfloat16 that its product takes.
    one = LAYERS * TOKENS * WIDTH
    assert sizes["saved activations"] == {"cpu": 8, "h200": 8, "v5p": 6}[name] * one
    assert sizes.get("unattributed", 0) == 0
    assert sum(sizes.values()) == found.total_bytes

    analysis = executable.memory_analysis()
    needed = analysis.argument_size_in_bytes + analysis.output_size_in_bytes - analysis.alias_size_in_bytes
    if name == "v5p":  # its temp_size is not that of the assignment; its peak is that of the arrays alone
        assert abs(found.live_bytes - analysis.peak_memory_in_bytes) <= 1024
    else:
        assert found.total_bytes - sizes.get("constants", 0) == needed + analysis.temp_size_in_bytes


@pytest.mark.parametrize("name", TARGETS)
def test_scopes_name_what_is_kept(name, tmp_path):
    """A loop that stores, reads and accumulates under the scopes of a memory plan."""

    def step(w, x):
        kept = jnp.zeros((LAYERS, TOKENS, WIDTH))

        def forward(carry, inputs):
            x, kept = carry
            i, w = inputs
            with jax.named_scope("save:block_input"):
                kept = jax.lax.dynamic_update_index_in_dim(kept, x, i, 0)
            return (jnp.tanh(x @ w), kept), None

        (y, kept), _ = jax.lax.scan(forward, (x, kept), (jnp.arange(LAYERS), w))

        def backward(carry, inputs):
            d, total = carry
            i, w = inputs
            with jax.named_scope("read:block_input"):
                x = jax.lax.dynamic_index_in_dim(kept, i, 0, keepdims=False)
            y = jnp.tanh(x @ w)
            d = d * (1 - y * y)
            with jax.named_scope("grad:layers/w"):
                total = jax.lax.dynamic_update_index_in_dim(total, x.T @ d, i, 0)
            return (d @ w.T, total), None

        (_, total), _ = jax.lax.scan(backward, (y, jnp.zeros_like(w)), (jnp.arange(LAYERS), w), reverse=True)
        return w - 0.1 * total / jnp.linalg.norm(total)

    args = f32(LAYERS, WIDTH, WIDTH), f32(TOKENS, WIDTH)
    compiled(name, step, *args, dump=tmp_path)
    found = profile.read(tmp_path, CHAIN._replace(outputs=[profile.Owner("weights", "w")]))
    (kept,) = [buffer for buffer in found.buffers if buffer.shape.endswith(f"[{LAYERS},{TOKENS},{WIDTH}]")]
    assert kept.category == "saved activations" and kept.activation == "block_input"
    assert kept.bytes == {"f32": 4, "bf16": 2}[kept.shape.split("[")[0]] * LAYERS * TOKENS * WIDTH
    assert found.unattributed_bytes == 0
    gradients = [buffer for buffer in found.buffers if buffer.category == "gradients"]
    assert all(buffer.module == "layers/w" for buffer in gradients)


# A LoRA step, in whose blocks an activation is left without a name.

ROWS, LENGTH, RANK, ODD = 4, 256, 4, 72  # no other array has an axis of ODD
SIZES = {"hidden_size": 64, "intermediate_size": 160, "max_position_embeddings": LENGTH}


class OddMLP(layers.GatedMLP):
    """Adds sum(tanh(x W)^2): autodiff keeps the tanh."""

    @nn.compact
    def __call__(self, x):
        odd = self.param("odd", nn.initializers.normal(), (x.shape[-1], ODD))
        y = jnp.tanh(x @ odd.astype(x.dtype))
        return super().__call__(x) + jnp.sum(y * y, -1, keepdims=True)


class Step(NamedTuple):
    analysis: Any
    state: Any
    batch: Any
    found: profile.Profile


def odd_step(target, dump, save="everything"):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(decoder, "GatedMLP", OddMLP)
        base = decoder.decoder(tiny.config(jnp.float32, **SIZES))
        method, optimizer, made = jp.lora(rank=RANK, targets="all-linear"), optax.adamw(1e-3), []

        def init(key):
            params = base.init(key, {})
            model, trainable, frozen = jp.setup(method, base, params, key)
            made.append((residuals.remat(model, save), list(tree.flatten(params))))
            return jp.init_state(method, optimizer, trainable, frozen, key)

        state = jax.eval_shape(init, jax.random.key(0))
        model, paths = made[0]
        batch = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), tiny.batch(ROWS, LENGTH))
        step = jp.make_train_step(model, method, optimizer)
        executable = compiled(target, in_place(step), *state.parted, batch, dump=dump, donate=0)
        owners = profile.step_owners(state, batch, paths, jax.eval_shape(step, state, batch)[1])
    return Step(executable.memory_analysis(), state, batch, profile.read(dump, owners))


@pytest.fixture(scope="module", params=[pytest.param("cpu", marks=pytest.mark.slow), *TARGETS[1:]])
def lora(request, tmp_path_factory):
    """(name of the target, Step): compiled once for both tests of it."""
    return request.param, odd_step(request.param, tmp_path_factory.mktemp(request.param))


def num_bytes(leaves):
    return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(leaves))


def test_a_lora_step_is_attributed(lora):
    name, (analysis, state, batch, found) = lora
    sizes = found.categories
    assert found.platform == {"cpu": "cpu", "v5p": "tpu", "h200": "gpu"}[name]
    assert sum(sizes.values()) == found.total_bytes
    assert found.unattributed_bytes <= 0.02 * found.live_bytes
    arrays = [buffer for buffer in found.buffers if buffer.category not in ("alignment", "fragmentation")]
    assert sum(buffer.bytes for buffer in arrays if buffer.module) >= 0.98 * found.live_bytes
    assert sum(buffer.bytes for buffer in found.buffers if not buffer.module) <= 0.02 * found.total_bytes
    # Of each layer at least: both norms' inputs and outputs, queries, attention's output; gate, up and their product.
    numbers = 3 * ROWS * LENGTH * (6 * 64 + 3 * 160)
    assert sizes["saved activations"] >= {"cpu": 4, "h200": 4, "v5p": 2}[name] * numbers
    if name != "v5p":  # a TPU pads arrays to its tiles, and its temp_size is not that of the assignment
        assert sizes["weights"] == num_bytes(state.frozen)
        assert sizes["adapters"] == num_bytes(state.trainable)
        assert sizes["batch"] == num_bytes(batch)
        needed = analysis.argument_size_in_bytes + analysis.output_size_in_bytes - analysis.alias_size_in_bytes
        assert found.total_bytes - sizes.get("constants", 0) == needed + analysis.temp_size_in_bytes
    kept = [buffer for buffer in found.buffers if buffer.category == "saved activations"]
    paths = [path.rsplit("/", 1)[0] for path in (*state.frozen, *state.trainable)]
    modules = {"/".join(path.split("/")[:n]) for path in paths for n in range(1, path.count("/") + 2)}
    assert sum(b.bytes for b in kept if b.module in modules) >= 0.98 * sum(b.bytes for b in kept)
    (gate,) = [buffer for buffer in kept if buffer.activation == "gate_proj"]
    assert gate.module == "layers/mlp/gate_proj"
    assert gate.bytes >= {"f32": 4, "bf16": 2}[gate.shape.split("[")[0]] * 3 * ROWS * LENGTH * 160


def test_points_at_an_activation_that_has_no_name(lora):
    name, step = lora
    unnamed = [b for b in profile.to_json(step.found)["unnamed_activations"] if str(ODD) in b["shape"]]
    assert unnamed and all(b["module"] == "layers/mlp" for b in unnamed)
    assert any(b["op_name"].endswith("tanh") for b in unnamed)
    for array in unnamed:
        kind, dims = array["shape"].removesuffix("]").split("[")
        assert sorted(map(int, dims.split(","))) == sorted((3, ROWS, LENGTH, ODD))
        exact = {"f32": 4, "bf16": 2}[kind] * 3 * ROWS * LENGTH * ODD
        assert array["bytes"] == exact or (name == "v5p" and array["bytes"] > exact)
    owners = [row["owner"] for row in profile.table(step.found, 1000)]
    assert any(owner.startswith("layers/mlp: unnamed tanh ") for owner in owners)


@pytest.mark.parametrize("name", [pytest.param("cpu", marks=pytest.mark.slow), "h200"])
def test_nothing_without_a_name_is_kept_under_a_plan(name, tmp_path):
    """The tanh, and the product under it, are computed again; what is left is all layers': the rotary tables."""
    found = odd_step(name, tmp_path, "matmuls").found
    kept = [buffer for buffer in found.buffers if buffer.category == "saved activations"]
    names = {buffer.activation for buffer in kept}
    assert {"block_input", "gate_proj", "up_proj", "q_proj", "k_proj", "v_proj"} <= names
    # No stack of it, in layers x groups or rows in any order.
    assert not [buffer for buffer in kept if str(ODD) in buffer.shape]
    unnamed = profile.to_json(found)["unnamed_activations"]
    of_tokens = [array for array in unnamed if array["bytes"] >= ROWS * LENGTH]
    assert not [array for array in of_tokens if array["module"].startswith("layers")]
    assert sum(array["bytes"] for array in unnamed) <= 0.02 * found.categories["saved activations"]
    assert found.unattributed_bytes <= 0.02 * found.live_bytes


# What is written of it.


def small_profile(tmp_path):
    compiled("cpu", jax.grad(chain_loss), f32(LAYERS, WIDTH, WIDTH), f32(TOKENS, WIDTH), dump=tmp_path)
    return profile.read(tmp_path, CHAIN)


def test_table_and_json_add_up(tmp_path):
    found = small_profile(tmp_path)
    rows = profile.table(found, 3)
    assert len(rows) == 4
    assert sum(row["bytes"] for row in rows) == found.total_bytes
    assert sum(row["arrays"] for row in rows) == sum(buffer.arrays for buffer in found.buffers)
    said = json.loads(json.dumps(profile.to_json(found)))
    assert sum(said["categories"].values()) == said["total_bytes"] == found.total_bytes
    assert max(sum(live.values()) for _, live in found.timeline) == said["live_bytes"]


def test_treemap_has_the_areas_of_its_bytes(tmp_path):
    found = small_profile(tmp_path)
    tiles = draw.tiles(found, 300.0, 200.0)
    assert sum(tile.bytes for tile in tiles) == found.total_bytes
    for tile in tiles:
        assert tile.width * tile.height == pytest.approx(60_000 * tile.bytes / found.total_bytes, rel=1e-6)
        assert tile.x >= -1e-9 and tile.x + tile.width <= 300 + 1e-6 and tile.y + tile.height <= 200 + 1e-6
    # Figure 5 of the treemap paper: a 6 x 4 rectangle begins with the two largest, each 3 x 2.
    assert np.allclose(draw.squarify([6, 6, 4, 3, 2, 2, 1], 0, 0, 6, 4)[:2], [(0, 0, 3, 2), (0, 2, 3, 2)])


def test_page_is_self_contained_and_escaped(tmp_path):
    found = small_profile(tmp_path / "dump")
    draw.write_html(found, tmp_path / "page.html", title="<b> & co")
    draw.write_png(found, tmp_path / "page.png")
    page = (tmp_path / "page.html").read_text()
    assert "&lt;b&gt; &amp; co" in page and "<b> & co" not in page
    assert not re.search(r"(src|href)\s*=|@import|url\(http", page)
    pictures = [xml.etree.ElementTree.fromstring(svg) for svg in re.findall(r"<svg.*?</svg>", page, re.DOTALL)]
    assert len(pictures) == 2
    assert f"{4 * LAYERS * WIDTH * WIDTH:,} bytes" in page  # in a tooltip
    assert (tmp_path / "page.png").read_bytes().startswith(b"\x89PNG")


# Mistakes.


def test_folder_without_dumps(tmp_path):
    with pytest.raises(InputError, match="no .*after_optimizations.hlo.pb"):
        profile.read(tmp_path, CHAIN)


def test_damaged_dump(tmp_path):
    compiled("cpu", lambda x: x + 1, f32(8), dump=tmp_path)
    (path,) = tmp_path.glob("*after_optimizations.hlo.pb")
    path.write_bytes(path.read_bytes()[:100] + b"\xff")
    with pytest.raises(InputError, match="damaged or cut short"):
        profile.read(tmp_path, CHAIN)


def test_owners_of_another_function(tmp_path):
    compiled("cpu", jax.grad(chain_loss), f32(LAYERS, WIDTH, WIDTH), f32(TOKENS, WIDTH), dump=tmp_path)
    with pytest.raises(InputError, match="3 arguments, the compiled function has 2"):
        profile.read(tmp_path, CHAIN._replace(arguments=[profile.Owner("weights")] * 3))
    with pytest.raises(InputError, match="2 results, the compiled function has 1"):
        profile.read(tmp_path, CHAIN._replace(outputs=[profile.Owner("weights")] * 2))


def test_arguments_that_jit_drops_are_found_by_name(tmp_path):
    def function(state, batch):
        return state["b"] * 2 + batch["x"]

    args = {"a": f32(512, 8), "b": f32(1024, 8)}, {"x": f32(1024, 8)}
    compiled("cpu", function, *args, dump=tmp_path)
    arguments = [profile.Owner("weights", "a"), profile.Owner("adapters", "b"), profile.Owner("batch", "x")]
    owners = profile.Owners(arguments, [profile.Owner("loss")], names=["['a']", "['b']", "['x']"])
    sizes = profile.read(tmp_path, owners).categories
    assert sizes["adapters"] == sizes["batch"] == sizes["loss"] == 4 * 1024 * 8 and "weights" not in sizes
