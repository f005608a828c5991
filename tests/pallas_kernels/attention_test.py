"""The tiled attention against plain softmax attention in float64 and its autodiff; and what it must never hold."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pallas_kernels import attention as op
from pallas_kernels.attention import EVERYONE, Where, chunked
from tests.residuals import intermediates

torch = pytest.importorskip("torch")


def attention(query, key, value, mask, scale, tile=None, causal=True):
    """The operation; with a tile, its plain-JAX halves in tiles of that size."""
    if tile is None:
        return op.attention(query, key, value, mask, scale, causal=causal)

    options = {"scale": scale, "causal": causal, "tile": tile}

    @jax.custom_vjp
    def run(query, key, value, mask):
        return chunked.forward(query, key, value, mask, **options)[0]

    def keep(query, key, value, mask):
        out, lse = chunked.forward(query, key, value, mask, **options)
        return out, (query, key, value, mask, out, lse)

    def pull(saved, d_out):
        return *chunked.backward(*saved, d_out, **options), None

    run.defvjp(keep, pull)
    return run(query, key, value, mask)


# B batch, S queries, K keys, H heads, N key-value heads, D head size


def inputs(b=2, s=20, k=None, h=4, n=2, d=8, dtype=np.float32, seed=0):
    """query (B, S, H, D), key and value (B, K, N, D), cotangent (B, S, H, D)."""
    rng = np.random.default_rng(seed)
    k = s if k is None else k
    shapes = ((b, s, h, d), (b, k, n, d), (b, k, n, d), (b, s, h, d))
    return tuple(rng.normal(size=shape).astype(dtype) for shape in shapes)


def where(b, s, query_segment=None, window=None):
    """Self-attention over one document per row, or `query_segment` (B, S)."""
    index = np.arange(s, dtype=np.int32)
    segment = np.ones((b, s), np.int32) if query_segment is None else np.asarray(query_segment, np.int32)
    return Where(index, index, segment, segment, None if window is None else np.int32(window))


def seen(mask, causal=True):
    """(B, S, K) bool, word for word from the docstring of Where."""
    behind = mask.query_index[:, None] - mask.key_index[None]
    everyone = mask.key_segment[:, None] == EVERYONE
    own = mask.query_segment[:, :, None] == mask.key_segment[:, None]
    near = True if mask.window is None else behind < mask.window
    return ((behind >= 0) | (not causal)) & ((own & near) | everyone)


def plain(query, key, value, mask, scale, causal=True):
    """All scores at once, in PyTorch's float64."""
    key, value = (x.repeat_interleave(query.shape[2] // key.shape[2], dim=2) for x in (key, value))
    scores = scale * torch.einsum("bqhd,bkhd->bhqk", query, key)
    allowed = torch.tensor(seen(mask, causal))[:, None]
    weights = torch.softmax(scores.masked_fill(~allowed, -1e300), -1) * allowed.any(-1, keepdim=True)
    return torch.einsum("bhqk,bkhd->bqhd", weights, value)


def expected(arrays, mask, scale=0.6, causal=True):
    """Output and gradients of `plain`; a cotangent of None stands for that of sum(output^2)."""
    wide = [torch.tensor(np.asarray(x, np.float64), requires_grad=True) for x in arrays[:3]]
    out = plain(*wide, mask, scale, causal)
    out.backward(2 * out.detach() if arrays[3] is None else torch.tensor(np.asarray(arrays[3], np.float64)))
    return [out.detach().numpy(), *(x.grad.numpy() for x in wide)]


def compiled(function, *args):
    """Compiled without LLVM's optimisations: these programs run once."""
    return jax.jit(function).lower(*args).compile({"xla_backend_optimization_level": 0})(*args)


def compare(found, wanted, tolerance):
    """Each array relative to the largest entry of the wanted one."""
    for name, ours, theirs in zip(("output", "d query", "d key", "d value"), found, wanted, strict=True):
        assert np.isfinite(np.asarray(ours, np.float32)).all(), name
        error = np.abs(np.asarray(ours, np.float64) - theirs).max() / max(np.abs(theirs).max(), 0.1)
        assert error < tolerance, f"{name}: {error:.1e}"


def check(arrays, mask, tile=8, tolerance=2e-5, causal=True):
    """Output and the gradients of query, key and value."""

    def run(query, key, value, cotangent, mask):
        out, pull = jax.vjp(lambda *qkv: attention(*qkv, mask, 0.6, tile, causal), query, key, value)
        return out, *pull(cotangent)

    found = compiled(run, *arrays, mask)
    compare(found, expected(arrays, mask, causal=causal), tolerance)
    return found


@pytest.mark.parametrize("heads", [(4, 4), (4, 2), (4, 1)], ids=["MHA", "GQA", "MQA"])
@pytest.mark.parametrize("length", [16, 21, 5], ids=["whole tiles", "part of a tile", "less than a tile"])
@pytest.mark.parametrize("causal", [True, False])
def test_whole_rows(heads, length, causal):
    h, n = heads
    check(inputs(s=length, h=h, n=n), where(2, length), causal=causal)


@pytest.mark.parametrize("window", [1, 3, 8, 13, 100])
def test_window(window):
    check(inputs(s=27), where(2, 27, window=window))


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("window", [None, 6])
def test_segments_and_padding(window, causal):
    segments = [[1] * 9 + [2] * 12 + [0] * 6, [1] * 3 + [2] * 3 + [3] * 21]
    check(inputs(s=27), where(2, 27, segments, window), causal=causal)


@pytest.mark.parametrize("d", [32, 64])
@pytest.mark.parametrize("causal", [True, False])
def test_as_models_call_it(causal, d):
    """Without indices, over several tiles, with the head sizes of encoders."""
    segments = np.array([[1] * 40 + [2] * 30 + [0] * 10, [1] * 80], np.int32)
    arrays, told = inputs(s=80, h=2, n=2, d=d), Where(None, None, segments, segments)

    def run(query, key, value, cotangent):
        out, pull = jax.vjp(lambda *qkv: attention(*qkv, told, 0.2, causal=causal), query, key, value)
        return out, *pull(cotangent)

    compare(compiled(run, *arrays), expected(arrays, where(2, 80, segments), 0.2, causal), 2e-5)


def test_who_sees_the_rest_of_its_document():
    """Not causal: the first query reads the document's last key, and no key of the next one or of the padding."""
    query, key, value, _ = inputs(s=20)
    mask = where(2, 20, [[1] * 10 + [2] * 7 + [0] * 3] * 2)
    d_value = jax.grad(lambda value: attention(query, key, value, mask, 1.0, tile=8, causal=False)[:, 0].sum())(value)
    assert (np.abs(d_value).sum((2, 3)) > 0).tolist() == [[True] * 10 + [False] * 10] * 2


def test_documents_do_not_see_each_other():
    """Changing one packed document leaves the others' outputs bit-identical."""
    query, key, value, _ = inputs(s=24)
    mask = where(2, 24, [[1] * 10 + [2] * 14] * 2)
    changed = np.array(key)
    changed[:, :10] += 1.0
    run = jax.jit(lambda key: attention(query, key, value, mask, scale=1.0, tile=8))
    before, after = run(key), run(changed)
    np.testing.assert_array_equal(before[:, 10:], after[:, 10:])
    assert not np.array_equal(before[:, :10], after[:, :10])


@pytest.mark.parametrize("window", [None, 4])
def test_a_prefix_is_seen_by_every_segment_and_through_every_window(window):
    s, prefix = 19, 5
    mask = where(2, s, [[1] * 8 + [2] * 11, [1] * 19], window)
    mask = mask._replace(
        key_index=np.concatenate([np.zeros(prefix, np.int32), mask.key_index]),
        key_segment=np.concatenate([np.full((2, prefix), EVERYONE, np.int32), mask.key_segment], axis=1),
    )
    assert seen(mask)[:, :, :prefix].all()
    check(inputs(s=s, k=s + prefix), mask)


@pytest.mark.parametrize("window", [None, 6])
@pytest.mark.parametrize("start, s", [(0, 11), (13, 1), (13, 9)])
def test_a_cache_with_unwritten_slots(start, s, window):
    slots = 30
    segments = np.where(np.arange(slots) < start + s, 1, 0).astype(np.int32)
    mask = Where(
        np.arange(start, start + s, dtype=np.int32),
        np.arange(slots, dtype=np.int32),
        np.ones((2, s), np.int32),
        np.stack([segments] * 2),
        None if window is None else np.int32(window),
    )
    check(inputs(s=s, k=slots), mask)


@pytest.mark.parametrize(
    ("keys", "tile"), [(11, 11), (320, 320), (2048, 2048), (2560, 1280), (14336, 2048), (4099, 256)]
)
def test_a_single_query_copies_no_cache(keys, tile):
    """Padding it to whole tiles would, for every token that is decoded; only a prime number of slots is padded."""
    cached = jnp.zeros((1, keys, 1, 8))
    tiles = chunked._tiled(jnp.zeros((1, 1, 2, 8)), cached, cached, Where(None, None), None, None)
    assert tiles.sizes == (1, tile)
    assert tiles.key.shape[1] == (keys if keys != 4099 else 4352)


def test_a_query_that_sees_no_key_gets_zero_and_no_gradient():
    segments = np.array([[1] * 10 + [2] * 10] * 2, np.int32)
    mask = where(2, 20)._replace(query_segment=segments, key_segment=np.where(segments == 2, 3, 1).astype(np.int32))
    out, d_query, _, _ = check(inputs(), mask)
    assert not np.asarray(out[:, 10:]).any()
    assert not np.asarray(d_query[:, 10:]).any()
    assert np.asarray(out[:, :10]).any()


def test_a_query_before_every_key():
    mask = where(2, 20)._replace(key_index=np.arange(7, 27, dtype=np.int32))
    out, *_ = check(inputs(), mask)
    assert not np.asarray(out[:, :7]).any()


def test_large_scores_do_not_overflow():
    query, key, value, cotangent = inputs()
    check((query * 30, key * 30, value, cotangent), where(2, 20), tolerance=1e-3)


def test_bfloat16():
    arrays = tuple(np.asarray(x, jnp.bfloat16) for x in inputs(s=21))
    found = check(arrays, where(2, 21), tolerance=3e-2)
    assert {x.dtype for x in found} == {jnp.dtype(jnp.bfloat16)}


@settings(max_examples=8, deadline=None, derandomize=True)
@given(
    b=st.integers(1, 2),
    s=st.integers(1, 20),
    n=st.integers(1, 2),
    g=st.integers(1, 3),
    tile=st.sampled_from([1, 4, 7, 32]),
    window=st.none() | st.integers(1, 12),
    cuts=st.lists(st.integers(0, 20), max_size=3),
    causal=st.booleans(),
    seed=st.integers(0, 100),
)
def test_any_shape(b, s, n, g, tile, window, cuts, causal, seed):
    segments = np.stack([1 + sum((np.arange(s) >= cut).astype(np.int32) for cut in cuts)] * b) if cuts else None
    check(inputs(b, s, h=n * g, n=n, d=4, seed=seed), where(b, s, segments, window), tile, causal=causal)


# What it must never hold.


def loss(mask, tile=None):
    return lambda query, key, value: (attention(query, key, value, mask, scale=0.5, tile=tile) ** 2).sum()


def jitted(f):
    return lambda *args: jax.jit(f)(*args)


def mapped(f):
    return lambda *args: jax.vmap(f)(*(jnp.stack([x] * 2) for x in args)).sum()


def scanned(f):
    return lambda *args: jax.lax.scan(lambda total, _: (total + f(*args), None), 0.0, None, length=3)[0]


# Each calls the loss so many times.
TRANSFORMS = {
    "alone": (lambda f: f, 1),
    "jit": (jitted, 1),
    "vmap": (mapped, 2),
    "scan": (scanned, 3),
    "remat": (jax.checkpoint, 1),
}


@pytest.mark.parametrize("window", [None, 300])
@pytest.mark.parametrize("transform", TRANSFORMS)
def test_no_array_of_queries_by_keys(transform, window):
    length, tile = 1024, 128
    query, key, value, _ = inputs(b=1, s=length, h=2, n=1, d=4)
    run = TRANSFORMS[transform][0](loss(where(1, length, window=window), tile))
    shapes = list(intermediates(jax.make_jaxpr(jax.value_and_grad(run, (0, 1, 2)))(query, key, value).jaxpr))
    assert (tile, tile) in {shape[-2:] for shape in shapes}  # the walk sees the tiles
    assert not [shape for shape in shapes if sum(size >= length for size in shape) >= 2 or np.prod(shape) >= length**2]


def test_the_walk_finds_the_array_in_plain_attention():
    x = np.ones((64, 4), np.float32)
    run = scanned(jitted(lambda x: (jax.nn.softmax(x @ x.T) @ x).sum()))
    assert (64, 64) in set(intermediates(jax.make_jaxpr(jax.grad(run))(x).jaxpr))


@pytest.mark.parametrize("transform", TRANSFORMS)
def test_gradients_under_transforms(transform):
    query, key, value, _ = inputs(s=19)
    mask = where(2, 19, window=7)
    wrap, calls = TRANSFORMS[transform]
    found = compiled(jax.grad(wrap(loss(mask, tile=8)), (0, 1, 2)), query, key, value)
    out, *wanted = expected((query, key, value, None), mask, scale=0.5)
    compare([out, *found], [out, *(calls * gradient for gradient in wanted)], 2e-5)


def test_examples_with_their_own_masks_can_be_mapped():
    """vmap over segment ids, as well as over arrays."""
    query, key, value, _ = inputs(b=4, s=19)
    mask = where(4, 19, np.stack([1 + (np.arange(19) >= cut) for cut in (3, 8, 15, 30)]), window=6)

    def one(query, key, value, segment):
        own = mask._replace(query_segment=segment[None], key_segment=segment[None])
        return attention(query[None], key[None], value[None], own, scale=0.5, tile=8)[0]

    each = compiled(jax.vmap(one), query, key, value, mask.query_segment)
    out, *_ = expected((query, key, value, None), mask, scale=0.5)
    np.testing.assert_allclose(each, out, rtol=1e-4, atol=1e-5)
