"""A decoder that is small in every dimension, and batches for it."""

import functools

import jax
import jax.numpy as jnp
import numpy as np

from jaxpeft.models import decoder

CONFIG = {
    "model_type": "llama",
    "vocab_size": 97,
    "hidden_size": 32,
    "intermediate_size": 56,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "rms_norm_eps": 1e-5,
}


def config(dtype=jnp.float32, **changes):
    return decoder.DecoderConfig.from_hf({**CONFIG, **changes}, dtype)


@functools.cache
def model(dtype=jnp.float32, **changes):
    """(Model, params): weights large enough that logits are far from uniform."""
    made = decoder.decoder(config(dtype, **changes))
    params = made.init(jax.random.key(7), {})
    return made, jax.tree.map(lambda x: x * 3 if x.ndim > 1 and x.std() > 0 else x, params)


def batch(rows=4, length=16, seed=0, vocab=97):
    rng = np.random.default_rng(seed)
    ids = rng.integers(0, vocab, (rows, length + 1)).astype(np.int32)
    weights = (rng.random((rows, length)) < 0.7).astype(np.float32)
    return {
        "tokens": ids[:, :-1],
        "targets": ids[:, 1:],
        "loss_weights": weights,
        "positions": np.tile(np.arange(length, dtype=np.int32), (rows, 1)),
        "segment_ids": np.ones((rows, length), np.int32),
    }
