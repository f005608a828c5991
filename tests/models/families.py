"""Random small models of the families, in transformers and here.

Every case is made and saved by transformers and loaded by us. Weights are larger than a fresh model's, so that outputs
and attention are far from uniform. Rows have different lengths, padded on the right.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxpeft as jp

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

BERT = {
    "vocab_size": 61,
    "hidden_size": 32,
    "intermediate_size": 40,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "max_position_embeddings": 40,
    "type_vocab_size": 2,
}
ROBERTA = {**BERT, "type_vocab_size": 1, "pad_token_id": 1}
OPT = {
    "vocab_size": 61,
    "hidden_size": 32,
    "word_embed_proj_dim": 32,
    "ffn_dim": 40,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "max_position_embeddings": 40,
}
VIT = {
    "hidden_size": 32,
    "intermediate_size": 40,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "image_size": 24,
    "patch_size": 8,
}

# name: (transformers' class, its configuration)
CASES = {
    "bert": ("BertModel", BERT),
    "bert, masked LM": ("BertForMaskedLM", BERT),
    "bert, classifier": ("BertForSequenceClassification", {**BERT, "num_labels": 3}),
    "bert, regression, relu": ("BertForSequenceClassification", {**BERT, "num_labels": 1, "hidden_act": "relu"}),
    "roberta": ("RobertaModel", ROBERTA),
    "roberta, masked LM": ("RobertaForMaskedLM", {**ROBERTA, "layer_norm_eps": 1e-5}),
    "roberta, classifier": ("RobertaForSequenceClassification", {**ROBERTA, "num_labels": 3}),
    "opt": ("OPTModel", OPT),
    "opt, causal LM": ("OPTForCausalLM", OPT),
    "opt, classifier": ("OPTForSequenceClassification", {**OPT, "num_labels": 3}),
    "vit": ("ViTModel", {**VIT, "num_channels": 1, "qkv_bias": False}),
    "vit, classifier": ("ViTForImageClassification", {**VIT, "num_labels": 5}),
}
LENGTHS = np.array([24, 9, 1])
MASK = np.arange(24) < LENGTHS[:, None]


def reference(case, seed=0):
    """transformers' random model. Its biases and the scales of its norms are random too."""
    name, changes = CASES[case]
    config = transformers.AutoConfig.for_model(case.split(",")[0], **changes)
    config.architectures = [name]
    torch.manual_seed(seed)
    model = getattr(transformers, name)._from_config(config, attn_implementation="eager")
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            scale = parameter.ndim == 1 and name.endswith("weight")  # a norm's
            parameter.normal_(1.0 if scale else 0.0, 0.2)
    return model.float().eval()


def inputs(case):
    """(transformers' arguments, our batch)."""
    rng = np.random.default_rng(1)
    if case.startswith("vit"):
        pixels = rng.normal(size=(3, 24, 24, CASES[case][1].get("num_channels", 3))).astype(np.float32)
        return {"pixel_values": torch.tensor(pixels.transpose(0, 3, 1, 2))}, {"pixels": jnp.asarray(pixels)}
    tokens = np.where(MASK, rng.integers(2, 61, MASK.shape), 0 if case.startswith("bert") else 1)
    theirs = {"input_ids": tokens, "attention_mask": MASK.astype(int)}
    ours = {"tokens": tokens, "segment_ids": MASK}
    if types := CASES[case][1].get("type_vocab_size"):
        theirs["token_type_ids"] = ours["token_types"] = rng.integers(0, types, MASK.shape)
    return (
        {name: torch.tensor(x) for name, x in theirs.items()},
        {name: jnp.asarray(x, jnp.int32) for name, x in ours.items()},
    )


def both(case, folder):
    """(transformers' model, ours, our parameters)."""
    theirs = reference(case)
    theirs.save_pretrained(folder)
    return theirs, *jp.load_pretrained(folder, jnp.float32)


def close(found, expected, tolerance, what):
    found, expected = np.asarray(found, np.float64), np.asarray(expected, np.float64)
    assert found.shape == expected.shape, what
    error = np.abs(found - expected).max() / np.abs(expected).max()
    assert error < tolerance, f"{what}: relative error {error:.2e}"


def compiled(function, *args):
    """Compiled without LLVM's optimisations: these programs run once."""
    return jax.jit(function).lower(*args).compile({"xla_backend_optimization_level": 0})(*args)


def their_output(model, arguments):
    """What the model's head gives, or the stream where it has none."""
    found = model(**arguments)
    return found.logits if "logits" in found else found.last_hidden_state


def our_output(model):
    """(params, batch) -> the same of ours."""
    return model.classify if model.config.num_labels else model.apply


def counted(x):
    """Rows' results, or those of the positions that are not padding."""
    return x[MASK] if x.ndim == 3 and x.shape[1] == MASK.shape[1] else x
