"""LLM-QFA: each subnet is the model of its widths, what is drawn alone trains, the schedule, the search, refusals."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import jaxpeft as jp
from jaxpeft import tree
from jaxpeft.memory import planner
from jaxpeft.methods import llm_qfa
from jaxpeft.quant import Nested, dense, like, pack_affine
from jaxpeft.train.loss import completion_loss
from tests import tiny

KEY, BATCH, WIDTHS = jax.random.key(0), tiny.batch(), [2, 3, 4]


@functools.cache
def made():
    """(method, base, its parameters, model, trainable, frozen), B set to something."""
    base, params = tiny.model()
    method = jp.llm_qfa(WIDTHS, group=8, rank=4, alpha=8.0, period=12)
    model, trainable, frozen = jp.setup(method, base, params, KEY)
    rng = np.random.default_rng(0)
    some = lambda leaf: jnp.asarray(0.05 * rng.normal(size=leaf.shape), jnp.float32)
    trainable = {path: some(leaf) if path.endswith("/b") else leaf for path, leaf in trainable.items()}
    return method, base, params, model, trainable, frozen


def kernels(params):
    return {path: leaf for path, leaf in tree.flatten(params).items() if path.endswith("_proj/kernel")}


@pytest.mark.parametrize(
    "bits",
    [pytest.param((2, 2, 2), marks=pytest.mark.slow), (4, 2, 3), pytest.param((3, 4, 4), marks=pytest.mark.slow)],
)
def test_a_subnet_is_the_model_of_its_widths(bits):
    """Each layer's kernels in its bits, and the factors of these; merging gives the same."""
    method, base, params, model, trainable, frozen = made()
    own = llm_qfa.subnet(jp.combine(trainable, frozen), bits)
    plain = dict(tree.flatten(params))
    for path in kernels(params):
        a, b = (np.asarray(trainable[path.replace("kernel", f"llm_qfa/{name}")]) for name in "ab")
        layers = [
            np.asarray(dense(pack_affine(plain[path][i], width, 8)))
            + 2.0 * a[i, WIDTHS.index(width)] @ b[i, WIDTHS.index(width)]
            for i, width in enumerate(bits)
        ]
        plain[path] = np.stack(layers)
    expected = base.apply(tree.unflatten(plain), BATCH)
    np.testing.assert_allclose(model.apply(own, BATCH), expected, rtol=1e-4, atol=1e-4)
    merged = tree.flatten(method.merge(own))
    assert merged.keys() == plain.keys()
    for path in kernels(params):
        np.testing.assert_allclose(merged[path], plain[path], rtol=1e-4, atol=1e-5)


@pytest.mark.slow
def test_what_a_step_draws_alone_trains():
    """The other factors and their moments stay, through several steps, although they have been moved before."""
    method, _, _, model, trainable, frozen = made()
    optimizer = optax.adam(1e-2)
    state = jp.init_state(method, optimizer, trainable, frozen, KEY, model)
    step = jax.jit(jp.make_train_step(model, method, optimizer))
    seen = set()
    for _ in range(5):
        chosen, before = np.asarray(state.moved[llm_qfa.CHOSEN]), state
        state, metrics = step(state, BATCH)
        assert float(metrics["bits"]) == pytest.approx(np.mean([WIDTHS[k] for k in chosen]))
        seen.add(tuple(map(int, chosen)))
        for path, leaf in state.trainable.items():
            now, old = (dict(jax.tree_util.tree_leaves_with_path(of.opt_state)) for of in (state, before))
            moments = [(new, old[at]) for at, new in now.items() if getattr(at[-1], "key", None) == path]
            pairs = [(leaf, before.trainable[path]), *moments]
            assert len(pairs) == 3
            for new, was in pairs:
                for layer, width in itertools.product(range(len(chosen)), range(3)):
                    same = np.array_equal(new[layer, width], was[layer, width])
                    assert same != (width == chosen[layer]), (path, layer, width)
    assert len(seen) > 1


def test_the_schedule_trains_budgets_at_both_ends():
    """Widths have the mean that the triangle asks for, and means spread further than those of even draws."""
    steps = jnp.arange(200)
    for mean in (2.0, 2.4, 3.0, 3.9):
        p = jax.nn.softmax(llm_qfa.logits_of(jnp.float32(mean), WIDTHS))
        assert float(p @ jnp.asarray(WIDTHS, jnp.float32)) == pytest.approx(mean, abs=2e-3)
    np.testing.assert_allclose([llm_qfa.expected(s, 8, WIDTHS) for s in (0, 2, 4, 6, 8)], [2, 3, 4, 3, 2])
    each = jax.vmap(lambda step: llm_qfa.draw(jax.random.fold_in(KEY, step), step, 32, 100, WIDTHS))(steps)
    means = np.asarray(WIDTHS)[np.asarray(each)].mean(1)
    even = np.random.default_rng(0).choice(WIDTHS, (200, 32)).mean(1)
    low, high = (np.histogram(found, [2, 2.4, 2.8, 3.2, 3.6, 4.01])[0] for found in (means, even))
    assert low.min() > 20 and high.min() == 0
    np.testing.assert_allclose(means, [float(llm_qfa.expected(s, 100, WIDTHS)) for s in steps], atol=0.6)


@pytest.mark.slow
def test_the_search_finds_the_best_within_a_budget():
    """Of three layers it may see all 27: the least loss that the budget allows."""
    _, _, _, model, trainable, frozen = made()
    params = jp.combine(trainable, frozen)
    loss = lambda bits: float(completion_loss(model, llm_qfa.subnet(params, bits), BATCH)[0])
    within = [bits for bits in itertools.product(WIDTHS, repeat=3) if sum(bits) <= 9]
    best = min(within, key=loss)
    found, least = llm_qfa.search(model, params, [BATCH], 3.0, random=60, changed=60)
    assert sum(found) <= 9 and least == pytest.approx(loss(best), rel=1e-5) and tuple(found) == best


def test_bytes_of_all_widths():
    """9 bits per number, and a scale and a zero point for each group of each width; a plan has as many."""
    method, _, _, _, trainable, frozen = made()
    for leaf in kernels(frozen).values():
        assert isinstance(leaf, Nested) and leaf.nbytes == leaf.size * 9 // 8 + 3 * 5 * leaf.size // 8
        assert isinstance(like(leaf, jnp.zeros(leaf.shape)), Nested) and leaf.unit == 8
        np.testing.assert_array_equal(dense(leaf), dense(leaf.widths[2]))
    step = planner.make_step(tiny.CONFIG, method, 2, 16, "blocks", jnp.float32)
    planned = {path: leaf.nbytes for path, leaf in kernels(step.state.frozen).items()}
    assert planned == {path: leaf.nbytes for path, leaf in kernels(frozen).items()}
    assert tree.size(step.state.trainable) == tree.size(trainable)


def test_packed_as_they_are_read():
    method, base, params, _, _, frozen = made()
    converted = tree.flatten(params)
    for path, function in method.convert(params).items():
        layers = [function(layer) for layer in converted[path]]
        converted[path] = jax.tree.map(lambda *leaves: jnp.stack(leaves), *layers)
    _, _, rest = jp.setup(method, base, tree.unflatten(converted), KEY)
    jax.tree.map(np.testing.assert_array_equal, rest, frozen)


def test_subnets_that_are_none():
    _, _, _, model, trainable, frozen = made()
    params = jp.combine(trainable, frozen)
    with pytest.raises(jp.InputError, match="2 widths for 3 layers"):
        llm_qfa.subnet(params, [2, 3])
    with pytest.raises(jp.InputError, match="5 bits are none of 2, 3, 4"):
        llm_qfa.subnet(params, [2, 3, 5])
    with pytest.raises(jp.InputError, match=r"a budget of 1\.5 bits is below the fewest, 2"):
        llm_qfa.search(model, params, [BATCH], 1.5)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: jp.llm_qfa([4]), r"widths \[4\] should be two or more of 2, 3, 4, 8, ascending"),
        (lambda: jp.llm_qfa([4, 3]), "ascending"),
        (lambda: jp.llm_qfa([4, 5]), "should be two or more of"),
        (lambda: jp.llm_qfa(rank=0), "rank 0 must be at least 1"),
        (lambda: jp.llm_qfa(period=1), "period 1 must be at least 2"),
        (lambda: jp.llm_qfa(group=0), "group 0 must be at least 1"),
        (lambda: jp.llm_qfa(rank=4, group=24), "group 24 does not divide the 56 inputs of .*/down_proj; 8 and its d"),
        (lambda: jp.llm_qfa(rank=4, targets="lm_head"), "lm_head is not in the layers"),
        (lambda: jp.chain(jp.quantize("int4"), jp.llm_qfa(rank=4)), "is packed already"),
    ],
)
def test_refusals(make, message):
    with pytest.raises(jp.InputError, match=message):
        jp.setup(make(), *tiny.model(), KEY)


def test_it_is_nearest_to_the_kernel():
    base, params = tiny.model()
    model, trainable, frozen = jp.setup(jp.chain(jp.llm_qfa(WIDTHS, rank=4), jp.lora(2)), base, params, KEY)
    with pytest.raises(jp.InputError, match="name it last in the chain"):
        model.apply(jp.combine(trainable, frozen), BATCH)
