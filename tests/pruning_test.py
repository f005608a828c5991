"""Bases with heads and neurons cut out, and adapters that come back from them."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxpeft as jp
from jaxpeft import cli, hf, pruning, tree
from jaxpeft.memory import planner
from jaxpeft.models import decoder, geometries
from jaxpeft.pruning import Kept
from tests import tiny

KINDS = {"llama": {}, "qwen2": {"model_type": "qwen2"}, "qwen3": {"model_type": "qwen3", "head_dim": 16}}
WIDE = {"hidden_size": 64, "num_attention_heads": 8, "num_key_value_heads": 4}
KEPT = Kept(
    np.array([[0, 3], [1, 2], [0, 1]], np.int32),
    np.sort(np.random.default_rng(0).permuted(np.tile(np.arange(56), (3, 1)), axis=1)[:, :24], axis=1).astype(np.int32),
)


def start(kind):
    """(model, params) whose biases and norms are no ones and zeros."""
    model, params = tiny.model(**WIDE, **KINDS[kind])
    keys = iter(jax.random.split(jax.random.key(1), 99))
    return model, jax.tree.map(lambda x: x + 0.1 * jax.random.normal(next(keys), x.shape), params)


def cut(model, params):
    """(model, params) of what is left."""
    config = {**tiny.CONFIG, **WIDE, "model_type": model.config.model_type}
    config |= pruning.smaller(model.config, *(at.shape[1] for at in KEPT))
    return decoder.from_hf(config), pruning.pruned(params, model.config, KEPT)


@pytest.mark.parametrize("kind", [pytest.param("qwen2", marks=pytest.mark.slow), "qwen3"])
def test_an_adapter_of_the_pruned_base_is_one_of_the_whole_base(kind):
    """On the whole base with zeros where something was cut: the pruned one's outputs; its change is all it changes."""
    whole, params = start(kind)
    small, left = cut(whole, params)
    assert left["layers"]["self_attn"]["q_proj"]["kernel"].shape == (3, 64, 4 * whole.config.head_dim)
    method = jp.lora(4, targets="all-linear")
    adapted, trainable, rest = jp.setup(method, small, left, jax.random.key(2))
    trained = {path: jax.random.normal(jax.random.key(3), leaf.shape) for path, leaf in trainable.items()}
    wanted = adapted.apply(tree.combine(trained, rest), tiny.batch())

    leaves = pruning.recovered(trained, whole.config, KEPT)
    zeroed = pruning.masked(params, whole.config, KEPT)
    again, fresh, others = jp.setup(method, whole, zeroed, jax.random.key(2))
    assert {path: leaf.shape for path, leaf in leaves.items()} == {path: leaf.shape for path, leaf in fresh.items()}
    found = again.apply(tree.combine(leaves, others), tiny.batch())
    np.testing.assert_allclose(found, wanted, rtol=1e-4, atol=1e-4 * np.abs(wanted).max())
    assert sum(np.count_nonzero(leaf) for leaf in leaves.values()) == tree.size(trained)


@pytest.mark.slow
def test_taylor_is_the_slope_of_the_loss():
    """By differences, of the rows of o and down that read a head or a neuron, in float64's place of many digits."""
    model, params = start("llama")
    batches = [tiny.batch(2, 8, seed) for seed in (0, 1)]
    found = pruning.importance(model, params, "taylor", batches)
    flat = tree.flatten(params)

    def slope(path, layer, rows, batch):
        kernel = flat[path]
        loss = [
            jp.completion_loss(model, tree.unflatten({**flat, path: kernel.at[layer, rows].mul(1 + e)}), batch, None)[0]
            for e in (0.02, -0.02)
        ]
        return abs(float(loss[0] - loss[1]) / 0.04)

    o, down, d = "layers/self_attn/o_proj/kernel", "layers/mlp/down_proj/kernel", model.config.head_dim
    for layer, head in ((0, 1), (2, 3)):
        queries = [slice(h * d, h * d + d) for h in (2 * head, 2 * head + 1)]
        wanted = sum(np.mean([slope(o, layer, rows, batch) for batch in batches]) for rows in queries)
        assert found.heads[layer, head] == pytest.approx(wanted, rel=2e-2)
    wanted = np.mean([slope(down, 1, 5, batch) for batch in batches])
    assert found.neurons[1, 5] == pytest.approx(wanted, rel=2e-2, abs=1e-5)


def test_magnitude_is_the_norm_of_all_that_goes():
    """What `masked` makes zero when one alone is cut."""
    model, params = start("llama")
    found = pruning.importance(model, params)
    everything = Kept(*(np.tile(np.arange(n, dtype=np.int32), (3, 1)) for n in (4, 56)))

    def gone(kept):
        zeroed = tree.flatten(pruning.masked(params, model.config, kept))
        kernels = {path: leaf for path, leaf in tree.flatten(params).items() if "_proj/kernel" in path}
        return np.sqrt(sum(np.sum(np.square(leaf - zeroed[path]), (1, 2)) for path, leaf in kernels.items()))

    np.testing.assert_allclose(gone(everything), 0)
    others = everything._replace(heads=np.delete(everything.heads, 2, 1))
    np.testing.assert_allclose(found.heads[:, 2], gone(others), rtol=1e-5)
    others = everything._replace(neurons=np.delete(everything.neurons, 7, 1))
    np.testing.assert_allclose(found.neurons[:, 7], gone(others), rtol=1e-5)


def test_what_matters_most_stays():
    scores = Kept(np.array([[1.0, 3, 2, 0]]), np.arange(688.0)[None])
    kept = pruning.choose(scores, 0.5, 0.5)
    assert kept.heads.tolist() == [[1, 2]]
    assert kept.neurons.tolist() == [list(range(688 - 352, 688))]  # a multiple of 16, which 688 and 128 share
    whole = pruning.choose(scores, 1, 1)
    assert [at.shape[1] for at in whole] == [4, 688]
    for share, said in (
        (0.0, "heads 0: the share that stays must be above 0 and at most 1"),
        (1.5, "heads 1.5: the share"),
        (0.1, r"heads 0.1: leaves none of 4 key/value heads, which go by 1; a share of 0.125 or more should stay"),
    ):
        with pytest.raises(jp.InputError, match=said):
            pruning.choose(scores, share, 0.5)
    with pytest.raises(jp.InputError, match="neurons 0.01: leaves none of 688 neurons, which go by 16"):
        pruning.choose(scores, 0.5, 0.01)


def test_what_cannot_be_pruned():
    model, params = tiny.model(**WIDE)
    packed = jp.quantize("int8").prepare(params, None)
    with pytest.raises(jp.InputError, match="is packed, and its heads or neurons cannot be cut out"):
        pruning.importance(model, packed)
    with pytest.raises(jp.InputError, match="by 'taylor': needs batches"):
        pruning.importance(model, params, "taylor")
    damaged = jax.tree.map(lambda x: x.at[1].set(jnp.nan) if x.ndim == 3 else x, params)
    with pytest.raises(jp.InputError, match="by 'magnitude': scores of heads of layer 1 are no numbers"):
        pruning.importance(model, damaged)
    with pytest.raises(jp.InputError, match="by 'best': expected one of magnitude, taylor, random"):
        pruning.importance(model, params, "best")
    other = model._replace(config=dataclasses.replace(model.config, model_type="bert"))
    with pytest.raises(jp.InputError, match="a model of type bert cannot be pruned; llama, mistral"):
        pruning.importance(other, params)


@pytest.fixture(scope="module")
def road(tmp_path_factory):
    """The commands, one after the other, on the embedded model: (folder, documents)."""
    folder = tmp_path_factory.mktemp("loram")
    step = [
        "--steps",
        "2",
        "--seq-len",
        "64",
        "--batch-size",
        "2",
        "--rank",
        "2",
        "--samples",
        "0",
        "--eval-every",
        "0",
    ]
    data = ["--data", "jaxpeft/assets/docstrings/train.jsonl", "--batches", "2", "--batch-size", "2"]
    for words in (
        ["prune", *data, "--seq-len", "64", "--out", f"{folder}/pruned", "--keep-neurons", "0.25"],
        ["train", "--model", f"{folder}/pruned", *step, "--dtype", "float32", "--out", f"{folder}/run"],
        ["recover", "--adapter", f"{folder}/run/adapter", "--pruned", f"{folder}/pruned", "--out", f"{folder}/whole"],
    ):
        assert cli.main(words) == 0
    return folder


def test_the_pruned_checkpoint_is_one_of_transformers(road):
    torch = pytest.importorskip("torch")
    from transformers import AutoModelForCausalLM

    config = json.loads((road / "pruned/config.json").read_text())
    assert (config["num_key_value_heads"], config["head_dim"], config["intermediate_size"]) == (1, 64, 176)
    theirs = AutoModelForCausalLM.from_pretrained(road / "pruned", torch_dtype=torch.float32)
    model, params = jp.load_pretrained(road / "pruned", jnp.float32)
    tokens = np.arange(20, dtype=np.int32)[None] + 5
    with torch.no_grad():
        wanted = theirs(torch.from_numpy(tokens.astype(np.int64))).logits.numpy()
    batch = {"tokens": tokens, "positions": np.arange(20, dtype=np.int32)[None]}
    np.testing.assert_allclose(model.apply(params, batch), wanted, rtol=1e-3, atol=1e-3)


def test_the_recovered_adapter_is_what_was_trained(road):
    from jaxpeft import assets

    kept = pruning.read(road / "pruned")[1]
    small, left = jp.load_pretrained(road / "pruned", jnp.float32)
    _, trained = jp.import_adapter(road / "run/adapter", small, left)
    whole, params = jp.load_pretrained(assets.MODEL, jnp.float32)
    method, leaves = jp.import_adapter(road / "whole", whole, params)
    assert method.name == "lora"
    wanted = pruning.recovered(trained, whole.config, kept)
    assert leaves.keys() == wanted.keys()
    for path, leaf in wanted.items():
        np.testing.assert_array_equal(leaves[path], leaf)


def said(capsys, *words):
    assert cli.main([str(word) for word in words]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    return line


def test_mistakes_are_one_line(road, tmp_path, capsys):
    recover = ["recover", "--pruned", road / "pruned", "--out", tmp_path / "out", "--adapter"]
    assert "an adapter for another base: " in said(capsys, *recover, road / "whole")
    assert "an adapter for another base" in said(capsys, "generate", "--adapter", road / "run/adapter", "--prompt", "a")
    assert "has no pruning.json; give the folder" in said(
        capsys, *recover[:2], road / "run", *recover[3:], road / "whole"
    )
    assert "--by taylor: needs --data" in said(capsys, "prune", "--out", tmp_path / "out", "--by", "taylor")
    assert "--keep 2: the share that stays" in said(capsys, "prune", "--out", tmp_path / "out", "--keep", "2")
    assert "--batches 0: should be at least 1" in said(capsys, "prune", "--out", tmp_path / "out", "--batches", "0")
    line = said(capsys, *recover, road / "run/adapter", "--model", road / "pruned")
    assert "pruning.json: pruned from another base than " in line
    damaged = tmp_path / "damaged"
    damaged.mkdir()
    for file in (road / "pruned").iterdir():
        (damaged / file.name).write_bytes(file.read_bytes())
    document = json.loads((damaged / pruning.FILE).read_text())
    document["heads"][0] = [7]
    (damaged / pruning.FILE).write_text(json.dumps(document))
    line = said(capsys, *recover[:2], damaged, *recover[3:], road / "run/adapter")
    assert "heads up to 7 of 4 layers, and the base has 2 in each of 4" in line
    document["heads"][0] = [1, 0]
    (damaged / pruning.FILE).write_text(json.dumps(document))
    line = said(capsys, *recover[:2], damaged, *recover[3:], road / "run/adapter")
    assert "heads: each layer should have equally many numbers, in ascending order" in line
    assert not (tmp_path / "out").exists()


def test_a_pruned_checkpoint_is_pruned_no_other_way(road):
    """config.json says the rest of what it said."""
    from jaxpeft import assets

    before, after = hf.load_config(assets.MODEL), hf.load_config(road / "pruned")
    changed = {name for name in after if after[name] != before.get(name)}
    assert changed == {"num_attention_heads", "num_key_value_heads", "intermediate_size"}


@pytest.mark.parametrize(
    ("geometry", "heads", "neurons", "times"),
    [
        ("llama2-70b", 2, 5760, 16.3),
        ("llama3.1-70b", 1, 4352, 15.0),
        ("llama2-70b", 4, 14336, 7.4),
        ("llama3.1-70b", 4, 14336, 6.5),
    ],
)
def test_bytes_of_a_pruned_base_in_nf4(geometry, heads, neurons, times):
    """LoRAM's 15.81 and 16.95 times less for 70B models ask for so small a part of them; embeddings stay whole."""
    raw = geometries.load(geometry)
    whole = decoder.DecoderConfig.from_hf(raw)

    def held(config, method):
        step = planner.make_step(config, method, 1, 16, "blocks", jnp.bfloat16)
        return tree.num_bytes(step.state.frozen)

    small = {**raw, **pruning.smaller(whole, heads, neurons)}
    found = held(raw, jp.lora(8)) / held(small, jp.chain(jp.quantize("nf4"), jp.lora(8)))
    assert found == pytest.approx(times, rel=0.01)
