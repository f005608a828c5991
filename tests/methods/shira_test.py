"""SHiRA: PEFT's numbers and files, which entries are drawn, packed kernels, what is kept and refused."""

import jax
import numpy as np
import peft
import pytest
import torch
from safetensors.numpy import load_file, save_file

import jaxpeft as jp
from jaxpeft import tree
from jaxpeft.methods import shira
from jaxpeft.peft import attach, export_adapter, import_adapter
from jaxpeft.quant import is_packed
from tests import residuals, tiny
from tests.peft import reference

NAMES = ["q_proj", "o_proj", "down_proj"]


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    return reference.write_base(tmp_path_factory.mktemp("base") / "llama")


@pytest.fixture(scope="module")
def theirs(llama):
    """PEFT's model with random values at random entries."""
    config = peft.ShiraConfig(r=3, task_type="CAUSAL_LM", target_modules=NAMES, random_seed=1)
    model = peft.get_peft_model(reference.torch_base(llama), config).eval()
    generator = torch.Generator().manual_seed(1)
    for name, parameter in model.named_parameters():
        if "shira_weight" in name:
            parameter.data = 0.3 * torch.randn(parameter.shape, generator=generator)
    return model


def test_outputs_gradients_merged_weights_and_adapters_are_those_of_peft(llama, theirs, tmp_path):
    theirs.save_pretrained(tmp_path / "theirs")
    base, params = reference.load(llama)
    model, adapted, method = attach(tmp_path / "theirs", base, params)
    assert method.specs[0].config == {"rank": 3, "targets": sorted(NAMES)}
    trainable, rest = tree.split(adapted, method.trainable)

    def of_torch(path, value):
        name = "base_model.model.model.layers.{}." + ".".join(path.split("/")[1:3]) + ".shira_weight.default"
        return np.stack([value(dict(theirs.named_parameters())[name.format(layer)]).numpy() for layer in range(2)])

    assert len(trainable) == 3
    expected = reference.assert_same_gradients(theirs, model, trainable, rest, of_torch)
    assert np.abs(expected - reference.torch_logits(reference.torch_base(llama))).max() > 0.1
    merged = method.merge(adapted)
    reference.assert_close(reference.logits(base, merged), expected)
    assert tree.flatten(merged).keys() == tree.flatten(params).keys()
    export_adapter(tmp_path / "ours", adapted, method, base.config, llama)
    reference.assert_close(reference.with_adapter(llama, tmp_path / "ours"), expected)


def test_entries_are_different_and_as_likely_as_any_other():
    """Over many draws each of 35 entries is taken in 12 of 35; a chi-squared test at its 99.9 % quantile."""
    draws = jax.vmap(lambda key: shira.draw(key, 5, 7, 12))(jax.random.split(jax.random.key(0), 2000))
    flat = np.asarray(draws[..., 0] * 7 + draws[..., 1])
    assert (np.diff(flat, axis=1) > 0).all() and flat.min() >= 0 and flat.max() < 35
    expected = np.concatenate([np.full(size, 2000 / size) for size in [3] * 11 + [2]])
    counts = np.bincount(flat.ravel(), minlength=35)
    assert np.sum((counts - expected) ** 2 / expected) < 66.6  # 35 degrees of freedom, an upper bound
    np.testing.assert_array_equal(shira.draw(jax.random.key(1), 3, 4, 12), np.argwhere(np.ones((3, 4))))


def test_large_kernels_are_drawn_from_to_their_ends():
    """128256 x 16384 entries are more than int32 tells apart."""
    n, m = 128256, 16384
    index = np.asarray(shira.draw(jax.random.key(0), n, m, n + m)).astype(np.int64)
    flat = index[:, 0] * m + index[:, 1]
    assert (np.diff(flat) > 0).all() and flat[0] < n * m / (n + m) + 1 and n * m - flat[-1] < n * m / (n + m) + 2
    assert index[:, 1].max() < m


def test_layers_differ_and_packed_kernels_stay_packed():
    base, params = tiny.model(hidden_size=64, intermediate_size=128)
    method = jp.chain(jp.quantize("nf4"), jp.shira(2, targets=["q_proj"]))
    _, _, rest = jp.setup(method, base, params, jax.random.key(0))
    assert is_packed(rest["layers/self_attn/q_proj/kernel"])
    index = np.asarray(rest["layers/self_attn/q_proj/shira/index"])
    assert index.shape == (3, 2 * 128, 2) and (index[0] != index[1]).any() and (index[1] != index[2]).any()


def test_keeps_what_lora_keeps_without_its_products():
    """Seven kernels of a layer read four inputs, three of width 32 and one of 56."""
    of = lambda method: residuals.bytes_per_token(*jp.setup(method, *tiny.model(), jax.random.key(0)), tiny.batch)
    assert of(jp.lora(4)) - of(jp.shira(2)) == 3 * 7 * 4 * 4


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda w, i: (w[:-1], i), "shira_indices has shape"),
        (lambda w, i: (w, i + 40), "q_proj.shira_indices has some outside of 32 x 32"),
        (lambda w, i: (w[:-1], i[:, :-1]), "has 191 entries, where r 3 gives 32 x 32 192"),
    ],
)
def test_a_file_that_does_not_fit_is_refused(change, message, llama, theirs, tmp_path):
    theirs.save_pretrained(tmp_path)
    file = tmp_path / "adapter_model.safetensors"
    tensors, stem = load_file(file), "base_model.model.model.layers.0.self_attn.q_proj.shira_"
    values, index = change(tensors[f"{stem}weight"], tensors[f"{stem}indices"])
    save_file({**tensors, f"{stem}weight": values, f"{stem}indices": np.ascontiguousarray(index)}, file)
    with pytest.raises(jp.InputError, match=message):
        import_adapter(tmp_path, reference.load(llama)[0].config)


@pytest.mark.parametrize(
    ("rank", "message"),
    [
        (0, "shira: rank 0 must be at least 1"),
        (21, "shira: rank 21 is above the 20 that layers/mlp/down_proj has room"),
    ],
)
def test_refusals(rank, message):
    with pytest.raises(jp.InputError, match=message):
        jp.setup(jp.shira(rank), *tiny.model(), jax.random.key(0))
