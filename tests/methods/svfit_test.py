"""SVFit: the paper's formula and its gradient in NumPy, all singular values or some, merged, what is refused."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file

import jaxpeft as jp
from jaxpeft import sites, tree
from jaxpeft.methods import svfit
from jaxpeft.model import Context
from jaxpeft.peft import attach
from jaxpeft.quant import dot, is_packed
from tests import tiny

N, M, RANK = 12, 9, 5


def of_paper(x, w, sigma, dy):
    """(y, dsigma): what is left of W beside the principal part, as the paper writes it, in float64."""
    u, s, vt = np.linalg.svd(w.astype(np.float64), full_matrices=False)
    r = len(sigma)
    rest = w - (u[:, :r] * s[:r]) @ vt[:r]
    low = x @ u[:, :r]
    return x @ rest + (low * sigma) @ vt[:r], np.sum(low * (dy @ vt[:r].T), axis=0)


@pytest.fixture(scope="module")
def case():
    rng = np.random.default_rng(0)
    x, w, dy = rng.normal(size=(7, N)), rng.normal(size=(N, M)).astype(np.float32), rng.normal(size=(7, M))
    return x.astype(np.float32), w, dy.astype(np.float32)


@pytest.mark.parametrize("rank", [RANK, None])
def test_output_and_gradient_are_those_of_the_paper(rank, case):
    x, w, dy = case
    module, site = svfit.SVFit(rank), sites.Site("", jnp.asarray(w), None, True)
    inner = lambda x: dot(x, site.kernel)
    leaves = module.init(jax.random.key(0), inner, x, site, Context())["params"]
    count = rank or min(N, M)
    assert leaves["shift"].shape == (count,)
    s = np.linalg.svd(w)[1][:count]
    shift = (s * np.linspace(-0.5, 0.5, count)).astype(np.float32)

    def ours(shift):
        y = module.apply({"params": {**leaves, "shift": shift}}, inner, x, site, Context())
        return jnp.sum(y * dy), y

    gradient, y = jax.jit(jax.grad(ours, has_aux=True))(jnp.asarray(shift))
    expected, d_sigma = of_paper(x, w, s + shift, dy)
    np.testing.assert_allclose(y, expected, rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(gradient, d_sigma, rtol=1e-4, atol=1e-4)


def test_merged_singular_values_are_the_trained_ones():
    """The merged kernel's spectrum is the shifted one, where it is in order, and what is left of the base's."""
    method = jp.svfit(RANK, targets=["q_proj"])
    _, trainable, rest = jp.setup(method, *tiny.model(), jax.random.key(0))
    (path,) = trainable
    trainable = {path: trainable[path] + 1}
    merged = tree.flatten(method.merge(jp.combine(trainable, rest)))["layers/self_attn/q_proj/kernel"]
    before = np.linalg.svd(rest["layers/self_attn/q_proj/kernel"])[1]
    after = np.linalg.svd(merged)[1]
    np.testing.assert_allclose(after[:, :RANK], before[:, :RANK] + 1, rtol=1e-4)
    np.testing.assert_allclose(after[:, RANK:], before[:, RANK:], rtol=1e-4, atol=1e-5)


def test_file_holds_the_shifts_alone(tmp_path):
    """Singular vectors follow from the base: whoever reads the adapter decomposes it again, packed or not."""
    base, params = tiny.model()
    model, trainable, rest = jp.setup(jp.svfit(RANK), base, params, jax.random.key(0))
    trainable = {path: leaf + 0.3 for path, leaf in trainable.items()}
    adapted = jp.combine(trainable, rest)
    folder = jp.export_adapter(tmp_path / "adapter", adapted, jp.svfit(RANK), base)
    written = load_file(folder / "adapter_model.safetensors")
    assert written.keys() == trainable.keys()
    again, read, _ = attach(folder, base, params)
    assert all(np.array_equal(tree.flatten(read)[path], leaf) for path, leaf in trainable.items())
    expected, start = model.apply(adapted, tiny.batch()), base.apply(params, tiny.batch())
    assert float(jnp.max(jnp.abs(expected - start))) > 1e-2
    np.testing.assert_allclose(again.apply(read, tiny.batch()), expected, rtol=1e-4, atol=1e-5)


def test_a_sixteenth_of_lora_s_parameters():
    """On a kernel of 768 x 768, all singular values against LoRA of rank 8, the paper's ratio."""
    assert 8 * (768 + 768) == 16 * 768 == 16 * svfit.saved_bytes(768, 768, 1)


def test_singular_vectors_are_in_the_kernel_s_dtype_and_tokens_stay_in_theirs(case):
    x, w, _ = (jnp.asarray(part, jnp.bfloat16) for part in case)
    module, site = svfit.SVFit(RANK), sites.Site("", w, None, True)
    inner = lambda x: dot(x, w)
    params = module.init(jax.random.key(0), inner, x, site, Context())
    dtypes = {name: str(leaf.dtype) for name, leaf in tree.flatten(params["params"]).items()}
    assert dtypes == {"shift": "float32", "vectors/u": "bfloat16", "vectors/v": "bfloat16"}
    equations = jax.make_jaxpr(lambda x: module.apply(params, inner, x, site, Context()))(x).eqns
    assert {str(out.aval.dtype) for e in equations for out in e.outvars if out.aval.shape[:1] == (7,)} == {"bfloat16"}


def test_over_packed_kernels():
    """The start is that of another method over the same packed kernels, which stay packed."""

    def start(method):
        base, params = tiny.model(hidden_size=64, intermediate_size=128)
        model, trainable, rest = jp.setup(jp.chain(jp.quantize("nf4"), method), base, params, jax.random.key(0))
        assert is_packed(rest["layers/mlp/up_proj/kernel"])
        return model.apply(jp.combine(trainable, rest), tiny.batch())

    np.testing.assert_allclose(start(jp.svfit(RANK)), start(jp.ia3()), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("rank", "message"),
    [(0, "svfit: rank 0 must be at least 1"), (33, "svfit: rank 33 is above the smaller side of layers/mlp/down_proj")],
)
def test_refusals(rank, message):
    with pytest.raises(jp.InputError, match=message):
        jp.setup(jp.svfit(rank), *tiny.model(), jax.random.key(0))
