"""Adapters at linear sites.

A site is one linear map, named by the path of its kernel: `layers/self_attn/q_proj` holds
`layers/self_attn/q_proj/kernel`. An adapter is a Flax module called as `adapter(inner, x, site, ctx) -> y` in place of
the product `x @ kernel`: `inner(x)` is that product, or the next adapter, so that several at one site compose; `site`
holds the kernel and the bias, which is added outside. It owns its parameters, if it has any, in a child scope of the
site, called by the adapter's `name`: `layers/self_attn/q_proj/lora/a`. `ctx` is the layer's `jaxpeft.model.Context`.
One whose class says `stacked = True` may get a layer of a stack as its kernel (`pallas_kernels.stacked`), for products
to read.

Which sites are adapted is written once, in the parameters: `init` adds the child scope at every site that
`adapter_for` chooses, and the forward pass adapts the sites that have it.

Of several adapters the first of a chain is outermost, the last nearest to the product; as `merge` unwinds a chain from
its end, what is nearest to the kernel is folded into it first.

A Linen interceptor does the forward part. It is entered inside the stack's functions, because a backward pass that
traces them again (`custom_vjp`, `jax.checkpoint`) would otherwise run the model without its adapters. Adapters use
`self.param`, never an `nn.Dense`, which the interceptor would catch as well.
"""

from __future__ import annotations

import contextlib
import contextvars
import functools
import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp

from jaxpeft import tree
from jaxpeft.errors import InputError
from jaxpeft.linear import Through, product, runs
from jaxpeft.model import Context, Model, marked_as
from jaxpeft.models.layers import Dense
from jaxpeft.quant import Absent, dot, is_packed, low_rank_dot
from jaxpeft.targets import check_patterns, chooses, find, first_match, kernel_path
from pallas_kernels.dropout import drop
from pallas_kernels.stacked import taken

# Of the context: (L,) float32, the factor by which a layer's adapters change what their sites give; nothing: 1.
RESPONSE = "response"

# What makes the gradient of factors A, and whose it is; see `factor_gradient`.
_factor_gradient: contextvars.ContextVar[tuple[str, Callable[..., jax.Array]] | None]
_factor_gradient = contextvars.ContextVar("factor_gradient", default=None)

AdapterFor = Callable[[str], nn.Module]
AdaptedSegments = Callable[[tree.Params], Sequence[str]]
__all__ = [
    "RESPONSE",
    "AdaptedSegments",
    "AdapterFor",
    "Bound",
    "Site",
    "around",
    "attach",
    "beside",
    "check_patterns",
    "chooses",
    "factor_gradient",
    "factor_gradient_of",
    "find",
    "first_match",
    "in_force",
    "intercepted",
    "kernel_path",
    "wrap",
]


class Site(NamedTuple):
    """Where an adapter acts.

    path: "layers/self_attn/q_proj"; "" when the adapter is initialised.
    kernel: (n, m), of any type that `jaxpeft.quant` knows.
    bias: (m,), added to what the outermost adapter gives; None where the site has none.
    plain: whether `inner` is the site's own product, and not another adapter.
    through: what the site computes with other matrices than the kernel, `through(x, *factors)`, where that is not the
      product of x (..., n) with them; see `jaxpeft.linear`.
    """

    path: str
    kernel: Any
    bias: jax.Array | None
    plain: bool
    through: Through | None = None

    def low_rank(
        self, inner: Callable[[jax.Array], jax.Array], x: jax.Array, a: jax.Array, b: jax.Array, **options: Any
    ) -> jax.Array:
        """inner(x) + scale (drop(x) A) B, fused with the product where nothing lies between; see `low_rank_dot`.

        Inside `factor_gradient` A gets its gradient from what is in force there.
        """
        if (other := _factor_gradient.get()) is not None:
            name, change = other
            if options.get("rate") or options.get("make_a") is not None or self.through is not None:
                why = "has dropout in front of A" if options.get("rate") else "has no A of its own that reads x"
                raise InputError(f"{name}: the adapter at {self.path} {why}; leave one of them out")
            with factor_gradient():
                y = self.low_rank(inner, x, jax.lax.stop_gradient(a), b, **options)
            return change(y, x, a, (options["scale"] * b).astype(x.dtype))
        if self.through is not None:
            return inner(x) + _low_rank(self.through, x, a, b, **options)
        return low_rank_dot(x, self.kernel if self.plain else inner, a, b, **options)


def _low_rank(
    through: Through,
    x: jax.Array,
    a: jax.Array,
    b: jax.Array,
    *,
    scale: float,
    rate: float = 0.0,
    seed: jax.Array | None = None,
    make_a: Callable[..., jax.Array] | None = None,
) -> jax.Array:
    """What `low_rank_dot` adds to the product, of another map; indices, which a lookup reads, are not dropped."""
    if rate and jnp.issubdtype(x.dtype, jnp.floating):
        x = drop(x.reshape(-1, x.shape[-1]), seed, rate).reshape(x.shape)
    if make_a is None:
        return scale * through(x, a, b)
    return scale * jax.checkpoint(lambda x, a, b: through(x, make_a(a), b))(x, a, b)


@contextlib.contextmanager
def factor_gradient(name: str = "", change: Callable[..., jax.Array] | None = None) -> Iterator[None]:
    """Within, low-rank adapters differentiate their A by `change(y, x, a, scale b) -> y`, y's gradient by all else.

    Args:
      name: of the method that does so, for what it refuses.
      change: None: A is differentiated as ever.

    Raises:
      InputError: inside another method's.
    """
    if change is not None and (outer := _factor_gradient.get()) is not None:
        raise InputError(f"{outer[0]}+{name}: each makes A's gradient in a way of its own; leave one of them out")
    token = _factor_gradient.set(None if change is None else (name, change))
    try:
        yield
    finally:
        _factor_gradient.reset(token)


def factor_gradient_of() -> str | None:
    """Whose `factor_gradient` is in force; None outside."""
    found = _factor_gradient.get()
    return None if found is None else found[0]


class Bound(NamedTuple):
    """An adapter with its parameters, called as any other."""

    module: nn.Module
    leaves: Any
    rngs: dict[str, jax.Array]

    @property
    def stacked(self) -> bool:
        return getattr(self.module, "stacked", False)

    def __call__(self, inner: Callable, x: jax.Array, site: Site, ctx: Context) -> jax.Array:
        return self.module.apply({"params": self.leaves}, inner, x, site, ctx, rngs=self.rngs)


class _Entry(NamedTuple):
    """An adapter that is in force while a function of the stack runs."""

    name: str
    adapter_for: AdapterFor
    prefix: str
    ctx: Context
    chosen: frozenset[str] | None  # sites of one without parameters
    called: set[str]  # sites at which it has acted

    def at(self, module: nn.Module) -> bool:
        if self.chosen is not None:
            return self.prefix + "/".join(module.path) in self.chosen
        return module.has_variable("params", self.name)


_entries: contextvars.ContextVar[tuple[_Entry, ...]] = contextvars.ContextVar("entries", default=())


def in_force() -> tuple[_Entry, ...]:
    """The adapters of the forward pass that runs, for what is no Linen module; it adds to `called` what has acted."""
    return _entries.get()


def attach(
    model: Model,
    name: str,
    adapter_for: AdapterFor,
    choose: Callable[[tree.Params], list[str]],
    parameters: bool = True,
    shared: bool = False,
) -> Model:
    """The model with adapters at the sites that `choose(params)` names.

    Args:
      model: any model; a site's linear map is a `jaxpeft.models.layers.Dense` or a `flax.linen.Dense`.
      name: the adapter's scope at its site, e.g. "lora".
      adapter_for: path of a site -> Flax module, called as `module(inner, x (..., n), site, ctx) -> y (..., m)`; `init`
        calls it with an empty context.
      choose: params -> sites that get an adapter at init.
      parameters: False for adapters that have none; they act at the sites that `choose` finds in each layer.
      shared: whether all adapters read leaves `<name>/...` beside the layers; they find them by `beside`.

    Returns:
      A model whose `init` adds the adapters' parameters (axis 0 is the layer, where the site's kernel has that axis).
    """

    def init(key, params):
        params = model.init(key, params)
        flat = tree.flatten(params)
        for site in choose(params):
            there = {path for path in flat if path.startswith(f"{site}/{name}/")}
            kernel, bias = flat[kernel_path(flat, site)], flat.get(f"{site}/bias")
            if isinstance(kernel, Absent) and not there:
                raise InputError(f"{name}: factors have taken the place of {site}'s kernel; leave it out of targets")
            if bias is not None:  # of several axes where the outputs have them
                bias = bias.reshape(*kernel.shape[:-2], kernel.shape[-1])
            site_key = jax.random.fold_in(key, zlib.crc32(site.encode()))
            adapter = adapter_for(site)
            if there:  # of an adapter's file, which holds no leaf that follows from the base
                shapes = jax.eval_shape(functools.partial(_init, adapter), site_key, kernel, bias)
                if {f"{site}/{name}/{leaf}" for leaf in tree.flatten(shapes)} <= there:
                    continue
            fresh = tree.flatten(_fresh(adapter, site_key, kernel, bias))
            new = {f"{site}/{name}/{leaf}": value for leaf, value in fresh.items()}
            flat.update({path: value for path, value in new.items() if path not in there})
        return tree.unflatten(flat)

    @contextlib.contextmanager
    def adapted(prefix, ctx, params):
        chosen = None if parameters else frozenset(_chosen(choose, params))
        own = _Entry(name, adapter_for, prefix, ctx, chosen, set())
        token = _entries.set((*_entries.get(), own))
        try:
            with intercepted():
                yield own.called
        finally:
            _entries.reset(token)

    def told(params):
        return {name: params[name]} if shared and name in params else {}

    def embed(params, batch, key):
        with adapted("", Context(shared=told(params)), params) as called:
            x, ctx = model.stack.embed(params, batch, key)
        if not model.stack.layered:
            _check_called(name, params, called)
        return x, ctx.add(shared=told(params))

    def layer(function):
        def call(layer, x, ctx, cache, segment):
            with adapted(f"{segment}/", ctx, {segment: layer}):
                return function(layer, x, ctx, cache, segment)

        return marked_as(call, function)

    def head(params, x):
        with adapted("", Context(shared=told(params)), params):
            return model.stack.head(params, x)

    init = init if parameters else model.init
    return model._replace(init=init, stack=model.stack.map_layers(layer)._replace(embed=embed, head=head))


def beside(module: nn.Module, ctx: Context, name: str, what: str) -> Any:
    """The leaves `<name>/...` beside the layers that an adapter reads (`attach(shared=True)`), in words `what`.

    None while the adapter is initialised.

    Raises:
      InputError: where there are none, as of a module that runs without its model.
    """
    if name in ctx.shared:
        return ctx.shared[name]
    if module.is_initializing():
        return None
    raise InputError(f"{name}: its {what} are beside the module, which cannot run alone; merge the adapter first")


def wrap(model: Model, name: str, adapter: nn.Module, modules: Sequence[str], segments: AdaptedSegments) -> Model:
    """The model with adapters on whole modules of its layers.

    Args:
      model: a model of stacked layers.
      name: the adapter's scope in its module, e.g. "meft": `layers/mlp/meft/...`.
      adapter: called as `adapter(x (..., d), y (..., d)) -> y` with the module's input and output (the first, of
        several); its parameters don't depend on the layer.
      modules: paths in a layer, such as "mlp" and "self_attn".
      segments: params -> names of the segments whose layers are adapted at init.

    Returns:
      A model whose `init` adds the adapters' parameters (axis 0 is the layer) where they are not there yet.
    """

    def init(key, params):
        params = model.init(key, params)
        flat = tree.flatten(params)
        length = {segment: end - first for segment, first, end in tree.segments(params)}
        x = jnp.zeros((1, model.config.hidden_size))
        for segment in segments(params):
            for module in modules:
                path = f"{segment}/{module}/{name}"
                if any(known.startswith(f"{path}/") for known in flat):
                    continue
                keys = jax.random.split(jax.random.fold_in(key, zlib.crc32(path.encode())), length[segment])
                fresh = jax.vmap(lambda key: adapter.init(key, x, x)["params"])(keys)
                flat.update({f"{path}/{leaf}": value for leaf, value in tree.flatten(fresh).items()})
        return tree.unflatten(flat)

    def intercept(next_function, args, kwargs, context):
        module = context.module
        y = next_function(*args, **kwargs)
        known = "/".join(module.path) in modules and context.method_name == "__call__"
        if not known or not module.has_variable("params", name):
            return y
        own = adapter.clone(parent=module, name=name)
        return (own(args[0], y[0]), *y[1:]) if isinstance(y, tuple) else own(args[0], y)

    def layer(function):
        def call(*args, **named):
            with nn.intercept_methods(intercept):
                return function(*args, **named)

        return marked_as(call, function)

    return model._replace(init=init, stack=model.stack.map_layers(layer))


def _check_called(name: str, params: tree.Params, called: set[str]) -> None:
    """Refuses adapters that the model, as it was traced, never calls: they would train without effect."""
    marker = f"/{name}/"
    sites = {path.rpartition(marker)[0] for path in tree.flatten(params) if marker in path}
    if dead := sorted(sites - called):
        more = f" and {len(dead) - 3} more" if len(dead) > 3 else ""
        raise InputError(f"{name}: the model never calls {', '.join(dead[:3])}{more}; leave them out of targets")


def _chosen(choose: Callable[[tree.Params], list[str]], params: tree.Params) -> list[str]:
    """The sites that an adapter without parameters has in a layer, or outside of them; none is no mistake here."""
    try:
        return choose(params)
    except InputError:
        return []


def _fresh(adapter: nn.Module, key: jax.Array, kernel: Any, bias: jax.Array | None) -> tree.Params:
    """An adapter's parameters at a site, of all its layers where the kernel has them; sites alike are compiled once."""
    if isinstance(key, jax.core.Tracer):  # no compilation of its own
        return _init(adapter, key, kernel, bias)
    return _init_fast(jax.config.read("jax_disable_most_optimizations"))(adapter, key, kernel, bias)


@functools.cache
def _init_fast(unoptimised: bool) -> Callable[..., tree.Params]:
    """`_init` compiled for a single run: on a CPU in a third of the time that optimising what runs once takes, or in
    still less where JAX is told to optimise nothing.
    """
    once = {"xla_backend_optimization_level": 1} if jax.default_backend() == "cpu" and not unoptimised else None
    return jax.jit(_init, static_argnums=0, compiler_options=once)


def _init(adapter: nn.Module, key: jax.Array, kernel: Any, bias: jax.Array | None) -> tree.Params:
    if kernel.ndim > 2:
        of_layer = functools.partial(_init, adapter)
        return jax.vmap(of_layer)(jax.random.split(key, kernel.shape[0]), kernel, bias)
    inner, site = functools.partial(_product, kernel), Site("", kernel, bias, True)
    return adapter.init(key, inner, jnp.zeros((1, kernel.shape[0])), site, Context()).get("params", {})


def _product(kernel: Any, x: jax.Array) -> jax.Array:
    return dot(x, kernel)


def intercepted() -> contextlib.AbstractContextManager[None]:
    """In which Linen modules run with the adapters in force, and products read packed kernels."""
    return nn.intercept_methods(_intercept)


def _intercept(next_function, args, kwargs, context):
    """Of the adapters in force, those of this module, one around the other; the last to be entered is the outermost.

    Flax's modules compute with arrays alone: where their kernel is packed, the product is ours without adapters, too.
    Every adapter in force enters this function once more, and the first call of them does the work of all.
    """
    module = context.module
    ours = isinstance(module, Dense) and context.method_name == "linear"
    linen = runs(module, context.method_name)
    here = [entry for entry in _entries.get() if entry.at(module)] if ours or linen else []
    if not here and not (linen and is_packed(module.get_variable("params", "kernel"))):
        return next_function(*args, **kwargs)
    back: Callable[[jax.Array], jax.Array] = lambda y: y
    through = None
    if ours:
        x, kernel = args
        bias = module.get_variable("params", "bias") if module.use_bias else None
    else:
        x, kernel, bias, back, through = product(module, context.method_name, args, kwargs)
    path = "/".join(module.path)
    adapters: list[tuple[Callable[..., jax.Array], str, Context]] = []
    for entry in here:
        entry.called.add(entry.prefix + path)
        make = functools.partial(entry.adapter_for, entry.prefix + path)
        own: Any = _bound(make, module, entry.name) if through else make().clone(parent=module, name=entry.name)
        adapters.append((own, entry.prefix + path, entry.ctx))
    out = around(adapters, x, kernel, bias, through)
    return back(out + bias.astype(out.dtype) if linen and bias is not None else out)


class _Apart(nn.Module):
    """In which a module is made that belongs to none."""

    make: Callable[[], nn.Module]

    @nn.compact
    def __call__(self) -> nn.Module:
        return self.make().clone(parent=None)


def _bound(make: Callable[[], nn.Module], module: nn.Module, name: str) -> Bound:
    """An adapter at a module that may have no submodules while it runs, as those with a `setup`."""
    rngs = {"dropout": module.make_rng("dropout")} if module.has_rng("dropout") else {}
    return Bound(_Apart(make, parent=None).apply({}), module.get_variable("params", name, {}), rngs)


def around(
    adapters: Iterable[tuple[Callable[..., jax.Array], str, Context]],
    x: jax.Array,
    kernel: Any,
    bias: jax.Array | None,
    through: Through | None = None,
) -> jax.Array:
    """A product with adapters around it, one around the other, the last outermost; the bias is not added.

    Args:
      adapters: of each what is called as `adapter(inner, x, site, ctx)`, its site's path and its context.
      x: (..., n).  kernel: (n, m).  bias: (m,), or None.
      through: as of a `Site`; x is what it reads.

    Returns:
      (..., m).
    """
    y: Callable[[jax.Array], jax.Array] = functools.partial(_product, kernel)
    if through is not None:
        y = lambda x: through(x, kernel)
    for depth, (adapter, path, ctx) in enumerate(adapters):
        taken_here = kernel if getattr(adapter, "stacked", False) else taken(kernel)
        y = functools.partial(_adapted, adapter, y, Site(path, taken_here, bias, depth == 0, through), ctx)
    return y(x)


def _adapted(
    adapter: Callable[..., jax.Array], inner: Callable[..., Any], site: Site, ctx: Context, x: jax.Array
) -> jax.Array:
    y, factors = adapter(inner, x, site, ctx), ctx.shared.get(RESPONSE)
    if factors is None or ctx.layer is None:
        return y
    without = inner(x)
    return without + factors[ctx.layer].astype(y.dtype) * (y - without)
