"""MixLoRA: each layer's MLP is several experts, LoRAs of its kernels, of which a router chooses k for each token.

    p = softmax(x R),  R (d, E);      K the k experts of the largest p,  w_e = p_e / sum over K of p
    h_e = act(x W_g + s (x A_g,e) B_g,e) * (x W_u + s (x A_u,e) B_u,e)
    y   = (sum over K of w_e h_e) W_d + s sum over K of w_e (h_e A_d,e) B_d,e          s = alpha / r

W frozen, R, A (n, r) and B (r, m) trained; an MLP without a gate has h_e = act(x W_u + s (x A_u,e) B_u,e). Kernels
outside the MLPs have ordinary LoRA. B is zero at the start: the adapted model starts at the base, as the w_e of a token
sum to 1. The products with W_g, W_u and W_d are those of one MLP, whatever E and k are: the first two are shared by all
experts, and the third is linear.

The factors of all experts lie side by side: A is (n, E r), B (E r, m). A token's parts of x A that belong to others
than its expert are set to zero before the product with B, so nothing is sorted, gathered or dropped. That is E times
the operations of one expert's product, 2 t E r (n + k m) for t tokens, where n and m are in the thousands and E r, 128
with 8 experts of rank 16, is the depth that a TPU's matrix unit works at anyway: on Llama-3.2-1B an eighth of what the
MLP's kernels take, forward. A mask needs t E r numbers for the time of a product; gathered factors t r (n + m).

The loss is that of the task + c E sum over layers and experts of f_e p_e: f_e is the share of tokens whose K has e (k
in sum, as in Mixtral's code), p_e the mean of p; c = `router_aux_loss_coef`. Tokens of padding are not counted. With
`balance="batch"` the means are over all tokens of a batch, so with micro-batches the term is the mean of theirs, as
everywhere. With "rows" they are over each row's, and the terms of rows are averaged as the rows count in the loss
(DeepSeek-V2's and V3's loss per sequence); then micro-batches change nothing.

Kept for the backward pass beyond a frozen backbone: x, d numbers per token, shared by the router, gate and up; 3 k r
numbers, the chosen parts of x A and h_e A; the router's E logits. Each expert's h_e is computed again of the MLP's gate
and up. Reference code keeps 3 k f numbers.

It has no merged form and none in PEFT.

Paper: Li et al. 2024, "MixLoRA: Enhancing Large Language Models Fine-Tuning with LoRA-based Mixture of Experts",
arXiv:2404.15159; the balance term: Fedus et al. 2021, arXiv:2101.03961. Deviations: no dropout, no noise on the
router's input, no z-loss and no other routers than top-k; the router's product is of the stream's dtype with float32
sums, its softmax float32.
"""

from __future__ import annotations

import functools
import zlib
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from jaxpeft import features, sites, tree
from jaxpeft import targets as choices
from jaxpeft.about import About, Promises
from jaxpeft.errors import InputError
from jaxpeft.method import Method, Spec, trains, unchanged
from jaxpeft.methods import lora as _lora
from jaxpeft.model import Batch, Context, Model, reads_stacks
from jaxpeft.models.layers import MLP, GatedMLP
from jaxpeft.sites import Site

NAME = "mixlora"
BALANCES = ("batch", "rows")
_again = functools.partial(jax.checkpoint, prevent_cse=False)


class Factors(nn.Module):
    """All experts' factors of a kernel, a (n, E r) and b (E r, m), float32; its MLP reads them, not the product."""

    stacked = True

    columns: int

    @nn.compact
    def __call__(self, inner: Callable, x: jax.Array, site: Site, ctx: Context) -> jax.Array:
        n, m = site.kernel.shape
        self.param("a", _lora.INITS["kaiming"], (n, self.columns))
        self.param("b", nn.initializers.zeros, (self.columns, m))
        return inner(x)


def mixlora(
    rank: int = 8,
    alpha: float | None = None,
    experts: int = 8,
    top_k: int = 2,
    router_aux_loss_coef: float = 1e-2,
    balance: str = "batch",
    targets: _lora.Targets = "all-linear",
) -> Method:
    """Experts in each MLP that `targets` chooses a kernel of, LoRA at the other kernels that it chooses.

    Args:
      rank: r of each expert and each LoRA, at most the smaller side of each kernel.
      alpha: numerator of the scale; None: the rank.
      experts: E, of each layer.
      top_k: k, experts of a token.
      router_aux_loss_coef: c, the weight of the balance term; 0: there is none.
      balance: over what the term's means are: "batch" or "rows".
      targets: "all-linear", "mlp", a regular expression, or a list of names (see `sites.find`).

    Returns:
      The method; it trains `layers/mlp/mixlora/router` (L, d, E), and at each kernel `<site>/mixlora/a` and `b`: of
      an MLP (L, n, E r) and (L, E r, m), elsewhere (L, n, r) and (L, r, m). It has no merged form.

    Raises:
      InputError: for a number out of range, an unknown balance, targets that match nothing or no kernel of an MLP. In a
        step with the balance term: for a chain that runs the layers in a way that loses what the routers say.
    """
    config = dict(locals())
    _lora.check_rank(NAME, rank)
    _lora.check_alpha(NAME, alpha)
    if experts < 1:
        raise InputError(f"mixlora: experts {experts} must be at least 1")
    if not 1 <= top_k <= experts:
        raise InputError(f"mixlora: top_k {top_k} must be at least 1 and at most the number of experts, {experts}")
    if not 0 <= router_aux_loss_coef < float("inf"):
        raise InputError(f"mixlora: router_aux_loss_coef {router_aux_loss_coef} must be a finite number of at least 0")
    if balance not in BALANCES:
        raise InputError(f"mixlora: balance {balance!r} is not one of {', '.join(BALANCES)}")
    mixture = Mixture(experts, top_k, (alpha if alpha is not None else rank) / rank)
    choose = _lora.chosen_sites(NAME, targets, lambda site: rank)

    def adapter(site):
        return Factors(experts * rank) if of_mlp(site) else _lora.LoRA(rank, mixture.scale)

    def forward(model, view):
        return with_experts(sites.attach(model, NAME, adapter, choose), mixture, choose)

    def loss(inner, view):
        return functools.partial(_balanced, inner, router_aux_loss_coef, balance, top_k)

    return Method(
        forward=forward,
        roles=trains(lambda path: f"/{NAME}/" in path),
        loss=loss if router_aux_loss_coef else unchanged,
        merge=features.no_merge(NAME, "each token chooses its experts"),
        specs=(Spec(NAME, config),),
    )


def of_mlp(site: str) -> bool:
    """Whether a site is in a layer's MLP."""
    return tree.canonical(site).startswith("layers/mlp/")


# The experts.


class Mixture(NamedTuple):
    """E, k and s."""

    experts: int
    top_k: int
    scale: float


def chosen(logits: jax.Array, k: int) -> tuple[jax.Array, jax.Array]:
    """(weights (..., k) float32 of sum 1, numbers (..., k) int32) of the experts with the largest logits (..., E)."""
    shares, which = jax.lax.top_k(jax.nn.softmax(logits), k)
    return shares / jnp.sum(shares, axis=-1, keepdims=True), which


def part_of(low: jax.Array, which: jax.Array, experts: int) -> jax.Array:
    """Of low (..., E r) the numbers of the expert `which` (...), (..., r)."""
    by_expert = low.reshape(*low.shape[:-1], experts, -1)
    return jnp.sum(jnp.where(_is(which, experts), by_expert, 0), axis=-2)


def put(part: jax.Array, which: jax.Array, experts: int) -> jax.Array:
    """The transpose of `part_of`: part (..., r) at its expert's place in (..., E r), where all else is 0."""
    whole = jnp.where(_is(which, experts), part[..., None, :], 0)
    return whole.reshape(*part.shape[:-1], -1)


def _is(which, experts):
    return (which[..., None] == jnp.arange(experts))[..., None]


def said(logits: jax.Array, which: jax.Array, counts: jax.Array | None) -> jax.Array:
    """(B, 2 E) float32: how many of each row's tokens chose each expert, and the sums of their probabilities.

    Args:
      logits: (B, S, E).  which: (B, S, k).
      counts: (B, S), whether a token counts; None: all do.
    """
    experts = logits.shape[-1]
    times = jnp.sum(which[..., None] == jnp.arange(experts), axis=-2).astype(jnp.float32)
    both = jnp.concatenate([times, jax.nn.softmax(logits)], axis=-1)
    return jnp.sum(both if counts is None else jnp.where(counts[..., None], both, 0), axis=1)


class Routed:
    """One layer's MLP as it runs: an interceptor of Flax modules that puts the experts into it.

    said: of `said`; None before, and in a layer without experts.
    """

    def __init__(self, mixture: Mixture, ctx: Context):
        self.mixture, self.ctx = mixture, ctx
        self.said: jax.Array | None = None

    def __call__(self, next_function, args, kwargs, context):
        module, method = context.module, context.method_name
        if not isinstance(module, MLP | GatedMLP) or not module.has_variable("params", NAME):
            return next_function(*args, **kwargs)
        if method == "__call__":
            return self.run(next_function, module.variables["params"], *args)
        if method == "activated":
            return self.mixed(next_function, args)
        return next_function(*args, **kwargs)

    def run(self, mlp: Callable, params: Mapping[str, Any], x: jax.Array) -> jax.Array:
        """The MLP; its kernels' products are as ever, but for what down reads (`mixed`)."""
        experts, k, scale = self.mixture
        router = params[NAME]["router"].astype(x.dtype)
        logits = jnp.matmul(x, router, preferred_element_type=jnp.float32)
        logits = checkpoint_name(logits, "router_logits")
        self.weights, self.which = _again(functools.partial(chosen, k=k))(logits)
        segments = features.segments_in(NAME, self.ctx, x)
        counts = None if segments is None else segments > 0
        self.said = _again(said)(logits, self.which, counts)
        self.factors = {
            name: tuple(own[NAME][factor].astype(x.dtype) for factor in "ab")
            for name, own in params.items()
            if name != NAME and NAME in own
        }
        opening = {name: x @ a for name, (a, _) in self.factors.items() if name != "down_proj"}
        self.parts = {name: self.parts_of([low] * k) for name, low in opening.items()}
        y = mlp(x)
        if "down_proj" not in self.factors:
            return y

        @_again
        def down(part, weights, which, b):
            weighted = weights.astype(b.dtype)[..., None] * part
            return scale * (jnp.sum(put(weighted, which, experts), axis=-2) @ b)

        return y + down(self.low, self.weights, self.which, self.factors["down_proj"][1])

    def parts_of(self, lows: list[jax.Array]) -> jax.Array:
        """Of each choice's low (B, S, E r) its expert's part, (B, S, k, r)."""

        @_again
        def stacked(lows, which):
            parts = [part_of(low, which[..., j], self.mixture.experts) for j, low in enumerate(lows)]
            return jnp.stack(parts, axis=-2)

        return checkpoint_name(stacked(lows, self.which), "expert_low")

    def mixed(self, activated: Callable, base: tuple[jax.Array, ...]) -> jax.Array:
        """The sum of w_e h_e: what down reads; `base` is gate and up, or up alone, without adapters."""
        experts, k, scale = self.mixture
        names = ("gate_proj", "up_proj")[-len(base) :]
        a = self.factors["down_proj"][0] if "down_proj" in self.factors else None

        @functools.partial(_again, static_argnums=0)
        def expert(j, base, parts, factors, weights, which, a):
            def product(name, y):
                if name not in parts:
                    return y
                return y + scale * (put(parts[name][..., j, :], which[..., j], experts) @ factors[name])

            h = activated(*map(product, names, base))
            low = None if a is None else part_of(h @ a, which[..., j], experts)
            return weights[..., j, None].astype(h.dtype) * h, low

        total, lows = jnp.zeros((), base[-1].dtype), list[Any]()
        of_opening = {name: b for name, (_, b) in self.factors.items() if name in self.parts}
        for j in range(k):
            own, low = expert(j, base, self.parts, of_opening, self.weights, self.which, a)
            total, lows = total + own, [*lows, low]
        if a is not None:
            self.low = checkpoint_name(jnp.stack(lows, axis=-2), "expert_low")
        return total


def with_experts(model: Model, mixture: Mixture, choose: Callable[[tree.Params], list[str]]) -> Model:
    """The model with a router in each MLP that has a chosen site, and with what routers say beside the stream."""

    def init(key, params):
        params = model.init(key, params)
        flat = tree.flatten(params)
        chosen_mlps = sorted({site.rpartition("/")[0] for site in choose(params) if of_mlp(site)})
        if not chosen_mlps:
            raise InputError("mixlora: targets choose no kernel of an MLP, where the experts are; use lora")
        for mlp in chosen_mlps:
            if (path := f"{mlp}/{NAME}/router") not in flat:
                layers, inputs, _ = flat[f"{mlp}/up_proj/kernel"].shape
                own = jax.random.fold_in(key, zlib.crc32(path.encode()))
                flat[path] = 0.02 * jax.random.normal(own, (layers, inputs, mixture.experts))
        return tree.unflatten(flat)

    def layer(function):
        def call(layer, x, ctx, cache, segment):
            routed = Routed(mixture, ctx)
            with nn.intercept_methods(routed):
                y, past = function(layer, x, ctx, cache, segment)
            if cache is not None:
                return y, past
            none = jnp.zeros((x.shape[0], 2 * mixture.experts), jnp.float32)
            return y, {**(past or {}), NAME: none if routed.said is None else routed.said}

        return reads_stacks(call, like=function)

    if not model.stack.layered:
        raise InputError("mixlora: this model shows no layers, and so no MLPs for experts; use lora")
    sums = (*model.stack.sums, (NAME, 2 * mixture.experts))
    return model._replace(init=init, stack=model.stack.map_layers(layer)._replace(sums=sums))


# The loss.


def balance_of(sums: jax.Array, k: int) -> jax.Array:
    """E sum over layers and experts of f_e p_e, of the sums (L, ..., 2 E) of the tokens that each term is over."""
    times, shares = jnp.split(sums, 2, axis=-1)
    tokens = jnp.maximum(jnp.sum(times, axis=-1, keepdims=True) / k, 1)
    return times.shape[-1] * jnp.sum((times / tokens) * (shares / tokens), axis=(0, -1))


def _balanced(
    inner: Callable[..., Any], coef: float, balance: str, k: int, model: Model, params, batch: Batch, key=None
):
    """(loss, aux) with the balance term, which aux has too."""
    ran, own = features.said_by_layers(NAME, "routers", "router_aux_loss_coef=0", model, params, batch, key)
    value, aux = inner(ran, params, batch, key)
    if balance == "batch":
        term = balance_of(jnp.sum(own, axis=1), k)
    else:
        term = features.mean_of_rows(balance_of(own, k), batch)
    return value + coef * term, {**aux, "balance": term}


def block_bytes(
    config: Any, itemsize: int, rank: int = 8, experts: int = 8, top_k: int = 2, targets: Any = "all-linear", **_
):
    """Bytes per token that one layer keeps beyond a frozen backbone's."""
    d, heads = config.hidden_size, config.num_attention_heads
    has = lambda module, *names: sum(choices.chooses(targets, f"layers/{module}/{name}") for name in names)
    read = d * bool(has("self_attn", *"q_proj k_proj v_proj".split()))
    read += has("self_attn", "o_proj") * heads * config.head_dim
    low = rank * has("self_attn", *"q_proj k_proj v_proj o_proj".split())
    low += top_k * rank * has("mlp", *"gate_proj up_proj down_proj".split())
    return (d + read + low) * itemsize + 4 * (experts + 2 * top_k)


def row_bytes(config: Any, itemsize: int, experts: int = 8, **_) -> int:
    """Bytes per row of what the routers of all layers say, and of its gradient."""
    del itemsize
    return 2 * (2 * experts * 4) * config.num_hidden_layers


ABOUT = About(
    summary="experts of low rank in each MLP, of which a router chooses some for each token",
    level="module",
    trains="a router, d E numbers per MLP, and A and B, E r(n+m) per kernel of it; LoRA's r(n+m) elsewhere",
    saves="gradients and optimizer state of all but these; the experts share the frozen kernels' products",
    reference="Li et al. 2024, arXiv:2404.15159",
    example={"rank": 4, "experts": 4},
    promises=Promises(block_bytes=block_bytes, row_bytes=row_bytes, merges=False),
)
