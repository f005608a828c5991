"""The same small model in PyTorch and here, and PEFT's own adapters on it."""

from collections.abc import Callable
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import peft
import torch
import transformers

from jaxpeft import hf, tree
from jaxpeft.peft import attach, export_adapter

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


def assert_same_gradients(
    theirs, model, trainable: tree.Flat, rest: tree.Flat, of_torch: Callable[[str, Callable], np.ndarray]
) -> np.ndarray:
    """The logits of both, and the gradients of one random function of them; the logits come back.

    `of_torch(path, value)` is value(parameter) of PEFT's parameters that a leaf is made of, in the leaf's shape.
    """
    weights = np.random.default_rng(0).normal(size=(*TOKENS.shape, SIZES["vocab_size"])).astype(np.float32)

    def ours(trainable):
        logits = model.apply(tree.combine(trainable, rest), {"tokens": TOKENS})
        return jnp.sum(logits * weights), logits

    gradients, logits = jax.jit(jax.grad(ours, has_aux=True))(trainable)
    theirs.zero_grad()
    expected = theirs(torch.tensor(TOKENS).long()).logits
    (expected * torch.tensor(weights)).sum().backward()
    expected = expected.detach().numpy()
    assert_close(np.asarray(logits), expected)
    assert gradients.keys()
    for path, gradient in gradients.items():
        assert_close(np.asarray(gradient), of_torch(path, lambda parameter: parameter.grad))
    return expected


def assert_same_as_peft(
    theirs, folder: Path, method, model, trainable, rest, of_torch: Callable[[str, Callable], np.ndarray], out: Path
):
    """PEFT's numbers in our leaves: logits, gradients, the merged model, and adapters in both directions.

    Args:
      theirs: PEFT's model on the base in a folder.
      folder: of the base.
      method, model, trainable, rest: ours on it; the values of what is trainable do not count.
      of_torch: as of `assert_same_gradients`.
      out: where files may be written.

    Returns:
      (what PEFT's files are read as, the parameters with them, the merged parameters).
    """
    base, params = load(folder)
    trainable = {path: jnp.asarray(of_torch(path, lambda parameter: parameter.data)) for path in trainable}
    expected = assert_same_gradients(theirs, model, trainable, rest, of_torch)
    assert np.abs(expected - torch_logits(torch_base(folder))).max() > 0.1
    whole = tree.combine(trainable, rest)
    merged = method.merge(whole)
    assert_close(logits(base, merged), expected)
    assert tree.flatten(merged).keys() == tree.flatten(params).keys()

    theirs.save_pretrained(out / "theirs")
    _, adapted, read = attach(out / "theirs", base, params)
    for path, leaf in {**rest, **trainable}.items():
        np.testing.assert_array_equal(tree.flatten(adapted)[path], leaf, err_msg=path)
        assert tree.flatten(adapted)[path].dtype == leaf.dtype
    export_adapter(out / "ours", whole, method, base.config, folder)
    assert_close(with_adapter(folder, out / "ours"), expected)
    return read, adapted, merged
