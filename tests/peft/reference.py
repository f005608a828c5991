"""The same small model in PyTorch and here, and PEFT's own adapters on it."""

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import peft
import torch
import transformers

from jaxpeft import hf, tree

SIZES = {
    "vocab_size": 97,
    "hidden_size": 32,
    "intermediate_size": 56,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
}
TOKENS = np.random.default_rng(3).integers(0, 97, (2, 21)).astype(np.int32)


def write_base(folder: Path, kind: str = "llama", seed: int = 0, **changes) -> Path:
    """A random checkpoint with untied embeddings, weights large enough that logits are far from uniform."""
    config = transformers.AutoConfig.for_model(kind, **{**SIZES, "tie_word_embeddings": False, **changes})
    torch.manual_seed(seed)
    model = transformers.AutoModelForCausalLM.from_config(config)
    for parameter in model.parameters():
        if parameter.ndim > 1:
            torch.nn.init.normal_(parameter, std=0.2)
    model.save_pretrained(folder)
    return folder


def torch_base(folder: Path):
    return transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


def torch_logits(model, tokens=TOKENS) -> np.ndarray:
    with torch.no_grad():
        return model(torch.tensor(tokens).long()).logits.numpy()


def with_adapter(base: Path, adapter: Path) -> np.ndarray:
    """Logits of PEFT's model with the adapter in a folder."""
    return torch_logits(peft.PeftModel.from_pretrained(torch_base(base), adapter).eval())


def make_peft(base: Path, **settings):
    """PEFT's model with random, nonzero factors."""
    model = peft.get_peft_model(torch_base(base), peft.LoraConfig(task_type="CAUSAL_LM", **settings))
    generator = torch.Generator().manual_seed(1)
    for name, parameter in model.named_parameters():
        if ".lora_" in name:
            parameter.data = 0.2 * torch.randn(parameter.shape, generator=generator)
    return model.eval()


def load(base: Path):
    """(Model, params) in float32."""
    return hf.load_pretrained(base, jnp.float32)


def logits(model, params, tokens=TOKENS) -> np.ndarray:
    return np.asarray(jax.jit(model.apply)(params, {"tokens": tokens}))


def randomise(trainable: tree.Flat, seed: int = 5) -> tree.Flat:
    """The same leaves with noise, so that no B is zero."""
    keys = jax.random.split(jax.random.key(seed), len(trainable))
    noise = (0.2 * jax.random.normal(k, leaf.shape) for k, leaf in zip(keys, trainable.values(), strict=True))
    return {path: leaf + n for (path, leaf), n in zip(trainable.items(), noise, strict=True)}


def assert_close(ours: np.ndarray, theirs: np.ndarray, tolerance: float = 1e-4):
    """Largest difference over largest value."""
    assert np.abs(ours - theirs).max() <= tolerance * np.abs(theirs).max()
