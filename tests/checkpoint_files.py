"""Checkpoints of a Llama of three small layers, as files."""

import json
from pathlib import Path

import numpy as np
from safetensors import numpy as safetensors_numpy

CONFIG = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "vocab_size": 48,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "rms_norm_eps": 1e-5,
    "max_position_embeddings": 64,
    "tie_word_embeddings": False,
    "torch_dtype": "float32",
    "attention_bias": True,
    "hidden_act": "silu",
}
LAYER = {
    "input_layernorm.weight": (16,),
    "post_attention_layernorm.weight": (16,),
    "self_attn.q_proj.weight": (16, 16),
    "self_attn.k_proj.weight": (8, 16),
    "self_attn.v_proj.weight": (8, 16),
    "self_attn.o_proj.weight": (16, 16),
    "self_attn.q_proj.bias": (16,),
    "self_attn.k_proj.bias": (8,),
    "self_attn.v_proj.bias": (8,),
    "self_attn.o_proj.bias": (16,),
    "mlp.gate_proj.weight": (24, 16),
    "mlp.up_proj.weight": (24, 16),
    "mlp.down_proj.weight": (16, 24),
}
SHAPES = {
    "model.embed_tokens.weight": (48, 16),
    "model.norm.weight": (16,),
    "lm_head.weight": (48, 16),
    **{f"model.layers.{i}.{name}": shape for i in range(3) for name, shape in LAYER.items()},
}


def random_tensors(dtype=np.float32):
    rng = np.random.default_rng(0)
    return {name: rng.normal(size=shape).astype(dtype) for name, shape in SHAPES.items()}


def write(folder: Path, tensors=None, config=None) -> Path:
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(CONFIG if config is None else config))
    safetensors_numpy.save_file(random_tensors() if tensors is None else tensors, folder / "model.safetensors")
    return folder


def stored(folder: Path) -> dict[str, np.ndarray]:
    found = {}
    for file in folder.glob("*.safetensors"):
        found |= safetensors_numpy.load_file(file)
    return found


def bits(array) -> bytes:
    return np.ascontiguousarray(array).tobytes()
