"""DiReFT: its edit against torch, the stream against its equations, decoding; mistakes."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

import jaxpeft as jp
from jaxpeft import tree
from jaxpeft.generate import generate
from jaxpeft.methods import direft
from tests import beside, by_hand, tiny
from tests.methods import loreft_test
from tests.methods.loreft_test import NEW, PROMPTS, ROWS, by_loops, hidden, laid_out, leaves, orthonormal


@pytest.mark.parametrize("orthogonal", [False, True])
def test_an_edit_equals_torchs_and_so_do_its_gradients(orthogonal):
    own = leaves()
    h, toward = np.random.default_rng(1).normal(size=(2, 5, 12)).astype(np.float32)
    theirs = {name: torch.tensor(leaf, dtype=torch.float64, requires_grad=True) for name, leaf in own.items()}
    x = torch.tensor(h, dtype=torch.float64, requires_grad=True)
    r = theirs["rotate"]
    if orthogonal:
        q, upper = torch.linalg.qr(r)
        r = q * torch.sign(torch.diagonal(upper)).detach()
    out = x + torch.matmul(x @ theirs["source"] + theirs["bias"], r.T)
    (out * torch.tensor(toward)).sum().backward()

    change = functools.partial(direft.change, orthogonal=orthogonal)
    edited = lambda own, h: h + change(own, h)
    np.testing.assert_allclose(edited(own, h), out.detach().numpy(), rtol=1e-4, atol=1e-5)
    of_own, of_h = jax.grad(lambda own, h: jnp.sum(edited(own, h) * toward), (0, 1))(own, h)
    np.testing.assert_allclose(of_h, x.grad.numpy(), rtol=1e-4, atol=1e-4)
    for name, gradient in of_own.items():
        np.testing.assert_allclose(gradient, theirs[name].grad.numpy(), rtol=1e-4, atol=1e-4, err_msg=name)


@pytest.mark.parametrize(("orthogonal", "share"), [(False, True), (True, False)])
def test_the_stream_equals_its_equations(orthogonal, share):
    """Packed and padded rows through all layers, each document alone in numpy."""
    model, trainable, frozen = beside.start(jp.direft(3, "f2+l3", share, orthogonal))
    flat = {**frozen, **beside.moved(trainable)}
    batch = laid_out(ROWS, 20)
    found = hidden((model, tree.unflatten(flat)), batch)
    edits = by_loops(batch["segment_ids"], batch["loss_weights"], 2, 3)
    scopes = ("", "") if share else ("first/", "last/")
    for b, row in enumerate(batch["segment_ids"]):
        for number in set(row) - {0}:
            own = np.flatnonzero(row == number)
            x = np.asarray(flat["embed_tokens/embedding"])[batch["tokens"][b, own]]
            for i in range(3):
                w = by_hand.layer_of(flat, i)
                x = by_hand.llama_layer(w, x, np.arange(len(own)), np.tri(len(own), dtype=bool))
                for scope, at in zip(scopes, edits[:, b, own], strict=True):
                    r, source, bias = (w[f"direft/{scope}{name}"] for name in ("rotate", "source", "bias"))
                    r = orthonormal(r) if orthogonal else r
                    x = np.where(at[:, None], x + (x @ source + bias) @ r.T, x)
            np.testing.assert_allclose(found[b, own], x, rtol=2e-3, atol=2e-3)


def test_decoding_edits_what_training_does():
    model, trainable, frozen = beside.start(jp.direft(4, "f2+l3"))
    params = tree.combine(beside.moved(trainable), frozen)
    found = generate(model, params, PROMPTS, NEW, eos=())
    assert found == [loreft_test.as_trained(model, params, prompt, NEW) for prompt in PROMPTS]
    assert found != generate(*tiny.model(), PROMPTS, NEW, eos=())


def test_parameter_count_and_starts():
    _, trainable, _ = beside.start(jp.direft())
    assert {path: leaf.shape for path, leaf in trainable.items()} == {
        "layers/direft/rotate": (3, 32, 4),
        "layers/direft/source": (3, 32, 4),
        "layers/direft/bias": (3, 4),
    }
    for leaf in trainable.values():
        assert 0.8 / np.sqrt(32) < np.abs(leaf).max() <= 1 / np.sqrt(32)
    _, rotated, _ = beside.start(jp.direft(orthogonal=True))
    r = rotated["layers/direft/rotate"]
    np.testing.assert_allclose(r.mT @ r, np.broadcast_to(np.eye(4), (3, 4, 4)), atol=1e-5)


def test_beside_loreft_and_lora_it_starts_at_the_base():
    method = jp.chain(jp.lora(2), jp.loreft(2, "f2+l2", init="base"), jp.direft(2, "all", init="base", layers=[0, 2]))
    model, trainable, frozen = beside.start(method)
    found = model.apply(tree.combine(trainable, frozen), tiny.batch())
    base, params = tiny.model()
    np.testing.assert_allclose(found, base.apply(params, tiny.batch()), rtol=1e-4, atol=1e-4)
    assert {path.split("/")[-2] for path in trainable} == {"lora", "loreft", "direft"}


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"rank": 0}, "direft: rank 0 must be at least 1"),
        ({"rank": 40}, "direft: rank 40 is above the model's width, 32"),
        ({"positions": "first"}, "direft: positions 'first' should be"),
        ({"positions": "f7", "share": False}, "direft: share=False needs both ends of a prompt"),
        ({"init": "small"}, "direft: init 'small' is not one of linear, base"),
        ({"layers": [1, 0]}, r"direft: layers \[1, 0\] should ascend and lie in 0 to 2"),
    ],
)
def test_mistakes_are_one_line(settings, message):
    with pytest.raises(jp.InputError, match=message):
        beside.start(jp.direft(**settings))
    with pytest.raises(jp.InputError, match="direft: has no merged form"):
        jp.direft().merge({})
