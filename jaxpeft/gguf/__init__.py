"""llama.cpp's checkpoints: one file with weights, configuration, tokenizer and chat template (`.gguf`).

Read, a file is what the Hugging Face checkpoint was that it was made of (`jaxpeft.hf` takes either): quantized tensors
are dequantized one at a time, and rows of q and k are put back into Hugging Face's order. `jaxpeft.gguf.write` writes
one that holds a merged model, or a LoRA adapter as llama.cpp applies it.
"""

from jaxpeft.gguf.architecture import Stored, config_of, tensors_of
from jaxpeft.gguf.container import KINDS, SUFFIX, Container, is_gguf, read_header

__all__ = ["KINDS", "SUFFIX", "Container", "Stored", "config_of", "is_gguf", "read_header", "tensors_of"]
