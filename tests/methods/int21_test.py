"""INT2.1: packing and the start at its error in NumPy, the recovery's loss and gradient, what it costs, refusals."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import jaxpeft as jp
from jaxpeft import tree
from jaxpeft.memory import planner
from jaxpeft.methods import int21
from jaxpeft.quant import Affine, Paired, affine, dense, dot, is_packed, like, low_rank_dot
from jaxpeft.train.loss import completion_loss
from jaxpeft.train.step import objective_of
from tests import tiny

KEY, BATCH = jax.random.key(0), tiny.batch()


def kernels(params):
    return {path: leaf for path, leaf in tree.flatten(params).items() if path.endswith("_proj/kernel")}


@functools.cache
def made(**options):
    base, params = tiny.model()
    method = jp.int21(rank=4, **options)
    return method, base, params, *jp.setup(method, base, params, KEY)


def of_two_bits(w):
    """The least squared error of 31 scales, of all inputs of an output, in values 0..3 less a whole zero point."""
    out = np.empty_like(w)
    for j, column in enumerate(w.T):
        low, high = min(column.min(), 0), max(column.max(), 0)
        zero, best = np.round(-low / ((high - low) / 3)), np.inf
        for ratio in affine.RATIOS:
            scale = np.float32((high - low) / 3) * ratio
            tried = scale * (np.clip(np.round(column / scale) + zero, 0, 3) - zero)
            if (error := ((tried - column) ** 2).sum()) < best * (1 - 1e-6):
                best, out[:, j] = error, tried
    return out


def test_the_start_is_the_error_of_the_packing():
    _, _, params, _, trainable, frozen = made()
    path = "layers/mlp/up_proj/kernel"
    w = np.asarray(tree.flatten(params)[path])
    assert isinstance(frozen[path], Affine) and frozen[path].bits == 2
    a, b = (np.asarray(trainable[path.replace("kernel", f"int21/{name}")]) for name in "ab")
    for layer in range(len(w)):
        q = of_two_bits(w[layer])
        np.testing.assert_allclose(dense(frozen[path])[layer], q, rtol=1e-5, atol=1e-6)
        whole = np.linalg.norm(w[layer] - q)
        left = np.linalg.norm(w[layer] - q - a[layer] @ b[layer])
        best = np.sqrt((np.linalg.svd(w[layer] - q, compute_uv=False)[4:] ** 2).sum())
        assert best <= left < 1.02 * best and left < 0.95 * whole
        np.testing.assert_allclose(np.linalg.norm(a[layer], axis=0), np.linalg.norm(b[layer], axis=1), rtol=1e-3)


def test_the_scale_is_in_the_start():
    path = "layers/mlp/up_proj/int21/a"
    _, _, _, _, plain, _ = made()
    _, _, _, _, scaled, _ = made(alpha=16.0)
    np.testing.assert_allclose(scaled[path], plain[path] / 2, rtol=1e-5)


def value_and_grad(share):
    method, _, params, model, trainable, frozen = made(recover=share)
    objective = objective_of(model, method, {**trainable, **frozen}, completion_loss)
    (loss, aux), gradient = objective.value_and_grad(trainable, frozen, BATCH, KEY, None)
    return params, model, trainable, frozen, loss, aux, gradient


@pytest.mark.parametrize("share", [1.0, 0.25])
def test_the_loss_is_the_divergence_from_the_base(share):
    """Of plain logits, with its gradient; the task's part beside it."""
    params, model, trainable, frozen, loss, aux, gradient = value_and_grad(share)
    base, _ = tiny.model()

    def expected(trainable):
        logits = model.apply(jp.combine(trainable, frozen), BATCH)
        apart = optax.losses.kl_divergence(jax.nn.log_softmax(logits), jax.nn.softmax(base.apply(params, BATCH)))
        weights = BATCH["loss_weights"]
        task = optax.softmax_cross_entropy_with_integer_labels(logits, BATCH["targets"])
        return jnp.sum(weights * (share * apart + (1 - share) * task)) / weights.sum()

    there, slope = jax.value_and_grad(expected)(trainable)
    np.testing.assert_allclose(loss, there, rtol=1e-4)
    assert float(aux["weight"]) == BATCH["loss_weights"].sum() and ("divergence" in aux) == (share < 1)
    for path, leaf in gradient.items():
        np.testing.assert_allclose(leaf, slope[path], rtol=1e-3, atol=1e-4 * np.abs(slope[path]).max(), err_msg=path)


@pytest.mark.slow
def test_recovery_brings_outputs_nearer_to_the_base_on_other_text():
    method, base, params, model, trainable, frozen = made(recover=1.0)
    other = tiny.batch(seed=9)

    def far(trainable):
        p = jax.nn.log_softmax(base.apply(params, other))
        q = jax.nn.log_softmax(model.apply(jp.combine(trainable, frozen), other))
        return float(jnp.sum(jnp.exp(p) * (p - q), -1).mean())

    optimizer = optax.adam(1e-2)
    state = jp.init_state(method, optimizer, trainable, frozen, KEY)
    step = jax.jit(jp.make_train_step(model, method, optimizer))
    for seed in range(30):
        state, _ = step(state, tiny.batch(rows=8, seed=seed + 20))
    assert far(state.trainable) < 0.7 * far(trainable)
    for path, leaf in kernels(frozen).items():
        jax.tree.map(np.testing.assert_array_equal, state.frozen[path], leaf)


def test_an_adapter_trains_on_without_the_base(tmp_path):
    """It brings no recovery with it: kernels alone in 2 bits, and the same outputs."""
    method, base, params, model, trainable, frozen = made(recover=1.0)
    assert all(isinstance(leaf, Paired) for leaf in kernels(frozen).values())
    whole = jp.combine({path: leaf + 0.01 for path, leaf in trainable.items()}, frozen)
    jp.export_adapter(tmp_path / "adapter", whole, method, model.config)
    again, leaves = jp.import_adapter(tmp_path / "adapter", model.config, params)
    assert leaves.keys() == trainable.keys()
    other, own, rest = jp.setup(again, base, tree.unflatten({**tree.flatten(params), **leaves}), KEY)
    assert all(isinstance(leaf, Affine) for leaf in kernels(rest).values())
    np.testing.assert_array_equal(other.apply(jp.combine(own, rest), BATCH), model.apply(whole, BATCH))
    merged, expected = (kernels(one.merge(two)) for one, two in ((method, whole), (again, jp.combine(own, rest))))
    jax.tree.map(np.testing.assert_array_equal, merged, expected)
    assert not any(is_packed(leaf) for leaf in merged.values())


def test_a_pair_is_its_packed_kernel():
    w = jax.random.normal(KEY, (32, 24))
    pair = int21.pack(w, 2, 16, True)
    x, a, b = (jax.random.normal(KEY, shape) for shape in ((5, 32), (32, 3), (3, 24)))
    np.testing.assert_array_equal(dense(pair), dense(pair.packed))
    np.testing.assert_array_equal(dot(x, pair), dot(x, pair.packed))
    product = functools.partial(low_rank_dot, x, a=a, b=b, scale=2.0)
    np.testing.assert_array_equal(product(pair), product(pair.packed))
    assert pair.nbytes == pair.packed.nbytes + w.nbytes and pair.unit == pair.packed.unit == 16
    assert pair.size == w.size and pair.dtype == w.dtype and isinstance(like(pair, w), Affine)


@pytest.mark.slow
def test_a_plan_knows_what_recovery_costs():
    """The kernels once more, and nothing else that is held; nothing of the base's layers is kept."""
    rows = [planner.make_step(tiny.CONFIG, made(recover=w)[0], 2, 16, "blocks", jnp.float32) for w in (0.0, 1.0)]
    held = [sum(leaf.nbytes for leaf in kernels(step.state.frozen).values()) for step in rows]
    plain = 4 * sum(leaf.size for leaf in kernels(rows[0].state.frozen).values())
    assert held[1] - held[0] == plain and held[0] < plain / 8
    costs = [planner.cost(step) for step in rows]
    assert costs[1].flops > costs[0].flops
    layers = [{name: segment.kept_bytes() for name, segment in cost.segments.items()} for cost in costs]
    assert layers[0] == layers[1]


@pytest.mark.parametrize("options", [{"init": "kaiming"}, {"recover": 1.0}], ids=str)
def test_packed_as_they_are_read(options):
    """What a checkpoint is converted to is what `prepare` makes, and `prepare` leaves it."""
    method, _, params, _, trainable, frozen = made(**options)
    converted = tree.flatten(params)
    for path, function in method.convert(params).items():
        layers = [function(layer) for layer in converted[path]]
        converted[path] = jax.tree.map(lambda *leaves: jnp.stack(leaves), *layers)
    _, again, rest = jp.setup(method, tiny.model()[0], tree.unflatten(converted), KEY)
    jax.tree.map(np.testing.assert_array_equal, (again, rest), (trainable, frozen))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: jp.int21(bits=5), "bits 5 is not one of 2, 3, 4, 8"),
        (lambda: jp.int21(rank=0), "rank 0 must be at least 1"),
        (lambda: jp.int21(rank=4, group=24), "group 24 does not divide the 56 inputs of .*/down_proj; 8 and its"),
        (lambda: jp.int21(group=0), "group 0 must be at least 1"),
        (lambda: jp.int21(init="pissa"), "init 'pissa' is not one of error, kaiming"),
        (lambda: jp.int21(recover=2.0), "recover 2.0 must be from 0 to 1"),
        (lambda: jp.int21(alpha=0.0), "alpha 0.0 must be a finite number above 0"),
        (lambda: jp.int21(rank=4, targets="lm_head"), "lm_head is not in the layers"),
        (lambda: jp.chain(jp.quantize("int4"), jp.int21(rank=4)), "is packed already"),
        (lambda: jp.chain(jp.peqa(2), jp.int21(rank=4)), "is packed already"),
    ],
)
def test_refusals(make, message):
    with pytest.raises(jp.InputError, match=message):
        jp.setup(make(), *tiny.model(), KEY)


def test_recovery_is_of_text():
    base, params = tiny.model()
    config = base.config._replace(num_labels=2) if hasattr(base.config, "_replace") else None
    if config is None:
        import dataclasses

        config = dataclasses.replace(base.config, num_labels=2)
    method = jp.int21(rank=4, recover=1.0)
    model, trainable, frozen = jp.setup(method, base._replace(config=config), params, KEY)
    with pytest.raises(jp.InputError, match="this model classifies rows"):
        objective_of(model, method, {**trainable, **frozen}, completion_loss)
