"""Hugging Face checkpoints in and out: config.json, safetensors weights, tokenizer.

A checkpoint is a folder, or the id of one on the hub. Weights lie in `model.safetensors`, or in shards that
`model.safetensors.index.json` lists; pickled weights (*.bin, *.pt) are never read, as reading them runs code. A
family's NAMES table translates between its parameter paths and the tensor names; matrices are (out, in) in the file and
(in, out) here, layers are single tensors in the file and stacked on axis 0 here.

Host memory stays near one tensor above the model in both directions, as it is stored here: a model whose kernels are
packed while they are read (`load_pretrained(convert=...)`) never lies in memory as the file has it.
"""

from jaxpeft.hf.folder import WEIGHTS, load_config, load_generation_config, load_tokenizer, resolve
from jaxpeft.hf.read import INDEX, STORED, load_pretrained, types_of, weight_files
from jaxpeft.hf.write import save_pretrained

__all__ = [
    "INDEX",
    "STORED",
    "WEIGHTS",
    "load_config",
    "load_generation_config",
    "load_pretrained",
    "load_tokenizer",
    "resolve",
    "save_pretrained",
    "types_of",
    "weight_files",
]
