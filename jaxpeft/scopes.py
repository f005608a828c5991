"""Whose leaves parameters hold, by their paths: a method puts what it adds into scopes called by its name."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping
from typing import Any

import jax

from jaxpeft import tree
from jaxpeft.errors import InputError

_OWN = ("kernel", "embedding", "scale")  # what a module at which an adapter lies has itself


def at_modules(paths: Iterable[str], names: Collection[str]) -> dict[str, str]:
    """{path: name} of the leaves in a scope with one of the names beside a module's own leaf.

    A scope with a kernel or a table is a module that is called so, and no adapter.

    >>> at_modules(["mlp/up/kernel", "mlp/up/lora/a", "lora/out/kernel", "out/kernel", "out/lora/kernel"], ["lora"])
    {'mlp/up/lora/a': 'lora'}
    """
    paths = list(paths)
    modules = {path.rpartition("/")[0] for path in paths if path.rpartition("/")[2] in _OWN}
    called = {path.rpartition("/")[0] for path in paths if path.rpartition("/")[2] in ("kernel", "embedding")}
    found = {}
    for path in paths:
        parts = path.split("/")
        for at, part in enumerate(parts[1:-1], 1):
            if part in names and "/".join(parts[:at]) in modules and "/".join(parts[: at + 1]) not in called:
                found[path] = part
                break
    return found


def within(paths: Iterable[str], names: Collection[str]) -> list[str]:
    """The paths of leaves in a scope with one of the names, wherever it is."""
    names = set(names)
    return [path for path in paths if not names.isdisjoint(path.split("/")[:-1])]


def merged(
    name: str,
    merge: Callable[[tree.Params], tree.Params],
    params: Mapping[str, Any],
    names: Collection[str],
    adapts: Callable[[str], bool],
) -> tree.Params:
    """merge(params), if that leaves no adapter behind: a base does not read it, and what it has learnt would be lost.

    Args:
      name: of the method, for the message.
      merge: of the method.
      params: of the adapted model, nested or flat.
      names: of all methods.
      adapts: name -> whether a method puts leaves beside those of a module; others' are modules that are called so.

    Raises:
      InputError: for leaves of another method, or parameters without those of the base.
    """
    try:
        found = merge(tree.unflatten(tree.flatten(params)))
    except KeyError as error:
        missing = str(error.args[0]) if error.args else ""
        if "/" not in missing:  # no leaf's path: a fault of the merge itself
            raise
        raise InputError(
            f"{name}: merge misses {missing!r}; it takes all parameters of a model that {name} has adapted: "
            "jp.combine(trainable, rest)"
        ) from error
    for path, scope in at_modules(tree.flatten(found), names).items():
        if adapts(scope):
            raise InputError(
                f"{name}: merge leaves {path} as it is, which the base does not read; merge by the chain that the "
                f"parameters are of, with {scope} in it, in the order of setup (a merge of one's own calls merge_own)"
            )
    return found


def check_read(name: str, params: tree.Params, doubtful: Collection[str], made: Callable[[Any], Any]) -> None:
    """Refuses leaves of a method that is not on the model: nothing would read them.

    Args:
      name: of the method that is put on the model, for the message.
      params: nested, as they were given.
      doubtful: the paths of leaves in the scopes of methods that are not on the model.
      made: nested parameters -> flat dicts of the adapted model's.

    Raises:
      InputError: for such a leaf.
    """
    if not doubtful:
        return
    rest = {path: leaf for path, leaf in tree.flatten(params).items() if path not in doubtful}
    known = {path for part in jax.eval_shape(made, tree.unflatten(rest)) for path in part}
    if unread := [path for path in doubtful if path not in known]:  # a method may put leaves into another's scope
        raise InputError(
            f"{name}: the parameters hold {unread[0]}, which nothing in this model reads; give setup the adapted "
            "model, merge its adapter first (method.merge), or leave its leaves out"
        )


def check_new(name: str, paths: Iterable[str], again: Collection[str]) -> None:
    """Refuses a method that is put on a model that has it.

    Args:
      name: of the method, for the message.
      paths: of the adapted model's parameters.
      again: the names of its members that the model has already.

    Raises:
      InputError: where these have leaves, which would be one set for both.
    """
    if found := within(paths, again):
        raise InputError(
            f"{name}: the model has {', '.join(again)} already, whose leaves, as {found[0]}, would be one set for "
            "both; merge it first (method.merge), or give the model as it was (model.base)"
        )
