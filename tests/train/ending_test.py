"""What a report counts: each number of the model and of its adapters once."""

import types

import jax
import pytest

import jaxpeft as jp
from jaxpeft import tree
from jaxpeft.train import ending
from jaxpeft.train.optimizer import defaults, make_direction
from tests import tiny

RANK = 2


@pytest.mark.parametrize(
    ("method", "kernels", "factors"),
    [
        (jp.lora(RANK), False, True),
        (jp.chain(jp.lora(RANK), jp.ist()), False, True),
        (jp.lisa(count=1), True, False),
        (jp.galore(RANK, which="all"), True, False),
        (jp.mezo(), True, False),
        (jp.sparse_mezo(), True, False),
    ],
    ids=lambda x: getattr(x, "name", None),
)
def test_what_changes_and_what_is_there(method, kernels, factors):
    """Neither masters, projections nor a sampler's book are numbers of the model."""
    base, params = tiny.model()
    model, trainable, rest = jp.setup(method, base, params, jax.random.key(0))
    optimizer = make_direction(defaults(method.specs).direction)
    state = jp.init_state(method, optimizer, trainable, rest, jax.random.key(1), model)
    flat = tree.flatten(params)
    whole = tree.size(flat)
    job = types.SimpleNamespace(base=flat, adapters=None, method=method, model=model)
    sites = [leaf.shape for path, leaf in flat.items() if path.endswith("_proj/kernel")]
    added = factors * sum(layers * RANK * (n + m) for layers, n, m in sites)
    assert ending.counts(job, state) == {
        "trainable_parameters": kernels * whole + added,
        "frozen_parameters": (not kernels) * whole,
    }
