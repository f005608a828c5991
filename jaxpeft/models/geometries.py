"""Published models' geometries, as their config.json on the Hugging Face hub gives them: sizes without weights.

Memory is planned from these; nothing is downloaded. Only what determines shapes and the computation is kept. Bases, not
their instruction-tuned versions, where both exist; geometry and size are the same.
"""

from __future__ import annotations

import copy
import os
from typing import Any

from jaxpeft import documents, files, hf, tree
from jaxpeft.errors import InputError
from jaxpeft.gguf import is_gguf


def _llama(hidden: int, intermediate: int, layers: int, heads: int, kv_heads: int, **more: Any) -> dict[str, Any]:
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_act": "silu",
        "hidden_size": hidden,
        "intermediate_size": intermediate,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "attention_bias": False,
        "mlp_bias": False,
        "rms_norm_eps": 1e-5,
        "tie_word_embeddings": False,
        "dtype": "bfloat16",
        **more,
    }


# What the members of a family share beyond its sizes.
_LLAMA_2 = {
    "vocab_size": 32000,
    "max_position_embeddings": 4096,
    "rope_theta": 10000.0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
_LLAMA_3 = {
    "vocab_size": 128256,
    "max_position_embeddings": 131072,
    "rope_theta": 500000.0,
    "bos_token_id": 128000,
    "eos_token_id": 128001,
}
_LLAMA_3_ROPE = {
    "rope_type": "llama3",
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}
_LLAMA_31 = {**_LLAMA_3, "rope_scaling": {**_LLAMA_3_ROPE, "factor": 8.0}}
_LLAMA_32 = {**_LLAMA_3, "rope_scaling": {**_LLAMA_3_ROPE, "factor": 32.0}, "tie_word_embeddings": True}
_QWEN_3 = {
    "architectures": ["Qwen3ForCausalLM"],
    "model_type": "qwen3",
    "vocab_size": 151936,
    "head_dim": 128,
    "max_position_embeddings": 40960,
    "rope_theta": 1000000.0,
    "rms_norm_eps": 1e-6,
    "use_sliding_window": False,
    "bos_token_id": 151643,
    "eos_token_id": 151645,
}

_BERT = {
    "architectures": ["BertForMaskedLM"],
    "model_type": "bert",
    "vocab_size": 30522,
    "type_vocab_size": 2,
    "max_position_embeddings": 512,
    "layer_norm_eps": 1e-12,
    "hidden_act": "gelu",
    "pad_token_id": 0,
    "dtype": "float32",
}
_ROBERTA = {
    **_BERT,
    "architectures": ["RobertaForMaskedLM"],
    "model_type": "roberta",
    "vocab_size": 50265,
    "type_vocab_size": 1,
    "max_position_embeddings": 514,
    "layer_norm_eps": 1e-5,
    "bos_token_id": 0,
    "pad_token_id": 1,
    "eos_token_id": 2,
}
_VIT = {
    "architectures": ["ViTForImageClassification"],
    "model_type": "vit",
    "image_size": 224,
    "patch_size": 16,
    "num_channels": 3,
    "layer_norm_eps": 1e-12,
    "hidden_act": "gelu",
    "qkv_bias": True,
    "id2label": {str(i): f"LABEL_{i}" for i in range(1000)},  # ImageNet's
    "dtype": "float32",
}


def _encoder(hidden: int, intermediate: int, layers: int, heads: int, **more: Any) -> dict[str, Any]:
    return {
        "hidden_size": hidden,
        "intermediate_size": intermediate,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        **more,
    }


def _opt(hidden: int, layers: int, heads: int) -> dict[str, Any]:
    return {
        "architectures": ["OPTForCausalLM"],
        "model_type": "opt",
        "vocab_size": 50272,
        "hidden_size": hidden,
        "word_embed_proj_dim": hidden,
        "ffn_dim": 4 * hidden,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "max_position_embeddings": 2048,
        "activation_function": "relu",
        "do_layer_norm_before": True,
        "bos_token_id": 2,
        "pad_token_id": 1,
        "eos_token_id": 2,
        "dtype": "float16",
    }


GEOMETRIES: dict[str, dict[str, Any]] = {
    # meta-llama/Llama-2-7b-hf, -13b-hf, -70b-hf
    "llama2-7b": _llama(4096, 11008, 32, 32, 32, **_LLAMA_2),
    "llama2-13b": _llama(5120, 13824, 40, 40, 40, **_LLAMA_2),
    "llama2-70b": _llama(8192, 28672, 80, 64, 8, **_LLAMA_2),
    # meta-llama/Llama-3.1-8B, -70B, -405B
    "llama3.1-8b": _llama(4096, 14336, 32, 32, 8, **_LLAMA_31),
    "llama3.1-70b": _llama(8192, 28672, 80, 64, 8, **_LLAMA_31),
    "llama3.1-405b": _llama(16384, 53248, 126, 128, 8, **_LLAMA_31),
    # meta-llama/Llama-3.2-1B, -3B
    "llama3.2-1b": _llama(2048, 8192, 16, 32, 8, head_dim=64, **_LLAMA_32),
    "llama3.2-3b": _llama(3072, 8192, 28, 24, 8, head_dim=128, **_LLAMA_32),
    # Qwen/Qwen2.5-7B; its biases on q, k, v go without saying in config.json
    "qwen2.5-7b": _llama(
        3584,
        18944,
        28,
        28,
        4,
        **{
            "architectures": ["Qwen2ForCausalLM"],
            "model_type": "qwen2",
            "vocab_size": 152064,
            "max_position_embeddings": 131072,
            "rope_theta": 1000000.0,
            "rms_norm_eps": 1e-6,
            "use_sliding_window": False,
            "sliding_window": 131072,
            "max_window_layers": 28,
            "bos_token_id": 151643,
            "eos_token_id": 151643,
        },
    ),
    # Qwen/Qwen3-0.6B, -8B
    "qwen3-0.6b": _llama(1024, 3072, 28, 16, 8, **_QWEN_3 | {"tie_word_embeddings": True}),
    "qwen3-8b": _llama(4096, 12288, 36, 32, 8, **_QWEN_3),
    # mistralai/Mistral-7B-v0.1
    "mistral-7b": _llama(
        4096,
        14336,
        32,
        32,
        8,
        **_LLAMA_2
        | {
            "architectures": ["MistralForCausalLM"],
            "model_type": "mistral",
            "max_position_embeddings": 32768,
            "sliding_window": 4096,
        },
    ),
    # TinyLlama/TinyLlama-1.1B-intermediate-step-1431k-3T
    "tinyllama-1.1b": _llama(2048, 5632, 22, 32, 4, **_LLAMA_2 | {"max_position_embeddings": 2048}),
    # google-bert/bert-base-uncased, bert-large-uncased
    "bert-base": _encoder(768, 3072, 12, 12, **_BERT),
    "bert-large": _encoder(1024, 4096, 24, 16, **_BERT),
    # FacebookAI/roberta-base, -large
    "roberta-base": _encoder(768, 3072, 12, 12, **_ROBERTA),
    "roberta-large": _encoder(1024, 4096, 24, 16, **_ROBERTA),
    # sentence-transformers/all-MiniLM-L6-v2
    "minilm": _encoder(384, 1536, 6, 12, **_BERT | {"architectures": ["BertModel"]}),
    # facebook/opt-1.3b, -6.7b, -13b, -30b
    "opt-1.3b": _opt(2048, 24, 32),
    "opt-6.7b": _opt(4096, 32, 32),
    "opt-13b": _opt(5120, 40, 40),
    "opt-30b": _opt(7168, 48, 56),
    # google/vit-base-patch16-224, -large-patch16-224
    "vit-b-16": _encoder(768, 3072, 12, 12, **_VIT),
    "vit-l-16": _encoder(1024, 4096, 24, 16, **_VIT),
}


def load(name_or_path: str | os.PathLike[str]) -> dict[str, Any]:
    """A parsed config.json: of a built-in geometry, of a folder that has one, or the file itself.

    A name of GEOMETRIES means that geometry, whatever lies in the working directory; nothing is fetched from the hub.

    Raises:
      InputError: for neither a geometry, a folder nor a file, or a file that is not a JSON object.
    """
    given = os.fspath(name_or_path)
    if given in GEOMETRIES:
        return copy.deepcopy(GEOMETRIES[given])
    path = files.expanded(given)
    try:
        there = bool(given) and path.exists()
    except (OSError, ValueError):  # a name that is too long, or holds a zero byte
        there = False
    if there and (path.is_dir() or is_gguf(path)):
        return hf.load_config(path)
    if there:
        return documents.read_json(path, missing=f"{given}: no such file")
    raise InputError(
        f"{given!r} is no built-in geometry, folder or config.json; did you mean {tree.nearest(given, GEOMETRIES)}? "
        f"Built in: {', '.join(GEOMETRIES)}"
    )
