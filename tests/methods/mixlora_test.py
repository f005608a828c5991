"""MixLoRA: against its equations in numpy and in torch, its balance term however a batch is divided, and mistakes."""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

import jaxpeft as jp
from jaxpeft import tree
from jaxpeft.backward.residuals import remat
from jaxpeft.methods import mixlora
from jaxpeft.model import Context
from jaxpeft.models.layers import GatedMLP
from jaxpeft.quant import dense, is_packed
from jaxpeft.train.loss import completion_loss
from jaxpeft.train.step import objective_of
from tests import beside, by_hand, tiny
from tests.methods.unipt_test import encoder

KEY = jax.random.key(0)
E, K, R = 4, 2, 3
METHOD = jp.mixlora(rank=R, alpha=6, experts=E, top_k=K)


def softmax(x):
    exp = np.exp(x - x.max(-1, keepdims=True))
    return exp / exp.sum(-1, keepdims=True)


def by_tokens(w, told, scale=2.0, k=K):
    """after(module, x, y) of `by_hand`: a token's experts one after the other; `told` gets (p, the experts) of each."""

    def product(name, x, e):
        base = by_hand.dense(w, f"mlp/{name}", x)
        a, b = (w[f"mlp/{name}/mixlora/{factor}"] for factor in "ab")
        return base + scale * (x @ a[:, e * R : (e + 1) * R]) @ b[e * R : (e + 1) * R]

    def expert(x, e):
        if "mlp/gate_proj/kernel" in w:
            h = by_hand.silu(product("gate_proj", x, e)) * product("up_proj", x, e)
        else:
            h = by_hand.erf_gelu(product("up_proj", x, e))
        return product("down_proj", h, e)

    def after(module, x, y):
        if module != "mlp":
            return y
        out = []
        for token in x:
            p = softmax(token @ w["mlp/mixlora/router"])
            best = sorted(range(len(p)), key=lambda e: -p[e])[:k]
            told.append((p, best))
            out.append(sum(p[e] / p[best].sum() * expert(token, e) for e in best))
        return np.stack(out)

    return after


def with_attention_merged(w, scale=2.0):
    """A layer's parameters with the LoRA of its attention added to the kernels."""
    merged = dict(w)
    for path in w:
        if path.startswith("self_attn") and path.endswith("/kernel"):
            site = path.removesuffix("/kernel")
            merged[path] = w[path] + scale * w[f"{site}/mixlora/a"] @ w[f"{site}/mixlora/b"]
    return merged


@pytest.fixture(scope="module")
def moved():
    """(model, trained leaves away from their start, frozen leaves)."""
    model, trainable, frozen = beside.start(METHOD)
    return model, beside.moved(trainable), frozen


def padded():
    """A batch whose rows end in padding, of different lengths, and count differently."""
    batch = tiny.batch(4, 16)
    lengths = np.array([16, 9, 5, 12])
    real = np.arange(16) < lengths[:, None]
    return {**batch, "segment_ids": real.astype(np.int32), "loss_weights": batch["loss_weights"] * real}


def test_stream_and_balance_equal_the_equations(moved):
    """All layers of each row in numpy: the stream, and both forms of the balance term without padding."""
    model, trainable, frozen = moved
    params, batch = jp.combine(trainable, frozen), padded()
    flat = {**frozen, **trainable}
    found, x, sums = jax.jit(lambda params: (model.head(params, (ran := model.ran(params, batch))[1]), *ran[1:]))(
        params
    )
    del found
    f, p, count = np.zeros((3, 4, E)), np.zeros((3, 4, E)), batch["segment_ids"].sum(-1)
    for row, length in enumerate(count):
        stream = np.asarray(frozen["embed_tokens/embedding"], np.float64)[batch["tokens"][row, :length]]
        for i in range(3):
            w, told = by_hand.layer_of(flat, i), []
            w = with_attention_merged(w)
            seen = np.tri(length, dtype=bool)
            stream = by_hand.llama_layer(w, stream, np.arange(length), seen, by_tokens(w, told))
            for shares, best in told:
                p[i, row] += shares
                f[i, row, best] += 1
        np.testing.assert_allclose(x[row, :length], stream, rtol=1e-3, atol=1e-3)
    np.testing.assert_array_equal(sums["mixlora"][..., :E], f)
    np.testing.assert_allclose(sums["mixlora"][..., E:], p, rtol=1e-4)
    of_batch = E * np.sum(f.sum(1) * p.sum(1)) / count.sum() ** 2
    of_rows = E * np.sum(f * p, axis=(0, 2)) / count**2
    weights = batch["loss_weights"].sum(-1)
    expected = {"batch": of_batch, "rows": (weights * of_rows).sum() / weights.sum()}
    plain = completion_loss(model, params, batch)[0]
    for balance, term in expected.items():
        method = jp.mixlora(rank=R, alpha=6, experts=E, top_k=K, balance=balance, router_aux_loss_coef=0.5)
        value, aux = objective_of(model, method, flat).value(trainable, frozen, batch, None)
        np.testing.assert_allclose(aux["balance"], term, rtol=1e-4)
        np.testing.assert_allclose(value, plain + 0.5 * term, rtol=1e-5)


def test_a_layer_without_a_gate_equals_its_equations():
    model, trainable, frozen = jp.setup(METHOD, *encoder(), KEY)
    flat = {**frozen, **beside.moved(trainable)}
    params = tree.unflatten(flat)
    x = np.random.default_rng(0).normal(size=(2, 7, 32)).astype(np.float32)
    _, ctx = model.stack.embed(params, {"tokens": np.zeros((2, 7), np.int32)}, None)
    layer = jax.tree.map(lambda leaf: leaf[1], params["layers"])
    found, said = jax.jit(lambda layer, x: model.stack.block(layer, x, ctx.at(1), None, "layers"))(layer, x)
    assert said["mixlora"].shape == (2, 2 * E)
    w = with_attention_merged(by_hand.layer_of(flat, 1))
    for row in range(2):
        expected = by_hand.bert_layer(w, x[row], np.ones((7, 7), bool), by_tokens(w, []))
        np.testing.assert_allclose(found[row], expected, rtol=2e-4, atol=2e-4)


def in_torch(x, leaves, k, scale):
    """(y, sum over experts of f p times E) of x (T, d) as the reference computes it: each expert on its own tokens."""
    logits = x @ leaves["mixlora"]["router"]
    shares = torch.softmax(logits, dim=-1)
    weights, which = torch.topk(shares, k, dim=-1)
    weights = weights / weights.sum(-1, keepdim=True)
    gate, up = (x @ leaves[name]["kernel"] for name in ("gate_proj", "up_proj"))  # once for all experts

    def update(name, h, e):
        a, b = (leaves[name]["mixlora"][factor] for factor in "ab")
        return scale * (h @ a.reshape(len(a), E, R)[:, e]) @ b.reshape(E, R, -1)[e]

    y = torch.zeros_like(x)
    for e in range(E):
        tokens, place = torch.where(which == e)
        own = x[tokens]
        h = torch.nn.functional.silu(gate[tokens] + update("gate_proj", own, e))
        h = h * (up[tokens] + update("up_proj", own, e))
        out = h @ leaves["down_proj"]["kernel"] + update("down_proj", h, e)
        y = y.index_add(0, tokens, weights[tokens, place][:, None] * out)
    chose = torch.nn.functional.one_hot(which, E).float().sum(1)
    return y, E * torch.sum(chose.mean(0) * shares.mean(0))


def test_gradients_equal_torch():
    """Of the MLP's result and of the balance term, with respect to the input, the router and all factors."""
    rng = np.random.default_rng(0)
    draw = lambda *shape: rng.normal(size=shape).astype(np.float32) / np.sqrt(shape[0])
    d, f = 16, 24
    sizes = {"gate_proj": (d, f), "up_proj": (d, f), "down_proj": (f, d)}
    leaves = {
        name: {"kernel": draw(n, m), "mixlora": {"a": draw(n, E * R), "b": draw(E * R, m)}}
        for name, (n, m) in sizes.items()
    }
    leaves["mixlora"] = {"router": draw(d, E)}
    x, along = draw(2, 11, d) * 3, draw(2, 11, d)

    def ours(leaves, x):
        routed = mixlora.Routed(mixlora.Mixture(E, K, 2.0), Context())
        with nn.intercept_methods(routed):
            y = GatedMLP(f).apply({"params": leaves}, x)
        term = mixlora.balance_of(routed.said.sum(0)[None], K)
        return jnp.sum(y * along) + term, (y, term)

    (_, (y, term)), found = jax.jit(jax.value_and_grad(ours, argnums=(0, 1), has_aux=True))(leaves, x)
    of_torch = jax.tree.map(lambda leaf: torch.tensor(leaf, requires_grad=True), leaves)
    x_torch = torch.tensor(x, requires_grad=True)
    expected, balance = in_torch(x_torch.reshape(-1, d), of_torch, K, 2.0)
    (torch.sum(expected * torch.tensor(along.reshape(-1, d))) + balance).backward()
    np.testing.assert_allclose(y.reshape(-1, d), expected.detach().numpy(), rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(term, balance.detach().numpy(), rtol=1e-5)
    np.testing.assert_allclose(found[1], x_torch.grad.numpy(), rtol=1e-4, atol=1e-5)
    for path, leaf in tree.flatten(found[0]).items():
        expected = functools.reduce(lambda node, name: node[name], path.split("/"), of_torch).grad.numpy()
        np.testing.assert_allclose(leaf, expected, rtol=1e-4, atol=1e-5, err_msg=path)


def test_one_expert_is_lora():
    """E = k = 1: the leaves are LoRA's, and so is what they compute; the balance term is 1 in each layer."""
    model, trainable, frozen = beside.start(jp.mixlora(rank=R, experts=1, top_k=1))
    trainable, batch = beside.moved(trainable), tiny.batch()
    plain, start, _ = beside.start(jp.lora(rank=R))
    as_lora = {path.replace("/mixlora/", "/lora/"): leaf for path, leaf in trainable.items() if "router" not in path}
    assert as_lora.keys() == start.keys()
    x, sums = jax.jit(lambda params: model.ran(params, batch)[1:])(jp.combine(trainable, frozen))
    np.testing.assert_allclose(x, plain.hidden(jp.combine(as_lora, frozen), batch), rtol=1e-4, atol=1e-4)
    assert float(mixlora.balance_of(sums["mixlora"].sum(1), 1)) == pytest.approx(3.0)


def value_and_gradients(model, method, trainable, frozen, batch, accumulate=1):
    objective = objective_of(model, method, {**frozen, **trainable}, accumulate=accumulate)
    value = lambda trainable: objective.value_and_grad(trainable, frozen, batch, KEY, None)
    return jax.jit(value)(trainable)


def close(found, expected):
    (value, _), gradients = found
    np.testing.assert_allclose(value, expected[0][0], rtol=1e-5)
    for path, gradient in gradients.items():
        scale = np.abs(expected[1][path]).max()
        np.testing.assert_allclose(gradient, expected[1][path], rtol=1e-4, atol=2e-5 * scale, err_msg=path)


# A term that is large, so that its value and gradients are compared, too.
ROWS = jp.mixlora(rank=R, alpha=6, experts=E, balance="rows", router_aux_loss_coef=5.0)


@pytest.fixture(scope="module")
def at_once(moved):
    """Loss and gradients of a whole batch, without a memory plan."""
    return value_and_gradients(moved[0], ROWS, *moved[1:], padded())


@pytest.mark.parametrize(("plan", "form"), [("blocks,tokens=32", "loops"), ("matmuls", "policy")])
def test_under_memory_plans(moved, at_once, plan, form):
    """What layers say of groups of rows is put together again, and its gradients reach the routers."""
    model, trainable, frozen = moved
    planned = remat(model, plan, form=form, trained=METHOD.changes)
    close(value_and_gradients(planned, ROWS, trainable, frozen, padded()), at_once)


@pytest.mark.slow
def test_micro_batches_change_nothing_of_the_term_by_rows(moved, at_once):
    close(value_and_gradients(moved[0], ROWS, *moved[1:], padded(), 2), at_once)


@pytest.mark.slow
def test_a_packed_base_computes_as_what_it_unpacks_to():
    model, trainable, frozen = jp.setup(jp.chain(jp.quantize("nf4"), METHOD), *tiny.model(), KEY)
    assert is_packed(frozen["layers/mlp/gate_proj/kernel"])
    trainable, batch = beside.moved(trainable), tiny.batch()
    unpacked = {path: dense(leaf) if is_packed(leaf) else leaf for path, leaf in frozen.items()}
    both = [jax.jit(lambda params: model.hidden(params, batch))(jp.combine(trainable, of)) for of in (frozen, unpacked)]
    np.testing.assert_allclose(*both, rtol=1e-3, atol=1e-3)


def test_targets_choose_the_experts_kernels():
    _, trainable, _ = beside.start(jp.mixlora(rank=2, experts=4, targets="down_proj,v_proj"))
    assert {path: leaf.shape for path, leaf in trainable.items()} == {
        "layers/mlp/mixlora/router": (3, 32, 4),
        "layers/mlp/down_proj/mixlora/a": (3, 56, 8),
        "layers/mlp/down_proj/mixlora/b": (3, 8, 32),
        "layers/self_attn/v_proj/mixlora/a": (3, 32, 2),
        "layers/self_attn/v_proj/mixlora/b": (3, 2, 16),
    }
    assert 0.015 < np.std(trainable["layers/mlp/mixlora/router"]) < 0.025


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"rank": 0}, "rank 0 must be at least 1"),
        ({"experts": 0}, "experts 0 must be at least 1"),
        ({"experts": 4, "top_k": 5}, "top_k 5 must be at least 1 and at most the number of experts, 4"),
        ({"top_k": 0}, "top_k 0 must be"),
        ({"router_aux_loss_coef": -0.1}, "router_aux_loss_coef -0.1 must be a finite number"),
        ({"router_aux_loss_coef": float("nan")}, "router_aux_loss_coef nan must be a finite number"),
        ({"balance": "token"}, "balance 'token' is not one of batch, rows"),
        ({"targets": "attention"}, "targets choose no kernel of an MLP, where the experts are; use lora"),
        ({"rank": 33}, "rank 33 is above the smaller side of layers/mlp/down_proj, a kernel of 56 x 32"),
    ],
)
def test_mistakes_are_refused(settings, said):
    with pytest.raises(jp.InputError, match=f"^mixlora: {said}"):
        beside.start(jp.mixlora(**settings))


@pytest.mark.parametrize("chain", [jp.chain(METHOD, jp.meft()), jp.chain(METHOD, jp.prefix(2))])
def test_a_chain_that_loses_what_routers_say_is_refused(chain):
    model, trainable, frozen = beside.start(chain)
    objective = objective_of(model, chain, {**frozen, **trainable})
    with pytest.raises(jp.InputError, match="^mixlora: the chain's layers run in a way that loses what routers say"):
        jax.eval_shape(lambda: objective.value(trainable, frozen, tiny.batch(), None))


@pytest.mark.slow
def test_behind_a_prefix_and_before_meft_without_the_term():
    for chain in (jp.chain(jp.prefix(2), METHOD), jp.chain(jp.mixlora(rank=R, router_aux_loss_coef=0), jp.meft())):
        model, trainable, frozen = beside.start(chain)
        objective = objective_of(model, chain, {**frozen, **trainable})
        jax.eval_shape(lambda objective=objective, t=trainable, f=frozen: objective.value(t, f, tiny.batch(), None))
