"""BA-LoRA: three terms that keep what LoRA makes of a pretrained model near to it, varied and of low rank.

    loss = task + l1 consistency + l2 diversity + l3 svd

Of texts, Z (T, V) the logits of the T tokens that count, q their probabilities, p those of the base:

    consistency   mean over tokens of sum over words of p log(p / q)
    diversity     - mean over tokens of the entropy of q
    svd           - (the k largest singular values of Z) / (all of them)

Of rows that are classified, Z (B, labels) their logits and Z0 the base's:

    consistency   mean of (z / |z| - z0 / |z0|)^2 over rows and labels
    diversity     sum of the squared covariances of different labels / labels
    svd           as above

It trains nothing by itself and stands beside LoRA, as it is published beside PiSSA's start: `lora+ba_lora` with
`lora.init=pissa`. The base is the same weights without the adapters: where a start took s A0 B0 out of W, with A0 and
B0 in the place of A and B. There is no second model.

It saves no memory. A step has a forward pass of the base more, and the logits of both for a chunk of tokens at a time.
Z is never made as a whole: its rows lie in the d dimensions (d + 1 with a bias) that the head has, so that with an
orthonormal basis P (V, d) of these, which is found of the logits of random states, the singular values are those of
Z P (T, d), and so are their gradients. Kept beside LoRA's: the last states of both, Z P and its singular vectors, 4 d
numbers per token, and P in float32. Z P costs as many products as the head.

With micro-batches and on the tokens of a batch the terms are those of each micro-batch; two of the three are no sums
over rows.

Paper: Chang et al. 2024, "BA-LoRA: Bias-Alleviating Low-Rank Adaptation to Mitigate Catastrophic Inheritance in Large
Language Models", arXiv:2408.04556. Deviations: its code loads the base a second time, and takes the logarithm of a
softmax; only tokens with a target count here.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from jaxpeft import tree
from jaxpeft.about import About, Promises
from jaxpeft.errors import InputError
from jaxpeft.method import Method, Spec, View, about
from jaxpeft.model import Batch, Model
from jaxpeft.models.labels import SCOPE
from jaxpeft.train.loss import for_head, in_chunks

Loss = Callable[..., Any]


def ba_lora(consistency: float = 1e-4, diversity: float = 3e-4, svd: float = 1e-4, k: int = 3) -> Method:
    """The three terms, added to the loss of what the chain trains.

    Args:
      consistency: l1.
      diversity: l2.
      svd: l3.
      k: how many singular values are to have the largest share.

    Returns:
      The method; it trains nothing.

    Raises:
      InputError: for a factor below 0 or one that is no number, k below 1. In a step: where the chain trains or packs
        the base's own weights, of which there is then no pretrained form.
    """
    config = dict(locals())
    for name, value in (("consistency", consistency), ("diversity", diversity), ("svd", svd)):
        if not 0 <= value < float("inf"):
            raise InputError(f"ba_lora: {name} {value} must be a finite number of at least 0")
    if k < 1:
        raise InputError(f"ba_lora: k {k} must be at least 1")

    def loss(inner: Loss, view: View) -> Loss:
        check(view)
        return functools.partial(_regularised, inner, view.base, (consistency, diversity, svd), k)

    return Method(loss=loss, specs=(Spec("ba_lora", config),))


def check(view: View) -> None:
    """Refuses a chain in which the base is not what was pretrained, and cannot be had of the leaves."""
    own = _own(view.base)
    for path in view.shapes:
        of_base = tree.canonical(path) in own and not path.startswith(SCOPE)
        if of_base and view.role(path).name != "frozen":
            raise InputError(f"ba_lora: {path} trains, so that no pretrained model is left beside it; use lora+ba_lora")
    for spec in view.specs:
        kernels = about(spec.name).changes_kernels(spec.config)
        if kernels and not any(path.endswith("/a0") for path in view.shapes):
            raise InputError(f"ba_lora: {spec.name} changes the kernels, and does not say how they were; use lora")


def _own(base: Model) -> frozenset[str]:
    """The paths of the base's own parameters."""
    return frozenset(tree.flatten(jax.eval_shape(lambda key: base.init(key, {}), jax.random.key(0))))


def pretrained(base: Model, model: Model, params: tree.Params) -> tuple[Model, tree.Params]:
    """(model, parameters) that compute what the base did before any training, none of it differentiated."""
    flat = {path: jax.lax.stop_gradient(leaf) for path, leaf in tree.flatten(params).items()}
    taken = {path: leaf for path, leaf in flat.items() if path.endswith(("/a0", "/b0"))}
    if taken:
        return model, tree.unflatten({**flat, **{path[:-1]: leaf for path, leaf in taken.items()}})
    own = _own(base)
    return base, tree.unflatten({path: leaf for path, leaf in flat.items() if tree.canonical(path) in own})


def _regularised(inner: Loss, base: Model, factors, k: int, model: Model, params, batch: Batch, key=None):
    """(loss, aux) of a batch; aux has the terms, too."""
    if "labels" not in batch and "loss_weights" not in batch:
        raise InputError(f"ba_lora: needs batches with loss_weights or labels, not of {', '.join(batch)} alone")
    ran, x, _ = model.ran(params, batch, key)
    value, aux = inner(ran, params, batch, key)
    before, taught = pretrained(base, model, params)
    y = before.hidden(taught, batch)
    if "labels" in batch:
        both = ((model, params, x), (before, taught, y))
        z, z0 = (of.head(leaves, of.stack.pool(states, batch)) for of, leaves, states in both)
        terms = of_rows(z, z0, batch["weights"], k)
    else:
        terms = of_tokens((model, params, x), (before, taught, y), batch["loss_weights"], k)
    value += sum(factor * term for factor, term in zip(factors, terms, strict=True))
    return value, {**aux, **dict(zip(("consistency", "diversity", "svd"), terms, strict=True))}


def of_tokens(student, teacher, weights: jax.Array, k: int) -> tuple[jax.Array, jax.Array, jax.Array]:
    """The terms of texts.

    Args:
      student, teacher: (model, nested parameters, states (B, S, d)).
      weights: (B, S), 0 for tokens that do not count.
      k: singular values.
    """
    (model, params, x), (before, taught, y) = student, teacher
    params, taught = for_head(params), for_head(taught)
    basis = jax.lax.stop_gradient(rows_of_head(model, params, x.shape[-1], x.dtype))
    shares = weights / jnp.maximum(jnp.sum(weights, dtype=jnp.float32), 1e-9)

    @jax.checkpoint
    def of_chunk(x, y, share):
        logits = model.head(params, x)
        log_q, log_p = jax.nn.log_softmax(logits), jax.nn.log_softmax(before.head(taught, y))
        apart = jnp.sum(share * jnp.sum(jnp.exp(log_p) * (log_p - log_q), axis=-1))
        entropy = -jnp.sum(share * jnp.sum(jnp.exp(log_q) * log_q, axis=-1))
        inside = jnp.matmul(jnp.where(share > 0, 1, 0)[:, None] * logits, basis, precision="highest")
        return apart, entropy, inside

    chunks = in_chunks(basis.shape[0], x, y, shares)
    apart, entropy, inside = jax.lax.map(lambda chunk: of_chunk(*chunk), tuple(chunks))
    return apart.sum(), -entropy.sum(), -leading_share(inside.reshape(-1, inside.shape[-1]), k)


def rows_of_head(model: Model, params: tree.Params, width: int, dtype: Any) -> jax.Array:
    """An orthonormal basis P (V, min(V, d + 1)) float32 of what the head's logits can be."""
    states = jax.random.normal(jax.random.key(0), (width + 1, width), dtype)
    return jnp.linalg.qr(model.head(params, states).astype(jnp.float32).T)[0]


def of_rows(z: jax.Array, before: jax.Array, weights: jax.Array, k: int) -> tuple[jax.Array, jax.Array, jax.Array]:
    """The terms of classified rows: z, before (B, labels) float32; weights (B,), 0 for rows that do not count."""
    counts = jnp.where(weights > 0, 1.0, 0.0)
    number = jnp.maximum(counts.sum(), 1)
    unit = lambda z: z / jnp.maximum(jnp.linalg.norm(z, axis=-1, keepdims=True), 1e-12)
    apart = jnp.sum(counts * jnp.mean((unit(z) - unit(jax.lax.stop_gradient(before))) ** 2, axis=-1)) / number
    centred = counts[:, None] * (z - jnp.sum(counts[:, None] * z, axis=0) / number)
    covariance = centred.T @ centred / jnp.maximum(number - 1, 1)
    different = jnp.sum(covariance**2) - jnp.sum(jnp.diag(covariance) ** 2)
    return apart, different / z.shape[-1], -leading_share(counts[:, None] * z, k)


def leading_share(z: jax.Array, k: int) -> jax.Array:
    """(the k largest singular values) / (all of them) of a matrix, ()."""
    values = jnp.linalg.svd(z, compute_uv=False)
    return values[:k].sum() / jnp.maximum(values.sum(), 1e-30)


def kept_bytes(config: Any, itemsize: int, **_) -> float:
    """Bytes per token and layer beside LoRA's, of what is kept once: two states, Z P and its singular vectors."""
    d = config.hidden_size
    return (2 * d * itemsize + 2 * (d + 1) * 4) / config.num_hidden_layers


ABOUT = About(
    summary="terms that keep what LoRA learns near to the base, varied and of low rank",
    level="step",
    trains="nothing by itself",
    saves="nothing: a forward pass of the base more, and 4 d numbers per token",
    reference="Chang et al. 2024, arXiv:2408.04556",
    example={},
    promises=Promises(block_bytes=kept_bytes),
    within="lora+ba_lora",
    stored="host",
)
