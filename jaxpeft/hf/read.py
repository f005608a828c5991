"""A checkpoint's weights, read.

Each stacked leaf is allocated once and filled in place, and each tensor is read from a mapping of its own (pages of a
mapping that have been read count as the process's memory). Where leaves are divided over devices, of each tensor only
the parts are read that the process's devices hold.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import os
import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import SingleDeviceSharding
from typing_extensions import TypedDict

from jaxpeft import documents, gguf, models, shares, tree
from jaxpeft.errors import InputError, first_line
from jaxpeft.hf import quantized
from jaxpeft.hf.folder import WEIGHTS, load_config, load_generation_config, resolve
from jaxpeft.model import Model
from jaxpeft.models import fields
from jaxpeft.models.quantized import scheme_of
from jaxpeft.special import eos_ids

INDEX = "model.safetensors.index.json"
PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt")
# safetensors' names of the types that weights come in -> their names in numpy and config.json
DTYPES = {"BF16": "bfloat16", "F16": "float16", "F32": "float32", "F64": "float64"}
STORED = "stored"  # a dtype of `load_pretrained`
# Buffers that old versions of transformers saved.
_IGNORED = re.compile(r".*rotary_emb\.inv_freq|.*embeddings\.(position_ids|token_type_ids)")
# A norm's parameters in checkpoints as old as BERT's own.
_OLD = {".gamma": ".weight", ".beta": ".bias"}


class _Index(TypedDict):
    """model.safetensors.index.json."""

    weight_map: dict[documents.Text, documents.Text]


Conversion = Callable[[jax.Array], Any]  # an array -> what it is stored as: a packed kernel
Placement = Callable[[str, Any], Any]  # (path, leaf or its shape) -> the sharding of each of its arrays, or None


# Names.


@dataclasses.dataclass(frozen=True)
class Place:
    """Where a tensor of the file goes: row `layer` of the leaf at `path` (all of it if None), transposed or not."""

    path: str
    layer: int | None
    transposed: bool
    shape: tuple[int, ...]  # in the file


def places_of(config: Any) -> dict[str, Place]:
    """Hugging Face name -> place, for all parameters of a family's configuration, a leaf's layers in order."""
    family = models.FAMILIES[config.model_type]
    differing: Mapping[str, tuple[int, ...]] = getattr(family, "file_shapes", lambda config: {})(config)
    places = {}
    for path, leaf in family.shapes(config).items():
        name, transposed = models.hf_name(config, path)
        layers = range(leaf.shape[0]) if tree.stacked(path) else (None,)
        shape = leaf.shape[1:] if tree.stacked(path) else leaf.shape
        for layer in layers:
            there = differing.get(name, shape[::-1] if transposed else shape)
            places[name.format(i=layer)] = Place(path, layer, transposed, there)
    return places


# In.


def load_pretrained(
    path_or_hub_id: str | os.PathLike[str],
    dtype: Any = None,
    labels: Sequence[str] = (),
    key: jax.Array | None = None,
    convert: Callable[[tree.Params], Mapping[str, Conversion]] | None = None,
    rope_scaling: str | None = None,
    placement: Placement | None = None,
) -> tuple[Model, tree.Params]:
    """The model of a checkpoint and its parameters.

    Args:
      path_or_hub_id: a local folder or GGUF file, or `owner/name` on the hub.
      dtype: of the parameters and of the computation; None: float32 on a CPU, elsewhere as `models.compute_dtype` says;
        STORED: each leaf's is that of its tensors, the widest where layers differ (float32 at most), to be written
        again.
      labels: names of what rows are classified as (a single one: a regression), for a model with a classifier in place
        of its head; what the checkpoint lacks of the classifier is initialised. Default: the checkpoint's own head.
      key: PRNG key for the parameters that are initialised.
      convert: which leaves are stored otherwise, a `Method.convert`: nested shapes -> {path: function}. A function is
        given the leaf in `dtype`, or a stacked leaf's layers one by one in their order, and what it returns is what is
        kept.
      rope_scaling: KIND=FACTOR, for texts longer than the checkpoint has positions for (see `models.for_longer`).
      placement: where leaves lie, as `sharding.of_leaves` says; None, or of a leaf: on the default device.

    Returns:
      (Model, nested dict of parameters in `dtype`, or as they were converted). The EOS in the model's configuration are
      those of config.json and of generation_config.json; see `jaxpeft.special` for the tokenizer's.

    Raises:
      InputError: for no such checkpoint, a configuration that is not supported, weights that are pickled, damaged, or
        don't fit the configuration.
    """
    folder = resolve(path_or_hub_id, ["*.safetensors", INDEX])
    raw = models.for_longer(load_config(folder), rope_scaling)
    family = models.family(raw)
    raw = models.for_classification(raw, labels) if labels else raw
    if ends := eos_ids(raw, load_generation_config(folder)):
        raw = {**raw, "eos_token_id": list(ends)}
    as_stored = isinstance(dtype, str) and dtype == STORED
    given = "float32" if as_stored else models.compute_dtype(raw) if dtype is None else dtype
    model = family.from_hf(raw, jnp.dtype(given))
    shapes = family.shapes(model.config)
    places = places_of(model.config)
    sources = sources_of(folder, raw, places, labels)
    by_path: dict[str, list[str]] = {}
    for name, place in places.items():
        by_path.setdefault(place.path, []).append(name)
    packed = {path for path, names in by_path.items() if any(n in sources and sources[n].packed for n in names)}
    conversions: Mapping[str, Conversion] = {}
    if convert is not None:
        held = quantized.shapes_of(raw, model.config, shapes)
        conversions = convert(tree.unflatten({path: (held if path in packed else shapes)[path] for path in shapes}))
    flat = {}
    lacking = [path for path, names in by_path.items() if names[0] not in sources]
    fresh = _fresh(model, lacking, jax.random.key(0) if key is None else key) if lacking else {}
    for path, names in by_path.items():
        where = lambda leaf, path=path: None if placement is None else placement(path, leaf)
        if path in fresh:
            flat[path] = _laid(fresh[path], where)
            continue
        like = shapes[path]
        if as_stored:
            found = sorted({sources[name].dtype or "" for name in names})
            like = jax.ShapeDtypeStruct(like.shape, functools.reduce(jnp.promote_types, map(_held, found)))
        tensors = [(places[name], sources[name]) for name in names]
        if path in packed:
            leaf = quantized.stacked(folder, path, like, [source for _, source in tensors])
            flat[path] = _laid(leaf, where)
        elif path in conversions:
            flat[path] = _laid(_converted(like, tensors, conversions[path]), where)
        elif (there := where(like)) is not None and not isinstance(there, SingleDeviceSharding):
            flat[path] = shares.made(like.shape, there, functools.partial(_part, like, tensors))
        else:
            leaf = _aligned(like.shape, np.dtype(like.dtype))
            for place, source in tensors:
                _fill(leaf if place.layer is None else leaf[place.layer], place, source)
            flat[path] = _laid(leaf, where)
    return model, tree.unflatten(flat)


def _laid(leaf: Any, where: Callable[[Any], Any]) -> Any:
    """A leaf that is whole here, where it is to lie."""
    there = where(leaf)
    return jax.device_put(leaf) if there is None else shares.placed(leaf, there)


def sources_of(
    folder: Path, config: Mapping[str, Any], places: Mapping[str, Place], labels: Sequence[str] = ()
) -> dict[str, gguf.Stored]:
    """Hugging Face's name -> tensor, of a checkpoint, whose headers are compared with `places`.

    Args:
      folder: of the checkpoint, or its GGUF file.  config: its parsed config.json.
      places: of the family's configuration of it.
      labels: as `load_pretrained` takes them: a classifier may be lacking then.

    Raises:
      InputError: for tensors that are missing, unexpected, or of another shape or type.
    """
    family = models.family(config)
    tied = fields.switch(config, "tie_word_embeddings", family.TIES)
    if folder.is_file():
        stored = gguf.tensors_of(gguf.read_header(folder), (*places, *family.TIED))
    else:
        stored = _stored(folder)
        if (scheme := scheme_of(config)) is not None:
            stored = quantized.joined(folder, stored, scheme, places)
    return _check(folder, stored, places, family, tied, may_lack=family.CLASSIFIER if labels else None)


def _held(dtype: str) -> Any:
    """The type in which arrays here hold one of DTYPES."""
    return jnp.dtype("float32" if dtype == "float64" else dtype)


def types_of(folder: Path) -> list[str]:
    """The types of a checkpoint's tensors, that of most first."""
    found: Counter[str] = Counter()
    for file in weight_files(folder):
        with _open(file) as opened:
            found.update(DTYPES[opened.get_slice(name).get_dtype()] for name in opened.keys())  # noqa: SIM118
    return [name for name, _ in found.most_common()]


def _fill(row: np.ndarray, place: Place, source: gguf.Stored) -> None:
    """Reads a tensor into the leaf, or the layer of one, that it is."""
    np.copyto(row, _turned(source.read(), place, row.shape), casting="unsafe")


def _turned(tensor: np.ndarray, place: Place, shape: tuple[int, ...]) -> np.ndarray:
    """A tensor of the file as our leaf, or its layer, has it."""
    return tensor.reshape(shape[::-1]).T if place.transposed else tensor.reshape(shape)


def _part(like: Any, tensors: Sequence[tuple[Place, gguf.Stored]], index: tuple[slice, ...]) -> np.ndarray:
    """A part of a leaf, slices of all its axes: of its layers those, and of their tensors what the slices say."""
    out = _aligned(tuple(s.stop - s.start for s in index), np.dtype(like.dtype))
    whole = tensors[0][0].layer is None
    within = index if whole else index[1:]
    shape = like.shape if whole else like.shape[1:]
    for row, (place, source) in zip([out] if whole else out, tensors if whole else tensors[index[0]], strict=True):
        turned = within[::-1] if place.transposed else within
        if source.part is not None and source.shape == (shape[::-1] if place.transposed else shape):
            part = source.part(turned)
            np.copyto(row, part.T if place.transposed else part, casting="unsafe")
        else:
            np.copyto(row, _turned(source.read(), place, shape)[within], casting="unsafe")
    return out


def _converted(like: Any, tensors: Iterable[tuple[Place, gguf.Stored]], conversion: Conversion) -> Any:
    """A leaf, on the host, of which one layer at a time is as it was in the file; what each becomes has its place."""
    stacks: Any = None
    for place, source in tensors:
        whole = place.layer is None
        row = _aligned(like.shape if whole else like.shape[1:], np.dtype(like.dtype))
        _fill(row, place, source)
        part = conversion(jax.device_put(row))
        if whole:
            return part
        part = jax.tree.map(np.asarray, part)
        if stacks is None:
            stacks = jax.tree.map(lambda x: _aligned((like.shape[0], *x.shape), x.dtype), part)
        for stack, x in zip(jax.tree.leaves(stacks), jax.tree.leaves(part), strict=True):
            stack[place.layer] = x
    return stacks


def _fresh(model: Model, paths: Sequence[str], key: jax.Array) -> tree.Flat:
    """Parameters of a new model, no other than these being made."""

    @jax.jit
    def make(key):
        flat = tree.flatten(model.init(key, {}))
        return {path: flat[path] for path in paths}

    return make(key)


def weight_files(folder: Path) -> list[Path]:
    """The safetensors files of a checkpoint.

    Raises:
      InputError: if there are none, or the index names one that is absent.
    """
    if (folder / WEIGHTS).is_file():
        return [folder / WEIGHTS]
    if not (folder / INDEX).is_file():
        if pickled := sorted(file.name for pattern in PICKLES for file in folder.glob(pattern)):
            raise InputError(
                f"{folder}: the weights are pickled ({pickled[0]}), which can run code and is refused; convert them in "
                "a trusted environment with transformers' model.save_pretrained(directory, safe_serialization=True)"
            )
        raise InputError(f"{folder}: has no weights ({WEIGHTS} or {INDEX})")
    index = documents.read_json(folder / INDEX, f"{folder}: has no {INDEX}", _Index)
    shards = index["weight_map"]
    if not shards:
        raise InputError(f"{folder / INDEX}: its weight_map is empty")
    for name, shard in shards.items():
        if Path(shard).name != shard:
            raise InputError(f"{folder / INDEX}: {name} should be in a file beside the index, not in {shard!r}")
        if not os.path.isfile(folder / shard):  # False, where Path's own raises, of a name that is too long
            raise InputError(f"{folder / INDEX}: the shard {shard} (of {name}) is absent")
    return [folder / shard for shard in sorted(set(shards.values()))]


@contextlib.contextmanager
def _open(file: Path) -> Iterator[Any]:
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(file, framework="numpy") as opened:
            yield opened
    except SafetensorError as error:
        raise InputError(f"{file}: not a whole safetensors file (truncated or damaged): {first_line(error)}") from None


def _stored(folder: Path) -> Iterator[gguf.Stored]:
    """The tensors of a folder's files, each in the one in which the index says it is."""
    found = weight_files(folder)
    shards = {} if found == [folder / WEIGHTS] else documents.read_json(folder / INDEX, "")["weight_map"]
    for file in found:
        with _open(file) as opened:
            for name in opened.keys():  # noqa: SIM118 (not a dict)
                if file.name != (told := shards.get(name, file.name)):
                    raise InputError(f"{file}: holds {name}, which {INDEX} says is in {told}")
                header = opened.get_slice(name)
                code, shape = header.get_dtype(), tuple(header.get_shape())
                read, part = (functools.partial(function, file, name) for function in (_read, _read_part))
                yield gguf.Stored(name, code, DTYPES.get(code), shape, read, part)


def _check(
    path: Path,
    stored: Iterable[gguf.Stored],
    places: Mapping[str, Place],
    family: ModuleType,
    tied: bool,
    may_lack: str | None,
) -> dict[str, gguf.Stored]:
    """Name -> tensor, after the headers alone have been compared with the configuration.

    Paths that `may_lack` matches may be absent, if no others are.
    """
    sources: dict[str, gguf.Stored] = {}
    unexpected, wrong, copies = [], [], []
    kinds, says = (gguf.KINDS, "its header") if path.is_file() else (tuple(DTYPES), "config.json")
    for tensor in stored:
        names = _names(tensor.name, family.PREFIX)
        name = next((name for name in names if name in places), None)
        if name is None:
            if of := next((family.TIED[name] for name in names if tied and name in family.TIED), None):
                copies.append((of, tensor))
            elif not any(re.fullmatch(family.OTHER_HEADS, name) for name in names):
                unexpected += [] if _IGNORED.fullmatch(tensor.name) else [tensor.name]
            continue
        if tensor.dtype is None:
            wrong.append(f"{tensor.name} is {tensor.kind}, expected one of {', '.join(kinds)}")
        elif tensor.shape != places[name].shape:
            wrong.append(f"{tensor.name} has shape {tensor.shape}, expected {places[name].shape}")
        if (other := sources.setdefault(name, tensor)) is not tensor:
            wrong.append(f"{tensor.name}{_as(tensor)} and {other.name}{_as(other)} are the same parameter twice")
    missing = [name for name in places if name not in sources]
    if may_lack is not None and all(re.fullmatch(may_lack, places[name].path) for name in missing):
        missing = []
    problems = [
        f"{len(names)} {kind}: {', '.join(names[:3])}{', ...' if len(names) > 3 else ''}"
        for kind, names in (("missing", missing), ("unexpected", unexpected), ("that differ", wrong))
        if names
    ]
    if problems:
        packed = any(name.endswith(".qweight") for name in unexpected)
        why = ", which does not say how they are quantized (quantization_config)" if packed else ""
        raise InputError(f"{path}: tensors do not fit {says}{why}: {'; '.join(problems)}")
    for of, copy in copies:
        if of in sources and not np.array_equal(copy.read(), sources[of].read()):
            raise InputError(
                f"{path}: config.json ties the head to the embeddings, but {copy.name} differs from "
                f"{sources[of].name}; set tie_word_embeddings to false there"
            )
    return sources


def _as(tensor: gguf.Stored) -> str:
    """What is said of a tensor that has been put together."""
    return " (quantized)" if tensor.packed is not None else ""


def _names(stored: str, prefix: str) -> list[str]:
    """What a tensor of the file may be called here: the trunk of a model has a prefix or not, norms have old names."""
    for old, new in _OLD.items():
        stored = stored.removesuffix(old) + new if stored.endswith(old) else stored
    return [stored, prefix + stored, stored.removeprefix(prefix)]


def _read(file: Path, name: str) -> np.ndarray:
    with _open(file) as opened:
        return opened.get_tensor(name)


def _read_part(file: Path, name: str, index: tuple[slice, ...]) -> np.ndarray:
    with _open(file) as opened:
        return opened.get_slice(name)[index] if index else opened.get_tensor(name)


def _aligned(shape: tuple[int, ...], dtype: np.dtype) -> np.ndarray:
    """Uninitialised, at an address that lets JAX's CPU backend adopt it instead of copying it."""
    size = int(np.prod(shape)) * dtype.itemsize
    memory = np.empty(size + 64, np.uint8)
    start = -memory.ctypes.data % 64
    return memory[start : start + size].view(dtype).reshape(shape)
