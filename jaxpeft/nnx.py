"""Any NNX module as a `Model`, and back: adapters at its linear maps, and the module with them in it.

A site is a linear module of the graph that owns its kernel: `nnx.Linear`, `nnx.LinearGeneral` (so attention's
projections) and `nnx.Einsum`, and where targets name them `nnx.Conv` and `nnx.Embed`, in lists and dicts, under
`nnx.scan`, `nnx.vmap` and `nnx.remat` as anywhere. Which axes of a kernel are inputs and which outputs is asked of that
module; what lies in front of them are layers. As in
`jaxpeft.linen`, parameters hold kernels of several axes as `jaxpeft.quant.Folded` while an adapter reads them.

The module is merged from its graph and the parameters in each forward pass, and its linear modules get their adapters
then (nnx_linear.py).
"""

from __future__ import annotations

import zlib
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from jaxpeft import sites, tree, updates
from jaxpeft.errors import InputError
from jaxpeft.linear import Linear, leaf_of
from jaxpeft.method import MOVED, Leaves, Method, trains
from jaxpeft.model import Batch, Model, opaque
from jaxpeft.nnx_linear import KINDS, Acted, Adapter, adapt, axes, held, kernel_of
from jaxpeft.quant import Folded, fold, unfolded_all


def from_nnx(module: nnx.Module, method: Callable | str | None = None) -> tuple[Model, tree.Params]:
    """(Model, parameters) of any NNX module called as `module(**batch)`.

    Site methods (LoRA and its family) attach to its linear maps by path; methods on the stack do not apply. A key of
    None runs the module in evaluation mode (`module.eval()`); with a key it runs as it is, its RNG streams seeded by
    the key. Other state (batch statistics, caches) is read as it was given; `carry` trains with it.

    Args:
      module: the module; it is not changed, and may be deleted.
      method: what to call instead of `__call__`: a name, or a function of the module and the batch.

    Returns:
      The model, and its `nnx.Param`s as a nested dict; indices of lists are keys ("layers/0/linear/kernel").

    Raises:
      InputError: for what is no NNX module, or one whose paths are not unique.
    """
    if not isinstance(module, nnx.Module):
        raise InputError(f"from_nnx: {type(module).__name__} is no flax.nnx.Module")
    graph = _Graph(module, method)
    flat = {"/".join(map(str, keys)): leaf.get_value() for keys, leaf in _flat(nnx.state(module, nnx.Param))}
    model = Model(graph.init, opaque(graph.apply), adopt=graph.adopt, shapes=graph.shapes, axes=graph.axes)
    return model, tree.unflatten(flat)


def to_nnx(model: Model, params: Mapping[str, Any]) -> nnx.Module:
    """The user's module with these parameters, adapters and all.

    It is called as before, and needs nothing of this library around it. All parameters are plain `nnx.Param`s, those of
    an adapter in its site's module (`hidden.lora.a`); `nnx.split`, `nnx.state` and the transformations take it as any
    other. Dropout in front of adapters is off. With merged parameters it is a module of the user's own classes alone.

    Args:
      model: of `from_nnx`, adapted or not.
      params: its nested parameters, as `state.params`; state that `carry` has put there is taken, too.

    Raises:
      InputError: for a model that `from_nnx` has not made, or parameters that lack some of the module's.
    """
    if _graph_of(model) is None:
        raise InputError("to_nnx: the model is not one of from_nnx")
    return model.stack.embed(params, _BUILD, None)[0]


def carry(base: Model) -> Method:
    """Batch statistics, caches and whatever else a module keeps beside its parameters, carried from step to step.

    They lie among the moved leaves of a `TrainState` under their own paths, so checkpoints hold them and `to_nnx` puts
    them back. With several micro-batches to a step each starts from the same values, and their mean is kept. RNG
    streams are not among them: each step seeds them. Chain it last: `chain(lora(8), carry(base))`.

    Args:
      base: of `from_nnx`.

    Raises:
      InputError: for a model that `from_nnx` has not made; where the step is made: if a later method of the chain
        claims such a path.
    """
    graph = _graph_of(base)
    if graph is None:
        raise InputError("carry: the model is not one of from_nnx")
    own = {path: leaf.get_value() for path, leaf in graph.others.items()}

    def prepare(params, view):
        return tree.unflatten({**jax.tree.map(jnp.copy, own), **tree.flatten(params)})  # a step may donate them

    def loss(function, view):
        for path in own:
            if view.role(path) != MOVED:
                raise InputError(f"carry: {path} is {view.role(path).name} by another method; chain carry last")

        def carried(model, params, batch, key):
            with updates.collected() as found:
                value, aux = function(model, params, batch, key)
            return value, {**aux, **{f"carry:{path}": _wide(leaf)[None] for path, leaf in found.items()}}

        return carried

    def move(leaves, moment):
        found = {path: moment.aux.get(f"carry:{path}") for path in own}
        new = {path: _like(leaves.moved[path], leaf[0]) for path, leaf in found.items() if leaf is not None}
        return Leaves(leaves.trained, {**leaves.moved, **new})

    return Method(prepare=prepare, roles=trains(own.__contains__, MOVED), loss=loss, move=move)


class _Build(dict[str, Any]):
    """In place of a batch: the module is wanted, not what it computes."""


_BUILD = _Build()


class _Graph:
    """A module without its parameters."""

    def __init__(self, module: nnx.Module, method: Callable | str | None):
        self.graph, state, rest = nnx.split(module, nnx.Param, ...)
        self.method = method
        self.keys, self.leaves = {}, {}
        for keys, leaf in _flat(state):
            self.keys["/".join(map(str, keys))] = keys
            shape = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), leaf.get_value())
            self.leaves["/".join(map(str, keys))] = leaf.replace(shape)
        self.rest = [(keys, leaf.replace(leaf.get_value())) for keys, leaf in _flat(rest)]  # as it is now
        known = {"/".join(map(str, keys)): (keys, leaf) for keys, leaf in self.rest}
        if len(self.keys) < len(_flat(state)) or len(known) < len(self.rest):
            raise InputError(f"from_nnx: {type(module).__name__} has two leaves of one path: keys 0 and '0', or 'a/b'")
        self.others = {path: leaf for path, (_, leaf) in known.items() if not isinstance(leaf, nnx.RngState)}
        self.other_keys = {path: known[path][0] for path in self.others}
        self.linear = _look(module, self.keys)
        specs = {"/".join(map(str, keys)): leaf.get_value() for keys, leaf in _flat(nnx.get_partition_spec(state))}
        self.names = {path: names for path, names in specs.items() if names is not None and any(names)}
        self.acted = Acted(set())

    def init(self, key: jax.Array, params: tree.Params) -> tree.Params:
        if not params:
            raise InputError("from_nnx: an NNX module makes its parameters itself; give those that from_nnx returned")
        return self.adopt(params)

    def shapes(self) -> tree.Flat:
        leaves = {path: leaf.get_value() for path, leaf in {**self.leaves, **self.others}.items()}
        return {path: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype) for path, leaf in leaves.items()}

    def axes(self) -> dict[str, Any]:
        return dict(self.names)

    def adopt(self, params: Mapping[str, Any]) -> tree.Params:
        flat = {str(path): leaf for path, leaf in tree.flatten(params).items()}
        return tree.unflatten({path: self._folded(path, leaf) for path, leaf in flat.items()})

    def _folded(self, path: str, leaf: Any) -> Any:
        kernel = path.rpartition("/")[2] == "kernel" or path in self.linear
        if not kernel or isinstance(leaf, Folded) or not isinstance(leaf, jax.Array):
            return leaf
        linear = self.linear.get(path, Linear(0, 0, leaf.ndim))
        if leaf.ndim < linear.ndim:
            raise InputError(f"{path} has shape {leaf.shape}; its module has {linear.ndim} axes")
        return fold(leaf, linear.inputs, linear.outputs, linear.why, linear.kind)

    def apply(self, params: tree.Params, batch: Batch, key: jax.Array | None) -> Any:
        module = self.build(params, key)
        entries = sites.in_force()
        if batch is _BUILD:
            for entry in entries:
                entry.called.update(site for site in map(_site, self.linear) if _has(entry, site, params))
            return module
        if key is None:
            module.eval()
        else:
            _seed(module, key)
        call = getattr(module, self.method or "__call__") if not callable(self.method) else self.method
        y = call(**batch) if not callable(self.method) else call(module, **batch)
        for entry in entries:
            entry.called.update(path for name, path in self.acted.sites if name == entry.name)
        if updates.wanted():
            state = {"/".join(map(str, keys)): leaf for keys, leaf in _flat(nnx.state(module))}
            updates.leave({path: state[path].get_value() for path in self.others})
        return y

    def build(self, params: tree.Params, key: jax.Array | None = None) -> Any:
        """The module of these parameters, with the adapters that are in force."""
        flat = unfolded_all(tree.flatten(params))
        if lacks := sorted(self.leaves.keys() - flat.keys()):
            raise InputError(f"the parameters lack {', '.join(lacks[:3])}, which the module has")
        leaves = [(keys, self.leaves[path].replace(held(flat[path]))) for path, keys in self.keys.items()]
        rest = {keys: leaf.replace(leaf.get_value()) for keys, leaf in self.rest}  # the module's own to change
        rest |= {self.other_keys[path]: leaf.replace(flat[path]) for path, leaf in self.others.items() if path in flat}
        module = nnx.merge(self.graph, nnx.from_flat_state(leaves), nnx.from_flat_state(list(rest.items())))
        for path, linear in self.linear.items():
            site = _site(path)
            here = [entry for entry in sites.in_force() if linear.inputs and _has(entry, site, params)]
            adapters = [Adapter(entry.name, site, entry.adapter_for(site), self.acted) for entry in here]
            if adapters or not isinstance(flat[path], jax.Array):
                kernel = flat[path]
                own = kernel.own_shape if isinstance(kernel, Folded) else kernel.shape
                layers = tuple(own[: -linear.ndim])
                adapt(_at(module, self.keys[path][:-1]), adapters, flat, layers, key)
        return module


def _graph_of(model: Model) -> _Graph | None:
    graph = getattr(model.adopt, "__self__", None)
    return graph if isinstance(graph, _Graph) else None


def _flat(state: Any) -> list[tuple[tuple[Any, ...], Any]]:
    return list(nnx.to_flat_state(state))


def _site(path: str) -> str:
    return path.rpartition("/")[0]


def _at(node: Any, keys: tuple[Any, ...]) -> Any:
    for key in keys:
        node = node[key] if isinstance(node, (list, tuple, Mapping, nnx.List)) else getattr(node, key)
    return node


def _look(module: nnx.Module, keys: Mapping[str, tuple[Any, ...]]) -> dict[str, Linear]:
    """{path of a kernel: its axes} of the linear modules that alone own theirs."""
    owners: dict[int, int] = {}
    for _, node in nnx.iter_graph(module):
        if isinstance(node, nnx.Module):
            for value in vars(node).values():
                owners[id(value)] = owners.get(id(value), 0) + 1
    found = {}
    for path, parts in keys.items():
        owner = _at(module, parts[:-1])
        own = isinstance(owner, KINDS) and parts[-1] == leaf_of(owner)
        if own and owners.get(id(kernel_of(owner))) == 1:
            found[path] = axes(owner)
    return found


def _has(entry: Any, site: str, params: tree.Params) -> bool:
    """Whether an adapter that is in force is at a site."""
    if entry.chosen is not None:
        return site in entry.chosen
    node: Any = params
    for part in (*site.split("/"), entry.name):
        node = node.get(part) if isinstance(node, Mapping) else None
    return node is not None


# State beside the parameters.


def _seed(module: nnx.Module, key: jax.Array) -> None:
    """Every RNG stream of a module starts anew, from a key of its own."""
    for path, stream in nnx.iter_graph(module):
        if isinstance(stream, nnx.RngStream):
            own = jax.random.fold_in(key, zlib.crc32("/".join(map(str, path)).encode()))
            shape = stream.key.get_value().shape
            stream.key.set_value(jax.random.split(own, shape) if shape else own)
            stream.count.set_value(jnp.zeros_like(stream.count.get_value()))


def _wide(leaf: jax.Array) -> jax.Array:
    """A value of which a mean can be taken; arrays of one element stay no scalars, and so no metrics."""
    return leaf if jnp.issubdtype(leaf.dtype, jnp.floating) else leaf.astype(jnp.float32)


def _like(leaf: jax.Array, value: jax.Array) -> jax.Array:
    """A new value, of which a mean may have been taken, in the leaf's dtype."""
    return value.astype(leaf.dtype) if jnp.issubdtype(leaf.dtype, jnp.floating) else jnp.round(value).astype(leaf.dtype)
