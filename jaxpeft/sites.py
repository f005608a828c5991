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
import re
import zlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp

from jaxpeft import patterns, tree
from jaxpeft.errors import InputError
from jaxpeft.linear import KINDS, product
from jaxpeft.model import Context, Model, reads_stacks
from jaxpeft.models.layers import Dense
from jaxpeft.quant import Folded, dot, is_linear, is_packed, low_rank_dot
from pallas_kernels.stacked import taken

AdapterFor = Callable[[str], nn.Module]
AdaptedSegments = Callable[[tree.Params], Sequence[str]]

_PRESETS = {
    "all-linear": r"^layers.*/[^/]+$",
    "attention": r"^layers.*/(self_attn|attention|attn)/.+$",
    "mlp": r"^layers.*/mlp/[^/]+$",
}


def find(params: Mapping[str, Any], targets: str | Iterable[str] = "all-linear") -> list[str]:
    """The sites that `targets` chooses.

    Args:
      params: nested parameters; a site is every path with a `kernel` of two axes (three with the layer axis).
      targets: "all-linear" (every linear map of the layers, not the head; every one where no layers are visible),
        "attention", "mlp", a regular expression found in the site's path (`re.search`), or names that sites end with,
        as in PEFT's `target_modules` (`["q_proj", "v_proj"]`, or "q_proj,v_proj").

    Raises:
      InputError: if a target matches no site, with the nearest names; or a linear map that cannot be one, with why not.
    """
    flat = tree.flatten(params)
    kernels = {path.removesuffix("/kernel"): leaf for path, leaf in flat.items() if path.endswith("/kernel")}
    refused = {site: leaf.why for site, leaf in kernels.items() if isinstance(leaf, Folded) and leaf.why}
    sites = sorted(site for site, leaf in kernels.items() if is_linear(leaf) or site in refused)
    if isinstance(targets, str) and re.fullmatch(r"[\w./]+(,[\w./]+)+", targets):
        targets = targets.split(",")
    if isinstance(targets, str):
        wanted = [_PRESETS.get(targets, targets)]
        if targets == "all-linear" and not any(re.search(wanted[0], tree.canonical(site)) for site in sites):
            wanted = [""]  # a model that shows no layers
        stray = wanted if targets not in _PRESETS else []
    else:
        wanted = [rf"(^|/){re.escape(name.replace('.', '/'))}$" for name in targets]
        stray = list(targets)
    chosen: set[str] = set()
    for i, pattern in enumerate(wanted):
        compiled = patterns.compiled(pattern, "targets")
        found = {site for site in sites if compiled.found(tree.canonical(site)) or compiled.found(site)}
        what = str(stray[i] if stray else targets)
        for site in sorted(found & refused.keys()):
            raise InputError(f"targets {what!r}: {site} is no site: {refused[site]}; choose targets without it")
        if not found:
            leaves = [site.rsplit("/", 1)[-1] for site in sites] + sorted({tree.canonical(site) for site in sites})
            raise InputError(f"targets {what!r}: matches no linear site; nearest: {tree.nearest(what, leaves)}")
        chosen |= found
    return sorted(chosen)


def chooses(targets: str | Iterable[str], site: str) -> bool:
    """Whether `find` would choose a site of a model of visible layers; of targets that it takes."""
    if isinstance(targets, str) and re.fullmatch(r"[\w./]+(,[\w./]+)+", targets):
        targets = targets.split(",")
    if isinstance(targets, str):
        wanted = [_PRESETS.get(targets, targets)]
    else:
        wanted = [rf"(^|/){re.escape(name.replace('.', '/'))}$" for name in targets]
    return any(patterns.found(pattern, path, "targets") for pattern in wanted for path in (tree.canonical(site), site))


def first_match(values: Mapping[str, Any], site: str, default: Any) -> Any:
    """The value of the first pattern (regular expression, `re.search`) found in the site's path, else `default`."""
    for pattern, value in values.items():
        if patterns.found(pattern, site, "the pattern"):
            return value
    return default


class Site(NamedTuple):
    """Where an adapter acts.

    path: "layers/self_attn/q_proj"; "" when the adapter is initialised.
    kernel: (n, m), of any type that `jaxpeft.quant` knows.
    bias: (m,), added to what the outermost adapter gives; None where the site has none.
    plain: whether `inner` is the site's own product, and not another adapter.
    """

    path: str
    kernel: Any
    bias: jax.Array | None
    plain: bool

    def low_rank(
        self, inner: Callable[[jax.Array], jax.Array], x: jax.Array, a: jax.Array, b: jax.Array, **options: Any
    ) -> jax.Array:
        """inner(x) + scale (drop(x) A) B, fused with the product where nothing lies between; see `low_rank_dot`."""
        return low_rank_dot(x, self.kernel if self.plain else inner, a, b, **options)


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
) -> Model:
    """The model with adapters at the sites that `choose(params)` names.

    Args:
      model: any model; a site's linear map is a `jaxpeft.models.layers.Dense` or a `flax.linen.Dense`.
      name: the adapter's scope at its site, e.g. "lora".
      adapter_for: path of a site -> Flax module, called as `module(inner, x (..., n), site, ctx) -> y (..., m)`; `init`
        calls it with an empty context.
      choose: params -> sites that get an adapter at init.
      parameters: False for adapters that have none; they act at the sites that `choose` finds in each layer.

    Returns:
      A model whose `init` adds the adapters' parameters (axis 0 is the layer, where the site's kernel has that axis).
    """

    def init(key, params):
        params = model.init(key, params)
        flat = tree.flatten(params)
        for site in choose(params):
            below = [path.removeprefix(f"{site}/") for path in flat if path.startswith(f"{site}/")]
            if any(path.startswith(f"{name}/") for path in below):
                continue
            kernel, bias = flat[f"{site}/kernel"], flat.get(f"{site}/bias")
            if bias is not None:  # of several axes where the outputs have them
                bias = bias.reshape(*kernel.shape[:-2], kernel.shape[-1])
            site_key = jax.random.fold_in(key, zlib.crc32(site.encode()))
            fresh = _fresh(adapter_for(site), site_key, kernel, bias)
            flat.update({f"{site}/{name}/{leaf}": value for leaf, value in tree.flatten(fresh).items()})
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

    def embed(params, batch, key):
        with adapted("", Context(), params) as called:
            result = model.stack.embed(params, batch, key)
        if not model.stack.layered:
            _check_called(name, params, called)
        return result

    def layer(function):
        def call(layer, x, ctx, cache, segment):
            with adapted(f"{segment}/", ctx, {segment: layer}):
                return function(layer, x, ctx, cache, segment)

        return reads_stacks(call, like=function)

    def head(params, x):
        with adapted("", Context(), params):
            return model.stack.head(params, x)

    init = init if parameters else model.init
    return model._replace(init=init, stack=model.stack.map_layers(layer)._replace(embed=embed, head=head))


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

        return reads_stacks(call, like=function)

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
    return _init_fast()(adapter, key, kernel, bias)


@functools.cache
def _init_fast() -> Callable[..., tree.Params]:
    """`_init` compiled for a single run: on a CPU in a third of the time that optimising what runs once takes."""
    once = {"xla_backend_optimization_level": 1} if jax.default_backend() == "cpu" else None
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
    linen = isinstance(module, KINDS) and context.method_name == "__call__"
    own = [entry for entry in _entries.get() if entry.at(module)] if ours or linen else []
    if not own and not (linen and is_packed(module.get_variable("params", "kernel"))):
        return next_function(*args, **kwargs)
    back: Callable[[jax.Array], jax.Array] = lambda y: y
    if ours:
        x, kernel = args
        bias = module.get_variable("params", "bias") if module.use_bias else None
    else:
        x, kernel, bias, back = product(module, args, kwargs)
    path = "/".join(module.path)
    adapters = []
    for entry in own:
        entry.called.add(entry.prefix + path)
        adapter = entry.adapter_for(entry.prefix + path).clone(parent=module, name=entry.name)
        adapters.append((adapter, entry.prefix + path, entry.ctx))
    out = around(adapters, x, kernel, bias)
    return back(out + bias.astype(out.dtype) if linen and bias is not None else out)


def around(
    adapters: Iterable[tuple[Callable[..., jax.Array], str, Context]], x: jax.Array, kernel: Any, bias: jax.Array | None
) -> jax.Array:
    """A product with adapters around it, one around the other, the last outermost; the bias is not added.

    Args:
      adapters: of each what is called as `adapter(inner, x, site, ctx)`, its site's path and its context.
      x: (..., n).  kernel: (n, m).  bias: (m,), or None.

    Returns:
      (..., m).
    """
    y: Callable[[jax.Array], jax.Array] = functools.partial(_product, kernel)
    for depth, (adapter, path, ctx) in enumerate(adapters):
        taken_here = kernel if getattr(adapter, "stacked", False) else taken(kernel)
        y = functools.partial(_adapted, adapter, y, Site(path, taken_here, bias, depth == 0), ctx)
    return y(x)


def _adapted(
    adapter: Callable[..., jax.Array], inner: Callable[..., Any], site: Site, ctx: Context, x: jax.Array
) -> jax.Array:
    return adapter(inner, x, site, ctx)
