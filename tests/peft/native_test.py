"""Adapters that only this library reads: they come back where they were, in some of the layers, too."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxpeft as jp
from jaxpeft.peft.read import attach
from tests import tiny
from tests.modules import moved


@pytest.mark.parametrize("layers", [[0], [1], [0, 2], [2]], ids=str)
@pytest.mark.parametrize("make", [jp.loreft, jp.houlsby], ids=lambda make: make.__name__)
def test_some_layers_come_back_on_the_whole_stack(make, layers, tmp_path):
    """Whether or not the last layer of three is among them."""
    base, params = tiny.model()
    method = make(layers=layers)
    model, trainable, rest = jp.setup(method, base, params, jax.random.key(0))
    trained = jp.combine(moved(trainable), rest)
    jp.export_adapter(tmp_path / "adapter", trained, method, base)
    again, leaves, _ = attach(tmp_path / "adapter", base, params)
    expected = model.apply(trained, tiny.batch())
    np.testing.assert_array_equal(again.apply(leaves, tiny.batch()), expected)
    assert jnp.abs(expected - base.apply(params, tiny.batch())).max() > 1e-3
    own, added = jp.import_adapter(tmp_path / "adapter", base, params)
    _, trainable_again, _ = jp.setup(own, base, jp.combine(params, added), jax.random.key(1))
    assert trainable_again.keys() == trainable.keys()
