"""Decoding: the cache changes nothing, batches change nothing, sampling draws from what it says."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxpeft as jp
from jaxpeft import generate as decoding
from jaxpeft import hf, tree
from jaxpeft.errors import InputError, RunError
from jaxpeft.generate import generate, keep_likeliest
from tests import tiny

PROMPTS = [[5], [7, 11, 13], list(range(20, 60)), [96, 0, 3, 4], list(range(33))]


def uncached(model, params, prompt, count):
    """Greedy decoding that computes everything again for each token."""
    ids = list(prompt)
    length = len(prompt) + count
    apply = jax.jit(lambda tokens: jnp.argmax(model.apply(params, {"tokens": tokens}), -1))
    for _ in range(count):
        padded = np.zeros((1, length), np.int32)
        padded[0, : len(ids)] = ids
        ids.append(int(apply(padded)[0, len(ids) - 1]))
    return ids[len(prompt) :]


@pytest.mark.parametrize("changes", [{}, {"model_type": "mistral", "sliding_window": 8}])
def test_a_batch_with_the_cache_equals_each_prompt_without(changes):
    model, params = tiny.model(**changes)
    together = generate(model, params, PROMPTS, 9, eos=())
    assert together == [uncached(model, params, prompt, 9) for prompt in PROMPTS]
    assert len({tuple(ids) for ids in together}) > 1


def test_the_result_does_not_depend_on_the_batch():
    model, params = tiny.model()
    settings = {"temperature": 1.0, "top_p": 0.9, "key": jax.random.key(3), "eos": ()}
    assert generate(model, params, PROMPTS, 6, **settings) == generate(
        model, params, PROMPTS, 6, batch_size=2, **settings
    )


@pytest.mark.parametrize("settings", [{}, {"temperature": 1.0, "top_p": 0.9, "key": jax.random.key(3)}])
def test_a_stream_brings_the_same_tokens_in_pieces(settings):
    model, params = tiny.model()
    whole = generate(model, params, PROMPTS[1:2], 40, eos=(), **settings)[0]
    pieces = list(decoding.stream(model, params, PROMPTS[1], 40, eos=(), **settings))
    assert [token for piece in pieces for token in piece] == whole and pieces[0] == whole[:1] and [] not in pieces
    end = whole[20]
    cut = decoding.stream(model, params, PROMPTS[1], 40, eos=[end], **settings)
    assert [token for piece in cut for token in piece] == whole[: whole.index(end)]
    with pytest.raises(InputError, match="prompt 0 is empty"):
        decoding.stream(model, params, [], 4)  # at the call, before anything is shown


def test_a_real_model_tells_its_documented_story(shared_data):
    folder = shared_data / "checkpoints" / "stories260K"
    model, params = hf.load_pretrained(folder, jnp.float32)
    tokenizer = hf.load_tokenizer(folder)
    expected = (folder / "expected_greedy.txt").read_text().rstrip("\n")
    story = generate(model, params, [[tokenizer.bos_token_id]], 260)[0]
    assert tokenizer.decode(story).startswith(expected)
    assert len(tokenizer.decode(story)) - len(expected) < 260


def test_an_adapted_model_with_its_adapter():
    base, params = tiny.model()
    method = jp.lora(rank=4, alpha=32)
    model, trainable, frozen = jp.setup(method, base, params, jax.random.key(0))
    trainable = {
        path: 0.3 * jax.random.normal(jax.random.key(len(path)), leaf.shape) for path, leaf in trainable.items()
    }
    adapted = tree.combine(trainable, frozen)
    found = generate(model, adapted, PROMPTS[1:2], 12, eos=())
    assert found == [uncached(model, adapted, PROMPTS[1], 12)]
    assert found != generate(base, params, PROMPTS[1:2], 12, eos=())


def test_a_text_ends_at_an_end_token_which_is_left_out():
    model, params = tiny.model()
    whole = generate(model, params, PROMPTS, 12, eos=())
    end = whole[2][4]
    cut = [ids[: ids.index(end)] if end in ids else ids for ids in whole]
    assert generate(model, params, PROMPTS, 12, eos=[end]) == cut
    assert len(cut[2]) <= 4


def test_the_end_tokens_are_those_of_the_configuration():
    model, params = tiny.model()
    end = generate(model, params, [[5]], 3, eos=())[0][2]
    ending, _ = tiny.model(eos_token_id=end)
    assert len(generate(ending, params, [[5]], 3)[0]) < 3


def test_a_prompt_near_the_limit_gets_the_tokens_that_fit():
    model, params = tiny.model()
    room = model.config.max_position_embeddings
    prompts = [[1] * (room - 2), [1, 2]]
    assert [len(ids) for ids in generate(model, params, prompts, 5, eos=())] == [2, 5]


def test_lengths_that_are_rounded_alike_share_a_compilation():
    model, params = tiny.model(rms_norm_eps=1e-4)
    before = decoding._read._cache_size(), decoding._steps._cache_size()
    for length, new in ((3, 5), (20, 9), (32, 1), (7, 32)):
        generate(model, params, [[1] * length], new, eos=())
    assert (decoding._read._cache_size(), decoding._steps._cache_size()) == (before[0] + 1, before[1] + 1)


def test_one_choice_is_no_choice():
    model, params = tiny.model()
    greedy = generate(model, params, PROMPTS, 8, eos=())
    key = jax.random.key(0)
    assert generate(model, params, PROMPTS, 8, temperature=3.0, top_k=1, key=key, eos=()) == greedy
    assert generate(model, params, PROMPTS, 8, temperature=1.0, top_p=1e-6, key=key, eos=()) == greedy


def test_sampling_is_a_function_of_the_key():
    model, params = tiny.model()

    def sample(seed):
        return generate(model, params, PROMPTS, 8, temperature=2.0, key=jax.random.key(seed), eos=())

    assert sample(1) == sample(1)
    assert sample(1) != sample(2)
    same = generate(model, params, [[5]] * 2, 20, temperature=2.0, key=jax.random.key(1), eos=())
    assert same[0] != same[1]


@pytest.mark.parametrize("settings", [{}, {"top_k": 5}, {"top_p": 0.6}, {"top_k": 6, "top_p": 0.7}])
def test_first_tokens_are_drawn_from_the_models_distribution(settings):
    model, params = tiny.model()
    draws = 2048
    logits = model.apply(params, {"tokens": np.asarray([PROMPTS[1]])})[0, -1] / 2.0
    probabilities = np.sort(np.asarray(jax.nn.softmax(logits), np.float64))[::-1]
    order = np.argsort(-np.asarray(logits))
    kept = probabilities[: settings.get("top_k", len(probabilities))]
    kept = kept / kept.sum()
    kept = kept[: int(np.searchsorted(np.cumsum(kept), settings.get("top_p", 1.0))) + 1]
    expected = np.zeros(97)
    expected[order[: len(kept)]] = kept / kept.sum()
    ids = generate(
        model,
        params,
        [PROMPTS[1]] * draws,
        1,
        temperature=2.0,
        key=jax.random.key(0),
        eos=(),
        batch_size=draws,
        **settings,
    )
    found = np.bincount([one[0] for one in ids], minlength=97) / draws
    assert not found[expected == 0].any()
    # Five standard deviations of a binomial, per token.
    assert (np.abs(found - expected) <= 5 * np.sqrt(expected * (1 - expected) / draws) + 1e-12).all()


def test_the_likeliest_tokens_by_hand():
    logits = jnp.log(jnp.asarray([[0.1, 0.4, 0.2, 0.3], [0.25, 0.25, 0.25, 0.25]]))

    def kept(k, p):
        return np.isfinite(np.asarray(keep_likeliest(logits, k, p))).astype(int).tolist()

    assert kept(2, 1.0) == [[0, 1, 0, 1], [1, 1, 1, 1]]  # equal tokens stay together
    assert kept(4, 0.65)[0] == [0, 1, 0, 1]
    assert kept(4, 0.75)[0] == [0, 1, 1, 1]
    assert kept(3, 0.5)[0] == [0, 1, 0, 1]  # 0.4 / 0.9 < 0.5
    assert kept(4, 0.01)[0] == [0, 1, 0, 0]


def test_a_sliding_window_as_pytorch_decodes_it(tmp_path):
    from tests.peft import reference

    base = reference.write_base(tmp_path / "base", "mistral", sliding_window=6, num_hidden_layers=2)
    model, params = reference.load(base)
    theirs = reference.torch_base(base)
    import torch

    for prompt in ([3, 1, 4, 1, 5, 9, 2, 6, 5, 3, 5, 8], [2, 7]):
        ids = theirs.generate(
            torch.tensor([prompt]), max_new_tokens=15, do_sample=False, eos_token_id=None, pad_token_id=0
        )
        assert generate(model, params, [prompt], 15, eos=())[0] == ids[0, len(prompt) :].tolist()


@pytest.mark.parametrize(
    ("prompts", "settings", "reason"),
    [
        ([[1], [1] * 128], {}, "prompt 1 has 128 tokens; the model has room for 128"),
        ([[1], []], {}, "prompt 1 is empty"),
        ([[97]], {}, "prompt 0 has an id outside the vocabulary of 97"),
        ([[-1]], {}, "prompt 0 has an id outside the vocabulary of 97"),
        ([[1]], {"max_new_tokens": 0}, "max_new_tokens 0 must be at least 1"),
        ([[1]], {"top_k": 0}, "top_k 0 must be at least 1"),
        ([[1]], {"top_p": 0.0}, "top_p 0.0 must be above 0"),
        ([[1]], {"temperature": -1.0}, "temperature -1.0 must be a finite number of at least 0"),
        ([[1]], {"temperature": 1.0}, "needs a PRNG key"),
    ],
)
def test_what_cannot_be_decoded_is_refused(prompts, settings, reason):
    model, params = tiny.model()
    with pytest.raises(InputError, match=reason):
        generate(model, params, prompts, **{"max_new_tokens": 4, **settings})


def test_no_prompts_no_answers():
    model, params = tiny.model()
    assert generate(model, params, [], 4) == []


def test_what_comes_of_no_numbers_is_no_text():
    """A weight that is NaN, and the embedding of a token that is chosen second, which the third is chosen from."""
    model, params = tiny.model()
    broken = {**params, "norm": {"scale": params["norm"]["scale"].at[3].set(jnp.nan)}}
    with pytest.raises(RunError, match=r"prompt 0: the logits of new token 1 are no numbers \(NaN\)"):
        generate(model, broken, PROMPTS[:2], 4, eos=())
    with pytest.raises(RunError, match="logits of new token 1"):
        list(decoding.stream(model, broken, PROMPTS[0], 4, eos=()))
    table = params["embed_tokens"]["embedding"]
    third = generate(model, params, PROMPTS[1:2], 3, eos=())[0][1]
    broken = {**params, "embed_tokens": {"embedding": table.at[third].set(jnp.nan)}}
    with pytest.raises(RunError, match="prompt 0: the logits of new token 3 are"):
        generate(model, broken, PROMPTS[1:2], 4, eos=())
