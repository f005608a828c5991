"""Layers in plain numpy, one equation after the other, to hold adapters against."""

import math

import numpy as np


def dense(w, name, x):
    return x @ w[f"{name}/kernel"] + w.get(f"{name}/bias", 0)


def rms_norm(x, scale, epsilon=1e-5):
    return x / np.sqrt((x * x).mean(-1, keepdims=True) + epsilon) * scale


def layer_norm(w, name, x, epsilon=1e-12):
    x = x - x.mean(-1, keepdims=True)
    return x / np.sqrt((x * x).mean(-1, keepdims=True) + epsilon) * w[f"{name}/scale"] + w[f"{name}/bias"]


def rotated(x, positions, theta=10000.0):
    """x (S, H, D) at positions (S,)."""
    half = x.shape[-1] // 2
    angles = positions[:, None, None] * theta ** (-np.arange(half) / half)
    a, b = x[..., :half], x[..., half:]
    return np.concatenate([a * np.cos(angles) - b * np.sin(angles), b * np.cos(angles) + a * np.sin(angles)], -1)


def attend(q, k, v, seen):
    """q (S, H, D), k and v (K, N, D), seen (S, K): (S, H D)."""
    out = np.zeros_like(q)
    for head in range(q.shape[1]):
        of = head // (q.shape[1] // k.shape[1])
        scores = np.where(seen, q[:, head] @ k[:, of].T / math.sqrt(q.shape[-1]), -np.inf)
        weights = np.exp(scores - scores.max(-1, keepdims=True))
        out[:, head] = weights / weights.sum(-1, keepdims=True) @ v[:, of]
    return out.reshape(len(q), -1)


def heads(w, name, x, count):
    return dense(w, f"self_attn/{name}", x).reshape(len(x), count, -1)


def silu(x):
    return x / (1 + np.exp(-x))


def erf_gelu(x):
    return x * 0.5 * (1 + np.vectorize(math.erf)(x / math.sqrt(2)))


def llama_layer(w, x, positions, seen, after=lambda module, x, y: y, prefix=None, num_heads=4, num_kv=2):
    """One layer on one row x (S, d).

    Args:
      w: {path: array} of the layer.
      positions: (S,).
      seen: (S, S) bool.
      after: (module, its input, its output) -> output, of "self_attn" and "mlp".
      prefix: (k, v) (p, N, D), or None.
    """
    n = rms_norm(x, w["input_layernorm/scale"])
    q, k = (rotated(heads(w, f"{name}_proj", n, count), positions) for name, count in (("q", num_heads), ("k", num_kv)))
    v = heads(w, "v_proj", n, num_kv)
    if prefix is not None:
        k, v = np.concatenate([prefix[0], k]), np.concatenate([prefix[1], v])
        seen = np.concatenate([np.ones((len(x), len(prefix[0])), bool), seen], axis=1)
    x = x + after("self_attn", n, dense(w, "self_attn/o_proj", attend(q, k, v, seen)))
    n = rms_norm(x, w["post_attention_layernorm/scale"])
    product = silu(dense(w, "mlp/gate_proj", n)) * dense(w, "mlp/up_proj", n)
    return x + after("mlp", n, dense(w, "mlp/down_proj", product))


def bert_layer(w, x, seen, after=lambda module, x, y: y, prefix=None, num_heads=4):
    """The same with norms behind, and biases."""
    q, k, v = (heads(w, f"{name}_proj", x, num_heads) for name in "qkv")
    if prefix is not None:
        k, v = np.concatenate([prefix[0], k]), np.concatenate([prefix[1], v])
        seen = np.concatenate([np.ones((len(x), len(prefix[0])), bool), seen], axis=1)
    x = layer_norm(w, "attention_norm", x + after("self_attn", x, dense(w, "self_attn/o_proj", attend(q, k, v, seen))))
    y = dense(w, "mlp/down_proj", erf_gelu(dense(w, "mlp/up_proj", x)))
    return layer_norm(w, "output_norm", x + after("mlp", x, y))


def layer_of(params, i):
    """{path: float64 array} of layer i of flat parameters."""
    return {
        path.removeprefix("layers/"): np.asarray(leaf[i], np.float64)
        for path, leaf in params.items()
        if path.startswith("layers/")
    }
