"""WeLore: ranks against a transcription of the rule, the product of its factors, and what becomes of the kernels."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxpeft as jp
from jaxpeft import tree
from jaxpeft.memory import planner
from jaxpeft.methods import welore
from jaxpeft.quant import Absent, dense, dot
from jaxpeft.train.optimizer import make_direction
from pallas_kernels.packed import quantize
from tests import tiny

KEY = jax.random.key(0)
UP, DOWN = "layers/mlp/up_proj", "layers/mlp/down_proj"


def kernels(seed=0):
    """A base whose up_proj has spectra that fall fast, each layer's otherwise, and whose other kernels have not."""
    base, params = tiny.model()
    flat, rng = tree.flatten(params), np.random.default_rng(seed)
    for site, falls in ((UP, [1.0, 2.0, 3.0]), (DOWN, [0.01, 0.01, 0.01])):
        layers, n, m = flat[f"{site}/kernel"].shape
        q = min(n, m)
        ortho = lambda k: np.linalg.qr(rng.normal(size=(k, k)))[0][:, :q]  # noqa: B023
        made = [ortho(n) * np.exp(-fall * np.arange(q)) @ ortho(m).T for fall in falls]
        assert layers == len(made)
        flat[f"{site}/kernel"] = jnp.asarray(np.stack(made), jnp.float32)
    return base, tree.unflatten(flat)


@pytest.fixture(scope="module")
def made():
    base, params = kernels()
    method = jp.welore(0.1, targets="mlp")
    return method, params, jp.setup(method, base, params, KEY)


def pruned(kernel, threshold):
    """By the rule's text, one matrix."""
    s = np.linalg.svd(np.asarray(kernel, np.float64), compute_uv=False)
    return int(((s - s.min()) / (s.max() - s.min()) < threshold).sum()), len(s)


def test_ranks_are_those_of_the_rule(made):
    """Each layer's own: pairs beyond it are zero. Of a flat spectrum nothing is pruned, and the kernel stays."""
    _, params, (_, trainable, rest) = made
    kernel = tree.flatten(params)[f"{UP}/kernel"]
    u, v = trainable[f"{UP}/welore/u"], trainable[f"{UP}/welore/v"]
    counts = [pruned(layer, 0.1) for layer in kernel]
    expected = [q - out for out, q in counts]
    assert len(set(expected)) > 1 and u.shape[-1] == v.shape[-2] == max(expected)
    assert np.any(np.asarray(u) != 0, axis=1).sum(-1).tolist() == expected
    assert np.any(np.asarray(v) != 0, axis=2).sum(-1).tolist() == expected
    for layer, k in enumerate(expected):
        left, s, right = np.linalg.svd(np.asarray(kernel[layer], np.float64), full_matrices=False)
        np.testing.assert_allclose(u[layer] @ v[layer], left[:, :k] * s[:k] @ right[:k], atol=1e-5)
        np.testing.assert_allclose(np.linalg.norm(u[layer][:, :k], axis=0), np.sqrt(s[:k]), rtol=1e-4)
    assert f"{DOWN}/welore/u" not in trainable
    np.testing.assert_array_equal(rest[f"{DOWN}/kernel"], tree.flatten(params)[f"{DOWN}/kernel"])


def test_the_kernel_is_gone_and_comes_back_by_merging(made):
    method, params, (model, trainable, rest) = made
    assert isinstance(rest[f"{UP}/kernel"], Absent)
    assert tree.num_bytes({"kernel": rest[f"{UP}/kernel"]}) == 3
    assert rest[f"{UP}/kernel"].shape == tree.flatten(params)[f"{UP}/kernel"].shape
    assert not np.any(dense(rest[f"{UP}/kernel"]))
    merged = method.merge(jp.combine(trainable, rest))
    np.testing.assert_allclose(
        tree.flatten(merged)[f"{UP}/kernel"], trainable[f"{UP}/welore/u"] @ trainable[f"{UP}/welore/v"], atol=1e-6
    )
    plain, _ = kernels()
    adapted = model.apply(jp.combine(trainable, rest), tiny.batch())
    np.testing.assert_allclose(plain.apply(merged, tiny.batch()), adapted, rtol=1e-4, atol=1e-4)


def test_pairs_beyond_a_layers_rank_stay_zero(made):
    """Neither has a gradient where the other is zero, so Adam's direction is none."""
    method, _, (model, trainable, rest) = made
    optimizer = make_direction()
    state = jp.init_state(method, optimizer, trainable, rest, KEY, model)
    zero = {path: leaf == 0 for path, leaf in jax.tree.map(np.asarray, trainable).items()}
    step = jax.jit(jp.make_train_step(model, method, optimizer, rate=1e-2))
    for _ in range(2):
        state, _ = step(state, tiny.batch())
    for path, leaf in state.trainable.items():
        np.testing.assert_array_equal(np.asarray(leaf) == 0, zero[path])


def test_a_plan_takes_the_published_reduction():
    """At tau 0.175 half of each rank; the kernels' bytes are not there."""
    step = planner.make_step(tiny.CONFIG, jp.welore(), 2, 16, "blocks", jnp.float32)
    assert step.state.trainable[f"{UP}/welore/u"].shape[-1] == min(step.state.frozen[f"{UP}/kernel"].shape[-2:]) // 2
    assert all(isinstance(leaf, Absent) for path, leaf in step.state.frozen.items() if path.endswith("_proj/kernel"))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"threshold": 0}, "welore: threshold 0 must be above 0 and below 1"),
        ({"min_ratio": 1.0}, "welore: min_ratio 1.0 must be at least 0 and below 1"),
        (
            {"threshold": 1e-6},
            "welore: of no kernel are more than min_ratio 0.5 of the singular values below threshold",
        ),
    ],
)
def test_mistakes(arguments, message):
    with pytest.raises(jp.InputError, match=message):
        jp.setup(jp.welore(**arguments), *tiny.model(), KEY)


def test_what_reads_a_kernel_that_is_gone_is_refused():
    """Adapters at its site, as they are made; what has no leaves there, where it asks for the product."""
    low = jp.welore(0.5, 0.3)
    for method in (jp.chain(low, jp.lora(2)), jp.chain(jp.dora(2), low)):
        with pytest.raises(jp.InputError, match=r"(lo|do)ra: factors have taken the place of layers/.*'s kernel"):
            jp.setup(method, *tiny.model(), KEY)
    with pytest.raises(jp.InputError, match=r"reads a kernel \(4, 6\) that factors have taken the place of"):
        dot(jnp.ones((2, 4)), Absent.like(jnp.ones((4, 6))))
    with pytest.raises(jp.InputError, match="kernel trains, and factors have taken its place"):
        jp.setup(jp.chain(low, jp.full()), *tiny.model(), KEY)


def test_packed_kernels_and_strange_factors_are_refused():
    base, params = tiny.model()
    flat = tree.flatten(params)
    packed = {**flat, f"{UP}/kernel": jax.vmap(quantize)(jnp.zeros((3, 64, 64)))}
    with pytest.raises(jp.InputError, match=f"welore: {UP} is packed"):
        jp.setup(jp.welore(targets="up_proj"), base, tree.unflatten(packed), KEY)
    strange = {**flat, f"{UP}/welore/u": jnp.zeros((3, 5, 2)), f"{UP}/welore/v": jnp.zeros((3, 2, 5))}
    with pytest.raises(jp.InputError, match="which are none of its kernel"):
        jp.setup(jp.welore(targets="up_proj"), base, tree.unflatten(strange), KEY)


def test_ranks_of_a_flat_spectrum_are_at_least_one():
    assert welore.ranks(np.ones((2, 4)), 0.2).tolist() == [1, 1]
