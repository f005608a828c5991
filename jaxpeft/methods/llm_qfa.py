"""LLM-QFA: each kernel in several widths, each with a LoRA of its own; one run trains a model for every budget of bits.

    y = x Q_k + s (x A_k) B_k      Q_k (n, m) packed in b_k bits (`jaxpeft.quant.affine`), k the layer's width

A step draws a width for each layer and trains the factors of those alone; the others, and what the optimizer keeps of
them, stay as they are. Widths drawn evenly have a mean near the middle, nearly always. So the mean has a schedule, a
triangle from the fewest bits to the most and back in `period` steps, and widths are drawn with p_k ~ exp(theta b_k), of
the theta that has this mean: budgets at both ends are trained as often as those between.

A subnet is a width for each layer: `subnet` chooses one, and merging gives Q_k + s A_k B_k of what is chosen, unpacked
in the base's dtype. `search` finds the one with the least loss within a budget, among random ones and then among
changes of the best, without training.

All widths are in memory: 2, 3 and 4 bits are 9/8 bytes per number. A step unpacks the one that it reads and keeps none.
Factors are r (n + m) numbers for each width.

Paper: Yi et al. 2024, "One QuantLLM for ALL", arXiv:2405.20202; no code is published. Deviations: widths are of whole
layers; kernels are rounded to the nearest, at scales with the least squared error, in place of GPTQ; the scale and
shift that the paper learns beside LoRA are left out; Adam counts all steps, not those of each factor.
"""

from __future__ import annotations

import functools
import zlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax

from jaxpeft import sites, tree
from jaxpeft.about import About, Defaults, Promises
from jaxpeft.errors import InputError
from jaxpeft.method import FROZEN, MOVED, TRAINED, Leaves, Method, Moment, Spec, View, told
from jaxpeft.methods import lora as _lora
from jaxpeft.model import Batch, Context, Model
from jaxpeft.quant import (
    Affine,
    Nested,
    affine,
    by_layer,
    dense,
    folded_as,
    is_packed,
    low_rank_dot,
    matrix,
    pack_affine,
)
from jaxpeft.quant import merged as as_merged
from jaxpeft.quant.nested import chosen_product
from jaxpeft.train.loss import completion_loss
from jaxpeft.widths import check_group, check_packs

CHOSEN = "llm_qfa/chosen"  # the number of each layer's width, (L,) int32
THETAS = np.linspace(-12, 12, 2401)


class LLMQFA(nn.Module):
    """The product of a layer's width. Parameters: a (K, n, r), b (K, r, m), float32, for K widths."""

    rank: int
    scale: float

    @nn.compact
    def __call__(self, inner: Callable, x: jax.Array, site: sites.Site, ctx: Context) -> jax.Array:
        if not site.plain:
            raise InputError("llm_qfa: must be nearest to the kernel, which it chooses: name it last in the chain")
        kernel = matrix(site.kernel)
        n, m = kernel.shape
        count = len(kernel.widths)
        each = lambda key, shape: jax.vmap(lambda key: _lora.INITS["kaiming"](key, shape[1:]))(
            jax.random.split(key, count)
        )
        a = self.param("a", each, (count, n, self.rank))
        b = self.param("b", nn.initializers.zeros, (count, self.rank, m))
        chosen = sites.beside(self, ctx, "llm_qfa", "widths")
        k = jnp.int32(0) if chosen is None else chosen["chosen"][ctx.layer]
        product = functools.partial(chosen_product, kernel=kernel, index=k)
        return low_rank_dot(x, product, a[k], b[k], scale=self.scale)


# Widths.


def logits_of(mean: jax.Array, widths: Sequence[int]) -> jax.Array:
    """theta b_k (K,) of the distribution p_k ~ exp(theta b_k) with a mean () between the least and the most bits."""
    bits = np.asarray(widths, np.float64)
    weights = np.exp(np.outer(THETAS, bits - bits.mean()))
    means = (weights * bits).sum(1) / weights.sum(1)
    return jnp.interp(mean, jnp.asarray(means), jnp.asarray(THETAS)) * jnp.asarray(widths, jnp.float32)


def expected(step: jax.Array, period: int, widths: Sequence[int]) -> jax.Array:
    """The mean of a step's bits, () float32: the fewest at steps 0, `period`, ..., the most halfway."""
    phase = (step % period) / period
    return min(widths) + (max(widths) - min(widths)) * (1 - jnp.abs(2 * phase - 1))


def draw(key: jax.Array, step: jax.Array, layers: int, period: int, widths: Sequence[int]) -> jax.Array:
    """(layers,) int32, the numbers of a step's widths."""
    key = jax.random.fold_in(key, zlib.crc32(b"llm_qfa"))
    logits = logits_of(expected(step, period, widths), widths)
    return jax.random.categorical(key, logits, shape=(layers,)).astype(jnp.int32)


def subnet(params: tree.Params, bits: Sequence[int]) -> tree.Params:
    """The same parameters, of which each layer computes with the width of so many bits.

    Raises:
      InputError: for another number of layers than there are, or a width that their kernels lack.
    """
    flat = tree.flatten(params)
    widths = widths_of(flat)
    if len(bits) != len(flat[CHOSEN]):
        raise InputError(f"llm_qfa: {len(bits)} widths for {len(flat[CHOSEN])} layers")
    if strange := [number for number in bits if number not in widths]:
        raise InputError(f"llm_qfa: {strange[0]} bits are none of {', '.join(map(str, widths))}")
    return tree.unflatten({**flat, CHOSEN: jnp.asarray([widths.index(number) for number in bits], jnp.int32)})


def widths_of(flat: Mapping[str, Any]) -> tuple[int, ...]:
    """The bits of the widths, the fewest first."""
    kernels = (matrix(leaf) for path, leaf in flat.items() if path.endswith("/kernel"))
    return next(tuple(one.bits for one in kernel.widths) for kernel in kernels if isinstance(kernel, Nested))


def search(
    model: Model,
    params: tree.Params,
    batches: Iterable[Batch],
    budget: float,
    random: int = 100,
    changed: int = 50,
    seed: int = 0,
    loss: Callable[..., Any] = completion_loss,
) -> tuple[list[int], float]:
    """The subnet with the least loss whose mean bits are within a budget.

    Args:
      model: the adapted one.  params: its parameters.
      batches: that it is judged by.
      budget: mean bits of the layers.
      random: subnets that are drawn, with any mean within the budget.
      changed: that are made of the ten best so far, each layer drawn anew with a chance of 1 in 4.
      seed: of the draws.
      loss: (model, params, batch, key) -> (loss, aux).

    Returns:
      (bits of each layer, its mean loss).

    Raises:
      InputError: for a budget below the fewest bits.
    """
    flat, batches, rng = tree.flatten(params), list(batches), np.random.default_rng(seed)
    widths, layers = widths_of(flat), len(flat[CHOSEN])
    if budget < widths[0]:
        raise InputError(f"llm_qfa: a budget of {budget} bits is below the fewest, {widths[0]}")
    of = jax.jit(lambda chosen, batch: loss(model, tree.unflatten({**flat, CHOSEN: chosen}), batch, None)[0])
    found: dict[tuple[int, ...], float] = {}

    def judge(chosen):
        while np.mean([widths[k] for k in chosen]) > budget + 1e-9:  # one bit less somewhere, until it fits
            chosen[rng.choice(np.flatnonzero(chosen))] -= 1
        if (key := tuple(map(int, chosen))) not in found:
            found[key] = float(np.mean([of(jnp.asarray(key, jnp.int32), batch) for batch in batches]))

    for _ in range(random):
        weights = np.asarray(jax.nn.softmax(logits_of(rng.uniform(widths[0], min(budget, widths[-1])), widths)), float)
        judge(rng.choice(len(widths), layers, p=weights / weights.sum()))
    for _ in range(changed):
        best = sorted(found, key=lambda chosen: found[chosen])[:10]
        parent = np.array(best[rng.integers(len(best))])
        judge(np.where(rng.random(layers) < 0.25, rng.integers(0, len(widths), layers), parent))
    least = min(found, key=lambda chosen: found[chosen])
    return [widths[k] for k in least], found[least]


# The method.


def saved_bytes(inputs: int, outputs: int, itemsize: int, rank: int = 16, **_) -> int:
    """Bytes per token kept at one adapted kernel beyond what a frozen backbone keeps: as LoRA."""
    return _lora.saved_bytes(inputs, outputs, itemsize, rank)


def llm_qfa(
    widths: Sequence[int] = (2, 3, 4),
    group: int | None = None,
    rank: int = 16,
    alpha: float | None = None,
    period: int = 8000,
    targets: _lora.Targets = "all-linear",
) -> Method:
    """LLM-QFA on the sites that `targets` chooses.

    Args:
      widths: bits of the packed kernels, ascending, of 2, 3, 4 and 8.
      group: inputs that share a scale and a zero point, a divisor of each kernel's; None: 128, or all where that does
        not divide them.
      rank: r, at most the smaller side of each kernel.
      alpha: numerator of the scale; None: the rank (a scale of 1).
      period: steps in which the mean of the bits goes from the fewest to the most and back.
      targets: "all-linear", "attention", "mlp", a regular expression, or a list of names (see `sites.find`).

    Returns:
      The method; it trains `<site>/llm_qfa/a` (L, K, n, r) and `<site>/llm_qfa/b` (L, K, r, m).

    Raises:
      InputError: for widths that are none or not ascending, a rank below 1 or above a kernel's smaller side, a period
        below 2, a group or a number of inputs that does not fit, a kernel that is packed already, or targets that match
        nothing or are not in the layers.
    """
    widths = list(widths)
    config = {**locals()}
    if len(widths) < 2 or sorted(set(widths)) != widths or not set(widths) <= set(affine.FIELDS):
        raise InputError(
            f"llm_qfa: widths {widths} should be two or more of {', '.join(map(str, affine.FIELDS))}, ascending"
        )
    _lora.check_rank("llm_qfa", rank)
    _lora.check_alpha("llm_qfa", alpha)
    if period < 2:
        raise InputError(f"llm_qfa: period {period} must be at least 2")
    if group is not None and group < 1:
        raise InputError(f"llm_qfa: group {group} must be at least 1")
    scale = _lora.scale_of(rank if alpha is None else alpha, rank, False)
    choose = _lora.chosen_sites("llm_qfa", targets, lambda site: rank)

    def pack(w):
        size = group if group is not None else 128 if w.shape[-2] % 128 == 0 else 0
        return Nested(tuple(pack_affine(w, bits, size) for bits in widths))

    def check(site, kernel):
        if kernel.ndim != 3 or not tree.stacked(site):
            raise InputError(f"llm_qfa: {site} is not in the layers, which have a width each")
        if is_packed(kernel):
            raise InputError(f"llm_qfa: {site} is packed already; llm_qfa packs kernels itself")

    def convert(params):
        flat = tree.flatten(params)
        wanted = [site for site in choose(params) if not isinstance(matrix(flat[f"{site}/kernel"]), Nested)]
        for site in wanted:
            check(site, flat[f"{site}/kernel"])
        inputs = {site: flat[f"{site}/kernel"].shape[-2] for site in wanted}
        check_group("llm_qfa", group, inputs)
        fit = [bits for bits in widths if not any(n % Affine.aligned(bits) for n in inputs.values())]
        others = {f"widths {fit}": 1} if len(fit) > 1 else {}
        check_packs("llm_qfa", f"widths {widths} pack", max(map(Affine.aligned, widths)), inputs, others)
        return {f"{site}/kernel": pack for site in wanted}

    def prepare(params, view):
        flat = tree.flatten(params)
        for path, one in convert(params).items():
            flat[path] = folded_as(flat[path], functools.partial(by_layer, one))
        return tree.unflatten(flat)

    def forward(model: Model, view: View) -> Model:
        def embed(params, batch, key):
            x, ctx = model.stack.embed(params, batch, key)
            return x, ctx.add(shared={"llm_qfa": params["llm_qfa"]})

        told = model._replace(stack=model.stack._replace(embed=embed))
        adapted = sites.attach(told, "llm_qfa", lambda site: LLMQFA(rank, scale), choose)

        def init(key, params):
            params = adapted.init(key, params)
            layers = sum(end - first for _, first, end in tree.segments(params))
            fresh = {"chosen": draw(key, jnp.int32(0), layers, period, widths)}
            return params if "llm_qfa" in params else {**params, "llm_qfa": fresh}

        return adapted._replace(init=init)

    def roles(others):
        def role(path):
            if path == CHOSEN:
                return MOVED
            if "/llm_qfa/" in path:
                return TRAINED
            return others(path) if not path.startswith("llm_qfa/") else FROZEN

        return role

    def loss(inner, view):
        def value(model, params, batch, key=None):
            mean, aux = inner(model, params, batch, key)
            chosen = params["llm_qfa"]["chosen"]
            bits = jnp.asarray(widths, jnp.float32)[chosen].mean()
            return mean, {**aux, "bits": bits, "llm_qfa": jax.nn.one_hot(chosen, len(widths))}

        return value

    def move(leaves: Leaves, moment: Moment) -> Leaves:
        chosen = draw(moment.key, moment.step + 1, len(leaves.moved[CHOSEN]), period, widths)
        return Leaves(leaves.trained, {**leaves.moved, CHOSEN: chosen})

    return Method(
        prepare=prepare,
        forward=forward,
        roles=roles,
        loss=loss,
        update=lambda optimizer, view: of_chosen(optimizer, {path: leaf.shape for path, leaf in view.trained.items()}),
        move=move,
        merge=functools.partial(fold, scale=scale),
        specs=(Spec("llm_qfa", config),),
        convert=convert,
    )


def of_chosen(optimizer: optax.GradientTransformation, shapes: Mapping[str, Any]) -> optax.GradientTransformation:
    """The optimizer for factors of the widths that a step has chosen: the others, and their state, stay as they are.

    Raises:
      InputError: at `init`, for an optimizer whose state is not one for each width.
    """
    inner = optax.with_extra_args_support(optimizer)

    def owner(path):
        names = [key.key for key in path if isinstance(getattr(key, "key", None), str)]
        return next((name for name in reversed(names) if "/llm_qfa/" in name), None)

    def init(params):
        state = inner.init(params)
        for path, leaf in jax.tree_util.tree_leaves_with_path(state):
            own = owner(path)
            if own and leaf.shape[:2] != shapes[own][:2] and leaf.size > len(params[own]):
                shape = "x".join(map(str, leaf.shape))
                raise InputError(
                    f"llm_qfa: the optimizer keeps {shape} numbers of {own} for all widths together, of which each "
                    "step trains one; take adam or lion"
                )
        return state

    def update(grads, state, params=None, *, aux=None, **extra):
        directions, after = inner.update(grads, state, params, aux=aux, **extra)
        hit = told("llm_qfa", aux, "llm_qfa") > 0.5

        def kept(path, new, old):
            own = owner(path)
            if own is None or new.shape[:2] != shapes[own][:2]:
                return new
            first = _first_layer(own)
            rows = hit[first : first + new.shape[0]]
            return jnp.where(rows.reshape(*rows.shape, *[1] * (new.ndim - 2)), new, old)

        zero = jax.tree.map(jnp.zeros_like, directions)
        mapped = jax.tree_util.tree_map_with_path
        return mapped(kept, directions, zero), mapped(kept, after, state)

    return optax.GradientTransformationExtraArgs(init, update)


def _first_layer(path: str) -> int:
    """The number of the first layer of the segment that a leaf is of."""
    ((_, first, _),) = tree.segments({path.split("/", 1)[0]: {"": jnp.zeros((1,))}})
    return first


def fold(params: Mapping[str, Any], scale: float) -> tree.Params:
    """W <- Q_k + s A_k B_k of each layer's chosen width, a plain array; the leaves go."""
    flat = tree.flatten(params)
    merged = {path: leaf for path, leaf in flat.items() if "/llm_qfa/" not in path and path != CHOSEN}
    for site in sorted({path.split("/llm_qfa/")[0] for path in flat if "/llm_qfa/" in path}):
        kernel, a, b = flat[f"{site}/kernel"], flat[f"{site}/llm_qfa/a"], flat[f"{site}/llm_qfa/b"]
        first = _first_layer(site)
        chosen = jnp.asarray(flat[CHOSEN])[first : first + len(a)]
        each = [(chosen == k)[:, None, None] for k in range(a.shape[1])]
        w = sum(jnp.where(here, dense(one), 0) for here, one in zip(each, matrix(kernel).widths, strict=True))
        rows = jnp.arange(len(chosen))
        delta = scale * jnp.matmul(a[rows, chosen], b[rows, chosen], precision="highest")
        merged[f"{site}/kernel"] = as_merged(kernel, w + delta)
    return tree.unflatten(merged)


ABOUT = About(
    summary="each kernel in 2, 3 and 4 bits, each with a LoRA of its own: one run, a model for every budget",
    level="site",
    trains="A and B of the widths that a step draws, r(n+m) numbers per kernel and width",
    saves="as LoRA, and the kernels' bytes but 9 bits per number, of all widths together",
    reference="Yi et al. 2024, arXiv:2405.20202",
    example={"widths": [4, 8], "rank": 4, "period": 6},
    promises=Promises(site_bytes=saved_bytes, starts_at_base=False),
    defaults=Defaults(weight_decay=0.0),
    changes_kernels=lambda config: True,
)
