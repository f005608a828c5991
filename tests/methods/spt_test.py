"""SPT: against its equations in numpy, the dense model where nothing is left out, what is kept, and mistakes."""

import functools
import importlib.util
import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxpeft as jp
from jaxpeft import few_keys, tree
from jaxpeft import method as contract
from jaxpeft.backward.residuals import remat
from jaxpeft.memory import planner, targets
from jaxpeft.methods import spt
from jaxpeft.models import geometries
from jaxpeft.train.loss import completion_loss
from jaxpeft.train.optimizer import make_direction
from jaxpeft.train.step import objective_of
from pallas_kernels import attention as attention_op
from tests import beside, by_hand, residuals, tiny

KEY = jax.random.key(0)
once = functools.partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})  # what runs once
LENGTH, BLOCKS, WORDS, PART = 18, 4, 5, 4
OPTIONS = {"rank": 2, "keep": 0.25, "code_size": PART, "codewords": WORDS, "blocks": BLOCKS, "capacity": 1.0}
METHOD = jp.spt(alpha=4, **OPTIONS)


def packed():
    """Rows of one document, of two, and of two and padding."""
    segments = np.array([[1] * 18, [1] * 7 + [2] * 11, [1] * 6 + [2] * 5 + [0] * 7], np.int32)
    positions = np.stack([[*range(18)], [*range(7), *range(11)], [*range(6), *range(5), *range(7)]])
    return {**tiny.batch(3, LENGTH), "segment_ids": segments, "positions": positions.astype(np.int32)}


@pytest.fixture(scope="module")
def moved():
    """(model, trained leaves away from their start, frozen leaves)."""
    model, trainable, frozen = beside.start(METHOD)
    routers = {path: 20 * leaf for path, leaf in trainable.items() if path.endswith("router")}
    return model, {**beside.moved(trainable), **routers}, frozen


# The equations, a query and a token at a time.


def coded(z, codebook):
    """(codes (M,), the mean of both squares over numbers) of z (D,)."""
    codes, off = [], []
    for m, words in enumerate(codebook):
        part = z[m * PART : (m + 1) * PART]
        far = np.abs(part - words).sum(-1)
        hard, soft = words[far.argmin()], np.exp(-far) / np.exp(-far).sum() @ words
        codes.append(far.argmin())
        off += [*((part - hard) ** 2 + (soft - hard) ** 2)]
    return np.array(codes), np.mean(off)


def attend(w, q, k, v, seen, live, keep):
    """(out (S, H D), what the codebooks lose) of a row."""
    count = math.ceil(keep * len(k))
    out, lost = np.zeros_like(q), {"q": [], "k": []}
    for head in range(q.shape[1]):
        of = head // (q.shape[1] // k.shape[1])
        book = w["self_attn/spt/codebooks"][of]
        of_q, of_k = ([coded(z, book) for z in heads] for heads in (q[:, head], k[:, of]))
        lost["q"] += [off for (_, off), here in zip(of_q, live, strict=True) if here]
        lost["k"] += [off for (_, off), here in zip(of_k, live, strict=True) if here]
        for t in range(len(q)):
            order = sorted(
                (j for j in range(len(k)) if seen[t, j]), key=lambda j: (-(of_q[t][0] == of_k[j][0]).sum(), -j)
            )
            kept = order[:count]
            if not kept:
                continue
            scores = np.exp(np.clip(k[kept, of] @ q[t, head] / math.sqrt(q.shape[-1]), -10, 10))
            out[t, head] = scores / scores.sum() @ v[kept, of]
    return out.reshape(len(q), -1), (np.mean(lost["q"]) + np.mean(lost["k"])) / 2


def merged(w, scale=2.0):
    """A layer's kernels with LoRA added: of the MLP's opening products and of attention."""
    w = dict(w)
    for path in [path for path in w if path.endswith("/spt/a") and "down" not in path]:
        site = path.removesuffix("/spt/a")
        w[f"{site}/kernel"] = w[f"{site}/kernel"] + scale * w[path] @ w[f"{site}/spt/b"]
    return w


def routed(w, x, live, room, scale=2.0):
    """(y (S, d), tokens that went without over those that chose) of a row."""
    size = w["mlp/up_proj/kernel"].shape[1] // BLOCKS
    y, taken, chose = np.zeros_like(x), np.zeros(BLOCKS, int), 0
    for t in range(len(x)):
        if not live[t]:
            continue
        p = 1 / (1 + np.exp(-x[t] @ w["mlp/spt/router"]))
        base, low = np.zeros(x.shape[1]), np.zeros(2)
        for b in sorted(range(BLOCKS), key=lambda b: -p[b])[:2]:
            chose, own = chose + 1, slice(b * size, (b + 1) * size)
            if taken[b] == room:
                continue
            taken[b] += 1
            gate, up = (x[t] @ w[f"mlp/{name}_proj/kernel"][:, own] for name in ("gate", "up"))
            h = by_hand.silu(gate) * up
            base = base + 2 * p[b] * h @ w["mlp/down_proj/kernel"][own]
            low = low + h @ w["mlp/down_proj/spt/a"][own]
        y[t] = base + scale * low @ w["mlp/down_proj/spt/b"]
    return y, 1 - taken.sum() / chose


def row_of(flat, tokens, positions, segments, keep, room):
    """(stream (S, d), [(lost, dropped)] of each layer) of a row."""
    x, said, live = np.asarray(flat["embed_tokens/embedding"], np.float64)[tokens], [], segments > 0
    seen = np.tri(len(x), dtype=bool) & (segments[:, None] == segments) & live
    for i in range(3):
        w = merged(by_hand.layer_of(flat, i))
        n = by_hand.rms_norm(x, w["input_layernorm/scale"])
        q, k = (by_hand.rotated(by_hand.heads(w, f"{name}_proj", n, c), positions) for name, c in (("q", 4), ("k", 2)))
        if keep < 1:
            out, lost = attend(w, q, k, by_hand.heads(w, "v_proj", n, 2), seen, live, keep)
        else:
            out, lost = by_hand.attend(q, k, by_hand.heads(w, "v_proj", n, 2), seen | np.eye(len(x), dtype=bool)), 0
        x = x + by_hand.dense(w, "self_attn/o_proj", out)
        y, dropped = routed(w, by_hand.rms_norm(x, w["post_attention_layernorm/scale"]), live, room)
        x = x + y
        said.append((lost, dropped))
    return x, said


def test_a_step_equals_the_equations(moved):
    """Each layer of each row: the stream of what is no padding, and what layers say."""
    model, trainable, frozen = moved
    batch = packed()
    _, found, sums = once(lambda params: ((out := model.ran(params, batch, KEY))[1], *out[1:]))(
        jp.combine(trainable, frozen)
    )
    room = math.ceil(LENGTH * 2 / BLOCKS)
    dropped = []
    for row, (segments, positions) in enumerate(zip(batch["segment_ids"], batch["positions"], strict=True)):
        x, said = row_of({**frozen, **trainable}, batch["tokens"][row], positions, segments, 0.25, room)
        live = segments > 0
        np.testing.assert_allclose(found[row][live], x[live], rtol=1e-3, atol=1e-3)
        np.testing.assert_allclose(sums["spt"][:, row], said, rtol=1e-4, atol=1e-6)
        dropped += [own for _, own in said]
    assert min(dropped[:6]) > 0.01  # of whole rows; a half of a row leaves room


@pytest.mark.slow
def test_evaluation_reads_all_keys_and_drops_nothing(moved):
    model, trainable, frozen = moved
    batch = packed()
    found = once(lambda params: model.hidden(params, batch))(jp.combine(trainable, frozen))
    for row, (segments, positions) in enumerate(zip(batch["segment_ids"], batch["positions"], strict=True)):
        x, _ = row_of({**frozen, **trainable}, batch["tokens"][row], positions, segments, 1, LENGTH)
        live = segments > 0
        np.testing.assert_allclose(found[row][live], x[live], rtol=1e-3, atol=1e-3)


def test_decoding_gives_what_a_whole_row_gives(moved):
    """A first pass of ten tokens, then one."""
    model, trainable, frozen = moved
    params = jp.combine(trainable, frozen)
    ids = tiny.batch(2, 11)["tokens"]
    whole = once(lambda params: model.hidden(params, {"tokens": ids}))(params)
    cache = model.stack.init_cache(2, 16)
    for first, end in ((0, 10), (10, 11)):
        at = np.tile(np.arange(first, end, dtype=np.int32), (2, 1))
        part = {"tokens": ids[:, first:end], "positions": at, "segment_ids": np.ones_like(at)}
        x, cache = once(lambda params, part=part, cache=cache: model.stack.run(model.stack, params, part, None, cache))(
            params
        )
        np.testing.assert_allclose(x, whole[:, first:end], rtol=1e-3, atol=1e-4)


def test_a_step_sees_no_later_token(moved):
    """Keys by codes, and places in blocks, as any other's: other tokens from the ninth on change nothing before it."""
    model, trainable, frozen = moved
    params, batch = jp.combine(trainable, frozen), tiny.batch(3, LENGTH)
    other = {**batch, "tokens": np.where(np.arange(LENGTH) < 9, batch["tokens"], (batch["tokens"] + 31) % 97)}
    run = once(lambda batch: model.hidden(params, batch, KEY))
    np.testing.assert_array_equal(run(batch)[:, :9], run(other)[:, :9])


# With nothing left out.


def program(method):
    """The gradient's program, as text."""
    model, trainable, rest = jp.setup(method, *tiny.model(), KEY)
    value = lambda trainable: completion_loss(model, jp.combine(trainable, rest), tiny.batch(), KEY)[0]
    return re.sub(r"0x[0-9a-f]+", "", str(jax.make_jaxpr(jax.grad(value))(trainable)))


def test_with_all_keys_and_all_blocks_it_is_lora():
    """The very program."""
    assert program(jp.spt(2, keep=1.0, active=1.0)) == program(jp.lora(2))


def test_all_keys_are_dense_attention():
    """By the way of codes, with every key kept: outputs and gradients of the fused kernel's."""
    shapes = [(2, LENGTH, heads, 8) for heads in (4, 2, 2, 4)]
    q, k, v, d_out = (
        jax.random.normal(key, shape) for key, shape in zip(jax.random.split(KEY, 4), shapes, strict=True)
    )
    segments = jnp.asarray(packed()["segment_ids"][1:])
    where = attention_op.Where(None, None, segments, segments)
    books = jax.random.normal(KEY, (2, 2, WORDS, PART))
    dense = lambda *qkv: attention_op.attention(*qkv, where, 8**-0.5, 5)
    coded = lambda *qkv: few_keys.attend(*qkv, where, books, 1.0, 5)[0]
    live = (segments > 0)[..., None, None]

    def both(f):
        out, pull = jax.vjp(f, q, k, v)
        return out * live, *pull(d_out * live)

    outs = [once(functools.partial(both, f))() for f in (dense, coded)]
    for one, other in zip(*outs, strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-4, atol=1e-5)


def test_all_blocks_are_the_dense_mlp():
    """Where the router knows nothing: each gate is 1."""
    base, params = tiny.model()
    model, trainable, rest = jp.setup(jp.spt(2, keep=1.0, active=0.9, blocks=BLOCKS, capacity=2.0), base, params, KEY)
    flat = {path: 0 * leaf if path.endswith("router") else leaf for path, leaf in {**trainable, **rest}.items()}
    found = once(lambda flat: model.hidden(tree.unflatten(flat), tiny.batch(), KEY))(flat)
    np.testing.assert_allclose(found, base.hidden(params, tiny.batch()), rtol=1e-4, atol=1e-5)


def test_places_are_the_first_that_choose():
    chosen = jnp.array([[False, True, True, False, True, True], [False] * 6])
    np.testing.assert_array_equal(spt.places(chosen, 3), [[1, 2, 4], [6, 6, 6]])


# What trains.


@pytest.mark.slow
def test_the_codebooks_follow_keys_and_change_no_loss():
    """The loss's value is the task's; all that trains has a gradient."""
    method = jp.spt(**{**OPTIONS, "blocks": 2, "targets": "down_proj,q_proj"})
    model, trainable, frozen = beside.start(method, num_hidden_layers=1)
    trainable, batch = beside.moved(trainable), packed()
    objective = objective_of(model, method, {**frozen, **trainable})

    @once
    def every(trainable):
        plain = completion_loss(model, jp.combine(trainable, frozen), batch, KEY)[0]
        return objective.value_and_grad(trainable, frozen, batch, KEY, None), plain

    ((value, aux), found), plain = every(trainable)
    np.testing.assert_allclose(value, plain, rtol=1e-6)
    assert aux["pq"] > 0
    for path, leaf in found.items():
        assert np.abs(leaf).max() > 0, path


def test_what_codebooks_lose_moves_them_alone():
    """Its gradient with respect to a codeword is that of its formula, and none reaches queries and keys."""
    z = jax.random.normal(KEY, (2, 7, 2, 2, 8))
    live = jnp.arange(7) < jnp.array([[7], [4]])
    books = jax.random.normal(jax.random.key(1), (2, 2, WORDS, PART))
    lost = lambda z, books: jnp.sum(few_keys.quantized(z, live, books)[1])
    of_z, of_books = once(jax.grad(lost, (0, 1)))(z, books)
    assert not np.any(of_z)
    z, books = np.asarray(z, np.float64), np.asarray(books, np.float64)

    def summed(books):
        at = [(b, t, n, g) for b in range(2) for t in range(7) if live[b, t] for n in range(2) for g in range(2)]
        return sum(coded(z[place], books[place[2]])[1] for place in at) / 4

    for place in [(0, 0, 0, 0), (0, 1, 2, 3), (1, 0, 4, 1), (1, 1, 3, 2)]:
        step = np.zeros_like(books)
        step[place] = 1e-5
        slope = (summed(books + step) - summed(books - step)) / 2e-5
        np.testing.assert_allclose(of_books[place], slope, rtol=1e-3, atol=1e-5)


def test_codebooks_are_renewed_every_so_many_steps():
    """Between them they are put back, and all else stays as the step has left it."""
    method, leaves = jp.spt(**{**OPTIONS, "refresh": 3}), ("layers/self_attn/spt/codebooks", "layers/mlp/spt/router")
    view = contract.View(tiny.model()[0], method.specs, method.role, {})
    for step in range(5):
        before, after = (dict.fromkeys(leaves, jnp.full(2, x)) for x in (1.0, 2.0))
        moment = contract.Moment(jnp.int32(step), KEY, None, 0.0, {}, {}, view, before)
        moved = method.move(contract.Leaves(after, {}), moment).trained
        assert [float(moved[path][0]) for path in leaves] == [2.0 if step % 3 == 0 else 1.0, 2.0]


@pytest.mark.slow
def test_merged_is_lora_without_a_router():
    method = jp.spt(**{**OPTIONS, "active": 1.0})
    base, params = tiny.model()
    model, trainable, rest = jp.setup(method, base, params, KEY)
    moved = jp.combine(beside.moved(trainable), rest)
    merged = method.merge(moved)
    assert tree.flatten(merged).keys() == tree.flatten(params).keys()
    np.testing.assert_allclose(base.apply(merged, tiny.batch()), model.apply(moved, tiny.batch()), rtol=1e-4, atol=1e-4)


# Memory.


def kept_bytes(method, save, length=64):
    """Per token, of one layer and the loss in a training step, by two numbers of rows."""
    model, trainable, rest = jp.setup(method, *tiny.model(num_hidden_layers=1), KEY)
    model = remat(model, save)

    def kept(rows):
        found = residuals.saved(model, trainable, rest, tiny.batch(rows, length), key=KEY)
        return tree.num_bytes([leaf for leaf in found if not jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key)])

    few, many = kept(2), kept(6)
    return (many - few) / 4 / length


@pytest.mark.slow
def test_keeps_gate_and_up_of_the_blocks_room():
    """Under a plan that keeps products: gate and up of half of the tokens in each block, in the place of all."""
    options = {**OPTIONS, "targets": "attention", "keep": 1.0}
    lora, half = kept_bytes(jp.lora(2, targets="attention"), "matmuls"), kept_bytes(jp.spt(**options), "matmuls")
    gate_and_up, x, router = 2 * 56 * 4, 32 * 4, BLOCKS * (4 + 4)  # logits, and whose turn it is
    assert half <= lora - gate_and_up / 2 + x + router + 4
    assert half < lora


# Mistakes.


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"keep": 0.0}, "keep 0.0 must be above 0 and at most 1"),
        ({"keep": 1.5}, "keep 1.5 must be above 0 and at most 1"),
        ({"active": 0.0}, "active 0.0 must be above 0 and at most 1"),
        ({"active": -1.0}, "active -1.0 must be above 0 and at most 1"),
        ({"code_size": 3}, "code_size 3 does not divide the size of a head, 8"),
        ({"code_size": 0}, "code_size 0 must be at least 1"),
        ({"blocks": 5}, "blocks 5 does not divide layers/mlp's 56 neurons; 4 does"),
        ({"blocks": 0}, "blocks 0 must be at least 1"),
        ({"codewords": 1}, "codewords 1 must be at least 2 and at most 127"),
        ({"codewords": 128}, "codewords 128 must be at least 2 and at most 127"),
        ({"capacity": 0.5}, "capacity 0.5 must be a finite number of at least 1"),
        ({"refresh": 0}, "refresh 0 must be at least 1"),
        ({"rank": 0}, "rank 0 must be at least 1"),
    ],
)
def test_refusals(options, message):
    with pytest.raises(jp.InputError, match=re.escape(message)):
        jp.setup(jp.spt(**{**OPTIONS, **options}), *tiny.model(), KEY)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: jp.chain(METHOD, jp.ia3()), "ia3 is in mlp, of which each token takes some blocks"),
        (lambda: jp.chain(jp.houlsby(2), METHOD), "houlsby is in mlp"),
        (lambda: jp.chain(jp.wta_crs(0.5, 2), METHOD), "wta_crs is in mlp"),
        (lambda: jp.chain(jp.spt(**{**OPTIONS, "active": 1.0}), jp.meft()), "loses what the codebooks say"),
        (lambda: jp.chain(jp.lemo(0.5, 4), METHOD), "spt: a member before it takes 8 of 16 tokens"),
    ],
)
def test_chains_that_are_refused(make, message):
    with pytest.raises(jp.InputError, match=message):
        traced(make())


def traced(method, **config):
    """A step's shapes."""
    optimizer = make_direction()
    model, trainable, rest = jp.setup(method, *tiny.model(**config), KEY)
    state = jp.init_state(method, optimizer, trainable, rest, KEY, model)
    return jax.eval_shape(jp.make_train_step(model, method, optimizer, rate=1e-3), state, tiny.batch())


@pytest.mark.slow
@pytest.mark.parametrize(
    "make",
    [
        lambda: jp.chain(jp.quantize(), METHOD),
        lambda: jp.chain(METHOD, jp.lisa(1)),
        lambda: jp.chain(METHOD, jp.mezo()),
        lambda: jp.chain(jp.prompt(3), METHOD),
        lambda: jp.chain(jp.ia3(targets="attention"), METHOD),
        lambda: jp.chain(METHOD, jp.colm(0.5)),
    ],
)
def test_chains_make_steps(make):
    """Traced; what runs them is the conformance test's."""
    traced(make())


@pytest.mark.slow
@pytest.mark.parametrize("save", ["everything", "matmuls", "blocks"])
def test_the_claimed_memory(save):
    """Llama-2-7B, one row of 8192. A half is claimed, against attention that keeps its scores. The fused kernel keeps
    none, and neither do we: what is spared is the gate and up that blocks have no room for, where a plan keeps any."""
    if not importlib.util.find_spec("jax_plugins"):
        pytest.skip("no CUDA plugin")
    config = {**geometries.load("llama2-7b"), "max_position_embeddings": 8192}
    target = targets.target("h200")
    lora, ours = (planner.row(planner.make_step(config, m, 1, 8192, save), target) for m in (jp.lora(), jp.spt()))
    room = 1.25 * 0.5
    spared = (1 - room) * 2 * 11008 * 2 * 32 * 8192  # gate and up, bfloat16, of 32 layers and all tokens
    found = lora["bytes"]["activations"] - ours["bytes"]["activations"]
    assert ours["flops"] > lora["flops"]  # all scores are made, and made again
    if save == "blocks":
        assert abs(found) < 0.01 * lora["bytes"]["activations"]
    else:
        product = 11008 * 2 * 32 * 8192 if save == "everything" else 0  # down's LoRA reads it; here it is made again
        assert 0.9 * spared < found < 1.1 * spared + product
        assert 1.1 < lora["bytes"]["total"] / ours["bytes"]["total"] < 1.25


@pytest.mark.slow
def test_attention_alone_spares_nothing():
    """The same, with whole MLPs: no plan keeps scores, and to choose keys takes operations that LoRA does not."""
    if not importlib.util.find_spec("jax_plugins"):
        pytest.skip("no CUDA plugin")
    config = {**geometries.load("llama2-7b"), "max_position_embeddings": 8192}
    target, methods = targets.target("h200"), (jp.lora(), jp.spt(active=1.0))
    lora, ours = (planner.row(planner.make_step(config, m, 1, 8192, "matmuls"), target) for m in methods)
    assert abs(lora["bytes"]["total"] - ours["bytes"]["total"]) < 0.01 * lora["bytes"]["total"]
    assert ours["flops"] > 1.1 * lora["flops"]
