"""LoRAPrune: scores by NumPy and by dense gradients, masks by the schedule, the merged model cut to what is left."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxpeft as jp
from jaxpeft import pruning, tree
from jaxpeft.methods import loraprune
from jaxpeft.models import decoder
from jaxpeft.train.optimizer import make_direction
from tests import tiny

KEY, BATCH, LR = jax.random.key(0), tiny.batch(), 1e-2
OPTIONS = {"begin": 1, "until": 5, "every": 2}
WIDE = {"hidden_size": 64, "num_attention_heads": 8, "num_key_value_heads": 4}
Q, O = "layers/self_attn/q_proj", "layers/self_attn/o_proj"
DOWN = "layers/mlp/down_proj"


def start(lora=None, **options):
    method = jp.chain(jp.loraprune(**{**OPTIONS, **options}), lora or jp.lora(rank=2, alpha=4.0))
    model, params = tiny.model(**WIDE)
    model, trainable, rest = jp.setup(method, model, params, KEY)
    return method, model, trainable, rest


@pytest.fixture(scope="module")
def run():
    """The states before the first step and after each of six; plain gradient descent, which tells the gradients."""
    method, model, trainable, rest = start()
    trainable = {p: x + 0.1 * jax.random.normal(jax.random.key(len(p)), x.shape) for p, x in trainable.items()}
    optimizer = make_direction("sgd")
    state = jp.init_state(method, optimizer, trainable, rest, jax.random.key(1), model)
    step = jax.jit(jp.make_train_step(model, method, optimizer, rate=LR))
    states = [state]
    for i in range(6):
        states.append(step(states[-1], tiny.batch(seed=i))[0])
    return method, model, states


def scores(before, gradients):
    """I of heads and neurons by NumPy in float64, matrix by matrix and layer by layer."""
    flat = {path: np.asarray(leaf, np.float64) for path, leaf in before.leaves.items() if leaf.dtype == np.float32}
    found = {"o_proj": np.zeros((3, 4)), "down_proj": np.zeros((3, 56))}
    for module, last in (("q", 1), ("k", 1), ("v", 1), ("o", 0), ("gate", 1), ("up", 1), ("down", 0)):
        site = f"layers/{'self_attn' if module in 'qkvo' else 'mlp'}/{module}_proj"
        into = found["o_proj" if module in "qkvo" else "down_proj"]
        for layer in range(3):
            a, b = (flat[f"{site}/lora/{name}"][layer] for name in "ab")
            da, db = (gradients[f"{site}/lora/{name}"][layer] for name in "ab")
            kernel = flat[f"{site}/kernel"][layer] + 2.0 * a @ b
            each = np.abs(kernel * (a @ db + da @ b - da @ db))
            groups = np.array_split(each, into.shape[1], axis=last)
            own = np.array([group.sum() for group in groups])
            into[layer] += own / np.linalg.norm(own)
    return found


def test_scores_are_those_of_the_rule(run):
    """Each step's, from leaves and gradients as NumPy has them; from step `until` on they stay."""
    _, _, states = run
    means = None
    for i, (before, after) in enumerate(itertools.pairwise(states)):
        gradients = {p: (np.asarray(x, np.float64) - after.trainable[p]) / LR for p, x in before.trainable.items()}
        if i < OPTIONS["until"]:
            new = scores(before, gradients)
            means = new if means is None else {name: 0.9 * means[name] + 0.1 * x for name, x in new.items()}
        for path in (O, DOWN):
            found = after.moved[f"{path}/loraprune/score"]
            np.testing.assert_allclose(found, means[path.rpartition("/")[2]], rtol=2e-2, atol=1e-3)


def test_masks_follow_the_schedule(run):
    """Chosen after steps 2, 4 and 5, of the largest scores; at the end as many stay as `jaxpeft prune` leaves."""
    _, _, states = run
    wanted = pruning.how_many(4, 56, 0.5, 0.5)
    assert wanted == (2, 32)
    chosen = {2: 2, 3: 2, 4: 4, 5: 5, 6: 5}  # after a step, that of the last choice
    for i, state in enumerate(states):
        for path, size, stay, unit in ((O, 4, wanted[0], 1), (DOWN, 56, wanted[1], 8)):
            mask = np.asarray(state.moved[f"{path}/loraprune/m"])
            at = chosen.get(i)
            share = 0 if at is None else 1 - (1 - (at - 1) / 4) ** 3
            assert (mask.sum(1) == size - np.floor(share * (size - stay) / unit) * unit).all(), (i, path)
            assert set(np.unique(mask)) <= {0.0, 1.0}
            if i == at:
                score = np.asarray(state.moved[f"{path}/loraprune/score"])
                for layer in range(3):
                    kept, gone = score[layer][mask[layer] == 1], score[layer][mask[layer] == 0]
                    assert not gone.size or kept.min() >= gone.max()


def test_of_full_rank_it_is_the_first_order_score():
    """With A = 1 and B = 0 the estimate is s dL/dW, so that scores are those of the dense gradient."""
    width = WIDE["hidden_size"]
    method, model, trainable, rest = start(jp.lora(rank=width, targets=["q_proj", "o_proj"]), keep_neurons=1.0)
    trainable = {
        path: jnp.broadcast_to(jnp.eye(width), x.shape) if path.endswith("/a") else jnp.zeros_like(x)
        for path, x in trainable.items()
    }
    optimizer = make_direction("sgd")
    state = jp.init_state(method, optimizer, trainable, rest, KEY, model)
    state = jax.jit(jp.make_train_step(model, method, optimizer, rate=LR))(state, BATCH)[0]
    base, params = tiny.model(**WIDE)
    flat = tree.flatten(params)
    kernels = {site: flat[f"{site}/kernel"] for site in (Q, O)}

    def loss(kernels):
        changed = {f"{site}/kernel": leaf for site, leaf in kernels.items()}
        return jp.completion_loss(base, tree.unflatten({**flat, **changed}), BATCH)[0]

    total = 0.0
    for site, gradient in jax.grad(loss)(kernels).items():
        each = np.abs(np.asarray(kernels[site] * gradient))
        own = (each.sum(1) if site == Q else each.sum(2)).reshape(3, 4, -1).sum(2)
        total = total + own / np.linalg.norm(own, axis=1, keepdims=True)
    np.testing.assert_allclose(state.moved[f"{O}/loraprune/score"], total, rtol=1e-3)


def test_cut_to_what_is_left_it_computes_the_same(run):
    """The merged model's zeros have the smallest norms: what `jaxpeft prune` cuts; the rest is the trained model."""
    method, model, states = run
    base, _ = tiny.model(**WIDE)
    merged = method.merge(states[-1].params)
    kept = pruning.choose(pruning.importance(base, merged), 0.5, 0.5)
    for path, at in ((O, kept.heads), (DOWN, kept.neurons)):
        mask = np.asarray(states[-1].moved[f"{path}/loraprune/m"])
        np.testing.assert_array_equal(at, [np.flatnonzero(row) for row in mask])
    small = decoder.from_hf({**tiny.CONFIG, **WIDE, **pruning.smaller(base.config, 2, 32)})
    left = pruning.pruned(merged, base.config, kept)
    wanted = model.apply(states[-1].params, BATCH)
    np.testing.assert_allclose(small.apply(left, BATCH), wanted, rtol=1e-4, atol=1e-4)


def test_refusals():
    for options, said in (
        ({"keep": 0}, "loraprune: keep 0: the share that stays must be above 0 and at most 1"),
        ({"keep_heads": 1.5}, "loraprune: keep_heads 1.5: the share"),
        ({"begin": -1}, "begin -1 must be at least 0"),
        ({"until": 1}, "until 1 must be above begin, 1"),
        ({"every": 0}, "every 0 must be at least 1"),
    ):
        with pytest.raises(jp.InputError, match=said):
            jp.loraprune(**{**OPTIONS, **options})
    with pytest.raises(jp.InputError, match="loraprune: heads 0.1: leaves none of 4 key/value heads"):
        start(keep=0.1)
    model, params = tiny.model()
    with pytest.raises(jp.InputError, match=r"lora\+loraprune: .* name it first: loraprune\+lora"):
        jp.setup(jp.chain(jp.lora(), jp.loraprune()), model, params, KEY)
    with pytest.raises(jp.InputError, match=r"chain lora to it: loraprune\+lora"):
        jp.setup(jp.chain(jp.loraprune(), jp.ia3()), model, params, KEY)
    method, model, trainable, rest = start(jp.lora(rank=2, targets="mlp"))
    with pytest.raises(jp.InputError, match="LoRA is at no linear map of the heads at layers/self_attn"):
        jp.make_train_step(model, method, make_direction(), rate=LR)(
            jp.init_state(method, make_direction(), trainable, rest, KEY, model), BATCH
        )


@pytest.mark.slow
def test_beside_a_packed_base():
    """The score reads the codes' numbers; masks are chosen, and the loss falls."""
    method = jp.chain(jp.quantize("nf4"), jp.loraprune(until=3, every=1), jp.lora(rank=2))
    model, trainable, rest = jp.setup(method, *tiny.model(**WIDE), KEY)
    optimizer = make_direction()
    state = jp.init_state(method, optimizer, trainable, rest, KEY, model)
    step = jax.jit(jp.make_train_step(model, method, optimizer, rate=LR))
    losses = []
    for _ in range(6):
        state, metrics = step(state, BATCH)
        losses.append(float(metrics["loss"]))
    assert losses[-1] < losses[3]
    assert (np.asarray(state.moved[f"{O}/loraprune/m"]).sum(1) == 2).all()
    assert loraprune.STEPS in state.moved
