"""Several adapters of files on one base: `attach_several`."""

from __future__ import annotations

import os
from collections.abc import Mapping

import jax

from jaxpeft import method as methods
from jaxpeft import tree
from jaxpeft.adapters import beside, is_pair, several
from jaxpeft.errors import InputError
from jaxpeft.method import Method, Spec, chain, from_specs, setup
from jaxpeft.model import Model
from jaxpeft.peft.base import adapter_labels, config_of
from jaxpeft.peft.form import base_of, form_of
from jaxpeft.peft.read import import_adapter

Folders = Mapping[str, str | os.PathLike[str]]


def attach_several(folders: Folders, base: Model, params: tree.Params) -> tuple[Model, tree.Params, dict[str, Method]]:
    """A model with all adapters of some folders, of which each row has one by name; see `jaxpeft.adapters`.

    LoRA's kind alone: LoRA and rsLoRA (PEFT's own, too), LoRA-FA, and PiSSA and OLoRA as LoRA of twice the rank for the
    original base. Adapters that were trained over a quantized base are put on one, where all of them were.

    Args:
      folders: {name: folder}, in the order by which batches number them.
      base: the base.
      params: its nested parameters.

    Returns:
      (model, its nested parameters, {name: method}); `jaxpeft.adapters.several` of the last is the model's method.

    Raises:
      InputError: as `import_adapter` does; for an adapter of another kind; for bases that were quantized differently.
    """
    found = {name: read_pair(name, folder, base, params) for name, folder in folders.items()}
    adapters = {name: method for name, (method, _, _) in found.items()}
    of_base = {name: rest for name, (_, _, rest) in found.items()}
    first, *others = of_base
    for name in others:
        if of_base[name] != of_base[first]:
            told = [" + ".join(f"{spec.name}{spec.config}" for spec in of_base[x]) or "none" for x in (first, name)]
            raise InputError(
                f"adapters {first!r} and {name!r} are for one base prepared differently: {told[0]} and {told[1]}"
            )
    method = several(adapters)
    if of_base[first]:
        method = chain(from_specs(of_base[first]), method)
    leaves = beside(adapters, {name: own for name, (_, own, _) in found.items()})
    model, trainable, frozen = setup(
        method, base, tree.unflatten({**tree.flatten(params), **leaves}), jax.random.key(0)
    )
    return model, tree.combine(trainable, frozen), adapters


def _only_trains(spec: Spec) -> bool:
    """Whether a member of a chain changes how the others train, and not what they compute: MeZO, BA-LoRA."""
    return methods.about(spec.name).level == "step"


def read_pair(
    name: str, folder: str | os.PathLike[str], base: Model, params: tree.Params | None = None
) -> tuple[Method, tree.Flat, tuple[Spec, ...]]:
    """An adapter of LoRA's kind, as a method that is a pair of factors for the original base.

    Args:
      name: what the adapter is called.
      folder: where it is.
      base: its base, and `params` its nested parameters.

    Returns:
      (method, its leaves {path: leaf}, what else of its method prepares the base: () or quantize's spec).

    Raises:
      InputError: as `import_adapter` does, and for an adapter of another kind.
    """
    called = str(folder) if name == os.fspath(folder) else f"adapter {name!r}: {folder}"
    if adapter_labels(folder) and not getattr(base.config, "num_labels", 0):
        raise InputError(f"{called}: classifies rows, and the others continue texts")
    method, leaves = import_adapter(folder, base, params)
    forms = [(spec, form) for spec in method.specs if (form := form_of(spec.name)) and form.scale is not None]
    rest = tuple(spec for spec in method.specs if spec not in [spec for spec, _ in forms] and not _only_trains(spec))
    pairs_alone = len(forms) == 1 and all(forms[0][1].owns(path) for path in leaves)
    if not pairs_alone or any(spec.name != "quantize" for spec in rest):
        raise InputError(
            f"{called}: is of {method.name}; several at once are LoRA's kind: lora (rsLoRA, PiSSA, OLoRA) and lora_fa"
        )
    ((spec, form),) = forms
    own = from_specs([spec])
    if is_pair(own):
        return own, leaves, rest
    known = base_of(config_of(base), params)
    plain = methods.about("lora").peft
    written = form.write(spec.config, leaves, known)
    parts = plain.parse(written.tensors, known)
    arguments, parts = plain.read(written.fields, parts, known)
    made = methods.make("lora", arguments)
    return made, plain.restore(made.specs[0].config, parts, {}, known), rest
