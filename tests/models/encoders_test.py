"""BERT and RoBERTa against PyTorch transformers, float32: embedding, layers, outputs, gradients, every head.

Every case is a random small model made and saved by transformers and loaded by us. Weights are larger than a fresh
model's, so that outputs and attention are far from uniform. Rows have different lengths, padded on the right.
"""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

import jaxpeft as jp
from jaxpeft import assets, models, tree
from jaxpeft.errors import InputError
from jaxpeft.peft import attach, export_adapter

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

BERT = {
    "vocab_size": 61,
    "hidden_size": 32,
    "intermediate_size": 40,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "max_position_embeddings": 40,
    "type_vocab_size": 2,
}
ROBERTA = {**BERT, "type_vocab_size": 1, "pad_token_id": 1}

# name: (transformers' class, its configuration)
CASES = {
    "bert": ("BertModel", BERT),
    "bert, masked LM": ("BertForMaskedLM", BERT),
    "bert, masked LM, tanh gelu": ("BertForMaskedLM", {**BERT, "hidden_act": "gelu_new", "num_hidden_layers": 1}),
    "bert, classifier": ("BertForSequenceClassification", {**BERT, "num_labels": 3}),
    "bert, regression, relu": ("BertForSequenceClassification", {**BERT, "num_labels": 1, "hidden_act": "relu"}),
    "roberta": ("RobertaModel", ROBERTA),
    "roberta, masked LM": ("RobertaForMaskedLM", {**ROBERTA, "layer_norm_eps": 1e-5}),
    "roberta, classifier": ("RobertaForSequenceClassification", {**ROBERTA, "num_labels": 3}),
}
LENGTHS = np.array([24, 9, 1])
MASK = np.arange(24) < LENGTHS[:, None]


def reference(case, seed=0):
    """transformers' random model. Its biases and the scales of its norms are random too."""
    name, changes = CASES[case]
    kind = transformers.RobertaConfig if name.startswith("Roberta") else transformers.BertConfig
    config = kind(**changes)
    config.architectures = [name]
    torch.manual_seed(seed)
    model = getattr(transformers, name)._from_config(config, attn_implementation="eager")
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim == 2:
                parameter.normal_(0, 0.2)
            else:
                parameter.normal_(1.0 if "orm.weight" in name else 0.0, 0.2)
    return model.float().eval()


def inputs(case):
    """(transformers' arguments, our batch)."""
    rng = np.random.default_rng(1)
    types = rng.integers(0, CASES[case][1]["type_vocab_size"], MASK.shape)
    tokens = np.where(MASK, rng.integers(2, 61, MASK.shape), 1 if "roberta" in case else 0)
    theirs = {"input_ids": tokens, "attention_mask": MASK.astype(int), "token_type_ids": types}
    ours = {"tokens": tokens, "segment_ids": MASK, "token_types": types}
    return (
        {name: torch.tensor(x) for name, x in theirs.items()},
        {name: jnp.asarray(x, jnp.int32) for name, x in ours.items()},
    )


def both(case, folder):
    """(transformers' model, ours, our parameters)."""
    theirs = reference(case)
    theirs.save_pretrained(folder)
    return theirs, *jp.load_pretrained(folder, jnp.float32)


def close(found, expected, tolerance, what):
    found, expected = np.asarray(found, np.float64), np.asarray(expected, np.float64)
    assert found.shape == expected.shape, what
    error = np.abs(found - expected).max() / np.abs(expected).max()
    assert error < tolerance, f"{what}: relative error {error:.2e}"


def compiled(function, *args):
    """Compiled without LLVM's optimisations: these programs run once."""
    return jax.jit(function).lower(*args).compile({"xla_backend_optimization_level": 0})(*args)


def their_output(model, arguments):
    """What the model's head gives, or the stream where it has none."""
    found = model(**arguments)
    return found.logits if "logits" in found else found.last_hidden_state


def our_output(model):
    """(params, batch) -> the same of ours."""
    return model.classify if model.config.num_labels else model.apply


def counted(x):
    """Rows' results, or those of the positions that are not padding."""
    return x if x.ndim == 2 else x[MASK]


@pytest.mark.parametrize("case", ["bert, masked LM", "roberta, masked LM"])
def test_embedding_and_each_layer_equal_transformers(case, tmp_path):
    theirs, model, params = both(case, tmp_path / "model")
    arguments, batch = inputs(case)
    with torch.no_grad():
        expected = theirs(**arguments, output_hidden_states=True).hidden_states

    def rungs(params):
        """The outputs of the embedding and of each layer, (layers + 1, B, S, d)."""
        x, ctx = model.stack.embed(params, batch, None)

        def layer(x, inputs):
            weights, index = inputs
            y, _ = model.stack.block(weights, x, {**ctx, "layer": index}, None, "layers")
            return y, y

        _, outputs = jax.lax.scan(layer, x, (params["layers"], jnp.arange(model.config.num_hidden_layers)))
        return jnp.concatenate([x[None], outputs])

    outputs = compiled(rungs, params)
    assert len(outputs) == len(expected)
    for i, state in enumerate(expected):
        close(outputs[i][MASK], state[torch.tensor(MASK)], 1e-4 if i else 1e-6, f"after layer {i}")


@pytest.mark.parametrize("case", CASES)
def test_outputs_and_gradients_equal_transformers(case, tmp_path):
    theirs, model, params = both(case, tmp_path / "model")
    arguments, batch = inputs(case)
    expected = counted(their_output(theirs, arguments))
    cotangent = np.random.default_rng(2).normal(size=expected.shape).astype(np.float32)
    (expected * torch.tensor(cotangent)).sum().backward()

    def total(params):
        output = our_output(model)(params, batch)
        return (counted(output) * cotangent).sum(), output

    (_, output), gradients = compiled(jax.value_and_grad(total, has_aux=True), params)
    assert output.dtype == jnp.float32
    close(counted(output), expected.detach(), 1e-4, "output")

    # Written as a checkpoint, the gradients get transformers' names and layout.
    jp.save_pretrained(tmp_path / "gradients", tmp_path / "model", gradients)
    found = load_file(tmp_path / "gradients" / "model.safetensors")
    wanted = {
        name: parameter.grad.numpy() for name, parameter in theirs.named_parameters() if parameter.grad is not None
    }
    assert found.keys() == wanted.keys()
    largest = max(np.abs(gradient).max() for gradient in wanted.values())
    for name, gradient in wanted.items():
        if name.endswith("key.bias"):  # exactly zero: it moves all scores of a query alike
            assert np.abs(found[name]).max() < 1e-5 * largest and np.abs(gradient).max() < 1e-5 * largest
        else:
            close(found[name], gradient, 1e-3, f"gradient of {name}")


@pytest.mark.parametrize("case", ["bert, masked LM", "roberta"])
def test_packed_rows_equal_separate_ones(case, tmp_path):
    """Two texts and padding in one row, by segment ids and positions, against transformers on each alone."""
    theirs, model, params = both(case, tmp_path / "model")
    tokens = np.random.default_rng(1).integers(2, 61, 20)
    batch = {
        "tokens": jnp.asarray([[*tokens, 0, 0, 0, 0]], jnp.int32),
        "positions": jnp.asarray([[*range(9), *range(11), *[0] * 4]], jnp.int32),
        "segment_ids": jnp.asarray([[1] * 9 + [2] * 11 + [0] * 4], jnp.int32),
    }
    output = compiled(lambda p: model.apply(p, batch), params)
    for first, end in ((0, 9), (9, 20)):
        with torch.no_grad():
            expected = their_output(theirs, {"input_ids": torch.tensor(tokens[None, first:end])})
        close(output[:, first:end], expected, 1e-4, f"tokens {first} to {end}")
    assert np.isfinite(output).all()


def test_token_types_are_zero_where_the_batch_has_none(tmp_path):
    _, model, params = both("bert", tmp_path / "model")
    _, batch = inputs("bert")
    zero = {**batch, "token_types": jnp.zeros_like(batch["tokens"])}
    without = {name: x for name, x in batch.items() if name != "token_types"}
    found, same, other = (compiled(model.apply, params, b) for b in (without, zero, batch))
    np.testing.assert_array_equal(found, same)
    assert np.abs(found - other).max() > 0.1


@pytest.mark.parametrize("case", ["bert, masked LM", "roberta, classifier"])
def test_bfloat16_follows_float32(case, tmp_path):
    theirs = reference(case)
    theirs.save_pretrained(tmp_path / "model")
    model, params = jp.load_pretrained(tmp_path / "model", jnp.bfloat16)
    arguments, batch = inputs(case)
    output = compiled(our_output(model), params, batch)
    assert output.dtype == jnp.float32
    with torch.no_grad():
        expected = counted(their_output(theirs, arguments)).numpy()
    error = np.linalg.norm(counted(output) - expected) / np.linalg.norm(expected)
    assert error < 0.03


# Checkpoints.


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


@pytest.mark.parametrize("case", ["bert", "bert, masked LM", "roberta", "roberta, masked LM"])
def test_a_trunk_with_or_without_its_prefix_gets_a_new_classifier(case, tmp_path):
    """Saved with it, transformers reads labels and weights."""
    both(case, tmp_path / "model")
    labels = ("no", "yes", "maybe")
    model, params = jp.load_pretrained(tmp_path / "model", jnp.float32, labels, jax.random.key(3))
    before = load_file(tmp_path / "model" / "model.safetensors")
    pooled = case == "bert"  # only BertModel brings the pooler
    dense = np.asarray(params["classifier"]["dense"]["kernel"]).T
    assert np.array_equal(dense, before.get("pooler.dense.weight")) == pooled
    assert (params["classifier"]["out_proj"]["kernel"] != 0).all()

    jp.save_pretrained(tmp_path / "with", tmp_path / "model", params, labels=labels)
    again = transformers.AutoModelForSequenceClassification.from_pretrained(tmp_path / "with").eval()
    assert again.config.id2label == dict(enumerate(labels))
    arguments, batch = inputs(case)
    with torch.no_grad():
        close(compiled(model.classify, params, batch), again(**arguments).logits, 1e-4, "logits")
    reloaded, same = jp.load_pretrained(tmp_path / "with", jnp.float32)
    assert reloaded.config.num_labels == 3
    assert jax.tree.all(jax.tree.map(np.array_equal, params, same))


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
    ("changes", "says"),
    [
        ({"hidden_act": "mish"}, "hidden_act 'mish' is not supported; supported: gelu, "),
        ({"architectures": ["BertForQuestionAnswering"]}, "architecture 'BertForQuestionAnswering' is not supported"),
        ({"position_embedding_type": "relative_key"}, "position_embedding_type 'relative_key' is not supported"),
        ({"is_decoder": True}, "is_decoder True is not supported"),
        ({"architectures": ["BertForMaskedLM"], "tie_word_embeddings": False}, "tie_word_embeddings False"),
        ({"num_attention_heads": 5}, "hidden_size 32 is not a multiple of num_attention_heads 5"),
        ({"num_hidden_layers": 0}, "num_hidden_layers 0 should be a whole number of at least 1"),
        ({"vocab_size": None}, "the field 'vocab_size' is missing"),
    ],
)
def test_what_is_not_supported_is_one_line(changes, says):
    raw = {**BERT, "model_type": "bert", **changes}
    with pytest.raises(InputError) as error:
        models.family(raw).from_hf(raw)
    assert says in str(error.value) and "\n" not in str(error.value)


# Methods.


def perturbed(model, params, scale=1.0):
    """(model with LoRA everywhere, its parameters with nonzero factors)."""
    new, trainable, frozen = jp.setup(jp.lora(rank=3, alpha=6), model, params, jax.random.key(4))
    keys = jax.random.split(jax.random.key(5), len(trainable))
    noisy = {p: scale * 0.2 * jax.random.normal(k, x.shape) for k, (p, x) in zip(keys, trainable.items(), strict=True)}
    return new, noisy, frozen


@pytest.mark.parametrize("case", ["bert, classifier", "roberta, masked LM"])
def test_parts_make_up_the_block(case, tmp_path):
    _, base, params = both(case, tmp_path / "model")
    model, trainable, frozen = perturbed(base, params)
    params = tree.combine(trainable, frozen)
    x, ctx = model.stack.embed(params, inputs(case)[1], None)
    layer = jax.tree.map(lambda leaf: leaf[1], params["layers"])
    ctx = {**ctx, "layer": jnp.int32(1)}

    def in_parts(layer, x):
        for part in model.stack.parts:
            x, _ = part(layer, x, ctx, None, "layers")
        return x

    whole = compiled(lambda layer, x: model.stack.block(layer, x, ctx, None, "layers")[0], layer, x)
    assert len(model.stack.parts) == 2
    np.testing.assert_array_equal(whole, compiled(in_parts, layer, x))


@pytest.mark.parametrize("targets", ["all-linear", "attention", "mlp"])
def test_lora_finds_the_sites(targets, tmp_path):
    _, model, params = both("bert, classifier", tmp_path / "model")
    sites = {
        "attention": {f"layers/self_attn/{name}" for name in ("q_proj", "k_proj", "v_proj", "o_proj")},
        "mlp": {"layers/mlp/up_proj", "layers/mlp/down_proj"},
    }
    expected = sites["attention"] | sites["mlp"] if targets == "all-linear" else sites[targets]
    _, trainable, _ = jp.setup(jp.lora(rank=2, targets=targets), model, params, jax.random.key(0))
    assert {path.rsplit("/lora/", 1)[0] for path in trainable} == expected


@pytest.mark.parametrize("save", ["matmuls", "blocks"])
@pytest.mark.parametrize("case", ["bert, classifier", "roberta, masked LM"])
def test_a_memory_plan_changes_no_gradient(case, save, tmp_path):
    _, base, params = both(case, tmp_path / "model")
    model, trainable, frozen = perturbed(base, params)
    batch = inputs(case)[1]

    def gradients(model):
        def total(trainable):
            output = our_output(model)(tree.combine(trainable, frozen), batch)
            return (counted(output) ** 2).sum()

        return compiled(jax.grad(total), trainable)

    found, expected = gradients(jp.remat(model, save)), gradients(model)
    for path, gradient in expected.items():
        close(found[path], gradient, 1e-4, path)


@pytest.mark.parametrize("case", ["bert", "bert, classifier", "roberta, classifier"])
def test_adapters_are_pefts(case, tmp_path):
    """Exported, PEFT computes the same; imported, they come back; and PEFT's own are read."""
    peft = pytest.importorskip("peft")
    theirs, base, params = both(case, tmp_path / "model")
    method = jp.chain(jp.lora(rank=3, alpha=6), jp.full("^classifier/"))
    model, trainable, frozen = perturbed(base, params)
    params = tree.combine(trainable, frozen)
    export_adapter(tmp_path / "adapter", params, method, model.config, tmp_path / "model")
    arguments, batch = inputs(case)

    def output_of(model):
        with torch.no_grad():
            return counted(their_output(model, arguments))

    expected = output_of(theirs)
    adapted = peft.PeftModel.from_pretrained(theirs, tmp_path / "adapter").eval()
    found = counted(compiled(our_output(model), params, batch))
    close(found, output_of(adapted), 1e-4, "output")
    assert np.abs(found - expected.numpy()).max() > 0.05

    again, restored, _ = attach(tmp_path / "adapter", base, tree.unflatten(frozen))
    np.testing.assert_array_equal(counted(compiled(our_output(again), restored, batch)), found)

    kind = None if base.config.num_labels else "FEATURE_EXTRACTION"  # with SEQ_CLS, PEFT saves a classifier too
    own = peft.LoraConfig(task_type=kind, r=4, target_modules=["query", "output.dense"])
    own = peft.get_peft_model(reference(case), own).eval()
    with torch.no_grad():
        for name, parameter in own.named_parameters():
            if ".lora_" in name:
                parameter.normal_(0, 0.2)
    own.save_pretrained(tmp_path / "own")
    again, restored, _ = attach(tmp_path / "own", base, tree.unflatten(frozen))
    close(counted(compiled(our_output(again), restored, batch)), output_of(own), 1e-4, "PEFT's adapter")


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
