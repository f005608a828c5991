"""LQ-LoRA: the alternation in NumPy, weights, budgets against all choices, adapters that come back, what is refused."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxpeft as jp
from jaxpeft import tree
from jaxpeft.memory import planner
from jaxpeft.methods import lq_lora
from jaxpeft.methods.lq_lora import CANDIDATES, Choice
from jaxpeft.quant import dense, is_packed, pack
from pallas_kernels import packed
from tests import tiny

KEY, BATCH = jax.random.key(0), tiny.batch()
N, M, RANK = 64, 48, 4
NF3 = Choice("nf3", 32, False)


def kernel(seed=0):
    """Columns of different sizes, and a low-rank part that stands out."""
    rng = np.random.default_rng(seed)
    w = rng.normal(size=(N, M)) * np.linspace(0.5, 2, M)
    return (0.1 * (w + 3 * rng.normal(size=(N, 2)) @ rng.normal(size=(2, M)))).astype(np.float32)


def nearest(w, group):
    """W in NF3, number by number: the nearest of the codebook times the largest of the group."""
    out = np.empty_like(w)
    for j in range(w.shape[1]):
        for start in range(0, len(w), group):
            part = w[start : start + group, j]
            top = np.abs(part).max()
            book = np.array(packed.NF3, np.float32)
            out[start : start + group, j] = top * book[np.abs(part[:, None] / top - book).argmin(1)]
    return out


def svd_lowrank(x, rank):
    """Halko et al. 2011, algorithm 4.4, with the same first directions."""
    q = np.linalg.qr(x @ np.asarray(jax.random.normal(jax.random.key(0), (x.shape[1], rank + 10))))[0]
    for _ in range(2):
        q = np.linalg.qr(x.T @ q)[0]
        q = np.linalg.qr(x @ q)[0]
    u, s, vt = np.linalg.svd(q.T @ x, full_matrices=False)
    return (q @ u)[:, :rank] * s[:rank] @ vt[:rank]


def alternated(w, f, rank, group, most):
    """(Q, L, error, errors of all steps) of the paper's algorithm, the best pair kept."""
    f = np.ones_like(w) if f is None else f
    d1, d2 = np.sqrt(f.mean(1))[:, None], np.sqrt(f.mean(0))[None]
    q, best, trail = np.zeros_like(w), (None, None, np.inf), []
    for _ in range(most):
        low = svd_lowrank(d1 * (w - q) * d2, rank) / d1 / d2
        q = nearest((w - low).astype(np.float32), group)
        trail.append((f * (w - q - low) ** 2).sum())
        if trail[-1] >= best[2]:
            break
        best = q, low, trail[-1]
    return *best, trail


@pytest.mark.parametrize("fisher", [False, True])
def test_the_alternation_is_the_papers(fisher):
    w = kernel()
    f = np.random.default_rng(1).gamma(0.5, size=w.shape).astype(np.float32) + 0.01 if fisher else None
    q, low, error, trail = alternated(w.astype(np.float64), f, RANK, 32, 100)
    a, b = lq_lora.decompose(w, f, rank=RANK, choice=NF3, iterations=100)
    own = lq_lora.rest(jnp.asarray(w), a, b, NF3)
    assert len(trail) > 2
    np.testing.assert_allclose(a @ b, low, rtol=1e-3, atol=1e-4)
    np.testing.assert_allclose(np.linalg.norm(a, axis=0), np.linalg.norm(b, axis=1), rtol=1e-3) if not fisher else None
    far = np.abs(np.asarray(packed.dequantize(own)) - q) > 1e-3  # where rounding has led to the next code
    assert far.mean() < 0.01
    np.testing.assert_allclose(lq_lora.distance(w, own, a, b, f), error, rtol=1e-2)
    plain = packed.quantize(jnp.asarray(w), *NF3)
    without = lq_lora.distance(w, plain, jnp.zeros((N, 1)), jnp.zeros((1, M)), f)
    assert error < 0.8 * without


def test_of_a_small_matrix_the_decomposition_is_exact():
    w = kernel()[:12, :20]
    a, b = lq_lora.principal(jnp.asarray(w), 4)
    u, s, vt = np.linalg.svd(w, full_matrices=False)
    np.testing.assert_allclose(a @ b, (u[:, :4] * s[:4]) @ vt[:4], atol=1e-5)


def test_the_error_of_the_first_pair():
    w = kernel()
    found = lq_lora.errors(w, None, rank=RANK, choices=(NF3, Choice("nf4", 32, False)))
    low = svd_lowrank(w, RANK)
    np.testing.assert_allclose(found[0], ((w - low - nearest(w - low, 32)) ** 2).sum(), rtol=1e-2)
    assert found[1] < 0.5 * found[0]


def test_a_budget_has_the_least_error_of_all_choices():
    rng = np.random.default_rng(0)
    error, size = rng.random((4, 5)) * np.linspace(1, 4, 4)[:, None], rng.integers(1, 9, (4, 5)).astype(float)
    error[2, 3] = np.inf
    for budget in (12.0, 14.0, 17.0, 40.0):
        found = lq_lora.allot(error, size, budget)
        each = lambda of, choice: sum(of[row, column] for row, column in enumerate(choice))
        best = min(
            each(error, choice) for choice in itertools.product(range(5), repeat=4) if each(size, choice) <= budget
        )
        assert each(size, found) <= budget and each(error, found) == pytest.approx(best, rel=1e-5)
    with pytest.raises(jp.InputError, match="the least that fits"):
        lq_lora.allot(error, size, 1.0)


def model(**changes):
    return tiny.model(hidden_size=64, intermediate_size=128, **changes)


def kernels(params):
    return {path: leaf for path, leaf in tree.flatten(params).items() if path.endswith("_proj/kernel")}


@pytest.mark.parametrize("bits", [pytest.param(2.5, marks=pytest.mark.slow), 3.5])
def test_a_budget_is_met(bits):
    """By what is stored; sites differ; a plan has as many bytes as the budget allows, too."""
    base, params = model()
    method = jp.lq_lora(4, bits=bits, iterations=2)
    _, _, frozen = jp.setup(method, base, params, KEY)
    own = kernels(frozen)
    numbers = sum(leaf.size for leaf in own.values())
    stored = 8 * sum(leaf.nbytes for leaf in own.values()) / numbers
    assert 0.9 * bits < stored <= bits
    assert len({(leaf.format, leaf.group, leaf.doubled) for leaf in own.values()}) > 1
    for path, leaf in own.items():
        choice = CANDIDATES[int(frozen[path.replace("kernel", "lq_lora/choice")][0])]
        assert (choice.format, choice.group, choice.double) == (leaf.format, leaf.group, leaf.doubled)
        assert leaf.nbytes == lq_lora.num_bytes(leaf.shape, choice)
    config = {**tiny.CONFIG, "hidden_size": 64, "intermediate_size": 128}
    step = planner.make_step(config, method, 2, 16, "blocks", jnp.float32)
    planned = 8 * sum(leaf.nbytes for leaf in kernels(step.state.frozen).values()) / numbers
    assert 0.9 * bits < planned <= bits


def test_the_weights_are_the_fisher_informations():
    """Other weights, another decomposition; without data it is said."""
    base, params = model()
    method = jp.lq_lora(4, format="nf2", fisher=True, iterations=2)
    batches = lambda: [tiny.batch(seed=1), tiny.batch(seed=2)]
    _, trainable, _ = jp.setup(method, base, params, KEY, batches)
    _, plain, _ = jp.setup(jp.lq_lora(4, format="nf2", iterations=2), base, params, KEY)
    path = "layers/mlp/up_proj/lq_lora/a"
    assert np.abs(trainable[path] - plain[path]).max() > 1e-3
    from jaxpeft.methods.lst import fisher_information

    f = tree.flatten(fisher_information(base, params, batches()))["layers/mlp/up_proj/kernel"]
    w = tree.flatten(params)["layers/mlp/up_proj/kernel"]
    a, _ = lq_lora.decompose(w[1], f[1], rank=4, choice=Choice("nf2", None), iterations=2)
    np.testing.assert_array_equal(trainable[path][1], a)
    with pytest.raises(jp.InputError, match="fisher needs data"):
        jp.setup(method, base, params, KEY)


@pytest.mark.parametrize(
    "options", [pytest.param({"format": "nf2", "alpha": 16.0}, marks=pytest.mark.slow), {"bits": 3.0}], ids=str
)
def test_an_adapter_comes_back_with_the_same_packed_kernels(options, tmp_path):
    """Of the start that is kept, bit by bit, although what trains has moved; closer to the base than packing alone."""
    base, params = model()
    method = jp.lq_lora(4, iterations=3, **options)
    adapted, trainable, frozen = jp.setup(method, base, params, KEY)
    scale = options.get("alpha", 4) / 4
    path = "layers/mlp/up_proj/kernel"
    start = {
        name: {**frozen, **trainable}[path.replace("kernel", f"lq_lora/{name}")] for name in ("a", "b", "a0", "b0")
    }
    np.testing.assert_array_equal(start["a"], start["a0"])
    packing = pack(tree.flatten(params)[path], frozen[path].format, frozen[path].group, frozen[path].doubled)
    far = lambda w: np.linalg.norm(w - tree.flatten(params)[path])
    assert far(dense(frozen[path]) + scale * start["a"] @ start["b"]) < 0.95 * far(dense(packing))
    moved = {at: leaf + 0.01 for at, leaf in trainable.items()}
    whole = jp.combine(moved, frozen)
    jp.export_adapter(tmp_path / "adapter", whole, method, adapted.config)
    again, leaves = jp.import_adapter(tmp_path / "adapter", adapted.config, params)
    other, trainable, rest = jp.setup(again, base, tree.unflatten({**tree.flatten(params), **leaves}), KEY)
    for at, leaf in kernels(frozen).items():
        jax.tree.map(np.testing.assert_array_equal, rest[at], leaf)
    np.testing.assert_array_equal(other.apply(jp.combine(trainable, rest), BATCH), adapted.apply(whole, BATCH))


@pytest.mark.slow
def test_it_stays_near_a_base_of_two_bits():
    base, params = model()
    logits = base.apply(params, BATCH)

    def far(method):
        adapted, trainable, frozen = jp.setup(method, base, params, KEY)
        assert any(is_packed(leaf) for leaf in frozen.values())
        return float(np.abs(adapted.apply(jp.combine(trainable, frozen), BATCH) - logits).mean())

    plain = far(jp.chain(jp.quantize("nf2", double=False), jp.lora(16)))
    assert far(jp.lq_lora(16, format="nf2")) < 0.7 * plain


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: jp.lq_lora(0), "rank 0 must be at least 1"),
        (lambda: jp.lq_lora(4, format="nf5"), "format 'nf5' is not one of nf4"),
        (lambda: jp.lq_lora(4, group=48), "group 48 does not divide the 128 inputs of .*/down_proj"),
        (lambda: jp.lq_lora(4, group=0), "group 0 must be at least 1"),
        (lambda: jp.lq_lora(4, bits=0), "bits 0 must be above 0"),
        (lambda: jp.lq_lora(4, bits=2.0), r"bits 2.0: the least that fits these kernels is 1\.\d+ times"),
        (lambda: jp.lq_lora(4, iterations=0), "iterations 0 must be at least 1"),
        (lambda: jp.lq_lora(4, alpha=-1), "alpha -1 must be a finite number above 0"),
        (lambda: jp.lq_lora(4, targets="lm_head"), "lm_head is not in the layers"),
        (lambda: jp.chain(jp.quantize(), jp.lq_lora(4)), "is packed already"),
    ],
)
def test_refusals(make, message):
    with pytest.raises(jp.InputError, match=message):
        jp.setup(make(), *model(), KEY)
