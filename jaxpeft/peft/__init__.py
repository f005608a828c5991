"""Hugging Face PEFT adapters, out (`export_adapter`) and in (`import_adapter`, `attach`).

An adapter is a folder:

    adapter_config.json         PEFT's configuration
    adapter_model.safetensors   base_model.model.<module>.lora_A.weight (r, n) and .lora_B.weight (m, r) per layer,
                                float32
    jaxpeft.json                ours, which PEFT does not read: the method's arguments, what its leaves need beyond the
                                factors (seeds), and a fingerprint of the base; it speaks of exactly the
                                adapter_model.safetensors whose hash it holds

With jaxpeft.json an adapter comes back as the method that made it, bit for bit, and trains on; without it, or when the
tensors have changed since, it is read as what PEFT says it is.

Source: the format as huggingface/peft 0.21 writes and reads it.
"""

from jaxpeft.peft.base import fingerprint
from jaxpeft.peft.export import export_adapter
from jaxpeft.peft.read import attach, import_adapter

__all__ = ["attach", "export_adapter", "fingerprint", "import_adapter"]
