"""MEFT: the pretrained layers made reversible by adapters, so that their activations need not be kept.

Two streams, x1 = x2 = the embedding at first, then for each layer

    y1 = lam x1 + F(x2),   y2 = beta x2 + G(y1),   and (x1, x2) <- (y2, y1)        (variant 3: (y1, y2))

    variant   F                                              G
    1         the layer, an adapter beside its MLP           an adapter
    2         an adapter                                     the layer, an adapter beside its MLP
    3         the attention part, an adapter behind it       the MLP part, an adapter beside the MLP

An adapter is y = up(act(down(x))), d -> width -> d with biases, weights from N(0, 0.02^2), so that it is about 0 at the
start. With a small lam (variant 2: beta; 3: both) one stream then carries what the pretrained model's would, and the
other what it was a layer earlier (3: half a layer). The backward pass rebuilds each layer's input from its output (see
`jaxpeft.backward.reversible`): of the layers it keeps the last pair of streams, whatever their number.

Paper: Liao, Tan, Monz 2023, "Make Pre-trained Model Reversible", arXiv:2306.00477. There the inverse divides floating
point streams by lam = 0.1, and the result is the mean of the streams: `exact=False, readout="mean"`.

Deviations: by default streams are in fixed point and are rebuilt bit for bit, for log2(1 / lam) bits per element,
stream and layer; and the result is the stream that carries the pretrained model's, so that a small factor starts at the
base. The number of reversible layers, `layers`, counts from the first; the others run as usual, and what trains in them
is what another method in the same chain trains.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from fractions import Fraction
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from jaxpeft import decoding, features, sites, tree
from jaxpeft.about import About, Promises
from jaxpeft.backward import residuals, reversible
from jaxpeft.backward.plan import Plan
from jaxpeft.backward.reversible import Coupling
from jaxpeft.backward.streams import Fixed, Float
from jaxpeft.errors import InputError
from jaxpeft.method import Method, Spec, trains
from jaxpeft.methods.lora import drop
from jaxpeft.model import Batch, Model, Stack, scan_layers
from jaxpeft.models.layers import ACTIVATIONS

# variant: (lam, beta) in the published script; the nearest powers of two are the default of exact streams.
PUBLISHED = {1: ("1/10", "1"), 2: ("1", "1/10"), 3: ("1/10", "1/10")}
EXACT = {1: ("1/8", "1"), 2: ("1", "1/8"), 3: ("1/8", "1/8")}
READOUTS = ("last", "mean")


class Adapter(nn.Module):
    """z = up(act(down(x))), d -> width -> d. Parameters: down (d, width), up (width, d) and their biases, float32."""

    width: int
    activation: Callable[[jax.Array], jax.Array]
    dropout: float = 0.0
    norm: bool = False

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        d = x.shape[-1]
        normal, zeros = nn.initializers.normal(0.02), nn.initializers.zeros
        if self.norm:
            wide = x.astype(jnp.float32)
            wide = (wide - wide.mean(-1, keepdims=True)) * jax.lax.rsqrt(wide.var(-1, keepdims=True) + 1e-5)
            scale, shift = self.param("scale", nn.initializers.ones, (d,)), self.param("shift", zeros, (d,))
            x = (wide * scale + shift).astype(x.dtype)
        low = x @ self.param("down", normal, (d, self.width)).astype(x.dtype)
        low = low + self.param("down_bias", zeros, (self.width,)).astype(x.dtype)
        low = self.activation(checkpoint_name(low, "meft_low"))
        if self.dropout and self.has_rng("dropout"):
            low = drop(low, self.dropout, self.make_rng("dropout"))
        up = low @ self.param("up", normal, (self.width, d)).astype(x.dtype)
        return up + self.param("up_bias", zeros, (d,)).astype(x.dtype)


class Beside(Adapter):
    """y + z(x): in parallel to a module."""

    @nn.compact
    def __call__(self, x: jax.Array, y: jax.Array) -> jax.Array:
        return y + super().__call__(x)


class Behind(Adapter):
    """y + z(y): after a module."""

    @nn.compact
    def __call__(self, x: jax.Array, y: jax.Array) -> jax.Array:
        del x
        return y + super().__call__(y)


def layer_bytes(config: Any, itemsize: int, variant: int = 1, lam: Any = None, beta: Any = None, **_) -> float:
    """Bytes per token that one more layer keeps: k bits per element for each factor n / 2^k."""
    del itemsize
    factors = [Fraction(x or default) for x, default in zip((lam, beta), EXACT[variant], strict=True)]
    return config.hidden_size * sum(factor.denominator.bit_length() - 1 for factor in factors) / 8


def meft(
    variant: int = 1,
    width: int = 8,
    lam: float | str | None = None,
    beta: float | str | None = None,
    layers: int | None = None,
    exact: bool = True,
    readout: str = "last",
    bits: int = 16,
    every: int = 0,
    twice: bool = False,
    dropout: float = 0.0,
    norm: bool = False,
) -> Method:
    """MEFT on the first `layers` layers.

    Args:
      variant: 1, 2 or 3.
      width: of the adapters.
      lam: the first stream's factor, above 0: a number, or a fraction such as "1/8"; None: the table EXACT, or
        PUBLISHED. Exact streams need n / 2^k.
      beta: the second stream's, likewise.
      layers: how many layers, from the first, are reversible; None: all.
      exact: whether streams are in fixed point and rebuilt bit for bit; else float32, up to rounding.
      readout: "last", the stream that carries the pretrained model's, or "mean" of the two.
      bits: of the fraction of exact streams, whose range is +- 2^(31 - bits).
      every: keep the pair of streams after every so many layers, and go on from it in the backward pass; 0: never.
      twice: evaluate each layer apart from its derivative in the backward pass (see `jaxpeft.backward.reversible`).
      dropout: rate in the adapters.
      norm: a normalisation in front of the adapter that stands alone (variants 1 and 2).

    Returns:
      The method; it trains the adapters, under `layers/**/meft/`.

    Raises:
      InputError: for an argument outside its range, or more layers than the model has.
    """
    config = dict(locals())
    spec = (Spec("meft", config),)
    if variant not in EXACT:
        raise InputError(f"meft: variant {variant} is not one of 1, 2, 3")
    if readout not in READOUTS:
        raise InputError(f"meft: readout {readout!r} is not one of {', '.join(READOUTS)}")
    for name, value, least, most in (("width", width, 1, None), ("bits", bits, 4, 24), ("every", every, 0, None)):
        if value < least or (most is not None and value > most):
            raise InputError(
                f"meft: {name} {value} must be at least {least}" + (f" and at most {most}" if most else "")
            )
    if layers is not None and layers < 1:
        raise InputError(f"meft: layers {layers} must be at least 1")
    if not 0 <= dropout < 1:
        raise InputError(f"meft: dropout {dropout} must be at least 0 and below 1")
    defaults = EXACT[variant] if exact else PUBLISHED[variant]
    factors = _fraction("lam", lam, defaults[0]), _fraction("beta", beta, defaults[1])
    base = Coupling(_absent, _absent, *factors, variant != 3, Fixed(bits) if exact else Float(), every, twice)
    reversible.check("meft", base)

    def prepare(params, view):
        count = tree.count_layers(params)
        if layers is not None and layers > count:
            raise InputError(f"meft: layers {layers}: the model has {count}")
        return params if layers in (None, count) else tree.cut_layers(params, layers)

    def forward(model: Model, view) -> Model:
        if variant == 3 and len(model.stack.parts) != 2:
            raise InputError("meft: variant 3 needs layers of an attention and an MLP part, which this model lacks")
        features.check_run("meft", model)
        act = getattr(model.config, "hidden_act", "silu")
        settings = {"width": width, "activation": ACTIVATIONS.get(act, jax.nn.silu), "dropout": dropout}
        alone = Adapter(norm=norm, **settings) if variant != 3 else None
        run = _Run(base, variant, alone, layers, readout)
        model = sites.wrap(model, "meft", Beside(**settings), ["mlp"], run.segments)
        if alone is None:
            model = sites.wrap(model, "meft", Behind(**settings), ["self_attn"], run.segments)
        else:
            model = _with_parameters(model, alone, run.segments)
        return model._replace(stack=model.stack._replace(run=run))

    def merge(params):
        raise InputError("meft: has no merged form, as the streams of its model are two; serve it with its adapter")

    return Method(prepare, forward, trains(lambda path: "/meft/" in path), merge=merge, specs=spec)


def _fraction(name: str, value: Any, default: str) -> Fraction:
    try:
        return Fraction(str(default if value is None else value))
    except (ValueError, ZeroDivisionError):
        raise InputError(f'meft: {name} {value!r} should be a number or a fraction such as "1/8"') from None


def _absent(layer, x, ctx):
    raise NotImplementedError


def _with_parameters(model: Model, adapter: Adapter, segments: sites.AdaptedSegments) -> Model:
    """The model with the parameters of an adapter that stands alone, `<segment>/meft/...`."""

    def init(key, params):
        params = model.init(key, params)
        x = jnp.zeros((1, model.config.hidden_size))
        for segment, first, end in tree.segments(params):
            if segment in segments(params) and "meft" not in params[segment]:
                keys = jax.random.split(jax.random.fold_in(key, first), end - first)
                own = jax.vmap(lambda key: adapter.init(key, x)["params"])(keys)
                params = {**params, segment: {**params[segment], "meft": own}}
        return params

    return model._replace(init=init)


@dataclasses.dataclass(frozen=True)
class _Run:
    """`run` of a reversible stack (see `jaxpeft.model`)."""

    coupling: Coupling
    variant: int
    alone: Adapter | None
    layers: int | None
    readout: str

    def segments(self, params) -> list[str]:
        """Those that are reversible."""
        return [segment for segment, first, _ in tree.segments(params) if self.layers is None or first < self.layers]

    def halves(self, stack: Stack, segment: str) -> tuple[Callable[..., Any], ...]:
        """F and G of a segment's layers: (layer, x, ctx, cache) -> (y, cache)."""

        def of(function):
            return lambda layer, x, ctx, cache: function(layer, x, ctx, cache, segment)

        def adapter(layer, x, ctx, cache):
            assert self.alone is not None
            return self.alone.apply({"params": layer["meft"]}, x, rngs=ctx.rngs), cache

        if self.variant == 3:
            return tuple(of(part) for part in stack.parts)
        return (of(stack.block), adapter) if self.variant == 1 else (adapter, of(stack.block))

    def __call__(self, stack, params, batch, key=None, cache=None, probe=None) -> tuple[jax.Array, Any]:
        x, ctx = stack.embed(params, batch, key)
        pair = (x, x)
        ours = self.segments(params)
        for segment, first, end in tree.segments(params):
            if segment not in ours:
                break
            halves, own, numbers = self.halves(stack, segment), params[segment], range(first, end)
            if cache is None:
                f, g = (_without_cache(half) for half in halves)
                coupling = self.coupling._replace(f=f, g=g, probe=probe is not None)
                part = None if probe is None else probe[first:end]
                pair = reversible.run(coupling, segment, numbers, own, pair, ctx, key, probe=part)
            else:
                pair, cache = _decode(self.coupling, halves, own, numbers, pair, ctx, cache)
            pair = tuple(y.astype(x.dtype) for y in pair)
        x = (pair[0] + pair[1]) / 2 if self.readout == "mean" else pair[0] if self.variant == 2 else pair[1]
        rest = {name: leaf for name, leaf in params.items() if name not in ours}
        if tree.segments(rest):
            after = residuals.planned(Plan("matmuls")) if cache is None else scan_layers
            return after(stack._replace(embed=lambda *_: (x, ctx)), rest, batch, key, cache)
        return x, cache and decoding.advanced(cache, x.shape[1])


def rebuilding_errors(model: Model, params: tree.Params, batch: Batch, key: jax.Array | None = None) -> jax.Array:
    """How well each layer's input pair is rebuilt in a backward pass, compared with what it was in the forward pass.

    Args:
      model: adapted by this method alone.
      params: its nested parameters.
      batch: any.
      key: dropout key, or None.

    Returns:
      (reversible layers, 3) float32: elements that differ, the sum of the differences' squares, that of the elements'.
    """
    run = model.stack.run
    assert isinstance(run, _Run)
    count = sum(end - first for segment, first, end in tree.segments(params) if segment in run.segments(params))

    def loss(probe):
        return jnp.sum(run(model.stack, params, batch, key, None, probe)[0].astype(jnp.float32) ** 2)

    return jax.grad(loss)(jnp.zeros((count, 3)))


def _without_cache(half: Callable[..., Any]) -> Callable[..., jax.Array]:
    return lambda layer, x, ctx: half(layer, x, ctx, None)[0]


def _decode(coupling: Coupling, halves, params, numbers, pair, ctx, cache):
    """The layers of a segment with their caches: (pair, cache)."""
    dtype = pair[0].dtype

    def step(carry, layer, index, past):
        (pair, valid), own = carry, ctx.at(index)
        caches: list[Any] = []

        def with_cache(half):
            def function(x):
                y, new = half(layer, x, own, caches[-1] if caches else past)
                caches.append(new)
                return y

            return function

        f, g = map(with_cache, halves)
        pair, _, fine = reversible.couple(coupling, f, g, pair[0], pair[1], dtype)
        return (pair, valid & fine), caches[-1]

    last, cache = decoding.scan(step, reversible.encoded(coupling, pair), params, numbers, cache)
    return reversible.decoded(coupling, *last), cache


ABOUT = About(
    summary="reversible layers: activations are rebuilt in the backward pass, bit for bit",
    level="stack",
    trains="the adapters",
    saves="the activations of all layers but a few bits per element; gradients and state of all but the adapters",
    reference="Liao et al. 2023, arXiv:2306.00477",
    example={"width": 8},
    promises=Promises(layer_bytes=layer_bytes, starts_at_base=False, merges=False),
)
