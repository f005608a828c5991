"""Parameters as flat `{path: leaf}` dicts: match, split, combine, cut.

A path joins the keys of a nested dict with "/": `layers/self_attn/q_proj/kernel`. Layers are stacked on axis 0 of one
subtree, a *segment*: `layers`. A stack can be cut, so that its parts are treated differently; the segments are then
called by their range of layers: `layers_0_24` and `layers_24_32`.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import jax
import jax.numpy as jnp

from jaxpeft import patterns

Params = dict[str, Any]
Flat = dict[str, Any]

_SEGMENT = re.compile(r"layers(?:_(\d+)_(\d+))?")


def flatten(params: Mapping[str, Any]) -> Flat:
    """Nested dict -> `{path: leaf}`. Everything that is not a dict is a leaf (a quantized kernel is one)."""
    flat: Flat = {}
    for key, value in params.items():
        if isinstance(value, Mapping):
            flat.update({f"{key}/{path}": leaf for path, leaf in flatten(value).items()})
        else:
            flat[key] = value
    return flat


def unflatten(flat: Mapping[str, Any]) -> Params:
    """`{path: leaf}` -> nested dict, the inverse of `flatten`."""
    params: Params = {}
    for path, leaf in flat.items():
        *parents, name = path.split("/")
        node = params
        for parent in parents:
            node = node.setdefault(parent, {})
        node[name] = leaf
    return params


def split(params: Mapping[str, Any], trainable: Callable[[str], bool]) -> tuple[Flat, Flat]:
    """Nested params -> (trainable, frozen), two flat dicts that share no path. `combine` is the inverse."""
    flat = flatten(params)
    return (
        {path: leaf for path, leaf in flat.items() if trainable(path)},
        {path: leaf for path, leaf in flat.items() if not trainable(path)},
    )


def combine(trainable: Mapping[str, Any], frozen: Mapping[str, Any]) -> Params:
    """(trainable, frozen) -> nested params; flat dicts, and nested ones too.

    Raises:
      ValueError: if a path is in both.
    """
    trainable, frozen = flatten(trainable), flatten(frozen)
    if both := sorted(trainable.keys() & frozen.keys()):
        raise ValueError(f"paths both trainable and frozen: {', '.join(both)}")
    return unflatten({**frozen, **trainable})


def match(pattern: str, paths: Iterable[str]) -> list[str]:
    """The paths in which the regular expression `pattern` is found (`re.search`)."""
    compiled = patterns.compiled(pattern, "the pattern")
    return [path for path in paths if compiled.found(path)]


def nearest(word: str, words: Iterable[str], count: int = 3) -> str:
    """The words most like `word`, joined for an error message."""
    words = list(dict.fromkeys(words))
    return ", ".join(difflib.get_close_matches(word, words, n=count, cutoff=0.3) or sorted(words)[:count])


# Segments: stacks of consecutive layers.


def segments(params: Mapping[str, Any]) -> list[tuple[str, int, int]]:
    """The layer stacks in `params`, in order: (key, first layer, end); a list of layers (`layers/0/...`) is none."""
    found = []
    for key, value in params.items():
        listed = isinstance(value, Mapping) and any(map(str.isdecimal, value))
        if (named := _SEGMENT.fullmatch(key)) and not listed:
            length = len(jax.tree.leaves(params[key])[0])
            first = int(named[1] or 0)
            found.append((key, first, first + length))
    return sorted(found, key=lambda segment: segment[1])


def count_layers(params: Mapping[str, Any]) -> int:
    """L; 0 of parameters without layers. A segment of adapters that were read from a file ends before the last."""
    return max((end for _, _, end in segments(params)), default=0)


def stacked(path: str) -> bool:
    """Whether axis 0 of the leaf at `path` is the layer."""
    head, _, rest = path.partition("/")
    return _SEGMENT.fullmatch(head) is not None and not rest.partition("/")[0].isdecimal()


def layered(path: str) -> bool:
    """Whether axis 0 is the layer of a leaf, or of what a method keeps of one beside it: "lisa/layers/..."."""
    names = path.split("/")
    return any(stacked("/".join(names[i:])) for i in range(len(names)))


def canonical(path: str) -> str:
    """`layers_24_32/mlp/...` -> `layers/mlp/...`: a cut stack answers to the names of the whole one."""
    head, _, rest = path.partition("/")
    return f"layers/{rest}" if _SEGMENT.fullmatch(head) else path


def cut_layers(params: Mapping[str, Any], at: int) -> Params:
    """Cuts the stack before layer `at` (0 < at < layers): the segment that holds it becomes two.

    Leaves that already stand in one of the two (adapters that were read from a file) stay in it.
    """
    result = dict(params)
    for key, first, end in segments(params):
        if first < at < end:
            stack = result.pop(key)
            for start, stop in ((first, at), (at, end)):
                part = jax.tree.map(lambda leaf: leaf[start - first : stop - first], stack)  # noqa: B023
                name = f"layers_{start}_{stop}"
                result[name] = unflatten({**flatten(part), **flatten(result.get(name, {}))})
    return result


def join_layers(params: Mapping[str, Any]) -> Params:
    """Undoes every `cut_layers`: one segment `layers`. The segments must hold the same leaves."""
    keys = [key for key, _, _ in segments(params)]
    if len(keys) <= 1:
        return dict(params)
    result = {key: value for key, value in params.items() if key not in keys}
    result["layers"] = jax.tree.map(lambda *parts: jnp.concatenate(parts), *(params[key] for key in keys))
    return result


def over(axes: int, function: Callable[..., Any], each: Callable[..., Any] = jax.vmap) -> Callable[..., Any]:
    """A function of one layer's leaves, of leaves with so many axes of layers before: of one, of none, or of nested.

    each: how an axis is gone over: `jax.vmap`, all at once; or `in_turn`, which holds what one layer needs.
    """
    for _ in range(axes):
        function = each(function)
    return function


def in_turn(function: Callable[..., Any]) -> Callable[..., Any]:
    """A function of leaves over their axis 0, one after the other."""
    return lambda *leaves: jax.lax.map(lambda own: function(*own), leaves)


def size(tree: Any) -> int:
    """Number of elements of all arrays; a packed kernel has those of the kernel that it stands for."""
    return sum(leaf.size for leaf in jax.tree.leaves(tree, is_leaf=lambda node: hasattr(node, "size")))


def num_bytes(tree: Any) -> int:
    """Bytes of all arrays (or `ShapeDtypeStruct`s), those of which a packed kernel consists among them."""
    return sum(leaf.size * jnp.dtype(leaf.dtype).itemsize for leaf in jax.tree.leaves(tree))
