"""Prefixes that PEFT has trained, and prefixes for PEFT."""

import jax
import numpy as np
import pytest

import jaxpeft as jp
from jaxpeft import tree
from jaxpeft.errors import InputError
from jaxpeft.peft import attach, export_adapter

peft = pytest.importorskip("peft")
torch = pytest.importorskip("torch")
from tests.peft import reference  # noqa: E402


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return reference.write_base(tmp_path_factory.mktemp("base") / "llama")


@pytest.mark.parametrize("projected", [False, True])
def test_theirs_here(projected, base, tmp_path):
    """A plain prefix, and one that PEFT's network has made."""
    torch.manual_seed(0)
    settings = peft.PrefixTuningConfig(
        task_type="CAUSAL_LM", num_virtual_tokens=5, prefix_projection=projected, encoder_hidden_size=8
    )
    theirs = peft.get_peft_model(reference.torch_base(base), settings).eval()
    theirs.save_pretrained(tmp_path / "adapter")
    model, params, method = attach(tmp_path / "adapter", *reference.load(base))
    assert method.specs[0].config["length"] == 5
    found = reference.logits(model, params)
    reference.assert_close(found, reference.torch_logits(theirs))
    base_model, base_params = reference.load(base)
    assert np.abs(found - reference.logits(base_model, base_params)).max() > 0.01


@pytest.mark.parametrize("settings", [{"init": "random"}, {"width": 6}])
def test_ours_there(settings, base, tmp_path):
    """Keys and values, and what a network has made; both come back as what they compute."""
    method = jp.prefix(5, **settings)
    base_model, base_params = reference.load(base)
    model, trainable, frozen = jp.setup(method, base_model, base_params, jax.random.key(0))
    params = tree.combine(reference.randomise(trainable), frozen)
    export_adapter(tmp_path / "adapter", params, method, base_model.config, base)
    expected = reference.logits(model, params)
    reference.assert_close(reference.with_adapter(base, tmp_path / "adapter"), expected)
    again, leaves, same = attach(tmp_path / "adapter", base_model, base_params)
    assert same.specs == method.specs
    reference.assert_close(reference.logits(again, leaves), expected)


def test_a_prefix_for_other_heads_is_one_line(base, tmp_path):
    other = reference.write_base(tmp_path / "other", num_key_value_heads=4)
    theirs = peft.get_peft_model(
        reference.torch_base(other), peft.PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2)
    )
    theirs.save_pretrained(tmp_path / "adapter")
    message = "for another base: 128 numbers per token are not the keys and values of 2 layers of 2 heads of 8"
    with pytest.raises(InputError, match=message):
        attach(tmp_path / "adapter", *reference.load(base))
