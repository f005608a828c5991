"""LayerNorm tuning: PEFT's numbers, its files in both directions, which norms are chosen, what is kept and refused."""

import jax
import jax.numpy as jnp
import numpy as np
import peft
import pytest
import torch
from safetensors.numpy import load_file, save_file

import jaxpeft as jp
from jaxpeft import tree
from jaxpeft.methods import ln_tuning
from jaxpeft.peft import attach
from tests import residuals, tiny
from tests.peft import reference

NORMS = ["layers/input_layernorm", "layers/post_attention_layernorm", "norm"]


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    """(folder, Model, params); its norms are not one."""
    folder = reference.write_base(tmp_path_factory.mktemp("base") / "llama")
    torch_model = reference.torch_base(folder)
    noise(torch_model.named_parameters(), "norm", 2)
    torch_model.save_pretrained(folder)
    return folder, *reference.load(folder)


def noise(parameters, within, seed):
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in parameters:
        if within in name:
            parameter.data = parameter.data + 0.3 * torch.randn(parameter.shape, generator=generator)


def adapted(folder, targets=None):
    config = peft.LNTuningConfig(task_type="CAUSAL_LM", target_modules=targets)
    theirs = peft.get_peft_model(reference.torch_base(folder), config).eval()
    noise(theirs.named_parameters(), "ln_tuning_layers", 1)
    return theirs


def test_outputs_gradients_and_merged_are_those_of_peft(llama, tmp_path):
    folder, base, params = llama
    theirs = adapted(folder)
    theirs.save_pretrained(tmp_path / "adapter")
    model, params_read, method = attach(tmp_path / "adapter", base, params)
    assert method.specs == jp.ln_tuning().specs
    trainable, rest = tree.split(params_read, method.trainable)
    assert trainable.keys() == {f"{norm}/ln_tuning/scale" for norm in NORMS}

    def of_torch(path, value):
        name = path.removesuffix("/ln_tuning/scale").replace("layers/", "layers.{}.")
        name = f"base_model.model.model.{name}.ln_tuning_layers.default.weight"
        rows = [value(dict(theirs.named_parameters())[name.format(layer)]).numpy() for layer in range(2)]
        return np.stack(rows) if "{}" in name else rows[0]

    expected = reference.assert_same_gradients(theirs, model, trainable, rest, of_torch)
    assert np.abs(expected - reference.torch_logits(reference.torch_base(folder))).max() > 0.1
    merged = method.merge(params_read)
    reference.assert_close(reference.logits(base, merged), expected)
    assert tree.flatten(merged).keys() == tree.flatten(params).keys()


@pytest.mark.parametrize("targets", ["all", ["input_layernorm", "norm"]])
def test_peft_reads_what_is_written(targets, llama, tmp_path):
    folder, base, params = llama
    method = jp.ln_tuning(targets)
    model, trainable, rest = jp.setup(method, base, params, jax.random.key(0))
    whole = jp.combine(reference.randomise(trainable), rest)
    jp.export_adapter(tmp_path / "adapter", whole, method, model.config)
    reference.assert_close(reference.with_adapter(folder, tmp_path / "adapter"), reference.logits(model, whole))


def test_a_layer_without_one_has_the_base_s(llama, tmp_path):
    """PEFT may adapt one layer's norm alone; such a file needs the base to be read."""
    folder, base, params = llama
    theirs = adapted(folder, ["layers.1.input_layernorm"])
    theirs.save_pretrained(tmp_path / "adapter")
    model, params_read, method = attach(tmp_path / "adapter", base, params)
    assert method.specs[0].config == {"targets": ["input_layernorm"]}
    reference.assert_close(reference.logits(model, params_read), reference.torch_logits(theirs))
    with pytest.raises(jp.InputError, match="layers.0.input_layernorm has none, other layers do"):
        jp.import_adapter(tmp_path / "adapter", base.config)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda x: {"model.norm.lora_A.weight": x}, "the tensor model.norm.lora_A.weight is not supported"),
        (lambda x: {"model.nrm.ln_tuning_layers.weight": x}, "adapts model.nrm, which is no norm of this one; nearest"),
        (lambda x: {"model.norm.ln_tuning_layers.weight": x[:5]}, r"shape \(5,\), where model.norm has shape \(32,\)"),
        (lambda x: {"model.norm.ln_tuning_layers.bias": x}, r"shape \(32,\), where model.norm has none"),
        (lambda x: {}, "holds no adapter"),
    ],
)
def test_a_file_that_does_not_fit_is_refused(change, message, llama, tmp_path):
    folder, base, _ = llama
    adapted(folder, ["norm"]).save_pretrained(tmp_path / "adapter")
    file = tmp_path / "adapter" / "adapter_model.safetensors"
    (tensor,) = load_file(file).values()
    save_file(change(tensor), file)
    with pytest.raises(jp.InputError, match=message):
        jp.import_adapter(tmp_path / "adapter", base.config)


def test_biases_of_layer_norms_train_too(tmp_path):
    """OPT's norms have them; written, read by PEFT, and read again."""
    sizes = {"ffn_dim": 56, "word_embed_proj_dim": 32, "tie_word_embeddings": True}
    folder = reference.write_base(tmp_path / "opt", "opt", **sizes)
    base, params = reference.load(folder)
    method = jp.ln_tuning()
    model, trainable, rest = jp.setup(method, base, params, jax.random.key(0))
    assert {path.rsplit("/", 1)[-1] for path in trainable} == {"scale", "bias"}
    whole = jp.combine(reference.randomise(trainable), rest)
    jp.export_adapter(tmp_path / "adapter", whole, method, model.config)
    logits = reference.logits(model, whole)
    reference.assert_close(reference.with_adapter(folder, tmp_path / "adapter"), logits)
    reference.assert_close(reference.logits(base, method.merge(whole)), logits)
    _, again, _ = attach(tmp_path / "adapter", base, params)
    for path, leaf in tree.flatten(whole).items():
        np.testing.assert_array_equal(tree.flatten(again)[path], leaf, err_msg=path)


@pytest.mark.parametrize(
    ("targets", "norms"),
    [("all", NORMS), ("input_layernorm,norm", [NORMS[0], NORMS[2]]), ("^layers", NORMS[:2]), (["norm"], NORMS[2:])],
)
def test_targets(targets, norms):
    _, trainable, _ = jp.setup(jp.ln_tuning(targets), *tiny.model(), jax.random.key(0))
    assert set(trainable) == {f"{norm}/ln_tuning/scale" for norm in norms}


def test_norms_on_heads_train_and_nothing_of_other_methods():
    """The rungs of a ladder have norms of their own, which are the ladder's."""
    small = {"model_type": "qwen3", "head_dim": 8}
    _, trainable, _ = jp.setup(jp.ln_tuning(), *tiny.model(**small), jax.random.key(0))
    assert {"layers/self_attn/q_norm/ln_tuning/scale", "layers/self_attn/k_norm/ln_tuning/scale"} < set(trainable)
    method, (base, params) = jp.chain(jp.lst(4), jp.ln_tuning()), tiny.model()
    for _ in range(2):  # on the base, and on what has its leaves
        _, trainable, rest = jp.setup(method, base, params, jax.random.key(0))
        assert {path for path in trainable if "/ln_tuning/" in path} == {f"{norm}/ln_tuning/scale" for norm in NORMS}
        params = jp.combine(trainable, rest)


def test_gradients_are_those_of_the_norms_themselves():
    """In bfloat16 and with LoRA beside it: the copies compute what `full("norms")` does, bit for bit."""
    base, params = tiny.model(dtype=jnp.bfloat16)
    batch = tiny.batch()

    def gradients(method):
        model, trainable, rest = jp.setup(method, base, params, jax.random.key(0))
        loss = lambda trainable: jnp.sum(model.apply(jp.combine(trainable, rest), batch) ** 2)
        return jax.jit(jax.grad(loss))(trainable)

    lora = lambda: jp.lora(2, targets=["q_proj"])
    found = gradients(jp.chain(jp.ln_tuning(), lora()))
    for path, gradient in gradients(jp.chain(jp.full("norms"), lora())).items():
        own = path.replace("/scale", "/ln_tuning/scale")
        assert gradient.dtype == jnp.float32
        np.testing.assert_array_equal(found[own], gradient, err_msg=path)


def test_merged_vectors_are_of_the_base_s_type():
    base, params = tiny.model(dtype=jnp.bfloat16)
    method = jp.ln_tuning()
    _, trainable, rest = jp.setup(method, base, params, jax.random.key(0))
    merged = tree.flatten(method.merge(jp.combine(reference.randomise(trainable), rest)))
    assert {path: leaf.dtype for path, leaf in merged.items()} == {
        path: leaf.dtype for path, leaf in tree.flatten(params).items()
    }


def test_keeps_no_more_than_a_frozen_backbone():
    start = lambda method: jp.setup(method, *tiny.model(), jax.random.key(0))
    kept = residuals.bytes_per_token(*start(jp.ln_tuning()), tiny.batch)
    floor = residuals.bytes_per_token(*start(jp.full("embeddings")), tiny.batch)
    assert kept <= floor


def test_what_matches_no_norm_is_refused():
    with pytest.raises(jp.InputError, match="ln_tuning: targets 'q_proj': matches no norm; nearest: "):
        jp.setup(jp.ln_tuning(["q_proj"]), *tiny.model(), jax.random.key(0))
    with pytest.raises(jp.InputError, match="ln_tuning: the model has no norms; a norm is a module with a parameter"):
        ln_tuning.find(["layers/mlp/up_proj/kernel"], "all")
