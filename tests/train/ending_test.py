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


def begun(method):
    """(what `counts` reads of a job, the state before the first step)."""
    base, params = tiny.model()
    model, trainable, rest = jp.setup(method, base, params, jax.random.key(0))
    optimizer = make_direction(defaults(method.specs).direction)
    state = jp.init_state(method, optimizer, trainable, rest, jax.random.key(1), model)
    return types.SimpleNamespace(base=tree.flatten(params), adapters=None, method=method, model=model), state


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
    job, state = begun(method)
    whole = tree.size(job.base)
    sites = [leaf.shape for path, leaf in job.base.items() if path.endswith("_proj/kernel")]
    added = factors * sum(layers * RANK * (n + m) for layers, n, m in sites)
    assert ending.counts(job, state) == {
        "trainable_parameters": kernels * whole + added,
        "frozen_parameters": (not kernels) * whole,
    }


@pytest.mark.parametrize(
    ("method", "part"),
    [
        (jp.pockengine({"layers/1/mlp/up_proj": 0.5}), "/rows"),
        (jp.spiel(0.1), "/values"),
        (jp.snella(2, targets=["up_proj"]), ("/p", "/q", "/alpha", "/gamma", "/beta")),
        (jp.pst(rank=2, targets=["up_proj"]), ("/u", "/v", "/a", "/b", "/rows", "/columns")),
    ],
    ids=lambda x: getattr(x, "name", None),
)
def test_what_a_method_chooses_by_is_no_number_of_the_model(method, part):
    """Sums, squares and sensitivities are a book; channels that train in place of a kernel's are the model's."""
    job, state = begun(method)
    trained = {path: leaf for path, leaf in state.trainable.items() if path.endswith(part)}
    assert trained and state.trainable.keys() == trained.keys()
    assert ending.counts(job, state)["trainable_parameters"] == tree.size(trained)
