"""What llama.cpp calls things: a config.json from a header's fields and back, names of tensors, the order of rows.

llama.cpp's `llama` rotates neighbours (2i, 2i + 1) of a head where Hugging Face rotates halves (i, i + D/2), so that
rows of q and k are stored in another order there: for a head of D rows, D/2 pairs

    stored[2i + j] = row[j D/2 + i]        j = 0, 1

`qwen2` and `qwen3` rotate halves and are stored as they are. Llama 3.1's scaling of the rotation is not in the fields,
but in the tensor rope_freqs.weight: what each frequency is divided by.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, NamedTuple

import numpy as np

from jaxpeft.errors import InputError
from jaxpeft.gguf.container import KINDS, Container, Tensor
from jaxpeft.models import rotary

# llama.cpp's name of an architecture -> config.json's architecture and model_type. Mistral is a llama there.
ARCHITECTURES = {
    "llama": ("LlamaForCausalLM", "llama"),
    "qwen2": ("Qwen2ForCausalLM", "qwen2"),
    "qwen3": ("Qwen3ForCausalLM", "qwen3"),
}
BY_MODEL_TYPE = {kind: name for name, (_, kind) in ARCHITECTURES.items()} | {"mistral": "llama"}
ROPE_FREQS = "rope_freqs.weight"
# Types that are not dequantized to float32.
_DTYPES = {"F16": "float16", "BF16": "bfloat16", "F64": "float64"}
_ROTATED = ("self_attn.q_proj.", "self_attn.k_proj.")
# Llama 3.1 to 3.3; the factor differs.
_LLAMA3 = {"rope_type": "llama3", "low_freq_factor": 1.0, "high_freq_factor": 4.0}
_CONTEXTS = (8192, *(2**k for k in range(4, 21)))


def config_of(container: Container) -> dict[str, Any]:
    """The config.json of the checkpoint that a file was made of, as far as the header says it.

    Raises:
      InputError: for another architecture, a field that is absent or what is not supported.
    """
    file, fields, tensors = container
    if (kind := fields.get("general.type", "model")) != "model":
        raise InputError(f"{file}: general.type is {kind!r}; a checkpoint is a 'model'")
    architecture = fields.get("general.architecture")
    if architecture not in ARCHITECTURES:
        raise InputError(
            f"{file}: architecture {architecture!r} is not supported; supported: {', '.join(ARCHITECTURES)}"
        )

    def field(name: str, default: Any = None, kind: type = int) -> Any:
        value: Any = fields.get(f"{architecture}.{name}", default)
        if isinstance(value, list):
            if len(set(value)) != 1:
                raise InputError(f"{file}: {architecture}.{name} differs between layers, which is not supported")
            value = value[0]
        if value is None:
            raise InputError(f"{file}: the field {architecture}.{name} is missing")
        if type(value) is not kind:
            raise InputError(f"{file}: {architecture}.{name} is {value!r}; should be of type {kind.__name__}")
        return shortest(value) if isinstance(value, float) else value

    def at_most(limit: int, name: str, default: int) -> int:
        if (value := field(name, default)) > limit:
            raise InputError(f"{file}: {architecture}.{name} {value} is not supported")
        return value

    if "token_embd.weight" not in tensors:
        raise InputError(f"{file}: has no tensor token_embd.weight")
    at_most(0, "expert_count", 0)
    heads, hidden = field("attention.head_count"), field("embedding_length")
    head_dim = field("attention.key_length", hidden // max(heads, 1))
    for name in ("attention.value_length", "rope.dimension_count"):
        if (value := field(name, head_dim)) != head_dim:
            raise InputError(
                f"{file}: {architecture}.{name} is {value}, heads have {head_dim}; they should be the same"
            )
    name, model_type = ARCHITECTURES[architecture]
    layers, theta = field("block_count"), field("rope.freq_base", 10000.0, float)
    if layers > len(tensors):
        raise InputError(f"{file}: {architecture}.block_count is {layers}, of {len(tensors)} tensors")
    window = field("attention.sliding_window", 0) if architecture == "llama" else 0
    if window:
        name, model_type = "MistralForCausalLM", "mistral"
    config = {
        "architectures": [name],
        "model_type": model_type,
        "vocab_size": tensors["token_embd.weight"].shape[0],
        "hidden_size": hidden,
        "intermediate_size": field("feed_forward_length"),
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": field("attention.head_count_kv", heads),
        "head_dim": head_dim,
        "hidden_act": "silu",
        "rms_norm_eps": field("attention.layer_norm_rms_epsilon", kind=float),
        "max_position_embeddings": field("context_length"),
        "rope_theta": theta,
        "rope_scaling": _scaling(container, field, head_dim, theta),
        "sliding_window": window or None,
        "attention_bias": architecture == "llama" and "blk.0.attn_q.bias" in tensors,
        "mlp_bias": "blk.0.ffn_up.bias" in tensors,
        "tie_word_embeddings": "output.weight" not in tensors,
        "torch_dtype": _dtype(container),
        **_ids(fields),
    }
    return {key: value for key, value in config.items() if value is not None}


def fields_of(config: Mapping[str, Any], own: Any) -> dict[str, Any]:
    """The fields of a header that say what a config.json does, the tokenizer's aside.

    Args:
      config: a parsed config.json.
      own: its `DecoderConfig`.

    Raises:
      InputError: for an architecture that llama.cpp does not know under a name here, or a scaling it has no field for.
    """
    if own.model_type not in BY_MODEL_TYPE:
        raise InputError(f"model_type {own.model_type!r} has no GGUF form here; {', '.join(BY_MODEL_TYPE)} do")
    architecture = BY_MODEL_TYPE[own.model_type]
    fields = {
        "context_length": own.max_position_embeddings,
        "embedding_length": own.hidden_size,
        "block_count": own.num_hidden_layers,
        "feed_forward_length": own.intermediate_size,
        "attention.head_count": own.num_attention_heads,
        "attention.head_count_kv": own.num_key_value_heads,
        "attention.key_length": own.head_dim,
        "attention.value_length": own.head_dim,
        "attention.layer_norm_rms_epsilon": float(own.rms_norm_eps),
        "rope.dimension_count": own.head_dim,
        "rope.freq_base": float(own.rope_theta),
        "vocab_size": own.vocab_size,
    }
    scaling = dict(own.rope_scaling)
    kind = scaling.get("rope_type", "default")
    if kind == "dynamic" or (kind == "yarn" and not scaling.get("truncate", True)):
        raise InputError(f"config.json: rope_type {kind!r}{' without truncate' * (kind == 'yarn')} has no GGUF form")
    if kind in ("linear", "yarn"):
        fields |= {"rope.scaling.type": kind, "rope.scaling.factor": float(scaling["factor"])}
        original = scaling.get("original_max_position_embeddings")
        fields |= {"rope.scaling.original_context_length": original} if original else {}
    known = {"rope_type", "factor", "original_max_position_embeddings", "truncate"}
    if kind == "yarn" and (more := set(scaling) - known):
        raise InputError(f"config.json: YaRN's {', '.join(sorted(more))} has no GGUF form here")
    if own.model_type == "mistral" and own.window is not None:
        fields["attention.sliding_window"] = own.window
    return {"general.architecture": architecture} | {f"{architecture}.{name}": x for name, x in fields.items()}


def rope_freqs(own: Any) -> np.ndarray | None:
    """Llama 3's scaling as llama.cpp has it: float32 (D / 2,), what each frequency is divided by; None without one."""
    scaling = dict(own.rope_scaling)
    if scaling.get("rope_type") != "llama3":
        return None
    return _divisors(own.head_dim, own.rope_theta, scaling)


def names_of(architecture: str, layers: int, wanted: Iterable[str]) -> dict[str, str]:
    """{llama.cpp's name: Hugging Face's} of the tensors `wanted`."""
    import gguf

    arch = next(arch for arch, name in gguf.MODEL_ARCH_NAMES.items() if name == architecture)
    table = gguf.get_tensor_name_map(arch, layers)
    found = {}
    for name in wanted:
        if (there := table.get_name(name, try_suffixes=(".weight", ".bias"))) is not None:
            found[there] = name
    return found


class Stored(NamedTuple):
    """A tensor under Hugging Face's name, its rows in Hugging Face's order.

    kind: its type as the file names it.  dtype: config.json's name of the type that holds its values; None: none does.
    part: reads slices of all its axes; None: it can only be read as a whole.
    packed: reads a matrix that is stored packed as the kernel that it is; None: it is not.
    """

    name: str
    kind: str
    dtype: str | None
    shape: tuple[int, ...]
    read: Callable[[], np.ndarray]
    part: Callable[[tuple[slice, ...]], np.ndarray] | None = None
    packed: Callable[[], Any] | None = None


def tensors_of(container: Container, wanted: Iterable[str]) -> Iterator[Stored]:
    """The tensors of a file, those that are not `wanted` under their own names.

    Args:
      container: the file.
      wanted: Hugging Face's names of the model's parameters.
    """
    config, architecture = config_of(container), container.fields["general.architecture"]
    names = names_of(architecture, config["num_hidden_layers"], wanted)
    for tensor in container.tensors.values():
        if tensor.name == ROPE_FREQS:
            continue
        name = names.get(tensor.name, tensor.name)
        heads = heads_of(architecture, config, name)
        dtype = _DTYPES.get(tensor.kind, "float32") if tensor.kind in KINDS else None
        yield Stored(name, tensor.kind, dtype, tensor.shape, functools.partial(_read, tensor, heads))


def _read(tensor: Tensor, heads: int) -> np.ndarray:
    return halves(tensor.read(), heads) if heads else tensor.read()


def heads_of(architecture: str, config: Mapping[str, Any], name: str) -> int:
    """In how many heads the rows of a tensor are stored in another order, by Hugging Face's name; 0: they are not."""
    if architecture != "llama" or not any(module in name for module in _ROTATED):
        return 0
    return config["num_attention_heads" if ".q_proj." in name else "num_key_value_heads"]


def halves(stored: np.ndarray, heads: int) -> np.ndarray:
    """Rows as llama.cpp has them, pairs of neighbours, in the order of halves."""
    return stored.reshape(heads, -1, 2, *stored.shape[1:]).swapaxes(1, 2).reshape(stored.shape)


def neighbours(rows: np.ndarray, heads: int) -> np.ndarray:
    """The inverse of `halves`."""
    return rows.reshape(heads, 2, -1, *rows.shape[1:]).swapaxes(1, 2).reshape(rows.shape)


def shortest(value: float) -> float:
    """A float32 of the header as the decimal number that was meant: 1e-05, not 9.999999747378752e-06."""
    return float(str(np.float32(value)))


def _scaling(container: Container, field: Any, head_dim: int, theta: float) -> dict[str, Any] | None:
    if ROPE_FREQS in container.tensors:
        return _llama3(container, head_dim, theta)
    kind = field("rope.scaling.type", "none", str)
    if kind == "none":
        return None
    if kind not in ("linear", "yarn"):
        raise InputError(f"{container.file}: rope.scaling.type {kind!r} is not supported; supported: linear, yarn")
    scaling = {"rope_type": kind, "factor": field("rope.scaling.factor", kind=float)}
    if original := field("rope.scaling.original_context_length", 0):
        scaling["original_max_position_embeddings"] = original
    return scaling


def _llama3(container: Container, head_dim: int, theta: float) -> dict[str, Any] | None:
    """The scaling whose divisors the file has.

    Its other numbers are Llama 3.1's; the factor follows from the lowest frequency, f / d = k f + (1 - k) f / factor.
    """
    found = container.tensors[ROPE_FREQS].read().astype(np.float64).ravel()
    if found.shape != (head_dim // 2,):
        raise InputError(f"{container.file}: {ROPE_FREQS} has {found.size} values, expected {head_dim // 2}")
    if np.all(found == 1):
        return None
    lowest = theta ** (-(head_dim - 2) / head_dim)
    for context in _CONTEXTS:
        keep = np.clip((context * lowest / (2 * np.pi) - 1) / 3, 0, 1)
        if 1 / found[-1] <= keep:
            continue
        factor = (1 - keep) / (1 / found[-1] - keep)
        factor = round(factor) if abs(factor - round(factor)) < 1e-3 else shortest(factor)
        scaling = {**_LLAMA3, "factor": float(factor), "original_max_position_embeddings": context}
        if np.allclose(_divisors(head_dim, theta, scaling), found, rtol=1e-4):
            return scaling
    raise InputError(f"{container.file}: {ROPE_FREQS} is not Llama 3's scaling of the rotation, the only one supported")


def _divisors(head_dim: int, theta: float, scaling: Mapping[str, Any]) -> np.ndarray:
    base, _ = rotary.frequencies(head_dim, theta, {}, 0)
    scaled, _ = rotary.frequencies(head_dim, theta, scaling, 0)
    return base / scaled


def _dtype(container: Container) -> str:
    """The type in which most weights are; dequantized ones need float32."""
    sizes: dict[str, int] = {}
    for tensor in container.tensors.values():
        sizes[tensor.kind] = sizes.get(tensor.kind, 0) + tensor.num_bytes
    return _DTYPES.get(max(sizes, key=sizes.__getitem__), "float32")


def _ids(fields: Mapping[str, Any]) -> dict[str, Any]:
    """The special tokens; a turn may end otherwise than a text."""
    ends = [fields.get(f"tokenizer.ggml.{name}_token_id") for name in ("eos", "eot", "eom")]
    eos = list(dict.fromkeys(end for end in ends if end is not None))
    return {
        "bos_token_id": fields.get("tokenizer.ggml.bos_token_id"),
        "eos_token_id": eos[0] if len(eos) == 1 else eos or None,
        "pad_token_id": fields.get("tokenizer.ggml.padding_token_id"),
    }
