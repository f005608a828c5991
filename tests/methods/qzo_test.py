"""QZO: its steps in numpy from unpacked codes, its clip and its bound, other formats, its memory, its refusals."""

import functools
import importlib.util

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxpeft as jp
from jaxpeft import tree
from jaxpeft.errors import Notice
from jaxpeft.memory import aot, planner, targets
from jaxpeft.models import geometries
from jaxpeft.quant import dense, pack_affine
from jaxpeft.train.step import objective_of
from pallas_kernels.packed import unpack
from tests import tiny
from tests.methods.estimates import BATCH, SGD, start, z_of_step

EPS, RATE = 1e-3, 1e-2
GROUPS = 4  # of 32 inputs, groups of 8


def weights_of(state, scales):
    """The plain model: s v(c) of all sites by hand; codes of int4 less 8, of int8 as they are."""
    flat = dict(state.frozen)
    for path, s in scales.items():
        at = path.replace("/qzo/scales", "/kernel")
        kernel = flat[at]
        if kernel.format == "int8":
            codes = np.asarray(kernel.codes, np.float32)
        else:
            codes = np.stack([np.asarray(unpack(one), np.float32) - 8 for one in kernel.codes])
        flat[at] = jnp.asarray(codes * np.repeat(s, codes.shape[1] // s.shape[1], axis=1), jnp.float32)
    return tree.unflatten(flat)


def numbers(state, scales, z, relative):
    """(mean of both losses, derivative) at s +- eps d by the plain model."""
    base, _ = tiny.model(num_hidden_layers=1)
    loss = jax.jit(lambda params: jp.completion_loss(base, params, BATCH)[0])
    along = {path: z[path] * (s if relative else 1) for path, s in scales.items()}
    up, down = (
        float(loss(weights_of(state, {path: np.asarray(s) + sign * EPS * along[path] for path, s in scales.items()})))
        for sign in (1, -1)
    )
    return along, (up + down) / 2, (up - down) / (2 * EPS)


@pytest.mark.parametrize(("format", "relative", "clip"), [("int4", False, 100.0), ("int8", True, 0.01)])
def test_a_step_is_that_of_plain_weights_in_numpy(format, relative, clip):
    """Codes and everything else stay as they are, bit by bit."""
    method = jp.chain(jp.quantize(format, group=8), jp.qzo(eps=EPS, relative=relative, clip=clip))
    model, state = start(method, num_hidden_layers=1)
    assert not state.trainable and {path.rsplit("/", 2)[1] for path in state.moved} == {"qzo"}
    assert state.moved["layers/self_attn/q_proj/qzo/scales"].shape == (1, GROUPS, 32)
    along, mean, slope = numbers(state, state.moved, z_of_step(state.moved), relative)
    after, metrics = jax.jit(jp.make_train_step(model, method, SGD, rate=RATE))(state, BATCH)
    assert (abs(slope) > clip) == (clip < 1)
    clipped = np.clip(slope, -clip, clip)
    np.testing.assert_allclose([metrics["loss"], metrics["slope"]], [mean, clipped], rtol=2e-2, atol=3e-3)
    for path, s in state.moved.items():
        expected = np.maximum(s - RATE * float(metrics["slope"]) * along[path], 0)
        np.testing.assert_allclose(after.moved[path], expected, rtol=1e-5, atol=1e-7, err_msg=path)
    same = jax.tree.map(lambda a, b: np.array_equal(a, b), after.frozen, state.frozen)
    assert all(jax.tree.leaves(same))


def test_scales_do_not_turn_their_sign():
    method = jp.chain(jp.quantize("int4", group=8), jp.qzo())
    model, state = start(method, num_hidden_layers=1)
    after, _ = jax.jit(jp.make_train_step(model, method, SGD, rate=1.0))(state, BATCH)
    moved = np.concatenate([np.ravel(leaf) for leaf in after.moved.values()])
    assert moved.min() == 0 and np.mean(moved == 0) > 0.1


def affine(params):
    """The kernels of the layers as GPTQ's are, one with groups in an order of its own."""
    flat = tree.flatten(params)
    for path in [path for path in flat if path.startswith("layers/") and path.endswith("/kernel")]:
        flat[path] = pack_affine(flat[path], 4, 8)
    return tree.unflatten(flat)


@pytest.mark.parametrize("name", ["nf4 of 8-bit scales", "nf3", "int2", "affine"])
def test_every_packed_kernel_starts_at_itself_and_merges(name):
    """The model computes what the quantized one does; with other scales, what the merged one does."""
    base, params = tiny.model(num_hidden_layers=1)
    options = {"nf4 of 8-bit scales": ("nf4",), "nf3": ("nf3",), "int2": ("int2", 8)}
    method = jp.qzo() if name == "affine" else jp.chain(jp.quantize(*options[name]), jp.qzo())
    model, trainable, rest = jp.setup(method, base, affine(params) if name == "affine" else params, jax.random.key(0))
    assert not trainable
    plain = {path: leaf for path, leaf in rest.items() if not path.endswith("/qzo/scales")}
    apply = lambda model, flat: jax.jit(lambda flat: model.apply(tree.unflatten(flat), BATCH))(flat)
    np.testing.assert_allclose(apply(model, rest), apply(base, plain), rtol=1e-4, atol=1e-4)
    rest = {path: leaf * 1.5 if path.endswith("/qzo/scales") else leaf for path, leaf in rest.items()}
    merged = tree.flatten(method.merge(tree.unflatten(rest)))
    site = "layers/mlp/up_proj"
    np.testing.assert_allclose(merged[f"{site}/kernel"], 1.5 * dense(plain[f"{site}/kernel"]), rtol=1e-5, atol=1e-7)
    np.testing.assert_allclose(apply(model, rest), apply(base, merged), rtol=1e-4, atol=1e-4)


def test_noise_that_is_larger_than_the_scales_is_said(recwarn):
    start = lambda **options: jp.setup(
        jp.chain(jp.quantize("int8", group=8), jp.qzo(**options)), *tiny.model(), jax.random.key(0)
    )
    _, _, rest = start(eps=1e-6)
    scales = {path: leaf for path, leaf in rest.items() if path.endswith("/qzo/scales")}
    largest = max(float(jnp.median(leaf)) for leaf in scales.values())
    start(eps=0.3 * largest, relative=True)
    start(eps=0.2 * min(float(jnp.median(leaf)) for leaf in scales.values()))
    jax.eval_shape(lambda: start(eps=0.3 * largest)[1:])
    assert not recwarn.list
    with pytest.warns(Notice, match=f"of most scales of {len(scales)} of {len(scales)} kernels.*relative=true"):
        start(eps=0.3 * largest)


def test_refusals():
    for bad in ({"eps": 0.0}, {"clip": 0.0}, {"clip": float("nan")}, {"seeds": 0}):
        with pytest.raises(jp.InputError, match="qzo: "):
            jp.qzo(**bad)
    with pytest.raises(jp.InputError, match=r"qzo: layers/.* is not quantized; put quantize before it"):
        start(jp.qzo(), num_hidden_layers=1)
    beside = jp.chain(jp.quantize(), jp.qzo(), jp.lora(1))
    with pytest.raises(jp.InputError, match="qzo: must be nearest to the kernel"):
        model, state = start(beside, num_hidden_layers=1)
        model.apply(state.params, BATCH)
    norms = jp.chain(jp.quantize(), jp.qzo(), jp.ln_tuning())
    model, state = start(norms, num_hidden_layers=1)
    with pytest.raises(jp.InputError, match=r"qzo: does not estimate for what others train, as .*norm"):
        objective_of(model, norms, state.leaves)


def test_plans_a_forward_pass_and_one_number_per_group():
    config = {**tiny.CONFIG, "num_hidden_layers": 2}
    step = planner.make_step(config, jp.chain(jp.quantize("int4", group=8), jp.qzo()), 4, 16)
    assert not step.backward and not step.state.trainable
    kernels = [leaf for path, leaf in step.state.frozen.items() if "/kernel" in path and hasattr(leaf, "scales")]
    assert tree.size(step.state.moved) == sum(kernel.size // 8 for kernel in kernels) > 0
    cost = planner.cost(step)
    assert (cost.recompute_flops, cost.activations) == (0, 0)


@pytest.mark.slow
@pytest.mark.skipif(not importlib.util.find_spec("jax_plugins"), reason="no compiler for GPUs is installed")
def test_figures():
    """Compiled for an H200: a model of 8B in int4, one scale per 128, in the memory of its forward pass."""
    target, config = targets.target("h200"), geometries.load("llama3.1-8b")
    make = functools.partial(planner.make_step, config, batch_size=4, seq_len=1024)
    method = jp.chain(jp.quantize("int4", group=128), jp.qzo())
    step = make(method=method)
    row = planner.row(step, target)["bytes"]
    assert row["gradients"] == row["activations"] == row["optimizer"] == 0

    def evaluate(leaves, batch):
        return step.task.loss(step.model, tree.unflatten(leaves), batch)[0]

    forward = aot.compile(target, evaluate, {**step.state.frozen, **step.state.moved}, step.batch).memory.total
    scales = tree.num_bytes(step.state.moved)
    assert row["total"] <= forward + scales
