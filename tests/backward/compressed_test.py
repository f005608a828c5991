"""8-bit codes: unbiased, within half a step, and what they and 12 bits do to the gradients of a pretrained model."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxpeft as jp
from jaxpeft import data, hf, tree
from jaxpeft.backward import kept, residuals
from jaxpeft.backward.compressed import Compressed, compress, decompress, uniform
from tests import tiny


def round_trip(x, seed=0):
    return decompress(compress(x, jnp.uint32(seed)), x.dtype)


def steps(stored):
    """What one code is worth, float64."""
    return np.asarray(stored.scale, np.float64) * np.asarray(stored.size, np.float64)


def numbers(seed=0, shape=(2, 7, 24), dtype=np.float32):
    """Tokens of different sizes, channels with different means and sizes."""
    rng = np.random.default_rng(seed)
    x = rng.normal(size=shape) * np.exp(rng.normal(size=(*shape[:-1], 1)))
    return jnp.asarray((x + 5 * rng.normal(size=shape[-1])) * np.exp(2 * rng.normal(size=shape[-1])), dtype)


def test_the_mean_over_seeds_is_exact():
    """Errors are uniform in half a step either way: of N draws the mean has a deviation of step / sqrt(12 N)."""
    x, draws = numbers(), 4096
    found = jax.jit(jax.vmap(functools.partial(round_trip, x)))(jnp.arange(draws, dtype=jnp.uint32))
    stored = compress(x, jnp.uint32(0))
    errors = (np.asarray(found, np.float64) - np.asarray(x, np.float64)) / steps(stored)
    assert np.abs(errors).max() < 0.5 + 1e-3  # float32 rounding of numbers of up to 127 steps, on a mean of more
    deviations = errors.mean(0) * np.sqrt(12 * draws)
    assert np.abs(deviations).max() < 5  # of 336 of unit normals: one in 5000 times such a table
    assert 0.8 < deviations.std() < 1.2
    np.testing.assert_allclose(errors.std(0), 12**-0.5, rtol=0.05)


def test_errors_of_neighbours_are_independent():
    """Also from seed to seed, as those of consecutive layers and groups are."""
    shape = (4, 64, 64)
    u = np.stack([np.asarray(uniform(shape, jnp.uint32(seed)), np.float64) for seed in range(8)])
    assert abs(u.mean() - 0.5) < 5 / np.sqrt(12 * u.size)
    centred = (u - 0.5) * np.sqrt(12)
    for axis in range(4):
        moved = np.roll(centred, 1, axis)
        assert abs((centred * moved).mean()) < 5 / np.sqrt(u.size)


def test_dither_is_never_0_or_1():
    """Also where all bits of the hash are set, which with 24 of them would round to 1."""
    u = uniform((1 << 22,), jnp.uint32(1))
    assert u.min() > 0 and u.max() < 1
    assert not np.asarray(round_trip(jnp.zeros((1, 2048, 2048)), 5)).any()


def test_one_scale_per_token_and_two_numbers_per_channel_of_a_row():
    stored = compress(numbers(shape=(2, 7, 3, 24)), jnp.uint32(0))
    shapes = Compressed((2, 7, 3, 24), (2, 7, 3, 1), (2, 1, 3, 24), (2, 1, 3, 24), ())
    assert jax.tree.map(jnp.shape, stored, is_leaf=lambda x: isinstance(x, jax.Array)) == shapes
    assert [x.dtype for x in stored] == [jnp.int8, jnp.float32, jnp.bfloat16, jnp.bfloat16, jnp.uint32]


def test_a_token_does_not_coarsen_the_others():
    """An outlier of one token leaves the others' steps as they are, but for its part in the channels' sizes."""
    x = np.asarray(numbers(shape=(1, 512, 24)))
    loud = x.copy()
    loud[0, 3] *= 20
    before, after = (steps(compress(jnp.asarray(a), jnp.uint32(0))) for a in (x, loud))
    others = np.arange(512) != 3
    assert np.median(after[0, others] / before[0, others]) < 2
    assert np.median(after[0, 3] / before[0, 3]) > 5


def test_a_channel_does_not_coarsen_the_others():
    """A channel a thousand times as large, and nearly constant: as queries and keys have them."""
    x = np.array(numbers(shape=(1, 64, 24)))
    x[..., 5] = 1000 * (1 + 0.01 * x[..., 5] / np.abs(x[..., 5]).max())
    error = np.abs(np.asarray(round_trip(jnp.asarray(x))) - x).max((0, 1))
    assert (error < 0.03 * x.std((0, 1))).all()


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16, jnp.float16])
@pytest.mark.parametrize("size", [0, 1e-38, 1e-20, 1.0, 1e4, 1e18, 1e29])
def test_any_size(dtype, size):
    """Within half a step, and half a unit of the dtype; zeros stay zeros, and what is nearly 0 stays so."""
    x = (numbers(1).astype(jnp.float32) / jnp.abs(numbers(1)).max() * size).astype(dtype)
    if not np.isfinite(np.asarray(x, np.float32)).all():
        pytest.skip(f"{size} is no {jnp.dtype(dtype).name}")
    found = round_trip(x, 3)
    assert found.dtype == dtype
    exact = np.asarray(x, np.float64)
    bound = 0.501 * steps(compress(x, jnp.uint32(3))) + float(jnp.finfo(dtype).eps) * np.abs(exact) + 1e-28
    assert (np.abs(np.asarray(found, np.float64) - exact) <= bound).all()
    if size == 0:
        assert not np.asarray(found).any()


@pytest.mark.parametrize("shape", [(3,), (1, 5), (2, 1, 5), (2, 3, 4, 5)])
def test_any_shape(shape):
    x = numbers(shape=shape)
    stored = compress(x, jnp.uint32(0))
    assert (np.abs(np.asarray(round_trip(x) - x)) <= 0.501 * steps(stored) + 1e-5 * np.abs(x)).all()


# Gradients.


def flat(gradients):
    return np.concatenate([np.asarray(gradients[path], np.float64).ravel() for path in sorted(gradients)])


def drawn(model, trainable, frozen, batch, save):
    """key -> the flat gradient."""

    @jax.jit
    def run(key):
        def loss(trainable):
            return jp.completion_loss(residuals.remat(model, save), tree.combine(trainable, frozen), batch, key)[0]

        return jax.grad(loss)(trainable)

    return lambda seed: flat(run(jax.random.key(seed)))


def test_the_mean_gradient_is_exact():
    """v and up enter linearly. Of N draws the mean is wrong by 1 / sqrt(N) of what one is, in norm."""
    base, params = tiny.model()
    model, trainable, frozen = jp.setup(jp.lora(4), base, params, jax.random.key(0))
    trainable = {path: x + 0.05 * jax.random.normal(jax.random.key(3), x.shape) for path, x in trainable.items()}
    arguments = (model, trainable, frozen, tiny.batch())
    exact = drawn(*arguments, "matmuls")(0)
    draw = drawn(*arguments, "matmuls,v_proj=compress,up_proj=compress")
    errors = np.stack([draw(seed) - exact for seed in range(256)])
    one = np.sqrt((errors**2).sum(1).mean())
    assert one > 1e-4 * np.linalg.norm(exact)
    assert np.linalg.norm(errors.mean(0)) < 1.5 * one / np.sqrt(len(errors))


@pytest.fixture(scope="module")
def stories(shared_data):
    """(model, trainable, frozen, batch): LoRA of rank 8 on stories260K and a packed batch of e2e_nlg, 8 x 256."""
    checkpoint = shared_data / "checkpoints/stories260K"
    base, params = jp.load_pretrained(checkpoint, jnp.float32)
    file = shared_data / "instruct/e2e_nlg.train.jsonl"
    examples, _ = data.load_examples(file, hf.load_tokenizer(checkpoint), 256, too_long="drop")
    batch, _ = next(data.make_batches(examples, 8, 256, 0, pack=True))
    return *jp.setup(jp.lora(8, alpha=16), base, params, jax.random.key(0)), batch


@pytest.fixture(scope="module")
def exact(stories):
    """The gradient of what is kept in float32."""
    return drawn(*stories, "matmuls")(0)


def in_bfloat16(stories, save, patch):
    """The gradient with bfloat16 in place of all codes."""
    patch.setattr(kept, "compress", lambda x, seed: (x.astype(jnp.bfloat16),))
    patch.setattr(kept, "shorten", lambda x: (x.astype(jnp.bfloat16),))
    for name in ("decompress", "lengthen"):
        patch.setattr(kept, name, lambda stored, dtype: stored[0].astype(dtype))
    patch.setattr(kept, "stored", kept.stored.__wrapped__)
    jax.clear_caches()
    return drawn(*stories, save)(0)


@pytest.mark.slow
def test_gradients_of_a_pretrained_model(stories, exact, monkeypatch):
    """As exact as keeping the same arrays in bf16 would be, within a quarter; and about 1 % of the gradient's norm.

    Its attention scores are as large as 100, and keys and queries have channels whose mean is several times their
    deviation: with a plain scale per token the error is as large as the gradient.
    """
    ours = np.linalg.norm(drawn(*stories, "compressed")(0) - exact)
    assert ours < 1.25 * np.linalg.norm(in_bfloat16(stories, "compressed", monkeypatch) - exact)


@pytest.mark.slow
def test_its_gradients_from_12_bits(stories, exact, monkeypatch):
    """As exact as keeping the same arrays in bf16, but for what becomes zero: of a block in norm below 2^-10 of its
    largest number, where bf16 rounds each by up to 2^-8. Seldom is so much lost, and as squares they add: 1 %."""
    ours = np.linalg.norm(drawn(*stories, "compressed12")(0) - exact)
    assert 0 < ours < 1.01 * np.linalg.norm(in_bfloat16(stories, "compressed12", monkeypatch) - exact)
