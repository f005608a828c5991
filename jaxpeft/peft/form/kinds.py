"""What a form is, and which method's form an adapter_config.json asks for."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any, NamedTuple

import jax
import numpy as np

from jaxpeft import method as methods
from jaxpeft import tree
from jaxpeft.errors import InputError
from jaxpeft.peft.base import Foreign, Module, modules
from jaxpeft.quant import dense, matrix

Fields = Mapping[str, Any]  # of adapter_config.json
Config = Mapping[str, Any]  # of a `Spec`: the factory's arguments
Tensors = Mapping[str, np.ndarray]
Leaves = dict[str, Any]
Fill = float | Callable[[np.ndarray], np.ndarray]
ALWAYS: Mapping[str, Any] = {}  # for `when`
ToTensors = Callable[[Config, Mapping[str, Any], Module], Mapping[str, Any]]
FromTensors = Callable[[Config, Leaves, Mapping[str, Any]], Leaves]


class Base(NamedTuple):
    """The model that an adapter is for: its configuration, its linear modules by name, its flat parameters if known."""

    config: Any
    modules: Mapping[str, Module]
    params: tree.Flat | None = None

    @property
    def foreign(self) -> bool:
        """Whether it is of no known family, and its modules are those that were named."""
        return isinstance(self.config, Foreign)

    def kernel(self, name: str) -> np.ndarray:
        """A module's kernel (n, m), float32.

        Raises:
          InputError: if the base's parameters are not known.
        """
        if self.params is None:
            raise InputError(f"{name} is read with the base's kernel; give the base's parameters too")
        site, layer, _, _ = self.modules[name]
        kernel = matrix(self.params[f"{site}/kernel"])
        return np.asarray(dense(kernel if layer is None else jax.tree.map(lambda stack: stack[layer], kernel)))


def base_of(config: Any, params: Mapping[str, Any] | None = None) -> Base:
    """The base of a configuration and, if they are at hand, nested parameters."""
    return Base(config, modules(config), None if params is None else tree.flatten(params))


class Tensor(NamedTuple):
    """A tensor of PEFT's at a module.

    suffix: its name after the module's, such as "lora_A.weight".
    axes: one letter each, in PEFT's order: n the module's inputs, m its outputs, 1 an axis of one, r a rank that the
      tensors of a module share, any other letter a size that a site's modules have in common. The leaf has the axes in
      reverse, without those of one.
    dtype: of its numbers in the file; whole ones may be kept as floating-point numbers there.
    instead: the leaf in whose place a module may have this one, with all others that say the same.
    """

    suffix: str
    axes: str
    dtype: type[np.generic] = np.float32
    instead: str = ""


class Written(NamedTuple):
    """What a form writes: tensors by their names in the file, fields of adapter_config.json, facts of jaxpeft.json."""

    tensors: dict[str, np.ndarray]
    fields: dict[str, Any]
    facts: dict[str, Any]


class Form(NamedTuple):
    """PEFT's form of a method; made by the functions below.

    type: PEFT's peft_type.
    scope: the scope of the method's leaves; the form owns the paths with /scope/ in them.
    write: (config, leaves {path: leaf}, base) -> Written.
    parse: (tensors, base) -> parts, checked against the base: {module: {leaf: array}}, or {name: tensor} per model.
    read: (fields, parts, base) -> (arguments of the factory, parts as they mean it).
    restore: (config, parts, facts, base) -> leaves {path: leaf}; facts are {} for what PEFT wrote.
    check: refuses values of the fields that `read` knows.
    fields: the fields of adapter_config.json that are read, or that do not say what the adapter computes.
    when: the values that fields must have for this method to be the one that is read, among those of its type; the
      method with most of them is taken. ALWAYS: any values; None: it is not read without our jaxpeft.json.
    facts: the facts that `restore` needs.
    integers: ends of the names of tensors that may hold integers.
    root: what stands in front of the names of the base's own tensors; PEFT wraps the base once more where it wraps
      modules of it.
    scale: (config, site) -> s of an adapter that is x W + s x A B and nothing else; None for all others.
    modules: base -> the names of the modules that it may adapt, as `parse` and target_modules have them; none of a form
      of the whole model.
    """

    type: str
    scope: str
    write: Callable[[Config, tree.Flat, Base], Written]
    parse: Callable[[Tensors, Base], dict[str, Any]]
    read: Callable[[Fields, dict[str, Any], Base], tuple[dict[str, Any], dict[str, Any]]]
    restore: Callable[[Config, dict[str, Any], Mapping[str, Any], Base], tree.Flat]
    check: Callable[[Fields], None]
    fields: frozenset[str]
    when: Mapping[str, Any] | None
    facts: tuple[str, ...] = ()
    integers: tuple[str, ...] = ()
    root: str = "base_model.model."
    scale: Callable[[Config, str], float] | None = None
    modules: Callable[[Base], Iterable[str]] = lambda base: ()

    def owns(self, path: str) -> bool:
        """Whether a leaf is of the method."""
        return f"/{self.scope}/" in f"/{path}"


def form_of(name: str) -> Form | None:
    """The form that a method's file states, if it does."""
    return methods.about(name).peft


def method_for(fields: Fields) -> tuple[str, Form]:
    """The method that PEFT's adapter_config.json describes.

    Raises:
      InputError: if there is none for its peft_type, with the types that there are.
    """
    forms = {name: form for name in methods.names() if (form := form_of(name)) and form.when is not None}
    same = {name: form for name, form in forms.items() if form.type == fields.get("peft_type")}
    if not same:
        types = ", ".join(sorted({repr(form.type) for form in forms.values()}))
        raise InputError(f"peft_type {fields.get('peft_type')!r} is not supported; supported: {types}")

    def fit(name):
        wanted = same[name].when or {}
        met = all(fields.get(field) == value for field, value in wanted.items())
        return len(wanted) if met else -len(wanted)

    name = max(same, key=fit)
    for field, value in (same[name].when or {}).items():
        if fields.get(field) != value:
            raise InputError(f"{field} {fields.get(field)!r} is not supported; supported: {value!r}")
    return name, same[name]


def refuse_nothing(fields: Fields) -> None:
    """The `check` of a form that reads any values."""
    del fields
