"""INT2.1: kernels of 2 bits, and low-rank parts that win back what the packing lost.

    y = x Q + s (x A) B            Q (n, m) packed in integers of 2, 3, 4 or 8 bits (`jaxpeft.quant.affine`), frozen
    loss = (1 - w) task + w mean over tokens of sum over words of p log(p / q)        w = `recover`

p are the probabilities of the base, q those of the adapted model. With w > 0 the unpacked kernels stay beside the
packed ones, and each step has a forward pass of the base more, of which nothing is kept but its last states, d numbers
per token; the logits of both exist for a chunk of tokens at a time. So a model is recovered first, on any text, with
`recover=1`; its adapter, which `--adapter` trains on, brings all but the recovery with it, and memory is that of 2 bits
from there on.

A and B start at the first r singular values of W - Q, their roots on both sides, over sqrt(s) (`init="error"`), or as
LoRA's ("kaiming"). No product keeps an unpacked kernel. An adapter goes with the kernels as its base has them, which
are packed again where it is read. Merging gives Q + s A B in the base's dtype.

Paper: Chai et al. 2023, "INT2.1", arXiv:2306.08162, groups of 128. No code is published. Deviations: rounding to the
nearest, at scales with the least squared error, in place of GPTQ (whose checkpoints `lora` trains beside as they are);
the start at the error, which is LoftQ's (Li et al. 2023, arXiv:2310.08659); the loss of the recovery, of which the
paper names no formula.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from jaxpeft import sites, tree
from jaxpeft.about import About, Defaults, Promises
from jaxpeft.errors import InputError
from jaxpeft.method import Method, Spec, trains, unchanged
from jaxpeft.methods import lora as _lora
from jaxpeft.methods.lq_lora import principal
from jaxpeft.model import Batch, Model
from jaxpeft.quant import Affine, Paired, affine, by_layer, dense, folded_as, is_packed, matrix, pack_affine
from jaxpeft.train.loss import for_head, in_chunks
from jaxpeft.widths import check_affine

INITS = ("error", "kaiming")
GROUP = 128


def pack(w: jax.Array, bits: int, group: int | None, pairs: bool) -> Affine | Paired:
    """The packed kernel of W (n, m), beside it if `pairs`; groups of 128 inputs, or all where that divides them not."""
    if group is None:
        group = GROUP if w.shape[-2] % GROUP == 0 else 0
    packed = pack_affine(w, bits, group)
    return Paired(packed, w) if pairs else packed


@functools.partial(jax.jit, static_argnames="rank")
def of_error(w: jax.Array, q: jax.Array, *, rank: int) -> tuple[jax.Array, jax.Array]:
    """A (n, r), B (r, m) with the first r singular values of W - Q, (n, m) float32."""
    return principal(w.astype(jnp.float32) - q, rank)


def divergence(
    student: Callable[[jax.Array], jax.Array],
    teacher: Callable[[jax.Array], jax.Array],
    x: jax.Array,
    y: jax.Array,
    shares: jax.Array,
) -> jax.Array:
    """sum_t w_t sum_v p log(p / q) of tokens in chunks, () float32; no chunk's logits are kept.

    Args:
      student, teacher: a chunk's states (n, d) -> logits (n, V) float32.
      x, y: their states (C, n, d).
      shares: w (C, n).
    """

    @jax.checkpoint
    def of_chunk(x, y, share):
        log_p, log_q = jax.nn.log_softmax(jax.lax.stop_gradient(teacher(y))), jax.nn.log_softmax(student(x))
        return jnp.sum(share * jnp.sum(jnp.exp(log_p) * (log_p - log_q), axis=-1))

    return jax.lax.map(lambda chunk: of_chunk(*chunk), (x, y, shares)).sum()


def int21(
    bits: int = 2,
    group: int | None = None,
    rank: int = 16,
    alpha: float | None = None,
    init: str = "error",
    recover: float = 0.0,
    targets: _lora.Targets = "all-linear",
) -> Method:
    """INT2.1 on the sites that `targets` chooses.

    Args:
      bits: of a packed number: 2, 3, 4 or 8.
      group: inputs that share a scale and a zero point, a divisor of each kernel's; None: 128, or all where that does
        not divide them.
      rank: r, at most the smaller side of each kernel.
      alpha: numerator of the scale; None: the rank (a scale of 1).
      init: how A and B start: "error" or "kaiming".
      recover: w, the share of the base's outputs in the loss, from 0 to 1.
      targets: "all-linear", "attention", "mlp", a regular expression, or a list of names (see `sites.find`).

    Returns:
      The method; it trains `<site>/int21/a` (L, n, r) and `<site>/int21/b` (L, r, m).

    Raises:
      InputError: for other bits, a rank below 1 or above a kernel's smaller side, an unknown init, a share that is
        none, a group or a number of inputs that does not fit, a kernel that is packed already, recovery of a model that
        classifies, or targets that match nothing or, where layers are visible, are not in them.
    """
    config = dict(locals())
    _lora.check_rank("int21", rank)
    _lora.check_alpha("int21", alpha)
    if bits not in affine.FIELDS:
        raise InputError(f"int21: bits {bits} is not one of {', '.join(map(str, affine.FIELDS))}")
    if group is not None and group < 1:
        raise InputError(f"int21: group {group} must be at least 1")
    if init not in INITS:
        raise InputError(f"int21: init {init!r} is not one of {', '.join(INITS)}")
    if not 0 <= recover <= 1:
        raise InputError(f"int21: recover {recover} must be from 0 to 1")
    scale = _lora.scale_of(rank if alpha is None else alpha, rank, False)
    choose = _lora.chosen_sites("int21", targets, lambda site: rank)
    as_read = init == "kaiming" or recover > 0  # whether what is packed is all that is asked for
    one = functools.partial(pack, bits=bits, group=group, pairs=recover > 0)

    def check(site, kernel, layered):
        if layered and (kernel.ndim != 3 or not tree.stacked(site)):
            raise InputError(f"int21: {site} is not in the layers, whose kernels alone can be packed")
        if is_packed(kernel):
            raise InputError(
                f"int21: {site} is packed already; int21 packs kernels itself: give quantize other targets"
            )

    def ours(kernel):
        found = kernel.packed if isinstance(kernel, Paired) else kernel
        return isinstance(found, Affine) and found.bits == bits and isinstance(kernel, Paired) == (recover > 0)

    def convert(params):
        flat = tree.flatten(params)
        wanted = [site for site in choose(params) if not (as_read and ours(matrix(flat[f"{site}/kernel"])))]
        for site in wanted:
            check(site, flat[f"{site}/kernel"], bool(tree.segments(params)))
        check_affine("int21", bits, group, {site: flat[f"{site}/kernel"].shape[-2] for site in wanted})
        return {f"{site}/kernel": one for site in wanted}

    def prepare(params, view):
        flat = tree.flatten(params)
        before = {path: matrix(leaf) for path, leaf in flat.items() if path.endswith("/kernel")}
        for path, function in convert(params).items():
            flat[path] = folded_as(flat[path], functools.partial(by_layer, function))
        for site in choose(params) if init == "error" else ():
            if f"{site}/int21/a" not in flat:
                plain = before[f"{site}/kernel"]
                plain = plain.plain if isinstance(plain, Paired) else plain
                factors = by_layer(functools.partial(of_error, rank=rank), plain, dense(matrix(flat[f"{site}/kernel"])))
                flat |= {
                    f"{site}/int21/{name}": factor / scale**0.5 for name, factor in zip("ab", factors, strict=True)
                }
        return tree.unflatten(flat)

    def loss(inner, view):
        if view.base.config is not None and view.base.config.num_labels:
            raise InputError("int21: recover is of the next word's probabilities; this model classifies rows")
        return functools.partial(_recovered, inner, view.base, recover)

    method = Method(
        prepare=prepare,
        forward=lambda model, view: sites.attach(model, "int21", lambda site: _lora.LoRA(rank, scale), choose),
        roles=trains(lambda path: path.endswith(("/int21/a", "/int21/b"))),
        loss=loss if recover > 0 else unchanged,
        merge=lambda params: _lora.fold(
            params, "int21", lambda _: scale, lambda own, _: (own["a"], own["b"]), lambda site: rank
        ),
        specs=(Spec("int21", {**config, "recover": 0.0}),),
    )
    return method._replace(convert=convert) if as_read else method


def _recovered(inner: Callable[..., Any], base: Model, share: float, model: Model, params, batch: Batch, key=None):
    """(1 - w) inner + w divergence from the base, on a batch with `loss_weights`."""
    own = tree.flatten(jax.eval_shape(lambda key: base.init(key, {}), jax.random.key(0)))
    plain = lambda kernel: kernel.plain if isinstance(kernel, Paired) else kernel
    taught = tree.unflatten({path: plain(leaf) for path, leaf in tree.flatten(params).items() if path in own})
    y = jax.lax.stop_gradient(base.hidden(taught, batch))
    ran, x, _ = model.ran(params, batch, key)
    weight = jnp.sum(batch["loss_weights"], dtype=jnp.float32)
    vocabulary = jax.eval_shape(model.head, params, x[0]).shape[-1]
    chunks = in_chunks(vocabulary, x, y, batch["loss_weights"] / jnp.maximum(weight, 1e-9))
    heads = [functools.partial(of.head, for_head(leaves)) for of, leaves in ((model, params), (base, taught))]
    apart = divergence(*heads, *chunks)
    if share == 1:
        return apart, {"weight": weight}
    mean, aux = inner(ran, params, batch, key)
    return (1 - share) * mean + share * apart, {**aux, "divergence": apart}


ABOUT = About(
    summary="kernels of 2 to 8 bits, and low-rank parts that start at what these lose and learn the base's outputs",
    level="site",
    trains="A and B, r(n+m) numbers per kernel",
    saves="as LoRA, and the kernels' bytes but 2 to 8 bits per number, once the base's outputs are learned",
    reference="Chai et al. 2023, arXiv:2306.08162",
    example={"rank": 4, "bits": 2},
    promises=Promises(site_bytes=_lora.saved_bytes, starts_at_base=False),
    defaults=Defaults(),
    changes_kernels=lambda config: True,
)
