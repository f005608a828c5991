"""Targets: which of a model's sites a method chooses, by preset, regular expression or names."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import Any

from jaxpeft import patterns, tree
from jaxpeft.errors import InputError
from jaxpeft.quant import EMBEDDING, Folded, is_linear, kind_of

_PRESETS = {
    "all-linear": r"^layers.*/[^/]+$",
    "attention": r"^layers.*/(self_attn|attention|attn)/.+$",
    "qv": r"^layers.*/(q_proj|v_proj|query|value)$",
    "mlp": r"^layers.*/mlp/[^/]+$",
}


def find(
    params: Mapping[str, Any],
    targets: str | Iterable[str] = "all-linear",
    method: str = "the method",
    kinds: Collection[str] = (),
) -> list[str]:
    """The sites that `targets` chooses.

    Args:
      params: nested parameters; a site is every path with a `kernel` of two axes (three with the layer axis).
      targets: "all-linear" (every linear map of the layers, not the head; every one where no layers are visible),
        "attention", "qv" (its queries and values, as in LoRA's paper), "mlp", a regular expression found in the site's
        path (`re.search`), or names that sites end with, as in PEFT's `target_modules` (`["q_proj", "v_proj"]`, or
        "q_proj,v_proj"; "q_proj," is one name). Embeddings and convolutions are chosen by names alone.
      method: whose targets they are.
      kinds: what the method adapts besides linear maps (`quant.EMBEDDING`, `quant.CONVOLUTION`).

    Raises:
      InputError: if a target matches no site, with the nearest names; or a linear map that cannot be one, with why not;
        or an embedding or a convolution that the method does not adapt.
    """
    if targets in ("", [], ()):
        raise InputError(f"{method}: targets {targets!r} name nothing; all-linear names every linear map of the layers")
    flat = tree.flatten(params)
    ends = lambda path: path.endswith("/kernel") or kind_of(flat[path]) == EMBEDDING
    kernels = {path.rpartition("/")[0]: leaf for path, leaf in flat.items() if ends(path)}
    refused = {site: leaf.why for site, leaf in kernels.items() if isinstance(leaf, Folded) and leaf.why}
    others = {site: kind for site, leaf in kernels.items() if (kind := kind_of(leaf))}
    sites = sorted(site for site, leaf in kernels.items() if is_linear(leaf) or site in refused.keys() - others.keys())
    targets = _listed(targets)
    if isinstance(targets, str):
        wanted = [_PRESETS.get(targets, targets)]
        if targets == "all-linear" and not any(re.search(wanted[0], tree.canonical(site)) for site in sites):
            wanted = [""]  # a model that shows no layers
        stray = wanted if targets not in _PRESETS else []
    else:
        wanted = [rf"(^|/){re.escape(name.replace('.', '/'))}$" for name in targets]
        stray = list(targets)
        sites = sorted({*sites, *others})
    chosen: set[str] = set()
    for i, pattern in enumerate(wanted):
        compiled = patterns.compiled(pattern, "targets")
        found = {site for site in sites if compiled.found(tree.canonical(site)) or compiled.found(site)}
        what = str(stray[i] if stray else targets)
        for site in sorted(found & refused.keys()):
            raise InputError(f"targets {what!r}: {site} is no site: {refused[site]}; choose targets without it")
        for site in sorted(found & others.keys()):
            if others[site] not in kinds:
                raise InputError(f"{method}: does not adapt {site}, {others[site]}; leave it out of targets")
        if not found:
            for site in others:
                if compiled.found(site):
                    raise InputError(f"targets {what!r}: {site}, {others[site]}, is chosen by name alone: [{site!r}]")
            leaves = [site.rsplit("/", 1)[-1] for site in sites] + sorted({tree.canonical(site) for site in sites})
            raise InputError(f"targets {what!r}: matches no linear site; nearest: {tree.nearest(what, leaves)}")
        chosen |= found
    return sorted(chosen)


def _listed(targets: str | Iterable[str]) -> str | Iterable[str]:
    """Targets in words as their names, "q_proj,v_proj" or "q_proj,"; a preset or an expression as it is."""
    if isinstance(targets, str) and re.fullmatch(r"[\w./]+,([\w./]+(,[\w./]+)*)?", targets):
        return targets.removesuffix(",").split(",")
    return targets


def chooses(targets: str | Iterable[str], site: str) -> bool:
    """Whether `find` would choose a site of a model of visible layers; of targets that it takes."""
    targets = _listed(targets)
    if isinstance(targets, str):
        wanted = [_PRESETS.get(targets, targets)]
    else:
        wanted = [rf"(^|/){re.escape(name.replace('.', '/'))}$" for name in targets]
    return any(patterns.found(pattern, path, "targets") for pattern in wanted for path in (tree.canonical(site), site))


def among(modules: Iterable[str], targets: str | Iterable[str], method: str, what: str) -> list[str]:
    """The modules that `targets` chooses, of a method that is not at sites.

    Args:
      modules: their paths.
      targets: "all", a regular expression found in a path (`re.search`), or names that paths end with.
      method: whose targets they are.  what: one of the modules, in words.

    Raises:
      InputError: if a target matches none, with the nearest names.
    """
    modules = list(modules)
    targets = _listed(targets)
    if isinstance(targets, str):
        wanted = {targets: "" if targets == "all" else targets}
    else:
        wanted = {name: rf"(^|/){re.escape(name.replace('.', '/'))}$" for name in targets}
    chosen: set[str] = set()
    for name, expression in wanted.items():
        pattern = patterns.compiled(expression, "targets")
        found = {own for own in modules if pattern.found(tree.canonical(own)) or pattern.found(own)}
        if not found:
            names = dict.fromkeys(own.rsplit("/", 1)[-1] for own in modules)
            raise InputError(f"{method}: targets {name!r}: matches no {what}; nearest: {tree.nearest(name, names)}")
        chosen |= found
    return sorted(chosen)


def first_match(values: Mapping[str, Any], site: str, default: Any) -> Any:
    """The value of the first pattern (regular expression, `re.search`) found in the site's path, else `default`."""
    for pattern, value in values.items():
        if patterns.found(pattern, site, "the pattern"):
            return value
    return default


def check_patterns(name: str, patterns: Mapping[str, Mapping[str, Any] | None], sites: Sequence[str]) -> None:
    """Raises InputError for a regular expression of an option's that is found in no site's path.

    Args:
      name: of the method.
      patterns: {option: {expression: value}}, or None.
      sites: those that the method's targets have chosen.
    """
    for what, values in patterns.items():
        for pattern in values or ():
            if not tree.match(pattern, sites):
                near = tree.nearest(pattern, sites)
                raise InputError(f"{name}: {what} {pattern!r} is found in no site that targets choose; nearest: {near}")


def kernel_path(leaves: Mapping[str, Any], site: str) -> str:
    """The path of a site's matrix: an embedding's is no kernel."""
    table = f"{site}/embedding"
    return table if table in leaves and f"{site}/kernel" not in leaves else f"{site}/kernel"
