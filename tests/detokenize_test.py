"""Text as its tokens come: whole characters only, and together what all tokens read at once."""

import pytest
import tokenizers
import transformers
from tokenizers import decoders, models, pre_tokenizers

from jaxpeft.detokenize import TextStream, continuation


def _fast(vocabulary, decoder):
    made = tokenizers.Tokenizer(models.WordLevel({token: i for i, token in enumerate(vocabulary)}, unk_token="?"))
    made.decoder = decoder
    made.add_special_tokens(["<end>"])
    return transformers.PreTrainedTokenizerFast(tokenizer_object=made, unk_token="?", eos_token="<end>")


ALPHABET = sorted(pre_tokenizers.ByteLevel.alphabet())
BYTE_LEVEL = _fast([*ALPHABET, "?"], decoders.ByteLevel())
# As Llama 2 writes it: a mark before each word, bytes where the vocabulary has no piece.
PIECES = ["▁a", "▁b", "c", *(f"<0x{byte:02X}>" for byte in range(256)), "?"]
MARKED = _fast(
    PIECES,
    decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    ),
)


def _byte_level(text):
    encoded = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False).pre_tokenize_str(text)
    return [ALPHABET.index(symbol) for word, _ in encoded for symbol in word]


def _bytes(text):
    return [PIECES.index(f"<0x{byte:02X}>") for byte in text.encode()]


@pytest.mark.parametrize(
    ("tokenizer", "prompt", "new", "text"),
    [
        (BYTE_LEVEL, _byte_level("né"), _byte_level("é 🙂! ünï 漢字"), "é 🙂! ünï 漢字"),
        (BYTE_LEVEL, _byte_level("n"), _byte_level("é🙂")[:-1], "é\N{REPLACEMENT CHARACTER}"),  # the end is missing
        (BYTE_LEVEL, [], _byte_level("a\N{REPLACEMENT CHARACTER}b"), "a\N{REPLACEMENT CHARACTER}b"),
        (MARKED, [0], [1, 2, *_bytes("é"), 1, *_bytes("🙂漢"), 0], " bcé b🙂漢 a"),  # the space before the first word
        (MARKED, [], [0, 1], "a b"),  # none where the text begins
        (MARKED, [0, len(PIECES)], [1, len(PIECES), 1], " b b"),  # special tokens are not shown
    ],
)
@pytest.mark.parametrize("at_once", [1, 3])
def test_pieces_are_whole_and_together_the_text(tokenizer, prompt, new, text, at_once):
    assert continuation(tokenizer, prompt, new) == text
    stream = TextStream(tokenizer, prompt)
    pieces = [stream.add(new[i : i + at_once]) for i in range(0, len(new), at_once)]
    broken = "\N{REPLACEMENT CHARACTER}"
    assert broken in text or not any(broken in piece for piece in pieces)
    assert "".join([*pieces, stream.rest()]) == stream.text == text
    assert stream.ids == new
