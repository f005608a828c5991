"""Prompt tuning: PEFT's numbers and starts, packed and padded rows, decoding, chains, its cost, what is refused."""

import jax
import jax.numpy as jnp
import numpy as np
import peft
import pytest
import torch

import jaxpeft as jp
from jaxpeft import assets, hf, noise, tree, zeroth_order
from jaxpeft.backward.flops import count_flops
from jaxpeft.backward.residuals import remat
from jaxpeft.generate import generate
from jaxpeft.models import decoder
from jaxpeft.peft import attach, export_adapter, import_adapter
from jaxpeft.quant import dense, is_packed
from jaxpeft.train.loss import completion_loss
from tests import beside, tiny
from tests.methods.unipt_test import encoder
from tests.peft import classify_test, reference

P = 5
OPT = {"ffn_dim": 56, "max_position_embeddings": 64, "word_embed_proj_dim": 32, "tie_word_embeddings": True}


def of_peft(base, **settings):
    """PEFT's model behind a prompt, and the prompt."""
    config = peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=P, **settings)
    torch.manual_seed(0)
    model = peft.get_peft_model(reference.torch_base(base), config).eval()
    return model, model.prompt_encoder["default"].embedding.weight


@pytest.mark.parametrize(("kind", "sizes"), [("llama", {}), ("opt", OPT)])
def test_outputs_gradients_and_adapters_are_those_of_peft(kind, sizes, tmp_path):
    base = reference.write_base(tmp_path / "base", kind, **sizes)
    theirs, prompt = of_peft(base)
    theirs.save_pretrained(tmp_path / "theirs")
    loaded, params = reference.load(base)
    model, adapted, method = attach(tmp_path / "theirs", loaded, params)
    assert method.specs == jp.prompt(P).specs
    trainable, rest = tree.split(adapted, method.trainable)
    np.testing.assert_array_equal(trainable.pop("prompt/embedding"), prompt.detach().numpy())
    assert not trainable
    weights = np.random.default_rng(0).normal(size=(*reference.TOKENS.shape, 97)).astype(np.float32)

    def ours(own):
        logits = model.apply(tree.unflatten({**rest, "prompt/embedding": own}), {"tokens": reference.TOKENS})
        return jnp.sum(logits * weights), logits

    gradient, logits = jax.jit(jax.grad(ours, has_aux=True))(prompt.detach().numpy())
    expected = theirs(torch.tensor(reference.TOKENS).long()).logits[:, P:]
    (expected * torch.tensor(weights)).sum().backward()
    expected = expected.detach().numpy()
    reference.assert_close(np.asarray(logits), expected)
    reference.assert_close(np.asarray(gradient), prompt.grad.numpy())
    assert np.abs(expected - reference.torch_logits(reference.torch_base(base))).max() > 0.1

    export_adapter(tmp_path / "ours", adapted, method, loaded.config, base)
    reference.assert_close(reference.with_adapter(base, tmp_path / "ours")[:, P:], expected)
    wider = reference.load(reference.write_base(tmp_path / "wider", hidden_size=64))[0]
    with pytest.raises(jp.InputError, match=r"another base: prompt_embeddings \(5, 32\) should be \(tokens, 64\)"):
        import_adapter(tmp_path / "theirs", wider.config)


@pytest.mark.parametrize("text", ["return the largest of all of these numbers", "a"])
def test_a_text_is_cut_or_repeated_as_by_peft(text):
    folder = str(assets.MODEL)
    _, theirs = of_peft(folder, prompt_tuning_init="TEXT", prompt_tuning_init_text=text, tokenizer_name_or_path=folder)
    base, params = reference.load(folder)
    _, trainable, _ = jp.setup(jp.prompt(P, "text", text, folder), base, params, jax.random.key(0))
    np.testing.assert_array_equal(trainable["prompt/embedding"], theirs.detach().numpy())


def test_starts():
    """Rows of the table, of different words; N(0, 1); what is there already stays."""
    _, trainable, rest = beside.start(jp.prompt(64), np.dtype(jnp.bfloat16))
    own, table = trainable["prompt/embedding"], np.asarray(rest["embed_tokens/embedding"], np.float32)
    assert own.dtype == np.float32
    words = [int(np.flatnonzero((table == row).all(1))[0]) for row in np.asarray(own)]
    assert len(set(words)) > 30
    _, trainable, _ = beside.start(jp.prompt(64, "random"))
    own = np.asarray(trainable["prompt/embedding"])
    assert own.shape == (64, 32) and abs(own.mean()) < 0.1 and abs(own.std() - 1) < 0.1


@pytest.fixture(scope="module", params=[{}, {"model_type": "mistral", "sliding_window": 4}], ids=["llama", "window"])
def start(request):
    """(model, parameters) of the tiny decoder behind a prompt."""
    model, trainable, rest = beside.start(jp.prompt(P, "random"), **request.param)
    return model, jp.combine(trainable, rest)


def test_each_text_of_a_packed_or_padded_row_is_as_by_itself(start):
    model, params = start
    apply = jax.jit(model.apply)
    rng = np.random.default_rng(1)
    one, other = (rng.integers(0, 97, (1, count)).astype(np.int32) for count in (6, 9))
    alone = apply(params, {"tokens": one}), apply(params, {"tokens": other})
    packed = {
        "tokens": np.concatenate([one, other], axis=1),
        "positions": np.array([[*range(6), *range(9)]], np.int32),
        "segment_ids": np.array([[1] * 6 + [2] * 9], np.int32),
    }
    found = apply(params, packed)
    np.testing.assert_allclose(found, np.concatenate(alone, axis=1), rtol=1e-4, atol=1e-4)
    for before, after in ((3, 0), (0, 3)):
        around = ((0, 0), (before, after))
        padded = {
            "tokens": np.pad(one, around, constant_values=7),
            "positions": np.pad(np.arange(6, dtype=np.int32)[None], around),
            "segment_ids": np.pad(np.ones((1, 6), np.int32), around),
        }
        found = apply(params, padded)[:, before : before + 6]
        np.testing.assert_allclose(found, alone[0], rtol=1e-4, atol=1e-4)


def test_decoding_with_the_cache_equals_decoding_without(start):
    model, params = start
    assert model.config.max_position_embeddings == 128 - P
    prompts = [[5], [7, 11, 13], list(range(20, 31))]
    apply = jax.jit(lambda tokens: jnp.argmax(model.apply(params, {"tokens": tokens}), -1))

    def uncached(prompt, count=5):
        ids = list(prompt)
        for _ in range(count):
            padded = np.zeros((1, 16), np.int32)
            padded[0, : len(ids)] = ids
            ids.append(int(apply(padded)[0, len(ids) - 1]))
        return ids[len(prompt) :]

    assert generate(model, params, prompts, 5, eos=()) == [uncached(prompt) for prompt in prompts]


def test_the_prompt_is_computed_once_per_batch_and_by_no_token_that_is_decoded():
    """Products of a forward pass beyond those of a prefix as long: of p tokens, whatever the rows."""
    model, trainable, rest = beside.start(jp.prompt(16))
    prefixed, prefix, _ = beside.start(jp.prefix(16, "zero"))
    base, original = tiny.model()
    params = jp.combine(trainable, rest)

    def beyond(rows):
        batch = tiny.batch(rows, 64)
        of_prefix = beside.forward_flops(prefixed, jp.combine(prefix, rest), batch)
        return beside.forward_flops(model, params, batch) - of_prefix

    of_tokens = beside.forward_flops(base, original, {"tokens": np.zeros((1, 16), np.int32)})
    assert beyond(2) == beyond(8) == of_tokens

    def decoded(model):
        cache = jax.eval_shape(lambda: model.stack.init_cache(2, 32))
        one = {name: jax.ShapeDtypeStruct((2, 1), np.int32) for name in ("tokens", "positions", "segment_ids")}
        step = jax.make_jaxpr(lambda params, one, cache: model.stack.run(model.stack, params, one, None, cache))
        return count_flops(step(params, one, cache))

    assert decoded(model) <= decoded(base) * 1.2


@pytest.mark.slow
@pytest.mark.parametrize("form", ["loops", pytest.param("policy", marks=pytest.mark.slow)])
def test_beside_lora_in_either_order_under_a_memory_plan(form):
    """The prompt goes through the adapters, too, wherever it stands in the chain."""
    members, batch, found = {"prompt": jp.prompt(P), "lora": jp.lora(2)}, tiny.batch(), []
    for order in ("prompt+lora", "lora+prompt"):
        method = jp.chain(*(members[name] for name in order.split("+")))
        model, trainable, rest = beside.start(method)
        trainable = beside.moved(trainable)
        plain = len(found) == 0
        model = model if plain else remat(model, "matmuls", form=form, trained=method.changes)
        loss = lambda own, model=model, rest=rest: completion_loss(model, jp.combine(own, rest), batch)[0]
        found.append(jax.jit(jax.value_and_grad(loss))(trainable))
    (value, expected), (same, gradients) = found
    np.testing.assert_allclose(same, value, rtol=1e-5)
    assert expected.keys() == gradients.keys()
    for path, leaf in expected.items():
        scale = np.abs(leaf).max()
        assert scale > 0, path
        np.testing.assert_allclose(gradients[path], leaf, rtol=1e-4, atol=2e-5 * scale, err_msg=path)


def test_a_step_of_mezo_moves_the_prompt_and_what_it_goes_through():
    """Noise on the prompt and on adapters in the layers, made where they are read, is that of whole leaves."""
    model, trainable, rest = beside.start(jp.chain(jp.prompt(P), jp.lora(2)))
    trainable = beside.moved(trainable)
    words, eps = noise.draw(jax.random.key(3)), jnp.float32(0.1)
    noisy = zeroth_order.perturbed(model, frozenset(trainable), words, eps, zeroth_order.Settings("mezo", eps))
    whole = beside.noisy(trainable, words, eps)
    found = jax.jit(noisy.apply)(jp.combine(trainable, rest), tiny.batch())
    np.testing.assert_allclose(found, jax.jit(model.apply)(jp.combine(whole, rest), tiny.batch()), rtol=1e-3, atol=1e-3)


@pytest.mark.slow
def test_a_cut_stack_and_packed_kernels():
    method = jp.chain(jp.full("last:1"), jp.prompt(P, "random"))
    model, trainable, rest = beside.start(method)
    whole, own, others = beside.start(jp.prompt(P, "random"))
    own = {"prompt/embedding": trainable["prompt/embedding"]}
    expected = whole.apply(jp.combine(own, others), tiny.batch())
    np.testing.assert_allclose(model.apply(jp.combine(trainable, rest), tiny.batch()), expected, rtol=1e-4, atol=1e-4)
    model, trainable, rest = beside.start(jp.chain(jp.quantize(), jp.prompt(P, "random")))
    plain = {path: dense(leaf) if is_packed(leaf) else leaf for path, leaf in rest.items()}
    assert sum(map(is_packed, rest.values())) == 7 and set(trainable) == {"prompt/embedding"}
    found = jax.jit(model.apply)(jp.combine(trainable, rest), tiny.batch())
    np.testing.assert_allclose(found, whole.apply(jp.combine(trainable, plain), tiny.batch()), rtol=1e-3, atol=1e-3)


def test_classifiers_are_those_of_peft(tmp_path):
    """Of rows without padding, which transformers does not see behind a prompt."""
    folder = classify_test.write_base(tmp_path / "llama", "llama")
    tokens = reference.TOKENS[:, :13].clip(2)

    def of_torch(model):
        with torch.no_grad():
            seen = torch.ones(tokens.shape).long()
            return model.eval()(input_ids=torch.tensor(tokens).long(), attention_mask=seen).logits.numpy()

    config = peft.PromptTuningConfig(task_type="SEQ_CLS", num_virtual_tokens=P)
    theirs = peft.get_peft_model(classify_test.torch_base(folder), config)
    theirs.save_pretrained(tmp_path / "theirs")
    base, params = hf.load_pretrained(folder, jnp.float32, classify_test.NAMES)
    model, adapted, method = attach(tmp_path / "theirs", base, params)
    assert [spec.name for spec in method.specs] == ["prompt", "full"]
    reference.assert_close(np.asarray(model.classify(adapted, {"tokens": tokens})), of_torch(theirs))

    adapted = tree.unflatten(reference.randomise(tree.flatten(adapted)) | dict(tree.split(adapted, method.changes)[1]))
    export_adapter(tmp_path / "ours", adapted, method, base.config, folder, labels=classify_test.NAMES)
    ours = peft.PeftModel.from_pretrained(classify_test.torch_base(folder), tmp_path / "ours")
    reference.assert_close(np.asarray(model.classify(adapted, {"tokens": tokens})), of_torch(ours))


@pytest.mark.slow
def test_rows_are_classified_behind_it():
    """At their last token, whatever is behind it."""
    labelled = {**tiny.CONFIG, "architectures": ["LlamaForSequenceClassification"], "num_labels": 3}
    base = decoder.from_hf(labelled)
    params = base.init(jax.random.key(0), {})
    model, trainable, rest = jp.setup(jp.prompt(P, "random"), base, params, jax.random.key(0))
    batch, other, counts = beside.padded()
    found = [model.classify(jp.combine(trainable, rest), rows) for rows in (batch, other)]
    assert found[0].shape == (3, 3) and counts.sum() < counts.size
    np.testing.assert_allclose(*found, rtol=1e-5, atol=1e-5)
    assert np.abs(found[0] - base.classify(params, batch)).max() > 1e-3


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"length": 0}, "prompt: length 0 must be at least 1"),
        ({"init": "ones"}, "prompt: init 'ones' is not one of vocabulary, text, random"),
        ({"init": "text"}, "prompt: init=text needs a text: words to start from"),
        ({"init": "text", "text": "a"}, "prompt: init=text needs a tokenizer: a folder or hub id"),
        ({"text": "a"}, "prompt: text 'a' is of init=text; here init is vocabulary"),
        ({"length": 128}, "prompt: length 128 leaves no room; the model has 128 positions"),
    ],
)
def test_mistakes_are_one_line(settings, message):
    with pytest.raises(jp.InputError, match=message):
        beside.start(jp.prompt(**settings))


def test_a_text_that_the_model_has_no_words_for():
    text = "return the largest of all of these numbers"
    with pytest.raises(jp.InputError, match=r"prompt: tokenizer .*: token \d+ of the text; the model has 97 words"):
        beside.start(jp.prompt(P, "text", text, str(assets.MODEL)))
    with pytest.raises(jp.InputError, match="no-such-folder"):
        beside.start(jp.prompt(P, "text", text, "./no-such-folder"))


def test_what_it_cannot_stand_in_front_of():
    base, params = encoder()
    with pytest.raises(jp.InputError, match="prompt: bert is an encoder, whose prompt would read each row; use prefix"):
        jp.setup(jp.prompt(P), base, params, jax.random.key(0))
    with pytest.raises(jp.InputError, match="prompt: another method of the chain runs the layers in its own way"):
        beside.start(jp.chain(jp.lst(4), jp.prompt(P)))
    with pytest.raises(jp.InputError, match="lst: runs the layers in its own way, and another .* feeds them"):
        beside.start(jp.chain(jp.prompt(P), jp.lst(4)))
    for chained in (jp.chain(jp.prompt(P), jp.prefix(P, "zero")), jp.chain(jp.prefix(P, "zero"), jp.prompt(P))):
        model, trainable, rest = beside.start(chained)
        with pytest.raises(jp.InputError, match="another method of the chain gives the layers keys of its own"):
            model.apply(jp.combine(trainable, rest), tiny.batch())
    with pytest.raises(jp.InputError, match="prompt: has no merged form; serve it as the first entries of a cache"):
        jp.prompt(P).merge({})
