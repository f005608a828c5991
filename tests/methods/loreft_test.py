"""LoReFT: its edit against torch, its positions against loops, rows packed, padded, cut and decoded alike; mistakes."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

import jaxpeft as jp
from jaxpeft import reft, tree
from jaxpeft.generate import generate
from jaxpeft.methods import loreft
from tests import beside, by_hand, residuals, tiny
from tests.methods.bottleneck_test import opt
from tests.methods.vqt_test import images, vit

PROMPTS = [[5], [7, 11, 13], list(range(20, 33)), [96, 0, 3, 4], list(range(9))]
NEW = 4


def leaves(d=12, r=3, seed=0):
    rng = np.random.default_rng(seed)
    shapes = {"rotate": (d, r), "source": (d, r), "bias": (r,)}
    return {name: rng.normal(size=shape).astype(np.float32) for name, shape in shapes.items()}


def orthonormal(x):
    """Of numpy's QR, its diagonal made positive."""
    q, upper = np.linalg.qr(x.astype(np.float64))
    return q * np.sign(np.diag(upper))


def by_equation(own, h):
    """h' of states h (n, d), in float64."""
    r = orthonormal(own["rotate"])
    return h + (h @ own["source"] + own["bias"] - h @ r) @ r.T


def ends_of(length, first, last):
    """The positions of a prompt's edits, as lists."""
    first, last = min(length // 2, first), min(length // 2, last)
    return list(range(first)), list(range(length - last, length))


def by_loops(segments, weights, first, last):
    """(B, S) bool twice: the edited positions, document by document."""
    found = np.zeros((2, *segments.shape), bool)
    for b, row in enumerate(segments):
        for number in set(row) - {0}:
            own = np.flatnonzero(row == number)
            counted = [i for i, t in enumerate(own) if weights is not None and weights[b, t] > 0]
            length = counted[0] + 1 if counted else len(own)
            for end, places in enumerate(ends_of(length, first, last)):
                found[end, b, own[places]] = True
    return found


def laid_out(rows, length, vocab=97, seed=0):
    """A batch of rows of (prompt, completion) lengths one after the other; a number alone is padding."""
    rng = np.random.default_rng(seed)
    batch = {name: np.zeros((len(rows), length), np.int32) for name in ("tokens", "positions", "segment_ids")}
    batch["loss_weights"] = np.zeros((len(rows), length), np.float32)
    for b, row in enumerate(rows):
        start, number = 0, 0
        for part in row:
            if isinstance(part, int):
                start += part
                continue
            number += 1
            prompt, completion = part
            here = (b, slice(start, start + prompt + completion))
            batch["tokens"][here] = rng.integers(0, vocab, prompt + completion)
            batch["positions"][here] = np.arange(prompt + completion)
            batch["segment_ids"][here] = number
            batch["loss_weights"][b, start + prompt - 1 : start + prompt + completion - 1] = 1
            start += prompt + completion
    return batch


ROWS = [[(1, 3), (2, 2), (9, 3)], [(20, 0)], [3, (5, 4), (4, 2)], [(15, 5)]]


def test_an_edit_equals_torchs_and_so_do_its_gradients():
    own = leaves()
    h = np.random.default_rng(1).normal(size=(5, 12)).astype(np.float32)
    toward = np.random.default_rng(2).normal(size=(5, 12)).astype(np.float32)
    theirs = {name: torch.tensor(leaf, dtype=torch.float64, requires_grad=True) for name, leaf in own.items()}
    x = torch.tensor(h, dtype=torch.float64, requires_grad=True)
    q, upper = torch.linalg.qr(theirs["rotate"])
    r = q * torch.sign(torch.diagonal(upper)).detach()
    out = x + ((x @ theirs["source"] + theirs["bias"]) - x @ r) @ r.T
    (out * torch.tensor(toward)).sum().backward()

    edited = lambda own, h: h + loreft.change(own, h)
    np.testing.assert_allclose(edited(own, h), out.detach().numpy(), rtol=1e-4, atol=1e-5)
    of_own, of_h = jax.grad(lambda own, h: jnp.sum(edited(own, h) * toward), (0, 1))(own, h)
    np.testing.assert_allclose(of_h, x.grad.numpy(), rtol=1e-4, atol=1e-4)
    for name, gradient in of_own.items():
        np.testing.assert_allclose(gradient, theirs[name].grad.numpy(), rtol=1e-4, atol=1e-4, err_msg=name)


def test_an_edit_equals_that_of_householder_reflections():
    """Any orthonormal matrix is its own X: what torch's parametrisation makes, from which pyreft computes."""
    torch.manual_seed(0)
    layer = torch.nn.utils.parametrizations.orthogonal(torch.nn.Linear(3, 12, bias=False))
    with torch.no_grad():
        layer.parametrizations.weight.original.add_(torch.randn(12, 3).tril(-1))
    r = layer.weight.detach()
    own = {**leaves(), "rotate": r.numpy()}
    h = torch.randn(6, 12)
    source = h @ torch.tensor(own["source"]) + torch.tensor(own["bias"])
    expected = h + torch.matmul(source - torch.matmul(h, r), r.T)
    np.testing.assert_allclose(h.numpy() + loreft.change(own, h.numpy()), expected.numpy(), rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(reft.orthonormal(own["rotate"]), r.numpy(), atol=1e-5)


def test_within_the_subspace_the_source_is_what_remains():
    own, h = leaves(), np.random.default_rng(1).normal(size=(7, 12)).astype(np.float32)
    r = orthonormal(own["rotate"])
    after = h + np.asarray(loreft.change(own, h))
    np.testing.assert_allclose(after @ r, h @ own["source"] + own["bias"], rtol=1e-4, atol=1e-5)
    beyond = np.eye(12) - r @ r.T
    np.testing.assert_allclose(after @ beyond, h @ beyond, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("weighted", [True, False])
@pytest.mark.parametrize(("first", "last"), [(7, 7), (2, 3), (4, 0), (0, 1)])
def test_positions_are_those_of_each_documents_prompt(first, last, weighted):
    batch = laid_out(ROWS, 20)
    weights = batch["loss_weights"] if weighted else None
    if not weighted:
        del batch["loss_weights"]
    found = reft.edits(jnp.zeros((4, 20, 2)), batch, first, last)
    assert all(end.places is None for end in found)
    np.testing.assert_array_equal([end.here for end in found], by_loops(batch["segment_ids"], weights, first, last))


@pytest.mark.parametrize(("first", "last"), [(7, 7), (0, 3), (30, 2)])
def test_rows_of_one_document_gather_the_same_positions(first, last):
    batch = laid_out([[(1, 3)], [(20, 0)], [(5, 4)], [(15, 5)]], 20)
    expected = by_loops(np.ones((4, 20), np.int32), batch["loss_weights"], first, last)
    del batch["segment_ids"]
    ends = reft.edits(jnp.zeros((4, 20, 2)), batch, first, last)
    for end, places in zip((*ends, reft.joined(*ends)), (*expected, expected.any(0)), strict=True):
        found = np.zeros((4, 20), bool)
        for b in range(4):
            chosen = np.asarray(end.places)[b, np.asarray(end.here)[b]]
            assert len(set(chosen)) == len(chosen)
            found[b, chosen] = True
        np.testing.assert_array_equal(found, places)


def hidden(made, batch):
    model, params = made
    return np.asarray(jax.jit(model.hidden)(params, batch))


@pytest.fixture(scope="module")
def adapted():
    """(model, nested parameters) with edits that are far from nothing."""
    model, trainable, frozen = beside.start(jp.loreft(4, "f2+l3"))
    return model, tree.combine(beside.moved(trainable), frozen)


@pytest.mark.parametrize("share", [True, False])
def test_the_stream_equals_its_equations(share):
    """Packed and padded rows through all layers, each document alone in numpy."""
    model, trainable, frozen = beside.start(jp.loreft(4, "f2+l3", share=share))
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
                    edit = {name: w[f"loreft/{scope}{name}"] for name in ("rotate", "source", "bias")}
                    x = np.where(at[:, None], by_equation(edit, x), x)
            np.testing.assert_allclose(found[b, own], x, rtol=2e-3, atol=2e-3)


def test_gathered_states_are_edited_and_learn_alike(adapted):
    """A row that is one document, said by its segment ids and without them: outputs and gradients."""
    model, params = adapted
    batch = laid_out([[(1, 3)], [(20, 0)], [(5, 15)], [(15, 5)]], 20)
    batch["segment_ids"][:] = 1
    method = jp.loreft(4, "f2+l3")
    trained, rest = tree.split(params, method.trainable)

    @jax.jit
    def of(trained, batch):
        return jnp.sum(jnp.sin(model.hidden(tree.combine(trained, rest), batch)))

    dense = jax.value_and_grad(of)(trained, batch)
    gathered = jax.value_and_grad(of)(trained, {name: x for name, x in batch.items() if name != "segment_ids"})
    np.testing.assert_allclose(gathered[0], dense[0], rtol=1e-4)
    for path, gradient in gathered[1].items():
        scale = np.abs(dense[1][path]).max()
        np.testing.assert_allclose(gradient, dense[1][path], rtol=1e-3, atol=1e-4 * scale, err_msg=path)


def test_a_completion_that_is_cut_or_packed_sees_the_same_prompt(adapted):
    whole = laid_out([[(6, 10)]], 20)
    kept = {name: x[:, :9] for name, x in whole.items()}  # three tokens of the completion
    alone = hidden(adapted, whole)[0, :9]
    np.testing.assert_allclose(hidden(adapted, kept)[0], alone, rtol=1e-4, atol=1e-4)
    behind = laid_out([[(7, 4), (6, 3)]], 20)
    behind["tokens"][0, 11:20] = whole["tokens"][0, :9]
    np.testing.assert_allclose(hidden(adapted, behind)[0, 11:20], alone, rtol=1e-3, atol=1e-3)


def as_trained(model, params, prompt, count):
    """Greedy decoding in which every token is computed again, from what training would be given of the text."""
    ids, length = list(prompt), 20
    for _ in range(count):
        batch = {"tokens": np.zeros((1, length), np.int32), "loss_weights": np.zeros((1, length), np.float32)}
        batch["tokens"][0, : len(ids)] = ids
        batch["loss_weights"][0, len(prompt) - 1 :] = 1
        batch["segment_ids"] = (np.arange(length) < len(ids))[None].astype(np.int32)
        logits = _apply(model, params, batch)
        ids.append(int(logits[0, len(ids) - 1].argmax()))
    return ids[len(prompt) :]


_apply = jax.jit(lambda model, params, batch: model.apply(params, batch), static_argnums=0)


@pytest.mark.parametrize("positions", ["f2+l3", "all"])
def test_decoding_edits_what_training_does(positions):
    """Prompts of several lengths, padded on the left in one batch; what is generated is edited only by "all"."""
    base, params = tiny.model()
    model, trainable, frozen = beside.start(jp.loreft(4, positions))
    params = tree.combine(beside.moved(trainable), frozen)
    found = generate(model, params, PROMPTS, NEW, eos=())
    assert found == [as_trained(model, params, prompt, NEW) for prompt in PROMPTS]
    assert found != generate(base, params, PROMPTS, NEW, eos=())


def test_a_prefix_in_front_moves_no_edit():
    """Of both orders of the chain, and decoded: positions are those of tokens, whatever lies before them."""
    found = []
    for method in (jp.chain(jp.prefix(3), jp.loreft(4, "f2+l3")), jp.chain(jp.loreft(4, "f2+l3"), jp.prefix(3))):
        model, trainable, frozen = beside.start(method)
        params = tree.combine(beside.moved(trainable), frozen)
        new = generate(model, params, PROMPTS[1:3], NEW, eos=())
        assert new == [as_trained(model, params, prompt, NEW) for prompt in PROMPTS[1:3]]
        found.append(new)


def test_parameter_count_and_starts():
    _, trainable, _ = beside.start(jp.loreft())
    assert {path: leaf.shape for path, leaf in trainable.items()} == {
        "layers/loreft/rotate": (3, 32, 8),
        "layers/loreft/source": (3, 32, 8),
        "layers/loreft/bias": (3, 8),
    }
    assert tree.size(trainable) == 3 * (2 * 32 * 8 + 8)
    r, w = trainable["layers/loreft/rotate"], trainable["layers/loreft/source"]
    np.testing.assert_allclose(r.mT @ r, np.broadcast_to(np.eye(8), (3, 8, 8)), atol=1e-5)
    assert 0.9 / np.sqrt(32) < np.abs(w).max() <= 1 / np.sqrt(32)
    _, apart, _ = beside.start(jp.loreft(2, share=False, layers=[1]))
    assert tree.size(apart) == 2 * (2 * 32 * 2 + 2)
    assert np.any(apart["layers_1_2/loreft/first/source"] != apart["layers_1_2/loreft/last/source"])


@pytest.mark.parametrize(
    "method",
    [
        jp.loreft(2, "all", init="base", layers=[0, 2]),
        jp.chain(jp.quantize("int8"), jp.loreft(4, "f2+l3", share=False, init="base")),
    ],
)
def test_a_start_at_the_base_packed_or_not(method):
    """That of the same parameters without the edits' leaves."""
    model, trainable, frozen = beside.start(method)
    of = jax.jit(lambda params: model.apply(params, tiny.batch()))
    expected = of(tree.unflatten(frozen))
    np.testing.assert_allclose(of(tree.combine(trainable, frozen)), expected, rtol=1e-4, atol=1e-4)
    assert np.abs(of(tree.combine(beside.moved(trainable), frozen)) - expected).max() > 1e-2


def test_rows_of_one_document_keep_their_edited_states_alone():
    """(f + l) states per row and layer, whatever the row's length; all tokens' states where there may be several."""
    made = beside.start(jp.loreft(4, "f2+l3"))
    floor = jp.setup(jp.full("embeddings"), *tiny.model(), jax.random.key(0))

    def rows_of(rows, length=64):
        return {name: x for name, x in tiny.batch(rows, length).items() if name != "segment_ids"}

    extra = residuals.bytes_per_token(*made, rows_of) - residuals.bytes_per_token(*floor, rows_of)
    assert extra * 64 <= 3 * 5 * 32 * 4 + 5 * (4 + 4 + 1)
    assert loreft.ABOUT.promises.block_bytes(tiny.config(), 2) == 64


def test_the_stream_stays_in_its_dtype():
    """An edit makes no float32 of the stream's shape."""
    model, trainable, frozen = beside.start(jp.loreft(4, "f2+l3"), jnp.bfloat16)
    params, batch = tree.combine(trainable, frozen), tiny.batch(3, 16)

    def wide(model):
        jaxpr = jax.make_jaxpr(lambda params: model.hidden(params, batch))(params).jaxpr
        made = [variable.aval for equation in residuals.equations(jaxpr) for variable in equation.outvars]
        return sum(aval.shape == (3, 16, 32) and aval.dtype == jnp.float32 for aval in made)

    assert wide(model) == wide(tiny.model(jnp.bfloat16)[0])


@pytest.mark.parametrize(
    ("made", "batch"),
    [(opt, {"tokens": np.arange(10, dtype=np.int32).reshape(2, 5)}), (vit, images(2))],
)
def test_other_families_start_at_the_base_and_feel_their_edits(made, batch):
    base, params = made()
    model, trainable, frozen = jp.setup(jp.loreft(2, "f2+l2", init="base"), base, params, jax.random.key(0))
    of = jax.jit(lambda trainable: model.apply(tree.combine(trainable, frozen), batch))
    expected = base.apply(params, batch)
    np.testing.assert_allclose(of(trainable), expected, rtol=1e-5, atol=1e-5)
    assert np.abs(of(beside.moved(trainable)) - expected).max() > 1e-3


def test_data_without_prompts_are_refused():
    plain = {**tiny.batch(), "loss_weights": np.ones((4, 16), np.float32)}
    made = (*tiny.model(), jax.random.key(0))
    with pytest.raises(
        jp.InputError, match=r"loreft: positions f7\+l7 are of prompts, and no text of the first batches"
    ):
        jp.setup(jp.loreft(), *made, lambda: [plain])
    jp.setup(jp.loreft(positions="all"), *made, lambda: [plain])
    jp.setup(jp.loreft(), *made, lambda: [plain, laid_out(ROWS, 20)])
    jp.setup(jp.loreft(), *made, lambda: [])


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"rank": 0}, "loreft: rank 0 must be at least 1"),
        ({"rank": 33}, "loreft: rank 33 is above the model's width, 32"),
        ({"positions": "f0+l7"}, r"loreft: positions 'f0\+l7' should be \"f7\+l7\", \"f7\", \"l7\" .* or \"all\""),
        ({"positions": "7"}, "loreft: positions '7' should be"),
        ({"positions": "l7", "share": False}, "loreft: share=False needs both ends of a prompt, .* positions is l7"),
        ({"positions": "all", "share": False}, "loreft: share=False needs both ends"),
        ({"init": "zero"}, "loreft: init 'zero' is not one of linear, base"),
        ({"layers": [3]}, r"loreft: layers \[3\] should ascend and lie in 0 to 2"),
        ({"layers": "0"}, "loreft: layers '0' should be a list of whole numbers"),
    ],
)
def test_mistakes_are_one_line(settings, message):
    with pytest.raises(jp.InputError, match=message):
        beside.start(jp.loreft(**settings))


def test_a_model_without_layers_and_merging_are_one_line():
    model = jp.Model(lambda key, params: params, tiny.model()[0].stack)
    with pytest.raises(jp.InputError, match="loreft: this model shows no layers"):
        jp.setup(jp.loreft(), model, {"kernel": np.ones((2, 2))}, jax.random.key(0))
    with pytest.raises(jp.InputError, match="loreft: has no merged form; its edits depend on a token's place"):
        jp.loreft().merge({})
