"""Adapters out: what PEFT computes with them, what they come back as, and what is refused."""

import json

import jax
import numpy as np
import optax
import pytest

import jaxpeft as jp
from jaxpeft import files, tree
from jaxpeft.errors import InputError, Notice
from jaxpeft.peft import attach, export_adapter, fingerprint, import_adapter
from tests import tiny
from tests.peft import reference

METHODS = {
    "lora": jp.lora(rank=4, alpha=8),
    "rslora on one name": jp.lora(rank=4, alpha=6, rslora=True, targets=["q_proj"]),
    "patterns": jp.lora(rank=4, alpha=8, rank_pattern={"mlp": 3, "q_proj": 7}, alpha_pattern={"down_proj": 5}),
    "rslora patterns": jp.lora(rank=4, rslora=True, rank_pattern={"k_proj": 2}),
    "head": jp.lora(rank=4, alpha=8, targets="v_proj|lm_head"),
    "pissa": jp.lora(rank=4, init="pissa", rank_pattern={"o_proj": 2}, targets="attention"),
    "olora": jp.lora(rank=3, alpha=6, init="olora", targets=["q_proj", "down_proj"]),
    "zero_a": jp.lora(rank=3, init="zero_a", targets=["q_proj"]),
    "dora": jp.dora(rank=4, alpha=6, rslora=True, rank_pattern={"q_proj": 2}),
    "ia3": jp.ia3(),
    "ln_tuning": jp.ln_tuning(),
    "ia3 on inputs": jp.ia3(targets=["o_proj", "down_proj"], feedforward=["o_proj", "mlp/down_proj"]),
    "loha": jp.loha(3, alpha=6, rank_pattern={"q_proj": 5}, alpha_pattern={"down_proj": 0.5}),
    "lokr": jp.lokr(3, alpha=6, rank_pattern={"q_proj": 4}),
    "lokr of small factors": jp.lokr(1, both=True, factor=4, alpha_pattern={"down_proj": 0.5}),
    "miss": jp.miss(6),
    "miss, mini": jp.miss(8, mini=4),
    "oft": jp.oft(8),
    "oft with patterns": jp.oft(8, terms=6, share=True, block_pattern={"down_proj": 14}),
    "randlora": jp.randlora(5),
    "randlora, sparse": jp.randlora(7, alpha=21, bases="sparse", targets="mlp"),
    "shira": jp.shira(rank=3),
    "vblora": jp.vblora(3, vectors=12, length=8),
    "velora": jp.velora(4, alpha=8, groups=8),
    "vera": jp.vera(40),
    "lora_fa": jp.lora_fa(rank=4, alpha=8),
    "lora_fa from seeds": jp.lora_fa(rank=4, alpha=8, store_a=False, init="orthonormal"),
}


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    return reference.write_base(tmp_path_factory.mktemp("base") / "llama")


def adapted(base, method):
    """(base model, its params, adapted model, adapted params) with every trainable leaf random."""
    model, params = reference.load(base)
    new, trainable, frozen = jp.setup(method, model, params, jax.random.key(1))
    return model, params, new, tree.combine(reference.randomise(trainable), frozen)


@pytest.mark.parametrize("name", METHODS)
def test_peft_computes_the_same_and_it_comes_back_bit_for_bit(name, llama, tmp_path, recwarn):
    method = METHODS[name]
    model, original, new, params = adapted(llama, method)
    export_adapter(tmp_path / "adapter", params, method, model.config, llama)
    theirs = reference.with_adapter(llama, tmp_path / "adapter")
    reference.assert_close(reference.logits(new, params), theirs)
    assert np.abs(theirs - reference.torch_logits(reference.torch_base(llama))).max() > 0.1
    said = [str(w.message) for w in recwarn if "randlora_A" not in str(w.message)]  # which PEFT misses in its own, too
    assert not [text for text in said if "missing adapter keys" in text or "Unexpected" in text]

    _, restored, again = attach(tmp_path / "adapter", model, original)
    assert json.dumps(again.specs) == json.dumps(method.specs)
    before, after = tree.flatten(params), tree.flatten(restored)
    assert before.keys() == after.keys()
    for path, leaf in before.items():
        assert leaf.dtype == after[path].dtype
        np.testing.assert_array_equal(leaf, after[path], err_msg=path)


@pytest.mark.parametrize(
    "sampler",
    [
        pytest.param(jp.lisa(count=1, every=2), id="lisa"),
        pytest.param(jp.ist(share=0.5, every=2), id="ist", marks=pytest.mark.slow),
    ],
)
def test_layers_that_were_drawn_leave_an_ordinary_lora(sampler, llama, tmp_path):
    """After steps with draws between them: masters and numbers of layers are no part of the file."""
    method = jp.chain(jp.lora(rank=2), sampler)
    base, original = reference.load(llama)
    model, trainable, frozen = jp.setup(method, base, original, jax.random.key(1))
    optimizer = optax.sgd(10.0)
    state = jp.init_state(method, optimizer, trainable, frozen, jax.random.key(2), model)
    step = jax.jit(jp.make_train_step(model, method, optimizer))
    for _ in range(3):
        state, _ = step(state, tiny.batch(rows=2, length=4, vocab=base.config.vocab_size))
    export_adapter(tmp_path / "adapter", state.params, method, base.config, llama)
    ours = reference.logits(model, state.params)
    reference.assert_close(ours, reference.with_adapter(llama, tmp_path / "adapter"))
    assert np.abs(ours - reference.logits(base, original)).max() > 0.01
    again, restored, chain = attach(tmp_path / "adapter", base, original)
    assert json.dumps(chain.specs) == json.dumps(method.specs)
    reference.assert_close(reference.logits(again, restored), ours)
    _, together, adapters = jp.attach_several({"drawn": tmp_path / "adapter"}, base, original)
    alone = tree.flatten(jp.adapters.alone(together, adapters, "drawn"))
    own = {path: leaf for path, leaf in state.leaves.items() if "/lora/" in path and path.startswith("layers/")}
    assert len(own) == 14
    for path, leaf in own.items():
        np.testing.assert_array_equal(leaf, alone[path], err_msg=path)


def test_a_family_with_biases(tmp_path):
    base = reference.write_base(tmp_path / "qwen2", "qwen2")
    model, _, new, params = adapted(base, METHODS["lora"])
    export_adapter(tmp_path / "adapter", params, METHODS["lora"], model.config, base)
    reference.assert_close(reference.logits(new, params), reference.with_adapter(base, tmp_path / "adapter"))


def test_the_files_of_a_lora_on_attention(llama, tmp_path):
    method = jp.lora(rank=4, alpha=8, dropout=0.25, targets="attention")
    model, _, _, params = adapted(llama, method)
    export_adapter(tmp_path / "adapter", params, method, model.config, "owner/name")
    assert {file.name for file in (tmp_path / "adapter").iterdir()} == {
        "adapter_config.json",
        "adapter_model.safetensors",
        "jaxpeft.json",
    }
    assert [path.name for path in tmp_path.iterdir()] == ["adapter"]
    config = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    assert config["target_modules"] == ["k_proj", "o_proj", "q_proj", "v_proj"]
    assert (config["r"], config["lora_alpha"], config["lora_dropout"]) == (4, 8, 0.25)
    assert (config["rank_pattern"], config["alpha_pattern"], config["use_rslora"]) == ({}, {}, False)
    assert (config["base_model_name_or_path"], config["task_type"], config["bias"]) == (
        "owner/name",
        "CAUSAL_LM",
        "none",
    )

    from safetensors.numpy import load_file

    tensors = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    assert len(tensors) == 2 * 4 * 2
    a = tensors["base_model.model.model.layers.1.self_attn.k_proj.lora_A.weight"]
    np.testing.assert_array_equal(a, params["layers"]["self_attn"]["k_proj"]["lora"]["a"][1].T)


def test_names_that_other_modules_share_are_written_in_full(llama, tmp_path):
    """A cut stack: one segment's adapters only."""
    method = jp.lora(rank=2, targets=["q_proj"])
    model, params = reference.load(llama)
    cut = tree.cut_layers(params, 1)
    new, trainable, frozen = jp.setup(
        jp.lora(rank=2, targets=r"layers_1_2/self_attn/q_proj"), model, cut, jax.random.key(0)
    )
    params = tree.combine(reference.randomise(trainable), frozen)
    export_adapter(tmp_path / "adapter", params, method, model.config, llama)
    config = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    assert config["target_modules"] == ["model.layers.1.self_attn.q_proj"]
    reference.assert_close(reference.logits(new, params), reference.with_adapter(llama, tmp_path / "adapter"))


def test_a_whole_real_checkpoint(shared_data, tmp_path):
    base = shared_data / "checkpoints" / "stories260K"
    method = jp.lora(rank=8, alpha=16)
    model, _, new, params = adapted(base, method)
    export_adapter(tmp_path / "adapter", params, method, model.config, base)
    tokens = np.random.default_rng(0).integers(0, 512, (2, 40)).astype(np.int32)
    import peft

    theirs = peft.PeftModel.from_pretrained(reference.torch_base(base), tmp_path / "adapter").eval()
    reference.assert_close(reference.logits(new, params, tokens), reference.torch_logits(theirs, tokens))


def test_tensors_changed_since_are_read_as_plain_lora(llama, tmp_path):
    """As when PEFT trains the adapter on and saves it in the same folder: jaxpeft.json speaks of other tensors."""
    method = METHODS["lora_fa from seeds"]
    model, original, _, params = adapted(llama, method)
    export_adapter(tmp_path / "adapter", params, method, model.config, llama)
    import peft
    import torch

    theirs = peft.PeftModel.from_pretrained(reference.torch_base(llama), tmp_path / "adapter", is_trainable=True)
    for name, parameter in theirs.named_parameters():
        if "lora_A" in name:
            parameter.data += 0.1 * torch.ones_like(parameter)
    theirs.save_pretrained(tmp_path / "adapter")
    with pytest.warns(Notice, match="jaxpeft.json: speaks of other tensors .* for this base is not known"):
        again, restored, found = attach(tmp_path / "adapter", model, original)
    assert [spec.name for spec in found.specs] == ["lora"]
    reference.assert_close(reference.logits(again, restored), reference.torch_logits(theirs.eval()))


def test_a_cut_stack_has_the_fingerprint_of_the_whole_one():
    """So that an adapter knows its base whichever method cut it, and one that differs in a layer."""
    base, params = tiny.model()
    whole = fingerprint(base.config, params)
    cut = tree.cut_layers(params, 1)
    assert {"layers_0_1", "layers_1_3"} <= set(cut) and fingerprint(base.config, cut) == whole
    other = tree.flatten(cut)
    other["layers_1_3/mlp/up_proj/kernel"] = 1.5 * other["layers_1_3/mlp/up_proj/kernel"]
    found = fingerprint(base.config, tree.unflatten(other))["samples"]
    assert {path for path, digest in whole["samples"].items() if found[path] != digest} == {"layers/mlp/up_proj/kernel"}
    del other["layers_0_1/mlp/up_proj/kernel"]  # a part alone is no leaf of the base
    assert "layers/mlp/up_proj/kernel" not in fingerprint(base.config, tree.unflatten(other))["samples"]


@pytest.mark.parametrize(
    ("method", "reason"),
    [
        (jp.full(), "full: is no adapter; merge it"),
        (jp.chain(jp.lora(rank=2), jp.full("norms")), r"lora, full: \S*norm/scale trains too"),
    ],
)
def test_what_is_no_adapter_is_refused(method, reason, llama, tmp_path):
    model, _, _, params = adapted(llama, method)
    with pytest.raises(InputError, match=reason):
        export_adapter(tmp_path / "adapter", params, method, model.config)
    assert list(tmp_path.iterdir()) == []


def test_only_an_adapter_is_replaced_and_only_when_told_to(llama, tmp_path):
    method = METHODS["rslora on one name"]
    model, _, _, params = adapted(llama, method)
    target = tmp_path / "adapter"
    export_adapter(target, params, method, model.config)
    before = (target / "adapter_model.safetensors").read_bytes()
    zero = jax.tree.map(lambda x: x * 0.5, params)
    with pytest.raises(InputError, match="exists and is not an empty directory"):
        export_adapter(target, zero, method, model.config)
    assert (target / "adapter_model.safetensors").read_bytes() == before
    export_adapter(target, zero, method, model.config, replace=True)
    assert (target / "adapter_model.safetensors").read_bytes() != before
    assert [path.name for path in tmp_path.iterdir()] == ["adapter"]

    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis" / "chapter-1.txt").write_text("It was a dark and stormy night.")
    with pytest.raises(InputError, match="holds something else .no adapter_config.json. and is not replaced"):
        export_adapter(tmp_path / "thesis", params, method, model.config, replace=True)
    with pytest.raises(InputError, match="is a file"):
        export_adapter(tmp_path / "thesis" / "chapter-1.txt", params, method, model.config, replace=True)


@pytest.mark.parametrize("old", [False, True])
def test_a_write_that_fails_leaves_what_was_there(old, llama, tmp_path, monkeypatch):
    method = METHODS["rslora on one name"]
    model, original, _, params = adapted(llama, method)
    target = tmp_path / "adapter"
    if old:
        export_adapter(target, params, method, model.config)

    def full_disk(path, data, write=files.write):
        if path.name == "adapter_model.safetensors":
            path.write_bytes(data[:100])
            raise OSError(28, "No space left on device")
        write(path, data)

    monkeypatch.setattr(files, "write", full_disk)
    with pytest.raises(InputError, match="No space left on device"):
        export_adapter(target, params, method, model.config, replace=True)
    assert [path.name for path in tmp_path.iterdir()] == (["adapter"] if old else [])
    if old:
        import_adapter(target, model.config, original)


@pytest.mark.parametrize(
    ("made", "said_to_be", "reason"),
    [
        (
            jp.lora(2),
            jp.lora(4, alpha=8),
            r"/lora/a has shape \(\S+ \S+ 2\), where lora on such a base has \(\S+ \S+ 4\)",
        ),
        (jp.dora(2), jp.lora(2), r"holds \S*/dora/\w+, which is no part of lora on such a base"),
        (jp.lora(2), jp.lora(2, targets=["q_proj"]), r"holds layers/(?!\S*q_proj)\S*/lora/a, which is no part of lora"),
        (
            jp.lora(2, targets=["q_proj"]),
            jp.chain(jp.lora(2), jp.houlsby(2)),
            r"lacks \S+ of shape \S.*, which lora\+h",
        ),
    ],
)
def test_adapters_of_another_method_are_not_written(made, said_to_be, reason, tmp_path):
    base, params = tiny.model()
    _, trainable, frozen = jp.setup(made, base, params, jax.random.key(1))
    with pytest.raises(InputError, match=reason):
        export_adapter(tmp_path / "adapter", tree.combine(trainable, frozen), said_to_be, base.config)
    assert list(tmp_path.iterdir()) == []


def test_leaves_that_the_method_does_not_read_are_not_written(tmp_path):
    base, params = tiny.model()
    _, trainable, frozen = jp.setup(jp.lora(2), base, params, jax.random.key(1))
    _, scales, _ = jp.setup(jp.ia3(), base, params, jax.random.key(1))
    with pytest.raises(InputError, match=r"holds \S+/lora/a, which is no part of ia3 on such a base"):
        export_adapter(tmp_path / "adapter", tree.combine({**trainable, **scales}, frozen), jp.ia3(), base.config)
    assert list(tmp_path.iterdir()) == []
