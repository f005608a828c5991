"""An exported adapter as transformers and peft serve it: log-probabilities of real text's tokens in bfloat16."""

import jax
import jax.numpy as jnp
import numpy as np
import peft
import pytest
import torch
import transformers

import jaxpeft as jp
from jaxpeft.data import load_examples
from jaxpeft.hf import load_tokenizer
from jaxpeft.peft import attach, export_adapter

ROWS = 8


@pytest.fixture(scope="module")
def checkpoint(shared_data):
    return shared_data / "checkpoints" / "stories260K"


@pytest.fixture(scope="module")
def rows(shared_data, checkpoint):
    """(rows, length) int32: test prompts of E2E NLG with their answers, cut to the shortest."""
    file = shared_data / "instruct" / "e2e_nlg.test.jsonl"
    examples, _ = load_examples(file, load_tokenizer(checkpoint), 256, too_long="drop")
    ids = [example.ids for example in examples[:ROWS]]
    return np.stack([row[: min(map(len, ids))] for row in ids]).astype(np.int32)


def log_probabilities(logits, rows):
    """(rows, length - 1) of each next token, calculated in float32 of what the model said."""
    of_all = jax.nn.log_softmax(jnp.asarray(logits, jnp.float32)[:, :-1])
    return np.asarray(jnp.take_along_axis(of_all, rows[:, 1:, None], -1)[..., 0])


def theirs(checkpoint, adapter, rows, dtype):
    base = transformers.AutoModelForCausalLM.from_pretrained(checkpoint, dtype=dtype)
    model = peft.PeftModel.from_pretrained(base, adapter, autocast_adapter_dtype=False).eval()
    with torch.no_grad():
        logits = model(torch.tensor(rows).long()).logits
    return log_probabilities(logits.float().numpy(), rows)


def ours(checkpoint, adapter, rows, dtype):
    model, params, _ = attach(adapter, *jp.load_pretrained(checkpoint, dtype))
    return log_probabilities(jax.jit(model.apply)(params, {"tokens": rows}), rows)


@pytest.mark.parametrize("name", ["lora", pytest.param("dora", marks=pytest.mark.slow), "ia3"])
def test_what_is_served_is_within_twice_the_noise_of_bfloat16(name, checkpoint, rows, tmp_path):
    """The noise is what bfloat16 itself does to transformers and peft's log-probabilities, mean over the tokens; on a
    CPU another batch shape changes no bit of theirs. In float32 both are equal.
    """
    base, params = jp.load_pretrained(checkpoint, jnp.float32)
    method = getattr(jp, name)()
    _, trainable, rest = jp.setup(method, base, params, jax.random.key(0))
    rng = np.random.default_rng(0)
    trained = {path: leaf + 0.02 * rng.standard_normal(leaf.shape, np.float32) for path, leaf in trainable.items()}
    adapter = export_adapter(tmp_path / "adapter", jp.combine(trained, rest), method, base)

    exact = theirs(checkpoint, adapter, rows, torch.float32)
    plain = log_probabilities(jax.jit(base.apply)(params, {"tokens": rows}), rows)
    assert np.abs(exact - plain).mean() > 0.05  # the adapter does something
    np.testing.assert_allclose(ours(checkpoint, adapter, rows, jnp.float32), exact, rtol=1e-3, atol=1e-3)
    served, mine = theirs(checkpoint, adapter, rows, torch.bfloat16), ours(checkpoint, adapter, rows, jnp.bfloat16)
    noise = np.abs(served - exact).mean()
    assert np.abs(mine - served).mean() <= 2 * noise
