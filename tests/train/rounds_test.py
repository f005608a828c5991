"""Data that grow in rounds: what is chosen is what the rule says; a stopped run ends as if it had not been."""

import functools
import json

import jax
import numpy as np
import pytest

import jaxpeft as jp
from jaxpeft.data import Example, Rounds, make_batches
from jaxpeft.errors import InputError, RunError
from jaxpeft.train import loop
from jaxpeft.train.optimizer import make_direction
from jaxpeft.train.run import Run
from jaxpeft.train.uncertainty import make_uncertainty, uncertainties
from tests import tiny

KEY = jax.random.key(0)


def examples(count):
    ids = lambda i: np.array([50 + i, 1, 2, 3][: 2 + i % 3], np.int32)
    return [Example(ids(i), np.array([False, True, True, True][: 2 + i % 3]), i + 1) for i in range(count)]


def rounds(count=20, number=4, size=4, **layout):
    make = lambda some, seed: make_batches(some, 3, 8, seed, **layout)
    return Rounds(examples(count), make, number, size, seed=5)


def test_each_round_adds_the_most_uncertain_that_are_left():
    """U_full counts for a quarter, a half, ...; both are scaled over what is left; the last round has all."""
    own, rng = rounds(count=18), np.random.default_rng(0)
    own.base = rng.normal(size=18)
    for number in range(5):
        assert own.round == number and len(own.chosen) == min(4 * (number + 1), 18)
        numbers = {int(n) for _ in range(12) for n in np.unique(next(own)[0]["example_ids"]) if n}
        assert numbers <= {i + 1 for i in own.chosen}
        left, full = own.left(), rng.normal(size=len(own.left()))
        assert sorted([*left, *own.chosen]) == [*range(18)]
        before, base = set(own.chosen), own.base[left]
        own.add(full)
        if left:
            weight = min((number + 1) / 4, 1)
            part = lambda x: (x - x.min()) / (x.max() - x.min() or 1)
            scores = dict(zip(left, weight * part(full) + (1 - weight) * part(base), strict=True))
            best = sorted(left, key=lambda i: -scores[i])[:4]
            assert set(own.chosen) - before == set(best)


@pytest.mark.parametrize("layout", [{}, {"pack": True}])
def test_its_state_is_all_that_the_next_batch_follows_from(layout):
    own = rounds(**layout)
    own.base = np.arange(20.0)
    next(own)
    own.add(np.arange(16.0))
    next(own)
    state = json.loads(json.dumps(own.get_state()))
    other = rounds(**layout)
    other.set_state(state)
    assert (other.round, other.chosen, other.base.tolist()) == (1, own.chosen, own.base.tolist())
    for _ in range(4):
        (batch, lines), (same, of_same) = next(own), next(other)
        assert lines == of_same
        for name in batch:
            np.testing.assert_array_equal(batch[name], same[name])
        ids, tokens = batch["example_ids"], batch["tokens"]
        first = (batch["positions"] == 0) & (batch["segment_ids"] > 0)
        assert (tokens[first] == 49 + ids[first]).all()  # numbers are those of all examples
    with pytest.raises(InputError, match="other data or other batch settings"):
        rounds(size=5, **layout).set_state(state)


@pytest.mark.slow
def test_uncertainties_are_sums_over_a_rows_completion():
    """Of the loss, of the entropy, against NumPy; three passes with dropout are the mean of three of one."""
    method = jp.lora(rank=2, dropout=0.2)
    model, trainable, rest = jp.setup(method, *tiny.model(), KEY)
    trainable = {path: leaf + 0.2 for path, leaf in trainable.items()}
    state = jp.init_state(method, make_direction(), trainable, rest, KEY, model)
    batch = tiny.batch(5, 12)
    batch["loss_weights"][4] = 0
    logits = np.asarray(model.apply(state.params, batch), np.float64)
    likely = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    weights = batch["loss_weights"]
    at_target = np.take_along_axis(likely, batch["targets"][..., None], -1)[..., 0]
    expected = {"predictive": -(weights * at_target).sum(1)}
    expected["entropy"] = -(weights * (np.exp(likely) * likely).sum(-1)).sum(1)
    for measure, values in expected.items():
        found = uncertainties(jax.jit(make_uncertainty(model, measure, 0)), state, [(batch, None)], 5)
        np.testing.assert_allclose(found, values, rtol=1e-4, atol=1e-4)
    three = jax.jit(make_uncertainty(model, "predictive"))(state, batch)
    keys = jax.random.split(jax.random.fold_in(jax.random.fold_in(KEY, 0), 0x57A2), 3)
    loss = functools.partial(jp.completion_loss, model, state.params)
    alone = jax.jit(lambda row, key: loss(row, key)[0] * row["loss_weights"].sum())
    dropped = [alone({**batch, "loss_weights": weights * (np.arange(5) == 2)[:, None]}, key) for key in keys]
    assert np.std(dropped) > 0
    np.testing.assert_allclose(three[2], np.mean(dropped), rtol=1e-4)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"rounds": 0}, "--rounds 0: must be at least 1"),
        ({"rounds": 9, "steps": 4}, "--rounds 9: the run has 4 steps; give at most as many"),
        ({"round_size": 9}, "--round-size 9: has no effect without --rounds"),
        ({"uncertainty": "entropy"}, "--uncertainty entropy: has no effect without --rounds"),
        ({"rounds": 2, "uncertainty": "loss"}, "--uncertainty 'loss': must be one of predictive, entropy"),
        ({"rounds": 2, "task": "classify", "data": "rows.jsonl"}, "--rounds 2: has no effect with --task classify"),
    ],
)
def test_what_cannot_be_is_refused_in_a_line(fields, message):
    with pytest.raises(InputError, match=message):
        Run(**fields).check()


def test_more_examples_than_there_are_is_refused():
    with pytest.raises(InputError, match="--round-size 20: must be from 1 to 19"):
        rounds(size=20)


@pytest.mark.slow
def test_a_stopped_run_ends_as_if_it_had_not_been(tmp_path, monkeypatch):
    """Stopped behind the checkpoint at the end of the second round of three, before the third has been chosen."""
    row = lambda i: json.dumps({"prompt": f"{i} and {i % 7} make", "completion": f" {i + i % 7}"})
    (data := tmp_path / "rows.jsonl").write_text("\n".join(map(row, range(24))))
    options = {"data": data, "steps": 6, "rounds": 3, "round_size": 7, "batch_size": 4, "checkpoint_every": 1}
    options |= {"method_options": {"dropout": 0.1}, "seq_len": 32, "eval_every": 0, "keep": 9}
    jp.run(out=tmp_path / "whole", **options)
    whole = loop.Loop._next_round

    def stops(self):
        if self.done == 4:
            self.checkpoints.wait()
            raise RunError("stopped", 1)
        whole(self)

    monkeypatch.setattr(loop.Loop, "_next_round", stops)
    with pytest.raises(RunError, match="stopped"):
        jp.run(out=tmp_path / "part", **options)
    monkeypatch.undo()
    jp.run(out=tmp_path / "part", resume=True, **options)
    name = "adapter/adapter_model.safetensors"
    assert (tmp_path / "part" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()
    rows = [(tmp_path / name / "metrics.jsonl").read_text() for name in ("whole", "part")]
    assert rows[0] == rows[1]
