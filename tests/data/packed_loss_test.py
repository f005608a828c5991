"""Packed, bucketed and padded batches of the same examples give the same loss."""

import json
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest
from transformers import PreTrainedTokenizerBase

from jaxpeft.data import Example, eval_batches, load_examples, power_of_two_buckets
from jaxpeft.models import family
from jaxpeft.train.loss import completion_loss

SEQ_LEN = 128


def test_losses_agree(shared_data: Path, llama_tokenizer: PreTrainedTokenizerBase) -> None:
    config = json.loads((shared_data / "checkpoints" / "stories260K" / "config.json").read_text())
    module = family(config)
    model = module.decoder(module.DecoderConfig.from_hf(config))
    params = model.init(jax.random.key(0), {})
    loss_fn = jax.jit(lambda batch: completion_loss(model, params, batch))

    def mean_loss(examples: list[Example], **mode: object) -> float:
        loss = weight = jnp.zeros(())
        for batch, _ in eval_batches(examples, 4, SEQ_LEN, **mode):
            value, aux = loss_fn(batch)
            loss, weight = loss + value * aux["weight"], weight + aux["weight"]
        return float(loss / weight)

    file = shared_data / "instruct" / "instruction_induction.test.jsonl"
    examples = load_examples(file, llama_tokenizer, SEQ_LEN)[0][::40]
    assert len({len(example.ids) for example in examples}) > 5
    plain = mean_loss(examples)
    assert mean_loss(examples, pack=True) == pytest.approx(plain, rel=1e-5)
    buckets = power_of_two_buckets(SEQ_LEN)
    assert mean_loss(examples, buckets=buckets) == pytest.approx(plain, rel=1e-5)
