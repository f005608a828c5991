"""BERT, RoBERTa, OPT and ViT against PyTorch transformers, float32: embedding, layers, every head, gradients, text."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file

import jaxpeft as jp
from jaxpeft.generate import generate
from jaxpeft.models.layers import ACTIVATIONS
from tests.models.families import (
    CASES,
    both,
    close,
    compiled,
    counted,
    inputs,
    our_output,
    reference,
    their_output,
    torch,
    transformers,
)


@pytest.mark.parametrize("case", ["bert, masked LM", "roberta, masked LM", "opt, causal LM", "vit"])
def test_embedding_and_each_layer_equal_transformers(case, tmp_path):
    theirs, model, params = both(case, tmp_path / "model")
    arguments, batch = inputs(case)
    with torch.no_grad():
        expected = theirs(**arguments, output_hidden_states=True).hidden_states

    def rungs(params):
        """The outputs of the embedding and of each layer, (layers + 1, B, S, d)."""
        x, ctx = model.stack.embed(params, batch, None)

        def layer(x, inputs):
            weights, index = inputs
            y, _ = model.stack.block(weights, x, ctx.at(index), None, "layers")
            return y, y

        _, outputs = jax.lax.scan(layer, x, (params["layers"], jnp.arange(model.config.num_hidden_layers)))
        return jnp.concatenate([x[None], outputs])

    outputs = compiled(rungs, params)
    assert len(outputs) == len(expected)
    if case.startswith("opt"):  # transformers gives the last layer's output after the final norm
        last = theirs.model.decoder.final_layer_norm(torch.tensor(np.array(outputs[-1])))
        outputs = [*outputs[:-1], last.detach()]
    for i, state in enumerate(expected):
        close(counted(outputs[i]), counted(state), 1e-4 if i else 1e-6, f"after layer {i}")


@pytest.mark.parametrize("case", CASES)
def test_outputs_and_gradients_equal_transformers(case, tmp_path):
    theirs, model, params = both(case, tmp_path / "model")
    arguments, batch = inputs(case)
    expected = counted(their_output(theirs, arguments))
    cotangent = np.random.default_rng(2).normal(size=expected.shape).astype(np.float32)
    (expected * torch.tensor(cotangent)).sum().backward()

    def total(params):
        output = our_output(model)(params, batch)
        return (counted(output) * cotangent).sum(), output

    (_, output), gradients = compiled(jax.value_and_grad(total, has_aux=True), params)
    assert output.dtype == jnp.float32
    close(counted(output), expected.detach(), 1e-4, "output")

    # Written as a checkpoint, the gradients get transformers' names and layout.
    jp.save_pretrained(tmp_path / "gradients", tmp_path / "model", gradients)
    found = load_file(tmp_path / "gradients" / "model.safetensors")
    for parameter in theirs.parameters():
        parameter.data = torch.full_like(parameter, torch.nan) if parameter.grad is None else parameter.grad
    theirs.save_pretrained(tmp_path / "wanted")
    wanted = load_file(tmp_path / "wanted" / "model.safetensors")
    wanted = {name: gradient for name, gradient in wanted.items() if not np.isnan(gradient).any()}  # all but a pooler's
    assert found.keys() == wanted.keys()
    largest = max(np.abs(gradient).max() for gradient in wanted.values())
    for name, gradient in wanted.items():
        if name.endswith(("key.bias", "k_proj.bias")):  # exactly zero: it moves all scores of a query alike
            assert np.abs(found[name]).max() < 1e-5 * largest and np.abs(gradient).max() < 1e-5 * largest
        else:
            close(found[name], gradient, 1e-3, f"gradient of {name}")


@pytest.mark.parametrize("case", ["bert, masked LM", "roberta", "opt, causal LM"])
def test_packed_rows_equal_separate_ones(case, tmp_path):
    """Two texts and padding in one row, by segment ids and positions, against transformers on each alone."""
    theirs, model, params = both(case, tmp_path / "model")
    tokens = np.random.default_rng(1).integers(2, 61, 20)
    batch = {
        "tokens": jnp.asarray([[*tokens, 0, 0, 0, 0]], jnp.int32),
        "positions": jnp.asarray([[*range(9), *range(11), *[0] * 4]], jnp.int32),
        "segment_ids": jnp.asarray([[1] * 9 + [2] * 11 + [0] * 4], jnp.int32),
    }
    output = compiled(lambda p: model.apply(p, batch), params)
    for first, end in ((0, 9), (9, 20)):
        with torch.no_grad():
            expected = their_output(theirs, {"input_ids": torch.tensor(tokens[None, first:end])})
        close(output[:, first:end], expected, 1e-4, f"tokens {first} to {end}")
    assert np.isfinite(output).all()


def test_token_types_are_zero_where_the_batch_has_none(tmp_path):
    _, model, params = both("bert", tmp_path / "model")
    _, batch = inputs("bert")
    zero = {**batch, "token_types": jnp.zeros_like(batch["tokens"])}
    without = {name: x for name, x in batch.items() if name != "token_types"}
    found, same, other = (compiled(model.apply, params, b) for b in (without, zero, batch))
    np.testing.assert_array_equal(found, same)
    assert np.abs(found - other).max() > 0.1


@pytest.mark.parametrize("case", ["bert, masked LM", "opt, causal LM", "vit, classifier"])
def test_bfloat16_follows_float32(case, tmp_path):
    theirs = reference(case)
    theirs.save_pretrained(tmp_path / "model")
    model, params = jp.load_pretrained(tmp_path / "model", jnp.bfloat16)
    arguments, batch = inputs(case)
    output = compiled(our_output(model), params, batch)
    assert output.dtype == jnp.float32
    with torch.no_grad():
        expected = counted(their_output(theirs, arguments)).numpy()
    error = np.linalg.norm(counted(output) - expected) / np.linalg.norm(expected)
    assert error < 0.03


def test_opt_continues_a_text_as_transformers_does(tmp_path):
    """Greedily, with the cache, prompts of several lengths in one batch."""
    theirs, model, params = both("opt, causal LM", tmp_path / "model")
    prompts = [[5], [7, 11, 13], list(range(20, 45))]
    expected = []
    for prompt in prompts:
        ids = torch.tensor([prompt])
        found = theirs.generate(
            ids, attention_mask=torch.ones_like(ids), max_new_tokens=8, do_sample=False, eos_token_id=[]
        )
        expected.append(found[0, len(prompt) :].tolist())
    assert generate(model, params, prompts, 8, eos=()) == expected
    assert len({tuple(ids) for ids in expected}) > 1


@pytest.mark.parametrize("name", ACTIVATIONS)
def test_activations_equal_transformers(name):
    x = np.linspace(-12, 12, 2001, dtype=np.float32)
    expected = transformers.activations.ACT2FN[name](torch.tensor(x)).numpy()
    np.testing.assert_allclose(jax.jit(ACTIVATIONS[name])(x), expected, rtol=1e-4, atol=1e-6)
