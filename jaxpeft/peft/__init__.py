"""Adapters in files, Hugging Face PEFT's where it has a form for them: `export_adapter`, `import_adapter`, `attach`.

An adapter is a folder:

    adapter_config.json         PEFT's configuration
    adapter_model.safetensors   the tensors of PEFT's form of the method, such as LoRA's base_model.model.<module>
                                .lora_A.weight (r, n) and .lora_B.weight (m, r) per layer, and those of a classifier of
                                rows under their own names; float32
    jaxpeft.json                ours, which PEFT does not read: the method's arguments, what its leaves need beyond the
                                tensors (seeds), the labels of rows, how rotary positions are scaled, and a fingerprint
                                of the base; it speaks of exactly the adapter_model.safetensors whose hash it holds

The forms are in the methods' own files (see `jaxpeft.peft.form`).

With jaxpeft.json an adapter comes back as the method that made it, bit for bit, and trains on; without it, or when the
tensors have changed since (which a notice says), it is read as what PEFT says it is. Either way it has tensors of every
module that target_modules names; one that has lost some is refused.

What PEFT has no form for (adapters between layers, side networks, several methods that add leaves, any of a module of
one's own) is written in ours: the peft_type is JAXPEFT, so that PEFT takes it for nothing else, the tensors are called
by our paths, and jaxpeft.json is needed to read them.

Source: the format as huggingface/peft 0.21 writes and reads it.
"""

from jaxpeft.peft.base import adapter_labels, adapter_rope_scaling, fingerprint
from jaxpeft.peft.export import export_adapter
from jaxpeft.peft.read import attach, import_adapter
from jaxpeft.peft.several import attach_several
from jaxpeft.peft.weighted import weighted_adapter

__all__ = [
    "adapter_labels",
    "adapter_rope_scaling",
    "attach",
    "attach_several",
    "export_adapter",
    "fingerprint",
    "import_adapter",
    "weighted_adapter",
]
