"""Programs that know nothing of the library, whose owners are known by construction."""

import functools

import jax
import jax.numpy as jnp
import optax
import pytest

import jaxpeft as jp
from jaxpeft.errors import InputError
from jaxpeft.memory import foreign, hlo, profile, targets

pytestmark = pytest.mark.usefixtures("optimised")

ROWS, WIDTH, HIDDEN, CLASSES = 512, 64, 384, 24  # no two arrays of a different kind have one shape
PARAMS = 4 * (WIDTH * HIDDEN + HIDDEN * CLASSES)


def f32(*shape):
    return jax.ShapeDtypeStruct(shape, jnp.float32)


SHAPES = {"first": f32(WIDTH, HIDDEN), "second": f32(HIDDEN, CLASSES)}
BATCH = {"x": f32(ROWS, WIDTH), "y": f32(ROWS, CLASSES)}


def mean_square(params, batch):
    hidden = jnp.tanh(batch["x"] @ params["first"])
    return jnp.mean((hidden @ params["second"] - batch["y"]) ** 2)


adam = optax.adam(1e-3)


def train(params, opt_state, batch):
    value, grads = jax.value_and_grad(mean_square)(params, batch)
    # A norm of all gradients has them all at once.
    grads = jax.tree.map(lambda g: g / optax.global_norm(grads), grads)
    updates, opt_state = adam.update(grads, opt_state, params)
    return optax.apply_updates(params, updates), opt_state, value


def looked_at(function, *args, target="cpu", **options):
    try:
        targets.devices(targets.target(target))
    except InputError as error:
        pytest.skip(str(error))
    return jp.profile(function, *args, target=target, **options)


def explained(found):
    return 1 - found.unattributed_bytes / found.total_bytes


@pytest.mark.parametrize("target", ["cpu", "h200"])
def test_a_step_of_adam_is_what_it_is_by_hand(target):
    opt_state = jax.eval_shape(adam.init, SHAPES)
    found = looked_at(train, SHAPES, opt_state, BATCH, target=target, donate_argnums=(0, 1))
    sizes = found.categories
    assert sizes["weights"] == PARAMS
    assert sizes["optimizer"] == 2 * PARAMS + 4  # and the count
    assert sizes["batch"] == 4 * ROWS * (WIDTH + CLASSES)
    assert explained(found) >= 0.98 and sum(sizes.values()) == found.total_bytes
    of = {b.module: b for b in found.buffers if b.category in ("weights", "optimizer")}
    assert of["params/first"].bytes == 4 * WIDTH * HIDDEN
    assert of["opt_state/0/mu/second"].category == "optimizer"
    live = max(at.get("saved activations", 0) for _, at in found.timeline)
    assert live >= 4 * ROWS * HIDDEN  # the tanh, from its making to the backward pass
    kept = max(at.get("gradients", 0) for _, at in found.timeline)
    # A GPU's compiler may sum a gradient's parts within the update, in place; it is no array then.
    assert kept == PARAMS if target == "cpu" else 0 < kept <= PARAMS
    gradients = {b.shape for b in found.buffers if b.category == "gradients"}
    assert gradients <= {f"f32[{WIDTH},{HIDDEN}]", f"f32[{HIDDEN},{CLASSES}]"}


def test_what_is_not_donated_is_there_twice():
    opt_state = jax.eval_shape(adam.init, SHAPES)
    found = looked_at(train, SHAPES, opt_state, BATCH)
    assert found.categories["weights"] == 2 * PARAMS
    assert found.categories["optimizer"] == 2 * (2 * PARAMS + 4)
    owners = {buffer.module for buffer in found.buffers}
    assert {"params/first", "output/0/first", "output/1/0/mu/first"} <= owners


def test_a_jitted_function_donates_as_it_says():
    jitted = jax.jit(train, donate_argnums=(0, 1))
    opt_state = jax.eval_shape(adam.init, SHAPES)
    assert jp.plan(jitted, SHAPES, opt_state, BATCH)["aliases"] == 3 * PARAMS + 4
    assert looked_at(jitted, SHAPES, opt_state, BATCH).categories["weights"] == PARAMS


def test_results_of_a_gradient_are_gradients():
    found = looked_at(jax.value_and_grad(mean_square), SHAPES, BATCH)
    assert found.categories["gradients"] == PARAMS
    assert found.categories["weights"] == PARAMS


def test_an_activation_of_a_leafs_shape_is_no_gradient():
    """Rows as many as there are features: the derivative of the hidden rows has the shape of a kernel."""
    square = {"first": f32(WIDTH, WIDTH), "second": f32(WIDTH, WIDTH)}
    batch = {"x": f32(WIDTH, WIDTH), "y": f32(WIDTH, WIDTH)}
    found = looked_at(jax.grad(mean_square), square, batch)
    assert max(at.get("gradients", 0) for _, at in found.timeline) == 2 * 4 * WIDTH * WIDTH


def test_categories_are_the_users():
    named = {"params/first": "adapters", "batch/y": "constants"}
    found = looked_at(jax.grad(mean_square), SHAPES, BATCH, categories=named.get)
    assert found.categories["adapters"] == 4 * WIDTH * HIDDEN
    assert found.categories["weights"] == 4 * HIDDEN * CLASSES
    with pytest.raises(InputError, match="categories.'params/first'. is 'mine': must be None or one of weights"):
        jp.profile(jax.grad(mean_square), SHAPES, BATCH, categories=lambda path: "mine")


def test_a_line_of_code_stands_for_a_scope():
    found = looked_at(jax.grad(mean_square), SHAPES, BATCH)
    owners = " ".join(row["owner"] for row in found.table(100))
    assert "functions_test.py:" in owners and "mean_square" in owners


def test_the_plan_is_the_compilers():
    @functools.partial(jax.jit, static_argnums=1)
    def product(x, times):
        return x @ x.T * times

    made = jp.plan(product, f32(64, 32), 3, static_argnums=1)
    assert made["arguments"] == 4 * 64 * 32 and made["outputs"] == 4 * 64 * 64
    assert made["flops"] == 2 * 64 * 64 * 32 and made["fits"]
    assert made["total"] == made["arguments"] + made["outputs"] - made["aliases"] + made["temporaries"]


def test_text_page_and_picture(tmp_path):
    found = looked_at(jax.grad(mean_square), SHAPES, BATCH)
    assert "params/first" in str(found) and "weights" in str(found)
    found.write_html(tmp_path / "page.html")
    found.write_png(tmp_path / "page.png")
    assert "mean_square on cpu" in (tmp_path / "page.html").read_text()
    assert sum(found.to_json()["categories"].values()) == found.total_bytes


def test_a_dump_tells_by_itself(tmp_path):
    jp.profile(jax.grad(mean_square), SHAPES, BATCH, dump=tmp_path)
    program = hlo.read(tmp_path, "mean_square")
    found = profile.profile(program, foreign.owners_of(program), foreign.ForeignAttribution)
    assert found.categories["weights"] == found.categories["gradients"] == PARAMS
    with pytest.raises(InputError, match="no module is called 'other'; known: jit_mean_square"):
        hlo.read(tmp_path, "other")


def test_a_mistake_is_one_line_and_the_functions_own_errors_are_its_own():
    with pytest.raises(InputError, match="target 'h2000' is not known"):
        jp.profile(mean_square, SHAPES, BATCH, target="h2000")
    with pytest.raises(KeyError, match="second"):
        jp.plan(mean_square, {"first": SHAPES["first"]}, BATCH)


@pytest.mark.parametrize(
    ("name", "path", "category"),
    [
        ("state.params['layers']['kernel']", "state/params/layers/kernel", "weights"),
        ("opt_state[0].mu['w']", "opt_state/0/mu/w", "optimizer"),
        ("state['a']['kernel'].value", "state/a/kernel/value", "weights"),
        ("params['x']['lora_a']", "params/x/lora_a", "adapters"),
        ("batch['tokens']", "batch/tokens", "batch"),
        ("x", "x", "arguments"),
    ],
)
def test_paths_and_guesses(name, path, category):
    assert foreign.path_of(name) == path and foreign.guess(path) == category


def test_a_dump_beside_another_is_refused(tmp_path):
    """The largest program of a folder is read: another one there would be taken for this."""
    (tmp_path / "other.txt").write_text("")
    with pytest.raises(InputError, match=f"dump {tmp_path}: already exists; give a new or empty folder"):
        jp.profile(mean_square, SHAPES, BATCH, dump=tmp_path)
