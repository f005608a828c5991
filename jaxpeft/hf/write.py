"""A model's parameters, written as a checkpoint.

Files are written tensor by tensor. A checkpoint appears whole or not at all.
"""

from __future__ import annotations

import json
import math
import os
import shutil
import types
from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from jaxpeft import distributed, documents, files, host, models, shares, tree
from jaxpeft.errors import InputError
from jaxpeft.gguf import Stored
from jaxpeft.hf.folder import COPIED, WEIGHTS, load_config, load_tokenizer, resolve
from jaxpeft.hf.read import DTYPES, INDEX, places_of, sources_of
from jaxpeft.models import quantized
from jaxpeft.quant import is_packed, unpacked

_CODE = "auto_map"  # Python files, or repositories of some, that transformers runs if it is told to
_CODES = {name: code for code, name in DTYPES.items()}


class Tensor(NamedTuple):
    """A tensor to write: row `row` of `leaf` (all of it if None)."""

    name: str
    leaf: Any
    row: int | None
    transposed: bool
    shape: tuple[int, ...]  # in the file
    dtype: str  # in the file
    source: Stored | None = None  # the same tensor, where it lies already

    @property
    def num_bytes(self) -> int:
        return math.prod(self.shape) * np.dtype(self.dtype).itemsize

    def give(self) -> None:
        """Gives the first process its part of the tensor, when that one asks for the `array`."""
        if self.source is None:
            shares.on_host(self.leaf if self.row is None else host.row(self.leaf, self.row))

    def array(self) -> np.ndarray:
        """As it is written."""
        if self.source is not None:
            return self.source.read().astype(self.dtype, copy=False)
        array = shares.on_host(self.leaf if self.row is None else host.row(self.leaf, self.row))
        return (array.T if self.transposed else array).astype(self.dtype)


def save_pretrained(
    directory: str | os.PathLike[str],
    config: Mapping[str, Any] | str | os.PathLike[str],
    params: Mapping[str, Any],
    max_shard_gb: float = 5.0,
    labels: Sequence[str] = (),
    as_stored: bool = False,
    unchanged: Collection[str] = (),
    rope_scaling: str | None = None,
    beside: Mapping[str, str] = types.MappingProxyType({}),
    changes: Mapping[str, Any] = types.MappingProxyType({}),
) -> Path:
    """Writes a checkpoint that transformers and `load_pretrained` read. It appears whole or not at all.

    Args:
      directory: the folder to make; it may exist if it is empty.
      config: a parsed config.json, or the checkpoint (folder, GGUF file or hub id) that the parameters began as: then
        its tokenizer and generation settings are copied too.
      params: nested parameters, without adapters; a cut stack is joined. They are written in their own dtype; kernels
        that are packed as their checkpoint has them (GPTQ, AWQ) are unpacked.
      max_shard_gb: the largest file, in units of 10^9 bytes; larger models are cut into several files with an index.
      labels: names of what rows are classified as, for parameters that were loaded with them.
      as_stored: each tensor is written in the type that it has in the checkpoint `config`; one that is not there (a new
        classifier) in the type of most.
      unchanged: paths of leaves that are as in that checkpoint: their tensors are copied from there. With `as_stored`.
      rope_scaling: KIND=FACTOR, with which the parameters were loaded; it becomes part of config.json.
      beside: further files of the folder, {name: text}, in place of the checkpoint's own of these names.
      changes: fields of config.json that differ from the checkpoint's, as a pruned model's sizes.

    Returns:
      `directory`.

    Raises:
      InputError: if `directory` exists and is not empty, or cannot be written.
      ValueError: for parameters that are not those of `config`, or not floating-point arrays.
    """
    target = files.expanded(directory)
    if distributed.is_first():
        files.check_target(target)
    source = None if isinstance(config, Mapping) else resolve(config)
    raw = dict(config) if isinstance(config, Mapping) else load_config(config)
    raw = dict(models.for_longer(raw, rope_scaling)) | dict(changes)
    raw = models.for_classification(raw, labels) if labels else raw
    raw = {key: value for key, value in raw.items() if key != _CODE}
    tensors = tensors_of(raw, params)
    if as_stored and source is not None:
        tensors = _as_stored(tensors, source, raw, labels, unchanged)
    else:
        raw |= {key: tensors[0].dtype for key in ("dtype", "torch_dtype") if key in raw}
    if not distributed.is_first():
        for tensor in tensors:
            tensor.give()
        return target
    try:
        with files.appearing(target) as folder:
            files.write_json(folder / "config.json", quantized.plain(raw))
            _write_weights(folder, tensors, int(max_shard_gb * 1e9))
            if source is not None and source.is_file():
                load_tokenizer(source).save_pretrained(folder)
            for name in COPIED:
                if source is not None and (source / name).is_file():
                    _copy(source / name, folder / name)
            for name, text in beside.items():
                files.write(folder / name, text.encode())
    except OSError as error:
        raise InputError(f"{target}: cannot be written: {error.strerror or error}") from error
    return target


def _copy(file: Path, target: Path) -> None:
    """Copies a file of a checkpoint; names of code that it brings are left behind, as the code is."""
    if file.name == "tokenizer_config.json" and _CODE in (document := documents.read_json(file, f"{file}: is missing")):
        files.write_json(target, {key: value for key, value in document.items() if key != _CODE})
    else:
        shutil.copyfile(file, target)


def tensors_of(config: Mapping[str, Any], params: Mapping[str, Any]) -> list[Tensor]:
    """Every tensor of the file in the order of the forward pass: embeddings, layer by layer, head."""
    family = models.family(config)
    own = family.from_hf(config).config
    if quantized.scheme_of(config) is not None:
        params = unpacked(params)
    places, shapes = places_of(own), family.shapes(own)
    by_place = {(place.path, place.layer): (name, place) for name, place in places.items()}
    first = {segment: start for segment, start, _ in tree.segments(params)}
    tensors = []
    for path, leaf in tree.flatten(params).items():
        if is_packed(leaf):
            raise ValueError(f"{path} is packed; the method that packed it gives it back (`Method.merge`)")
        if getattr(leaf, "dtype", None) is None or str(leaf.dtype) not in _CODES:
            raise ValueError(f"{path}: expected an array of {', '.join(_CODES)}, found {getattr(leaf, 'dtype', leaf)}")
        start = first.get(path.split("/", 1)[0])
        for row in (None,) if start is None else range(leaf.shape[0]):
            key = (tree.canonical(path), None if start is None or row is None else start + row)
            name, place = by_place.pop(key, (None, None))
            if name is None or place is None:
                raise ValueError(f"{path} has no name in a Hugging Face checkpoint; merge or export adapters first")
            shape, expected = (x.shape if row is None else x.shape[1:] for x in (leaf, shapes[place.path]))
            if shape != expected:
                raise ValueError(f"{path}: shape {leaf.shape} does not fit the configuration")
            tensors.append(Tensor(name, leaf, row, place.transposed, place.shape, str(leaf.dtype)))
    if by_place:
        raise ValueError(f"params lack {', '.join(sorted({path for path, _ in by_place}))}")
    order = {name: (place.layer is None, place.layer or 0) for name, place in places.items()}
    embeddings = [tensor for tensor in tensors if "embed" in tensor.name and tensor.row is None]
    return embeddings + sorted((t for t in tensors if t not in embeddings), key=lambda tensor: order[tensor.name])


def _as_stored(
    tensors: Sequence[Tensor],
    folder: Path,
    config: Mapping[str, Any],
    labels: Sequence[str],
    unchanged: Collection[str],
) -> list[Tensor]:
    """The tensors in the types that they have in a checkpoint; those of unchanged leaves are the checkpoint's own."""
    places = places_of(models.family(config).from_hf(config).config)
    sources = sources_of(folder, config, places, labels)
    types = {name: source.dtype for name, source in sources.items() if source.dtype is not None}
    usual = Counter(types.values()).most_common(1)[0][0]
    return [
        tensor._replace(
            dtype=types.get(tensor.name, usual),
            source=sources.get(tensor.name) if places[tensor.name].path in unchanged else None,
        )
        for tensor in tensors
    ]


def _write_weights(folder: Path, tensors: Sequence[Tensor], max_bytes: int) -> None:
    """One file, or shards of at most `max_bytes` (a larger tensor has a file to itself) and their index."""
    shards: list[list[Tensor]] = [[]]
    filled = 0
    for tensor in tensors:
        if shards[-1] and filled + tensor.num_bytes > max_bytes:
            shards.append([])
            filled = 0
        shards[-1].append(tensor)
        filled += tensor.num_bytes
    if len(shards) == 1:
        return _write_safetensors(folder / WEIGHTS, tensors)
    weight_map: dict[str, str] = {}
    for i, shard in enumerate(shards):
        file = f"model-{i + 1:05}-of-{len(shards):05}.safetensors"
        _write_safetensors(folder / file, shard)
        weight_map |= {tensor.name: file for tensor in shard}
    total = sum(tensor.num_bytes for tensor in tensors)
    index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}
    files.write_json(folder / INDEX, index)


def _write_safetensors(file: Path, tensors: Sequence[Tensor]) -> None:
    """The format as its README gives it: length of the header (uint64), header (JSON), data; here one tensor at a time.

    The library's own writer wants all tensors of a file in memory at once.
    """
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for tensor in tensors:
        begin, end = end, end + tensor.num_bytes
        code = _CODES[tensor.dtype]
        header[tensor.name] = {"dtype": code, "shape": list(tensor.shape), "data_offsets": [begin, end]}
    encoded = json.dumps(header, separators=(",", ":")).encode()
    encoded += b" " * (-len(encoded) % 8)
    with file.open("wb") as out:
        out.write(len(encoded).to_bytes(8, "little") + encoded)
        for tensor in tensors:
            out.write(np.ascontiguousarray(tensor.array()).reshape(-1).view(np.uint8).data)
        out.flush()
        os.fsync(out.fileno())
