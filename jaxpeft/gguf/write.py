"""GGUF files out: a merged model, or a LoRA adapter. Tensor by tensor; a file appears whole or not at all."""

from __future__ import annotations

import contextlib
import functools
import os
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from jaxpeft import models
from jaxpeft.errors import InputError
from jaxpeft.gguf import architecture
from jaxpeft.gguf.container import SUFFIX, Container, is_gguf, read_header

# The type that a model's matrices are written in, by the name of their dtype; vectors are float32 for llama.cpp.
KINDS = {"float32": "F32", "float16": "F16", "bfloat16": "BF16", "q8_0": "Q8_0"}
_FILE_TYPES = {"F32": "ALL_F32", "F16": "MOSTLY_F16", "BF16": "MOSTLY_BF16", "Q8_0": "MOSTLY_Q8_0"}
_LORA = re.compile(r"base_model\.model\.(?P<module>.+)\.lora_(?P<side>[AB])\.weight")


class Outgoing(NamedTuple):
    """A tensor to write: llama.cpp's name, type and shape, and how to make it (as plain floats)."""

    name: str
    kind: str
    shape: tuple[int, ...]
    make: Callable[[], np.ndarray]


def check_file(file: Path) -> None:
    """Raises InputError if a GGUF file cannot be made at `file`."""
    if file.suffix.lower() != SUFFIX:
        raise InputError(f"--out {file}: --format gguf writes a file; its name should end in {SUFFIX}")
    if file.exists():
        raise InputError(f"--out {file}: exists; choose another or remove it first")


def save_model(
    file: Path,
    source: str | os.PathLike[str],
    params: Mapping[str, Any],
    kind: str | None = None,
    rope_scaling: str | None = None,
    chat_template: str | None = None,
) -> Path:
    """Writes a model as llama.cpp reads it, with the tokenizer and the chat template of the checkpoint it began as.

    Args:
      file: to make; there must be none.
      source: the checkpoint (folder, GGUF file or hub id) that the parameters began as.
      params: nested parameters, without adapters.
      kind: the type of matrices, of KINDS; vectors are float32. Default: the parameters' own. What no whole blocks of
        Q8_0 fit into (rows no multiple of 32) is F16.
      rope_scaling: KIND=FACTOR, with which the parameters were loaded.
      chat_template: in place of the checkpoint's own.

    Returns:
      `file`.

    Raises:
      InputError: if the file is in the way or cannot be written, or for a model or tokenizer llama.cpp has no form of.
    """
    from jaxpeft import hf
    from jaxpeft.hf.write import tensors_of

    check_file(file)
    path = hf.resolve(source)
    header = read_header(path) if is_gguf(path) else None
    config = dict(models.for_longer(hf.load_config(path), rope_scaling))
    own = models.family(config).from_hf(config).config
    fields = {**_general(header, Path(source)), **architecture.fields_of(config, own)}
    fields |= _tokenizer(header, path, own.vocab_size)
    fields |= {"tokenizer.chat_template": chat_template} if chat_template else {}
    name = fields["general.architecture"]
    tensors = tensors_of(config, params)
    theirs = architecture.names_of(name, own.num_hidden_layers, [tensor.name for tensor in tensors])
    by_name = {there: here for here, there in theirs.items()}
    outgoing = []
    if (divisors := architecture.rope_freqs(own)) is not None:
        outgoing.append(Outgoing(architecture.ROPE_FREQS, "F32", divisors.shape, lambda: divisors))
    for tensor in tensors:
        wanted = KINDS[str(tensor.leaf.dtype) if kind is None else kind]
        if len(tensor.shape) < 2:
            wanted = "F32"
        elif wanted == "Q8_0" and tensor.shape[-1] % 32:
            wanted = "F16"
        heads = architecture.heads_of(name, config | {"num_key_value_heads": own.num_key_value_heads}, tensor.name)
        make = functools.partial(_in_order, tensor.array, heads)
        outgoing.append(Outgoing(by_name[tensor.name], wanted, tensor.shape, make))
    main = next(tensor.kind for tensor in outgoing if len(tensor.shape) > 1)
    fields["general.file_type"] = _file_type(main)
    if main == "Q8_0":
        fields["general.quantization_version"] = 2
    _write(file, fields, outgoing)
    return file


def save_adapter(file: Path, adapter: Path, config: Any) -> Path:
    """Writes a LoRA adapter in PEFT's format as llama.cpp applies it.

    A site's factor there is adapter.lora.alpha / rank; where modules have others, they are folded into B.

    Args:
      file: to make; there must be none.
      adapter: folder of the PEFT adapter.
      config: the base's configuration (`Model.config`).

    Raises:
      InputError: for an adapter that is no plain LoRA, or a base that llama.cpp has no form of.
    """
    from safetensors.numpy import load_file

    from jaxpeft.method import about
    from jaxpeft.peft.form.lora import scale_of
    from jaxpeft.peft.form.sites import commonest
    from jaxpeft.peft.read import specs_of
    from jaxpeft.peft.schema import WEIGHTS, adapter_config

    check_file(file)
    found = adapter_config(adapter)
    others = [name for name in ("use_dora", "lora_bias", "modules_to_save") if found.get(name)]
    tensors = load_file(adapter / WEIGHTS) if found.get("peft_type") == "LORA" else {}
    if not tensors or others:
        what = others[0] if tensors else f"peft_type {found.get('peft_type')}"
        merges = all(about(spec.name).promises.merges for spec in specs_of(adapter))
        advice = "; `jaxpeft merge --out NAME.gguf` instead" if merges else ""
        raise InputError(f"--out {file}: llama.cpp applies LoRA alone, not {what}{advice}")
    pairs: dict[str, dict[str, np.ndarray]] = {}
    for key, tensor in tensors.items():
        if (named := _LORA.fullmatch(key)) is None:
            raise InputError(f"--out {file}: {key} is no part of a plain LoRA")
        pairs.setdefault(named["module"], {})[named["side"]] = tensor.astype(np.float32)
    alphas = {name: scale_of(found, name, pair["A"].shape[0]) * pair["A"].shape[0] for name, pair in pairs.items()}
    alpha = commonest(alphas.values())
    fields = architecture.fields_of({}, config)
    name = fields["general.architecture"]
    sizes = {x: getattr(config, x) for x in ("num_attention_heads", "num_key_value_heads")}
    theirs = architecture.names_of(name, config.num_hidden_layers, [f"{module}.weight" for module in pairs])
    outgoing = []
    for there, here in theirs.items():
        pair = pairs.pop(here.removesuffix(".weight"))
        b = pair["B"] * np.float32(alphas[here.removesuffix(".weight")] / alpha)
        heads = architecture.heads_of(name, sizes, here)
        for side, array, split in (("a", pair["A"], 0), ("b", b, heads)):
            make = functools.partial(_in_order, functools.partial(np.asarray, array), split)
            outgoing.append(Outgoing(f"{there}.lora_{side}", "F32", array.shape, make))
    if pairs:
        raise InputError(f"--out {file}: llama.cpp has no name for {next(iter(pairs))}")
    fields = {
        "general.architecture": name,
        "general.type": "adapter",
        "adapter.type": "lora",
        "adapter.lora.alpha": float(alpha),
        "general.file_type": _file_type("F32"),
    }
    _write(file, fields, outgoing)
    return file


def _in_order(make: Callable[[], np.ndarray], heads: int) -> np.ndarray:
    """Rows as llama.cpp has them."""
    return architecture.neighbours(make(), heads) if heads else make()


def _general(header: Container | None, source: Path) -> dict[str, Any]:
    """What a header says of a model as a whole; the new one is no longer quantized as the old one was."""
    own = {"general.type": "model", "general.name": source.stem if header is not None else source.name}
    dropped = ("file_type", "quantization_version", "alignment", "architecture")
    old = {} if header is None else header.fields
    kept = {key: x for key, x in old.items() if key.startswith("general.")}
    return own | {key: x for key, x in kept.items() if key.removeprefix("general.") not in dropped}


def _tokenizer(header: Container | None, path: Path, vocab_size: int) -> dict[str, Any]:
    if header is not None:
        return {key: value for key, value in header.fields.items() if key.startswith("tokenizer.")}
    from jaxpeft import hf
    from jaxpeft.gguf.tokenizer import fields_of_tokenizer

    return fields_of_tokenizer(path, hf.load_tokenizer(path), vocab_size)


def _file_type(kind: str) -> int:
    import gguf

    return int(gguf.LlamaFileType[_FILE_TYPES[kind]])


def _write(file: Path, fields: Mapping[str, Any], tensors: Sequence[Outgoing]) -> None:
    import gguf

    try:
        with _appearing(file) as temporary:
            writer = gguf.GGUFWriter(temporary, fields["general.architecture"])
            for key, value in fields.items():
                if key != "general.architecture" and value != []:  # the writer has added the first
                    writer.add_key_value(key, value, *_types(value))
            for tensor in tensors:
                kind = gguf.GGMLQuantizationType[tensor.kind]
                block, size = gguf.GGML_QUANT_SIZES[kind]
                num_bytes = int(np.prod(tensor.shape)) // block * size
                writer.add_tensor_info(tensor.name, tensor.shape, np.dtype(np.float32), num_bytes, kind)
            writer.write_header_to_file()
            writer.write_kv_data_to_file()
            writer.write_ti_data_to_file()
            for tensor in tensors:
                values = np.ascontiguousarray(tensor.make(), np.float32)
                writer.write_tensor_data(gguf.quantize(values, gguf.GGMLQuantizationType[tensor.kind]))
            writer.close()
    except OSError as error:
        raise InputError(f"{file}: cannot be written: {error.strerror or error}") from error


def _types(value: Any) -> tuple[Any, ...]:
    """The types of a field: unsigned numbers, but for token types and what is below zero."""
    from gguf import GGUFValueType as Type

    def of(x: Any) -> Any:
        if isinstance(x, bool):
            return Type.BOOL
        if isinstance(x, int):
            return Type.UINT32 if x >= 0 else Type.INT32
        return Type.FLOAT32 if isinstance(x, float) else Type.STRING

    if not isinstance(value, list):
        return (of(value),)
    return Type.ARRAY, Type.INT32 if isinstance(value[0], int) and not isinstance(value[0], bool) else of(value[0])


@contextlib.contextmanager
def _appearing(file: Path) -> Iterator[Path]:
    """A temporary file beside `file` that takes its place at the end, or is gone after an error."""
    file.parent.mkdir(parents=True, exist_ok=True)
    temporary = file.with_name(f".{file.name}.tmp")
    try:
        yield temporary
        with temporary.open("rb") as written:
            os.fsync(written.fileno())
        temporary.replace(file)
    finally:
        temporary.unlink(missing_ok=True)
