"""Adapters that classify rows, to PEFT and back; and adapters in our own form, which PEFT has none for."""

import hashlib
import json
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import peft
import pytest
import torch
import transformers
from safetensors.numpy import load_file, save_file

import jaxpeft as jp
from jaxpeft import cli, hf, tree
from jaxpeft.errors import InputError
from jaxpeft.peft import adapter_labels, attach, export_adapter, import_adapter
from tests import tiny
from tests.peft import reference

NAMES = ("first", "second", "third")
KINDS = ("llama", "qwen2", "bert", "roberta")
# Two rows, the second of which ends early.
SEGMENTS = (np.arange(21) < np.array([[21], [13]])).astype(np.int32)
TOKENS = np.where(SEGMENTS, np.maximum(reference.TOKENS, 2), 1)  # 1 is the padding
BATCH = {"tokens": TOKENS, "segment_ids": SEGMENTS, "positions": np.tile(np.arange(21, dtype=np.int32), (2, 1))}


def write_base(folder, kind):
    """A random checkpoint without a classifier of rows."""
    sizes = {**reference.SIZES, "pad_token_id": 1}
    if kind in ("bert", "roberta"):
        sizes |= {"max_position_embeddings": 66, "type_vocab_size": 2}
        del sizes["num_key_value_heads"]
    config = transformers.AutoConfig.for_model(kind, **sizes)
    torch.manual_seed(0)
    make = transformers.AutoModelForCausalLM if kind in ("llama", "qwen2") else transformers.AutoModelForMaskedLM
    make.from_config(config).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module", params=KINDS)
def base(request, tmp_path_factory):
    return write_base(tmp_path_factory.mktemp("base") / request.param, request.param)


def torch_base(folder):
    """PyTorch's model with a random classifier, to which the adapter brings its own."""
    torch.manual_seed(3)
    made = transformers.AutoModelForSequenceClassification.from_pretrained(folder, num_labels=3, dtype=torch.float32)
    made.config.pad_token_id = 1
    return made.eval()


def torch_logits(model):
    with torch.no_grad():
        given = {"input_ids": torch.tensor(TOKENS).long(), "attention_mask": torch.tensor(SEGMENTS).long()}
        return model(**given).logits.numpy()


def adapted(folder, method):
    """(base model, its params, adapted model, adapted params) with every trainable leaf random."""
    model, params = hf.load_pretrained(folder, jnp.float32, NAMES, jax.random.key(4))
    new, trainable, frozen = jp.setup(method, model, params, jax.random.key(1))
    return model, params, new, tree.combine(reference.randomise(trainable), frozen)


METHOD = jp.chain(jp.lora(rank=3, alpha=6), jp.full("^classifier/"))


def test_peft_computes_the_same_logits_and_it_comes_back_bit_for_bit(base, tmp_path, recwarn):
    model, params, new, mine = adapted(base, METHOD)
    export_adapter(tmp_path / "adapter", mine, METHOD, model.config, base, labels=NAMES)
    theirs = peft.PeftModel.from_pretrained(torch_base(base), tmp_path / "adapter").eval()
    reference.assert_close(np.asarray(new.classify(mine, BATCH)), torch_logits(theirs))
    assert not [w for w in recwarn if "missing adapter keys" in str(w.message) or "Unexpected" in str(w.message)]
    assert adapter_labels(tmp_path / "adapter") == NAMES

    _, again, method = attach(tmp_path / "adapter", model, params)
    assert json.dumps(method.specs) == json.dumps(METHOD.specs)
    before, after = tree.flatten(mine), tree.flatten(again)
    assert before.keys() == after.keys()
    for path, leaf in before.items():
        np.testing.assert_array_equal(leaf, after[path], err_msg=path)


def test_an_adapter_of_pefts_computes_the_same_here(base, tmp_path):
    saved = {"bert": ["classifier", "pooler"], "roberta": ["classifier"]}.get(base.name, ["score"])
    targets = r".*layers?\.\d+\..*(query|value|q_proj|down_proj|intermediate\.dense)"
    config = peft.LoraConfig(task_type="SEQ_CLS", r=2, target_modules=targets, modules_to_save=saved)
    theirs = peft.get_peft_model(torch_base(base), config).eval()
    generator = torch.Generator().manual_seed(1)
    for parameter in theirs.parameters():
        if parameter.requires_grad:
            parameter.data = 0.2 * torch.randn(parameter.shape, generator=generator)
    theirs.save_pretrained(tmp_path / "theirs")
    assert adapter_labels(tmp_path / "theirs") == ("LABEL_0", "LABEL_1", "LABEL_2")
    model, params = hf.load_pretrained(base, jnp.float32, NAMES)
    new, mine, method = attach(tmp_path / "theirs", model, params)
    assert [spec.name for spec in method.specs] == ["lora", "full"]
    reference.assert_close(np.asarray(new.classify(mine, BATCH)), torch_logits(theirs))


def test_an_adapter_at_a_module_that_is_saved_whole_is_not_written(tmp_path):
    """PEFT runs none there: of LoRA at a pooler, which its own training allows, it would read the rest alone."""
    base = write_base(tmp_path / "bert", "bert")
    config = peft.LoraConfig(task_type="SEQ_CLS", r=2, target_modules=["query", "pooler.dense"])
    theirs = peft.get_peft_model(torch_base(base), config).eval()
    theirs.save_pretrained(tmp_path / "theirs")
    model, params = hf.load_pretrained(base, jnp.float32, NAMES, jax.random.key(4))
    _, mine, method = attach(tmp_path / "theirs", model, params)
    with pytest.raises(
        InputError, match="^bert.pooler.dense is saved whole with the classifier, where PEFT runs no ad"
    ):
        export_adapter(tmp_path / "ours", mine, method, model.config, base, labels=NAMES)
    assert not (tmp_path / "ours").exists()


def test_a_base_without_these_labels_is_refused(tmp_path):
    folder = write_base(tmp_path / "llama", "llama")
    model, _, _, mine = adapted(folder, METHOD)
    export_adapter(tmp_path / "adapter", mine, METHOD, model.config, folder, labels=NAMES)
    plain, params = hf.load_pretrained(folder, jnp.float32)
    with pytest.raises(InputError, match="classifies rows as 3 labels, and the base as none"):
        import_adapter(tmp_path / "adapter", plain.config, params)
    two, params = hf.load_pretrained(folder, jnp.float32, ("a", "b"))
    with pytest.raises(InputError, match="classifies rows as 3 labels, and the base as 2"):
        import_adapter(tmp_path / "adapter", two.config, params)


def test_merge_and_import_keep_the_classifier(base, tmp_path, capsys):
    model, _, new, mine = adapted(base, METHOD)
    expected = np.asarray(new.classify(mine, BATCH))
    export_adapter(tmp_path / "adapter", mine, METHOD, model.config, base, labels=NAMES)
    common = ["--model", str(base), "--adapter"]
    assert cli.main(["import", *common, str(tmp_path / "adapter"), "--out", str(tmp_path / "again")]) == 0
    for name in ("adapter_model.safetensors", "adapter_config.json", "jaxpeft.json"):
        assert (tmp_path / "again" / name).read_bytes() == (tmp_path / "adapter" / name).read_bytes()
    assert cli.main(["merge", *common, str(tmp_path / "again"), "--out", str(tmp_path / "merged")]) == 0
    config = json.loads((tmp_path / "merged" / "config.json").read_text())
    assert [config["id2label"][str(i)] for i in range(3)] == list(NAMES)
    merged = transformers.AutoModelForSequenceClassification.from_pretrained(tmp_path / "merged", dtype=torch.float32)
    reference.assert_close(torch_logits(merged.eval()), expected)
    capsys.readouterr()


# Our own form.

CHAIN = jp.chain(jp.lora(2, targets=["q_proj"]), jp.lora_fa(2, targets=["v_proj"], store_a=False))


def own_form(folder, method=CHAIN):
    model, params = tiny.model()
    new, trainable, frozen = jp.setup(method, model, params, jax.random.key(1))
    mine = tree.combine(reference.randomise(trainable), frozen)
    export_adapter(folder, mine, method, model.config)
    return model, params, new, mine


def test_several_methods_come_back_bit_for_bit(tmp_path):
    model, params, new, mine = own_form(tmp_path / "adapter")
    again, restored, method = attach(tmp_path / "adapter", model, params)
    assert json.dumps(method.specs) == json.dumps(CHAIN.specs)
    before, after = tree.flatten(mine), tree.flatten(restored)
    assert before.keys() == after.keys()
    for path, leaf in before.items():
        assert leaf.dtype == after[path].dtype and np.array_equal(leaf, after[path]), path
    np.testing.assert_array_equal(again.apply(restored, tiny.batch()), new.apply(mine, tiny.batch()))
    with pytest.raises(KeyError, match="JAXPEFT"):
        peft.PeftConfig.from_pretrained(tmp_path / "adapter")


def test_adapters_in_one_part_of_a_cut_stack_come_back(tmp_path):
    """Those of the last layer alone, in a stack that the method itself cuts."""
    model, params = tiny.model()
    cut = jp.Method(prepare=lambda params, view: tree.cut_layers(params, 2))
    method = jp.chain(cut, jp.lora(2, targets=r"layers_2_3/.*q_proj"), jp.lora_fa(2, targets=r"layers_2_3/.*v_proj"))
    _, trainable, frozen = jp.setup(method, model, params, jax.random.key(1))
    mine = tree.combine(reference.randomise(trainable), frozen)
    export_adapter(tmp_path / "adapter", mine, method, model.config)
    _, leaves = import_adapter(tmp_path / "adapter", model.config, params)
    assert leaves and all(path.startswith("layers_2_3/") for path in leaves)
    _, trainable, frozen = jp.setup(
        method, model, tree.unflatten({**tree.flatten(params), **leaves}), jax.random.key(2)
    )
    after = {**trainable, **frozen}
    assert after.keys() == tree.flatten(mine).keys()
    for path, leaf in tree.flatten(mine).items():
        np.testing.assert_array_equal(leaf, after[path], err_msg=path)


def test_what_is_not_whole_is_refused(tmp_path):
    model, params, _, _ = own_form(tmp_path / "adapter")
    own = tmp_path / "adapter" / "jaxpeft.json"
    text = own.read_text()

    def refused(match):
        with pytest.raises(InputError, match=match) as error:
            import_adapter(tmp_path / "adapter", model.config, params)
        assert "\n" not in str(error.value)

    other = jax.tree.map(lambda x: x + 1, params)
    with pytest.raises(InputError, match="the values of .* differ from those it was trained beside$"):
        import_adapter(tmp_path / "adapter", model.config, other)  # without the advice to remove what is needed
    own.write_text(json.dumps({name: value for name, value in json.loads(text).items() if name != "base"}))
    refused("jaxpeft.json: lacks base$")
    own.write_text(json.dumps({**json.loads(text), "sha256": "0"}))
    refused("is an adapter in jaxpeft's own form without a jaxpeft.json that speaks of its adapter_model.safetensors")
    own.unlink()
    refused("is an adapter in jaxpeft's own form without a jaxpeft.json")
    own.write_text(json.dumps({**json.loads(text), "method": [["lorra", {}]]}))
    refused("jaxpeft.json: unknown method 'lorra'")


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """An adapter in our own form, and its base."""
    folder = tmp_path_factory.mktemp("own") / "adapter"
    model, params, _, _ = own_form(folder)
    return folder, model, params


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda tensors, name: tensors | {"norm/scale": np.ones(32, np.float32)}, "holds norm/scale, which is no part"),
        (lambda tensors, name: tensors | {"more": np.ones(3, np.float32)}, "holds more, which is no part of "),
        (lambda tensors, name: {x: y for x, y in tensors.items() if x != name}, "lacks {name} of shape"),
        (lambda tensors, name: {x + "x" * (x == name): y for x, y in tensors.items()}, "holds {name}x, which is no"),
        (lambda tensors, name: tensors | {name: tensors[name][..., :1].copy()}, "{name} has shape .*1.*, where .* has"),
        (lambda tensors, name: tensors | {name: np.float32(0)[None]}, "{name} has shape .1,., where "),
        (lambda tensors, name: tensors | {name: tensors[name].astype(np.int32)}, "{name} is int32, where .* has float"),
        (
            lambda tensors, name: tensors | {name: tensors[name] * np.float32("nan")},
            "{name} holds nan, expected finite",
        ),
        (
            lambda tensors, name: tensors | {name: tensors[name] + np.float32("inf")},
            "{name} holds inf, expected finite",
        ),
    ],
)
def test_an_adapter_holds_what_its_method_adds_and_nothing_else(change, said, whole, tmp_path):
    folder, model, params = whole
    copied = tmp_path / "adapter"
    shutil.copytree(folder, copied)
    weights = copied / "adapter_model.safetensors"
    tensors = load_file(weights)
    name = sorted(tensors)[0]
    save_file(change(tensors, name), weights)
    own = json.loads((copied / "jaxpeft.json").read_text())
    own["sha256"] = hashlib.sha256(weights.read_bytes()).hexdigest()
    (copied / "jaxpeft.json").write_text(json.dumps(own))
    with pytest.raises(InputError, match=said.format(name=name)) as error:
        import_adapter(copied, model.config, params)
    assert "\n" not in str(error.value)
