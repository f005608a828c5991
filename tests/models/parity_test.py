"""The decoder family against PyTorch transformers, float32: embedding, layers, stack, logits, gradients.

Every case is a random small model made and saved by transformers and loaded by us. Weights are larger than a fresh
model's, so that logits and attention are far from uniform.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file

import jaxpeft as jp
from jaxpeft import models
from jaxpeft.errors import InputError
from jaxpeft.models import decoder, rotary
from jaxpeft.models.decoder import DecoderConfig

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

SMALL = {
    "vocab_size": 61,
    "hidden_size": 32,
    "intermediate_size": 40,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "tie_word_embeddings": False,
}
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 1000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
}
LINEAR = {"rope_type": "linear", "rope_theta": 10000.0, "factor": 4.0}
DYNAMIC = {"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 4.0}
YARN = {"rope_type": "yarn", "rope_theta": 10000.0, "factor": 4.0, "original_max_position_embeddings": 16}

# name: (model_type, changes to SMALL, sequence length)
CASES = {
    "llama": ("llama", {}, 24),
    "llama with biases, tied, one head per key": (
        "llama",
        {"attention_bias": True, "mlp_bias": True, "tie_word_embeddings": True, "num_key_value_heads": 4},
        24,
    ),
    "llama3 scaling, one key head": ("llama", {"rope_parameters": LLAMA3, "num_key_value_heads": 1}, 40),
    "linear scaling": ("llama", {"rope_parameters": LINEAR}, 40),
    "yarn scaling": ("llama", {"rope_parameters": YARN, "head_dim": 16}, 40),
    "dynamic scaling, beyond the original context": (
        "llama",
        {"rope_parameters": DYNAMIC, "head_dim": 16, "max_position_embeddings": 16, "num_hidden_layers": 2},
        40,
    ),
    "mistral": ("mistral", {"sliding_window": 7}, 24),
    "mistral over several tiles": (
        "mistral",
        {"sliding_window": 70, "max_position_embeddings": 1024, "num_hidden_layers": 2, "num_attention_heads": 2},
        600,
    ),
    "qwen2, tied": ("qwen2", {"tie_word_embeddings": True}, 24),
    "qwen2, windows on the last layers": (
        "qwen2",
        {"use_sliding_window": True, "sliding_window": 5, "max_window_layers": 2},
        24,
    ),
    "qwen3": ("qwen3", {"head_dim": 16}, 24),
    "qwen3, windows, tied": (
        "qwen3",
        {
            "head_dim": 4,
            "use_sliding_window": True,
            "sliding_window": 6,
            "max_window_layers": 1,
            "tie_word_embeddings": True,
        },
        24,
    ),
}


def reference(kind, changes, seed=0):
    """A random transformers model. Its biases and norm scales are random too."""
    config = transformers.AutoConfig.for_model(kind, **{**SMALL, **changes})
    torch.manual_seed(seed)
    model = transformers.AutoModelForCausalLM.from_config(config, attn_implementation="eager", dtype=torch.float32)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim == 2:
                parameter.normal_(0, 0.2)
            else:
                parameter.normal_(1.0 if "norm" in name else 0.0, 0.2)
    return model.eval()


def close(found, expected, tolerance, what):
    found, expected = np.asarray(found, np.float64), np.asarray(expected, np.float64)
    assert found.shape == expected.shape, what
    error = np.abs(found - expected).max() / np.abs(expected).max()
    assert error < tolerance, f"{what}: relative error {error:.2e}"


def compiled(function, *args):
    """Compiled without LLVM's optimisations: these programs run once."""
    return jax.jit(function).lower(*args).compile({"xla_backend_optimization_level": 0})(*args)


def both(case, folder):
    """(transformers' model, ours, our parameters, tokens (2, length)) of a case."""
    kind, changes, length = CASES[case]
    theirs = reference(kind, changes)
    theirs.save_pretrained(folder)
    model, params = jp.load_pretrained(folder, jnp.float32)
    return theirs, model, params, np.random.default_rng(1).integers(0, SMALL["vocab_size"], (2, length))


@pytest.mark.parametrize(
    "case", ["llama3 scaling, one key head", "mistral", "qwen2, windows on the last layers", "qwen3"]
)
def test_embedding_and_each_layer_equal_transformers(case, tmp_path):
    theirs, model, params, tokens = both(case, tmp_path / "model")
    with torch.no_grad():
        expected = theirs(torch.tensor(tokens), output_hidden_states=True).hidden_states

    def rungs(params):
        """The outputs of the embedding and of each layer, (layers + 1, B, S, d)."""
        x, ctx = model.stack.embed(params, {"tokens": jnp.asarray(tokens, jnp.int32)}, None)

        def layer(x, inputs):
            weights, index = inputs
            y, _ = model.stack.block(weights, x, ctx.at(index), None, "layers")
            return y, y

        _, outputs = jax.lax.scan(layer, x, (params["layers"], jnp.arange(model.config.num_hidden_layers)))
        return jnp.concatenate([x[None], outputs])

    outputs = compiled(rungs, params)
    assert len(outputs) == len(expected)
    close(outputs[0], expected[0], 1e-6, "embedding")
    for i, state in enumerate(expected[1:-1]):
        close(outputs[i + 1], state, 1e-4, f"after layer {i}")
    with torch.no_grad():  # transformers gives the last layer's output after the final norm
        close(theirs.model.norm(torch.tensor(np.array(outputs[-1]))), expected[-1], 1e-4, "after the last layer")


@pytest.mark.parametrize("case", CASES)
def test_logits_and_gradients_equal_transformers(case, tmp_path):
    theirs, model, params, tokens = both(case, tmp_path / "model")
    ids = torch.tensor(tokens)
    expected = theirs(ids).logits
    expected_loss = torch.nn.functional.cross_entropy(expected[:, :-1].flatten(0, 1), ids[:, 1:].flatten())
    expected_loss.backward()

    def loss(params):
        logits = model.apply(params, {"tokens": jnp.asarray(tokens, jnp.int32)})
        chosen = jnp.take_along_axis(jax.nn.log_softmax(logits[:, :-1]), tokens[:, 1:, None], -1)
        return -chosen.mean(), logits

    (found_loss, logits), gradients = compiled(jax.value_and_grad(loss, has_aux=True), params)
    close(logits, expected.detach(), 1e-4, "logits")
    close(found_loss, expected_loss.detach(), 1e-5, "loss")

    # Written as a checkpoint, the gradients get transformers' names and layout.
    jp.save_pretrained(tmp_path / "gradients", tmp_path / "model", gradients)
    found = load_file(tmp_path / "gradients" / "model.safetensors")
    wanted = {name: parameter.grad.numpy() for name, parameter in theirs.named_parameters()}
    assert found.keys() == wanted.keys()
    for name, gradient in wanted.items():
        close(found[name], gradient, 1e-3, f"gradient of {name}")


@pytest.mark.parametrize("kind", ["llama", "mistral", "qwen2", "qwen3"])
def test_classifier_equals_transformers(kind, tmp_path):
    """Rows of different lengths, padded on the right."""
    config = transformers.AutoConfig.for_model(kind, **SMALL, num_labels=3, pad_token_id=0)
    torch.manual_seed(0)
    theirs = transformers.AutoModelForSequenceClassification.from_config(config, dtype=torch.float32).eval()
    theirs.save_pretrained(tmp_path / "model")
    model, params = jp.load_pretrained(tmp_path / "model", jnp.float32)
    tokens = np.random.default_rng(1).integers(1, SMALL["vocab_size"], (3, 24))
    mask = np.arange(24) < np.array([[24], [9], [1]])
    tokens = np.where(mask, tokens, 0)
    with torch.no_grad():
        expected = theirs(torch.tensor(tokens), attention_mask=torch.tensor(mask)).logits
    batch = {"tokens": jnp.asarray(tokens, jnp.int32), "segment_ids": jnp.asarray(mask, jnp.int32)}
    close(compiled(lambda p: model.classify(p, batch), params), expected, 1e-4, "logits")


@pytest.mark.parametrize("case", ["mistral", "qwen3"])
def test_packed_documents_equal_separate_ones(case, tmp_path):
    """Two documents and padding in one row, by segment ids and positions, against transformers on each alone."""
    theirs, model, params, tokens = both(case, tmp_path / "model")
    tokens = tokens[0]
    lengths = (9, 11)
    batch = {
        "tokens": jnp.asarray(tokens[None], jnp.int32),
        "positions": jnp.asarray([[*range(9), *range(11), *[0] * 4]], jnp.int32),
        "segment_ids": jnp.asarray([[1] * 9 + [2] * 11 + [0] * 4], jnp.int32),
    }
    logits = compiled(lambda p: model.apply(p, batch), params)
    start = 0
    for length in lengths:
        with torch.no_grad():
            expected = theirs(torch.tensor(tokens[None, start : start + length])).logits
        close(logits[:, start : start + length], expected, 1e-4, f"document of {length}")
        start += length
    assert np.isfinite(logits).all()


def test_bfloat16_follows_float32(tmp_path):
    theirs = reference("qwen3", CASES["qwen3"][1])
    theirs.save_pretrained(tmp_path / "model")
    model, params = jp.load_pretrained(tmp_path / "model", jnp.bfloat16)
    tokens = np.random.default_rng(3).integers(0, SMALL["vocab_size"], (2, 16))
    logits = compiled(lambda p: model.apply(p, {"tokens": jnp.asarray(tokens)}), params)
    assert logits.dtype == jnp.float32
    with torch.no_grad():
        expected = theirs(torch.tensor(tokens)).logits
    error = np.linalg.norm(logits - expected.numpy()) / np.linalg.norm(expected.numpy())
    assert error < 0.03


def test_a_real_checkpoint(shared_data):
    """stories260K on real text: logits of every position."""
    folder = shared_data / "checkpoints" / "stories260K"
    text = (folder / "expected_greedy.txt").read_text()
    tokens = [1, *jp.hf.load_tokenizer(folder)(text, add_special_tokens=False).input_ids]
    assert len(tokens) > 100
    theirs = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    model, params = jp.load_pretrained(folder, jnp.float32)
    logits = compiled(lambda p: model.apply(p, {"tokens": jnp.asarray([tokens])}), params)
    with torch.no_grad():
        close(logits, theirs(torch.tensor([tokens])).logits, 1e-4, "logits")


ROPES = {
    "default": {"rope_type": "default", "rope_theta": 5000.0},
    "linear": LINEAR,
    "dynamic": DYNAMIC,
    "llama3": LLAMA3,
    "llama3, its context not named": {k: v for k, v in LLAMA3.items() if k != "original_max_position_embeddings"},
    "llama 3.2": {**LLAMA3, "rope_theta": 500000.0, "factor": 32.0, "original_max_position_embeddings": 8192},
    "yarn": YARN,
    "yarn, its own numbers": {**YARN, "beta_fast": 16.0, "beta_slow": 2.0, "attention_factor": 1.3},
    "yarn, mscale": {**YARN, "factor": 40.0, "mscale": 0.7, "mscale_all_dim": 0.9},
    "yarn, not truncated": {**YARN, "truncate": False},
    "yarn, of Qwen": {**YARN, "rope_theta": 1e6, "original_max_position_embeddings": 32768},
}


@pytest.mark.parametrize("name", ROPES)
def test_rotary_frequencies_equal_transformers(name):
    rope = ROPES[name]
    changes = {**SMALL, "head_dim": 64, "max_position_embeddings": 131072, "rope_parameters": rope}
    config = transformers.AutoConfig.for_model("llama", **changes)
    their_model = transformers.models.llama.modeling_llama.LlamaRotaryEmbedding(config)
    ours = DecoderConfig.from_hf(config.to_dict())
    args = (ours.head_dim, ours.rope_theta, dict(ours.rope_scaling), ours.max_position_embeddings)
    frequencies, factor = rotary.frequencies(*args)
    np.testing.assert_allclose(frequencies, their_model.inv_freq.numpy(), rtol=1e-6)
    assert factor == pytest.approx(their_model.attention_scaling, rel=1e-6)


@pytest.mark.parametrize("name", ROPES)
def test_older_spellings_of_the_configuration(name):
    """rope_theta and rope_scaling at the top, with `type` for `rope_type`, as transformers 4 wrote them."""
    rope = dict(ROPES[name])
    new = {**SMALL, "model_type": "llama", "rope_parameters": rope}
    old = {**SMALL, "model_type": "llama", "rope_theta": rope["rope_theta"]}
    rest = {("type" if key == "rope_type" else key): value for key, value in rope.items() if key != "rope_theta"}
    old["rope_scaling"] = None if name == "default" else rest
    found = []
    for config in (new, old):
        ours = DecoderConfig.from_hf(config)
        args = (ours.head_dim, ours.rope_theta, dict(ours.rope_scaling), ours.max_position_embeddings)
        found.append(rotary.frequencies(*args))
    for frequencies, factor in found[1:]:
        np.testing.assert_array_equal(frequencies, found[0][0])
        assert factor == found[0][1]


@pytest.mark.parametrize("kind", rotary.EXTENSIONS)
@pytest.mark.parametrize(
    "spelt", [{"rope_parameters": {"rope_type": "default", "rope_theta": 5000.0}}, {"rope_theta": 5e3}]
)
def test_a_model_extended_by_a_flag_has_the_rotary_tables_that_transformers_reads_in_its_configuration(kind, spelt):
    raw = {**SMALL, "model_type": "llama", "head_dim": 16, **spelt}
    new = models.for_longer(raw, f"{kind}=2.5")
    config = transformers.AutoConfig.for_model(**new)
    positions = np.tile(np.arange(150, dtype=np.int32), (2, 1))
    theirs = transformers.models.llama.modeling_llama.LlamaRotaryEmbedding(config)
    cos, sin = theirs(torch.zeros(()), torch.tensor(positions))
    ours = DecoderConfig.from_hf(new)
    assert ours.max_position_embeddings == 160
    _, ctx = decoder.decoder(ours).stack.embed(
        {"embed_tokens": {"embedding": np.zeros((61, 32))}}, {"tokens": positions}, None
    )
    close(ctx.rows["rotary"]["cos"][:, :, 0], cos[..., :8], 1e-4, "cos")
    close(ctx.rows["rotary"]["sin"][:, :, 0], sin[..., :8], 1e-4, "sin")
    with pytest.raises(InputError, match=f"scales its rotary positions already \\(rope_type {kind}\\)"):
        models.for_longer(new, "yarn=2")


@pytest.mark.parametrize("text", ["yarn", "yarn=", "yarn=1", "yarn=nan", "yarn=inf", "llama3=2", "=2", "yarn=4=2"])
def test_a_scaling_that_makes_no_sense_is_one_line(text):
    with pytest.raises(InputError, match="--rope-scaling .*should be linear.dynamic.yarn=FACTOR"):
        rotary.parse(text)


def test_dynamic_scaling_is_that_of_each_text():
    """Packed, padded and alone, a text has the same positions."""
    positions = jnp.array([[0, 1, 2, 0, 1, 0, 0], [0, 1, 2, 3, 4, 5, 6]], jnp.int32)
    segments = jnp.array([[1, 1, 1, 2, 2, 0, 0], [1, 1, 1, 1, 1, 1, 1]], jnp.int32)
    assert rotary.lengths(positions, segments).tolist() == [[3, 3, 3, 2, 2, 1, 1], [7] * 7]
    assert rotary.lengths(positions, None).tolist() == [[3] * 7, [7] * 7]
